"""The doctor for what is no run folder: a screening, a study, a measurement. Needs no torch.

As in `doctor`, numbers are recomputed by the functions that made them. Left out, because nothing raw is kept of it: which
single attempts were correct, and the trained students behind a measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from soar.config import ConfigError, EvaluateConfig, build
from soar.loop.evaluate import results_of
from soar.problems.load import evidence_path
from soar.report.runs import ReportError, Row, read_jsonl, read_object
from soar.run.checks import Check, guarded, unequal
from soar.run.doctor import examine
from soar.run.screen import screen_event, table_lines
from soar.studies.page import markdown, page
from soar.studies.results import collect
from soar.studies.study import DEFINITION, Cell, Study, cells
from soar.types import Screening, UserError

MEASURED = {"problems", "attempts", "policies", "paired"}


def audit(path: Path) -> list[Check]:
    """Every check of a run, screening or study folder, or of the file that `soar eval` wrote. Raises ReportError."""
    if path.is_file():
        return _measurement(path)
    if (path / DEFINITION).is_file():
        return _study(path)
    manifest, _ = read_object(path / "manifest.json") if (path / "manifest.json").is_file() else ({}, [])
    command = manifest.get("command")
    if (path / "screen.json").is_file() or (isinstance(command, list) and command[1:2] == ["screen"]):
        return _screening(path, manifest)
    return examine(path)


def _screening(path: Path, manifest: Row) -> list[Check]:
    rows, notes = read_jsonl(path / "hard" / "screen.jsonl", "hard/screen.jsonl")
    event, more = read_object(path / "screen.json") if (path / "screen.json").is_file() else ({}, [])
    hard, rest = read_jsonl(path / "hard.jsonl", "hard.jsonl") if (path / "hard.jsonl").is_file() else ([], [])
    evidence: list[Row] = [row["evidence"] for row in rows if isinstance(row.get("evidence"), dict)]
    checks = [Check("every file can be read, every line is whole", [*notes, *more, *rest])]
    try:
        config = build(manifest.get("config", {}), f"{path}/manifest.json")
    except ConfigError as error:
        return [*checks, Check("config of the screening", [str(error)])]

    def tallies() -> dict[str, Screening]:
        own = [row for row in rows if "id" in row]
        return {row["id"]: Screening(row["successes"], row["attempts"], row["truncated"]) for row in own}

    def counts() -> Iterable[str]:
        found = tallies()
        if len(found) != len(rows) - len(evidence):
            yield "hard/screen.jsonl holds a problem twice"
        for name, row in found.items():
            if not 0 <= row.successes <= row.attempts <= config.screen.attempts or not row.truncated >= 0:
                yield f"{name}: {row.successes} of {row.attempts} attempts cannot be"
        if len(evidence) != 1:
            yield f"hard/screen.jsonl says {len(evidence)} times how it was made, expected once"

    def table() -> Check:
        if not event:
            return Check("", [], "the screening is not finished")
        found = tallies()
        complaints = unequal("screen.json", event, screen_event(found, config))
        text = "\n".join(table_lines(list(found.values()), event, config)) + "\n"
        if (path / "table.txt").read_text(encoding="utf-8") != text:
            complaints.append("table.txt is not what the lines give")
        return Check("", complaints, f"{len(found)} problems")

    def hard_set() -> Check:
        if not event:
            return Check("", [], "the screening is not finished")
        wanted = [name for name, row in tallies().items() if row.successes <= config.screen.max_successes]
        wanted = wanted[: config.problems.max_hard] if config.problems.max_hard else wanted
        complaints = [] if [row["id"] for row in hard] == wanted else ["hard.jsonl does not hold the hard problems"]
        for row in hard:
            counted = tallies().get(row["id"], Screening(-1, -1))
            own = {"successes": counted.successes, "attempts": counted.attempts, "truncated": counted.truncated}
            complaints += unequal(f"hard problem {row['id']}", row, own)
        if hard and read_object(evidence_path(path / "hard.jsonl"))[0] != evidence[0]:
            complaints.append("the evidence beside hard.jsonl is not that of hard/screen.jsonl")
        return Check("", complaints, f"{len(hard)} problems")

    return [
        *checks,
        guarded("counts of attempts", counts),
        guarded("screen.json and table.txt from the counts", table),
        guarded("the hard set and its evidence", hard_set),
    ]


def _measurement(path: Path) -> list[Check]:
    found, notes = read_object(path)
    if not found.keys() >= MEASURED:
        raise ReportError(f"{path}: no result of `soar eval`, which holds {', '.join(sorted(MEASURED))}")

    def recomputed() -> Iterable[str]:
        every_k = EvaluateConfig(
            attempts=found["attempts"],
            temperature=found["temperature"],
            ks=tuple(range(1, found["attempts"] + 1)),
            bootstrap=found["bootstrap"],
        )
        counts = {name: row["correct"] for name, row in found["policies"].items()}
        problems = found["problems"]
        for name, correct_H in counts.items():
            if not len(correct_H) == problems["count"] == len(problems["ids"]):
                yield f"{name}: {len(correct_H)} counts for {problems['count']} problems"
        wanted = results_of(counts, every_k, found["seed"])
        for name, row in wanted["policies"].items():
            yield from unequal(f"policy {name}", found["policies"][name], row)
        yield from unequal(path.name, found, {"paired": wanted["paired"]})

    return [
        Check("the file can be read", notes),
        guarded("pass@k, intervals and differences from the counts", recomputed),
    ]


def _study(path: Path) -> list[Check]:
    recorded, notes = read_object(path / DEFINITION)
    results, more = read_object(path / "study.json") if (path / "study.json").is_file() else ({}, [])
    checks = [Check("every file can be read", [*notes, *more])]
    try:
        study = Study.model_validate({key: recorded[key] for key in Study.model_fields if key in recorded})
        every = cells(study, path, list(recorded.get("extra", [])))
    except (ValueError, UserError) as error:
        return [*checks, Check("definition of the study", [f"{path / DEFINITION}: {error}"])]
    for cell in every:
        if (cell.folder / "manifest.json").is_file():
            found = examine(cell.folder)
            complaints = [f"{check.what}: {line}" for check in found for line in check.complaints]
            checks.append(Check(f"cell {cell.name}", complaints, f"{len(found)} checks"))
    return [*checks, guarded("study.json and its pages from the cells", lambda: _pages(path, study, every, results))]


def _pages(path: Path, study: Study, every: list[Cell], results: Row) -> Check:
    if not results:
        return Check("", [], "none yet: they are written when the cells have been run")
    failures = {
        cell.name: row["reason"] for cell, row in zip(every, results["cells"], strict=True) if row.get("reason")
    }
    wanted = {**collect(study, every, failures), "definition": results.get("definition")}
    complaints = unequal("study.json", results, json.loads(json.dumps(wanted)))
    for name, made in (("study.md", markdown(results)), ("study.html", page(results))):
        if (path / name).read_bytes() != made.encode("utf-8", "replace"):
            complaints.append(f"{name} is not what study.json says")
    return Check("", complaints, f"{len(every)} cells")
