"""Twilight's choice while decoding: the fewest candidates with a share of the attention (arXiv 2502.02770, Alg. 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.ops.decode import check_contiguous
from nsa.ops.dispatch import accumulation_dtype, autocasts, resolve_backend, softmax_scale

BITS = 31  # of a float that is not negative; its bits, read as an integer, have the order of the floats
LEVELS = 15  # steps between the least and the greatest number of a key: 4 bits


class KeySketch(NamedTuple):
    """Keys (B, S, G, D) in 4 bits, each between its own least and greatest number (Twilight, section 4.2).

    Attributes:
        codes: (B, S, G, D / 2) uint8: column j in the lower four bits, column j + D / 2 in the upper ones.
        ranges: (B, S, G, 2) fp32: the least number of the key, and the step from a code to the next.
    """

    codes: Tensor
    ranges: Tensor


@torch.no_grad()
def sketch_keys(k: Tensor) -> KeySketch:
    """The sketch of keys (B, S, G, D), of any floating-point dtype.

    Raises:
        ValueError: an odd width.
    """
    if k.dim() != 4 or k.shape[3] % 2:
        raise ValueError(f"keys must be (B, S, G, D) with an even D: two numbers share a byte; got {tuple(k.shape)}")
    k = k.float()
    least, most = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    step = ((most - least) / LEVELS).clamp(min=torch.finfo(k.dtype).tiny)
    codes = ((k - least) / step).round().to(torch.uint8)
    lower, upper = codes.chunk(2, -1)
    return KeySketch(lower | (upper << 4), torch.cat((least, step), -1))


@torch.no_grad()
def extend_key_sketch(sketch: KeySketch, k: Tensor, lengths: Tensor) -> None:
    """Write the newest token of each sequence into the sketch, in place.

    Args:
        sketch: with room for the token. k: (B, G, D), its keys. lengths: (B,) integer, tokens of each sequence, the new
            one included.
    """
    row, token = torch.arange(len(k), device=k.device), (lengths.long() - 1).clamp(min=0)
    for memory, new in zip(sketch, sketch_keys(k[:, None]), strict=True):
        memory[row, token] = new[:, 0]


@torch.no_grad()
@autocasts("q")
def top_p_tokens(
    q: Tensor,
    sketch: KeySketch,
    lengths: Tensor,
    *,
    p: float,
    pages: Tensor | None = None,
    page_size: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The fewest candidates of each query head that have the share ``p`` of its softmax; a KV head's heads share them.

    Scores are those of the sketch. Shapes alone decide what is launched: a CUDA graph can capture the call. Not
    differentiable.

    Args:
        q: (B, H, D). sketch: from `sketch_keys`, of the memory of a cache; contiguous for the kernels. G divides H.
        lengths: (B,) int32, tokens of each sequence, the new one included.
        p: share of the softmax over the candidates. At least one token is taken; from 1 on, all candidates are.
        pages: (B, G, P) int32, the candidates, as for `decode_attention`; None: all tokens.
        page_size: tokens of a page.
        scale: factor of the scores; None: D ** -0.5.
        backend: auto, triton, torch or naive.

    Returns:
        (B, G, P * page_size or S) int32 tokens in the order of the candidates, then -1: ``pages`` of
        `decode_attention`. Of equal weights the earlier ones are taken.

    Raises:
        ValueError: inconsistent shapes or dtypes, a negative ``p``, unknown backend.
    """
    _check(q, sketch, lengths, pages, page_size)
    if not p >= 0:
        raise ValueError(f"p is a share of the attention, at least 0, got {p}")
    scale = softmax_scale(scale, q.shape[2])
    implementation = resolve_backend(backend, q)
    if implementation == "triton":
        from nsa.ops.kernels import inference_operators as operators

        check_contiguous(codes=sketch.codes, ranges=sketch.ranges)
        return operators.top_p_tokens(q, *sketch, lengths, pages, page_size, p, scale)
    token = _candidates(sketch, pages, page_size)  # (B, G, N)
    there = (token >= 0) & (token < lengths[:, None, None])
    scores = _scores(q, sketch, token) * scale  # (B, G, h, N)
    scores = scores.masked_fill(~there[:, :, None], -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))  # without candidates: 0
    among = there[:, :, None].expand_as(weights)
    keep = (_sorted(weights, p, among) if implementation == "naive" else nucleus(weights.float(), p, among)).any(2)
    order = keep.byte().argsort(dim=-1, descending=True, stable=True)
    return token.masked_fill(~keep, -1).gather(-1, order).int()


