"""Quest's choice of pages while decoding: those that can have the highest scores (arXiv 2406.10774, Algorithm 1)."""

import torch
from torch import Tensor

from nsa.ops.decode import check_contiguous
from nsa.ops.dispatch import accumulation_dtype, autocasts, resolve_backend

OVER_GROUP = ("sum", "max")
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@torch.no_grad()
def page_bounds(k: Tensor, lengths: Tensor, *, page_size: int, fp8: bool = False) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each dim over the tokens of a page.

    Args:
        k: (B, S, G, D), the memory of a cache. lengths: (B,) integer, tokens of each sequence. page_size: tokens of a
            page; page j has tokens ``page_size * j .. page_size * (j + 1) - 1``.
        fp8: whether the bounds are kept in 8 bits (float8_e4m3fn), so that half as many bytes are read. They are
            rounded outwards, so they hold for all keys up to 448; larger ones count as 448.

    Returns:
        low, high: (B, P, G, D) in k's dtype or fp8, P = ceil(S / page_size). A page without tokens has inf and -inf,
        in fp8 448 and -448.

    Raises:
        ValueError: a page without room for a token.
    """
    _check_page(page_size)
    pages = -(-k.shape[1] // page_size)
    absent = (torch.arange(pages * page_size, device=k.device) >= lengths[:, None])[..., None, None]
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, pages * page_size - k.shape[1]))
    low, high = (
        padded.masked_fill(absent, value).unflatten(1, (pages, page_size)) for value in (torch.inf, -torch.inf)
    )
    low, high = low.amin(2), high.amax(2)
    return (_rounded_down(low), _rounded_up(high)) if fp8 else (low, high)


def _rounded_up(x: Tensor) -> Tensor:
    """The least number of `FP8` that is not below x, up to 448."""
    exact = x.to(accumulation_dtype(x)).clamp(-LARGEST, LARGEST)
    near = exact.to(FP8)
    bits = near.view(torch.uint8)
    # Numbers of one sign are ordered as their bits are.
    above = torch.where(bits < 0x80, bits + 1, bits - 1)
    return torch.where(near.to(exact.dtype) < exact, above, bits).view(FP8)


def _rounded_down(x: Tensor) -> Tensor:
    return (_rounded_up(-x).view(torch.uint8) ^ 0x80).view(FP8)


@torch.no_grad()
def extend_page_bounds(low: Tensor, high: Tensor, k: Tensor, lengths: Tensor, *, page_size: int) -> None:
    """Take the newest token of each sequence into the bounds of its page, in place.

    Args:
        low, high: (B, P, G, D), from `page_bounds`, with room for the token; in fp8 too. k: (B, G, D), the keys of the
            token.
        lengths: (B,) integer, tokens of each sequence, the new one included. page_size: as for `page_bounds`.

    Raises:
        ValueError: a page without room for a token, or bounds of two dtypes.
    """
    _check_page(page_size)
    if low.dtype != high.dtype:
        raise ValueError(f"low and high must have one dtype, got {low.dtype} and {high.dtype}")
    row = torch.arange(len(k), device=k.device)
    page = ((lengths.long() - 1) // page_size).clamp(min=0)
    if low.dtype != FP8:
        low[row, page] = torch.minimum(low[row, page], k)
        high[row, page] = torch.maximum(high[row, page], k)
        return
    below, above = low.view(torch.uint8), high.view(torch.uint8)  # to which all of torch's indexing applies
    k = k.to(accumulation_dtype(k))
    least = torch.minimum(below[row, page].view(FP8).to(k.dtype), k)
    most = torch.maximum(above[row, page].view(FP8).to(k.dtype), k)
    below[row, page], above[row, page] = (x.view(torch.uint8) for x in (_rounded_down(least), _rounded_up(most)))


@torch.no_grad()
@autocasts("q", "low", "high")
def quest_pages(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    lengths: Tensor,
    *,
    page_size: int,
    topk: int,
    num_initial: int = 0,
    num_local: int = 1,
    over_group: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """The ``topk`` pages of each KV head with the highest upper bounds of q . k, for one query token per sequence.

    The bound of a page is sum_d max(q_d high_d, q_d low_d), for each query head. Shapes alone decide what is launched:
    a CUDA graph can capture the call. Not differentiable.

    Args:
        q: (B, H, D). low, high: (B, P, G, D), from `page_bounds`, in q's dtype or in fp8; contiguous for the kernels.
            With bounds in fp8 the kernels take q of 16 bits as fp16.
        lengths: (B,) int32, tokens of each sequence, the new one included.
        page_size: tokens of a page. topk: pages per KV head, the forced ones included.
        num_initial, num_local: pages that are always among them: the first ones, and the most recent ones (the
            current one included). The bounds of forced pages are not used.
        over_group: how the query heads of a KV head agree: "sum" of their bounds, or "max".
        backend: auto, triton, torch or naive.

    Returns:
        (B, G, topk) int32 page numbers, ascending, padded with -1: the ``pages`` of `decode_attention`. Ties go to the
        lower number.

    Raises:
        ValueError: inconsistent shapes, fewer pages than are forced, unknown ``over_group`` or backend.
    """
    _check_page(page_size)
    if q.dim() != 3 or low.dim() != 4 or low.shape != high.shape:
        raise ValueError(
            f"q must be (B, H, D), low and high (B, P, G, D); got {tuple(q.shape)}, {tuple(low.shape)}, "
            f"{tuple(high.shape)}"
        )
    if len(q) != len(low) or q.shape[2] != low.shape[3] or q.shape[1] % low.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} and low {tuple(low.shape)} must share batch and width; G divides H")
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be ({len(q)},) int32, got {tuple(lengths.shape)} {lengths.dtype}")
    if topk < 1 or num_initial < 0 or num_local < 0 or num_initial + num_local > topk:
        raise ValueError(
            f"topk ({topk}) must be at least 1 and hold the forced pages: num_initial ({num_initial}) + num_local "
            f"({num_local})"
        )
    if over_group not in OVER_GROUP:
        raise ValueError(f"bounds are joined over a group by sum or max, not {over_group!r}")
    narrow = low.dtype == high.dtype == FP8
    implementation = resolve_backend(backend, q, *(() if narrow else (low, high)))
    if implementation == "triton":
        from nsa.ops.kernels import inference_operators as operators

        check_contiguous(low=low, high=high)
        return operators.quest_pages(q, low, high, lengths, page_size, topk, num_initial, num_local, over_group)
    dtype = accumulation_dtype(q)
    grouped, low, high = q.to(dtype).unflatten(1, (low.shape[2], -1)), low.to(dtype), high.to(dtype)  # (B, G, h, D)
    if implementation == "naive":
        each, least, most = grouped[:, :, :, None], *(x.transpose(1, 2)[:, :, None] for x in (low, high))
        bounds = torch.maximum(each * least, each * most).sum(-1)  # (B, G, h, P)
    else:
        bounds = torch.einsum("bghd,bpgd->bghp", grouped.clamp(min=0), high)
        bounds = bounds + torch.einsum("bghd,bpgd->bghp", grouped.clamp(max=0), low)
    joined = bounds.sum(2) if over_group == "sum" else bounds.amax(2)
    return _best(joined, lengths, page_size, topk, num_initial, num_local)


def _best(bounds: Tensor, lengths: Tensor, page_size: int, topk: int, num_initial: int, num_local: int) -> Tensor:
    """(B, G, topk) int32 of the highest bounds (B, G, P)."""
    page, none = torch.arange(bounds.shape[2], device=bounds.device), bounds.shape[2]
    absent = page * page_size >= lengths[:, None]  # (B, P)
    current = (lengths[:, None] - 1) // page_size
    forced = (page < num_initial) | (page > current - num_local)
    score = bounds.masked_fill(forced[:, None], torch.inf).masked_fill(absent[:, None], -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.masked_fill(absent[:, None].expand_as(order).gather(2, order), none)[..., :topk].sort(-1).values
    order = torch.nn.functional.pad(order, (0, topk - order.shape[2]), value=none)
    return order.masked_fill(order == none, -1).int()


def _check_page(page_size: int) -> None:
    if page_size < 1:
        raise ValueError(f"a page must have at least 1 token, got page_size {page_size}")
