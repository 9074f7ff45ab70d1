"""DeepSeek Sparse Attention as a layer: the indexer, decoding, what trains what, and its figures."""

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.layers import DeepSeekSparseAttention, DenseAttention
from nsa.layers.dsa.figures import measure, recall_bound
from nsa.layers.figure import values
from nsa.layers.rotary import Rotary
from nsa.ops.geometry import Documents, RotaryLayout
from tests.ops.cases import cumulative

INDEX = {"index_heads": 3, "index_head_dim": 8, "index_rotary": RotaryLayout(4, "last", "interleaved")}


def layer_of(**changes) -> DeepSeekSparseAttention:
    torch.manual_seed(0)
    return DeepSeekSparseAttention(16, 4, 2, 6, 4, **{"topk": 5, **INDEX, **changes}).double()


def some_input(tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("steps", [[1] * 30, [20, 1, 1, 8], [3, 27]])
def test_decoding_on_a_cache_equals_the_whole(steps: list[int], fp8: bool) -> None:
    """Beyond k tokens: then only an indexer that sees the same keys selects the same tokens."""
    layer, x = layer_of(index_fp8=fp8), some_input(30, batch=2)
    chosen: list[Tensor] = []
    layer.attend.choose.register_forward_hook(lambda module, inputs, tokens: chosen.append(tokens))
    whole, cache = layer(x), layer.new_cache()
    pieces = torch.cat([layer(piece, cache=cache) for piece in x.split(steps, 1)], 1)
    torch.testing.assert_close(pieces, whole)
    assert torch.equal(torch.cat(chosen[1:], 1), chosen[0])


def test_fp8_is_of_the_selection_alone() -> None:
    """It selects other tokens, and the loss over given tokens is the same."""
    seen: list[tuple] = []
    for fp8 in (False, True):
        layer, x = layer_of(index_fp8=fp8, topk=10), some_input(60)
        layer.attend.choose.register_forward_hook(lambda module, inputs, tokens: seen.append((*inputs, tokens)))
        layer(x)
    q_idx, k_idx, weights, tokens = seen[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen[0][:3], seen[1][:3], strict=True))
    assert not torch.equal(seen[0][3], tokens)
    assert torch.equal(ops.index_topk(q_idx, k_idx, weights, topk=10, fp8=True)[0], tokens)
    layer = layer_of(index_fp8=True, topk=60)
    losses = []
    for choose_in_fp8 in (False, True):
        layer.attend.choose.sizes["fp8"] = choose_in_fp8
        layer.attend.loss.clear()
        layer(x).sum().backward()
        losses.append(layer.attend.loss.tally.clone())
    assert torch.equal(*losses)


def test_packed_documents_are_as_each_alone() -> None:
    documents = [9, 1, 20]
    for phase in ("sparse", "warm-up"):
        layer, x = layer_of(phase=phase), some_input(30)
        alone = torch.cat([layer(piece) for piece in x.split(documents, 1)], 1)
        torch.testing.assert_close(layer(x, cu_seqlens=cumulative(documents)), alone)


def test_with_as_many_tokens_as_it_may_select_it_is_dense_attention() -> None:
    dense = DenseAttention(16, 4, 2, 6, 4).double()
    x = some_input(30)
    rotary = Rotary().at(torch.arange(30))
    for options in ({"topk": 30}, {"topk": 2, "phase": "warm-up"}):
        layer = layer_of(**options)
        dense.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("indexer")})
        torch.testing.assert_close(layer(x), dense(x, rotary))


