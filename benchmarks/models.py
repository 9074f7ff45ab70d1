"""Tokens/s, MFU and memory of whole training steps: NSA beside the same model with dense attention.

    python benchmarks/models.py [--configs 25m 125m] [--tokens 8192 16384 32768 65536] [--out FILE] [KEY=VALUE ...]

A step is forward, backward and a fused AdamW update of the decoder in bf16, batch 1, on one GPU, without DeepSpeed,
forward and backward by CUDA graphs as in the trainer; the median of several. MFU counts what the configured attention
needs (`nsa.models.sizes`), not what a dense one would, against the data sheet's peak. Results go into FILE under
"models"; an existing FILE keeps its other entries.
"""

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import environment
from nsa.config import load_config
from nsa.models import Decoder, training_flops_per_token
from nsa.training.cuda_graphs import GraphedDecoder

ROOT = Path(__file__).parents[1]
PEAK_TFLOPS = 989.5  # dense bf16 of an H100 or H200 (NVIDIA's data sheet)


def measure(config_name: str, kind: str, tokens: int, steps: int, overrides: list[str]) -> dict:
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [*overrides, f"attention.kind={kind}"])
    row: dict = {"config": config_name, "attention": kind, "tokens": tokens}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Decoder(config.model, config.attention).bfloat16()
    model.forward = GraphedDecoder(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = (torch.randint(config.model.vocab_size, (1, tokens), device="cuda") for _ in range(2))
    borders = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(inputs, targets=targets, cu_seqlens=borders).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    for _ in range(3):  # compiles, and fills caches
        step()
    milliseconds = statistics.median(step() for _ in range(steps))
    flops = training_flops_per_token(config.model, config.attention, tokens)["sparse"]
    row["ms"] = round(milliseconds, 1)
    row["tokens_per_s"] = round(tokens / milliseconds * 1e3)
    row["mfu"] = round(flops * tokens / milliseconds / 1e9 / PEAK_TFLOPS, 3)
    row["peak_mb"] = torch.cuda.max_memory_allocated() >> 20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["25m", "125m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384, 32768, 65536])
    parser.add_argument("--kinds", nargs="+", default=["nsa", "dense"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    report: dict = environment()
    if options.out and options.out.exists():
        report = json.loads(options.out.read_text())
    rows = report["models"] = []
    for config in options.configs:
        for tokens in options.tokens:
            for kind in options.kinds:
                try:
                    row = measure(config, kind, tokens, options.steps, options.overrides)
                except torch.OutOfMemoryError:
                    row = {"config": config, "attention": kind, "tokens": tokens, "refused": "out of memory"}
                gc.collect()
                torch.cuda.empty_cache()
                rows.append(row)
                print(row, flush=True)
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
