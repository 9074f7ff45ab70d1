"""Which blocks and lines a prompt attends to, by the training-free patterns of MInference (arXiv 2407.02490)."""

import torch
from torch import Tensor

from nsa.ops.dispatch import accumulation_dtype, autocasts, check_attention, check_positions, resolve_backend
from nsa.ops.dispatch import softmax_scale as scale_of


@torch.no_grad()
@autocasts("q", "k")
def pooled_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    num_initial: int = 0,
    num_local: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The blocks of keys whose mean the mean query of each block attends to most: MInference's block-sparse pattern.

    Importance is the sum of the probabilities over the heads of a KV head. The first and the nearest blocks are always
    in and count toward ``num_blocks``. Ties go to the lower number. No value is read by the host.

    Args:
        q: (B, T, H, D). k: (B, T, G, D): a whole prompt.
        block_size: tokens. num_blocks: of each block of queries, at most.
        num_initial, num_local: how many of the first and of the nearest (its own is the first of these) are forced.
        scale: factor of the scores; None: D ** -0.5. backend: auto, triton, torch or naive.

    Returns:
        blocks (B, G, R, n) int32 ascending, R = ceil(T / block_size), n = min(num_blocks, R), and counts (B, G, R)
        int32: `blocks` and `counts` of `block_sparse_attention`. -1 fills the rest.

    Raises:
        ValueError: inconsistent shapes, sizes out of range, unknown backend.
    """
    check_attention(q, k, k, None)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"means of blocks are those of a whole prompt: {q.shape[1]} queries, but {k.shape[1]} keys")
    if block_size < 1 or num_local < 1 or num_initial < 0 or num_blocks < num_initial + num_local:
        raise ValueError(
            f"need block_size >= 1, num_local >= 1 and num_blocks >= num_initial + num_local, got {block_size}, "
            f"{num_local}, {num_blocks}, {num_initial}"
        )
    scale, rows = scale_of(scale, q.shape[3]), -(-q.shape[1] // block_size)
    number = torch.arange(rows, device=q.device)
    size = min(num_blocks, rows)
    counts = (number + 1).clamp(max=size).int().expand(len(q), k.shape[2], rows).contiguous()
    if resolve_backend(backend, q, k) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        mass = operators.probabilities(operators.means(q, block_size), operators.means(k, block_size), scale)
        return operators.top_of_rows(mass, number, size, num_initial, num_local), counts
    mass = _probabilities(_means(q, block_size), _means(k, block_size), scale)
    back = number[:, None] - number
    forced = (number < num_initial) | (back < num_local)
    return _top(mass.masked_fill(forced, torch.inf).masked_fill(back < 0, -torch.inf), size), counts


@torch.no_grad()
@autocasts("q", "k")
def attention_mass(q: Tensor, k: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """The attention probabilities of each query, summed over the heads of a KV head: what importance is made of.

    Args:
        q: (B, T, H, D). k: (B, S, G, D): with S > T the queries are the last T of the S positions. scale: factor of the
            scores; None: D ** -0.5. backend: auto, triton, torch or naive.

    Returns:
        (B, G, T, S) fp32 (float64 for float64), 0 after the query.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    check_attention(q, k, k, None)
    check_positions(q, k)
    scale = scale_of(scale, q.shape[3])
    if resolve_backend(backend, q, k) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        return operators.probabilities(q, k, scale)
    return _probabilities(q, k, scale)


