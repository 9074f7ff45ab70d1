"""What a task may not give away: one answer to each question, at a place that nothing tells, at the stated chance."""

import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from nsa.data.tasks import TASKS, Bytes, Query, Sample, id_sets, task_named, words
from nsa.data.tasks.story import journal
from nsa.data.tasks.symbols import CONSTANT
from tests.data.task_solvers import solved, words_of

BYTES = Bytes()
NAMES = [task.name for task in TASKS if not task.name.startswith("qa_")]
SEVERAL = [name for name in NAMES if len(task_named(name).sample(BYTES, 9000, 0, 0).queries) > 2]
PLACED = ("mqar", "mqar_front", "copy", "copy_wide", "sort", "vt", "cwe", "fwe", "story_filtering")  # by design


EQUALS = int(id_sets(BYTES).wide.reshape(-1)[1])  # of mqmtar: key key EQUALS value value


def facts(context: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(context, context[1:], context[2:], strict=False))


def text_of(sample: Sample) -> str:
    return BYTES.decode(sample.context[1:].tolist())


def place(name: str, sample: Sample, query: Query) -> float:
    """Where in the context the answer is, from 0 to 1: of ids where the key is, of text where the string is."""
    question = query.tokens.tolist()
    if task_named(name).over == "text":
        text, wanted = text_of(sample), query.accepted[0]
        if name == "symbols":
            wanted = f"{BYTES.decode(question).split()[-2]} = "
        if name == "story_retrieval":
            wanted = f"Chapter {re.findall(r'[0-9]+', BYTES.decode(question))[0]}."
        return text.index(wanted) / len(text)
    context = sample.context.tolist()
    if name == "passkey":
        return context.index(ord("\n")) / len(context)
    if name == "mqmtar":
        return facts(context).index((question[1], question[2], EQUALS)) / len(context)
    if name == "joint_recall":
        return context.index(question[1], context.index(question[0])) / len(context)
    return context.index(question[-1]) / len(context)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PLACED])
def test_answers_are_anywhere(name: str) -> None:
    """Those of a question that is the first or the only one to be asked, too."""
    samples = [task_named(name).sample(BYTES, 3000, 5, index) for index in range(24)]
    first = np.array([place(name, sample, sample.queries[0]) for sample in samples])
    assert first.max() > 0.7
    if not name.startswith("vt_"):  # the end of a chain comes late
        assert first.min() < 0.3 and 0.3 < first.mean() < 0.7


@pytest.mark.parametrize("name", SEVERAL)
def test_questions_are_in_no_order(name: str) -> None:
    """An order as in the context would tell where to look for the second answer."""
    sorted_ = 0
    for index in range(12):
        sample = task_named(name).sample(BYTES, 3000, 5, index)
        places = [place(name, sample, query) for query in sample.queries]
        sorted_ += places == sorted(places) or places == sorted(places, reverse=True)
    assert sorted_ < 6


def share(name: str, sample: Sample) -> float:
    """Of the score that naming one of the candidates in the context has."""
    text, context = text_of(sample), sample.context.tolist()
    values, narrow = set(id_sets(BYTES).wide[1].tolist()), set(id_sets(BYTES).values.tolist())
    if name.startswith("niah_multikey"):
        return 1 / len(words_of(text))
    if name == "mqmtar":
        return 1 / context.count(EQUALS)
    counts: dict[str, Callable[[], float]] = {
        "story_retrieval": lambda: text.count("\nChapter "),
        "story_multihop": lambda: text.count(" I bought "),
        "symbols": lambda: len({value for _, value in CONSTANT.findall(text)}),
        "cwe": lambda: len(set(re.findall(r"\d+\. (\w+)", text.split("Below is")[-1]))) / 10,
        "fwe": lambda: (len(set(text.partition("most frequent.\n")[2].split())) - 1) / 3,
        "copy": lambda: len(narrow),
        "copy_wide": lambda: len(values),
        "sort": lambda: len(narrow),
        "passkey": lambda: len(narrow),
    }
    if name in counts:
        return 1 / counts[name]()
    given = [t for t in context if t in (narrow if name == "mqar" else values)]
    if name == "joint_recall":
        given = [b for a, b in pairwise(context) if a == sample.queries[0].tokens[1]]
    # that of the fact asked for, or by luck that of another
    return 1 / len(given) + (1 - 1 / len(given)) / len(narrow if name == "mqar" else values)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("vt", "story_filtering")])
