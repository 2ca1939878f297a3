"""Worker processes run by Ray: each holds the frozen base model; pieces of work go out, results come back.

Only adapters, problems and verdicts travel. A worker that dies, loses its device or shows no progress for too long is
killed, its piece of work goes to another one, with the same seeds and so the same result, and a new worker takes its
place. Everything that happens to workers is a line of workers.jsonl. Ray's own restarts are not used: its retries count a
worker that is still starting as lost once more. Left out: a second copy of slow pieces, elastic growth, one model over
several devices.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar.config import Config, ConfigError
from soar.engine.memory import release_memory
from soar.files import scrub
from soar.loop.parallel import Task, Tick, no_tick
from soar.loop.rollout import RolloutEnv
from soar.run.folder import RunFolder, versions
from soar.run.interrupts import TokenMeter
from soar.run.ray_worker import DEVICE, Reply, Worker, failure_of
from soar.run.setup import cores_of
from soar.types import VERSION, UserError

CLIENT = "ray://"  # addresses of Ray's client, for a driver outside of the cluster
REACH_S = 10.0  # how long the head of a cluster may take to answer a first knock
LOG_FILE = "workers.jsonl"
BEAT_S = 1.0  # how often workers are asked for a sign of life
CLOSE_S = 5.0  # how long a worker may take to end its verifier processes
SAME = ("soar", "python", "torch", "transformers", "numpy")  # versions that may differ only with a word about it


class WorkersLost(UserError):
    """Worker processes that cannot be started, or that are lost again and again."""


def import_ray(address: str = "") -> Any:
    """The `ray` module, told to show this machine's token to the cluster at `address`. Raises ConfigError without Ray.

    A Ray that was ever started by a program leaves a token, and a cluster that is started beside one asks for it; who joins
    shows it only when told to before Ray is imported.
    """
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if address and (given or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "cluster.workers and cluster.address need Ray, which is not installed: pip install 'soar-rl[ray]'"
        ) from error


def check_cluster(config: Config) -> None:
    """Refuse a cluster that cannot be there, before a model is loaded: Ray itself takes minutes to say so, or exits.

    Raises ConfigError when Ray is missing or nothing listens at `cluster.address`.
    """
    address = config.cluster.address
    if config.cluster.workers or address:
        import_ray(address)
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or a form that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        default = "10001" if address.startswith(CLIENT) else "6379"
        raise ConfigError(
            f"cluster.address = {address!r} cannot be reached: nothing answers at {host}, port {port} ({error}). "
            f"Start the cluster there with `ray start --head`, and give the address and port that it prints (by default "
            f"{default} for this kind of address)"
        ) from error


def connect(ray: Any, config: Config) -> bool:
    """Join the cluster of `cluster.address`, or start one on this machine; False where this process had joined one already.

    Raises ConfigError when the address does not answer.
    """
    if ray.is_initialized():
        return False
    cluster = config.cluster
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.address:
        options |= {"address": cluster.address}
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = max(os.cpu_count() or 1, int(-(-cluster.workers * cluster.cpus // 1)))
        options |= {"address": "local", "num_cpus": cores, "object_store_memory": cluster.store_mb * 2**20}
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:  # Ray may end the process
        where = f"cluster.address = {cluster.address!r}" if cluster.address else "Ray"
        raise ConfigError(
            f"{where} cannot be reached: {in_short(error)}. It is started with `ray start --head`; a Ray that asks for a "
            "token wants its RAY_AUTH_TOKEN here"
        ) from error
    finally:  # Ray listens to signals itself when it starts; what the run made of them counts
        for number, handler in handlers.items():
            with suppress(ValueError, TypeError):  # not the main thread, which cannot listen anyway
                signal.signal(number, handler)
    return True


def workers_for(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """How many workers of `cpus` cores and `gpus` GPUs a cluster holds in all."""
    by_cpu = int(resources.get("CPU", 0.0) / cpus)
    return min(by_cpu, int(resources.get("GPU", 0.0) / gpus)) if gpus else by_cpu


def in_short(error: BaseException) -> str:
    """The first and the last line of an error that say something: what Ray saw, and what it came from."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray's colours
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"[:500]


