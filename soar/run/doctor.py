"""hashes.json of a finished run, and `soar doctor`: is a folder still what its run left behind? Needs no torch.

Three checks a run: every file can be read, the files are those of hashes.json, and summary.json follows from
metrics.jsonl. Left out: a second computation of what the events themselves say; tests hold the functions that made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from soar.config import ConfigError, build
from soar.files import read_jsonl, read_object, sha256_of, write_json
from soar.report.runs import HASHES, ReportError, summary_of
from soar.run.folder import files_of


class Check(NamedTuple):
    """What was looked at, and everything that is wrong with it."""

    what: str
    complaints: list[str]


def write_hashes(folder: Path) -> None:
    """hashes.json: sha256 of every file of a finished run that is its own."""
    write_json(folder / HASHES, {name: sha256_of(folder / name) for name in files_of(folder)})


def examine(folder: Path) -> list[Check]:
    """The checks of a run folder, or of every run in a study folder. Raises ReportError when there is none."""
    runs = sorted(path.parent for path in folder.rglob("manifest.json"))
    if not runs:
        raise ReportError(
            f"{folder}: no run folder: it has no manifest.json; give the folder that a `soar` command wrote"
        )
    checks = []
    for run in runs:
        name = "" if run == folder else f"{run.relative_to(folder)}: "
        checks += [
            Check(f"{name}{what}", complaints) for what, complaints in (_readable(run), _hashes(run), _summary(run))
        ]
    return checks


def _readable(run: Path) -> Check:
    """Every file that a reader needs."""
    manifest, complaints = read_object(run / "manifest.json")
    try:
        build(manifest.get("config", {}), f"{run}/manifest.json")
    except ConfigError as error:
        complaints.append(str(error))
    lines = sorted([*run.glob("*.jsonl"), *run.glob("hard/*.jsonl")])
    for path in lines:
        complaints += read_jsonl(path, str(path.relative_to(run)))[1]
    return Check(f"{len(lines) + 1} files can be read, every line is whole", complaints)


def _hashes(run: Path) -> Check:
    """The files of a finished run: none changed, removed or added."""
    if not (run / HASHES).is_file():
        finished = (run / "summary.json").is_file()
        return Check(f"no {HASHES}: the end of a run writes it", [f"{HASHES} is missing"] if finished else [])
    hashes, complaints = read_object(run / HASHES)
    present = files_of(run)
    complaints += [f"{name} is missing" for name in sorted(set(hashes) - set(present))]
    complaints += [f"{name} was added after the run" for name in sorted(set(present) - set(hashes))]
    for name in sorted(set(hashes) & set(present)):
        if sha256_of(run / name) != hashes[name]:
            complaints.append(f"{name} was changed after the run: its sha256 is not that in {HASHES}")
    return Check(f"hashes of {len(hashes)} files", complaints)


def _summary(run: Path) -> Check:
    """summary.json recomputed, the times excepted."""
    if not (run / "summary.json").is_file():
        return Check("no summary.json: the run is not finished", [])
    summary, complaints = read_object(run / "summary.json")
    try:
        config = build(read_object(run / "manifest.json")[0].get("config", {}))
        wanted = summary_of(read_jsonl(run / "metrics.jsonl")[0], config, {})
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        complaints.append(f"the events of metrics.jsonl give no summary: {error!r}")
        return Check("summary.json from metrics.jsonl", complaints)
    for name in sorted((set(summary) | set(wanted)) - {"wall_seconds"}):
        if summary.get(name) != wanted.get(name):
            complaints.append(
                f"summary.json: {name} is {summary.get(name)!r:.200}, recomputed {wanted.get(name)!r:.200}"
            )
    return Check("summary.json from metrics.jsonl", complaints)
