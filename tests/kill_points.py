"""Kills runs at chosen points and resumes them; run as a program by `test_kill.py`.

    python tests/kill_points.py FOLDER POINTS LANES SEED

One process imports torch and loads the model; every run happens in a fork of it. A first run, never killed, counts its
points: every change to a file of its folder (seen by an audit hook), every fsync, and every call of the sampler and the
update. Then POINTS of them, drawn by SEED and spread over the kinds of points, are run to and ended by SIGKILL there, in
the middle of the write where the point is one. Each is resumed, some are killed again on the way, and what they end with
is compared with the first run, byte by byte. Prints one JSON line per kill.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from loop_helpers import easy_problems, tiny_config, write_problems
from test_resume import CHANGES

from soar.config import Config
from soar.engine.load import load_backbone
from soar.engine.sampler import NativeSampler
from soar.loop import student, teacher
from soar.loop.rollout import RolloutEnv
from soar.problems.pool import VerifierPool
from soar.problems.prompts import get_format
from soar.report.page import write_report
from soar.run import checkpoint as checkpoints
from soar.run import folder as record
from soar.run import measure as held_out
from soar.run import pipeline
from soar.run.progress import Progress

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
AGAIN_EVERY = 3  # every third resumed run is killed once more
SMALL = ("student.attempts=4", "reward.attempts=2", "student.steps=1", "student.max_steps=2", "screen.attempts=2")


class Points:
    """Counts points as they are passed, and kills this process at number `at` (None: only count)."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at = os.path.realpath(folder), at
        self.passed: list[str] = []
        self.inside = False

    def __call__(self, name: str, tear: Callable[[], None] | None = None) -> None:
        if self.at == len(self.passed):
            if tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not (flags or 0) & WRITING:
                return
        elif event in CHANGING:
            path = arguments[0]
        else:
            return
        name = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else ""
        if name.startswith(self.folder + os.sep):
            short = re.sub(r"\d+", "N", name.removeprefix(self.folder + os.sep))
            short = re.sub(r"^(teacher|student|arms/\w+)/", "ADAPTER/", short)  # written by one function
            self(f"{event} {short}")

    def install(self) -> None:
        """Watch everything this process does from now on."""
        sys.addaudithook(self.audit)
        fsync, save_file, append = os.fsync, checkpoints.save_file, record.RunFolder.append

        def watched_fsync(descriptor: Any) -> None:
            self("fsync")
            fsync(descriptor)

        def watched_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
            def tear() -> None:
                save_file(tensors, path)
                os.truncate(path, path.stat().st_size // 2)

            self("half of the tensors", tear)
            save_file(tensors, path)

        def watched_append(folder: record.RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
            def tear() -> None:
                before = (folder.path / name).stat().st_size if (folder.path / name).exists() else 0
                append(folder, name, rows)
                after = (folder.path / name).stat().st_size
                os.truncate(folder.path / name, before + max(1, (after - before) * 2 // 3))

            if rows:
                self(f"half of the lines of {name}", tear)
            append(folder, name, rows)

        os.fsync, checkpoints.save_file = watched_fsync, watched_save  # type: ignore[assignment]
        record.RunFolder.append = watched_append  # type: ignore[method-assign]
        for room, attribute in ((NativeSampler, "sample"), (student, "update"), (teacher, "update")):
            self._watch(room, attribute)

    def _watch(self, room: Any, attribute: str) -> None:
        real = getattr(room, attribute)

        def watched(*arguments: Any, **named: Any) -> Any:
            self(f"{room.__name__}.{attribute}")
            return real(*arguments, **named)

        setattr(room, attribute, watched)


def in_fork(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does `work`: negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one_run(config: Config, folder: Path, at: int | None, note: Path | None = None) -> None:
    """Begin or continue the run in `folder`; write the names of the points passed to `note`."""
    points = Points(folder, at)
    points.install()
    pipeline.execute(config, folder, folder.exists(), ["soar", "run"], Progress(quiet=True))
    if note is not None:
        note.write_text(json.dumps(points.passed), encoding="utf-8")


def result(folder: Path) -> dict[str, bytes | str]:
    """Everything that a run leaves, without the clock: bytes of the lines, of the hard problems and of the adapters."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and re.match(r"hard/|teacher/|student/|arms/|(questions|pq)\.jsonl$", name):
            found[name] = path.read_bytes()
    found["metrics.jsonl"] = re.sub(rb', "seconds": [0-9.e-]+', b"", (folder / "metrics.jsonl").read_bytes())
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    del summary["wall_seconds"]
    found["summary.json"] = json.dumps(summary)
    return found


def choose(names: list[str], count: int, seed: int) -> list[int]:
    """`count` numbers of points: one of each kind first, the rest anywhere."""
    rng = random.Random(seed)
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        kinds[name].append(number)
    chosen = [rng.choice(kinds[name]) for name in sorted(kinds)]
    rest = [number for number in range(len(names)) if number not in set(chosen)]
    return sorted(chosen + rng.sample(rest, max(0, count - len(chosen))))


def read_killed(folder: Path) -> None:
    """What a person may do with the folder of a killed run: look at its report."""
    write_report(folder)


def stage_of(folder: Path) -> str:
    """What the run was at by its last checkpoint; `screen` before the first."""
    pointer = folder / "state" / "latest.json"
    if not pointer.exists():
        return "screen"
    number = json.loads(pointer.read_text(encoding="utf-8"))["number"]
    return str(json.loads((pointer.parent / f"{number:06d}" / "state.json").read_text(encoding="utf-8"))["stage"])


def kill_and_resume(config: Config, folder: Path, at: int, again: int | None, wanted: dict[str, Any]) -> dict[str, Any]:
    """One kill, perhaps a second one while resuming, then to the end. Says how each process ended and what differs."""
    ends = [in_fork(lambda: one_run(config, folder, at))]
    stage = stage_of(folder)
    readable = not (folder / "manifest.json").exists() or in_fork(lambda: read_killed(folder)) == 0
    if again is not None:
        ends.append(in_fork(lambda: one_run(config, folder, again)))
    if ends[-1] != 0:
        ends.append(in_fork(lambda: one_run(config, folder, None)))
    found = result(folder) if ends[-1] == 0 else {}
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return {"at": at, "stage": stage, "ends": ends, "readable": readable, "different": different}


def main(folder: Path, count: int, lanes: int, seed: int) -> int:
    """All of it; returns the exit code."""
    torch.set_num_threads(1)
    source = write_problems(folder / "p.jsonl", easy_problems(14, seed=1))
    config = tiny_config(f'problems.source="{source}"', *CHANGES, *SMALL)
    backbone = load_backbone(config.model)

    @contextmanager
    def shared(config: Config) -> Iterator[RolloutEnv]:
        fmt = get_format(config.problems.format)
        with VerifierPool(config.problems.verifier, answer_style=fmt.answer_style) as verifier:
            yield RolloutEnv(backbone, NativeSampler(backbone), fmt, verifier, config.student.reward)

    pipeline.open_env = shared
    held_out.BLOCK = 4
    note = folder / "points.json"
    assert in_fork(lambda: one_run(config, folder / "whole", None, note)) == 0
    names = json.loads(note.read_text(encoding="utf-8"))
    wanted = result(folder / "whole")
    chosen = choose(names, count, seed)
    print(json.dumps({"points": len(names), "kinds": len(set(names)), "chosen": len(chosen)}), flush=True)

    def lane(number: int) -> None:
        rng = random.Random(seed + number)
        for place, at in list(enumerate(chosen))[number::lanes]:
            again = rng.randrange(len(names) // 4) if place % AGAIN_EVERY == 0 else None
            said = kill_and_resume(config, folder / f"run-{at}", at, again, wanted)
            os.write(1, (json.dumps({**said, "name": names[at]}) + "\n").encode())

    children = []
    for number in range(lanes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                lane(number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:5])))
