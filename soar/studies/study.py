"""A study: variants of one recipe x seeds, as one TOML file. Each pair is a cell, an ordinary run folder.

    name = "finding2"
    question = "..."                      what the study answers, shown on its page
    recipe = "tiny"                       a built-in recipe, or a file beside the study
    seeds = [0, 1, 2]
    set = ["teacher.steps=20"]            overrides of every cell; {seed} in one stands for the cell's seed
    compare = [["grounded:ps", "learnability:ps"]]
    primary = ["grounded:ps", "learnability:ps", 1]
    [variants.grounded]
    set = []
    [variants.learnability]
    set = ["teacher.reward=learnability"]

A result is named `variant:arm`. Without `compare`, every arm is compared with Hard-Only of its variant, or of the first one.
`primary` is the one comparison (and its k) whose p-value stands unadjusted; it cannot change once the study has begun.
A cell that fails is recorded and the others go on; a finished one is never run again. The first variant's cells run before
the others, which use their screening.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from soar.config import RECIPES, Config, ConfigError, Section, difference, find_recipe, load
from soar.files import read_object, sha256_of, write_atomic, write_json
from soar.types import UserError

STUDIES = RECIPES / "studies"
DEFINITION = "definition.json"
# What decides whether two cells of one seed have the same hard problems with the same evidence.
SCREENED_WITH = ("model", "problems", "screen", "seed")
SAMPLED_WITH = ("top_p", "max_tokens", "stop")
MAY_CHANGE = ("seeds", "ks", "compare", "question", "bootstrap")  # of a study that is continued


class StudyError(UserError):
    """A study folder that cannot be used as asked."""


class Study(Section):
    """The file of the module text, validated."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    question: str = ""
    recipe: str = "tiny"
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    set: tuple[str, ...] = ()
    ks: tuple[int, ...] = (1, 32)
    compare: tuple[tuple[str, str], ...] = ()
    primary: tuple[str, str, int] | None = None
    bootstrap: int = Field(4000, ge=100)
    variants: dict[str, dict[Literal["set"], tuple[str, ...]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.variants:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"variant {name!r}: letters, digits and _ only, it names folders")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {list(self.seeds)}: expected different numbers from 0")
        for name in (name for pair in (*self.compare, *([self.primary[:2]] if self.primary else [])) for name in pair):
            variant, _, arm = name.partition(":")
            if variant not in self.variants or not arm:
                raise ValueError(f"compare: {name!r} is no VARIANT:ARM; variants: {', '.join(self.variants)}")
        if self.primary and self.primary[2] not in self.ks:
            raise ValueError(f"primary: k = {self.primary[2]}, expected one of ks = {list(self.ks)}")
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


RunCell = Callable[[Cell, int], str | None]
"""(cell, threads; 0: its own choice) -> None when it finished, else why not."""


def find_study(name: str) -> Path:
    """Path of a study given as a file or a built-in name. Raises ConfigError with the built-in names."""
    for path in (Path(name), STUDIES / f"{name.removeprefix('studies/')}.toml"):
        if path.is_file():
            return path
    built_in = ", ".join(sorted(p.stem for p in STUDIES.glob("*.toml")))
    raise ConfigError(f"no study {name!r}: expected a TOML file or one of: {built_in}")


def read_study(path: Path, seeds: Sequence[int] | None = None) -> Study:
    """The study in a TOML file, with other seeds where some are given. Raises ConfigError naming file, key, what was found
    and what is expected."""
    try:
        given = {"seeds": seeds} if seeds else {}
        study = Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")) | given)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        hints = {"extra_forbidden": f"; known keys: {', '.join(Study.model_fields)}"}
        lines = [
            f"{path}: {'.'.join(map(str, item['loc'])) or '(whole study)'}: "
            f"{item['msg'].removeprefix('Value error, ')}{hints.get(item['type'], '')}"
            for item in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from error
    beside = path.parent / study.recipe
    return study.model_copy(update={"recipe": str(beside)}) if beside.is_file() else study


def cells(study: Study, out: Path, extra: list[str]) -> list[Cell]:
    """Every cell with its config; those of the first variant come first, and a later one uses the screening of theirs
    of its seed where both screen the same problems in the same way. Raises ConfigError for any that is not valid."""
    recipe = str(find_recipe(study.recipe))
    every: list[Cell] = []
    leaders: dict[int, Cell] = {}
    for name, variant in study.variants.items():
        for seed in study.seeds:
            given = [line.replace("{seed}", str(seed)) for line in (*study.set, *variant.get("set", ()), *extra)]
            folder = out / "cells" / f"{name}-seed{seed}"
            overrides = [*given, f"seed={seed}", f'name="{study.name}-{name}"']
            config, shares = load(recipe, overrides), None
            if seed in leaders and _screened_alike(leaders[seed].config, config):
                shares = leaders[seed].folder
                overrides.append(f"screen.from_run={json.dumps(str(shares), ensure_ascii=False)}")
                config = load(recipe, overrides)
            every.append(Cell(name, seed, folder, recipe, tuple(overrides), config, shares))
            leaders.setdefault(seed, every[-1])
    return every


def _screened_alike(leader: Config, config: Config) -> bool:
    """Whether `config` would screen, and as the leader does."""
    a, b = leader.resolved(), config.resolved()
    sampled = all(a["student"]["sampling"][key] == b["student"]["sampling"][key] for key in SAMPLED_WITH)
    screens = bool(config.screen.attempts and not config.screen.from_run)
    return screens and sampled and all(a[key] == b[key] for key in SCREENED_WITH)


def comparisons(study: Study, results: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of (variant, arm) to compare, the primary one first, among those that have results."""
    named = [*([study.primary[:2]] if study.primary else []), *study.compare]
    pairs = [tuple(tuple(result.split(":", 1)) for result in pair) for pair in named]
    for variant, arm in results if not study.compare else ():
        if arm not in ("base", "hard_only"):
            reference = variant if (variant, "hard_only") in results else next(iter(study.variants))
            pairs.append(((variant, arm), (reference, "hard_only")))
    return [(a, b) for a, b in dict.fromkeys(pairs) if a in results and b in results]


def run_in_process(cell: Cell, threads: int) -> str | None:
    """`soar run` of one cell in its own process; its output goes to `<cell>.log` beside its folder."""
    command = [sys.executable, "-m", "soar.cli", "run", cell.recipe, "--out", str(cell.folder), "--quiet"]
    for override in [*cell.overrides, *([f"threads={threads}"] if threads else [])]:
        command += ["--set", override]
    if (cell.folder / "manifest.json").is_file():
        command.append("--resume")
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    log = cell.folder.with_name(f"{cell.name}.log")
    with open(log, "ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if code == 0:
        return None
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return f"exit code {code}: {last[:500] or 'no output'} (see {log})"


def run_study(
    study: Study,
    out: Path,
    extra: list[str],
    resume: bool = False,
    jobs: int = 1,
    run: bool = True,
    say: Callable[[str], None] = print,
    run_cell: RunCell = run_in_process,
) -> dict[str, Any]:
    """Run what is left of a study in the folder `out`, `jobs` cells at a time; returns the content of study.json.

    extra: `--set` overrides of every cell. run: False only collects what the cells hold now. Raises StudyError for a folder
    that holds another study or, without `resume`, any; ConfigError for a cell that is not valid, before anything runs.
    """
    every = cells(study, out, extra)
    if out.exists() and not out.is_dir():
        raise StudyError(f"{out} is a file, expected a folder; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    recipe = {"extra": list(extra), "recipe_sha256": sha256_of(find_recipe(study.recipe))}
    _claim(study.model_dump(mode="json") | recipe, out, resume)
    failures: dict[str, str] = {}
    for follows in (False, True) if run else ():
        left = [cell for cell in every if not (cell.folder / "summary.json").is_file()]
        failures |= _run_group([cell for cell in left if (cell.shares is not None) == follows], jobs, say, run_cell)
    from soar.studies.results import collect, markdown, page

    results = collect(study, every, failures, json.loads((out / DEFINITION).read_text(encoding="utf-8")))
    write_json(out / "study.json", results)
    write_atomic(out / "study.md", markdown(results).encode("utf-8", "replace"))
    write_atomic(out / "study.html", page(results).encode("utf-8", "replace"))
    return results


def _claim(wanted: dict[str, Any], out: Path, resume: bool) -> None:
    """Record the study in its folder, or check that the recorded one is the same (more seeds may be added)."""
    path = out / DEFINITION
    if path.is_file():
        if not resume:
            raise StudyError(f"{out} holds a study; give --resume to continue it, or another --out")
        recorded, notes = read_object(path)
        if notes:
            raise StudyError(f"{'; '.join(notes)}; give another --out")
        lines = [line for line in difference(recorded, wanted) if line.split(":", 1)[0] not in MAY_CHANGE]
        gone = sorted(set(recorded.get("seeds", [])) - set(wanted["seeds"]))
        lines += [f"seeds: {gone} left out"] if gone else []
        if lines:
            shown = "\n  ".join(lines)
            raise StudyError(f"{out} was begun as another study:\n  {shown}\nGive the same one, or another --out")
    elif any(out.iterdir()):
        raise StudyError(f"{out} is not empty and holds no study; give another --out")
    write_json(path, wanted)


def _run_group(group: Sequence[Cell], jobs: int, say: Callable[[str], None], run_cell: RunCell) -> dict[str, str]:
    """Run the cells, `jobs` at a time; returns why cells failed."""
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0

    def job(cell: Cell) -> str | None:
        say(f"{cell.name}: begins")
        why = run_cell(cell, 0 if cell.config.threads else threads)
        say(f"{cell.name}: {why or 'finished'}")
        return why

    pool = ThreadPoolExecutor(jobs)
    try:
        reasons = zip(group, pool.map(job, group), strict=True)
        return {cell.name: why for cell, why in reasons if why is not None}
    finally:
        pool.shutdown(cancel_futures=True)
