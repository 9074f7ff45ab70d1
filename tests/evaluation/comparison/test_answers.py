"""Generation ends when no score can change any more, and not before."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nsa.baselines import Ledger
from nsa.data.tasks import TASKS, Bytes, Query, Sample, task_named
from nsa.data.tasks.text import TextTask
from nsa.evaluation.comparison.answers import ask

OVER_TEXT = [task for task in TASKS if isinstance(task, TextTask)]


class Scripted:
    """A reader that says what is written, a byte a token, whatever it reads."""

    ledger = Ledger()

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.said = [text.encode() for text in texts], 0

    def begin(self) -> None:
        pass

    def end_prompt(self) -> None:
        pass

    def take(self, sequences: Tensor) -> "Scripted":
        return self

    def read(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            return torch.zeros(len(ids), 256)
        last = torch.tensor([text[min(self.said, len(text) - 1)] for text in self.texts])
        self.said += 1
        return torch.nn.functional.one_hot(last, 256).float()


def asked(texts: list[str], new_tokens: int = 64) -> tuple[list[float | None], int]:
    """Scores of texts for a needle, and how many tokens were generated."""
    task = task_named("niah_single_1", new_tokens=new_tokens)
    query = Query(np.array([65]), np.array([66]), ("1234567",))
    samples = [Sample(np.array([256, 65, 65]), (query,), 0.0) for _ in texts]
    reader = Scripted(texts)
    (answers,) = ask(reader, Bytes(), task, samples, aware=True, batch_tokens=999)
    return [answer.score for answer in answers], reader.said


def test_generation_ends_when_all_answers_are_found() -> None:
    assert asked([" 1234567, and more", "12345678"]) == ([1.0, 1.0], 8)
    assert asked([" 1234567, and more", "1234568"]) == ([1.0, 0.0], 64)
    assert asked(["...", "..."], new_tokens=5) == ([None, None], 5)


def test_what_is_generated_for_a_longer_answer_beside_it_does_not_count() -> None:
    """One answer may have 5 tokens, the other one, of the same batch, 30."""
    task = task_named("niah_single_1", new_tokens=5)
    queries = [Query(np.array([65]), np.full(n, 66), ("1234567",)) for n in (3, 30)]
    samples = [Sample(np.array([256, 65, 65]), (query,), 0.0) for query in queries]
    reader = Scripted(["a, b, 1234567", "a, b, 1234567"])
    (answers,) = ask(reader, Bytes(), task, samples, aware=True, batch_tokens=999)
    assert [answer.score for answer in answers] == [0.0, 1.0]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(("batch_tokens", "together"), [(1, 1), (3, 1), (8, 2), (999, 5)])
def test_as_many_are_read_at_once_as_there_are_tokens_for(batch_tokens: int, together: int, aware: bool) -> None:
    """A prompt that is longer than that is read alone. Prompts have 3 tokens, or with their questions 4."""
    task = task_named("niah_single_1", new_tokens=1)
    samples = [Sample(np.array([256, 65, 65]), (Query(np.array([65]), np.array([66]), ("1",)),), 0.0)] * 5
    reader = Scripted([])
    held: list[bool] = []
    reader.read = lambda ids: held.append(True) or torch.zeros(len(ids), 256)  # type: ignore[method-assign]
    reader.begin = lambda: held.append(False)  # type: ignore[method-assign]
    batches = []
    for batch in ask(reader, Bytes(), task, samples, aware=aware, batch_tokens=batch_tokens):
        assert not held[-1], "between batches nothing is held"
        batches.append(batch)
    assert [len(batch) for batch in batches] == [together] * (5 // together) + [1] * (5 % together)
    assert [(answer.sample, answer.query) for batch in batches for answer in batch] == [(i, 0) for i in range(5)]


@pytest.mark.parametrize("task", OVER_TEXT, ids=lambda task: task.name)
def test_what_is_final_stays(task: TextTask) -> None:
    query = Query(np.array([65]), np.array([66]), ("12", "345"))
    ends = ("", "0", "a", "\n7", " 12 345", "\n12 345")
    finals = 0
    for text in ("", " ", "\n", "12", " 345 12", "12\n", "\n12\n", "7\n", " 12, 345", " 12, 345\n"):
        if task.final(query, text):
            finals += 1
            assert {task.score(query, text + end) for end in ends} == {task.score(query, text)}, text
    assert finals >= 2