@dataclass
class _Piece:
    """A piece of work on its way. number: counts pieces of the process; ticks: steps of it that were reported."""

    number: int
    key: Any
    task: Task
    losses: int = 0
    ticks: int = 0


@dataclass
class _Member:
    """One worker. ref: what it is busy with, None while idle; piece: the work, None while it opens or works for nobody.

    about: what `Worker.open` said, {} before. silent_s: since the last sign of life, counted in beats.
    """

    number: int
    actor: Any
    ref: Any
    piece: _Piece | None = None
    pulse: Any = None
    life: int = -1
    silent_s: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


class RayParallel:
    """See the module text. Use as a context manager; workers end with it.

    env: the driver's own, whose base model every worker's must equal. threads: of the driver, so that every worker
    cuts and computes its work as this process would. say: lines for a person; record: rows for workers.jsonl.
    Raises ConfigError when Ray is missing or the cluster cannot hold the workers, WorkersLost when none starts, and what
    the workers raise while they load the model.
    """

    def __init__(
        self,
        config: Config,
        env: RolloutEnv,
        threads: int,
        say: Callable[[str], None],
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.say, self.record = config, say, record
        self.cluster = config.cluster
        self.meter: TokenMeter | None = None
        self.gpus = self.cluster.gpus if self.cluster.gpus is not None else float(env.backbone.device.type == "cuda")
        self.size = 0
        self._env, self._threads = env, threads
        self._members: list[_Member] = []
        self._hired = self._pieces = self._failed_starts = 0
        self._again: deque[_Piece] = deque()
        self._tick, self._name, self._connected = no_tick, "", False
        self._ray = import_ray(self.cluster.address)

    def __enter__(self) -> RayParallel:
        self._digest = self._env.backbone.base_digest()
        self._connected = connect(self._ray, self.config)
        try:
            room = workers_for(self._ray.cluster_resources(), self.cluster.cpus, self.gpus)
            self.size = self.cluster.workers or room
            self._check_room(room)
            asked = {"workers": self.size, "cpus": self.cluster.cpus, "gpus": self.gpus}
            self.record({"event": "opened", **asked, "ray": self._ray.__version__})
            for _ in range(self.size):
                self._hire()
            while any(not member.about for member in self._members):
                self._finished()
        except BaseException:
            self.close()
            raise
        where = ", ".join(sorted({f"{m.about['host']} ({m.about['device']})" for m in self._members}))
        self.say(f"{len(self._members)} workers on {where}")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the connection to Ray where it was made here."""
        with suppress(Exception):  # a cluster that is gone cannot be told
            self._ray.wait([m.actor.close.remote() for m in self._members if m.ref is None], timeout=CLOSE_S)
        for member in self._members:
            with suppress(Exception):
                self._ray.kill(member.actor, no_restart=True)
        self._members = []
        if self._connected:
            self._ray.shutdown()

    def stream(
        self, work: Callable[..., Any], common: Task, queue: deque[tuple[Any, Task]], tick: Tick = no_tick
    ) -> Iterator[tuple[Any, Any]]:
        """See `parallel.Parallel`. Results come as they are ready; pieces are handed out one by one to whoever is free."""
        if self._env.backbone.device.type == "cuda":  # a worker may share this GPU
            self._env.sampler.release()
            release_memory()
        shared, again = self._ray.put(common), deque[_Piece]()
        self._again, self._tick, self._name = again, tick, work.__name__
        try:
            while queue or again or any(member.piece for member in self._members):
                for member in self._members:
                    if member.ref is None and (again or queue):
                        if not again:
                            self._pieces += 1
                            again.append(_Piece(self._pieces, *queue.popleft()))
                        self._give(member, again.popleft(), work, shared)
                yield from self._finished()
        finally:
            for member in self._members:
                member.piece = None  # nobody waits for it any more

    def _give(self, member: _Member, piece: _Piece, work: Callable[..., Any], shared: Any) -> None:
        member.piece, member.silent_s = piece, 0.0
        task = self._ray.put(piece.task)  # adapters: too large for a message of Ray's client
        member.ref = member.actor.work.remote(work, shared, task)

    def _finished(self) -> list[tuple[Any, Any]]:
        """Wait for one beat at most; (key, result) of every piece that is done. Looks after the workers meanwhile."""
        started = time.monotonic()
        busy = [member for member in self._members if member.ref is not None]
        if not busy:
            raise WorkersLost("no worker is left; continue with --resume")
        ready, _ = self._ray.wait([member.ref for member in busy], num_returns=1, timeout=BEAT_S)
        if ready:  # whatever else is ready by now
            ready, _ = self._ray.wait([member.ref for member in busy], num_returns=len(busy), timeout=0)
        results = [result for member in busy if member.ref in ready for result in self._collect(member)]
        elapsed = min(time.monotonic() - started, 2 * BEAT_S)  # a driver that slept has heard nothing
        for member in [member for member in self._members if member.ref is not None]:
            self._listen(member, elapsed)
        return results

    def _collect(self, member: _Member) -> list[tuple[Any, Any]]:
        """What a worker that is done, or dead, leaves: [(key, result)] or []."""
        try:
            reply: Reply = self._ray.get(member.ref)
        except self._ray.exceptions.RayTaskError:  # it could not even begin: something does not unpickle
            raise
        except self._ray.exceptions.RayError as error:
            self._lose(member, in_short(error))
            return []
        for line in reply.notes:
            self.say(f"worker {member.number}: {line}")
        if reply.failure is not None and reply.failure.kind == DEVICE:
            self._lose(member, reply.failure.message)
            return []
        piece, member.ref, member.pulse, member.piece = member.piece, None, None, None
        if piece is None and member.about:
            return []  # done for a caller that has gone
        if reply.failure is not None:
            raise failure_of(reply.failure)
        if piece is None:
            self._welcome(member, reply)
            return []
        self._report(piece, reply.ticks)
        if self.meter is not None:
            self.meter.tokens += reply.tokens
        self._note("done", member, piece, seconds=round(reply.seconds, 3), tokens=reply.tokens)
        return [(piece.key, reply.value)]

    def _listen(self, member: _Member, elapsed: float) -> None:
        """Ask for a sign of life; kill a worker that gives none for too long."""
        member.silent_s += elapsed
        if member.pulse is None:
            member.pulse = member.actor.pulse.remote()
        elif self._ray.wait([member.pulse], timeout=0)[0]:
            with suppress(self._ray.exceptions.RayError):  # then its work fails too, and says why
                ticks, life = self._ray.get(member.pulse)
                if life != member.life and member.about:
                    member.life, member.silent_s = life, 0.0
                self._report(member.piece, ticks)
            member.pulse = None
        if member.about and member.silent_s > self.cluster.silence_s:
            self._lose(member, f"no sign of progress for {self.cluster.silence_s:g} s (cluster.silence_s)")
        elif not member.about and member.silent_s > self.cluster.start_s:
            asked = f"not started after {self.cluster.start_s:g} s (cluster.start_s); it asks for {self._share()}"
            self._lose(member, f"{asked}, free are {_cores_and_gpus(self._ray.available_resources())}")

    def _report(self, piece: _Piece | None, ticks: int) -> None:
        """Tell of the steps of a piece that are new; a piece that is done again tells of none twice."""
        while piece is not None and piece.ticks < ticks:
            piece.ticks += 1
            self._tick()

    def _hire(self) -> None:
        """Begin to start a worker."""
        self._hired += 1
        options = {"num_cpus": self.cluster.cpus, "num_gpus": self.gpus, "max_concurrency": 2, "max_restarts": 0}
        try:
            actor = self._ray.remote(Worker).options(**options).remote(self._worker_config().resolved(), os.getcwd())
            self._members.append(_Member(self._hired, actor, actor.open.remote()))
        except (ImportError, AttributeError) as error:  # Ray's client has the class imported over there first
            raise WorkersLost(
                f"the cluster cannot import this package: {type(error).__name__}: {error}. Install soar-rl {VERSION} "
                "with the extras train and ray on every node, the head included"
            ) from error

    def _worker_config(self) -> Config:
        """The run's config as a worker needs it: its share of the cores for verifying, whichever GPU Ray gives it."""
        model, problems = self.config.model, self.config.problems
        if model.device.startswith("cuda") or not self.gpus:
            model = model.model_copy(update={"device": "cuda" if model.device.startswith("cuda") else "cpu"})
        verifiers = problems.verify_workers or max(1, min(8, int(self.cluster.cpus)))
        problems = problems.model_copy(update={"verify_workers": verifiers})
        return self.config.model_copy(update={"model": model, "problems": problems, "threads": self._threads})

    def _welcome(self, member: _Member, reply: Reply) -> None:
        """A worker that has loaded the model. Raises WorkersLost when it is another model."""
        about, here = reply.value, versions()
        if about["model_sha256"] != self._digest:
            raise WorkersLost(
                f"worker {member.number} on {about['host']} loaded other weights than this process (sha256 "
                f"{about['model_sha256'][:12]} there, {self._digest[:12]} here); give both the same model.path and "
                "model.revision, and set model.dtype where one has a GPU and the other has none"
            )
        other = [f"{name} {about['versions'][name]}" for name in SAME if about["versions"][name] != here[name]]
        if other:
            self.say(f"worker {member.number} on {about['host']} has {', '.join(other)}: last digits may differ")
        member.about, self._failed_starts = about, 0
        where = {key: about[key] for key in ("host", "pid", "device")}
        self._note("started", member, None, seconds=round(reply.seconds, 3), **where)

    def _lose(self, member: _Member, reason: str) -> None:
        """A worker is gone, or is made to go: its work is queued again, and a new one is hired."""
        piece = member.piece
        self._note("lost", member, piece, reason=reason)
        with suppress(Exception):
            self._ray.kill(member.actor, no_restart=True)
        if member.about.get("host") == platform.node():  # Ray asks, and a stopped process does not answer
            with suppress(ProcessLookupError, PermissionError):
                os.kill(member.about["pid"], signal.SIGKILL)
        self._members.remove(member)
        doing = f"; piece {piece.number} ({self._name}) is done again" if piece else ""
        self.say(f"worker {member.number} is lost: {reason}{doing}")
        if piece is not None:
            piece.losses += 1
            if piece.losses > self.cluster.retries:
                raise WorkersLost(
                    f"a piece of work ({self._name}) lost its worker {piece.losses} times (cluster.retries = "
                    f"{self.cluster.retries}), at last: {reason}. Free memory on the workers or lower model.chunk, then "
                    "continue with --resume"
                )
            self._again.appendleft(piece)
        self._failed_starts += not member.about
        if self._failed_starts <= self.cluster.retries:
            self._hire()
        elif not any(other.about for other in self._members):
            raise WorkersLost(f"no worker could be started, at last: {reason}")
        else:
            self.say(f"going on with {len(self._members)} workers")

    def _note(self, event: str, member: _Member, piece: _Piece | None, **more: Any) -> None:
        which = {"piece": piece.number, "work": self._name} if piece is not None else {}
        self.record({"event": event, "worker": member.number, **which, **more})

    def _share(self) -> str:
        return _cores_and_gpus({"CPU": self.cluster.cpus, "GPU": self.gpus})

    def _check_room(self, room: int) -> None:
        """Raises ConfigError when the cluster will never hold the workers; one that is joined may still grow."""
        if self.size and (room >= self.size or self.cluster.address):
            return
        cluster = self.cluster
        key = f"cluster.workers = {self.size}" if cluster.workers else f"cluster.address = {cluster.address!r}"
        raise ConfigError(
            f"{key}: a worker asks for {self._share()}, there are {_cores_and_gpus(self._ray.cluster_resources())}, so "
            f"{room} fit; lower cluster.workers, cluster.cpus or cluster.gpus"
        )


def _cores_and_gpus(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} cores and {resources.get('GPU', 0.0):g} GPUs"


@contextmanager
def open_parallel(
    config: Config, env: RolloutEnv, folder: RunFolder | None, say: Callable[[str], None]
) -> Iterator[RayParallel | None]:
    """The parallel that `cluster` asks for, None when it asks for none. folder: where workers.jsonl is kept."""
    if not config.cluster.workers and not config.cluster.address:
        yield None
        return
    if folder is not None:
        folder.rows(LOG_FILE)  # cuts off what a killed process left half written

    def record(row: dict[str, Any]) -> None:
        if folder is not None:
            folder.append(LOG_FILE, [scrub(row)])

    with RayParallel(config, env, cores_of(config.threads), lambda text: say(scrub(text)), record) as parallel:
        yield parallel
