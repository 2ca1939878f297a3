"""Running a study: every cell as a `soar run` in a process of its own, then the document, the table and the page.

A cell that fails is recorded and the others go on. The cells of the first variant run before the others, which use their
screening. A finished cell is never run again; an interrupted one continues from its checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from soar.config import difference
from soar.files import read_object, write_atomic, write_json
from soar.studies.definition import Cell, Study, cells, definition
from soar.studies.page import markdown, page
from soar.studies.results import collect
from soar.types import UserError

DEFINITION = "definition.json"

RunCell = Callable[[Cell, int, str | None], str | None]
"""(cell, threads; 0: its own choice, device or None) -> None when it finished, else why not."""


class StudyError(UserError):
    """A study folder that cannot be used as asked."""


def run_in_process(cell: Cell, threads: int, device: str | None) -> str | None:
    """`soar run` of one cell in its own process; its output goes to `<cell>.log` beside its folder.

    device: an entry of CUDA_VISIBLE_DEVICES, the one that the process sees; None: all that this one sees.
    """
    command = [sys.executable, "-m", "soar.cli", "run", cell.recipe]
    for override in [*cell.overrides, *([f"threads={threads}"] if threads else [])]:
        command += ["--set", override]
    command += ["--out", str(cell.folder), "--quiet"]
    if (cell.folder / "manifest.json").is_file():
        command.append("--resume")
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    log = cell.folder.with_name(f"{cell.name}.log")
    seen = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with open(log, "ab") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=seen)
    code = done.returncode
    if code == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:500] if lines else 'no output'} (see {log})"


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
    lock = FileLock(str(out / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(f"{out} is in use by another process; wait for it or choose another --out") from None
    with lock:
        _claim(study, out, extra, resume)
        leaders = [cell for cell in every if cell.shares is None]
        followers = [cell for cell in every if cell.shares is not None]
        failures: dict[str, str] = {}
        for group in (leaders, followers) if run else ():
            failures |= _run_group(group, jobs, say, run_cell, visible_gpus() if jobs > 1 else ())
        return write_results(study, out, every, failures)


def _claim(study: Study, out: Path, extra: list[str], resume: bool) -> None:
    """Record the study in its folder, or check that the recorded one is the same (more seeds may be added)."""
    wanted, path = definition(study, extra), out / DEFINITION
    if not path.is_file():
        if any(p.name != ".lock" for p in out.iterdir()):
            raise StudyError(f"{out} is not empty and holds no study; give another --out")
        write_json(path, wanted)
        return
    if not resume:
        raise StudyError(f"{out} holds a study; give --resume to continue it, or another --out")
    found, notes = read_object(path)
    if notes:
        raise StudyError(f"{'; '.join(notes)}; give another --out")
    gone = sorted(set(found.get("seeds", [])) - set(study.seeds))
    changed = [line for line in difference(found, wanted) if not line.startswith(("seeds:", "ks:", "embedder:"))]
    changed = [line for line in changed if not line.startswith(("compare:", "question:", "bootstrap:"))]
    if changed or gone:
        lines = "\n  ".join([*changed, *([f"seeds: {gone} left out"] if gone else [])])
        raise StudyError(f"{out} was begun as another study:\n  {lines}\nGive the same one, or another --out")
    write_json(path, wanted)


def visible_gpus() -> list[str]:
    """Entries of CUDA_VISIBLE_DEVICES for the GPUs that this process sees, [] without any; no CUDA context is made."""
    import torch

    count = torch.cuda.device_count()
    given = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return given[:count] if given else [str(i) for i in range(count)]


def _run_group(
    group: Sequence[Cell], jobs: int, say: Callable[[str], None], run_cell: RunCell, gpus: Sequence[str]
) -> dict[str, str]:
    """Run the cells that are not finished, `jobs` at a time; returns why cells failed.

    Each begins on the GPU with the fewest cells, unless it names a device or divides its work among workers itself.
    """
    left = [cell for cell in group if not _finished(cell)]
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    failures: dict[str, str] = {}
    busy = dict.fromkeys(gpus if len(gpus) > 1 and jobs > 1 else (), 0)

    lock = threading.Lock()

    def job(cell: Cell) -> str | None:
        model = cell.config.model
        alone = model.device == "auto" and model.vllm_devices == 1 and not cell.config.cluster.workers
        with lock:
            device = min(busy, key=busy.__getitem__) if busy and alone else None
            if device is not None:
                busy[device] += 1
            say(f"{cell.name}: begins" + (f" on GPU {device}" if device is not None else ""))
        why = run_cell(cell, 0 if cell.config.threads else threads, device)
        with lock:
            if device is not None:
                busy[device] -= 1
            say(f"{cell.name}: {why or 'finished'}")
        return why

    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        for cell, why in zip(left, pool.map(job, left), strict=True):
            if why is not None:
                failures[cell.name] = why
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def _finished(cell: Cell) -> bool:
    """Whether the cell's folder holds its finished run. Raises StudyError when it holds another one."""
    if not (cell.folder / "summary.json").is_file():
        return False
    manifest, notes = read_object(cell.folder / "manifest.json")
    recorded = manifest.get("config")
    changed = difference(recorded, cell.config.resolved()) if isinstance(recorded, dict) else notes
    refused = [line for line in changed if line.split(":", 1)[0] not in ("threads", "screen.from_run", "name")]
    if refused:
        lines = "\n  ".join(refused)
        raise StudyError(f"{cell.folder} holds a run with another config:\n  {lines}\nGive another --out")
    return True


def write_results(study: Study, out: Path, every: Sequence[Cell], failures: dict[str, str]) -> dict[str, Any]:
    """Write study.json, study.md and study.html of what the cells hold now; returns the content of study.json."""
    results = collect(study, every, failures)
    results["definition"] = json.loads((out / DEFINITION).read_text(encoding="utf-8"))
    write_json(out / "study.json", results)
    write_atomic(out / "study.md", markdown(results).encode("utf-8", "replace"))
    write_atomic(out / "study.html", page(results).encode("utf-8", "replace"))
    return results
