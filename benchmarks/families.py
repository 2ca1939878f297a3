"""Which reasoning-gym families can be graded, and by what: gold answers, spoiled ones, and the families' own scorers.

    python benchmarks/families.py [--problems 20] [--out docs/results/families.md]

For every family: its gold answers must be correct by the domain `procedural`. Every
gold answer is then spoiled in up to three ways (a digit or letter changed, the last word dropped, a word doubled), and
each must be wrong. Where the family's own scorer may be called, the last column is the share of all these answers on which
it agrees. Families whose scorer evaluates the answer as code are not called with spoiled answers. Needs reasoning-gym 0.1.25.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from reasoning_gym.factory import DATASETS

from soar.domains.procedural import EVALUATES, _scorer, kind_of
from soar.files import write_atomic
from soar.problems.domain import load_domain
from soar.problems.load import DataError, load_problems
from soar.problems.pool import VerifierPool
from soar.types import Problem, Verdict, columns_of


def spoiled(answer: str, rng: random.Random) -> list[str]:
    """The answer with one mistake each."""
    made = []
    places = [i for i, char in enumerate(answer) if char.isascii() and char.isalnum()]
    if places:
        place = rng.choice(places)
        char = answer[place]
        other = str((int(char) + 1) % 10) if char.isdigit() else ("x" if char.lower() != "x" else "y")
        made.append(answer[:place] + other + answer[place + 1 :])
    words = answer.split()
    if len(words) > 1:
        made += [" ".join(words[:-1]), " ".join([*words, words[-1]])]
    return [text for text in made if text != answer]


def by_scorer(problem: Problem, answer: str) -> bool | None:
    """What the family's own scorer says; None where it fails."""
    entry = {"question": problem.question, "answer": problem.answer, "metadata": json.loads(problem.extra["metadata"])}
    try:
        return float(_scorer(problem.extra["family"])(answer=answer, entry=entry)) >= 1
    except Exception:  # somebody else's code, on answers that it was not made for
        return None


def share(good: int, total: int) -> str:
    return f"{good} of {total}" if total else "-"


def row(family: str, count: int, pool: VerifierPool) -> list[str]:
    """The cells of a family."""
    kind = kind_of(family)
    try:
        problems, _ = load_problems(f"reasoning_gym:{family}", limit=count, seed=0, skip_bad_rows=True)
    except DataError as error:
        return [family, "none", "-", "-", "-", str(error).rpartition(": ")[2][:60]]
    if kind == "refused":
        return [family, kind, "-", "-", "-", "its scorer evaluates the answer"]
    golds = [p.answer for p in problems]
    correct = pool.check_answers(golds, golds, columns_of(problems))
    rng = random.Random(family)
    wrong = [(p, text) for p in problems for text in spoiled(p.answer, rng)]
    columns = columns_of([p for p, _ in wrong])
    verdicts = pool.check_answers([t for _, t in wrong], [p.answer for p, _ in wrong], columns)
    agreed = asked = 0
    if family not in EVALUATES and kind != "scorer":
        pairs = [*((p, p.answer) for p in problems), *wrong]
        for (problem, text), verdict in zip(pairs, [*correct, *verdicts], strict=True):
            said = by_scorer(problem, text)
            asked += said is not None
            agreed += said is not None and said == verdict.solved
    good, refused = sum(v.solved for v in correct), sum(v is Verdict.WRONG for v in verdicts)
    note = "" if good == len(golds) and refused == len(wrong) else "see below"
    return [family, kind, share(good, len(golds)), share(refused, len(wrong)), share(agreed, asked), note]


def table(rows: Sequence[Sequence[str]]) -> str:
    head = ["family", "graded by", "gold answers correct", "spoiled ones wrong", "its own scorer agrees", "note"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--families", nargs="*", default=sorted(set(DATASETS) - {"composite"}))
    arguments = parser.parse_args()
    with VerifierPool(load_domain("procedural"), timeout_s=20.0, workers=1) as pool:
        rows = [row(family, arguments.problems, pool) for family in arguments.families]
    kinds = {kind: sum(cells[1] == kind for cells in rows) for kind in ("number", "text", "scorer", "refused", "none")}
    version = metadata.version("reasoning-gym")
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lines = [
        f"{len(rows)} families of reasoning-gym {version}, {arguments.problems} problems each, seed 0: {counts}.",
        "",
    ]
    text = "\n".join([*lines, table(rows), ""])
    print(text)
    if arguments.out:
        page = (
            arguments.out.read_text(encoding="utf-8").partition("<!-- table -->")[0] if arguments.out.exists() else ""
        )
        write_atomic(arguments.out, f"{page}<!-- table -->\n\n{text}".encode())


if __name__ == "__main__":
    main()