def test_chance_is_that_of_the_candidates(name: str) -> None:
    """`story_filtering` is guessed in test_tasks.py; `vt` has no chance worth a number."""
    for length in (9000, 12_000):
        sample = task_named(name).sample(BYTES, length, 2, 1)
        expected = share(name, sample) if task_named(name).over == "ids" or "single" not in name else sample.chance
        if name in ("niah_multivalue", "niah_multiquery"):
            expected = 1e-7
        assert sample.chance == pytest.approx(expected, rel=1e-6), length
    assert task_named("niah_single_1").sample(BYTES, 3000, 2, 1).chance == 1e-7  # a number of seven digits
    assert task_named("niah_single_3").sample(BYTES, 3000, 2, 1).chance == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_question_has_one_answer(name: str) -> None:
    """What is asked for is named once, and several answers to one question differ."""
    for index in range(8):
        sample = task_named(name).sample(BYTES, 9000, 7, index)
        asked = [tuple(query.tokens.tolist()) for query in sample.queries]
        assert len(set(asked)) == len(asked), "no question twice"
        context = sample.context.tolist()
        for query in sample.queries:
            found, wanted = solved(name, sample, query, BYTES)
            assert found == wanted
            assert len(set(query.accepted)) == len(query.accepted)
            if name in ("mqar", "mqar_wide", "mqar_front"):
                assert context.count(int(query.tokens[-1])) == 1
            if name == "mqmtar":
                assert facts(context).count((*query.tokens[1:].tolist(), EQUALS)) == 1
            if name == "joint_recall":
                assert context.count(int(query.tokens[0])) == 1


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_a_chain_has_all_its_hops_and_other_chains_between_them(hops: int) -> None:
    equals = int(id_sets(BYTES).wide[2, 0])
    names, mixed = set(id_sets(BYTES).wide[0].tolist()), 0
    for index in range(6):
        sample = task_named(f"vt_{hops}").sample(BYTES, 600, 1, index)
        context = sample.context.tolist()
        given = {context[i - 1]: context[i + 1] for i in range(1, len(context)) if context[i] == equals}
        order = list(given)
        for query in sample.queries:
            chain = [int(query.tokens[-1])]
            while given[chain[-1]] in names:
                chain.append(given[chain[-1]])
            assert len(chain) == hops + 1 and given[chain[-1]] == query.answer[0]
            places = sorted(order.index(name) for name in chain)
            mixed += places[-1] - places[0] > hops
    assert mixed > 3


def test_a_table_alone_or_a_key_alone_tells_nothing() -> None:
    """A key has other values in other contexts, and another place in their tables."""
    values = places = 0
    for index in range(8):
        sample = task_named("joint_recall").sample(BYTES, 600, 1, index)
        context, key = sample.context.tolist(), int(sample.queries[0].tokens[1])
        at = [i for i, token in enumerate(context) if token == key]
        tables = [int(q.tokens[0]) for q in sample.queries if int(q.tokens[1]) == key]
        values += len({context[i + 1] for i in at}) > 1
        starts = [max(i for i in range(a) if context[i] in id_sets(BYTES).wide[2].tolist() or i == 0) for a in at]
        places += len({a - b for a, b in zip(at, starts, strict=True)}) > 1
        assert len(at) > 1 and tables
    assert values > 5 and places > 5


@pytest.mark.parametrize("length", [600, 4000])
def test_facts_of_mqmtar_are_four_fifths(length: int) -> None:
    """Pairs are of six tokens each; the rest is spaces and questions."""
    context = task_named("mqmtar").sample(BYTES, length, 1, 1).context.tolist()
    assert 0.75 < 6 * context.count(EQUALS) / length <= 0.8


@pytest.mark.parametrize("name", ["mqar", "mqar_front"])
def test_pairs_in_front_are_in_front(name: str) -> None:
    sample = task_named(name).sample(BYTES, 3000, 1, 1)
    places = sorted(place(name, sample, query) * len(sample.context) for query in sample.queries)
    facts_ = 16 if name == "mqar" else 54  # the square root of the length
    assert places[0] >= 1 and places[-1] < 1 + 2 * facts_


def test_words_are_as_wide_as_they_say() -> None:
    for name, most in (("copy", 16), ("copy_wide", len(id_sets(BYTES).wide[1]))):
        (query,) = task_named(name).sample(BYTES, 4000, 1, 1).queries
        assert len(set(query.answer.tolist())) == most
    rng = np.random.default_rng(0)
    assert len(set(words.names(rng, 20_000))) == 20_000 and len(set(words.compounds(rng, 20_000))) == 20_000
    assert not any(word[: len(word) // 2] * 2 == word for word in words.compounds(rng, 20_000))
    bought = [chapter.item for chapter in journal(rng, 1500, 0)]
    assert len(set(bought)) == 1500


class Spaced(Bytes):
    """Puts a space in front of every text that it encodes, as some tokenizers do."""

    def encode(self, text: str) -> list[int]:
        return list(f" {text}".encode())


@pytest.mark.parametrize("name", ["niah_single_1", "story_multihop", "vt"])
def test_an_answer_is_what_follows_its_question(name: str) -> None:
    (query, *_) = task_named(name).sample(Spaced(), 6000, 1, 1).queries
    text = BYTES.decode(query.answer.tolist())
    assert text.startswith(" ") and not text.startswith("  ")
