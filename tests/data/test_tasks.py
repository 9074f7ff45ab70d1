"""Every task: sizes, determinism, answers that follow from the context alone, scores."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa.data.tasks import (
    IGNORED,
    TASKS,
    Bytes,
    HuggingFace,
    Query,
    Sample,
    Task,
    UnavailableError,
    Vocabulary,
    episode,
    id_sets,
    task_named,
    words,
)
from nsa.data.tasks.story import journal
from nsa.data.tokenizer import Tokenizer, train
from tests.data.task_solvers import solved, words_of

NAMES = [task.name for task in TASKS if not task.name.startswith("qa_")]
LENGTHS = (512, 777, 1024, 4096)
BOS = "<begin>"


def english() -> list[str]:
    rng = np.random.default_rng(0)
    story = [chapter.text(rng) for chapter in journal(rng, 60, 3)]
    return [*words.essay(rng, 300), *story, " ".join(words.names(rng, 300)), " ".join(words.compounds(rng, 300))]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(english(), 2000, tmp_path_factory.mktemp("tokenizer") / "words.model")


@pytest.fixture(scope="module")
def foreign() -> Any:
    """A byte-level BPE of transformers, as Llama 3 and Qwen have."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(english(), trainer)
    # As many do, it puts a bos in front of everything that it is not told to leave alone.
    model.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token=BOS)


def size(sample: Sample) -> int:
    return len(sample.context) + max(len(q.tokens) + len(q.answer) for q in sample.queries)


def same(a: Sample, b: Sample) -> bool:
    pairs = zip(a.queries, b.queries, strict=True)
    return np.array_equal(a.context, b.context) and all(
        np.array_equal(p.tokens, q.tokens) and np.array_equal(p.answer, q.answer) for p, q in pairs
    )


def check(task: Task, vocabulary: Vocabulary, sample: Sample, length: int) -> None:
    assert 0.95 * length <= size(sample) <= length
    assert sample.context[0] == vocabulary.bos_id
    assert 0 <= sample.chance < 1
    context = sample.context.tolist()
    for query in sample.queries:
        assert {x.dtype for x in (sample.context, query.tokens, query.answer)} == {np.dtype(np.int64)}
        assert [*context, *query.tokens, *query.answer].count(vocabulary.bos_id) == 1, "one bos"
        assert len(query.tokens) >= 1 <= len(query.answer) <= task.max_new_tokens(query)
        found, wanted = solved(task.name, sample, query, vocabulary)
        assert found == wanted, task.name
        if task.over == "ids":
            assert query.accepted == () and not set(query.tokens.tolist()) & set(query.answer.tolist())
            assert task.score(query, query.answer) == 1.0
            continue
        question, answer = (vocabulary.decode(x.tolist()) for x in (query.tokens, query.answer))
        assert all(f" {text} " not in f" {question} " for text in query.accepted), "the question tells the answer"
        assert all(text in answer for text in query.accepted) and task.score(query, answer) == 1.0
        whole = vocabulary.decode([*sample.context[1:].tolist(), *query.tokens.tolist(), *query.answer.tolist()])
        assert whole.endswith(question + answer) and question.startswith("\n") and answer.startswith(" ")


