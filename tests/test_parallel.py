"""Work in pieces gives the same numbers whoever does them, in whatever order; real workers of Ray that die, hang or fail."""

import os
import pickle
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loop_helpers import BRIEF, easy_problems, events, outcome, run_tiny, tiny_config, write_problems

from soar.cli import main
from soar.config import ConfigError
from soar.loop.parallel import Task, Tick, map_tasks, no_tick
from soar.loop.rollout import RolloutEnv
from soar.loop.write import TeacherError
from soar.run import pipeline
from soar.run import ray as crew
from soar.run.checkpoint import Checkpoint
from soar.run.folder import RunFolder
from soar.run.ray import RayParallel, Worker
from soar.run.screen import screen_call
from soar.types import Interrupted, UserError

SMALL = (
    "model.chunk=2", "teacher.steps=1", "promotion.tau=-1", "student.optimizer.lr=0.01", "student.attempts=8",
    "arms.save_steps=1", "arms.steps=3", "arms.questions=4", 'arms.run=["base","hard_only","ps","pq","base_t"]', *BRIEF,
)  # fmt: skip


def result(folder: Path) -> dict[str, Any]:
    """Arms that are trained side by side take turns."""
    whole = outcome(folder)
    whole["metrics.jsonl"].sort(key=lambda row: (row["arm"], row["step"]) if row["event"] == "arm_step" else ("", 0))
    return {**whole, "rollouts.jsonl": sorted(whole["rollouts.jsonl"].splitlines())}


class Contrary:
    """Worker processes acted in this process. The newest piece is done first, and everything travels as bytes."""

    size = 2
    meter: Any = None

    def __init__(self, env: Any) -> None:
        self.env = env

    def stream(
        self, work: Callable[..., Any], common: Task, queue: deque[tuple[Any, Task]], tick: Tick = no_tick
    ) -> Iterator[tuple[Any, Any]]:
        while queue:
            key, task = queue.pop()
            sent = pickle.loads(pickle.dumps((common, task)))
            yield key, pickle.loads(pickle.dumps(work(self.env, tick, *sent[0], *sent[1])))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_problems(tmp_path_factory.mktemp("problems") / "p.jsonl", easy_problems(14, seed=1))
    return f'problems.source="{path}"'


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, source: str) -> dict[str, Any]:
    """The result of a run without worker processes."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_tiny(out, source, *SMALL)
    assert {row["arm"] for row in events(out, "arm_step")} == {"hard_only", "pq", "base_t"}
    return result(out)


def test_pieces_done_in_another_order_give_the_same_run(tmp_path, monkeypatch, source, alone):
    """Begun with workers, left in the middle of an arm, gone on with without and left again, ended with workers."""
    real_save = RunFolder.save

    def save(self: RunFolder, checkpoint: Checkpoint) -> None:
        real_save(self, checkpoint)
        if checkpoint.data["arm_progress"]:
            raise KeyboardInterrupt  # stands for a killed process

    for number, workers in enumerate((True, False, True)):
        with monkeypatch.context() as patch:
            if workers:
                patch.setattr(pipeline, "open_parallel", lambda config, env, say: nullcontext(Contrary(env)))
            if number == 2:
                run_tiny(tmp_path / "run", source, *SMALL, resume=True)
                break
            patch.setattr(RunFolder, "save", save)
            with pytest.raises(KeyboardInterrupt):
                run_tiny(tmp_path / "run", source, *SMALL, resume=number > 0)
    assert result(tmp_path / "run") == alone


def failing(env: Any, tick: Tick, error: Exception) -> Any:
    """A piece of work that fails."""
    raise error


def piece(env: Any, tick: Tick, how: str, marker: str = "") -> Any:
    """A piece of work that stops or ends its process; with a marker, it does so once."""
    if not marker or not Path(marker).exists():
        if marker:
            Path(marker).touch()
        if how == "exit":
            os._exit(1)
        os.kill(os.getpid(), getattr(signal, how))
    return 7


class Light:
    """A worker without a model: its process need not import torch, and is there in a moment."""

    def __init__(self, number: int, *given: Any) -> None:
        self.number = number

    def open(self) -> tuple[int, str]:
        return os.getpid(), "here"

    def work(self, work: Any, key: Any, common: Task, task: Task) -> Any:
        value, spent = work(None, None, *task), {"tokens": 0, "seconds": 0.0, "ticks": 0}
        return SimpleNamespace(number=self.number, pid=os.getpid(), key=key, value=value, **spent)


def double(env: Any, tick: Tick, offset: int, value: int) -> tuple[int, int]:
    """(2 * value + offset, process id); a large value is slow."""
    for _ in range(3):
        tick()
        time.sleep(0.01 * value)
    return 2 * value + offset, os.getpid()


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One local Ray for the whole file; a parallel uses the Ray that its process is connected to."""
    ray = pytest.importorskip("ray")
    crew.connect(ray, tiny_config("cluster.workers=4"))  # two for `two`, two light ones
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the folder of the tests
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def two(ray: Any, env: RolloutEnv, source: str) -> Iterator[tuple[RayParallel, list[str]]]:
    """Two workers, and what was said about them."""
    said: list[str] = []
    config = tiny_config(source, *SMALL, "cluster.workers=2", "cluster.retries=5")
    with crew.open_parallel(config, env, said.append) as parallel:
        assert parallel is not None
        yield parallel, said


