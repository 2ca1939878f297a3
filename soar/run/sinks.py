"""The run's numbers sent on to TensorBoard, Weights & Biases or trackio; `metrics.jsonl` stays the truth.
A sink gets what was just appended: the events of `metrics.jsonl` as flat numbers, the rows of `rollouts.jsonl` as a table.
Names are those of TRL where they mean the same (`reward`, `reward_std`, `kl`, `frac_reward_zero_std` ...), under the policy:
`teacher/`, `student/`, `hard_only/`, `pq/`, `eval/`. A sink that fails is left out; it never stops a run.
"""

import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

from soar.config import Config, ConfigError
from soar.files import Row, scrub

Values = dict[str, float]

NAMES = {"reward_mean": "reward", **{f"teacher_{name}": name for name in ("kl", "grad_norm", "logprob_gap")}}


def flatten(event: Row) -> tuple[str, int, Values] | None:
    """(group, step, values) of an event of metrics.jsonl; None for an event without numbers over steps (alarms)."""
    arm = str(event.get("arm"))
    places = {"outer_step": "teacher", "arm_step": arm, "evaluation": f"eval/{arm}", "screen": "screen"}
    if (kind := str(event.get("event"))) not in places:
        return None
    rows = {places[kind]: event, "student": event.get("student_last") or {}}
    rows[f"{places[kind]}/pass@"] = event.get("pass_at") or {}
    values = {
        f"{place}{'' if place.endswith('@') else '/'}{NAMES.get(key, key)}": float(value)
        for place, row in rows.items()
        for key, value in row.items()
        if key != "step" and type(value) in (int, float) and math.isfinite(value)
    }
    rewards = [reward for reward in event.get("reward_G", []) if reward is not None]
    values |= {"teacher/reward_std": statistics.stdev(rewards)} if len(rewards) > 1 else {}
    return arm if kind == "arm_step" else kind, event.get("step", 0), values


class Sink:
    """TensorBoard by torch's writer, or a run of wandb (in OUT/wandb) or trackio, whose rows carry `steps/GROUP`."""

    def __init__(self, kind: str, out: Path, config: Config) -> None:
        self.kind = kind
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._run: Any = SummaryWriter(str(out / kind))
            self.close = self._run.close
            return
        name, settings = scrub((config.name, config.resolved()))  # they leave this machine
        more = {"dir": str(out)} if kind == "wandb" else {}
        self._tool: Any = importlib.import_module(kind)
        self._run = self._tool.init(project=config.log.project, name=name, config=settings, **more)
        self.close = self._run.finish

    def log(self, group: str, step: int, values: Values) -> None:
        """The numbers of an event."""
        for name, value in values.items():
            if self.kind == "tensorboard":
                self._run.add_scalar(name, value, step)
            elif self.kind == "wandb":
                self._run.define_metric(name, step_metric=f"steps/{group}")
        if self.kind != "tensorboard":
            self._run.log({**values, f"steps/{group}": step})

    def table(self, rows: Sequence[Row]) -> None:
        """Completions with what came of them: a table, in TensorBoard texts by outcome."""
        if self.kind != "tensorboard":
            columns = list(dict.fromkeys(key for row in rows for key in row))
            data = [[row.get(key) for key in columns] for row in rows]
            return self._run.log({"completions": self._tool.Table(columns=columns, data=data)})
        for row in rows:
            text = indent(json.dumps(row, indent=2, ensure_ascii=False), "    ")  # markdown of code
            self._run.add_text(f"completions/{row['outcome']}", text, row.get("step", row.get("rloo_step")))


class Loggers:
    """The sinks of `log.sinks`. say: told of one that fails. Raises ConfigError for one whose package is absent."""

    def __init__(self, config: Config, out: Path, say: Callable[[str], None]) -> None:
        if kind := next((kind for kind in config.log.sinks if importlib.util.find_spec(kind) is None), None):
            install = f"pip install 'soar-rl[{kind}]', or take it out of log.sinks"
            raise ConfigError(f"log.sinks names {kind!r}, which is not installed: {install}")
        self._sinks: dict[str, Sink] = {}
        self._say = say
        for kind in config.log.sinks:
            with self._left_out(kind):
                self._sinks[kind] = Sink(kind, out, config)

    def __call__(self, events: Sequence[Row]) -> None:
        """Send rows that were written to metrics.jsonl as numbers, those of rollouts.jsonl as a table."""
        completions = [row for row in events if "event" not in row]
        for kind, sink in list(self._sinks.items()):
            with self._left_out(kind):
                for flat in filter(None, map(flatten, events)):
                    sink.log(*flat)
                if completions:
                    sink.table(completions)

    def close(self) -> None:
        """Close every sink that still works."""
        for kind, sink in list(self._sinks.items()):
            with self._left_out(kind):
                sink.close()

    @contextmanager
    def _left_out(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a sink is foreign code; the run goes on without it
            self._sinks.pop(kind, None)
            why = f"metrics.jsonl has everything ({type(error).__name__}: {error})"
            self._say(scrub(f"log.sinks: {kind} failed and is left out from here on; {why}"))
