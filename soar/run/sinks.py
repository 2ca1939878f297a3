"""The run's numbers sent on to TensorBoard, Weights & Biases or trackio. `metrics.jsonl` stays the truth.

A sink gets what was just appended: the events of `metrics.jsonl` as flat numbers, the rows of `rollouts.jsonl` as a table.
Names are those of TRL where they mean the same (`reward`, `reward_std`, `kl`, `completions/mean_length`,
`frac_reward_zero_std` ...), under the policy that they belong to: `teacher/`, `student/`, `hard_only/`, `pq/`, `eval/`. A
sink that fails is named once and left out from then on; it never stops a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

from soar.config import Config
from soar.files import Row, scrub
from soar.types import UserError

Values = dict[str, float]

PLAIN = (
    "baseline_pass_rate", "best_pass_rate", "window_mean", "distinct_share", "vendi", "failed_students",
    "student_rollouts",
)  # fmt: skip
TEACHER = {"teacher_kl": "kl", "teacher_grad_norm": "grad_norm", "teacher_logprob_gap": "logprob_gap"}


class LoggerError(UserError):
    """A sink that was asked for is not installed."""


def _numbers(prefix: str, row: Row) -> Values:
    numbers = {key: value for key, value in row.items() if type(value) in (int, float) and math.isfinite(value)}
    names = {"reward_mean": "reward"}
    return {f"{prefix}/{names.get(key, key)}": float(value) for key, value in numbers.items() if key != "step"}


def flatten(event: Row) -> tuple[str, int, Values] | None:
    """(group, step, values) of an event of metrics.jsonl; None for an event without numbers over steps (alarms)."""
    kind, step = event.get("event"), event.get("step")
    if kind == "outer_step" and isinstance(step, int):
        rewards = [r for r in event.get("reward_G", []) if r is not None]
        teacher = {name: event.get(key) for key, name in TEACHER.items()}
        teacher |= {"reward": statistics.fmean(rewards)} if rewards else {}
        teacher |= {"reward_std": statistics.stdev(rewards)} if len(rewards) > 1 else {}
        teacher |= {"accepted_share": event["accepted"] / event["sampled"]} if event.get("sampled") else {}
        outer = {**{key: event.get(key) for key in PLAIN}, "promoted": int(event.get("promoted") is True)}
        students = _numbers("student", event.get("student_last") or {})
        return "outer_step", step, {**_numbers("teacher", teacher), **_numbers("outer", outer), **students}
    if kind == "arm_step" and isinstance(step, int):
        return str(event["arm"]), step, _numbers(str(event["arm"]), event)
    if kind == "evaluation":
        pass_at = {f"pass@{k}": v for k, v in event.get("pass_at", {}).items()}
        return "evaluation", 0, _numbers(f"eval/{event['arm']}", pass_at)
    return ("screen", 0, _numbers("screen", event)) if kind == "screen" else None


class TensorBoard:
    """Event files under `folder`, one graph a name, by torch's writer."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self.close = self._writer.close

    def log(self, group: str, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, rows: Sequence[Row]) -> None:
        """Completions, as texts by outcome."""
        for row in rows:
            text = indent(json.dumps(row, indent=2, ensure_ascii=False), "    ")  # markdown of code
            self._writer.add_text(f"completions/{row['outcome']}", text, row.get("step", row.get("rloo_step")))


class Tracker:
    """A run of wandb (in `folder`/wandb; offline where WANDB_MODE says so) or of trackio, which share their interface.

    Rows carry `steps/GROUP`, in wandb the step axis of that group.
    """

    def __init__(self, kind: str, folder: Path, config: Config) -> None:
        name, settings = scrub((config.name, config.resolved()))  # they leave this machine
        more = {"dir": str(folder)} if kind == "wandb" else {}
        self._tool: Any = importlib.import_module(kind)
        self._run = self._tool.init(project=config.log.project, name=name, config=settings, **more)
        self._axes, self.close = kind == "wandb", self._run.finish

    def log(self, group: str, step: int, values: Values) -> None:
        for name in values if self._axes else ():
            self._run.define_metric(name, step_metric=f"steps/{group}")
        self._run.log({**values, f"steps/{group}": step})

    def table(self, rows: Sequence[Row]) -> None:
        """Completions, with what came of them."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(key) for key in columns] for row in rows]
        self._run.log({"completions": self._tool.Table(columns=columns, data=data)})


Sink = TensorBoard | Tracker


def check_installed(kinds: Sequence[str]) -> None:
    """Raises LoggerError for a sink in `log.sinks` whose package is absent, before anything is computed or written."""
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise LoggerError(
                f"log.sinks names {kind!r}, which is not installed: "
                f"pip install 'soar-rl[{kind}]', or take it out of log.sinks"
            )


class Loggers:
    """The sinks of a run behind one call. say: where a failing sink is named, once, without secrets."""

    def __init__(self, openers: dict[str, Callable[[], Sink]], say: Callable[[str], None]) -> None:
        self._sinks: dict[str, Sink] = {}
        self._say = say
        for kind, opened in openers.items():
            self._try(kind, lambda kind=kind, opened=opened: self._sinks.__setitem__(kind, opened()))  # type: ignore[misc]

    def __call__(self, events: Sequence[Row]) -> None:
        """Send rows that were written to metrics.jsonl as numbers, those of rollouts.jsonl as a table."""
        kept = [row for row in events if "event" not in row]
        calls = [("log", flat) for flat in map(flatten, events) if flat] + ([("table", (kept,))] if kept else [])
        for name, given in calls:
            for kind, sink in list(self._sinks.items()):
                self._try(kind, partial(getattr(sink, name), *given))

    def close(self) -> None:
        """Close every sink that still works."""
        for kind, sink in list(self._sinks.items()):
            self._try(kind, sink.close)

    def _try(self, kind: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a sink is foreign code; the run goes on without it
            self._sinks.pop(kind, None)
            self._say(
                scrub(
                    f"log.sinks: {kind} failed and is left out from here on; metrics.jsonl has everything "
                    f"({type(error).__name__}: {error})"
                )
            )


def open_sink(kind: str, out: Path, config: Config) -> Sink:
    """The sink `kind`, with its files in the folder `out`."""
    return TensorBoard(out / kind) if kind == "tensorboard" else Tracker(kind, out, config)


def open_loggers(config: Config, out: Path, say: Callable[[str], None]) -> Loggers:
    """The sinks of `log.sinks`; one that fails to start is named through `say` and left out."""
    return Loggers({kind: lambda kind=kind: open_sink(kind, out, config) for kind in config.log.sinks}, say)  # type: ignore[misc]
