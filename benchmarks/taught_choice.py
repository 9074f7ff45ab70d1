"""How much of a dense model's attention do NSA's blocks hold, if the compression of keys is taught that attention?

    python benchmarks/taught_choice.py FOLDER [--layers 4 10 16 22 28] [--samples 14] [--steps 120] [--twice]

FOLDER: as for benchmarks/block_choice.py. The model stays as it is. For some of its layers, each compression below
learns the share of attention that a query gives to each block (KL; mean over the heads of a KV head, outside of the
first block and of a window of 256). Then 5 blocks of 64 are chosen for queries of samples that it has not seen, by
NSA's importance (Eq. 8-10). Printed: the share of that attention which they hold, before and after: an
upper bound of NSA's, where the window's blocks compete for the five.

- `mean`: of the keys before rotation, and a factor. `linear`: the mean through a matrix.
- `mlp`: NSA's, twice the width hidden. `pooled`: a softmax over the tokens of a block, for each channel, of their keys
  through a matrix and a bias for each place, as DeepSeek-V4 compresses. `through`: that mean through a matrix, which is
  `attention.nsa.key_compression: pooled`.
- `best`: by the attention itself. `the same for all`: the five blocks with most attention of all queries together, what
  a choice finds that knows salient tokens and not what a query asks for. `random`.

All begin as the mean. Samples are modules of Python's library, 4,096 tokens each; with --twice random tokens followed
by the same again, and as many layers as named: those whose queries give most to different
single tokens, as heads do that copy.
"""

import argparse
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.block_choice import BLOCK, ONE, WINDOW, decoder_of, read
from nsa.baselines.plan import Turn

TOKENS, EVERY, HELD_OUT, CHOSEN = 4096, 8, 3, 5
QUERIES = torch.arange(TOKENS // 2 + WINDOW, TOKENS, EVERY)
FIRST = torch.arange(0, TOKENS, BLOCK)  # token of each block
FAR = (FIRST >= BLOCK) & (QUERIES[:, None] - WINDOW >= FIRST + BLOCK)  # (queries, blocks)
Row = tuple[Tensor, Tensor, Tensor]  # queries (G, h, n, D), keys before rotation (G, T, D), mass (G, n, blocks)


class Mean(nn.Module):
    """Blocks (G, M, length, D) to one key each, (G, M, D)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length, self.factor = length, nn.Parameter(torch.ones(()))

    def forward(self, blocks: Tensor) -> Tensor:
        return self.factor * blocks.mean(2)


class Linear(Mean):
    def __init__(self, length: int, width: int) -> None:
        super().__init__(length, width)
        self.matrix = nn.Parameter(torch.eye(width))

    def forward(self, blocks: Tensor) -> Tensor:
        return super().forward(blocks) @ self.matrix


class Mlp(Mean):
    def __init__(self, length: int, width: int) -> None:
        super().__init__(length, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        mean = torch.eye(width).repeat(1, length) / length  # silu(x) - silu(-x) = x
        self.inner = nn.Parameter(torch.cat((mean, -mean)))
        self.outer = nn.Parameter(torch.cat((torch.eye(width), -torch.eye(width)), 1))

    def forward(self, blocks: Tensor) -> Tensor:
        return self.factor * silu((blocks + self.place).flatten(2) @ self.inner.T) @ self.outer.T


class Pooled(Mean):
    def __init__(self, length: int, width: int) -> None:
        super().__init__(length, width)
        self.matrix, self.place = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(length, width))

    def forward(self, blocks: Tensor) -> Tensor:
        return self.factor * ((blocks @ self.matrix + self.place).softmax(2) * blocks).sum(2)


class Through(Pooled):
    def __init__(self, length: int, width: int) -> None:
        super().__init__(length, width)
        self.outer = nn.Parameter(torch.eye(width))

    def forward(self, blocks: Tensor) -> Tensor:
        return super().forward(blocks) @ self.outer


COMPRESSIONS = {"mean": Mean, "linear": Linear, "mlp": Mlp, "pooled": Pooled, "through": Through}


def importance(compression: Mean, q: Tensor, keys: Tensor, turn: Turn) -> Tensor:
    """(G, queries, blocks): NSA's, from keys compressed at a stride of half their length."""
    length, stride = compression.length, compression.length // 2
    start = torch.arange(0, TOKENS - length + 1, stride)
    k = compression(keys[:, start[:, None] + torch.arange(length)])  # (G, M, D)
    end = start + length - 1
    k = turn(k.transpose(0, 1)[None], end[None])[0].transpose(0, 1)
    scores = torch.einsum("ghnd,gmd->ghnm", q, k) * q.shape[-1] ** -0.5
    p = scores.masked_fill(end > QUERIES[:, None], -torch.inf).softmax(-1).sum(1)  # (G, n, M)
    shared = torch.zeros(len(start), len(FIRST))
    for half in (0, stride):
        shared[torch.arange(len(start)), (start + half) // BLOCK] += 1
    return p @ shared


def rows_of(decoder: nn.Module, ids: Tensor, turn: Turn) -> list[tuple[Row, float]]:
    """Of each layer; and how many different far tokens get ONE of the attention of a query, of all KV heads."""
    found = []
    for q, k in read(decoder, ids[None]):
        of_query = q[0, QUERIES].unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3)  # (G, h, n, D)
        scores = torch.einsum("ghnd,sgd->ghns", of_query, k[0]) * q.shape[3] ** -0.5
        seen = torch.arange(TOKENS) <= QUERIES[:, None]
        attention = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)  # (G, n, T)
        attention = attention * FAR.repeat_interleave(BLOCK, 1)
        plain = turn(k, -torch.arange(TOKENS)[None])[0].transpose(0, 1)
        value, token = attention.max(-1)  # (G, n)
        one = float(sum(len(set(t[v > ONE].tolist())) for t, v in zip(token, value, strict=True)))
        found.append(((of_query.clone(), plain.clone(), attention.unflatten(-1, (-1, BLOCK)).sum(-1)), one))
    return found


