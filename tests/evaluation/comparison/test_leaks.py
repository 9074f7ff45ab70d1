"""Every method reads what its plans say, and nothing else; harnesses that do otherwise are seen."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nsa.baselines import METHODS, Budget, Ledger, Method, Plan, Session, View, attend, method_named
from nsa.evaluation.comparison.hugging_face import TransformersReader, session_of
from nsa.evaluation.comparison.leaks import _far, changes
from nsa.evaluation.comparison.models import OpenedDecoder, open_model
from nsa.evaluation.comparison.rows import DENSE
from tests.small_run import small_export

LEAVES_OUT = [kind for kind in METHODS if kind.name not in (DENSE, "dual_chunk")]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> OpenedDecoder:
    opened = open_model("dense", small_export(tmp_path_factory.mktemp("dense"), "dense"))
    assert isinstance(opened, OpenedDecoder)
    return opened


def seen(model: Any, method: Method, *dense: int) -> dict[str, list[float]]:
    """``dense``: layers that stay so."""
    ids = torch.randint(2, 60, (1, 40), generator=torch.Generator().manual_seed(1))

    def open_reader(ledger: Ledger) -> TransformersReader:
        return TransformersReader(model, session_of(model, method, ledger=ledger, dense_layers=dense))

    return changes(open_reader, method, ids)


def sparse(kind: type[Method]) -> Method:
    knob = {} if kind.knob is None else {kind.knob[0]: (kind.knob[1] + kind.knob[2]) / 2}
    return kind(budget=Budget(tokens=12), **{**kind.small, **knob})


@pytest.mark.parametrize("kind", LEAVES_OUT, ids=lambda kind: kind.name)
def test_what_is_left_out_changes_nothing(kind: type[Method], model: Any) -> None:
    found = seen(model, sparse(kind))
    assert set(found) == set(kind.phases)
    assert all(left_out == 0 and attended > 0.1 for left_out, attended in found.values()), found


@pytest.mark.parametrize("name", ["quest", "h2o", "snapkv", "vertical_slash"])
def test_it_is_seen_in_a_decoder_of_ours_too(name: str, decoder: OpenedDecoder) -> None:
    method = sparse(method_named(name))
    ids = torch.randint(2, 400, (1, 40), generator=torch.Generator().manual_seed(1))
    found = changes(lambda ledger: decoder.reader(method, dense_layers=[], watch=False, ledger=ledger), method, ids)
    assert set(found) == set(method.phases)
    assert all(left_out == 0 and attended > 0.1 for left_out, attended in found.values()), found


@pytest.mark.parametrize("name", ["quest", "h2o", "vertical_slash", "oracle_topk", "block_sparse"])
def test_where_nothing_is_left_out_nothing_is_said(name: str, model: Any) -> None:
    assert seen(model, method_named(name)(budget=Budget(share=1.0))) == {}


@pytest.mark.parametrize("dense", [0, 1])
def test_one_layer_that_leaves_something_out_is_enough(dense: int, model: Any) -> None:
    left_out, attended = seen(model, sparse(method_named("quest")), dense)["decode"]
    assert left_out == 0 and attended > 0.1


def test_a_change_counts_in_either_direction() -> None:
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.75]])
    assert _far(one, other) == _far(other, one) == 0.5


@pytest.mark.parametrize("name", ["quest", "sink_window", "vertical_slash"])
def test_dense_attention_behind_a_plan_is_seen(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.baselines.session.attend", lambda view, plan: attend(view, None))
    method = sparse(method_named(name))
    found = seen(model, method)
    assert set(found) == set(method.phases) and all(left_out > 0.1 for left_out, _ in found.values()), found


def test_a_cache_that_marks_and_does_not_forget_is_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that slots are empty, so the plan leaves them out, and attention looks at all that lies in memory."""

    def marks(cache: Any, stays: Tensor) -> None:
        k, v, positions, *extra = cache.rows.kept
        cache._replace((k, v, positions.masked_fill(~stays, -1), *extra))

    def all_slots(view: View, plan: Plan | None) -> tuple[Tensor, Tensor]:
        weights = view.scores().new_ones(1, 1, view.q.shape[1], view.k.shape[1])
        weights = weights.tril(view.k.shape[1] - view.q.shape[1])
        mean = (weights / weights.sum(-1, keepdim=True)) @ view.v.transpose(1, 2)
        return view.per_head(mean).transpose(1, 2), view.scores().logsumexp(-1)

    monkeypatch.setattr("nsa.cache.evicting.EvictingCache.keep", marks)
    monkeypatch.setattr("nsa.baselines.session.attend", all_slots)
    assert seen(model, sparse(method_named("snapkv")))["decode"][0] > 0.1


def test_answers_that_come_from_elsewhere_are_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.attend
    monkeypatch.setattr(Session, "attend", lambda self, layer, q, k, v, scale: real(self, layer, q, k, v, scale) * 0)
    assert seen(model, sparse(method_named("quest"))) == {"decode": [0.0, 0.0]}
