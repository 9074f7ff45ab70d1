"""What a prompt costs in the comparison: a layer of each method that chooses in prompts, and of what leaves them dense.

    python benchmarks/prompts.py [--methods oracle_topk random ...] [--tokens 4096] [--budget 0.125] [--out FILE]

Milliseconds and MiB of one call of `nsa.baselines.Session`: choice, attention and ledger. Shapes are those of the
study (configs/compare/study-4k.yaml). Beside them torch's `scaled_dot_product_attention`, causal (cuDNN or
FlashAttention), and with a mask that keeps the same share, which is what a method costs that chooses for nothing.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import called_ms, environment, need_gpu
from nsa import ops
from nsa.baselines import Budget, Session, Turn
from nsa.baselines.methods import METHODS

HEADS, GROUPS, WIDTH = 8, 4, 64  # of configs/25m-recall.yaml
KINDS = {kind.name: kind for kind in METHODS if "prefill" in kind.phases or kind.name == "dense"}


def row(name: str, call: Callable[[], object], each: int) -> dict[str, Any]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call()
    except Exception as error:  # the others go on
        found: dict[str, Any] = {"call": name, "failed": f"{type(error).__name__}: {error}"[:200]}
    else:
        mib = (torch.cuda.max_memory_allocated() - before) >> 20
        found = {"call": name, "ms": round(called_ms(call, each), 3), "mib": mib}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt")
    parser.add_argument("--batch", type=int, default=2, help="prompts")
    parser.add_argument("--budget", type=float, default=0.125, help="share of the tokens")
    parser.add_argument("--milliseconds", type=int, default=100, help="of the warm-up and of the measuring of a row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    (q, k, v) = (
        torch.randn(options.batch, options.tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    mask = torch.rand(options.batch, GROUPS, options.tokens, options.tokens, device="cuda") < options.budget
    mask |= torch.eye(options.tokens, device="cuda", dtype=torch.bool)  # a query that sees nothing is NaN in torch
    seen = mask.tril()
    rows = [
        row("torch, causal", lambda: scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True), 100),
        row("torch, mask", lambda: _by_torch(turned, seen), options.milliseconds),
        row("dense_attention", lambda: ops.dense_attention(q, k, v), options.milliseconds),
        row("masked_attention", lambda: ops.masked_attention(q, k, v, mask), options.milliseconds),
    ]
    turn = Turn(10_000.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2)))
    for name in options.methods:
        session = Session(KINDS[name](budget=Budget(share=options.budget)), 1, turn=turn)

        def call(session: Session = session) -> None:
            session.begin()
            session.attend(0, q, k, v, WIDTH**-0.5)

        rows.append(row(name, call, options.milliseconds))
    if options.out:
        report = environment() | {"command": shlex.join(["python", *sys.argv]), "prompts": {"rows": rows}}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _by_torch(turned: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    q, k, v = turned
    k, v, mask = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v, mask))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


if __name__ == "__main__":
    main()
