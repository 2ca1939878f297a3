"""A study: variants of one recipe x seeds, as one TOML file (`Study`). Each pair is a cell, an ordinary run folder.

A result is named `variant:arm`. Without `compare`, every arm is compared with Hard-Only of its variant, or of the first one.
`primary` is the one comparison (and its k) whose p-value stands unadjusted; it cannot change once the study has begun.
A cell that fails is recorded and the others go on; a finished one is never run again. The first variant's cells run before
the others, which use their screening. Results are read from the cells' run folders, so they can be made again at any time,
also of an unfinished study. Needs no torch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from soar import seeds
from soar.config import RECIPES, TRUSTED, Config, Section, find_recipe, load, read_toml
from soar.files import Row, asset, digest, read_object, sha256_of, visible, write_atomic, write_json
from soar.loop.evaluate import clopper_pearson, holm, over_seeds, paired_over_seeds, pass_at_k
from soar.report import text as wording
from soar.report.page import column, render, step_rows
from soar.report.runs import HASHES, Arm, ReportError, Run, count, numbers, read_run
from soar.run.folder import RunFolderError, difference, refuse_links
from soar.run.interrupts import StopRequest
from soar.types import mean

STUDIES = RECIPES / "studies"
DEFINITION = "definition.json"
# What decides whether two cells of one seed have the same hard problems with the same evidence.
SAMPLED_WITH = {"sampling": {"top_p", "max_tokens", "stop"}}
SCREENED_WITH: Any = {"model": True, "problems": True, "screen": True, "student": SAMPLED_WITH}
MAY_CHANGE = ("seeds", "ks", "compare", "question", "bootstrap")  # of a study that is continued
SCHEMA = 3
TABLES = asset("study")
CLIMB = 0.05  # mean pass@k from which a seed counts as off zero
TEACHER_STEPS = 3  # outer steps at the start, and at the end, that are compared
TEACHER_FIGURES = ("mean", "accepted_share", "distinct_share", "vendi", "well_posed", "correct", "teacher_kl")
CAN_COLLAPSE = ("distinct_share", "accepted_share", "vendi")
COLLAPSE = 0.5  # a teacher has collapsed when one of them falls below this part of its start


class Study(Section):
    """The file of a study; recipes/studies has some, docs/quickstart.md a short one."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    question: str = ""  # what the study answers, shown on its page
    recipe: str = "tiny"  # a built-in one, or a file beside the study
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    set: tuple[str, ...] = ()  # overrides of every cell; {seed} in one stands for the cell's seed
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 32), min_length=1)
    compare: tuple[tuple[str, str], ...] = ()  # ["grounded:ps", "learnability:ps"]
    primary: tuple[str, str, int] | None = None  # ["grounded:ps", "learnability:ps", 1]
    bootstrap: int = Field(4000, ge=100)
    variants: dict[str, dict[Literal["set"], tuple[str, ...]]] = Field(min_length=1)  # name -> overrides of its own

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


class Cell(NamedTuple):
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


def read_study(name: str, seeds: Sequence[int] | None = None) -> Study:
    """A built-in study or that of a TOML file, with other seeds where some are given. Raises ConfigError."""
    path = find_recipe(name if Path(name).is_file() else name.removeprefix("studies/"), STUDIES, "study")
    study = Study.read(read_toml(path) | ({"seeds": seeds} if seeds else {}), str(path))
    beside = path.parent / study.recipe
    if not beside.is_file() or (os.sep not in study.recipe and (RECIPES / f"{study.recipe}.toml").is_file()):
        return study
    return study.model_copy(update={"recipe": str(beside) if os.sep in str(beside) else study.recipe})


def cells(study: Study, out: Path, extra: list[str]) -> list[Cell]:
    """Every cell with its config, the first variant's first; others share its screening if they can. Raises ConfigError."""
    every, leaders = list[Cell](), dict[int, tuple[Path, Row]]()
    for name, variant in study.variants.items():
        for seed in study.seeds:
            given = [line.replace("{seed}", str(seed)) for line in (*study.set, *variant.get("set", ()), *extra)]
            folder = out / "cells" / f"{name}-seed{seed}"
            overrides = [*given, f"seed={seed}", f'name="{study.name}-{name}"']
            config, shares = load(study.recipe, overrides, model_named=True), None
            screened = config.model_dump(mode="json", include=SCREENED_WITH)
            leader, alike = leaders.setdefault(seed, (folder, screened))
            if leader != folder and alike == screened and config.screen.attempts and not config.screen.from_run:
                shares = leader
                overrides.append(f"screen.from_run={json.dumps(str(shares), ensure_ascii=False)}")
                config = load(study.recipe, overrides)
            every.append(Cell(name, seed, folder, study.recipe, tuple(overrides), config, shares))
    return every


