"""Pages: runs of consecutive tokens of a sequence, and bounds of their keys (Quest, arXiv 2406.10774, section 3.2)."""

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.method import State
from nsa.baselines.plan import View


def fold(view: View, state: State, size: int) -> tuple[Tensor, Tensor]:
    """Fold the new keys into the bounds of their pages, which are kept in ``state.rest``; folding twice is harmless.

    A page's border is a position in the sequence, so padding moves none. Pages of ``size`` tokens.

    Returns:
        low, high (B, P, G, D): the least and the greatest of each dim over the tokens of a page; a page without
        tokens has inf and -inf.
    """
    new, where = view.k[:, -view.q.shape[1] :], view.query_positions
    batch, _, groups, width = new.shape
    pages = -(-int(view.seen.max()) // size)
    low, high = state.rest.get("low"), state.rest.get("high")
    if low is None or high is None or low.shape[1] < pages:
        have = 0 if low is None else low.shape[1]
        more = new.new_full((batch, max(have, pages - have), groups, width), torch.inf)  # doubled: a token costs O(1)
        low = more if low is None else torch.cat([low, more], 1)
        high = -more if high is None else torch.cat([high, -more], 1)
        state.rest.update(low=low, high=high)
    index = (where.clamp(min=0) // size)[..., None, None].expand_as(new)
    padding = (where < 0)[..., None, None]
    low.scatter_reduce_(1, index, new.masked_fill(padding, torch.inf), "amin")
    high.scatter_reduce_(1, index, new.masked_fill(padding, -torch.inf), "amax")
    return low[:, :pages], high[:, :pages]


def upper(view: View, low: Tensor, high: Tensor) -> Tensor:
    """(B, H, P) fp32: no key of a page has a higher score with the one query (Quest, Algorithm 1); -inf: no token."""
    q, low, high = view.q[:, 0].float().unflatten(1, (view.k.shape[2], view.group)), low.float(), high.float()
    most = torch.einsum("bgjd,bpgd->bgjp", q.clamp(min=0), high)
    most = most + torch.einsum("bgjd,bpgd->bgjp", q.clamp(max=0), low)
    empty = (low > high).all(-1).transpose(1, 2)[:, :, None]
    return (most * view.scale).masked_fill(empty, -torch.inf).flatten(1, 2)


def rounded(bounds: tuple[Tensor, Tensor], fp8: bool) -> tuple[Tensor, Tensor]:
    """The bounds, in fp8 if ``fp8``: rounded as those that `nsa.ops.page_bounds` keeps.

    Bounds of bounds in pages of one token are these, so that no second place rounds.
    """
    if not fp8:
        return bounds
    pages = torch.full((len(bounds[0]),), bounds[0].shape[1], device=bounds[0].device)
    low, high = (ops.page_bounds(x, pages, page_size=1, fp8=True) for x in bounds)
    return low[0], high[1]


def best(view: View, state: State, counts: Tensor, size: int, over_group: str, fp8: bool = False) -> Tensor:
    """(B, G, P) bool: of each KV head the current page and the others with the highest bounds, ``counts`` (B,) in all.

    By `nsa.ops.quest_pages`, after `fold`. Sequences of equal counts are one call.
    """
    low, high = rounded((state.rest["low"], state.rest["high"]), fp8)
    chosen = torch.zeros(len(low), low.shape[2], low.shape[1] + 1, dtype=torch.bool, device=low.device)
    lengths, numbers = view.seen.int(), counts.unique().tolist()
    for number in numbers:
        rows = slice(None) if len(numbers) == 1 else (counts == number).nonzero()[:, 0]
        pages = ops.quest_pages(
            view.q[rows, 0], low[rows], high[rows], lengths[rows], page_size=size, topk=number, over_group=over_group
        )
        some = torch.zeros_like(chosen[rows])
        chosen[rows] = some.scatter_(-1, torch.where(pages < 0, low.shape[1], pages).long(), True)
    return chosen[..., : -(-int(view.seen.max()) // size)]


def tokens_of(view: View, pages: Tensor, size: int) -> Tensor:
    """What is said of pages (B, N, P), of each slot: (B, N, 1, S); senseless for empty slots. N is G or H."""
    page = view.positions.transpose(1, 2).clamp(min=0) // size
    page = view.per_head(page) if pages.shape[1] != page.shape[1] else page
    return pages.gather(-1, page)[:, :, None]
