"""RULER's two tasks of question answering: the paragraph that answers among others. They need a data set.

`source_data` is a data set's name on the Hugging Face Hub, or a local folder that `datasets` can load (as
`datasets.save_to_disk` writes it, or one with files of data).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nsa.data.tasks.base import Query, UnavailableError, generator
from nsa.data.tasks.ruler import RulerTask
from nsa.data.tasks.scoring import matched_any
from nsa.data.tasks.text import Draft


class Question(NamedTuple):
    text: str
    answers: tuple[str, ...]
    paragraphs: tuple[int, ...]  # that answer it, as numbers of paragraphs


@lru_cache(maxsize=4)
def load(name: str, subset: str | None) -> tuple[list[str], list[Question]]:
    """All paragraphs, and the questions about them, of a data set in the form of SQuAD or of HotpotQA.

    Raises:
        UnavailableError: it cannot be loaded, or has another form.
    """
    import datasets  # takes seconds to import

    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            local = Path(name).is_dir()
            loaded = datasets.load_dataset(name, None if local else subset)
        rows = loaded if isinstance(loaded, datasets.Dataset) else loaded[_split(loaded)]
    except Exception as error:  # of many kinds: connection, HTTP, unknown data set or split
        raise UnavailableError(
            f"the data set {name!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "give its task a local folder as source_data, or leave the task out"
        ) from error
    known: dict[str, int] = {}
    questions = []
    for row in rows:
        try:
            if isinstance(row["context"], str):
                texts, answers = [row["context"]], tuple(row["answers"]["text"])
            else:
                titles, parts = row["context"]["title"], row["context"]["sentences"]
                texts = [f"{title}\n{''.join(part)}" for title, part in zip(titles, parts, strict=True)]
                answers = (row["answer"],)
        except (KeyError, TypeError) as error:
            raise UnavailableError(f"the data set {name!r} has neither the form of SQuAD nor of HotpotQA") from error
        numbers = tuple(known.setdefault(text, len(known)) for text in texts)
        if answers:
            questions.append(Question(row["question"], tuple(dict.fromkeys(answers)), numbers))
    if not questions:
        raise UnavailableError(f"the data set {name!r} has no question with an answer")
    return list(known), questions


def _split(loaded: Any) -> str:
    return "validation" if "validation" in loaded else next(iter(loaded))


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(RulerTask):
    """source_data: see above. subset: the data set's configuration name on the Hub."""

    source_data: str
    subset: str | None = None
    new_tokens: int = 32

    def sizes(self, length: int) -> tuple[int, int]:
        paragraphs, questions = load(self.source_data, self.subset)
        return 0, len(paragraphs) - max(len(q.paragraphs) for q in questions)

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        rng = generator(*key)
        paragraphs, questions = load(self.source_data, self.subset)
        question = questions[int(rng.integers(len(questions)))]
        others = rng.permutation(np.setdiff1d(np.arange(len(paragraphs)), question.paragraphs))[:size]
        texts = [paragraphs[i] for i in (*question.paragraphs, *others)]
        documents = [f"Document {i}:\n{texts[j]}" for i, j in enumerate(self.shuffled(rng, len(texts), key), 1)]
        head = "Answer the question from the documents. Give the answer alone.\n\n"
        return Draft(
            head,
            "\n\n".join(documents),
            ((f"\n\nQuestion: {question.text}\nAnswer:", f" {question.answers[0]}", question.answers),),
            0.0,
        )

    def score(self, query: Query, output: Any) -> float | None:
        """1 if the output contains one of the answers."""
        return matched_any(query.accepted, output)


def question_answering() -> tuple[QuestionAnswering, ...]:
    return (
        QuestionAnswering(
            name="qa_1",
            title="Questions about a paragraph (SQuAD)",
            group="retrieval",
            scope="single",
            over="text",
            shortest=512,
            source_data="rajpurkar/squad",
        ),
        QuestionAnswering(
            name="qa_2",
            title="Questions about two paragraphs (HotpotQA)",
            group="multi-hop",
            scope="multi",
            over="text",
            shortest=512,
            source_data="hotpotqa/hotpot_qa",
            subset="distractor",
        ),
    )
