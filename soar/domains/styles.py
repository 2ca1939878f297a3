"""The words of the built-in domains: prompts and examples of `soar/assets/domains.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from soar.problems.domain import Domain
from soar.problems.prompts import tagged
from soar.types import Problem

WORDS = tomllib.loads((Path(__file__).parent.parent / "assets" / "domains.toml").read_text("utf-8"))


def styled(name: str, make: Any = tagged, **fields: Any) -> Domain:
    """A built-in domain. make: of its words a `PromptFormat`. fields: of `Domain`, its functions above all."""
    words = {key: tuple(value) if isinstance(value, list) else value for key, value in WORDS[name]["prompts"].items()}
    examples = tuple(Problem(*row) for row in WORDS[name]["examples"])
    return Domain(name=name, prompts=make(**words), examples=examples, **fields)
