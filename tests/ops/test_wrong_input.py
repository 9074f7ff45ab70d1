"""Operators refuse what they cannot mean, in words that name the argument; nothing at all gives nothing."""

import pytest
import torch

from nsa import ops
from nsa.layers import NativeSparseAttention


def qkv(batch: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, 9, heads, 16).to(dtype).requires_grad_(dtype.is_floating_point) for heads in (4, 1, 1)]


def blocks(*numbers: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(numbers).to(dtype).expand(1, 9, 1, len(numbers))


@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_types_of_queries_keys_and_values(backend: str) -> None:
    with pytest.raises(ValueError, match=r"q, k, v must be floating-point.*torch\.int64"):
        ops.dense_attention(*qkv(dtype=torch.int64), backend=backend)
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"in one type; got torch\.float32, torch\.float64"):
        ops.selected_attention(q, k.double(), v, blocks(0), block_size=4, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_blocks_that_are_not_there(backend: str) -> None:
    """9 tokens are three blocks of 4."""
    q, k, v = qkv()
    ops.selected_attention(q, k, v, blocks(-1, 2), block_size=4, backend=backend)
    for wrong in ((0, 3), (0, 50), (-2, 0)):
        with pytest.raises(ValueError, match="block_indices must be from 0 to 2, or -1 for none"):
            ops.selected_attention(q, k, v, blocks(*wrong), block_size=4, backend=backend)
    with pytest.raises(ValueError, match=r"block_indices must be int32 or int64, got torch\.float32"):
        ops.selected_attention(q, k, v, blocks(0, dtype=torch.float32), block_size=4, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_tokens_that_are_not_there(backend: str) -> None:
    q, k, v = qkv()
    ops.token_sparse_attention(q, k, v, blocks(-1, 8)[:, :, 0], backend=backend)
    for wrong in ((0, 9), (-7, 0)):
        with pytest.raises(ValueError, match="token_indices must be from 0 to 8, or -1 for none"):
            ops.token_sparse_attention(q, k, v, blocks(*wrong)[:, :, 0], backend=backend)
    with pytest.raises(ValueError, match="token_indices must be int32 or int64"):
        ops.token_sparse_attention(q, k, v, blocks(0, dtype=torch.bool)[:, :, 0], backend=backend)


def test_a_batch_of_nothing() -> None:
    for listed in (
        lambda q, k, v: ops.selected_attention(q, k, v, blocks(0, 1).expand(1, 9, 1, 2)[:0], block_size=4),
        lambda q, k, v: ops.token_sparse_attention(q, k, v, blocks(0, 1)[:0, :, 0]),
        ops.dense_attention,
    ):
        q, k, v = qkv(batch=0)
        out = listed(q, k, v)
        out.sum().backward()
        assert out.shape == (0, 9, 4, 16) and q.grad is not None and k.grad is not None and q.grad.shape == q.shape
    assert NativeSparseAttention(32, num_heads=4, num_kv_heads=1, head_dim=8)(torch.randn(0, 50, 32)).shape[0] == 0


def test_no_more_blocks_are_asked_for_than_there_are() -> None:
    """30 tokens are four blocks of 8. With places for a thousand the same blocks are chosen."""
    made = []
    for num_blocks in (4, 1000):
        torch.manual_seed(0)
        sizes = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "window": 6, "num_blocks": num_blocks}
        layer, chosen = NativeSparseAttention(32, 4, 1, 8, **sizes), []
        layer.attend.choose.register_forward_hook(lambda _, __, found, to=chosen: to.append(found))
        x = torch.randn(2, 30, 32)
        cache = layer.new_cache()
        pieces = torch.cat([layer(x[:, :11], cache=cache), layer(x[:, 11:], cache=cache)], 1)
        torch.testing.assert_close(pieces, layer(x))
        made.append(pieces)
        assert [found.shape[-1] for found in chosen] == [min(num_blocks, n) for n in (3, 4, 4)]
    torch.testing.assert_close(*made, rtol=0, atol=0)
