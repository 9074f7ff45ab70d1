"""The loss of NSA layers that begin with a trained dense model: `python benchmarks/nsa_start.py [key=value ...]`.

Trains a small dense decoder on the sources of Python's asyncio, gives its weights to decoders with NSA
(`nsa.layers.kind.Kind.from_dense`), and trains these on. Prints the loss on held-out text, in nats per token, before
the first of these steps and after some. `as before` is a decoder whose compression and gates are those of a new run.
"""

import sys
import sysconfig
from itertools import pairwise
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from nsa.config import Config, load_config
from nsa.data.loader import SampleStream
from nsa.data.prepare import prepare
from nsa.layers.kinds import kind_of
from nsa.models import AttentionConfig, Decoder

YAML = """
name: nsa-start
model: {{vocab_size: 512, hidden_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 16,
        intermediate_size: 160, max_position: 256}}
attention:
  kind: nsa
  nsa: {{compress_length: 16, compress_stride: 8, block_size: 16, num_blocks: 4, window: 32}}
data:
  sequence_length: 256
  validation_fraction: 0.2
  workers: 1
  tokenizer: {{vocab_size: 512, train_bytes: 200_000}}
  sources: [{{name: text, kind: files, path: "{text}"}}]
optimizer: {{learning_rate: 3.0e-3}}
training: {{steps: 250, global_batch_size: 4, micro_batch_size: 4}}
"""
AFTER = (0, 10, 40)  # steps of NSA


def main(overrides: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = f"{folder}/config.yaml"
        with open(path, "w") as file:  # noqa: PTH123
            file.write(YAML.format(text=f"{sysconfig.get_path('stdlib')}/asyncio/*.py"))
        config = load_config(path, overrides)
    torch.manual_seed(config.seed)
    prepared = prepare(config.data, config.seed)
    train, held_out = (SampleStream(prepared, config.data, split, config.seed) for split in ("train", "validation"))
    dense = Decoder(config.model, AttentionConfig(kind="dense"), backend="torch")
    steps = config.training.steps
    run(dense, config, train, 0, steps, config.optimizer.learning_rate)
    print(f"dense, {steps} steps: {loss(dense, held_out):.4f}", flush=True)
    run(again := copy_of(dense, config), config, train, steps, AFTER[-1], config.optimizer.learning_rate / 10)
    print(f"dense, {AFTER[-1]} more: {loss(again, held_out):.4f}", flush=True)
    width = config.model.head_dim
    variants = (("as before", None, True), ("now", None, False), ("now, twice the width", 2 * width, False))
    for name, hidden, new in variants:
        decoder = sparse_of(dense, config, hidden, new)
        found = [loss(decoder, held_out)]
        for done, until in pairwise(AFTER):
            run(decoder, config, train, steps + done, until - done, config.optimizer.learning_rate / 10)
            found.append(loss(decoder, held_out))
        row = ", ".join(f"{after}: {value:.4f}" for after, value in zip(AFTER, found, strict=True))
        print(f"NSA, {name}; after steps {row}", flush=True)


def copy_of(decoder: Decoder, config: Config) -> Decoder:
    other = Decoder(config.model, decoder.attention, backend="torch")
    other.load_state_dict(decoder.state_dict())
    return other


def sparse_of(dense: Decoder, config: Config, hidden: int | None, new: bool) -> Decoder:
    """``new``: compression and gates as in a new run."""
    nsa = config.attention.nsa.model_copy(update={"compress_hidden": hidden})
    attention = config.attention.model_copy(update={"nsa": nsa})
    torch.manual_seed(config.seed)
    decoder, there = Decoder(config.model, attention, backend="torch"), dense.state_dict()
    first = decoder.state_dict()
    for name, value in first.items():
        prefix, _, inside = name.partition(".attention.")
        if not inside:
            first[name] = there[name]
        elif not (new and inside.startswith(("compress.", "gate."))):

            def read(part: str, prefix: str = prefix) -> Tensor:
                return there[f"{prefix}.attention.{part}"]

            found = kind_of("nsa").from_dense(inside, value.shape, nsa, read)
            first[name] = value if found is None else found
    decoder.load_state_dict(first)
    return decoder


def run(decoder: Decoder, config: Config, stream: SampleStream, first: int, steps: int, rate: float) -> None:
    optimizer, size = torch.optim.AdamW(decoder.parameters(), rate, (0.9, 0.95)), config.training.micro_batch_size
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step - first + 1) / 10)
        optimizer.zero_grad()
        mean(decoder, stream, range(step * size, (step + 1) * size)).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def loss(decoder: Decoder, stream: SampleStream) -> float:
    return mean(decoder, stream, range(16)).item()


def mean(decoder: Decoder, stream: SampleStream, samples: range) -> Tensor:
    """Of samples as one document each, so that their queries see more than NSA selects."""
    ids = torch.stack([torch.from_numpy(stream[i].tokens) for i in samples])
    return decoder(ids[:, :-1], targets=ids[:, 1:]).mean()


if __name__ == "__main__":
    main(sys.argv[1:])