@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_from_a_context_of_the_length(name: str, own: Tokenizer) -> None:
    task = task_named(name)
    for index, length in enumerate(LENGTHS):
        sample = task.sample(own, length, 3, index)
        check(task, own, sample, length)
        if length == 777:
            assert same(sample, task_named(name).sample(own, length, 3, index))
            others = (task.sample(own, length, 4, index), task.sample(own, length, 3, index + 1))
            assert not any(np.array_equal(sample.context, other.context) for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_tokenizer_of_transformers(name: str, foreign: Any) -> None:
    """Its own bos of each call is not taken, and its tokens are counted as put together."""
    check(task_named(name), HuggingFace(foreign), task_named(name).sample(foreign, 777, 3, 0), 777)


def test_a_tokenizer_of_transformers_as_a_vocabulary(foreign: Any) -> None:
    vocabulary = HuggingFace(foreign)
    text = f"a{BOS}b  c\n\n"
    assert vocabulary.bos_id not in vocabulary.encode(text), "text that looks like a control token is text"
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([vocabulary.bos_id, *vocabulary.encode("a b"), vocabulary.bos_id]) == "a b"
    ids = vocabulary.ordinary_ids()
    assert vocabulary.bos_id not in ids and len(ids) > 1000 and (np.diff(ids) > 0).all()
    assert not any("\n" in vocabulary.decode([i]) for i in ids.tolist())
    foreign_without = type("", (), {"bos_token_id": None, "eos_token_id": None})()
    with pytest.raises(ValueError, match="no bos and no eos"):
        HuggingFace(foreign_without)


def test_names_are_distinct_and_records_whole() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 25
    assert all(task.title and task.source and task.shortest >= 32 for task in TASKS)


def test_unknown_names(own: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'niah_singel_1'; did you mean 'niah_single_1'\?"):
        task_named("niah_singel_1")
    with pytest.raises(ValueError, match=r"task mqar_wide: .*pears"):
        task_named("mqar_wide", pears=3)
    with pytest.raises(ValueError, match=r"512 tokens and \d+ keys allow 127 pairs at most"):
        task_named("mqar_wide", pairs=300).sample(own, 512, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_too_short(name: str, own: Tokenizer) -> None:
    task = task_named(name)
    with pytest.raises(ValueError, match=rf"task {name}: a sample needs \d+ tokens"):
        task.sample(own, task.shortest - 1, 1, 1)


def test_a_tokenizer_that_needs_more_tokens_is_told() -> None:
    with pytest.raises(ValueError, match=r"needs \d+ tokens or more with this tokenizer, not 512"):
        task_named("niah_multiquery").sample(Bytes(), 512, 1, 1)


ANSWERS = [
    ("niah_multivalue", ("12", "34", "56", "78"), " 34, then 12 and", 0.5),
    ("niah_single_1", ("1234567",), " ...\n", None),
    ("cwe", ("appletree", "boatyard"), " 1. APPLETREE 2. other", 0.5),
    ("vt", ("ABCDE",), "", None),
    ("story_retrieval", ("Oakbury",), " Oakbury. And so on", 1.0),
    ("story_retrieval", ("Oakbury",), " Oakburyton", 0.0),
    ("story_retrieval", ("Oakbury",), " \n", None),
    ("story_filtering", ("1", "4", "9"), " 1, 4 and 7.\nChapter 9", 0.5),
    ("story_filtering", ("1", "4", "9"), " none of them", None),
    ("symbols", ("42",), " 42\nb = 3", 1.0),
    ("symbols", ("42",), " 421", 0.0),
    ("qa_1", ("Rome", "the city of Rome"), " in rome", 1.0),
]


@pytest.mark.parametrize(("name", "accepted", "output", "score"), ANSWERS)
def test_scores_of_text(name: str, accepted: tuple[str, ...], output: str, score: float | None) -> None:
    query = Query(np.array([1]), np.array([2]), accepted)
    assert task_named(name).score(query, output) == score


def test_scores_of_ids() -> None:
    query = Query(np.array([1]), np.array([2, 3]))
    scores = [task_named("mqmtar").score(query, output) for output in ([2, 3], [2, 3, 9], [2, 4], [2], [])]
    assert scores == [1.0, 1.0, 0.0, None, None]


def test_an_episode_is_its_questions_and_answers() -> None:
    queries = tuple(Query(np.array([10 * i]), np.array([10 * i + 1, 10 * i + 2])) for i in (1, 2))
    sample = Sample(np.array([0, 5, 6]), queries, 0.5)
    no = IGNORED
    whole = episode(sample, 11)
    assert whole.tokens.tolist() == [0, 5, 6, 10, 11, 12, 20, 21, 22, 5, 6]
    assert whole.targets.tolist() == [no, no, no, 11, 12, no, 21, 22, no, no, no]
    assert episode(sample, 8).tokens.tolist() == [0, 5, 6, 10, 11, 12, 20, 21]
    assert episode(sample, 8).targets.tolist() == [no, no, no, 11, 12, no, 21, 22]
    assert episode(sample, 7).targets.tolist() == [no, no, no, 11, 12, no, no]
    with pytest.raises(ValueError, match="cannot hold"):
        episode(sample, 4)


@pytest.mark.parametrize("name", ["mqar_wide", "mqmtar", "joint_recall", "vt_2", "sort", "story_retrieval"])
def test_episodes_are_full_of_answers(name: str, own: Tokenizer) -> None:
    task = task_named(name)
    length = 640 if task.over == "text" else 128
    plain, crowded = (task.episode(own, length, 1, 1, crowded=crowded) for crowded in (False, True))
    for made in (plain, crowded):
        assert made.tokens.shape == made.targets.shape == (length,)
        asked = np.flatnonzero(made.targets[:-1] != IGNORED)
        assert len(asked) and np.array_equal(made.targets[asked], made.tokens[asked + 1])
    counts = [
        sum((task.episode(own, length, 1, i, crowded=c).targets != IGNORED).sum() for i in range(5)) for c in (0, 1)
    ]
    assert counts[1] > counts[0] or name in ("sort", "story_retrieval")


@pytest.mark.parametrize("name", ["mqar_wide", "vt_2", "joint_recall"])
def test_chance_is_that_of_a_value_given(name: str, own: Tokenizer) -> None:
    """A guess among the values in the context; of joint recall, among those of the key."""
    task, rng = task_named(name), np.random.default_rng(0)
    values = set(id_sets(own).wide[1].tolist())
    right = []
    for index in range(150):
        sample = task.sample(own, 128, 1, index)
        context = sample.context.tolist()
        for query in sample.queries:
            given = [t for t in context if t in values]
            if name == "joint_recall":
                given = [b for a, b in pairwise(context) if a == query.tokens[1]]
            right.append(rng.choice(given) == query.answer[0])
    assert np.mean(right) == pytest.approx(sample.chance, abs=3 * np.sqrt(sample.chance / len(right)))


def test_chance_of_story_filtering(own: Tokenizer) -> None:
    task, rng = task_named("story_filtering"), np.random.default_rng(0)
    sample = task.sample(own, 777, 1, 1)
    count = own.decode(sample.context.tolist()).count("Chapter")
    guesses = [", ".join(map(str, 1 + rng.choice(count, 3, replace=False))) for _ in range(4000)]
    assert np.mean([task.score(sample.queries[0], g) for g in guesses]) == pytest.approx(sample.chance, abs=0.02)


def test_gaps_are_spread_or_near(own: Tokenizer) -> None:
    def gaps(gap: float) -> np.ndarray:
        task, found = task_named("mqar_wide", gap=gap), []
        for index in range(10):
            sample = task.sample(own, 1024, 1, index)
            places = [sample.context.tolist().index(q.tokens[0]) for q in sample.queries]
            found += [1 - place / len(sample.context) for place in places]
        return np.array(found)

    assert 0.4 < np.median(gaps(1.0)) < 0.6 and gaps(1.0).max() > 0.9
    assert np.median(gaps(0.01)) < 0.25


@pytest.mark.parametrize("name", ["cwe", "niah_multikey_2", "fwe"])
def test_strict_upstream_has_one_order_of_places(name: str, own: Tokenizer) -> None:
    """The release's quirk, and not by default: the answer is at the same place in every sample of a size."""

    def places(strict: bool) -> set[tuple[int, ...]]:
        task = task_named(name, strict_upstream=strict)
        assert isinstance(task, Task)
        found = set()
        for index in range(4):
            draft = task.draft(60, 1024, (1, name, 1024, index))  # type: ignore[attr-defined]
            text, wanted = draft.body, set(draft.questions[0][2])
            keys = [v for values in words_of(text).values() for v in values] or text.replace(". ", ".").split()
            found.add(tuple(i for i, w in enumerate(keys) if w.split(".")[-1] in wanted))
        return found

    assert len(places(True)) == 1 and len(places(False)) > 1


def test_needles_are_anywhere(own: Tokenizer) -> None:
    task, depths = task_named("niah_single_2"), []
    for index in range(16):
        text = own.decode(task.sample(own, 777, 1, index).context.tolist())
        depths.append(text.index("One of the special") / len(text))
    assert min(depths) < 0.35 and max(depths) > 0.75


SQUAD = [
    {
        "question": f"Who built hall {i}?",
        "context": f"Hall {i} was built by Mason{i}.",
        "answers": {"text": [f"Mason{i}"]},
    }
    for i in range(80)
]
HOTPOT = [
    {
        "question": f"Where does the builder of hall {i} live?",
        "context": {
            "title": [f"Hall {i}", f"Mason{i}"],
            "sentences": [[f"It was built by Mason{i}."], ["He lives ", f"in Oakbury{i}."]],
        },
        "answer": f"Oakbury{i}",
    }
    for i in range(60)
]


@pytest.mark.parametrize(("name", "rows"), [("qa_1", SQUAD), ("qa_2", HOTPOT)])
def test_question_answering_from_a_local_folder(name: str, rows: list[dict], own: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    task = task_named(name, source_data=str(tmp_path / "set"))
    for length in (512, 1024):
        sample = task.sample(own, length, 1, 1)
        (query,) = sample.queries
        assert 0.95 * length <= size(sample) <= length
        text, question = (own.decode(x.tolist()) for x in (sample.context, query.tokens))
        number = question.split("hall ")[1].split()[0].strip("?")
        assert query.accepted == ((f"Mason{number}",) if name == "qa_1" else (f"Oakbury{number}",))
        assert f"built by Mason{number}." in text and query.accepted[0] in text and query.accepted[0] not in question
        assert task.score(query, own.decode(query.answer.tolist())) == 1.0


def test_paragraphs_that_answer_are_there_once_and_anywhere(tmp_path: Path) -> None:
    """Of a data set with several splits the one for validation is asked."""
    datasets = pytest.importorskip("datasets")

    def rows(who: str) -> list[dict]:
        return [
            {"question": f"Who built hall {i}?", "context": f"Hall {i} was built by {who}{i}.",
             "answers": {"text": [f"{who}{i}"]}}
            for i in range(60)
        ]  # fmt: skip

    splits = {
        "train": datasets.Dataset.from_list(rows("Carter")),
        "validation": datasets.Dataset.from_list(rows("Mason")),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    task, places = task_named("qa_1", source_data=str(tmp_path / "set")), []
    for index in range(12):
        sample = task.sample(Bytes(), 1500, 1, index)
        (query,), text = sample.queries, Bytes().decode(sample.context[1:].tolist())
        assert text.count(f"by {query.accepted[0]}.") == 1 and query.accepted[0].startswith("Mason")
        places.append(text.index(f"by {query.accepted[0]}.") / len(text))
    assert min(places) < 0.4 and max(places) > 0.6


def test_question_answering_without_its_data(own: Tokenizer, tmp_path: Path) -> None:
    task = task_named("qa_1", source_data=str(tmp_path / "nothing"))
    with pytest.raises(UnavailableError, match=r"nothing' cannot be loaded .*local folder as source_data, or leave"):
        task.sample(own, 512, 1, 1)


def test_a_variant_asks_the_same_for_every_arm(own: Tokenizer) -> None:
    """Pairing: what does not change what a sample is does not change the sample."""
    task = task_named("vt")
    assert same(task.sample(own, 777, 1, 5), replace(task, title="another").sample(own, 777, 1, 5))