@torch.no_grad()
@autocasts("q", "k")
def vertical_slash_lines(
    q: Tensor,
    k: Tensor,
    *,
    num_columns: int,
    num_diagonals: int,
    num_queries: int = 64,
    num_initial: int = 30,
    num_near: int = 100,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The columns and diagonals that have most of the last queries' attention: MInference's vertical-slash pattern.

    Probabilities are summed over the heads of a KV head. The first columns and the nearest diagonals are always in, as
    far as the numbers allow. Ties go to the lower number. No value is read by the host.

    Args:
        q: (B, T, H, D). k: (B, S, G, D): with S > T the queries are the last T of the S positions.
        num_columns, num_diagonals: of each KV head, at most S are chosen.
        num_queries: how many last queries are looked at. num_initial, num_near: how many columns and diagonals are in
            by position.
        scale: factor of the scores; None: D ** -0.5. backend: auto, triton, torch or naive.

    Returns:
        columns (B, G, C) int32, positions of keys, and diagonals (B, G, M) int32, distances from query to key; both
        ascending, C = min(num_columns, S), M likewise.

    Raises:
        ValueError: inconsistent shapes, sizes out of range, unknown backend.
    """
    check_attention(q, k, k, None)
    check_positions(q, k)
    if min(num_columns, num_diagonals, num_queries) < 1 or min(num_initial, num_near) < 0:
        raise ValueError(
            f"need at least one column, one diagonal and one query, got {num_columns}, {num_diagonals}, {num_queries}; "
            f"num_initial and num_near must not be negative, got {num_initial}, {num_near}"
        )
    scale, keys = scale_of(scale, q.shape[3]), k.shape[1]
    last = q[:, max(0, q.shape[1] - num_queries) :]
    sizes = min(num_columns, keys), min(num_diagonals, keys)
    if resolve_backend(backend, q, k) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        masses = operators.lines(operators.probabilities(last, k, scale))
        whole = torch.full((1,), keys - 1, device=q.device)
        columns, diagonals = (
            operators.top_of_rows(mass[:, :, None], whole, size, forced, 0)[:, :, 0]
            for mass, size, forced in zip(masses, sizes, (num_initial, num_near), strict=True)
        )
        return columns, diagonals
    mass = _probabilities(last, k, scale)
    number = torch.arange(keys, device=q.device)
    # Row r of the last queries is shifted so that number d is the key d before it.
    back = (keys - last.shape[1] + torch.arange(last.shape[1], device=q.device))[:, None] - number
    along = mass.gather(3, back.clamp(min=0).expand(mass.shape)).masked_fill(back < 0, 0).sum(2)
    return (
        _top(mass.sum(2).masked_fill(number < num_initial, torch.inf), sizes[0]),
        _top(along.masked_fill(number < num_near, torch.inf), sizes[1]),
    )


@torch.no_grad()
def slash_blocks(diagonals: Tensor, *, tokens: int, block_size: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The blocks that diagonals cross, whole: a diagonal crosses one or two blocks of each block of queries.

    Args:
        diagonals: (B, N, M) int32, distances from query to key. tokens: of the prompt, whose queries and keys are cut
            into blocks of ``block_size``. backend: auto, triton, torch or naive.

    Returns:
        blocks (B, N, R, R) int32 ascending, R = ceil(tokens / block_size), and counts (B, N, R) int32: `blocks` and
        `counts` of `block_sparse_attention`.
    """
    return block_lists(_slash_mask(diagonals, tokens=tokens, block_size=block_size), backend=backend)


def _slash_mask(diagonals: Tensor, *, tokens: int, block_size: int) -> Tensor:
    """`slash_blocks` as a mask (B, N, R, R) bool."""
    rows = -(-tokens // block_size)
    crossed = torch.zeros(*diagonals.shape[:2], rows + 1, dtype=torch.bool, device=diagonals.device)
    for distance in (diagonals, diagonals + block_size - 1):  # d // block_size and ceil(d / block_size) blocks back
        crossed.scatter_(2, (distance // block_size).clamp(max=rows).long(), True)
    number = torch.arange(rows, device=diagonals.device)
    back = number[:, None] - number
    return crossed[:, :, back.clamp(min=0)] & (back >= 0)


@torch.no_grad()
def block_lists(keep: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """A mask of blocks as lists.

    Args:
        keep: (B, N, R, U) bool, which blocks of keys each block of queries attends to. backend: auto, triton, torch or
            naive.

    Returns:
        blocks (B, N, R, U) int32: the numbers of the true entries, ascending; the rest may hold anything. counts
        (B, N, R) int32.

    Raises:
        ValueError: keep is no such mask, or the backend is unknown.
    """
    if keep.dim() != 4 or keep.dtype != torch.bool:
        raise ValueError(f"keep must be (batch, lists, rows, blocks) bool, got {tuple(keep.shape)} {keep.dtype}")
    # The kernel reads bytes; the choice of a backend asks for a dtype of numbers.
    stand_in = torch.empty(0, dtype=torch.float32, device=keep.device)
    if resolve_backend(backend, stand_in, heads=False) == "triton":
        from nsa.ops.kernels import inference_operators as operators

        return operators.block_lists(keep)
    return keep.byte().argsort(dim=-1, descending=True, stable=True).int(), keep.sum(-1).int()


def _means(x: Tensor, block_size: int) -> Tensor:
    """(B, R, N, D) of x (B, T, N, D), fp32 (float64 for float64): means of blocks; the last may be shorter."""
    whole, dtype = x.shape[1] // block_size * block_size, accumulation_dtype(x)
    means = x[:, :whole].unflatten(1, (-1, block_size)).mean(2, dtype=dtype)
    if whole == x.shape[1]:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True, dtype=dtype)], 1)


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, G, R, S): those of q (B, R, H, D), the last R of the S positions of k (B, S, G, D), summed over a group."""
    dtype, groups = accumulation_dtype(q), k.shape[2]
    grouped = q.to(dtype).unflatten(2, (groups, -1))
    scores = torch.einsum("brgjd,bsgd->bgjrs", grouped, k.to(dtype)) * scale
    key = torch.arange(k.shape[1], device=q.device)
    after = key > (k.shape[1] - q.shape[1] + torch.arange(q.shape[1], device=q.device))[:, None]
    return scores.masked_fill(after, -torch.inf).softmax(-1).sum(2)


def _top(mass: Tensor, count: int) -> Tensor:
    """The numbers of the ``count`` highest of the last dim, int32 ascending; ties to the lower, -1 instead of -inf."""
    best = mass.sort(dim=-1, descending=True, stable=True)
    number = best.indices.masked_fill(best.values == -torch.inf, mass.shape[-1])[..., :count].sort(-1).values
    return number.masked_fill(number == mass.shape[-1], -1).int()