def ask(parallel: RayParallel, work: Any, *tasks: Task, common: Task = (), tick: Tick = no_tick) -> list[Any]:
    return list(map_tasks(SimpleNamespace(parallel=parallel), work, common, tasks, tick))  # type: ignore[arg-type]


def test_two_workers_of_ray_one_of_them_killed_amid_a_step_give_the_same_numbers(
    tmp_path, monkeypatch, two, source, alone
):
    done, real, (parallel, said) = list[str](), RayParallel.stream, two
    assert len(said) == 1 and said[0].startswith("2 workers on ")

    def stream(self: RayParallel, work: Any, *rest: Any) -> Iterator[Any]:
        if work.__name__ == "train_chunk" and "train_chunk" not in done:
            os.kill(self.pids[1], signal.SIGKILL)
        done.append(work.__name__)
        return real(self, work, *rest)

    monkeypatch.setattr(RayParallel, "stream", stream)

    def opened(config: Any, env: Any, say: Any) -> Any:
        monkeypatch.setattr(parallel, "_env", env)  # that of the run
        return nullcontext(parallel)

    monkeypatch.setattr(pipeline, "open_parallel", opened)
    run_tiny(tmp_path / "run", source, *SMALL, "cluster.workers=2")
    assert result(tmp_path / "run") == alone
    assert set(done) == {"screen_call", "train_chunk", "measure_chunk", "count_block"}
    assert said[1:] == ["worker 1 was lost and started again; what it was doing (train_chunk) is done again"]


def shared(env: Any, tick: Tick) -> Any:
    return env.shared


