"""The words of the built-in domains, by prompt style: prompts and examples of `soar/assets/domains.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from soar.problems.domain import Domain
from soar.problems.prompts import PromptFormat, plain, tagged, worked_list
from soar.types import Problem

WORDS = tomllib.loads((Path(__file__).parent.parent / "assets" / "domains.toml").read_text("utf-8"))
MAKERS: dict[str, Any] = {"tags": tagged, "plain": plain, "list": worked_list, "code": PromptFormat}


def styled(name: str, **fields: Any) -> dict[str, Domain]:
    """A built-in domain by prompt style. fields: of `Domain`, its functions above all."""
    examples = tuple(Problem(*row) for row in WORDS[name]["examples"])
    made = {}
    for style, words in WORDS[name]["style"].items():
        words = {key: tuple(value) if isinstance(value, list) else value for key, value in words.items()}
        made[style] = Domain(name=name, prompts=MAKERS[style](**words), examples=examples, **fields)
    return made
