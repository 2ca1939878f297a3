"""Worker processes run by Ray: each holds the frozen base model; pieces of work go out, results come back.

Only adapters, problems and verdicts travel. A worker that dies, loses its GPU or stands still is started again by Ray and
does its piece again, with the same seeds and so the same result. What workers print is in Ray's logs. Left out: elastic
growth, one model over several devices.
"""

import os
import platform
import re
import signal
import socket
import time
from collections import deque, namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any, Self

from soar.config import Config, ConfigError
from soar.files import scrub
from soar.loop.parallel import Parallel, Task, Tick, no_tick
from soar.loop.rollout import RolloutEnv
from soar.run.interrupts import is_device_lost
from soar.run.setup import cores_of, open_env
from soar.types import VERSION, Interrupted, UserError, import_extra

REACH_S = 10.0  # how long the head of a cluster may take to answer a first knock
START_S = 600.0  # a worker that has not loaded the model after so long is given up
STILL_S, STILL_TIMES = 600.0, 10  # without a result for longer, and for so many times the longest, workers are killed
NO_RAY = "cluster.workers and cluster.address need Ray, which is not installed: pip install 'soar-rl[ray]'"

# What a worker sends back: who it is, key and result of the piece, tokens sampled, seconds, steps done.
Reply = namedtuple("Reply", "number pid key value tokens seconds ticks")


class Worker:
    """One worker process: base model, sampler and verifier, loaded by the first call, also after a restart. cwd: folder in
    which relative paths are looked up. digest: sha256 of the driver's base weights, which must be the same.
    """

    def __init__(self, number: int, config: Config, cwd: str, digest: str) -> None:
        self.number, self.config, self.cwd, self.digest = number, config, cwd, digest

    @cached_property
    def env(self) -> RolloutEnv:
        """Raises Interrupted for other weights."""
        if os.path.isdir(self.cwd):
            os.chdir(self.cwd)
        env = open_env(self.config).__enter__()  # left with the process
        if (here := env.backbone.base_digest()) != self.digest:
            found = f"loaded other weights than the run's process (sha256 {here[:12]} there, {self.digest[:12]} here)"
            advice = "give both the same model.path and model.revision, and set model.dtype where only one has a GPU"
            raise Interrupted(f"a worker on {platform.node()} {found}; {advice}")
        return env

    def open(self) -> tuple[int, str]:
        """Process, and where it is."""
        return os.getpid(), f"{platform.node()} ({self.env.backbone.device.type})"

    def work(self, work: Callable[..., Any], key: Any, given: tuple[dict[str, Any], Task], task: Task) -> Reply:
        """One piece of work; the value is what `work` returns. A process whose GPU is lost ends, so that it is replaced."""
        self.env.shared, common = given  # of the driver's env, and what all pieces have in common
        self.env.sampler.on_tokens = no_tick
        ticks: list[None] = []
        started, before = time.monotonic(), self.env.tokens
        try:
            value = work(self.env, lambda tokens=0: ticks.append(None), *common, *task)
        except RuntimeError as error:
            if is_device_lost(error):
                os._exit(1)
            raise
        tokens, seconds = self.env.tokens - before, time.monotonic() - started
        return Reply(self.number, os.getpid(), key, value, tokens, seconds, len(ticks))


def check_cluster(config: Config) -> None:
    """Raises ConfigError when Ray is missing or nothing listens at `cluster.address`: Ray itself says so in minutes."""
    address = config.cluster.address
    if not config.cluster.workers and not address:
        return
    import_extra("ray", ConfigError, NO_RAY)
    host, _, port = address.removeprefix("ray://").rpartition(":")  # of Ray's client, outside of the cluster
    if not host or not port.isdigit():
        return  # auto, or a form that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        found = f"cannot be reached: nothing answers at {host}, port {port} ({error})"
        advice = "Start the cluster there with `ray start --head`, and give the address and port that it prints"
        raise ConfigError(f"cluster.address = {address!r} {found}. {advice}") from error


