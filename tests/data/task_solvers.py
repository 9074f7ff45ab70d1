"""For every task a solver that knows its words and layout, and reads the context alone."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from nsa.data.tasks import Query, Sample, Vocabulary, id_sets


def next_to(context: list[int], question: list[int], vocabulary: Vocabulary) -> list[int]:
    """mqar: what follows the key."""
    return [context[context.index(question[-1]) + 1]]


def two_after(context: list[int], question: list[int], vocabulary: Vocabulary) -> list[int]:
    """mqmtar: the two tokens after `key key is`."""
    wanted = [*question[1:], int(id_sets(vocabulary).wide.reshape(-1)[1])]
    at = next(i for i in range(len(context)) if context[i : i + 3] == wanted)
    return context[at + 3 : at + 5]


def in_table(context: list[int], question: list[int], vocabulary: Vocabulary) -> list[int]:
    """joint_recall: what follows the key after its context."""
    table = context.index(question[0])
    return [context[context.index(question[1], table) + 1]]


def followed(context: list[int], question: list[int], vocabulary: Vocabulary) -> list[int]:
    """vt_1 to vt_4: assignments, one after the other."""
    equals = int(id_sets(vocabulary).wide[2, 0])
    value: dict[int, int] = {}
    for i in range(1, len(context) - 1):
        if context[i] == equals:
            value[context[i - 1]] = value.get(context[i + 1], context[i + 1])
    return [value[question[-1]]]


def passkey(context: list[int], question: list[int], vocabulary: Vocabulary) -> list[int]:
    before = vocabulary.encode("\nThe pass key is ")
    at = next(i for i in range(len(context)) if context[i : i + len(before)] == before) + len(before)
    return context[at : at + 4]


def words_of(text: str) -> dict[str, list[str]]:
    """The values of each key of the needles in a text."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"magic \w+ for (\S+) is: (\S+)\.", text):
        found.setdefault(key, []).append(value)
    return found


def needles(text: str, question: str) -> list[str]:
    found = words_of(text)
    asked = re.findall(r"[\w-]+", re.search(r" for (.*) mentioned", question)[1].replace(" and ", " "))  # type: ignore[index]
    return [value for key in asked for value in found[key]]


def variables(text: str, question: str) -> list[str]:
    value: dict[str, str] = {}
    for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        value[name] = value.get(given, given)
    wanted = re.search(r"value (\d+)", question)[1]  # type: ignore[index]
    return [name for name, given in value.items() if given == wanted]


def common(text: str, question: str) -> list[str]:
    return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", text.split("Below is")[-1])).most_common(10)]


def frequent(text: str, question: str) -> list[str]:
    counts = Counter(text.partition("most frequent.\n")[2].split())
    assert counts.most_common(1)[0][0] == "..."
    return [word for word, _ in counts.most_common(4)[1:]]


def chapters(text: str) -> dict[str, str]:
    return {part.partition(".")[0]: part for part in text.split("\nChapter ")[1:]}


def told(text: str, question: str) -> list[str]:
    number, what = re.search(r"chapter (\d+) the traveller (.*)", question).groups()  # type: ignore[union-attr]
    forms = {
        "came to": r" to (\w+)\. There I met",
        "met": r"There I met (.*?)\.",
        "heard that": r"I heard that (.*?)\.",
        "bought": r"I bought (.*?)\.",
    }
    return re.findall(forms[what], chapters(text)[number])


def bought_before(text: str, question: str) -> list[str]:
    bought = re.findall(r"I bought (.*?)\.", text)
    return [bought[bought.index(re.search(r"before (.*) was", question)[1]) - 1]]  # type: ignore[index]


def bought_nothing(text: str, question: str) -> list[str]:
    return [number for number, chapter in chapters(text).items() if "I bought" not in chapter]


def constant(text: str, question: str) -> list[str]:
    return re.findall(rf"^ *{question.split()[-2]} = (.*)$", text, re.MULTILINE)


OVER_IDS: dict[str, Callable[[list[int], list[int], Vocabulary], list[int]]] = {
    "mqar": next_to,
    "mqar_wide": next_to,
    "mqar_front": next_to,
    "mqmtar": two_after,
    "joint_recall": in_table,
    **{f"vt_{hops}": followed for hops in (1, 2, 3, 4)},
    "passkey": passkey,
}
OVER_TEXT: dict[str, Callable[[str, str], list[str]]] = {
    "vt": variables,
    "cwe": common,
    "fwe": frequent,
    "story_retrieval": told,
    "story_multihop": bought_before,
    "story_filtering": bought_nothing,
    "symbols": constant,
}


def solved(name: str, sample: Sample, query: Query, vocabulary: Vocabulary) -> tuple[list, list]:
    """The answer found and the answer wanted, as ids or as sorted strings."""
    context, question, answer = (x.tolist() for x in (sample.context, query.tokens, query.answer))
    if name in ("copy", "copy_wide", "sort"):
        shown = context[len(context) - len(answer) :]
        return (sorted(shown) if name == "sort" else shown), answer
    if name in OVER_IDS:
        return OVER_IDS[name](context, question, vocabulary), answer
    solve = needles if name.startswith("niah") else OVER_TEXT[name]
    found = solve(vocabulary.decode(np.array(context[1:]).tolist()), vocabulary.decode(question))
    return sorted(found), sorted(query.accepted)
