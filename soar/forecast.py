"""How long a run will take: counted tokens over measured rates, by stage and arm, beside what it then took.

Rates come from a calibration on the user's own device (`calibrate.py`), or from a table of measured ones (`TABLE`). Needs no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soar.config import Config
from soar.memory import GIB, ModelShape, memory_of, shape_of
from soar.runs import number
from soar.workload import HELD_OUT_BLOCK, STAGES, Assumptions, Work, assumed, workload

PAPER_HOURS = "the paper's run: 1,536 to 1,920 GPU-hours (32 H100 or H200 for 48 to 60 hours)"
KL_FACTOR = 1.5  # a reference pass forward on top of one pass forward and one backward, base weights frozen
SMALLEST_KNOWN = 50e6  # parameters under which the table says nothing: such models are bound by overhead


@dataclass(frozen=True)
class Known:
    """Measured rates of one model shape on one device, 16 adapters, no KL term."""

    device: str
    parameters: float
    decode: float
    train: float
    source: str


MEASURED = "benchmarks/results/h200-default.json and h200-attention.json"
TABLE = (
    Known("NVIDIA H200", 134.5e6, 388_839, 203_744, f"decode-135m and train-135m of {MEASURED}"),
    Known("NVIDIA H200", 3.213e9, 40_572, 32_966, f"decode-3b and train-3b of {MEASURED}"),
)


@dataclass(frozen=True)
class Rates:
    """Tokens a second. sample: by kind of work (completion tokens, verification included when calibrated). train: by kind
    (prompt and completion tokens, the KL term's reference pass included). source: where they were measured."""

    sample: Mapping[str, float]
    train: Mapping[str, float]
    source: str
    calibrated: bool = False


def table_rates(parameters: float, kl_student: bool, kl_teacher: bool) -> Rates | None:
    """Rates of the known shape nearest in size, scaled by parameters; None for a model far smaller than any of them."""
    if parameters < SMALLEST_KNOWN:
        return None
    near = min(TABLE, key=lambda known: abs(math.log(known.parameters / parameters)))
    scale = near.parameters / parameters
    student = near.train * scale / (KL_FACTOR if kl_student else 1.0)
    teacher = near.train * scale / (KL_FACTOR if kl_teacher else 1.0)
    scaled = "" if 0.9 < scale < 1.1 else f", scaled by {scale:.3g} for its size"
    return Rates(
        dict.fromkeys(("screen", "write", "student", "measure", "arm", "evaluate"), near.decode * scale),
        {"student": student, "arm": student, "teacher": teacher},
        f"{near.device}, {near.source}{scaled}; other devices: --calibrate",
    )


@dataclass(frozen=True)
class Sharing:
    """How `cluster.workers` share a run (docs/cluster.md). workers: 0 for none.

    threads: chunks that one process does at a time, with the rates measured that way. chunk: students of a piece, 0: an
    equal share for each worker. block: problems of a piece of screening.
    """

    workers: int = 0
    threads: int = 1
    chunk: int = 0
    block: int = 16

    def pieces(self, work: Work, config: Config, known: Assumptions) -> int:
        """Into how many a part of a run is cut, an arm excepted."""
        if work.kind in ("student", "measure"):
            students = config.teacher.datasets * config.student.repeats
            return math.ceil(students / (self.chunk or math.ceil(students / self.workers)))
        if work.kind == "screen":
            return max(1, math.ceil(known.candidates / self.block))
        hard = known.candidates * known.hard_share
        if config.problems.max_hard:
            hard = min(hard, config.problems.max_hard)
        return max(1, math.ceil(hard * config.problems.test_share / HELD_OUT_BLOCK))

    def factor(self, work: Work, config: Config, known: Assumptions) -> float:
        """Time with the workers over time without, of a part that is cut into pieces: rounds over rounds."""
        if not self.workers or not work.shared:
            return 1.0
        pieces = self.pieces(work, config, known)
        here, there = (math.ceil(pieces / min(each, pieces)) for each in (self.threads, self.workers))
        return 1.0 - work.shared + work.shared * there / here

    def arms(self, seconds: Sequence[float]) -> float:
        """Time of the arms: one after another, or the longest first, each to the worker that is free first."""
        free = [0.0] * max(1, self.workers)
        for each in sorted(seconds, reverse=True):
            free[free.index(min(free))] += each
        return max(free)

    def line(self, works: Sequence[Work], config: Config, known: Assumptions) -> str:
        """What the workers share, in words."""
        cut = {w.name: self.pieces(w, config, known) for w in works if w.shared and w.kind != "arm" and w.rollouts}
        each = ", ".join(f"{name} {count:,}" for name, count in cut.items())
        arms = sum(work.kind == "arm" for work in works)
        return (
            f"  time with {self.workers} workers, which share what is cut into pieces ({each}; arms {arms}); the teacher and "
            "the baseline's measurement stay with one process"
        )


@dataclass(frozen=True)
class Forecast:
    """works with their wall seconds; None where there is no rate. shared: a line on the workers that share them."""

    works: tuple[Work, ...]
    seconds: tuple[float | None, ...]
    assumptions: Assumptions
    rates: Rates | None
    workers: int = 0
    shared: str = ""

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage; {} without rates."""
        if self.rates is None:
            return {}
        pairs = list(zip(self.works, self.seconds, strict=True))
        return {stage: sum(s or 0.0 for work, s in pairs if work.stage == stage) for stage in STAGES}

    def event(self, device: str) -> dict[str, Any]:
        """The line of metrics.jsonl that a calibrated run begins with."""
        assert self.rates is not None
        names = (name for name in self.assumptions.__dataclass_fields__ if name != "origin")
        return {
            "event": "forecast",
            "device": device,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in self.stage_seconds().items()},
            "sample_rates": {kind: round(rate, 3) for kind, rate in self.rates.sample.items()},
            "train_rates": {kind: round(rate, 3) for kind, rate in self.rates.train.items()},
            "assumptions": {name: getattr(self.assumptions, name) for name in names},
        }

    def lines(self) -> list[str]:
        """The forecast as a table, with what it rests on."""
        head = f"  {'':18s} {'rollouts':>14s} {'tokens sampled':>16s} {'tokens trained':>16s} {'time':>11s}"
        body = [
            f"  {work.name:18s} {work.rollouts:14,.0f} {work.sampled:16,.0f} {work.trained:16,.0f} {_time(seconds):>11s}"
            for work, seconds in zip(self.works, self.seconds, strict=True)
        ]
        sampled, trained = sum(w.sampled for w in self.works), sum(w.trained for w in self.works)
        rollouts = sum(w.rollouts for w in self.works)
        total = sum(self.stage_seconds().values()) if self.rates is not None else None
        body.append(f"  {'in all':18s} {rollouts:14,.0f} {sampled:16,.0f} {trained:16,.0f} {_time(total):>11s}")
        if self.rates is None or total is None:
            body.append("  no time: no rate is known for a model of this size; --calibrate measures it here")
        else:
            hours, devices = total / 3600, f"{self.workers} devices" if self.workers else "one device"
            body.append(f"  {hours * max(1, self.workers):,.2f} device-hours on {devices}; {PAPER_HOURS}")
            body += [self.shared] if self.shared else []
            body.append(f"  rates: {self.rates.source}")
            body += _rate_lines(self.rates)
        return ["forecast", head, *body, "it rests on (--assume NAME=VALUE replaces one)", *self.assumptions.lines()]


def _rate_lines(rates: Rates) -> list[str]:
    sample = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates.sample.items())
    train = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates.train.items())
    return [f"  sampled tokens a second: {sample}", f"  trained tokens a second: {train}"]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.2f} h"


def forecast(config: Config, assumptions: Assumptions, rates: Rates | None, sharing: Sharing = Sharing()) -> Forecast:
    """Seconds of a part = tokens sampled / sampling rate of its kind + tokens trained / training rate of its kind.

    With workers the parts that they share take as many rounds of pieces as are needed; a piece takes what it takes here.
    """
    works = workload(config, assumptions)

    def one(work: Work, rates: Rates) -> float:
        taken = work.sampled / rates.sample[work.kind] if work.sampled else 0.0
        return taken + (work.trained / rates.train[work.kind] if work.trained else 0.0)

    if rates is None:
        return Forecast(tuple(works), (None,) * len(works), assumptions, None, sharing.workers)
    alone = [one(work, rates) for work in works]
    arms = [seconds for work, seconds in zip(works, alone, strict=True) if work.kind == "arm"]
    together = sharing.arms(arms) / sum(arms) if sum(arms) else 1.0
    seconds = tuple(
        before * (together if work.kind == "arm" else sharing.factor(work, config, assumptions))
        for work, before in zip(works, alone, strict=True)
    )
    line = sharing.line(works, config, assumptions) if sharing.workers else ""
    if not sharing.workers and config.cluster.address:
        line = "  time of one process: how many workers the cluster has room for is not known beforehand"
    return Forecast(tuple(works), seconds, assumptions, rates, sharing.workers, line)


def table_forecast(config: Config, assumptions: Assumptions) -> Forecast:
    """The forecast from the table of known rates, for the size that the model's files or name tell."""
    shape = shape_of(config)
    kl_student, kl_teacher = config.student.optimizer.kl > 0, config.teacher.optimizer.kl > 0
    rates = None if shape is None else table_rates(shape.parameters, kl_student, kl_teacher)
    return forecast(config, assumptions, rates, Sharing(config.cluster.workers, chunk=config.model.chunk))


def total_line(config: Config) -> str:
    """The forecast from the table in one line, for a list of runs."""
    expected = table_forecast(config, assumed(config))
    tokens = sum(work.sampled for work in expected.works)
    if expected.rates is None:
        return f"  forecast     {tokens:,.0f} tokens sampled; no rate is known for a model of this size"
    hours = sum(expected.stage_seconds().values()) / 3600
    return f"  forecast     {tokens:,.0f} tokens sampled, {hours:,.2f} device-hours; rates: {expected.rates.source}"


def memory_lines(config: Config, assumptions: Assumptions, shape: ModelShape | None = None) -> list[str]:
    """Memory per device with its arithmetic; nothing for a model whose shape cannot be told."""
    shape = shape or shape_of(config)
    if shape is None:
        return ["memory per device: unknown, the model is not in the local cache and its name tells no size"]
    prompt = math.ceil(max(assumptions.question_prompt_tokens, assumptions.hard_prompt_tokens))
    needed = memory_of(config, shape, prompt)
    lines = ["memory per device", *needed.lines()]
    if config.model.sampler == "vllm":
        share, devices = config.model.vllm_memory, config.model.vllm_devices
        own = needed.shape.parameters * 2 / GIB / devices
        lines.append(
            f"  vLLM         {share:8.0%} of each of {devices} GPU, by model.vllm_memory: its own {own:.2f} GiB of weights, "
            "adapters and cache"
        )
    return lines


def against(stage_seconds: Mapping[str, Any], wall_seconds: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(stage, forecast, actual seconds) of every stage that has both, and `in all` over those."""
    rows = []
    for stage in STAGES:
        forecast_s, actual = number(stage_seconds.get(stage)), number(wall_seconds.get(stage))
        if forecast_s is not None and actual is not None:
            rows.append((stage, forecast_s, actual))
    if rows:
        rows.append(("in all", math.fsum(row[1] for row in rows), math.fsum(row[2] for row in rows)))
    return rows


def against_lines(rows: Sequence[tuple[str, float, float]]) -> list[str]:
    """`against` as text."""
    return [
        f"{stage:10s} forecast {_time(expected):>10s}  actual {_time(actual):>10s}  "
        + (f"{actual / expected - 1:+.0%}" if expected else "-")
        for stage, expected, actual in rows
    ]