def nucleus(weights: Tensor, p: float, among: Tensor | None = None) -> Tensor:
    """The fewest of the last dim whose sum is at least ``p`` of the whole, as a mask; ties go to the lower index.

    weights: fp32, not negative, (..., S). Bisection over the bits of a float finds the threshold exactly. At least one
    is chosen where there is any. For 1 all of ``among`` are chosen (a mask that broadcasts), those too that weigh
    nothing in fp32; None: all that weigh something.
    """
    if p >= 1:
        return weights > 0 if among is None else among.expand_as(weights)
    bits, heavy = weights.view(torch.int32), weights.double()
    wanted = p * heavy.sum(-1, keepdim=True)
    low = torch.zeros_like(bits[..., :1])  # the sum of all from `low` on suffices, that from `high` on does not
    high = bits.amax(-1, keepdim=True) + 1
    for _ in range(BITS):
        middle = low + (high - low) // 2
        enough = (heavy * (bits >= middle)).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above, tied = bits > low, bits == low
    missing = wanted - (heavy * above).sum(-1, keepdim=True)
    each = torch.where(tied, heavy, 0).amax(-1, keepdim=True)
    count = torch.where(each > 0, missing / each, 0).ceil()
    count = torch.where(above.any(-1, keepdim=True), count, count.clamp(min=1))
    return (above | (tied & (tied.cumsum(-1) <= count))) & (weights > 0)


def _sorted(weights: Tensor, p: float, among: Tensor) -> Tensor:
    """As `nucleus`, by sorting."""
    if p >= 1:
        return among
    ordered, order = weights.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    wanted = (before < p * ordered.sum(-1, keepdim=True)) & (ordered > 0)
    wanted[..., :1] = ordered[..., :1] > 0
    return torch.zeros_like(among).scatter(-1, order, wanted)


def _candidates(sketch: KeySketch, pages: Tensor | None, page_size: int) -> Tensor:
    """(B, G, N) int64 tokens; negative: none."""
    batch, tokens, groups = sketch.codes.shape[:3]
    if pages is None:
        return torch.arange(tokens, device=sketch.codes.device).expand(batch, groups, tokens)
    token = pages.long()[..., None] * page_size + torch.arange(page_size, device=pages.device)
    return token.masked_fill(pages[..., None] < 0, -1).flatten(2)


def _scores(q: Tensor, sketch: KeySketch, token: Tensor) -> Tensor:
    """(B, G, h, N) products of queries and sketched keys."""
    dtype = accumulation_dtype(q)
    batch = torch.arange(len(q), device=q.device)[:, None, None]
    group = torch.arange(token.shape[1], device=q.device)[:, None]
    at = batch, token.clamp(0, max(0, sketch.codes.shape[1] - 1)), group
    codes, (least, step) = sketch.codes[at], sketch.ranges[at].split(1, -1)
    keys = torch.cat((codes & 15, codes >> 4), -1).float() * step + least  # (B, G, N, D)
    return torch.einsum("bghd,bgnd->bghn", q.to(dtype).unflatten(1, (token.shape[1], -1)), keys.to(dtype))


def _check(q: Tensor, sketch: KeySketch, lengths: Tensor, pages: Tensor | None, page_size: int) -> None:
    codes, ranges = sketch
    if q.dim() != 3 or codes.dim() != 4 or ranges.shape != (*codes.shape[:3], 2):
        raise ValueError(
            f"q must be (B, H, D), codes (B, S, G, D / 2) and ranges (B, S, G, 2); got {tuple(q.shape)}, "
            f"{tuple(codes.shape)}, {tuple(ranges.shape)}"
        )
    if codes.dtype != torch.uint8 or ranges.dtype != torch.float32:
        raise ValueError(f"a sketch has uint8 codes and fp32 ranges, got {codes.dtype} and {ranges.dtype}")
    if len(q) != len(codes) or q.shape[2] != 2 * codes.shape[3] or q.shape[1] % codes.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} and codes {tuple(codes.shape)} must share batch and width; G divides H")
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be ({len(q)},) int32, got {tuple(lengths.shape)} {lengths.dtype}")
    if page_size < 1 or (pages is None and page_size != 1):
        raise ValueError(f"a page has at least 1 token, and more belong to lists of pages: page_size {page_size}")
    if pages is not None and (pages.dim() != 3 or pages.shape[:2] != (len(q), codes.shape[2])):
        raise ValueError(f"pages must be ({len(q)}, {codes.shape[2]}, number), got {tuple(pages.shape)}")
    if pages is not None and pages.dtype != torch.int32:
        raise ValueError(f"pages must be int32, got {pages.dtype}")
