"""A comparison answers on another device: no call mixes its tensors with those of the CPU (see `elsewhere`)."""

from typing import Any

import elsewhere
import pytest
import torch

from nsa.baselines import METHODS, Budget, Ledger, method_named
from nsa.baselines.methods.dense import DenseForOthers
from nsa.data.tasks import task_named
from nsa.evaluation.comparison.answers import ask
from nsa.evaluation.comparison.decoding import Prompts
from nsa.evaluation.comparison.leaks import changes
from nsa.evaluation.comparison.models import OpenedDecoder, open_model
from tests.small_run import small_export

SOME = ("quest", "snapkv", "vertical_slash", "double_p")  # pages, eviction, the prompt, clusters
CASES = [("dense", name) for name in SOME] + [
    (kind, name) for kind in ("nsa", "dsa", "entmax") for name in ("", "quest")
]
OTHERS = [pytest.param("dense", m.name, marks=pytest.mark.slow) for m in METHODS if m.name not in SOME]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        kind: open_model(kind, small_export(tmp_path_factory.mktemp(kind), kind))
        for kind in ("dense", "nsa", "dsa", "entmax")
    }


def test_the_stand_in_tells_devices_apart() -> None:
    with elsewhere.two_devices():
        there = torch.arange(3, device=elsewhere.DEVICE)
        assert (there + torch.ones(3).to(elsewhere.DEVICE)).sum().item() == 6
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        assert (there + torch.tensor(1)).cpu().tolist() == [1, 2, 3]


@pytest.mark.parametrize(("kind", "name"), [*CASES, *OTHERS])
def test_answers_are_those_of_the_cpu(kind: str, name: str, models: dict[str, Any]) -> None:
    """``name``: of the method; empty: as it was trained."""
    opened = models[kind]
    assert isinstance(opened, OpenedDecoder)
    task = task_named("mqar")
    samples = [task.sample(opened.tokenizer, 64, "device", 0)]
    method = method_named(name)(budget=Budget(tokens=24), **method_named(name).small) if name else None

    ids = torch.from_numpy(samples[0].context)[None]

    def open_reader(ledger: Ledger) -> Any:
        return opened.reader(method, dense_layers=[], watch=method is not None, ledger=ledger)

    def answers() -> Any:
        ledger = Ledger()
        options: dict[str, Any] = {"aware": False, "batch_tokens": 999}
        if method is not None and method.phases == ("decode",):
            options["prompts"] = Prompts(
                lambda: opened.reader(DenseForOthers(), dense_layers=[], watch=False, ledger=Ledger())
            )
        batches = ask(open_reader(ledger), opened.tokenizer, task, samples, **options)
        found = changes(open_reader, method, ids) if method is not None and method.phases else {}
        return [answer for batch in batches for answer in batch], ledger.shares(), found

    here = answers()
    back = elsewhere.move(opened.decoder)
    try:
        with elsewhere.two_devices():
            assert answers() == here
    finally:
        back()