def test_the_scores_are_those_of_the_paper() -> None:
    """Scale, norm of the keys and the rotation, from the weights alone."""
    layer, x = layer_of(), some_input(7)
    indexer, rotary = layer.indexer, Rotary().at(torch.arange(7))
    q_idx, k_idx, weights = indexer(x, rotary)

    def turned(head: Tensor) -> Tensor:  # (.., 8): the last four dims as two complex numbers
        angle = torch.arange(7)[:, None] * torch.tensor([1.0, 10000.0**-0.5])
        pairs = torch.view_as_complex(head[..., 4:].unflatten(-1, (2, 2)).contiguous())
        spun = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        return torch.cat((head[..., :4], spun), -1)

    key = x[0] @ indexer.key.weight.T
    key = (key - key.mean(-1, keepdim=True)) / (key.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for head in range(3):
        query = x[0] @ indexer.query.weight[8 * head : 8 * head + 8].T
        weight = x[0] @ indexer.head_weight.weight[head] * 3**-0.5 * 8**-0.5
        expected += weight[:, None] * (turned(query) @ turned(key).T).relu()
    _, scores = ops.index_topk(q_idx, k_idx, weights, topk=7)
    sees = torch.ones(7, 7).tril().bool()
    torch.testing.assert_close(scores[0][sees], expected[sees], rtol=1e-5, atol=1e-6)  # the tables are fp32


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_the_indexer_learns_from_its_loss_alone_and_nothing_else_does(phase: str) -> None:
    x = some_input(20).requires_grad_()

    def gradients(kl_weight: float) -> dict[str, Tensor]:
        layer = layer_of(phase=phase, kl_weight=kl_weight)
        layer(x).square().sum().backward()
        found = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
        x.grad = None
        return found

    none, much = gradients(0.0), gradients(1000.0)
    for name, gradient in none.items():
        if name.startswith("indexer"):
            assert gradient.eq(0).all() and much[name].ne(0).any(), name
        else:
            assert torch.equal(gradient, much[name]), name


def test_the_loss_is_a_mean_over_tokens_and_falls() -> None:
    """Training the indexer alone makes it find the attention: recall rises, too."""
    layer, x = layer_of(topk=4), some_input(64)
    loss, optimizer = layer.attend.loss, torch.optim.Adam(layer.indexer.parameters(), 0.02)
    seen: list[tuple] = []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    curve, recalls = [], []
    for _ in range(60):
        optimizer.zero_grad()
        loss.clear()
        layer(x).sum().backward()
        optimizer.step()
        curve.append(loss.tally[0].item() / 64)
        recalls.append(values(measure(layer.attend, *seen[-1]))["recall"])
    q, (k, _), *index = seen[0]
    _, lse = ops.token_sparse_attention(q, k, k, tokens := layer.attend.choose(index[0], index[1][0], index[2]),
                                        return_lse=True)  # fmt: skip
    first = ops.indexer_kl(index[0], index[1][0], index[2], q, k, lse, token_indices=tokens, backend="naive")
    assert curve[0] == pytest.approx(first.item() / 64)
    assert curve[-1] < 0.8 * curve[0] and recalls[-1] > recalls[0]


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_the_loss_is_counted_where_gradients_of_the_parameters_alone_are_asked_for(phase: str) -> None:
    """As a recording of CUDA graphs does. Notices a tally that only ``backward()`` writes."""
    layer, x = layer_of(phase=phase), some_input(20)
    found = []
    for ask in (lambda total: total.backward(), lambda total: torch.autograd.grad(total, [*layer.parameters()])):
        layer.attend.loss.clear()
        ask(layer(x.requires_grad_()).square().sum())
        found.append(layer.attend.loss.tally.clone())
    assert found[0] > 0 and torch.equal(*found)


def test_figures_of_a_known_selection() -> None:
    """Uniform attention, whatever is selected: 4 of t + 1 tokens have that share of the probability."""
    tokens, k = 12, 4
    layer = layer_of(topk=k, num_local=k)
    for linear in (layer.query, layer.indexer.query):
        torch.nn.init.zeros_(linear.weight)
    seen: list[tuple] = []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    layer(some_input(tokens))
    found = values(measure(layer.attend, *seen[0]))
    beyond = torch.arange(k, tokens) + 1.0
    assert [found["recall"], found["recall_bound"]] == pytest.approx([(k / beyond).mean().item()] * 2)
    assert found["first_token_mass"] == pytest.approx((1 / beyond).mean().item())
    assert found["token_overlap"] == pytest.approx((k - 1) / k) and found["score_entropy"] == pytest.approx(1)


def test_the_overlap_of_layers_is_what_their_lists_share() -> None:
    """A loop over the queries that see more than k tokens. Chunks of queries are compared with chunks alike."""
    tokens, k, seen, lists = 14, 4, [], []
    for turn in (0, 1):
        layer = layer_of(topk=k)
        layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs)))
        layer(some_input(tokens).roll(turn, -1))
        lists.append(layer.attend.choose(seen[-1][1][2], seen[-1][1][3][0], seen[-1][1][4])[0])
    earlier: dict = {}
    first, second = (values(measure(attend, *inputs, earlier=earlier)) for attend, inputs in seen)
    both = [len(set(lists[0][t].tolist()) & set(lists[1][t].tolist())) / k for t in range(k, tokens)]
    assert "layer_overlap" not in first and 0 < sum(both) < len(both)
    assert second["layer_overlap"] == pytest.approx(sum(both) / len(both))
    assert values(measure(*seen[0][:1], *seen[0][1], earlier={("dsa", 3): None})).keys() == first.keys()


def test_the_bound_of_recall_is_that_of_the_best_tokens() -> None:
    """Two documents; a loop over queries. Only queries that see more than k tokens count."""
    q, k = torch.randn(1, 11, 4, 6).double() * 2, torch.randn(1, 11, 2, 6).double()
    borders = torch.tensor([0, 4, 11], dtype=torch.int32)
    documents = Documents.of(11, 0, borders, q.device)
    _, lse = ops.dense_attention(q, k, k, cu_seqlens=borders, return_lse=True)
    best = []
    for start, token in [(0, 3), (4, 7), (4, 8), (4, 9), (4, 10)]:
        heads = [(q[0, token, h] @ k[0, start : token + 1, h // 2].T * 6**-0.5).softmax(0) for h in range(4)]
        best.append(torch.stack(heads).mean(0).topk(3).values.sum())
    found = recall_bound(q, k, lse, documents, documents.query_local >= 3, None, 3).value
    assert found == pytest.approx(torch.stack(best).mean().item())
