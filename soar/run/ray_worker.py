"""What runs in a worker process: the frozen base model with its own sampler and verifier, and the pieces of work.

Nothing here imports Ray. `soar.run.ray` makes an actor of `Worker`; the actor answers `pulse` in a second thread while it
works. Errors come back as words, never as pickled exceptions.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar.config import build
from soar.engine.memory import is_device_lost, is_out_of_memory
from soar.engine.rollouts import unheard
from soar.loop.parallel import Task
from soar.loop.rollout import RolloutEnv
from soar.run.folder import versions
from soar.run.interrupts import TokenMeter
from soar.run.setup import choose_threads, open_env
from soar.types import UserError

USER, MEMORY, DEVICE, BUG = "user", "memory", "device", "bug"


class WorkerBug(Exception):
    """An error in a worker that is no user's; the message is its traceback."""


@dataclass(frozen=True)
class Failure:
    """An error in words. kind: USER (name is the class of a UserError), MEMORY, DEVICE or BUG (message: the traceback)."""

    kind: str
    name: str
    message: str


def failure_in(error: Exception) -> Failure:
    """An error of this process in words."""
    name = type(error).__name__
    if isinstance(error, UserError):
        return Failure(USER, name, str(error))
    if is_out_of_memory(error):
        return Failure(MEMORY, name, str(error))
    if is_device_lost(error):
        return Failure(DEVICE, name, str(error))
    return Failure(BUG, name, "".join(traceback.format_exception(error)))


def failure_of(failure: Failure) -> Exception:
    """The error in this process that stands for one in a worker: a UserError of the same class, with the same message."""
    if failure.kind != USER:
        memory = failure.kind == MEMORY
        return MemoryError(f"in a worker: {failure.message}") if memory else WorkerBug(failure.message)
    classes: list[type[UserError]] = [UserError]
    for kind in classes:  # grows as it goes
        if kind.__name__ == failure.name:
            error = kind.__new__(kind)
            Exception.__init__(error, failure.message)
            return error
        classes += kind.__subclasses__()
    return UserError(failure.message)


@dataclass(frozen=True)
class Reply:
    """What a worker sends back: the result or the failure, tokens sampled, seconds spent, warnings on the way, steps."""

    value: Any = None
    failure: Failure | None = None
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    ticks: int = 0


class Worker:
    """One worker process. `open` before `work`; `pulse` at any time.

    config: resolved; cwd: folder in which relative paths are looked up. ticks: steps done in the piece of work in hand;
    life: a number that grows with every sign of progress.
    """

    def __init__(self, config: dict[str, Any], cwd: str) -> None:
        self.config, self.cwd = config, cwd
        self.ticks = self.life = 0
        self._env: RolloutEnv | None = None
        self._meter = TokenMeter(None)
        self._closing = ExitStack()

    def open(self) -> Reply:
        """Load the model. The value says where this worker is and what it holds."""
        return self._guarded(self._open)

    def _open(self) -> dict[str, Any]:
        _hide_main()
        if Path(self.cwd).is_dir():
            os.chdir(self.cwd)
        config = build(self.config, "the config of the run")
        env = self._closing.enter_context(open_env(config))
        choose_threads(env.backbone, config.threads)
        env.sampler = self._meter = _LivingMeter(env.sampler, self)
        self._env = env
        device = env.backbone.device.type
        if device == "cuda":
            import torch

            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            device = f"{torch.cuda.get_device_name(env.backbone.device)}, CUDA_VISIBLE_DEVICES={visible}"
        where = {"pid": os.getpid(), "host": platform.node(), "device": device}
        return {**where, "model_sha256": env.backbone.base_digest(), "versions": versions()}

    def work(self, work: Callable[..., Any], common: Task, task: Task) -> Reply:
        """One piece of work; the value is what `work` returns."""
        self.ticks = 0
        self._meter.on_tokens = unheard
        return self._guarded(lambda: work(self._env, self._tick, *common, *task))

    def pulse(self) -> tuple[int, int]:
        """(ticks, life) now."""
        return self.ticks, self.life

    def close(self) -> None:
        """End the verifier's processes."""
        self._closing.close()

    def _tick(self, tokens: int = 0) -> None:
        self.ticks += 1
        self.life += 1

    def _guarded(self, function: Callable[[], Any]) -> Reply:
        started, before = time.monotonic(), self._meter.tokens
        value, failure, logged, logger = None, None, _Lines(logging.WARNING), logging.getLogger("soar")
        logger.addHandler(logged)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                value = function()
            except Exception as error:  # whatever went wrong, the driver must hear of it
                failure = failure_in(error)
        logger.removeHandler(logged)
        package = str(Path(__file__).parent.parent)
        notes = logged.lines + [str(each.message) for each in warned if each.filename.startswith(package)]
        self.life += 1
        return Reply(value, failure, self._meter.tokens - before, time.monotonic() - started, notes, self.ticks)


class _LivingMeter(TokenMeter):
    """Counts the tokens of a sampler whose calls are signs of life."""

    def __init__(self, sampler: Any, worker: Worker) -> None:
        super().__init__(sampler)
        self.worker = worker

    def sample(self, *arguments: Any, **named: Any) -> Any:
        self.worker.life += 1
        rollouts = super().sample(*arguments, **named)
        self.worker.life += 1
        return rollouts


class _Lines(logging.Handler):
    """Collects messages, so that a person hears of them where the run is watched."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _hide_main() -> None:
    """Keep verifier processes, which import the main script as multiprocessing does, from importing Ray's."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__
