"""Calibration against a device that is made up: what a part costs is known exactly, and so is the error of its forecast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from loop_helpers import easy_problems, tiny_config

from soar.engine.graphs import slots_for
from soar.engine.policy import AdapterStack
from soar.engine.rollouts import Rollouts
from soar.engine.sampler import NativeSampler
from soar.engine.update import UpdateStats, _micro_batches
from soar.loop import student, teacher
from soar.loop.rollout import Examiner
from soar.loop.student import shuffled_passes, train_population
from soar.loop.teacher import LoopState, OuterLoop, new_state
from soar.plan import probe
from soar.plan.calibrate import Calibrator
from soar.plan.probe import at_full, widths
from soar.run.setup import open_examiner

BATCH = 300  # rows that fit in the memory of the device
TOKENS = 4096  # of a micro-batch
CHANGES = (
    "student.attempts=32", "student.prompts_per_step=4", "student.sampling.max_tokens=320", "teacher.datasets=2",
    "reward.questions=40", "reward.attempts=4", "reward.mode=sampled",
)  # fmt: skip


class Device:
    """A sampler and an update that compute nothing and move a clock.

    A decoding step takes 10 ms and for every row 20 us at an empty cache. A micro-batch takes 30 ms and 100 us a token.
    Once for each shape of a decoding step 1.5 s, as capturing a graph does, and 3 s before the first update: `once`.
    """

    static = True

    def __init__(self) -> None:
        self.now = self.once = 0.0
        self.updates = self.disturbed = 0  # updates so far; the one that takes 5 s more (0: none)
        self.shapes: set[Any] = set()
        self.short: list[tuple[int, int]] = []  # (rows, tokens of the longest prompt) of calls with a small budget

    def prompts_per_call(self, policies: int, questions: int, attempts: int, positions: int) -> int:
        most = max(1, BATCH // (policies * attempts))
        return -(-questions // -(-questions // most))

    def sample(
        self, stack: Any, prompts_P_Q: Any, attempts: int, seed_P_Q: Any, sampling: Any, greedy: bool = False
    ) -> Any:
        P, Q = len(prompts_P_Q), len(prompts_P_Q[0])
        seeds_B = [(s + 97 * n) % 2**32 for own in seed_P_Q for s in own for n in range(attempts)]
        draws_B = np.array([np.random.default_rng(s).exponential(300.0) for s in seeds_B])
        length_B = np.clip(1 + draws_B.astype(int), 1, sampling.max_tokens)
        asked = [tuple(ids) for own in prompts_P_Q for ids in own for _ in range(attempts)]
        if sampling.max_tokens < 320:
            self.short.append((len(asked), max(map(len, asked))))
        per_call = self.prompts_per_call(P, Q, attempts, 0)
        for first in range(0, Q, per_call):
            inside = [(b // attempts) % Q in range(first, first + per_call) for b in range(len(asked))]
            self._decode(length_B[inside], max(map(len, asked)), sampling.max_tokens)
        tokens_B_T, zeros = torch.full((len(asked), int(length_B.max())), 5), torch.zeros(len(asked), dtype=torch.bool)
        length = torch.from_numpy(length_B)
        return Rollouts(
            tuple(asked), tokens_B_T, length, torch.zeros(tokens_B_T.shape), length < sampling.max_tokens, zeros
        )

    def _decode(self, length_B: np.ndarray, prompt: int, budget: int) -> None:
        width = slots_for(len(length_B))
        for step in range(int(length_B.max())):
            least = slots_for(int((length_B > step).sum()))
            width = least if least * 2 <= width else width
            if (width, prompt, budget) not in self.shapes:
                self.shapes.add((width, prompt, budget))
                self._first_time(1.5)
            self.now += 0.010 + 20e-6 * width * (1 + (prompt + step) / 500)

    def update(
        self, backbone: Any, stack: AdapterStack, optimizer: Any, rollouts: Rollouts, advantage_B: Any, *rest: Any
    ) -> UpdateStats:
        each = rollouts.rows // stack.policies
        kept = [list(range(p * each, (p + 1) * each)) for p in range(stack.policies)]
        shape = ("update", rollouts.rows)
        if shape not in self.shapes:
            self.shapes.add(shape)
            self._first_time(3.0)
        self.updates += 1
        if self.updates == self.disturbed:
            self.now += 5.0
        for rows, _ in _micro_batches(rollouts, kept, TOKENS):
            widest = max(len(rollouts.prompts[row]) + int(rollouts.length_B[row]) for row in rows)
            self.now += 0.030 + 100e-6 * widest * len(rows)
        zeros = torch.zeros(stack.policies)
        return UpdateStats(zeros, zeros, zeros, zeros.bool(), rollouts.rows)

    def _first_time(self, seconds: float) -> None:
        self.now += seconds
        self.once += seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture()
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for module in (probe, student, teacher):
        monkeypatch.setattr(module, "update", made.update)
    monkeypatch.setattr(probe, "micro_batch_limit", lambda backbone: TOKENS)
    return made


@pytest.fixture()
def prepared(device: Device) -> Iterator[tuple[Calibrator, LoopState, Any]]:
    config = tiny_config(*CHANGES)
    with open_examiner(config) as examiner:
        examiner.backbone.context = 2048
        fake: Any = device
        made = Examiner(examiner.backbone, fake, examiner.fmt, examiner.verifier)
        calibrator = Calibrator(made, config, 1, 30.0, device.clock)
        calibrator.on_gpu = True
        yield calibrator, new_state(made, config), easy_problems(40)


def in_run(device: Device, work: Any) -> float:
    """Seconds of a call in a run, where every shape was met before."""
    work()
    began = device.now
    work()
    return device.now - began


def test_students_of_a_known_device_are_forecast_within_five_percent(
    device: Device, prepared: tuple[Calibrator, LoopState, Any]
) -> None:
    calibrator, state, problems = prepared
    config, examiner, full = calibrator.config, calibrator.examiner, calibrator.config.student.attempts
    batches = [shuffled_passes(problems, p, 1, 4) for p in range(4)]

    def step(attempts: int) -> Any:
        chosen = config.student.model_copy(update={"attempts": attempts})
        return train_population(examiner, state.baseline, batches, list(range(4)), chosen, 1e-4)

    # What was done before: few attempts, then as many as the time allows, and the line through both.
    step(4)
    began = device.now
    step(4)
    few = device.now - began
    size = min(full, max(8, int(calibrator.limit / (few / 4))))
    began = device.now
    step(size)
    before = at_full([(4, few), (size, device.now - began)], full)
    actual = in_run(device, lambda: step(full))
    began = device.now - device.once
    population = calibrator._teach(state, problems)
    assert device.now - device.once - began < 2.5 * calibrator.limit  # two parts, each new shape once untimed
    found, measured = calibrator.found, calibrator.found.measured
    rows = 4 * 4 * full
    expected = rows * measured["question_tokens"] / found.sample["student"]
    expected += rows * (measured["question_tokens"] + measured["question_prompt_tokens"]) / found.train["student"]
    print(f"actual {actual:.2f} s, before {before / actual - 1:+.1%}, now {expected / actual - 1:+.1%}")
    assert abs(before / actual - 1) > 0.25
    assert expected == pytest.approx(actual, rel=0.05)
    # Few steps of one whole batch, with the cache as long as it is on average: half of 320 tokens, or less.
    rows_in_batch, prompts = max(rows for rows, _ in device.short), [prompt for _, prompt in device.short]
    assert BATCH / 2 < rows_in_batch <= BATCH
    assert all(100 < prompt - measured["question_prompt_tokens"] < 160 for prompt in prompts)
    assert 0 < found.shares["student"] < 1 and 0 < found.shares["student update"] < 1
    calibrator._measure(state, population, problems)
    rate, tokens = found.sample["measure"], measured["reward_tokens"]

    def measure() -> None:
        state.pass_rates = dict.fromkeys((problem.id for problem in problems), 0.0)
        OuterLoop(examiner, problems, config, state, 1).measure(population)

    actual = in_run(device, measure)
    expected = 4 * 40 * 4 * tokens / rate  # the baseline has been asked already, here and in the calibration
    print(f"measurement {expected / actual - 1:+.1%}")
    assert expected == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("disturbed", [2, 3])
def test_one_disturbed_timing_of_the_update_does_not_mislead(
    device: Device, prepared: tuple[Calibrator, LoopState, Any], disturbed: int
) -> None:
    calibrator, state, problems = prepared
    calibrator._teach(state, problems)
    undisturbed = calibrator.found.train["student"]
    device.updates, device.disturbed = 0, disturbed
    calibrator._teach(state, problems)
    assert device.updates > disturbed
    assert calibrator.found.train["student"] == pytest.approx(undisturbed, rel=0.05)


def test_every_part_is_measured_in_a_gpus_way_with_the_real_sampler() -> None:
    config = tiny_config("student.attempts=16", "evaluate.attempts=12", "screen.attempts=12", "reward.questions=6")
    with open_examiner(config) as examiner:
        made = Examiner(
            examiner.backbone, NativeSampler(examiner.backbone, static=True), examiner.fmt, examiner.verifier
        )
        calibrator = Calibrator(made, config, 1, 0.6)
        calibrator.on_gpu = True
        found = calibrator.run(easy_problems(12))
    assert set(found.sample) == {"screen", "write", "student", "measure", "arm", "evaluate"}
    assert set(found.train) == {"student", "teacher", "arm"}
    assert all(0 < rate < 1e9 for rate in [*found.sample.values(), *found.train.values()])
    assert all(0 < share <= 1 for share in found.shares.values())
    assert calibrator.meter.budget is None


def test_rows_that_have_ended_leave_the_batch() -> None:
    length_B = np.array([1.0, 2.0, 3.0, 8.0])
    assert widths(length_B, 8, 100).tolist() == [8, 6, 4, 2, 2, 2, 2, 2]
    assert widths(length_B, 8, 3).tolist() == [8, 6, 4]
    # In slots: of two policies, 4 each, halved when half would do.
    assert widths(length_B, 8, 100, 2).tolist() == [8, 8, 4, 2, 2, 2, 2, 2]