def connect(ray: Any, config: Config) -> bool:
    """Join the cluster of cluster.address, or start one here; False where this process is in one. Raises ConfigError."""
    if ray.is_initialized():
        return False
    address, cores = config.cluster.address, max(os.cpu_count() or 1, config.cluster.workers)
    own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, configure_logging=False, **({} if address else own))
    except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:  # Ray may end the process
        where = f"cluster.address = {address!r}" if address else "Ray"
        token = "a Ray that asks for a token wants RAY_AUTH_MODE=token here, and its RAY_AUTH_TOKEN"
        advice = f"It is started with `ray start --head`; {token}"
        raise ConfigError(f"{where} cannot be reached: {in_short(error)}. {advice}") from error
    finally:  # Ray puts a handler of its own there when it starts; the run's counts
        with suppress(ValueError, TypeError):  # not the main thread, which cannot listen anyway
            signal.signal(signal.SIGTERM, handler)
    return True


def in_short(error: BaseException) -> str:
    """The first and the last line of an error that say something: what Ray saw, and what it came from."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray's colours
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"[:500]


class RayParallel:
    """See the module text. Use as a context manager; workers end with it. env, threads: the driver's own; every worker has
    its base model and computes as this process would. say: lines for a person. Raises ConfigError when Ray is missing or the
    cluster cannot hold the workers, Interrupted when one does not start, and what they raise while they load the model.
    """

    def __init__(self, config: Config, env: RolloutEnv, threads: int, say: Callable[[str], None]) -> None:
        self.config, self.cluster, self.say = config, config.cluster, say
        self.gpus = self.cluster.gpus if self.cluster.gpus is not None else float(env.backbone.device.type == "cuda")
        self.actors: list[Any] = []
        self.pids: dict[int, int] = {}  # number of a worker -> its process
        self._longest: dict[str, float] = {}  # seconds of a finished piece by kind; without one yet: no limit
        self._open: list[str] = []  # kinds of the streams that go on: a worker may be at a piece of another one first
        self._env, self._threads, self._connected = env, threads, False
        self._ray = import_extra("ray", ConfigError, NO_RAY)

    def __enter__(self) -> Self:
        with ExitStack() as failing:
            failing.push(self)
            self._connected = connect(self._ray, self.config)
            there, model, problems = self._ray.cluster_resources(), self.config.model, self.config.problems
            cores = int(there.get("CPU", 0))
            room = min(cores, int(there.get("GPU", 0) / self.gpus)) if self.gpus else cores
            self.size = self.cluster.workers or room
            if not self.size or (room < self.size and not self.cluster.address):  # one that is joined may still grow
                fit = f"{self._asked(there)}, so {room} fit; lower it or cluster.gpus"
                raise ConfigError(f"cluster.workers = {self.size}: {fit}")
            device = "cuda" if model.device.startswith("cuda") else model.device if self.gpus else "cpu"
            model = model.model_copy(update={"device": device})  # cuda: whichever GPU Ray gives it
            verifiers = problems.verify_workers or max(1, min(8, cores // self.size))
            problems = problems.model_copy(update={"verify_workers": verifiers})
            config = self.config.model_copy(update={"model": model, "problems": problems, "threads": self._threads})
            try:
                options: dict[str, Any] = {"num_cpus": 1, "num_gpus": self.gpus, "max_restarts": self.cluster.retries}
                kind = self._ray.remote(**options, max_task_retries=-1)(Worker)
                given = (config, os.getcwd(), self._env.backbone.base_digest())
                self.actors = [kind.remote(number + 1, *given) for number in range(self.size)]
            except (ImportError, AttributeError) as error:  # Ray's client has the class imported over there first
                advice = f"Install soar-rl {VERSION} with the extras train and ray on every node, the head included"
                found = f"the cluster cannot import this package: {type(error).__name__}: {error}"
                raise Interrupted(f"{found}. {advice}") from error
            opening = [actor.open.remote() for actor in self.actors]
            if late := self._ray.wait(opening, num_returns=len(opening), timeout=START_S)[1]:
                free = f"{self._asked(self._ray.available_resources())} free; lower cluster.workers or cluster.gpus"
                raise Interrupted(f"{len(late)} of {self.size} workers did not start in {START_S:g} s: {free}")
            with self._errors():
                pids, places = zip(*self._ray.get(opening), strict=True)
            self.pids = dict(enumerate(pids, start=1))
            self.say(f"{self.size} workers on {', '.join(sorted(set(places)))}")
            failing.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            with suppress(Exception):  # a cluster that is gone cannot be told
                self._ray.kill(actor, no_restart=True)
        if self._connected:
            self._ray.shutdown()

    def _asked(self, resources: dict[str, float]) -> str:
        free = f"{resources.get('CPU', 0.0):g} cores and {resources.get('GPU', 0.0):g} GPUs"
        return f"a worker asks for 1 core and {self.gpus:g} GPUs, there are {free}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the work raised, if it is a user's error or memory, as it was; workers that cannot be had as Interrupted."""
        try:
            yield
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (UserError, MemoryError, RuntimeError)):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            found = f"a worker was lost and started {self.cluster.retries} times (cluster.retries)"
            advice = "Free memory on the workers or lower model.chunk, then continue with --resume"
            raise Interrupted(f"{found}, at last: {in_short(error)}. {advice}") from error

    def stream(
        self, work: Callable[..., Any], common: Task, queue: deque[tuple[Any, Task]], tick: Tick = no_tick
    ) -> Iterator[tuple[Any, Any]]:
        """(key, work(env, tick, *common, *task)) of every (key, task), as they are ready; the queue may grow meanwhile."""
        self._env.release()  # a worker may share this GPU
        ray, name, free, loading = self._ray, work.__name__, list(self.actors), 0.0
        given = ray.put((self._env.shared, common))  # shared is known since the problems were loaded, after the workers
        busy: dict[Any, Any] = {}
        self._open.append(name)
        try:
            while queue or busy:
                while queue and free:
                    (key, task), actor = queue.popleft(), free.pop()
                    busy[actor.work.remote(work, key, given, ray.put(task))] = actor  # put: too large for Ray's client
                limit = max(STILL_S, STILL_TIMES * max(self._longest.get(kind, float("inf")) for kind in self._open))
                done: list[Any] = []
                until = time.monotonic() + limit + loading
                with self._errors():
                    while not done and time.monotonic() < until:  # in seconds, between which a signal is heard
                        done, _ = ray.wait(list(busy), timeout=1.0)
                    reply = ray.get(done[0]) if done else None
                if reply is None:
                    self.say(f"no worker has given a result for {limit:.0f} s: they are killed and started again")
                    for actor in self.actors:
                        ray.kill(actor, no_restart=False)
                    loading = START_S  # their next processes load the model first
                    continue
                free.append(busy.pop(done[0]))
                loading = 0.0
                self._longest[name] = max(self._longest.get(name, 0.0), reply.seconds)
                if reply.pid != self.pids[reply.number]:
                    lost = f"worker {reply.number} was lost and started again"
                    self.say(f"{lost}; what it was doing ({name}) is done again")
                    self.pids[reply.number] = reply.pid
                for _ in range(reply.ticks):
                    tick()
                self._env.tokens += reply.tokens
                yield reply.key, reply.value
            if self.gpus and self._open == [name]:  # this process may share one with a worker
                with self._errors():
                    ray.get([a.work.remote(lambda env, *_: env.release(), None, given, ()) for a in self.actors])
        finally:
            self._open.remove(name)


def open_parallel(config: Config, env: RolloutEnv, say: Callable[[str], None]) -> AbstractContextManager[Parallel]:
    """The parallel that `cluster` asks for, None when it asks for none."""
    if not config.cluster.workers and not config.cluster.address:
        return nullcontext()
    return RayParallel(config, env, cores_of(config.threads), lambda text: say(scrub(text)))
