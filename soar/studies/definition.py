"""A study: variants of one recipe x seeds, as one TOML file. Each pair is a cell, an ordinary run folder.

    name = "finding2"
    question = "..."                      what the study answers, shown on its page
    recipe = "tiny"                       a built-in recipe, or a file beside the study
    seeds = [0, 1, 2]
    set = ["teacher.steps=20"]            overrides of every cell; {seed} in one stands for the cell's seed
    compare = [["grounded:ps", "learnability:ps"]]
    [variants.grounded]
    set = []
    [variants.learnability]
    set = ["teacher.reward=learnability"]

A result is named `variant:arm`. Without `compare`, every arm is compared with Hard-Only of its variant, or of the first one.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from soar.config import RECIPES, Config, ConfigError, Section, find_recipe, load

STUDIES = RECIPES / "studies"
# What decides whether two cells of one seed have the same hard problems with the same evidence.
SCREENED_WITH = ("model", "problems", "screen", "seed")
SAMPLED_WITH = ("top_p", "max_tokens", "stop")


class Variant(Section):
    """One way to set the recipe."""

    set: tuple[str, ...] = ()


class Study(Section):
    """The file of the module text, validated."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    question: str = ""
    recipe: str = "tiny"
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    set: tuple[str, ...] = ()
    ks: tuple[int, ...] = (1, 32)
    compare: tuple[tuple[str, str], ...] = ()
    embedder: str = "hashed-ngrams"
    bootstrap: int = Field(4000, ge=100)
    variants: dict[str, Variant] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _names(cls, value: dict[str, Variant]) -> dict[str, Variant]:
        for name in value:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"variant {name!r}: letters, digits and _ only, it names folders")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {list(self.seeds)}: expected different numbers from 0")
        for name in (name for pair in self.compare for name in pair):
            variant, _, arm = name.partition(":")
            if variant not in self.variants or not arm:
                raise ValueError(f"compare: {name!r} is no VARIANT:ARM; variants: {', '.join(self.variants)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study. overrides: as for `--set`, in order; shares: the cell whose screening it uses, or None."""

    variant: str
    seed: int
    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    config: Config
    shares: Path | None

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


def find_study(name: str) -> Path:
    """Path of a study given as a file or a built-in name. Raises ConfigError with the built-in names."""
    for path in (Path(name), STUDIES / f"{name.removeprefix('studies/')}.toml"):
        if path.is_file():
            return path
    known = sorted(p.stem for p in STUDIES.glob("*.toml"))
    raise ConfigError(f"no study {name!r}: expected a TOML file or one of: {', '.join(known)}")


def read_study(path: Path) -> Study:
    """The study in a TOML file. Raises ConfigError naming file, key, what was found and what is expected."""
    try:
        study = Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole study)"
            known = f"; known keys: {', '.join(Study.model_fields)}" if item["type"] == "extra_forbidden" else ""
            lines.append(f"{path}: {key}: {item['msg'].removeprefix('Value error, ')}{known}")
        raise ConfigError("\n".join(lines)) from error
    beside = path.parent / study.recipe
    return study.model_copy(update={"recipe": str(beside)}) if beside.is_file() else study


def cells(study: Study, out: Path, extra: list[str]) -> list[Cell]:
    """Every cell with its config; the first variant's cells come first. Raises ConfigError for any that is not valid.

    A cell uses the screening of the first variant's cell of its seed where both screen the same problems in the same way,
    unless its config names a run whose screening it uses.
    """
    recipe = str(find_recipe(study.recipe))
    found: list[Cell] = []
    leaders: dict[int, Cell] = {}
    for variant, own in study.variants.items():
        for seed in study.seeds:
            folder = out / "cells" / f"{variant}-seed{seed}"
            given = (line.replace("{seed}", str(seed)) for line in (*study.set, *own.set, *extra))
            overrides = (*given, f"seed={seed}", f'name="{study.name}-{variant}"')
            config = load(recipe, list(overrides))
            leader = leaders.setdefault(seed, Cell(variant, seed, folder, recipe, overrides, config, None))
            shares = None
            screens = config.screen.attempts and not config.screen.from_run
            if leader.folder != folder and screens and screened_alike(leader.config, config):
                shares = leader.folder
                overrides = (*overrides, f"screen.from_run={json.dumps(str(shares))}")
                config = load(recipe, list(overrides))
            found.append(Cell(variant, seed, folder, recipe, overrides, config, shares))
    return found


def screened_alike(one: Config, other: Config) -> bool:
    """Whether two configs lead to the same screening."""
    a, b = one.resolved(), other.resolved()
    return all(a[key] == b[key] for key in SCREENED_WITH) and all(
        a["student"]["sampling"][key] == b["student"]["sampling"][key] for key in SAMPLED_WITH
    )


def definition(study: Study, extra: list[str]) -> dict[str, Any]:
    """What a study folder records of its study, JSON-ready."""
    return {**study.model_dump(mode="json"), "extra": list(extra)}


def comparisons(study: Study, results: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of (variant, arm) to compare, among those that have results."""
    if study.compare:
        pairs = [(_split(a), _split(b)) for a, b in study.compare]
    else:
        first = next(iter(study.variants))
        pairs = []
        for variant, arm in results:
            reference = (variant if (variant, "hard_only") in results else first, "hard_only")
            if arm not in ("base", "hard_only"):
                pairs.append(((variant, arm), reference))
    return [pair for pair in pairs if pair[0] in results and pair[1] in results]


def _split(name: str) -> tuple[str, str]:
    variant, _, arm = name.partition(":")
    return variant, arm
