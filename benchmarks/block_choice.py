"""How much of a dense model's attention do NSA's blocks hold, if compressed keys are means of the model's own keys?

    python benchmarks/block_choice.py FOLDER [--tokens 4096] [--text FILE]

FOLDER: a Hugging Face Llama, Mistral or Qwen of dense layers. NSA that starts from it has such compressed keys
(docs/importing.md). Nothing is trained: queries and keys of each layer are those of the dense model, and the blocks are
chosen by `nsa.ops.select_blocks`: 8 of 64 tokens, the first one and the last two among them. Beside them the same
choice by the bounds of Quest's pages, at random, and by the attention itself (`best`).

What counts is the attention, mean over the heads of a KV head, outside of the first block and of a window of 256
tokens. `all`: the share of it that the blocks hold. `one token`: the same, of those queries and KV heads that give 0.4
of their attention to a single token there, mean over layers. Two samples: FILE (the module argparse), and random tokens
followed by the same again. Such single tokens may be the same for all queries: benchmarks/taught_choice.py looks.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.plan import Turn
from nsa.importing import read_config, read_weights
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.ops.selection import pick_blocks

BLOCK, WINDOW, FORCED = 64, 256, {"num_blocks": 8, "num_initial": 1, "num_local": 2}
LENGTHS = (64, 32, 16, 8, 4)  # tokens of a compression block, whose stride is half of that
ONE = 0.4  # of the attention on one token
EVERY = 16  # queries


def decoder_of(folder: Path) -> Decoder:
    """The model of a Hugging Face folder.

    Raises:
        ValueError: it cannot be imported, or its layers are not dense ones with keys for each KV head.
    """
    sections = read_config(folder)
    if sections["attention"].get("kind", "dense") != "dense" or sections["model"].get("mla"):
        raise ValueError(f"{folder} has no keys for each KV head: name a Llama, Mistral or Qwen")
    model = ModelConfig.model_validate(sections["model"])
    decoder = Decoder(model, AttentionConfig.model_validate(sections["attention"])).eval()
    decoder.load_state_dict(read_weights(folder, model))
    return decoder


def read(decoder: Decoder, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rotated queries (1, T, H, D) and keys (1, T, G, D) of each layer."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: torch.nn.Module, given: tuple) -> None:
        seen.append((given[0], given[1][0]))

    hooks = [layer.attention.attend.register_forward_pre_hook(keep) for layer in decoder.layers]
    with torch.no_grad():
        decoder(ids)
    for hook in hooks:
        hook.remove()
    return seen


def by_means(q: Tensor, k: Tensor, turn: Turn, length: int) -> Tensor:
    """(1, T, G, n) blocks that NSA selects with compressed keys that are means of the keys before rotation."""
    tokens, stride = k.shape[1], length // 2
    start = torch.arange(0, tokens - length + 1, stride)
    plain = turn(k, -torch.arange(tokens)[None])
    means = plain[:, start[:, None] + torch.arange(length)].mean(2)
    k_cmp = turn(means, start[None] + length - 1)
    sizes = {"length": length, "stride": stride}
    lse = ops.compressed_attention(q, k_cmp, k_cmp, **sizes)[1]
    return ops.select_blocks(q, k_cmp, lse, **sizes, block_size=BLOCK, **FORCED)


def bounds(q: Tensor, k: Tensor) -> Tensor:
    """(1, G, T, blocks): what no score in a block is above, summed over the heads of a KV head (Quest)."""
    low, high = ops.page_bounds(k, torch.tensor([k.shape[1]]), page_size=BLOCK)
    queries = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)[:, :, :, :, None]  # (1, G, h, T, 1, D)
    keys = (x.transpose(1, 2)[:, :, None, None] for x in (low, high))
    return torch.maximum(*(queries * x for x in keys)).sum(-1).sum(2)


def shares(q: Tensor, k: Tensor, turn: Turn) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of one layer, by who chooses: (what is held, what there is, whether it is on one token), each (G, queries)."""
    tokens, groups = k.shape[1], k.shape[2]
    query = torch.arange(tokens // 2 + WINDOW, tokens, EVERY)
    of_query = q[:, query]
    scores = torch.einsum("btgjd,bsgd->bgjts", of_query.unflatten(2, (groups, -1)), k) * q.shape[3] ** -0.5
    scores = scores.masked_fill(torch.arange(tokens) > query[:, None], -torch.inf)
    far = (torch.arange(tokens) <= query[:, None] - WINDOW) & (torch.arange(tokens) >= BLOCK)
    mass = scores.softmax(-1).mean(2) * far  # (1, G, queries, T)
    blocks = mass.unflatten(-1, (-1, BLOCK)).sum(-1)
    random = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0))
    chosen = {
        name: pick_blocks(importance, query, BLOCK, *FORCED.values())
        for name, importance in {"best": blocks, "Quest": bounds(of_query, k), "random": random}.items()
    }
    chosen |= {f"means of {length}": by_means(q, k, turn, length)[:, query] for length in LENGTHS}
    found = {}
    for name, picked in chosen.items():
        of = picked[0].transpose(0, 1).long()  # (G, queries, n)
        held = blocks[0].gather(-1, of.clamp(min=0)).masked_fill(of < 0, 0).sum(-1)
        found[name] = held, mass[0].sum(-1), mass[0].amax(-1) > ONE
    return found


def measure(decoder: Decoder, ids: Tensor, say: Callable[[str], None]) -> dict[str, tuple[float, float]]:
    """By who chooses: the share of all, and where one token counts."""
    turn = Turn(decoder.rotary.frequencies(decoder.config.head_dim))
    layers = [shares(q, k, turn) for q, k in read(decoder, ids)]
    result = {}
    for name in layers[0]:
        held, there, one = zip(*(layer[name] for layer in layers), strict=True)
        everything = torch.stack(held).sum(0).sum() / torch.stack(there).sum()
        single = [(h[o] / t[o]).mean() for h, t, o in zip(held, there, one, strict=True) if o.any()]
        result[name] = float(everything), float(torch.stack(single).mean()) if single else float("nan")
        say(f"{name:12s}  all {result[name][0]:.3f}  one token {result[name][1]:.3f} ({len(single)} layers)")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {2 * BLOCK}")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    options = parser.parse_args()
    if options.tokens < 8 * WINDOW or options.tokens % (2 * BLOCK):
        parser.error(f"--tokens must be a multiple of {2 * BLOCK}, and at least {8 * WINDOW}")
    try:
        decoder = decoder_of(options.folder)
    except ValueError as error:
        parser.error(str(error))
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(options.folder)(options.text.read_text())["input_ids"][: options.tokens]
    if len(text) < options.tokens:
        parser.error(f"{options.text} has {len(text)} tokens: name a longer text with --text, or fewer --tokens")
    half = torch.randint(decoder.config.vocab_size, (options.tokens // 2,), generator=torch.Generator().manual_seed(0))
    for title, ids in ((options.text.name, torch.tensor(text)), ("said twice", half.repeat(2))):
        print(f"{title}, {options.tokens} tokens")
        measure(decoder, ids[None], print)


if __name__ == "__main__":
    main()