def comparisons(study: Study, results: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of (variant, arm) to compare, the primary one first, among those that have results."""
    named = [*([study.primary[:2]] if study.primary else []), *study.compare]
    pairs = [tuple(tuple(result.split(":", 1)) for result in pair) for pair in named]
    for variant, arm in results if not study.compare else ():
        if arm not in ("base", "hard_only"):
            reference = variant if (variant, "hard_only") in results else next(iter(study.variants))
            pairs.append(((variant, arm), (reference, "hard_only")))
    return [(a, b) for a, b in dict.fromkeys(pairs) if a in results and b in results]


def run_in_process(stop: StopRequest, trusted: bool, cell: Cell, threads: int) -> str | None:
    """`soar run` of one cell in its own process (threads 0: its own choice), said in `<cell>.log`; None, or why it failed."""
    command = [sys.executable, "-P", "-m", "soar.cli", *(["--trust-run"] if trusted else []), "run", cell.recipe]
    command += ["--out", str(cell.folder), "--quiet", *(word for text in cell.overrides for word in ("--set", text))]
    command += ["--set", f"threads={threads}"] if threads else []
    command += ["--resume"] if (cell.folder / "manifest.json").is_file() else []
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    log = cell.folder.with_name(f"{cell.name}.log")
    with open(log, "ab") as file:
        begun = file.tell()  # behind what earlier attempts said
        code = stop.start(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).wait()
    if code == 0:
        return None
    lines = log.read_bytes()[begun:].decode("utf-8", "replace").strip().splitlines()
    first = max((i for i, line in enumerate(lines) if line.startswith("soar: ")), default=-1)  # -1: the last line alone
    return f"exit code {code}: {' '.join(lines[first:])[:500] or 'no output'} (see {log})"


def run_study(
    study: Study, out: Path, extra: list[str], resume: bool = False, jobs: int = 1, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Run what is left of a study in the folder `out`, `jobs` cells at a time; returns the content of study.json.

    extra: `--set` overrides of every cell. jobs: 0 only collects what the cells hold now. Raises RunFolderError for a folder
    that holds another study or, without `resume`, any; ConfigError for a cell that is not valid, before anything runs;
    Stopped when `stop` says so, once the cells at work have ended.
    """
    every = cells(study, out, extra)
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file, expected a folder; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    refuse_links(out)
    recipe = {"extra": list(extra), "recipe_sha256": sha256_of(find_recipe(study.recipe))}
    _claim(study.model_dump(mode="json") | recipe, out, resume)
    failures, stop = dict[str, str](), stop or StopRequest()
    run_cell = partial(run_in_process, stop, TRUSTED.get())
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0

    def job(cell: Cell) -> str | None:
        stop.check()
        print(f"{cell.name}: begins\n", end="")  # one write a line, which no other thread can split
        why = run_cell(cell, 0 if cell.config.threads else threads)
        print(visible(f"{cell.name}: {why or 'finished'}\n"), end="")
        return why

    for follows in (False, True) if jobs else ():
        left = [c for c in every if (c.shares is not None) == follows and not (c.folder / HASHES).is_file()]
        with ThreadPoolExecutor(jobs) as pool:  # a study that stops here does not begin what is left
            reasons = zip(left, pool.map(job, left), strict=True)
            failures |= {cell.name: why for cell, why in reasons if why is not None}
        stop.check()
    results = collect(study, every, failures, json.loads((out / DEFINITION).read_text(encoding="utf-8")))
    write_json(out / "study.json", results)
    shown = {"results": results, "tables": tables(results)}
    write_atomic(out / "study.md", wording.fill("study.md", **shown).encode("utf-8", "replace"))
    unfinished = sum(cell["state"] != "finished" for cell in results["cells"])
    page = render("study.html", {**shown, "unfinished": unfinished})  # which escapes every text in it
    write_atomic(out / "study.html", page.encode("utf-8", "replace"))
    return results


def _claim(wanted: dict[str, Any], out: Path, resume: bool) -> None:
    """Record the study in its folder, or check that the recorded one is the same (more seeds may be added)."""
    path = out / DEFINITION
    if path.is_file():
        if not resume:
            raise RunFolderError(f"{out} holds a study; give --resume to continue it, or another --out")
        recorded, notes = read_object(path)
        if notes:
            raise RunFolderError(f"{'; '.join(notes)}; give another --out")
        lines = [line for line in difference(recorded, wanted) if line.split(":", 1)[0] not in MAY_CHANGE]
        begun = recorded.get("seeds")
        gone = [seed for seed in begun if seed not in wanted["seeds"]] if isinstance(begun, list) else [begun]
        lines += [f"seeds: {gone} left out"] if gone else []
        if lines:
            shown = "\n  ".join(lines)
            raise RunFolderError(f"{out} was begun as another study:\n  {shown}\nGive the same one, or another --out")
    elif any(out.iterdir()):
        raise RunFolderError(f"{out} is not empty and holds no study; give another --out")
    write_json(path, wanted)


class Outcome(NamedTuple):
    """What one arm of one cell did on the held-out problems. correct: problem id -> correct attempts of `attempts`."""

    correct: dict[str, int]
    attempts: int
    arm: Arm


Outcomes = dict[tuple[str, str], dict[int, Outcome]]  # (variant, arm) -> seed -> outcome


def collect(study: Study, cells: Sequence[Cell], failures: dict[str, str], definition: Row) -> dict[str, Any]:
    """The content of study.json. failures: cell name -> why it has no result; definition: as it was recorded."""
    runs, outcomes = dict[str, Run](), Outcomes()
    for cell in cells:
        with suppress(ReportError):
            runs[cell.name] = read_run(cell.folder)
            for name, outcome in _outcomes(runs[cell.name]):
                outcomes.setdefault((cell.variant, name), {})[cell.seed] = outcome
    by_variant = {v: [(c, runs[c.name]) for c in cells if c.variant == v and c.name in runs] for v in study.variants}
    compared = [_compare(study, a, b, outcomes) for a, b in comparisons(study, list(outcomes))]
    every = [entry for row in compared for entry in row["pass_at"].values() if len(entry["per_seed"]) > 1]  # else no p
    others = [entry for entry in every if not entry["primary"]]
    for entry, p in zip(others, holm([entry["p_seeds"] for entry in others]), strict=True):
        entry["p_adjusted"] = p  # the primary comparison's stands as it is
    return {
        "schema": SCHEMA,
        **study.model_dump(mode="json", include={"name", "question", "recipe", "seeds", "primary"}),
        "definition": definition,
        "definition_sha256": digest({key: value for key, value in definition.items() if key not in MAY_CHANGE}),
        "cells": [_cell(cell, runs.get(cell.name), failures.get(cell.name)) for cell in cells],
        "arms": [_arm(study, *name, by_seed) for name, by_seed in outcomes.items()],
        "comparisons": compared,
        "loops": [_loop(variant, pairs) for variant, pairs in by_variant.items()],
    }


def _outcomes(run: Run) -> Iterator[tuple[str, Outcome]]:
    ids = [str(row.get("id")) for row in run.hard_test]
    for event in run.events.get("evaluation", []) if run.finished else []:
        name, given, attempts = str(event.get("arm")), event.get("correct"), count(event.get("attempts")) or 0
        correct = given if isinstance(given, list) and len(given) == len(ids) else []
        if name in run.arms and correct and all(type(n) is int and 0 <= n <= attempts for n in correct):
            yield name, Outcome(dict(zip(ids, correct, strict=True)), attempts, run.arms[name])


def _cell(cell: Cell, run: Run | None, failure: str | None) -> Row:
    state = "missing" if run is None else "finished" if run.finished else "unfinished"
    summary = run.summary if run is not None else {}
    wall = summary.get("wall_seconds")
    return {
        "variant": cell.variant,
        "seed": cell.seed,
        "folder": f"cells/{cell.name}",
        "state": "failed" if failure and state != "finished" else state,
        "reason": ("; ".join(run.left_out) or None) if run and state == "finished" else failure,
        **{key: count(summary.get(key)) for key in ("promotions", "outer_steps")},
        "wall_seconds": sum(numbers(list(wall.values()))) if isinstance(wall, dict) else None,
    }


def _pass_at(study: Study, outcomes: Sequence[Outcome]) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """(k, pass@k by problem of every outcome, from its own number of attempts) for each k that all of them allow."""
    for k in study.ks:
        if all(k <= outcome.attempts for outcome in outcomes):
            yield k, [{name: pass_at_k(o.attempts, n, k) for name, n in o.correct.items()} for o in outcomes]


def _arm(study: Study, variant: str, arm: str, by_seed: dict[int, Outcome]) -> Row:
    """An arm over its seeds, and how many of them climbed: means of arms that either climb or do not say little."""
    outcomes, place, pass_at = list(by_seed.values()), seeds.derive(study.name, "interval"), {}
    for k, values_S in _pass_at(study, outcomes):
        spread = over_seeds(values_S, place, study.bootstrap)
        climbed = sum(share >= CLIMB for share in spread["per_seed"])
        pass_at[str(k)] = {**spread, "climbed": climbed, "climbed_95": list(clopper_pearson(climbed, len(outcomes)))}
    costs = {"student_rollouts": "rollouts", "total_tokens": "total_tokens", "evaluation_tokens": "evaluation_tokens"}
    return {
        "variant": variant,
        "arm": arm,
        "seeds": list(by_seed),
        **{key: mean(numbers([getattr(o.arm, name) for o in outcomes])) for key, name in costs.items()},
        "pass_at": pass_at,
    }


def _compare(study: Study, a: tuple[str, str], b: tuple[str, str], outcomes: Outcomes) -> Row:
    """The paired comparison over the seeds in which both arms answered the same held-out problems."""
    both = [seed for seed in outcomes[a] if seed in outcomes[b]]
    shared = [seed for seed in both if list(outcomes[a][seed].correct) == list(outcomes[b][seed].correct)]
    rows, n = [outcomes[name][seed] for name in (a, b) for seed in shared], len(shared)
    names, place, pass_at = (":".join(a), ":".join(b)), seeds.derive(study.name, "paired"), {}
    for k, values in _pass_at(study, rows) if shared else ():
        entry = paired_over_seeds(values[:n], values[n:], place, study.bootstrap)
        pass_at[str(k)] = {**entry, "primary": study.primary == (*names, k), "p_adjusted": entry["p_seeds"]}
    left_out = len(both) - len(shared)
    return {"a": names[0], "b": names[1], "seeds": shared, "left_out": left_out, "pass_at": pass_at}


def _loop(variant: str, pairs: Sequence[tuple[Cell, Run]]) -> Row:
    """How a teacher changed: means of its first and last outer steps, and promotions among decisions with a full window."""
    cells, effective = [], 0.0
    for cell, rows in ((cell, step_rows(run)) for cell, run in pairs if run.steps):
        part = max(1, min(TEACHER_STEPS, len(rows) // 2))
        ends = (rows[:part], rows[-part:])
        first, last = ({key: mean(column(some, key)) for key in TEACHER_FIGURES} for some in ends)
        fell = [key for key in CAN_COLLAPSE if (last[key] or 0.0) < COLLAPSE * (first[key] or 0.0)]
        full = [row for row in rows if row["window_mean"] is not None]
        promoted = sum(row["promoted"] for row in full)
        # neighbouring windows of w steps share w - 1 of them, so each is 1 / w trials
        effective += max(promoted, len(full) / cell.config.promotion.window)
        entry = {"seed": cell.seed, "first": first, "last": last, "collapsed": fell}
        cells.append({**entry, "windows": len(full), "promotions": promoted})
    windows, promotions = (sum(row[key] for row in cells) for key in ("windows", "promotions"))
    share = promotions / windows if windows else None
    interval = list(clopper_pearson((share or 0.0) * effective, effective))
    sums = {"collapsed": sum(bool(row["collapsed"]) for row in cells), "windows": windows, "promotions": promotions}
    return {"variant": variant, **sums, "share": share, "interval_95": interval, "cells": cells}


def tables(results: Row) -> list[Row]:
    """Every table of the study, empty ones left out: title, note, header, rows of as many cells, all of it text."""
    ks = sorted({k for row in results["arms"] for k in row["pass_at"]}, key=int)
    rows = {
        "arms": results["arms"],
        "comparisons": [{**row, **at, "k": k} for row in results["comparisons"] for k, at in row["pass_at"].items()],
        "loops": [row for row in results["loops"] if row["cells"]],
        "cells": results["cells"],
    }
    environment, every = wording.templates(), []
    environment.globals |= {"wording": wording, "label": partial(label, results), "change": change}
    environment.globals |= {"largest": ks[-1:], "climb": CLIMB, "steps": TEACHER_STEPS}
    for key, words in TABLES.items():
        columns = [(name, k, text) for name, text in words["columns"] for k in (ks if name == "pass@k" else [""])]
        header = [f"pass@{k}" if k else name for name, k, _ in columns]
        texts = [environment.from_string(text, {"this": k}) for _, k, text in columns]
        shown = [[text.render(row) for text in texts] for row in rows[key]]
        note = environment.from_string(words["note"]).render(results)
        every.append({"title": words["title"], "note": note, "header": header, "rows": shown})
    return [table for table in every if table["rows"]]


def label(results: Row, result: str) -> str:
    """`grounded:ps` as `PS`, in a study of several variants as `grounded: PS`."""
    variant, _, arm = result.partition(":")
    name = wording.arm_name(arm)
    return name if len(results["definition"]["variants"]) == 1 else f"{variant}: {name}"


def change(cells: Sequence[Row], key: str) -> str:
    """A change such as `0.98 -> 0.41`: means over seeds of the first and the last outer steps."""
    means = [mean([cell[part][key] for cell in cells if cell[part][key] is not None]) for part in ("first", "last")]
    ends = [wording.DASH if value is None else f"{value:.3g}".replace("-", wording.MINUS) for value in means]
    return wording.DASH if means == [None, None] else " \u2192 ".join(ends)
