"""hashes.json of a finished run, and `soar doctor`: is a folder still what its run left behind? Needs no torch.

Four checks a run: every file can be read and no event stands twice; the files are those of hashes.json; the config
is that of the last checkpoint; summary.json, the times excepted, follows from metrics.jsonl.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from soar.config import ConfigError, build, difference
from soar.files import read_jsonl, read_object, sha256_of, write_json
from soar.report.runs import HASHES, ReportError, summary_of
from soar.run.folder import files_of

_ADVICE = f"keep a copy of {HASHES} elsewhere, and compare"
BLIND = f"not found by this: changes of somebody who wrote {HASHES}, checkpoints and events again to fit; {_ADVICE}"
ALWAYS = ("manifest.json", "metrics.jsonl", "hard/train.jsonl", "hard/test.jsonl", "summary.json")  # of a finished run
ONCE = {"screen": "event", "outer_step": "step", "promotion": "step", "evaluation": "arm"}  # what tells events apart

Check = tuple[str, list[str]]  # what was looked at, and everything that is wrong with it


def write_hashes(folder: Path) -> None:
    """hashes.json: sha256 of every file of a finished run that stays as it is."""
    write_json(folder / HASHES, {name: sha256_of(folder / name) for name in files_of(folder)})


def examine(folder: Path) -> list[Check]:
    """The checks of a run folder, or of every run in a study folder. Raises ReportError when there is none."""
    runs = sorted(path.parent for path in folder.rglob("manifest.json"))
    if not runs:
        why = "no run folder: it has no manifest.json"
        raise ReportError(f"{folder}: {why}; give the folder that a `soar` command wrote")
    checks = []
    for run in runs:
        name = "" if run == folder else f"{run.relative_to(folder)}: "
        events, config = read_jsonl(run / "metrics.jsonl")[0], read_object(run / "manifest.json")[0].get("config", {})
        parts = (_readable(run, events), _hashes(run), _recorded(run, config), _summary(run, events, config))
        checks += [(f"{name}{what}", complaints) for what, complaints in parts]
    return checks


def _readable(run: Path, events: list[dict[str, Any]]) -> Check:
    manifest, complaints = read_object(run / "manifest.json")
    try:
        build(manifest.get("config", {}), f"{run}/manifest.json")
    except ConfigError as error:
        complaints.append(str(error))
    lines = sorted([*run.glob("*.jsonl"), *run.glob("hard/*.jsonl")])
    for path in lines:
        complaints += read_jsonl(path, str(path.relative_to(run)))[1]
    keys = [(kind, row.get(ONCE[kind])) for row in events for kind in ONCE if row.get("event") == kind]
    counts = Counter(f"{kind} {key!r:.40}" for kind, key in keys)
    complaints += [f"metrics.jsonl: {name} stands {n} times" for name, n in counts.items() if n > 1]
    return (f"{len(lines) + 1} files can be read, every line is whole, no event stands twice", complaints)


def _hashes(run: Path) -> Check:
    if not (run / HASHES).is_file():
        finished = (run / "summary.json").is_file()
        return (f"no {HASHES}: the end of a run writes it", [f"{HASHES} is missing"] if finished else [])
    hashes, complaints = read_object(run / HASHES)
    present = files_of(run)
    complaints += [f"{HASHES} lacks {name}, which every finished run has" for name in ALWAYS if name not in hashes]
    complaints += [f"{name} is missing" for name in sorted(set(hashes) - set(present))]
    complaints += [f"{name} was added after the run" for name in sorted(set(present) - set(hashes))]
    for name in sorted(set(hashes) & set(present)):
        if sha256_of(run / name) != hashes[name]:
            complaints.append(f"{name} was changed after the run: its sha256 is not that in {HASHES}")
    return (f"hashes of {len(hashes)} files", complaints)


def _recorded(run: Path, config: Any) -> Check:
    saved = sorted(path for path in run.glob("state/[0-9]*/state.json") if path.parent.name.isdecimal())
    beside = read_object(saved[-1])[0].get("beside") if saved else None
    begun = beside.get("config") if isinstance(beside, dict) else None
    changed = difference(begun, config) if isinstance(begun, dict) and isinstance(config, dict) else []
    return ("config of the newest checkpoint", [f"manifest.json: the config was changed: {line}" for line in changed])


def _summary(run: Path, events: list[dict[str, Any]], config: Any) -> Check:
    if not (run / "summary.json").is_file():
        return ("no summary.json: the run is not finished", [])
    summary, complaints = read_object(run / "summary.json")
    try:
        wanted = summary_of(events, build(config), {})
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        complaints.append(f"the events of metrics.jsonl give no summary: {error!r}")
        wanted = summary
    for name in sorted((set(summary) | set(wanted)) - {"wall_seconds"}):
        if (recorded := summary.get(name)) != (recomputed := wanted.get(name)):
            complaints.append(f"summary.json: {name} is {recorded!r:.200}, recomputed {recomputed!r:.200}")
    return ("summary.json from metrics.jsonl", complaints)
