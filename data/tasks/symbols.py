"""Symbol recall over real source code: which value was given to a name."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from nsa.data import builtin
from nsa.data.tasks.base import Query, generator
from nsa.data.tasks.scoring import has_first_line, starts_with
from nsa.data.tasks.text import Draft, TextTask

# A constant: a name of a module or a class that is given a number or a short string, on a line of its own.
CONSTANT = re.compile(
    r"^(?:    )?([A-Za-z_]\w{3,40}) = "
    r"(-?\d{2,12}|0[xXoO][0-9a-fA-F]{2,12}|\d+\.\d+|'[^'\\\n]{3,30}'|\"[^\"\\\n]{3,30}\")$",
    re.MULTILINE,
)
# Whatever gives a value to a name, in statements, annotations and calls: a name that has two has no one answer.
GIVEN = re.compile(r"^\s*(\w+)(?:\s*:[^=\n]*)? *[-+*/|&]?=(?!=)", re.MULTILINE)
TRIES = 100
LEFT_OUT = ("test/", "encodings/", "lib2to3/", "site-packages/", "dist-packages/")
BEFORE, AFTER = 16, 24  # lines around a constant: an excerpt of a file
LONGEST = 200  # characters of a line; longer ones are cut


class File(NamedTuple):
    name: str
    lines: list[str]
    constants: list[int]  # numbers of lines

    def excerpt(self, at: int) -> tuple[list[str], list[str]]:
        """Some lines in front of line `at`, under the file's name, and some from it on."""
        return [f"# {self.name}", *self.lines[max(0, at - BEFORE) : at]], [*self.lines[at : at + AFTER], ""]


@lru_cache(maxsize=1)
def files() -> list[File]:
    """Modules of the standard library and of its packages that hold constants; tests and tables are left out."""
    folder, found = builtin.root(), []
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        name = path.relative_to(folder).as_posix()
        if name.startswith(LEFT_OUT):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:  # the standard library tests other encodings with a few files
            continue
        if CONSTANT.search(text):
            lines = [line[:LONGEST] for line in text.replace("\t", "    ").splitlines()]
            found.append(File(name, lines, [i for i, line in enumerate(lines) if CONSTANT.match(line)]))
    if not found:
        raise ValueError(f"no Python sources with constants under {folder}: leave the task symbols out")
    return found


@dataclass(frozen=True, kw_only=True)
class Symbols(TextTask):
    """Excerpts of files one after another; up to `questions` names that are given a value once are asked for.

    The text is that of this machine's Python: samples are the same for all who run the same release of it.
    """

    questions: int = 4
    filler = "# "

    def sizes(self, length: int) -> tuple[int, int]:
        return 2, 1 << 40

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        for attempt in range(TRIES):
            if draft := self._draft(size, generator(*key, attempt)):
                return draft
        raise AssertionError("no constant of the standard library has a name of its own")

    def _draft(self, size: int, rng: np.random.Generator) -> Draft | None:
        """Excerpts around constants, `size` lines; None if no name in them has one value."""
        known = files()

        def excerpts() -> Iterator[tuple[list[str], list[str]]]:
            for i in cycle(rng.permutation(len(known)).tolist()):
                lines = known[i].constants
                yield known[i].excerpt(lines[int(rng.integers(len(lines)))])

        more = excerpts()
        before = int(rng.random() * size)  # lines in front of the first constant
        front, tail = next(more)
        parts = [front]
        while sum(map(len, parts)) < before:
            parts.append([line for part in next(more) for line in part])
        head = [line for part in reversed(parts) for line in part]
        while len(tail) < size - before:
            tail += [line for part in next(more) for line in part]
        text = "\n".join([*head[len(head) - before :], *tail[: size - before]])
        found = dict(CONSTANT.findall(text))
        given = Counter(GIVEN.findall(text))
        names = [name for name in found if given[name] == 1]
        if not names:
            return None
        questions = tuple(
            (f"\n# The value that the code above gives to {name}:\n{name} =", f" {found[name]}", (found[name],))
            for name in (names[j] for j in rng.permutation(len(names))[: self.questions])
        )
        values = len({value for _, value in CONSTANT.findall(text)})
        return Draft("", text, questions, 1 / values if values > 1 else 0.0)

    def score(self, query: Query, output: Any) -> float | None:
        """1 if the output begins with the value as it is written."""
        return starts_with(query.accepted, output)

    def final(self, query: Query, output: Any) -> bool:
        return has_first_line(output)


def symbols() -> Symbols:
    return Symbols(
        name="symbols",
        title="Symbol recall in source code",
        source="own; Python's standard library",
        group="retrieval",
        scope="single",
        over="text",
        shortest=512,
    )
