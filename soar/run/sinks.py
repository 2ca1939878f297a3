"""The run's numbers sent on to TensorBoard, Weights & Biases or trackio. `metrics.jsonl` stays the truth.

A sink gets the events that were just appended to `metrics.jsonl`, as flat numbers. Names are those of TRL where they mean
the same (`reward`, `reward_std`, `kl`, `completions/mean_length`, `frac_reward_zero_std` ...), under the policy that they
belong to: `teacher/`, `student/`, `hard_only/`, `pq/`, `eval/`. A sink that fails is named once and left out from then
on; it never stops a run. Left out: texts and tables, which the report has.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from soar.config import Config
from soar.files import scrub
from soar.types import UserError

Row = dict[str, Any]
Values = dict[str, float]

RENAMED = {"reward_mean": "reward"}
PLAIN = (
    "baseline_pass_rate", "best_pass_rate", "window_mean", "distinct_share", "vendi", "failed_students",
    "student_rollouts",
)  # fmt: skip
TEACHER = {"teacher_kl": "kl", "teacher_grad_norm": "grad_norm", "teacher_logprob_gap": "logprob_gap"}


class LoggerError(UserError):
    """A sink that was asked for is not installed."""


def _numbers(row: Row) -> Values:
    return {
        RENAMED.get(key, key): float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and key != "step"
    }


def _prefixed(prefix: str, values: Values) -> Values:
    return {f"{prefix}/{key}": value for key, value in values.items()}


def flatten(event: Row) -> tuple[str, int, Values] | None:
    """(group, step, values) of an event of metrics.jsonl; None for an event without numbers over steps (alarms)."""
    kind, step = event.get("event"), event.get("step")
    if kind == "outer_step" and isinstance(step, int):
        rewards = [r for r in event.get("reward_G", []) if r is not None]
        values: Values = {}
        if rewards:
            centre = math.fsum(rewards) / len(rewards)
            values["teacher/reward"] = centre
            if len(rewards) > 1:
                spread = math.fsum((r - centre) ** 2 for r in rewards) / (len(rewards) - 1)
                values["teacher/reward_std"] = math.sqrt(spread)
        known = _numbers(event)
        values |= {f"teacher/{name}": known[key] for key, name in TEACHER.items() if key in known}
        values |= _prefixed("outer", {key: known[key] for key in PLAIN if key in known})
        values["outer/promoted"] = float(event.get("promoted") is True)
        if known.get("sampled"):
            values["teacher/accepted_share"] = known["accepted"] / known["sampled"]
        values |= _prefixed("student", _numbers(event.get("student_last") or {}))
        return "outer_step", step, values
    if kind == "arm_step" and isinstance(step, int):
        return str(event["arm"]), step, _prefixed(str(event["arm"]), _numbers(event))
    if kind == "evaluation":
        shares = _numbers({f"pass@{k}": v for k, v in event.get("pass_at", {}).items()})
        return "evaluation", 0, _prefixed(f"eval/{event['arm']}", shares)
    if kind == "screen":
        return "screen", 0, _prefixed("screen", _numbers(event))
    return None


class TensorBoard:
    """Event files under `folder`, one graph a name, by torch's writer."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, group: str, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of wandb (in `folder`/wandb; offline where WANDB_MODE says so) or of trackio, which share their interface.

    Rows carry `steps/GROUP`, a step axis for each group where the tool can have more than one.
    """

    def __init__(self, kind: str, folder: Path, project: str, name: str, config: Row) -> None:
        more = {"dir": str(folder)} if kind == "wandb" else {}
        self._run = importlib.import_module(kind).init(project=project, name=name, config=config, **more)
        self._axes, self._named = kind == "wandb", set[str]()

    def log(self, group: str, step: int, values: Values) -> None:
        for name in values.keys() - self._named if self._axes else ():
            self._run.define_metric(name, step_metric=f"steps/{group}")
            self._named.add(name)
        self._run.log({**values, f"steps/{group}": step})

    def close(self) -> None:
        self._run.finish()


def check_installed(kinds: Sequence[str]) -> None:
    """Raises LoggerError for a sink in `log.sinks` whose package is absent, before anything is computed or written."""
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise LoggerError(
                f"log.sinks names {kind!r}, which is not installed: "
                f"pip install 'soar-rl[{kind}]', or take it out of log.sinks"
            )


def _open(kind: str, folder: Path, project: str, name: str, config: Row) -> TensorBoard | Tracker:
    return TensorBoard(folder / kind) if kind == "tensorboard" else Tracker(kind, folder, project, name, config)


class Loggers:
    """The sinks of a run behind one call. say: where a failing sink is named, once."""

    def __init__(self, sinks: dict[str, Any], say: Callable[[str], None]) -> None:
        self._sinks, self._say = dict(sinks), say

    def __call__(self, events: Sequence[Row]) -> None:
        """Send events that were written to metrics.jsonl."""
        for event in events:
            flat = flatten(event)
            if flat is not None and flat[2]:
                self._each(lambda sink, flat=flat: sink.log(*flat))  # type: ignore[misc]

    def close(self) -> None:
        """Close every sink that still works."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _each(self, action: Callable[[Any], None]) -> None:
        for kind, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:  # a sink is foreign code; the run goes on without it
                del self._sinks[kind]
                self._say(
                    f"log.sinks: {kind} failed and is left out from here on; metrics.jsonl has everything "
                    f"({type(error).__name__}: {error})"
                )


def open_loggers(config: Config, out: Path, say: Callable[[str], None]) -> Loggers:
    """The sinks of `log.sinks`; one that fails to start is named through `say` and left out.

    They leave this machine, so they get no secret that a config may hold.
    """
    sinks: dict[str, Any] = {}
    for kind in config.log.sinks:
        try:
            sinks[kind] = _open(kind, out, config.log.project, scrub(config.name), scrub(config.resolved()))
        except Exception as error:  # whatever a sink's start runs into, the run itself does not need it
            say(scrub(f"log.sinks: {kind} could not be started and is left out: {type(error).__name__}: {error}"))
    return Loggers(sinks, lambda text: say(scrub(text)))
