"""Real worker processes: the numbers of one process, workers that die, hang or fail, and what a person is told."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_pieces
from loop_helpers import easy_problems, read_jsonl, run_tiny, tiny_config, write_problems
from test_resume import result

from soar.cli import main
from soar.config import ConfigError
from soar.loop.parallel import spread
from soar.loop.rollout import RolloutEnv
from soar.loop.write import TeacherError
from soar.run import pipeline
from soar.run import ray as crew
from soar.run.folder import versions
from soar.run.ray import LOG_FILE, RayParallel, Worker, WorkersLost
from soar.run.screen import screen_call
from soar.run.setup import open_env

ray = pytest.importorskip("ray")

SMALL = (
    "threads=2",
    "model.chunk=2",
    "teacher.steps=2",
    "reward.questions=6",
    "promotion.tau=-1",
    "teacher.optimizer.lr=0.003",
    "teacher.optimizer.kl=0.05",
    "student.optimizer.lr=0.01",
    "student.attempts=8",
    "arms.save_steps=2",
    "arms.steps=3",
)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for the whole file; a parallel uses the Ray that its process is connected to."""
    crew.connect(ray, tiny_config("cluster.workers=8"))
    ray.cloudpickle.register_pickle_by_value(ray_pieces)  # workers do not see the folder of the tests
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_problems(tmp_path_factory.mktemp("problems") / "p.jsonl", easy_problems(14, seed=1))
    return f'problems.source="{path}"'


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, source: str) -> dict[str, Any]:
    """The result of a run in one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_tiny(out, source, *SMALL)
    assert not (out / LOG_FILE).exists()
    return result(out)


def test_two_workers_one_of_them_killed_amid_a_step_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, alone: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    killed: list[int] = []
    real = RayParallel._finished

    def finished(self: RayParallel, name: str, tick: Any) -> Any:
        if name == "train_chunk" and not killed:
            killed.append(self.members[0].about["pid"])
            os.kill(killed[0], signal.SIGKILL)
        return real(self, name, tick)

    monkeypatch.setattr(RayParallel, "_finished", finished)
    run_tiny(out, source, *SMALL, "cluster.workers=2")
    assert result(out) == alone
    rows = read_jsonl(out / LOG_FILE)
    (lost,) = [row for row in rows if row["event"] == "lost"]
    assert (lost["worker"], lost["work"]) == (1, "train_chunk") and killed
    assert [row["worker"] for row in rows if row["event"] == "started"] == [1, 2, 1]
    done = [row for row in rows if row["event"] == "done"]
    assert lost["piece"] in {row["piece"] for row in done if row["worker"] == 1}
    assert {row["work"] for row in done} == {
        "screen_call", "train_chunk", "measure_chunk", "count_block",
    }  # fmt: skip
    assert len({row["piece"] for row in done}) == len(done)
    assert len({row["worker"] for row in done}) == 2


class Desk:
    """A parallel of two with what it says and records."""

    def __init__(self, env: RolloutEnv, *overrides: str) -> None:
        self.said: list[str] = []
        self.rows: list[dict[str, Any]] = []
        config = tiny_config("cluster.workers=2", "cluster.retries=5", *overrides)
        self.parallel = RayParallel(config, env, 1, self.said.append, self.rows.append)


@pytest.fixture(scope="module")
def env() -> Iterator[RolloutEnv]:
    with open_env(tiny_config()) as env:
        yield env


@pytest.fixture(scope="module")
def shared(env: RolloutEnv) -> Iterator[Desk]:
    desk = Desk(env)
    with desk.parallel:
        yield desk


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ask(desk: Desk, work: Any, *tasks: tuple[Any, ...], common: tuple[Any, ...] = ()) -> list[Any]:
    return list(spread(desk.parallel, None, 1, work, common, tasks))  # type: ignore[arg-type]


def test_results_come_in_order_from_all_workers_and_every_step_is_told(shared: Desk) -> None:
    ticks: list[int] = []
    tasks = [(30,), (1,), (2,), (3,)]
    found = list(spread(shared.parallel, None, 1, ray_pieces.double, (1,), tasks, lambda: ticks.append(0)))  # type: ignore[arg-type]
    assert [value for value, _ in found] == [61, 3, 5, 7]
    assert len({pid for _, pid in found}) == 2
    assert len(ticks) == 12


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", TeacherError, "the teacher wrote 0 acceptable pairs"),
        ("memory", RuntimeError, "CUDA out of memory"),
        ("bug", KeyError, r"(?s)ray_pieces\.py.*KeyError: .no such thing"),
    ],
)
def test_an_error_in_a_worker_comes_back_as_what_it_is(shared: Desk, how: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        ask(shared, ray_pieces.fail, (how,))
    assert ask(shared, ray_pieces.double, (1,), common=(0,))[0][0] == 2  # the parallel goes on


@pytest.mark.parametrize(
    ("work", "given"),
    [
        (ray_pieces.end_once, (5,)),
        (ray_pieces.lose_device_once, ()),
    ],
)
def test_a_worker_that_dies_or_loses_its_gpu_is_started_again_and_its_work_done(
    shared: Desk, tmp_path: Path, work: Any, given: tuple[Any, ...]
) -> None:
    before, reason = len(shared.rows), "it died and was started again"
    assert ask(shared, work, (str(tmp_path / "marker"), *given)) == [5 if given else 7]
    lost, started, done = shared.rows[before:]
    assert (lost["event"], started["event"], done["event"]) == ("lost", "started", "done")
    assert lost["reason"] == reason and lost["worker"] == started["worker"] == done["worker"]
    doing = f"; piece {lost['piece']} ({work.__name__}) is done again"
    assert f"worker {lost['worker']} is lost: {reason}{doing}" in shared.said
    pids = [row["pid"] for row in shared.rows if row["event"] == "started" and row["worker"] == lost["worker"]]
    assert pids[-1] != pids[-2] and any(is_gone(pids[-2]) or time.sleep(0.1) for _ in range(100))


def test_a_worker_that_stands_still_while_others_finish_is_killed_and_its_work_done(
    shared: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "STILL_S", 3.0)
    (tmp_path / "goes on").touch()
    tasks = [(str(tmp_path / name),) for name in ("goes on", "stands", "goes on")]
    assert ask(shared, ray_pieces.stop_once, *tasks) == [7, 7, 7]
    assert any("has not moved for 3 s: it is killed" in line for line in shared.said)


def test_work_that_loses_every_worker_ends_the_run(env: RolloutEnv) -> None:
    message = r"was lost and started 0 times \(cluster.retries\), at last: .*--resume"
    with Desk(env, "cluster.retries=0", "cluster.workers=1").parallel as one, pytest.raises(WorkersLost, match=message):
        list(spread(one, env, 1, ray_pieces.always_end, (), [()]))


def test_a_worker_loads_counts_and_names_other_weights(env: RolloutEnv) -> None:
    digest = env.backbone.base_digest()
    with pytest.raises(ConfigError, match=r"model\.path = 'no/such/folder' cannot be loaded"):
        Worker(tiny_config("model.path=no/such/folder"), os.getcwd(), digest).open()
    with pytest.raises(WorkersLost, match="loaded other weights than the run's process"):
        Worker(tiny_config(), os.getcwd(), "0" * 64).open()
    worker = Worker(tiny_config(), os.getcwd(), digest)
    about = worker.open()
    reply = worker.work(screen_call, (tiny_config(),), (easy_problems(2), 0, 4))
    assert [row.attempts for row in reply.value] == [4, 4]
    assert reply.tokens > 8 and reply.pid == os.getpid()
    assert worker.work(ray_pieces.warn, (), ()).notes == ["out of memory: going on with 2 students", "half the rows"]
    assert about["versions"] == versions()


def test_without_ray_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["run", "--out", str(tmp_path / "run"), "--workers", "2", "--quiet"]) == 1
    assert "pip install 'soar-rl[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ray://", ""])
def test_a_closed_port_is_named_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(pipeline, "open_env", lambda config: pytest.fail("the model was loaded first"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"{kind}127.0.0.1:{taken.getsockname()[1]}"
        assert main(["run", "--out", str(tmp_path / "run"), "--workers", address, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert f"cluster.address = {address!r} cannot be reached: nothing answers at 127.0.0.1, port" in said
    assert not (tmp_path / "run").exists()


def test_more_workers_than_a_machine_holds(env: RolloutEnv) -> None:
    with pytest.raises(ConfigError, match=r"cluster.workers = 2: a worker asks for 1 core and 3 GPUs, .* so 0 fit"):
        Desk(env, "cluster.gpus=3").parallel.__enter__()
