"""`kill -9` anywhere, resumed, equals the run that was never killed.

As a program (`python tests/test_kill.py FOLDER`) this file does the killing. One process imports torch and loads the
model; every run happens in a fork of it. A first run, never killed, notes its points: every change to a file of its
folder (seen by an audit hook), every fsync, every call of the sampler and the update. One point of each kind and some more
are shared out among CHAINS runs; each run is ended by SIGKILL at its first point, in the middle of the write where the
point is one, resumed until its next, and so on, and what it ends with is compared with the first run, byte by byte.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from loop_helpers import BRIEF, easy_problems, events, outcome, tiny_config, write_problems

from soar.config import Config
from soar.engine.load import load_backbone
from soar.engine.sampler import NativeSampler
from soar.loop import student, teacher
from soar.loop.rollout import RolloutEnv
from soar.problems.domain import domain_of
from soar.problems.pool import open_pool
from soar.report.runs import read_run
from soar.run import checkpoint as checkpoints
from soar.run import pipeline, progress
from soar.run.folder import RunFolder
from soar.run.progress import Progress

POINTS, CHAINS, SEED = 46, 2, 0
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
RESUMED = "os.truncate metrics.jsonl"  # a point that only a resumed run has
# Teacher and students that move: graded rewards and larger groups, so that few groups are all alike; rewards that differ
# between datasets; a KL term that counts from the second step on.
CHANGES = tuple((Path(__file__).parent / "cases" / "killed.txt").read_text(encoding="utf-8").split())
Point = tuple[int, str]  # checkpoints saved before it in the run, and what it is
Write = tuple[str, Path, int]  # what is written, the file, and its bytes before


class Points:
    """Notes the points that this process passes, and kills it at the first like `target`: that name, as late a checkpoint."""

    def __init__(self, folder: Path, target: Point | None) -> None:
        self.folder, self.target = os.path.realpath(folder), target
        self.passed: list[Point] = []
        self.saved = 0

    def __call__(self, name: str, tear: Callable[[], None] | None = None) -> None:
        if self.target is not None and name == self.target[1] and self.saved >= self.target[0]:
            if tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append((self.saved, name))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event in CHANGING or event == "open" else None
        if not isinstance(path, str | bytes | os.PathLike) or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        name = os.path.realpath(os.fsdecode(path))
        if name.startswith(self.folder + os.sep):
            short = re.sub(r"\d+", "N", name.removeprefix(self.folder + os.sep))
            short = re.sub(r"^(teacher|student|arms/\w+)/", "ADAPTER/", short)  # written by one function
            self(f"{event} {short}")

    def install(self) -> None:
        """Watch everything this process does from now on."""
        sys.addaudithook(self.audit)
        patch, save = pytest.MonkeyPatch(), RunFolder.save

        def watched_save(folder: RunFolder, checkpoint: checkpoints.Checkpoint) -> None:
            save(folder, checkpoint)
            self.saved = 1 + max(int(path.name) for path in (folder.path / "state").glob("[0-9]*"))

        def appended(folder: RunFolder, name: str, rows: list[dict[str, Any]]) -> Write | None:
            path = folder.path / name
            return (f"half of the lines of {name}", path, path.stat().st_size if path.exists() else 0) if rows else None

        patch.setattr(os, "fsync", lambda descriptor: self("fsync"))  # SIGKILL takes nothing from the system's buffers
        patch.setattr(RunFolder, "save", watched_save)
        self.watch(patch, RunFolder, "append", appended)
        self.watch(patch, checkpoints, "write_tensors", lambda path, tensors: ("half of the tensors", path, 0))
        for room, attribute in ((NativeSampler, "sample"), (student, "update"), (teacher, "update")):
            self.watch(patch, room, attribute)

    def watch(self, patch: pytest.MonkeyPatch, room: Any, attribute: str, writes: Any = None) -> None:
        """Every call is a point; where it `writes` (None: nothing), one at which two thirds of that are in the file."""
        real = getattr(room, attribute)

        def call(*arguments: Any, **named: Any) -> Any:
            write = writes and writes(*arguments, **named)

            def tear() -> None:
                real(*arguments, **named)
                _, path, before = write
                os.truncate(path, before + max(1, (path.stat().st_size - before) * 2 // 3))

            if write or not writes:
                self(write[0] if write else f"{room.__name__}.{attribute}", tear if write else None)
            return real(*arguments, **named)

        patch.setattr(room, attribute, call)


def in_fork(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does `work`: negative for a signal."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one_run(config: Config, folder: Path, target: Point | None, note: Path) -> None:
    """Begin or continue the run in `folder`; at its end write the points passed to `note`."""
    points = Points(folder, target)
    numbers = [int(path.name) for path in (folder / "state").glob("[0-9]*") if path.name.isdecimal()]
    points.saved = max(numbers, default=-1) + 1
    points.install()
    pipeline.execute(RunFolder(folder, config, ["soar", "run"], folder.exists()), config, Progress(quiet=True))
    note.write_text(json.dumps(points.passed), encoding="utf-8")


def chosen(points: list[Point]) -> list[Point]:
    """One point of each kind and more up to POINTS, in the order of the run."""
    rng = random.Random(SEED)
    kinds = sorted({name for _, name in points})
    picked = {rng.choice([i for i, point in enumerate(points) if point[1] == kind]) for kind in kinds}
    rest = [i for i in range(len(points)) if i not in picked]
    return [points[i] for i in sorted([*picked, *rng.sample(rest, max(0, POINTS - len(picked)))])]


def chain(config: Config, folder: Path, targets: list[Point], wanted: dict[str, Any]) -> list[Point]:
    """One run, killed at each target in turn; prints a line for each kill and one for its end. Returns targets not met."""
    left = list(targets)
    while True:
        target = left.pop(0) if left else None
        code = in_fork(lambda target=target: one_run(config, folder, target, folder.with_suffix(".points")))
        if code != -signal.SIGKILL:
            break
        if (folder / "manifest.json").exists():
            read_run(folder)  # a person may look at it
        saved = sorted(path for path in folder.glob("state/[0-9]*") if path.name.isdecimal())
        stage = json.loads((saved[-1] / "state.json").read_bytes())["stage"] if saved else "screen"
        print(json.dumps({"name": target[1] if target else "", "stage": stage}), flush=True)
    last = outcome(folder) if code == 0 else {}
    different = sorted(name for name in last.keys() | wanted.keys() if last.get(name) != wanted.get(name))
    print(json.dumps({"ended": code, "different": different}), flush=True)
    missed = [target, *left] if target else left
    return [point for point in missed if point[1] != RESUMED] if code == 0 else []


def main(folder: Path) -> None:
    """All of it."""
    torch.set_num_threads(1)
    source = write_problems(folder / "p.jsonl", easy_problems(14, seed=1))
    config = tiny_config(f'problems.source="{source}"', *CHANGES, *BRIEF)
    backbone = load_backbone(config.model)

    @contextmanager
    def shared(config: Config) -> Iterator[RolloutEnv]:
        with open_pool(domain := domain_of(config.problems), config.problems) as verifier:
            yield RolloutEnv(backbone, NativeSampler(backbone), domain.prompts, verifier, config.student.reward)

    pipeline.open_env = shared
    progress.NOTE_SECONDS = 1e9  # now.json is a point that only a slow machine has
    pipeline.report_at_the_end = lambda path, say: None  # the page takes long, and is not compared
    note = folder / "points"
    assert in_fork(lambda: one_run(config, folder / "whole", None, note)) == 0
    points = chosen([(saved, name) for saved, name in json.loads(note.read_text(encoding="utf-8"))])
    print(json.dumps({"kinds": sorted({name for _, name in points})}), flush=True)
    wanted = outcome(folder / "whole")

    for place in range(CHAINS):
        left = points[place::CHAINS]
        left.insert(len(left) // 2, (0, RESUMED))
        while left:
            run = folder / f"run-{place}-{len(left)}"
            assert not run.exists(), f"points that are never met: {left}"
            left = chain(config, run, left, wanted)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """The folder of the runs, the kinds of points, and one entry for each kill and each end."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'examples'}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, __file__, str(folder)]
    program = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert program.returncode == 0, program.stderr[-2000:]
    head, *lines = map(json.loads, program.stdout.splitlines())
    return folder, head["kinds"], lines


def test_every_killed_run_ends_as_the_one_that_was_not(killed):
    folder, kinds, lines = killed
    assert events(folder / "whole", "promotion"), "a run that is worth it"
    ends, kills = ([line for line in lines if ("ended" in line) is end] for end in (True, False))
    assert ends == [{"ended": 0, "different": []}] * len(ends)
    assert len(kills) >= POINTS
    names = Counter(line["name"] for line in kills)
    assert set(kinds) | {RESUMED} == set(names)  # each kind of point was hit
    assert {
        "half of the tensors", "half of the lines of metrics.jsonl", "half of the lines of hard/screen.jsonl",
        "os.rename state/N.tmp", "os.rename .manifest.json.N.tmp",
        "os.rename .summary.json.N.tmp", "NativeSampler.sample", "soar.loop.student.update", "soar.loop.teacher.update",
        "fsync",
    } <= set(names)  # fmt: skip
    stages = Counter(line["stage"] for line in kills)
    assert set(stages) == {"screen", "loop", "arms", "evaluate", "done"}
    assert min(stages.values()) >= 2, stages


if __name__ == "__main__":
    main(Path(sys.argv[1]))
