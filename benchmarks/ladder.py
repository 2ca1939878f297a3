"""Which sums does a model never solve, and what does it write itself as a teacher?

    python benchmarks/ladder.py FOLDER [RECIPE] [--levels 1x3 1x8 2x4] [--count 128] [--attempts 32] [--set KEY=VALUE ...]

A level DxT is sums of T numbers with D digits; in the format `totals` (recipe smollm2-warm) the answer is every running
total. Writes FOLDER/level-DxT.jsonl (`--candidates` problems) and measures the base model on the first `--count` of them:
the pass rate sampled at temperature 1 and greedy, the share of problems that none of the attempts solved, and the share of
attempts that hit the token limit. A hard set wants a level with a pass rate under 1 / (2 * screen.attempts), and levels with
signal below it. Then what the untrained teacher writes: accepted share, reasons, distinct questions, right answers, and how
many numbers its sums have (those with a right answer once each). FOLDER/ladder.json holds all of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from make_sums import running_totals, sums

from soar import seeds
from soar.config import Config, load
from soar.loop.evaluate import count_correct
from soar.loop.rollout import RolloutEnv
from soar.loop.write import read_pairs, teacher_prompt
from soar.problems.load import fingerprint
from soar.run.setup import open_env
from soar.types import Problem, Rejection

LEVELS = ("1x2", "1x3", "1x4", "1x5", "1x6", "1x7", "2x2", "2x3", "2x4", "2x5", "3x2", "3x3", "3x4")
TERM = re.compile(r"[+-]?\d+")
SUM = re.compile(r"-?\d{1,6}(?: ?[+-] ?\d{1,6}){0,15}")


def answer_of(question: str, totals: bool = False) -> str | None:
    """The right answer to a sum of integers (totals: every running total), None for any other text."""
    if not SUM.fullmatch(question):
        return None
    answers = running_totals([int(term) for term in TERM.findall(question.replace(" ", ""))])
    return ", ".join(answers) if totals else answers[-1]


def terms_of(question: str) -> int:
    """How many numbers a sum has."""
    return len(re.findall(r"\d+", question))


def level_problems(level: str, count: int, seed: int, signs: str = "+", totals: bool = False) -> list[dict[str, str]]:
    """Rows of `count` sums of a level DxT, fewer where a level has not twice as many."""
    digits, terms = (int(part) for part in level.split("x"))
    possible = 9**terms if digits == 1 else (9 * 10 ** (digits - 1)) ** terms
    return sums([terms], digits, min(count, possible // 2), seed + 31 * terms + digits, signs, bare=True, totals=totals)


def as_problems(rows: list[dict[str, str]]) -> list[Problem]:
    """Problems of such rows."""
    return [Problem(fingerprint(row["question"])[:16], row["question"], row["answer"]) for row in rows]


def measure(env: RolloutEnv, problems: list[Problem], config: Config, attempts: int) -> dict[str, float]:
    """What the base model can do on one level."""
    sampling = config.student.sampling
    correct, cut, _ = count_correct(env, None, problems, attempts, seeds.derive(config.seed, "ladder"), sampling)
    greedy = env.rollout(None, [problems], 1, [0], sampling, greedy=True)
    return {
        "pass@1": float(correct.mean()) / attempts,
        "greedy": float(greedy.pass_rate_P()[0]),
        "never solved": float((correct[0] == 0).mean()),
        "truncated": float(cut.mean()) / attempts,
    }


def teacher_report(env: RolloutEnv, config: Config, count: int) -> dict[str, Any]:
    """What `count` texts of the untrained teacher hold."""
    prompt = teacher_prompt(env, config)
    seed = seeds.derive(config.seed, "ladder", "teacher")
    rollouts = env.sampler.sample(None, [[prompt]], count, [[seed]], config.teacher.sampling)
    texts = rollouts.texts(env.backbone)
    outcomes = read_pairs(env, config, texts, rollouts.ended_B.tolist())
    pairs = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    reasons = Counter(outcome.reason.value for outcome in outcomes if isinstance(outcome, Rejection))
    answers = [answer_of(pair.question, config.problems.format == "totals") for pair in pairs]
    good = [(pair, answer) for pair, answer in zip(pairs, answers, strict=True) if answer is not None]
    right = {pair.question for pair, answer in good if pair.answer == answer}
    return {
        "accepted": len(pairs) / count,
        "rejected": dict(reasons.most_common()),
        "distinct": len({fingerprint(pair.question) for pair in pairs}) / max(1, len(pairs)),
        "sums": len(good) / max(1, len(pairs)),
        "right": sum(pair.answer == answer for pair, answer in good) / max(1, len(good)),
        "terms": dict(sorted(Counter(terms_of(pair.question) for pair, _ in good).items())),
        "right terms": dict(sorted(Counter(terms_of(question) for question in right).items())),
        "texts": texts[:12],
    }


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipe", nargs="?", default="smollm2-sums")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), metavar="DxT")
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--attempts", type=int, default=32)
    parser.add_argument("--teacher-texts", type=int, default=512)
    parser.add_argument("--signs", default="+")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    config = load(arguments.recipe, arguments.overrides)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"levels": {}}
    totals = config.problems.format == "totals"
    began = time.monotonic()
    with open_env(config) as env:
        print("level    pass@1   greedy  never solved  truncated", flush=True)
        for level in arguments.levels:
            rows = level_problems(level, arguments.candidates, arguments.candidates, arguments.signs, totals)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (arguments.folder / f"level-{level}.jsonl").write_text(lines, encoding="utf-8")
            row = measure(env, as_problems(rows[: arguments.count]), config, arguments.attempts)
            found["levels"][level] = row
            print(
                f"{level:6s} {row['pass@1']:8.5f} {row['greedy']:8.3f} {row['never solved']:13.3f}"
                f" {row['truncated']:10.3f}",
                flush=True,
            )
        found["teacher"] = teacher_report(env, config, arguments.teacher_texts)
    found["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(found["teacher"], indent=1, ensure_ascii=False))
    (arguments.folder / "ladder.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
