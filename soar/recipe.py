"""A commented recipe for the user's own model and problems (`soar init`). Needs no torch.

The problem file is read, so that the recipe names the right columns and a verifier that fits the answers; a model folder
is looked at for its context and chat template. A hub id is taken as it is: nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar.config import Config, load
from soar.problems.answers import read_choice, read_number
from soar.problems.load import load_problems
from soar.reference import meaning, toml
from soar.types import Problem

SHARE = 0.95  # of the answers that have to be numbers, or letters, for the simpler verifier

KEYS = (
    "name",
    "seed",
    "model.path",
    "model.adapter",
    "model.lora_rank",
    "problems.source",
    "problems.question_column",
    "problems.answer_column",
    "problems.domain",
    "problems.format",
    "problems.verifier",
    "screen.attempts",
    "screen.max_successes",
    "teacher.steps",
    "teacher.datasets",
    "teacher.questions",
    "teacher.subject",
    "teacher.sampling.max_tokens",
    "teacher.optimizer.lr",
    "teacher.optimizer.warmup_steps",
    "student.repeats",
    "student.steps",
    "student.prompts_per_step",
    "student.attempts",
    "student.sampling.max_tokens",
    "student.optimizer.lr",
    "reward.questions",
    "promotion.tau",
    "promotion.window",
    "evaluate.attempts",
)

WORDS = {
    "name": "names the run folder, runs/NAME",
    "problems.format": "how problems are put: tags (boxed answer, instruct models) or question_answer (small base models)",
    "problems.question_column": "column of the question",
    "problems.answer_column": "column of the gold answer",
    "screen.max_successes": "a problem is hard when at most so many attempts are correct",
    "teacher.steps": "outer steps: the first number to raise when there is time left",
    "teacher.datasets": "question sets in an outer step; a set is what earns a reward",
    "teacher.questions": "questions in a set",
    "student.repeats": "students trained on each set: more make its reward less noisy",
    "student.attempts": "attempts at each question in a training step: the group of RLOO",
    "student.sampling.max_tokens": "room for the reasoning; too little shows as completions/clipped_ratio",
    "reward.questions": "hard problems on which improvement is measured",
    "promotion.tau": "mean improvement above which a student becomes the new baseline",
    "promotion.window": "outer steps in that mean",
    "evaluate.attempts": "attempts at each held-out problem; the largest k of pass@k",
}
"""Meanings for a reader who sees the key for the first time, where config.py has none or a shorter one."""


@dataclass
class Draft:
    """What was found out. keys: dotted key -> value for the recipe; notes: sentences on how it was chosen."""

    keys: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_verifier(problems: Sequence[Problem]) -> tuple[str, str]:
    """The simplest verifier that can read nearly all gold answers, and why."""
    answers = [problem.answer for problem in problems]
    letters = sum(read_choice(answer, bare=True) is not None for answer in answers) / len(answers)
    numbers = sum(read_number(answer) is not None for answer in answers) / len(answers)
    if letters >= SHARE:
        return "choice", f"{letters:.0%} of the gold answers are choice letters"
    if numbers == 1.0:
        return "number", "all gold answers are numbers"
    return "math", f"{numbers:.0%} of the gold answers are plain numbers, the rest needs a symbolic comparison"


def look_at_problems(source: str, question: str | None, answer: str | None, domain: str = "") -> Draft:
    """Columns, verifier and counts of a problem file or dataset. Raises DataError as a run would.

    domain: the domain of the problems; it has a verifier of its own, so none is chosen.
    """
    draft = Draft({"problems.source": source})
    if source.startswith("world:"):
        return draft
    problems, report = load_problems(source, question_column=question, answer_column=answer)
    draft.notes += report.lines(most=3)
    for key, given in (("question", question), ("answer", answer)):
        column = given or report.columns.get(key)
        if column:
            draft.keys[f"problems.{key}_column"] = column
    if domain:
        draft.keys["problems.domain"] = domain
        return draft
    verifier, why = choose_verifier(problems)
    draft.keys["problems.verifier"] = verifier
    draft.notes.append(f"verifier {verifier}: {why}")
    return draft


def look_at_model(model: str) -> Draft:
    """Format and token budgets that fit a model folder; nothing for a hub id."""
    draft = Draft({"model.path": model})
    settings = Path(model) / "config.json"
    if not settings.is_file():
        draft.notes.append(f"{model} is no folder with a config.json, so it is taken as a hub id")
        return draft
    tokenizer = Path(model) / "tokenizer_config.json"
    about = json.loads(settings.read_text(encoding="utf-8"))
    told = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    if not told.get("chat_template") and not (Path(model) / "chat_template.jinja").is_file():
        draft.keys["problems.format"] = "question_answer"
        draft.notes.append("the tokenizer has no chat template: problems are put in the plain form question_answer")
    context = about.get("max_position_embeddings")
    if isinstance(context, int) and context < 2048:
        draft.keys["student.sampling.max_tokens"] = max(16, context // 2)
        draft.keys["teacher.sampling.max_tokens"] = max(16, context // 2)
        draft.notes.append(f"the model has a context of {context} tokens: completions get half of it")
    return draft


def recipe_text(draft: Draft, base: str = "small-1gpu") -> str:
    """The recipe as TOML, one commented line a key. It loads to the recipe `base` with the keys of the draft."""
    sets = [f"{key}={toml(value)}" for key, value in draft.keys.items()]
    config = load(base, sets)
    lines = [
        f"# A starting point for one GPU, made from the built-in recipe {base}. Every other key has its default:",
        "# soar config-reference lists them. What it would cost, before anything is loaded:",
        "#   soar run THIS_FILE --dry-run",
    ]
    sections: dict[str, list[str]] = {}
    for key in (*KEYS, *sorted(set(_different(config)) - set(KEYS))):
        value = _value(config, key)
        if value is not None and (key != "problems.domain" or value):
            sections.setdefault(key.rpartition(".")[0], []).append(_line(key, value))
    for place, keys in sections.items():
        lines += (["", f"[{place}]"] if place else []) + keys
    return "\n".join([*lines, ""])


def _line(key: str, value: Any) -> str:
    words = WORDS.get(key) or meaning(key)
    return f"{key.rpartition('.')[2]} = {toml(value)}" + (f"  # {words}" if words else "")


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _different(config: Config) -> list[str]:
    """Dotted keys whose value is not the default's."""
    default = Config()
    found = []

    def walk(section: Any, plain: Any, prefix: str) -> None:
        for name in type(section).model_fields:
            ours, theirs = getattr(section, name), getattr(plain, name)
            if hasattr(type(ours), "model_fields"):
                walk(ours, theirs, f"{prefix}{name}.")
            elif ours != theirs:
                found.append(f"{prefix}{name}")

    walk(config, default, "")
    return found
