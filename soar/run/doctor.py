"""hashes.json of a finished run, and `soar doctor`: is a folder still what its run left behind? Needs no torch.

Four checks a run: every file can be read and no event stands twice; the files are those of hashes.json; config and
adapters are those that the run recorded; summary.json follows from metrics.jsonl.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from soar.config import ConfigError, build, difference
from soar.files import no_file, read_jsonl, read_object, sha256_of, write_json
from soar.report.runs import HASHES, ReportError, summary_of
from soar.run.folder import files_of

BLIND = (
    f"not found by this: changes of somebody who wrote {HASHES}, checkpoints and events again to fit; keep a copy of "
    f"{HASHES} elsewhere, and compare"
)
ALWAYS = ("manifest.json", "metrics.jsonl", "hard/train.jsonl", "hard/test.jsonl", "summary.json")  # of a finished run
EVALUATION = "state/evaluation.jsonl"  # begins with the digests of the arms
ONCE = {"screen": "event", "outer_step": "step", "promotion": "step", "evaluation": "arm"}  # what tells events apart


Check = tuple[str, list[str]]  # what was looked at, and everything that is wrong with it


def write_hashes(folder: Path) -> None:
    """hashes.json: sha256 of every file of a finished run that stays as it is."""
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
        events, config = read_jsonl(run / "metrics.jsonl")[0], read_object(run / "manifest.json")[0].get("config", {})
        parts = (_readable(run, events), _hashes(run), _recorded(run, events, config), _summary(run, events, config))
        checks += [(f"{name}{what}", complaints) for what, complaints in parts]
    return checks


def _readable(run: Path, events: list[dict[str, Any]]) -> Check:
    """Every file that a reader needs; no event twice."""
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
    """The files of a finished run: none changed, removed or added."""
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


def _recorded(run: Path, events: list[dict[str, Any]], config: Any) -> Check:
    """The config is that of the newest checkpoint, the adapters are those that were promoted and evaluated."""
    saved = sorted(path for path in run.glob("state/[0-9]*/state.json") if path.parent.name.isdecimal())
    beside = read_object(saved[-1])[0].get("beside") if saved else None
    begun = beside.get("config") if isinstance(beside, dict) else None
    complaints = []
    if isinstance(begun, dict) and isinstance(config, dict):
        complaints = [f"manifest.json: the config was changed: {line}" for line in difference(begun, config)]
    rows = [row for row in read_jsonl(run / EVALUATION)[0] if isinstance(row.get("arms"), dict)]
    wanted = {
        "student" if arm == "ps" else f"arms/{arm}": {sha256} for row in rows[:1] for arm, sha256 in row["arms"].items()
    }
    if promoted := {row.get("student") for row in events if row.get("event") == "promotion"}:
        wanted["student"] = promoted & wanted.get("student", promoted)  # the best of them, which need not be the last
    adapters = [name for name in wanted if name != "arms/base" and (run / "summary.json").is_file()]
    for name in adapters:
        path = run / name / "adapter_model.safetensors"
        try:
            if why := no_file(path):
                complaints.append(f"{name}: its adapter is {why}")
            elif adapter_digest(path, config["model"]["adapter"] == "full") not in wanted[name]:
                complaints.append(f"{name}: not the adapter that was promoted or evaluated")
        except Exception as error:  # whatever the library says of a file that is no adapter
            complaints.append(f"{name}: its adapter cannot be read: {error}")
    return (f"config of the newest checkpoint, {len(adapters)} adapters as they were evaluated", complaints)


def adapter_digest(path: Path, full: bool) -> str:
    """`AdapterStack.digest` of an adapter in PEFT's format. full: a weight change, one factor of which is the identity."""
    from safetensors.numpy import load_file

    weights, sha = load_file(path), hashlib.sha256()
    tensors: dict[str, Any] = {}
    for key in (key for key in weights if key.endswith(".lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a_r_I, b_O_r = weights[key], weights[f"base_model.model.{name}.lora_B.weight"]
        delta_O_I = b_O_r if a_r_I.shape[1] <= b_O_r.shape[0] else a_r_I
        tensors |= {f"{name}.delta": delta_O_I} if full else {f"{name}.A": a_r_I, f"{name}.B": b_O_r}
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(tensors[name].T).tobytes())
    return sha.hexdigest()


def _summary(run: Path, events: list[dict[str, Any]], config: Any) -> Check:
    """summary.json recomputed, the times excepted."""
    if not (run / "summary.json").is_file():
        return ("no summary.json: the run is not finished", [])
    summary, complaints = read_object(run / "summary.json")
    try:
        wanted = summary_of(events, build(config), {})
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        complaints.append(f"the events of metrics.jsonl give no summary: {error!r}")
        wanted = summary
    for name in sorted((set(summary) | set(wanted)) - {"wall_seconds"}):
        if summary.get(name) != wanted.get(name):
            complaints.append(
                f"summary.json: {name} is {summary.get(name)!r:.200}, recomputed {wanted.get(name)!r:.200}"
            )
    return ("summary.json from metrics.jsonl", complaints)
