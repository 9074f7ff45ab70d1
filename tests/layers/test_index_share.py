"""Index sets that neighbouring DSA layers share: what is handed over, what the indexer learns, what is counted."""

import copy

import pytest
import torch
from torch import Tensor

from nsa.cache import FullCache, IndexedCache
from nsa.config import ConfigError
from nsa.layers import DeepSeekSparseAttention, record_index_sets, replay_index_sets
from nsa.layers.dsa.config import DsaConfig
from nsa.layers.dsa.guest import spent
from nsa.layers.index_sets import index_choices
from nsa.models import count_parameters, training_flops_per_token
from nsa.models.config import AttentionConfig
from nsa.ops.geometry import RotaryLayout
from nsa.ops.indexer_kl import head_sum
from nsa.planning.memory import memory_of
from nsa.training.activation_checkpointing import checkpoint_layers
from tests.layers.test_index_sets import IDS, MODEL, TOPK, decoded, decoder_of
from tests.training.tiny import tiny_config

GROUPS = {"kind": ["dsa"], "share_layers": 2, "share_from": 1}  # of three layers: alone, first of a group, served


def empty(decoder) -> bool:
    shares = [layer.attention.share for layer in decoder.layers]
    return all(share.index is None and not share.sets for share in shares)


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_the_others_attend_to_the_sets_of_the_first(phase: str) -> None:
    """A decoder without groups that is given these sets computes the same; so does decoding."""
    shared, single = decoder_of(**GROUPS, phase=phase), decoder_of(kind=["dsa"], phase=phase)
    missing, surplus = single.load_state_dict(shared.state_dict(), strict=False)
    assert {name.rsplit(".indexer.")[0] for name in missing} == {"layers.2.attention"} and not surplus
    if phase == "warm-up":
        assert torch.equal(shared(IDS), single(IDS))
    else:
        with record_index_sets(shared) as sets:
            expected = shared(IDS)
        assert torch.equal(sets[1], sets[2]) and not torch.equal(sets[0], sets[1])
        with replay_index_sets(single, sets):
            assert torch.equal(single(IDS), expected)
    torch.testing.assert_close(decoded(shared, [9, 1, 1, 13]), shared(IDS))
    assert [type(cache) for cache in shared.new_caches()] == [IndexedCache, IndexedCache, FullCache]
    assert empty(shared)


def test_the_indexer_learns_the_mean_of_the_attentions() -> None:
    """Against float64 autograd of one loss of the group, whose target is the mean over its layers."""
    torch.manual_seed(0)
    sizes = {"topk": 4, "index_heads": 3, "index_head_dim": 8, "kl_weight": 0.7, "index_rotary": RotaryLayout(4)}
    first = DeepSeekSparseAttention(16, 4, 2, 6, **sizes).double()
    others = [DeepSeekSparseAttention(16, 4, 2, 6, **sizes, share=first.share).double() for _ in range(2)]
    seen: list[tuple] = []
    for layer in (first, *others):
        layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    sum(layer(x).sum() for layer in (first, *others)).backward(retain_graph=True)
    found = {name: p.grad for name, p in first.indexer.named_parameters()}
    q_idx, (k_idx,), weights = seen[0][2:5]
    sets = first.attend.choose(q_idx, k_idx, weights)
    listed = (sets[..., None] == torch.arange(12)).any(2)
    targets = []
    for q, (k, _), *_ in seen:
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 6**-0.5
        lse = scores.masked_fill(~listed[:, None], -torch.inf).logsumexp(-1)
        attention = head_sum(q, k, lse, 6**-0.5).where(listed, 0)
        targets.append(attention / attention.sum(-1, keepdim=True))
    target = torch.stack(targets).mean(0).detach()
    index = torch.einsum("bth,bths->bts", weights, torch.einsum("bthd,bsd->bths", q_idx, k_idx).relu())
    log_q = index.masked_fill(~listed, -torch.inf).log_softmax(-1).where(listed, 0)
    loss = (torch.xlogy(target, target) - target * log_q).sum() * 0.7 / 24
    wanted = torch.autograd.grad(loss, list(first.indexer.parameters()))
    for (name, gradient), expected in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, msg=name)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_chooses_nothing_anew(mode: str) -> None:
    """Two micro batches under way, the first one's backward pass first: each has its own sets."""
    gradients: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        decoder = decoder_of(**GROUPS)
        if recompute:
            checkpoint_layers(decoder.layers, mode)
        choices = index_choices(decoder).values()
        losses = [decoder(ids, ids.roll(-1, 1)).sum() for ids in (IDS, IDS.flip(1))]
        for choice in choices:
            choice.select = None  # fails if it is asked again
        for loss in losses:
            loss.backward()
        assert empty(decoder)
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert gradients[0]["layers.1.attention.indexer.key.weight"].ne(0).any()


