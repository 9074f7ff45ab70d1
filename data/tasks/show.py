"""Tasks, and a sample of one over bytes, to be read: `python -m nsa.data.tasks.show [TASK [LENGTH [INDEX]]]`."""

import sys

from nsa.data.tasks import TASKS, Bytes, task_named


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        for task in TASKS:
            print(f"  {task.name:<16} {task.over:<5} {task.group:<12} {task.scope:<7} {task.title}")
        return
    try:
        length, index = ([int(argument) for argument in arguments[1:3]] + [2048, 0][len(arguments[1:3]) :])[:2]
    except ValueError as error:
        raise ValueError("LENGTH and INDEX are whole numbers") from error
    task, vocabulary = task_named(arguments[0]), Bytes()
    sample = task.sample(vocabulary, length, "look", index)

    def shown(ids: list[int]) -> str:
        return vocabulary.decode(ids) if task.over == "text" or task.name == "passkey" else " ".join(map(str, ids))

    print(f"{task.title} ({task.source}); chance {sample.chance:.3g}\n\n{shown(sample.context[1:].tolist())}")
    for query in sample.queries:
        print(f"{shown(query.tokens.tolist())} -> {shown(query.answer.tolist())}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
