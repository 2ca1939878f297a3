"""What runs in a worker process: the frozen base model with its own sampler and verifier, and the pieces of work.

Nothing here imports Ray. `ray_crew` makes an actor of `Worker`; the actor answers `pulse` in a second thread while it
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
from soar.loop.parallel import Task
from soar.loop.rollout import RolloutEnv
from soar.run.folder import versions
from soar.run.interrupts import TokenMeter
from soar.run.setup import choose_threads, open_env
from soar.types import UserError

USER, MEMORY, DEVICE, BUG = "user", "memory", "device", "bug"


@dataclass(frozen=True)
class Failure:
    """An error in words. kind: USER (name is the class of a UserError), MEMORY, DEVICE or BUG (message: the traceback)."""

    kind: str
    name: str
    message: str


@dataclass(frozen=True)
class Reply:
    """What a worker sends back: the result or the failure, tokens sampled, seconds spent, warnings on the way, steps."""

    value: Any = None
    failure: Failure | None = None
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    ticks: int = 0


@dataclass(frozen=True)
class Order:
    """What a worker is told when it starts. config: resolved; cwd: folder in which relative paths are looked up."""

    config: dict[str, Any]
    cwd: str


class Worker:
    """One worker process. `open` before `work`; `pulse` at any time.

    ticks: steps done in the piece of work in hand; life: a number that grows with every sign of progress.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.ticks = self.life = 0
        self._examiner: RolloutEnv | None = None
        self._meter: TokenMeter | None = None
        self._closing = ExitStack()

    def open(self) -> Reply:
        """Load the model. The value says where this worker is and what it holds."""
        return self._guarded(self._open)

    def _open(self) -> dict[str, Any]:
        _hide_main()
        if Path(self.order.cwd).is_dir():
            os.chdir(self.order.cwd)
        config = build(self.order.config, "the config of the run")
        env = self._closing.enter_context(open_env(config))
        choose_threads(env.backbone, config.threads)
        self._meter = TokenMeter(_Living(env.sampler, self._alive))
        env.sampler = self._meter
        self._examiner = env
        return {
            "pid": os.getpid(),
            "host": platform.node(),
            "device": _device_name(env),
            "model_sha256": env.backbone.base_digest(),
            "versions": versions(),
        }

    def work(self, work: Callable[..., Any], common: Task, task: Task) -> Reply:
        """One piece of work; the value is what `work` returns."""
        self.ticks = 0
        return self._guarded(lambda: work(self._examiner, self._tick, *common, *task))

    def pulse(self) -> tuple[int, int]:
        """(ticks, life) now."""
        return self.ticks, self.life

    def close(self) -> None:
        """End the verifier's processes."""
        self._closing.close()

    def _alive(self) -> None:
        self.life += 1

    def _tick(self) -> None:
        self.ticks += 1
        self.life += 1

    def _guarded(self, function: Callable[[], Any]) -> Reply:
        started, before = time.monotonic(), self._meter.tokens if self._meter is not None else 0
        value, failure = None, None
        with _Notes() as notes:
            try:
                value = function()
            except Exception as error:  # whatever went wrong, the driver must hear of it
                failure = _failure(error)
        self._alive()
        tokens = self._meter.tokens - before if self._meter is not None else 0
        return Reply(value, failure, tokens, time.monotonic() - started, notes.lines, self.ticks)


class _Living:
    """A sampler whose calls are signs of life."""

    def __init__(self, sampler: Any, alive: Callable[[], None]) -> None:
        self.sampler, self.alive = sampler, alive

    def sample(self, *arguments: Any, **named: Any) -> Any:
        self.alive()
        rollouts = self.sampler.sample(*arguments, **named)
        self.alive()
        return rollouts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


class _Notes(logging.Handler):
    """Collects the warnings of this package within a block, so that a person hears of them where the run is watched."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._catching = warnings.catch_warnings(record=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Notes:
        logging.getLogger("soar").addHandler(self)
        self._warned = self._catching.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: object) -> None:
        self._catching.__exit__(None, None, None)
        logging.getLogger("soar").removeHandler(self)
        package = str(Path(__file__).parent.parent)
        self.lines += [str(found.message) for found in self._warned or [] if found.filename.startswith(package)]


def _failure(error: Exception) -> Failure:
    name = type(error).__name__
    if isinstance(error, UserError):
        return Failure(USER, name, str(error))
    if is_out_of_memory(error):
        return Failure(MEMORY, name, str(error))
    if is_device_lost(error):
        return Failure(DEVICE, name, str(error))
    return Failure(BUG, name, "".join(traceback.format_exception(error)))


def _hide_main() -> None:
    """Keep verifier processes, which import the main script as multiprocessing does, from importing Ray's."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__


def _device_name(env: RolloutEnv) -> str:
    device = env.backbone.device
    if device.type != "cuda":
        return device.type
    import torch

    return f"{torch.cuda.get_device_name(device)}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