def test_results_come_in_order_every_step_is_told_and_errors_come_back_as_what_they_are(two, env, monkeypatch):
    monkeypatch.setattr(env, "shared", {"data_source": "x"})  # known when problems are loaded, after the workers
    assert ask(two[0], shared, (), ()) == [{"data_source": "x"}] * 2
    ticks: list[int] = []
    results = ask(two[0], double, (30,), (1,), (2,), (3,), common=(1,), tick=lambda: ticks.append(0))
    assert [value for value, _ in results] == [61, 3, 5, 7]
    assert {pid for _, pid in results} == set(two[0].pids.values()) and len(ticks) == 12
    for error, message in (
        (TeacherError("the teacher wrote 0 acceptable pairs"), "the teacher wrote 0 acceptable pairs"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory"),
        (KeyError("no such thing"), r"(?s)test_parallel\.py.*KeyError: .no such thing"),
    ):
        with pytest.raises(type(error), match=message):
            ask(two[0], failing, (error,))
        assert ask(two[0], double, (1,), common=(0,))[0][0] == 2  # the parallel goes on


def test_workers_that_end_or_stand_still_start_again_until_the_last_loss(ray, env, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "STILL_S", 3.0)
    monkeypatch.setattr(crew, "Worker", Light)
    said, config = list[str](), tiny_config("cluster.workers=2", "cluster.retries=2")
    with RayParallel(config, env, 1, said.append) as parallel:
        before = set(parallel.pids.values())
        assert ask(parallel, piece, *((how, str(tmp_path / how)) for how in ("exit", "SIGSTOP"))) == [7, 7]
        lost = "worker {} was lost and started again; what it was doing (piece) is done again"
        still = "no worker has given a result for 3 s: they are killed and started again"
        assert said[1:] in ([lost.format(one), still, lost.format(3 - one)] for one in (1, 2))
        assert not before & set(parallel.pids.values())
        with pytest.raises(Interrupted, match=r"was lost and started 2 times \(cluster.retries\), at last: .*--resume"):
            ask(parallel, piece, ("SIGKILL",))


def test_the_store_holds_the_students_of_a_step_twice(ray):
    """16 of Qwen2.5-0.5B, on their way back and out again; what is over would go by the disk."""
    assert ray.cluster_resources()["object_store_memory"] > 2 * 16 * 35_192_832


class Quiet:
    """Ray whose one worker, at another stream's piece first, gives its result after an hour; kills are counted."""

    def __init__(self) -> None:
        self.now, self.killed = 0.0, 0

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.now += 60.0
        return (refs[:1], refs[1:]) if self.now >= 3600 else ([], refs)

    def kill(self, *_: Any, **__: Any) -> None:
        self.killed += 1

    def get(self, ref: Any) -> crew.Reply:
        return crew.Reply(1, 7, 0, "done", 0, 1.0, 0)


@pytest.mark.parametrize(("others", "gpus", "given_back"), [([], 1.0, 1), (["train_chunk"], 1.0, 0), ([], 0.0, 0)])
def test_a_worker_amid_a_piece_of_another_stream_is_not_taken_for_one_that_stands_still(
    env, monkeypatch, others, gpus, given_back
):
    """Arms are measured on their way while other workers are amid a segment of theirs: 600 s here, ten times that to wait.

    With the last stream the workers give the memory of GPUs back, or the run's own process may have none on its own.
    """
    quiet, asked = Quiet(), list[Any]()
    actor = SimpleNamespace(work=SimpleNamespace(remote=lambda *given: asked.append(given[0]) or given[1]))
    quiet.put, quiet.exceptions = (lambda value: value), SimpleNamespace(RayTaskError=OSError, RayError=OSError)
    monkeypatch.setitem(sys.modules, "ray", quiet)
    monkeypatch.setattr(crew.time, "monotonic", lambda: quiet.now)
    parallel = RayParallel(tiny_config("cluster.workers=1"), env, 1, print)
    parallel.actors, parallel.pids, parallel._open, parallel.gpus = [actor], {1: 7}, list(others), gpus
    parallel._longest = {"train_chunk": 600.0, "double": 1.0 if others else 600.0}
    assert ask(parallel, double, (1,)) == ["done"] and quiet.killed == 0
    freed = list[str]()
    cuda = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    there = RolloutEnv(cuda, SimpleNamespace(release=lambda: freed.append("cache")), None, None)  # type: ignore[arg-type]
    for work in asked[1:]:
        work(there, no_tick)
    assert asked[0] is double and freed == ["cache"] * given_back


def test_workers_that_end_early_are_named():
    parallel = SimpleNamespace(stream=lambda *given: iter([(1, "b"), (0, "a")]))
    with pytest.raises(UserError, match=r"ended with 2 of 3 pieces of work \(double\) done; continue with --resume"):
        ask(parallel, double, (0,), (1,), (2,))


def test_a_worker_loads_counts_names_other_weights_and_ends_with_its_gpu(env, monkeypatch):
    digest = env.backbone.base_digest()
    with pytest.raises(ConfigError, match=r"'no/such/folder' cannot be loaded \(no such folder here, so "):
        Worker(1, tiny_config("model.path=no/such/folder"), os.getcwd(), digest).open()
    with pytest.raises(Interrupted, match="loaded other weights than the run's process"):
        Worker(1, tiny_config(), os.getcwd(), "0" * 64).open()
    worker = Worker(3, tiny_config(), os.getcwd(), digest)
    reply = worker.work(screen_call, "key", ({}, (tiny_config(),)), (easy_problems(2), 0, 4))
    assert [row.attempts for row in reply.value] == [4, 4] and reply.tokens > 8
    assert (reply.number, reply.pid, reply.key) == (3, os.getpid(), "key")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):  # its GPU is lost: a new process may get it back
        worker.work(failing, "key", ({}, ()), (RuntimeError("CUDA error: unspecified launch failure"),))


def test_a_cluster_that_cannot_be_is_named_before_anything_is_loaded(tmp_path, capsys, monkeypatch, ray, env):
    with pytest.raises(ConfigError, match=r"cluster.workers = 2: a worker asks for 1 core and 3 GPUs, .* so 0 fit"):
        RayParallel(tiny_config("cluster.workers=2", "cluster.gpus=3"), env, 1, print).__enter__()
    monkeypatch.setattr(pipeline, "open_env", lambda config: pytest.fail("the model was loaded first"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        for kind in ("ray://", ""):
            address = f"{kind}127.0.0.1:{taken.getsockname()[1]}"
            assert main(["run", "--out", str(tmp_path / "run"), "--workers", address, "--quiet"]) == 1
            said = capsys.readouterr().err
            assert f"cluster.address = {address!r} cannot be reached: nothing answers at 127.0.0.1, port" in said
    monkeypatch.setitem(sys.modules, "ray", None)  # not installed
    assert main(["run", "--out", str(tmp_path / "run"), "--workers", "2", "--quiet"]) == 1
    assert "pip install 'soar-rl[ray]'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"pip install 'soar-rl\[ray\]'"):
        RayParallel(tiny_config("cluster.workers=2"), env, 1, print)
    assert not (tmp_path / "run").exists()
