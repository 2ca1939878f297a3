"""A parallel of Ray actors: each holds the frozen base model; pieces of work go out, results come back.

Only adapters, problems and verdicts travel. A worker that dies, loses its device or shows no progress for too long is
killed, its piece of work goes to another one, with the same seeds and so the same result, and a new worker takes its
place. Everything that happens to workers is a line of workers.jsonl. Left out: a second copy of slow pieces, elastic
growth, one model over several devices.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from soar.config import Config, ConfigError
from soar.engine.memory import release_memory
from soar.files import scrub
from soar.loop.parallel import Task, Tick, no_tick
from soar.loop.rollout import RolloutEnv
from soar.run.folder import RunFolder, versions
from soar.run.interrupts import TokenMeter
from soar.run.ray_cluster import Connection, connect, free_words, import_ray, in_short, workers_for
from soar.run.ray_worker import BUG, DEVICE, MEMORY, USER, Failure, Order, Reply, Worker
from soar.run.setup import cores_of
from soar.types import VERSION, UserError

LOG_FILE = "workers.jsonl"
BEAT_S = 1.0  # how often workers are asked for a sign of life
CLOSE_S = 5.0  # how long a worker may take to end its verifier processes
SAME = ("soar", "python", "torch", "transformers", "numpy")  # versions that may differ only with a word about it


class WorkersLost(UserError):
    """Worker processes that cannot be started, or that are lost again and again."""


class WorkerBug(Exception):
    """An error in a worker that is no user's; the message is its traceback."""


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
    life: tuple[int, int] = (-1, -1)
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
        self._examiner, self._threads = env, threads
        self._members: list[_Member] = []
        self._hired = self._pieces = self._failed_starts = 0
        self._again: deque[_Piece] = deque()
        self._tick, self._name = no_tick, ""
        self._ray = import_ray(self.cluster.address)
        self.size = 0
        self._connection: Connection = "found"

    def __enter__(self) -> RayParallel:
        self._digest = self._examiner.backbone.base_digest()
        self._connection = connect(self._ray, self.config)
        try:
            self.size = self.cluster.workers or workers_for(self._ray.cluster_resources(), self.cluster.cpus, self.gpus)
            self._check_room()
            asked = {"workers": self.size, "cpus": self.cluster.cpus, "gpus": self.gpus}
            self.record({"event": "opened", **asked, "ray": self._ray.__version__})
            for _ in range(self.size):
                self._hire()
            while any(not member.about for member in self._members):
                for _ in self._finished():
                    pass
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
            self._ray.wait([m.actor.close.remote() for m in self._members if m.ref is None] or [], timeout=CLOSE_S)
        for member in self._members:
            with suppress(Exception):
                self._ray.kill(member.actor, no_restart=True)
        self._members = []
        if self._connection != "found":
            self._ray.shutdown()

    def stream(
        self, work: Callable[..., Any], common: Task, queue: deque[tuple[Any, Task]], tick: Tick = no_tick
    ) -> Iterator[tuple[Any, Any]]:
        """See `parallel.Parallel`. Results come as they are ready; pieces are handed out one by one to whoever is free."""
        if self._examiner.backbone.device.type == "cuda":  # a worker may share this GPU
            self._examiner.sampler.release()
            release_memory()
        shared = self._ray.put(common)
        again = self._again = deque()
        self._tick, self._name = tick, work.__name__
        try:
            while queue or again or any(member.piece for member in self._members):
                for member in self._members:
                    if member.ref is None and (again or queue):
                        self._give(
                            member, again.popleft() if again else self._new_piece(*queue.popleft()), work, shared
                        )
                yield from self._finished()
        finally:
            for member in self._members:
                member.piece = None  # nobody waits for it any more

    def _new_piece(self, key: Any, task: Task) -> _Piece:
        self._pieces += 1
        return _Piece(self._pieces, key, task)

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
        found = []
        for member in busy:
            if member.ref in ready:
                found += self._collect(member)
        elapsed = min(time.monotonic() - started, 2 * BEAT_S)  # a driver that slept has heard nothing
        for member in [member for member in self._members if member.ref is not None]:
            self._listen(member, elapsed)
        return found

    def _collect(self, member: _Member) -> list[tuple[Any, Any]]:
        """What a worker that is done, or dead, leaves: [(key, result)] or []."""
        try:
            reply: Reply = self._ray.get(member.ref)
        except self._ray.exceptions.RayTaskError as error:  # it could not even begin: something does not unpickle
            raise WorkerBug(str(error)) from error
        except self._ray.exceptions.RayError as error:
            self._lose(member, in_short(error))
            return []
        member.ref, member.pulse, piece = None, None, member.piece
        member.piece = None
        for line in reply.notes:
            self.say(f"worker {member.number}: {line}")
        if not member.about and reply.failure is None:
            self._welcome(member, reply)
            return []
        if reply.failure is not None and reply.failure.kind == DEVICE:
            member.piece = piece
            self._lose(member, reply.failure.message)
            return []
        if piece is None and member.about:
            return []  # done for a caller that has gone
        if reply.failure is not None:
            raise failure_of(reply.failure)
        assert piece is not None
        self._report(piece, reply.ticks)
        if self.meter is not None:
            self.meter.tokens += reply.tokens
        self._note("done", member, piece, seconds=round(reply.seconds, 3), tokens=reply.tokens)
        return [(piece.key, reply.value)]

    def _listen(self, member: _Member, elapsed: float) -> None:
        """Ask for a sign of life; kill a worker that gives none for too long."""
        member.silent_s += elapsed
        limit = self.cluster.silence_s if member.about else self.cluster.start_s
        if member.pulse is None:
            member.pulse = member.actor.pulse.remote()
        elif self._ray.wait([member.pulse], timeout=0)[0]:
            with suppress(self._ray.exceptions.RayError):  # then its work fails too, and says why
                ticks, life = self._ray.get(member.pulse)
                if (member.number, life) != member.life:
                    member.life = (member.number, life)
                    member.silent_s = 0.0 if member.about else member.silent_s
                self._report(member.piece, ticks)
            member.pulse = None
        if member.silent_s > limit:
            key = "cluster.silence_s" if member.about else "cluster.start_s"
            self._lose(member, f"no sign of progress for {limit:g} s ({key})" if member.about else self._pending(limit))

    def _report(self, piece: _Piece | None, ticks: int) -> None:
        """Tell of the steps of a piece that are new; a piece that is done again tells of none twice."""
        for _ in range(ticks - piece.ticks if piece is not None else 0):
            self._tick()
        if piece is not None:
            piece.ticks = max(piece.ticks, ticks)

    def _pending(self, limit: float) -> str:
        return (
            f"not started after {limit:g} s (cluster.start_s); it asks for {self.cluster.cpus:g} cores and "
            f"{self.gpus:g} GPUs, free are {free_words(self._ray.available_resources())}"
        )

    def _hire(self) -> None:
        """Begin to start a worker."""
        self._hired += 1
        order = Order(self._worker_config().resolved(), os.getcwd())
        options = {"num_cpus": self.cluster.cpus, "num_gpus": self.gpus, "max_concurrency": 2, "max_restarts": 0}
        try:
            actor = self._ray.remote(Worker).options(**options).remote(order)
            self._members.append(_Member(self._hired, actor, actor.open.remote()))
        except (ImportError, AttributeError) as error:  # Ray's client has the class imported over there first
            raise WorkersLost(
                f"the cluster cannot import this package: {type(error).__name__}: {error}. Install soar-rl {VERSION} "
                "with the extras train and ray on every node, the head included"
            ) from error

    def _worker_config(self) -> Config:
        """The run's config as a worker needs it: its share of the cores for verifying, whichever GPU Ray gives it."""
        model, problems = self.config.model, self.config.problems
        if model.device.startswith("cuda"):
            model = model.model_copy(update={"device": "cuda"})
        elif not self.gpus:
            model = model.model_copy(update={"device": "cpu"})
        verifiers = problems.verify_workers or max(1, min(8, int(self.cluster.cpus)))
        problems = problems.model_copy(update={"verify_workers": verifiers})
        return self.config.model_copy(update={"model": model, "problems": problems, "threads": self._threads})

    def _welcome(self, member: _Member, reply: Reply) -> None:
        """A worker that has loaded the model. Raises WorkersLost when it is another model."""
        about = reply.value
        if about["model_sha256"] != self._digest:
            raise WorkersLost(
                f"worker {member.number} on {about['host']} loaded other weights than this process (sha256 "
                f"{about['model_sha256'][:12]} there, {self._digest[:12]} here); give both the same model.path and "
                "model.revision, and set model.dtype where one has a GPU and the other has none"
            )
        own = versions()
        other = [f"{name} {about['versions'][name]}" for name in SAME if about["versions"][name] != own[name]]
        if other:
            self.say(f"worker {member.number} on {about['host']} has {', '.join(other)}: last digits may differ")
        member.about, self._failed_starts = about, 0
        self._note(
            "started", member, None, seconds=round(reply.seconds, 3), **{k: about[k] for k in ("host", "pid", "device")}
        )

    def _lose(self, member: _Member, reason: str) -> None:
        """A worker is gone, or is made to go: its work is queued again, and a new one is hired."""
        piece, opened = member.piece, bool(member.about)
        self._note("lost", member, piece, reason=reason)
        self._kill(member)
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
        self._failed_starts += not opened
        if self._failed_starts <= self.cluster.retries:
            self._hire()
        elif not any(other.about for other in self._members):
            raise WorkersLost(f"no worker could be started, at last: {reason}")
        else:
            self.say(f"going on with {len(self._members)} workers")

    def _kill(self, member: _Member) -> None:
        with suppress(Exception):
            self._ray.kill(member.actor, no_restart=True)
        if member.about.get("host") == platform.node():  # Ray asks, and a stopped process does not answer
            with suppress(ProcessLookupError, PermissionError):
                os.kill(member.about["pid"], signal.SIGKILL)

    def _note(self, event: str, member: _Member, piece: _Piece | None, **more: Any) -> None:
        known = {"piece": piece.number, "work": self._name} if piece is not None else {}
        self.record({"event": event, "worker": member.number, **known, **more})

    def _check_room(self) -> None:
        """Raises ConfigError when the cluster will never hold the workers."""
        if not self.size:
            raise ConfigError(
                f"cluster.address = {self.cluster.address!r}: the cluster has {free_words(self._ray.cluster_resources())}, "
                f"a worker asks for {self.cluster.cpus:g} cores and {self.gpus:g} GPUs; lower cluster.cpus or cluster.gpus"
            )
        have = self._ray.cluster_resources()
        room = workers_for(have, self.cluster.cpus, self.gpus)
        if self._connection == "started" and room < self.size:
            raise ConfigError(
                f"cluster.workers = {self.size}: each asks for {self.cluster.cpus:g} cores and {self.gpus:g} GPUs, this "
                f"machine has {free_words(have)}, so {room} fit; lower cluster.workers, cluster.cpus or cluster.gpus"
            )


def failure_of(failure: Failure) -> Exception:
    """The error in this process that stands for one in a worker: a UserError of the same class, with the same message."""
    if failure.kind == MEMORY:
        return MemoryError(f"in a worker: {failure.message}")
    if failure.kind == BUG:
        return WorkerBug(failure.message)
    assert failure.kind == USER
    waiting: list[type[UserError]] = [UserError]
    while waiting:
        kind = waiting.pop()
        if kind.__name__ == failure.name:
            error = kind.__new__(kind)
            Exception.__init__(error, failure.message)
            return error
        waiting += kind.__subclasses__()
    return UserError(failure.message)


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