def share(compression: Mean | None, rows: list[Row], turn: Turn, by: str = "best") -> float:
    """Of the far attention, what the chosen blocks hold. No compression: chosen as `best`, `same` or `random`."""
    held = there = 0.0
    for q, keys, mass in rows:
        if compression is not None:
            rank = importance(compression, q, keys, turn)
        elif by == "random":
            rank = torch.rand(mass.shape, generator=torch.Generator().manual_seed(0))
        else:
            rank = mass if by == "best" else mass.sum(1, keepdim=True).expand_as(mass)
        chosen = rank.masked_fill(~FAR, -1).topk(CHOSEN, -1).indices
        held += float(mass.gather(-1, chosen).sum())
        there += float(mass.sum())
    return held / there


def teach(compression: Mean, rows: list[Row], turn: Turn, steps: int) -> None:
    optimizer = torch.optim.Adam(compression.parameters(), lr=3e-3)
    for step in range(steps):
        q, keys, mass = rows[step % len(rows)]
        predicted = importance(compression, q, keys, turn) * FAR
        log_q = (predicted / predicted.sum(-1, keepdim=True).clamp(min=1e-9)).clamp(min=1e-9).log()
        loss = -(mass * log_q).sum() / mass.sum()  # queries count by the attention that they have there
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def samples_of(folder: Path, number: int) -> list[Tensor]:
    """Ids of modules of Python's library, those with most bytes first."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
    for path in sorted(modules, key=lambda path: (-path.stat().st_size, path.name)):
        ids = tokenizer(path.read_text(errors="ignore")[: 10 * TOKENS])["input_ids"][:TOKENS]
        if len(ids) == TOKENS and len(found) < number:
            found.append(torch.tensor(ids))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 10, 16, 22, 28])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 8], help="tokens of a compression block")
    parser.add_argument("--samples", type=int, default=14, help=f"of which {HELD_OUT} are held out")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--twice", action="store_true", help="random tokens said twice")
    options = parser.parse_args()
    if options.samples <= HELD_OUT:
        parser.error(f"--samples {options.samples}: {HELD_OUT} are held out, so name more")
    if any(length < 2 or 2 * BLOCK % length for length in options.lengths):
        parser.error(f"--lengths {options.lengths}: even divisors of {2 * BLOCK}")
    try:
        decoder = decoder_of(options.folder)
    except ValueError as error:
        parser.error(str(error))
    if decoder.config.max_position < TOKENS:
        parser.error(f"{options.folder} is for {decoder.config.max_position} positions, and samples have {TOKENS}")
    layers = decoder.config.num_layers
    if not all(0 <= layer < layers for layer in options.layers):
        parser.error(f"--layers: the model has layers 0 to {layers - 1}")
    if options.twice:
        dice, half = torch.Generator().manual_seed(0), (options.samples, TOKENS // 2)
        samples = list(torch.randint(decoder.config.vocab_size, half, generator=dice).repeat(1, 2))
    else:
        samples = samples_of(options.folder, options.samples)
        if len(samples) < options.samples:
            parser.error(f"--samples {options.samples}: Python's library has {len(samples)} modules of that length")
    turn = Turn(decoder.rotary.frequencies(decoder.config.head_dim))
    rows: dict[int, list[Row]] = {layer: [] for layer in range(layers)}
    ones = [0.0] * layers
    for number, ids in enumerate(samples, 1):
        for layer, (row, one) in enumerate(rows_of(decoder, ids, turn)):
            ones[layer] += one
            if options.twice or layer in options.layers:
                rows[layer].append(row)
        print(f"sample {number} of {len(samples)}", flush=True)
    chosen = sorted(range(layers), key=lambda n: -ones[n])[: len(options.layers)] if options.twice else options.layers
    for layer in chosen:
        seen, held_out = rows[layer][:-HELD_OUT], rows[layer][-HELD_OUT:]
        bounds = (f"{by} {share(None, held_out, turn, by):.3f}" for by in ("best", "same", "random"))
        print(f"layer {layer}: {', '.join(bounds)}, {ones[layer] / len(samples):.0f} different tokens", flush=True)
        for length in options.lengths:
            for name, kind in COMPRESSIONS.items():
                compression = kind(length, decoder.config.head_dim)
                before = share(compression, held_out, turn)
                teach(compression, seen, turn, options.steps)
                print(
                    f"  {name} {length} / {length // 2}: {before:.3f}, taught {share(compression, held_out, turn):.3f}"
                )


if __name__ == "__main__":
    main()