def test_a_copy_shares_with_itself() -> None:
    decoder = decoder_of(**GROUPS)
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.layers[1].attention.indexer.query.weight.neg_()
    with record_index_sets(other) as changed:
        other(IDS)
    with record_index_sets(decoder) as sets:
        decoder(IDS)
    assert torch.equal(changed[1], changed[2]) and not torch.equal(changed[1], sets[1])
    served = decoder.layers[2].attention
    with pytest.raises(ValueError, match="call the layers of a group one after the other"):
        served(torch.randn(1, 4, 16, dtype=torch.float64))


def test_which_layers_are_served() -> None:
    """As in GLM-5.2: 78 layers, index_topk_freq 4, index_skip_topk_offset 3."""
    config = DsaConfig(share_layers=4, share_from=2)
    theirs = [max(i - 3 + 1, 0) % 4 != 0 for i in range(78)]
    assert [config.is_served(place) for place in range(78)] == theirs and theirs.count(False) == 21
    attention = AttentionConfig(kind=["dense", "dsa", "dsa"], dsa=DsaConfig(share_layers=3))
    assert [kind.borrows for kind in attention.kinds(8)] == [False, False, True, False, True, False, False, True]


def test_served_layers_are_counted_without_an_indexer() -> None:
    shared, single = decoder_of(**GROUPS), decoder_of(kind=["dsa"])
    for decoder in (shared, single):
        assert count_parameters(MODEL, decoder.attention)["total"] == sum(p.numel() for p in decoder.parameters())
    indexer = 16 * (3 * 8 + 8 + 3)
    less = 3 * (2 * indexer + 2 * 3 * 8 * (24 + 1) / 2)  # forward and backward, a multiply-add is 2
    flops = [training_flops_per_token(MODEL, decoder.attention, 24) for decoder in (shared, single)]
    assert flops[1]["sparse"] - flops[0]["sparse"] == pytest.approx(less)
    assert flops[1]["dense_equivalent"] == flops[0]["dense_equivalent"]


def test_a_plan_and_a_pipeline_know_the_groups(tmp_path) -> None:
    base = ["attention.kind=dsa", "model.num_layers=4", "training.micro_batch_size=4", "engine.precision=fp32"]
    base += [
        f"attention.dsa={{topk: {TOPK}, index_heads: 4, index_head_dim: 16, index_rotary_dims: 8, share_layers: 2}}"
    ]
    shared = memory_of(tiny_config(tmp_path, *base), 1)
    single = memory_of(tiny_config(tmp_path, *base, "attention.dsa.share_layers=1"), 1)
    less = 2 * (32 * (4 * 16 + 16 + 4) + 32)  # two indexers, with the norm of the keys
    assert single.device["weights"] - shared.device["weights"] == 4 * less
    assert shared.device["activations"] < single.device["activations"]
    tiny_config(tmp_path, *base, "parallel.pipeline=2")
    with pytest.raises(ConfigError, match=r"stage 1 begins at layer 2, and layer 2 attends .*share_layers must lie"):
        tiny_config(tmp_path, *base, "parallel.pipeline=2", "attention.dsa.share_layers=4")
    with pytest.raises(ConfigError, match="layer 3 attends"):  # the stage begins with a dense layer
        kinds = "attention.kind=[dsa, dsa, dense, dsa]"
        tiny_config(tmp_path, *base, "parallel.pipeline=2", kinds, "attention.dsa.share_layers=3")


def test_what_a_served_layer_reads_is_counted_without_index_keys() -> None:
    decoder = decoder_of(**GROUPS)
    seen: list[tuple] = []
    for layer in decoder.layers:
        layer.attention.attend.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs)))
    decoder(IDS)
    first, served = (spent(attend, *inputs) for attend, inputs in seen[1:])
    assert first.attended.equal(served.attended) and served.scored.eq(0).all() and first.scored.gt(0).all()
