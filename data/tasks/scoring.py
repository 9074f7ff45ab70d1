"""How an answer in words is scored. None: there is nothing in the output that could be an answer."""

import re


def matched(accepted: tuple[str, ...], output: str) -> float | None:
    """RULER's string_match_all: the share of the accepted strings that the output contains, in any case of letters."""
    if not re.search(r"\w", output):
        return None
    low = output.lower()
    return sum(text.lower() in low for text in accepted) / len(accepted)


def matched_any(accepted: tuple[str, ...], output: str) -> float | None:
    """RULER's string_match_part: 1 if the output contains one of the accepted strings, in any case of letters."""
    if not re.search(r"\w", output):
        return None
    return float(any(text.lower() in output.lower() for text in accepted))


def starts_with(accepted: tuple[str, ...], output: str) -> float | None:
    """1 if the first line of the output is an accepted string, or goes on after one with something else than a word."""
    first = output.strip().partition("\n")[0].lower()
    if not first:
        return None
    return float(any(re.match(re.escape(text.lower()) + r"(?!\w)", first) is not None for text in accepted))


def overlap(accepted: tuple[str, ...], output: str) -> float | None:
    """Intersection over union of the numbers in the first line of the output, and the accepted ones."""
    found = set(re.findall(r"\d+", output.strip().partition("\n")[0]))
    return len(found & set(accepted)) / len(found | set(accepted)) if found else None


def has_first_line(output: str) -> bool:
    """Whether the first line is at its end, after which `starts_with` and `overlap` look at nothing."""
    return "\n" in output.lstrip()
