"""What a whole part of a run takes, told from short measurements that are as wide as the run itself.

On a GPU few rows take nearly as long as many, so a small batch says little about a large one. What is cut instead is the
length: a few decoding steps of a full batch, with the cache filled as it is on average, and a few micro-batches of an
update. Two lengths are timed, each after an untimed call of the same shape (graphs are captured and kernels compiled
there), and the line through them is extended. Nothing that is sampled here enters a run.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from soar.config import Config, SamplingConfig
from soar.engine.graphs import slots_for
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rloo import leave_one_out
from soar.engine.rollouts import Rollouts
from soar.engine.sampler import Sampler
from soar.engine.update import StackOptimizer, micro_batch_limit, update
from soar.loop.rollout import Attempts, Examiner

SHORT, LONGER = 16, 3  # decoding steps of the first timing; the second has at least three times as many
RETIRED = 0.8  # of the rows of a batch: when so few are left, the others are dropped


@dataclass(frozen=True)
class Timed:
    """One measurement: size asked for (in units of the part), seconds, tokens and completions sampled."""

    size: int
    seconds: float
    tokens: int
    rows: int = 0


def at_full(points: Sequence[tuple[float, float]], full: float) -> float:
    """Seconds of `full` rows (or tokens) from measured (rows, seconds): in proportion to one, on the line through two."""
    size, seconds = points[-1]
    if size == full or len(points) == 1:
        return seconds * full / size
    few, less = points[0]
    return seconds + max(0.0, (seconds - less) / (size - few)) * (full - size)


def rate_at_full(points: Sequence[Timed], full: int) -> float:
    """Tokens a second with `full` rows."""
    last = points[-1]
    return last.tokens * full / last.size / at_full([(point.size, point.seconds) for point in points], full)


def widths(length_B: np.ndarray, rows: int, steps: int, policies: int = 0) -> np.ndarray:
    """Rows that each of the first `steps` decoding steps computes, when `rows` rows end as those of `length_B` did.

    policies: of a batch in slots (decode.py), which is made narrower when half of them would do; 0: of one that drops
    the rows that have ended as soon as a fifth has (sampler.py).
    """
    found, width = [], float(policies * slots_for(-(-rows // policies)) if policies else rows)
    for step in range(min(steps, int(length_B.max()))):
        live = rows * float((length_B > step).mean())
        if policies:
            least = policies * slots_for(max(1, math.ceil(live / policies)))
            width = least if 2 * least <= width else width
        elif live <= RETIRED * width:
            width = live
        found.append(width)
    return np.array(found)


class Probe:
    """A sampler that counts its tokens and can be told to decode a few steps only.

    While `budget` is set a call decodes so many tokens of its first batch, after prompts lengthened by `extra` tokens, and
    answers with completions kept from the last call in full, in turns: what follows, grading above all, has its real work.
    rows, policies: of the batch of the last short call, for `widths`; asked, batches: rows and batches that the call would
    have had; calls: short ones so far.
    """

    def __init__(self, sampler: Sampler, backbone: Backbone) -> None:
        self.sampler, self.backbone = sampler, backbone
        self.tokens = self.count = 0
        self.budget: int | None = None
        self.extra = 0
        self.kept: Rollouts | None = None
        self.rows, self.asked, self.policies, self.batches, self.longest_budget = 0, 0, 0, 1.0, 0
        self.calls = 0
        self._lock = threading.Lock()

    def sample(
        self,
        stack: AdapterStack | None,
        prompts_P_Q: list[list[list[int]]],
        attempts: int,
        seed_P_Q: list[list[int]],
        sampling: SamplingConfig,
        greedy: bool = False,
    ) -> Rollouts:
        """As `sampler.Sampler`."""
        if self.budget is not None:
            return self._short(stack, prompts_P_Q, attempts, seed_P_Q, sampling, greedy)
        found = self.sampler.sample(stack, prompts_P_Q, attempts, seed_P_Q, sampling, greedy)
        with self._lock:
            self.tokens += int(found.length_B.sum())
            self.count += found.rows
            self.kept, self.longest_budget = found, sampling.max_tokens
        return found

    def length_B(self) -> np.ndarray:
        """Tokens of the kept completions. Raises ValueError before the first call in full."""
        if self.kept is None:
            raise ValueError("nothing was sampled in full yet")
        return self.kept.length_B.clamp(min=1).numpy()

    def _short(
        self,
        stack: AdapterStack | None,
        prompts_P_Q: list[list[list[int]]],
        attempts: int,
        seed_P_Q: list[list[int]],
        sampling: SamplingConfig,
        greedy: bool,
    ) -> Rollouts:
        assert self.budget is not None and self.kept is not None
        P, Q = len(prompts_P_Q), len(prompts_P_Q[0])
        longest = max(len(ids) for prompts in prompts_P_Q for ids in prompts)
        batch: Callable[..., int] = getattr(self.sampler, "prompts_per_call", lambda P, Q, N, positions: Q)
        most = batch(P, Q, attempts, longest + sampling.max_tokens)
        extra = max(0, min(self.extra, self.backbone.context - longest - self.budget))
        prompts = [[(ids * (2 + extra // len(ids)))[: len(ids) + extra] for ids in own[:most]] for own in prompts_P_Q]
        seeds = [own[:most] for own in seed_P_Q]
        short = sampling.model_copy(update={"max_tokens": self.budget})
        self.sampler.sample(stack, prompts, attempts, seeds, short, greedy)
        self.rows, self.batches = P * most * attempts, Q / most
        self.asked = P * Q * attempts
        self.calls += 1
        self.policies = P if getattr(self.sampler, "static", False) else 0
        asked = tuple(tuple(ids) for own in prompts_P_Q for ids in own for _ in range(attempts))
        return replace(self.kept.select([row % self.kept.rows for row in range(len(asked))]), prompts=asked)


@dataclass(frozen=True)
class _Steps:
    """Two budgets, their seconds, and the seconds that one more step takes."""

    steps: tuple[int, int]
    seconds: tuple[float, float]
    slope: float


class Stopwatch:
    """Times work on one device. clock: seconds. limit: seconds that one part may take, about."""

    def __init__(self, clock: Callable[[], float], limit: float) -> None:
        self.clock, self.limit = clock, limit
        self.narrow: dict[int, tuple[float, float]] = {}  # sampling calls -> (rows, seconds) of a step of few rows

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call."""
        began = self.clock()
        work()
        return max(1e-9, self.clock() - began)

    def decoding(self, probe: Probe, few: int, full: int, work: Callable[[int], Any]) -> tuple[float, float]:
        """(seconds, share of the steps that were timed) of work(full), which samples through `probe`.

        The probe has sampled work(few) in full. What a step costs is a line in the rows that it computes, through the
        steps of few rows (of the first part that needs it) and of the run's own. The rows that live at each step are those
        of the completions kept.
        """
        length_B, budget = probe.length_B().astype(float), probe.longest_budget
        first = max(1, min(SHORT, budget // LONGER))
        probe.extra = max(0, int((length_B**2).sum() / (2 * length_B.sum())) - first)
        try:
            second = min(budget, LONGER * first)
            wide = self._steps(probe, full, work, [first, second])
            rows, batches, asked = probe.rows, probe.batches, probe.asked
            probe.calls, probe.budget = 0, second
            work(few)
            calls = probe.calls  # a part may sample for several at once: its steps are those of all of them
            if calls not in self.narrow:
                # With what comes before the first step: small for few rows.
                slope_few = self.seconds(lambda: work(few)) / second
                self.narrow[calls] = self._live(probe, length_B, probe.rows, (0, second)), slope_few
            probe.asked = asked
        finally:
            probe.budget, probe.extra = None, 0
        live_few, slope_few = self.narrow[calls]
        live = self._live(probe, length_B, rows, wide.steps)
        each = max(0.0, (wide.slope - slope_few) / (live - live_few)) if live > live_few else wide.slope / live
        fixed = max(0.0, wide.slope - each * live)
        width_T = widths(length_B, rows, budget, probe.policies)
        decoded = batches * (fixed * len(width_T) + each * float(width_T.sum()))
        return max(wide.seconds[0] - wide.steps[0] * wide.slope, 0.0) + decoded, min(1.0, wide.steps[1] / len(width_T))

    @staticmethod
    def _live(probe: Probe, length_B: np.ndarray, rows: int, steps: Sequence[int]) -> float:
        """Mean rows of the steps between the two timings."""
        within = widths(length_B, rows, steps[1], probe.policies)[steps[0] :]
        return float(within.mean()) if len(within) else float(rows)

    def _steps(self, probe: Probe, size: int, work: Callable[[int], Any], budgets: list[int]) -> _Steps:
        """work(size) with two budgets; the second is made longer where the time allows."""
        first, second = budgets
        probe.budget = first
        work(size)
        before = self.seconds(lambda: work(size))
        room = int(first * self.limit / (8 * before))
        second = min(probe.longest_budget, max(second, min(room, 2 * second)))
        if second <= first:
            return _Steps((first, first), (before, before), before / first)
        probe.budget = second
        work(size)
        after = self.seconds(lambda: work(size))
        return _Steps((first, second), (before, after), max(1e-12, (after - before) / (second - first)))

    def updating(
        self,
        backbone: Backbone,
        stack: AdapterStack,
        optimizer: StackOptimizer,
        rollouts: Rollouts,
        full: int,
        sampling: SamplingConfig,
    ) -> tuple[float, float]:
        """(seconds, share of the rows that was timed) of one update with `full` rows of every policy.

        One micro-batch of rows of `rollouts` of the median length, then several of the lengths around it, so that as little
        is padded as in a full update; the line through the two, in tokens, is extended. Each is done once untimed (memory and
        kernels of new shapes), the one micro-batch then timed twice; the faster counts, since what disturbs it would be
        extended too.
        optimizer: of the stack, whose weights change.
        """
        P = stack.policies
        size_B = rollouts.length_B.numpy() + np.array([len(ids) for ids in rollouts.prompts])
        by_size, mean = size_B.argsort(kind="stable"), float(size_B.mean())
        median = by_size[len(by_size) // 2]
        first = min(full, max(1, int(micro_batch_limit(backbone) // (size_B[median] * P))))

        def timed(rows: list[int], times: int) -> tuple[float, float]:
            part = rollouts.select(rows * P)
            advantage_B = torch.ones(part.rows)
            advantage_B[::2] = -1.0

            def work() -> None:
                lr, limit = optimizer.config.lr, sampling.max_tokens
                update(backbone, stack, optimizer, part, advantage_B, lr, sampling.temperature, limit)

            work()
            return float(size_B[rows].sum()) * P, min(self.seconds(work) for _ in range(times))

        points, more = [timed([int(median)] * first, 2)], first
        if first < full:
            many = max(LONGER, min(16, int(self.limit / (6 * points[0][1]))))
            more = min(full, many * first)
            most = by_size[max(0, (len(by_size) - more) // 2) :][:more]
            points.append(timed([int(most[row % len(most)]) for row in range(more)], 1))
        return at_full(points, mean * P * full), more / full


@dataclass
class Log:
    """Sums over the attempts of students: rows, tokens, and time apart from the updates."""

    rows: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    gradient_rows: int = 0
    seconds: float = 0.0


class Observed(Examiner):
    """An examiner that notes what it is asked, and pays every second attempt a reward.

    So every row has a gradient, and the update is timed on rows that all count; how many would count is noted before.
    """

    def __init__(self, examiner: Examiner, config: Config) -> None:
        super().__init__(
            examiner.backbone, examiner.sampler, examiner.fmt, examiner.verifier, examiner.scheme, examiner.parts
        )
        self.config, self.log = config, Log()

    def attempt(self, *arguments: Any, **named: Any) -> Attempts:
        """As the examiner's, with other rewards."""
        began = time.perf_counter()
        found = super().attempt(*arguments, **named)
        optimizer = self.config.student.optimizer
        advantage = leave_one_out(found.reward_P_Q_N, found.valid_P_Q_N, optimizer.normalize_advantages)
        counts = (advantage != 0) | (optimizer.kl > 0)
        paid = (torch.arange(found.reward_P_Q_N.shape[-1]) % 2).float().expand_as(found.reward_P_Q_N).clone()
        changed = Attempts(
            found.rollouts,
            found.verdicts,
            paid,
            found.solved_P_Q_N,
            torch.ones_like(found.valid_P_Q_N),
            found.truncated,
            found.failed_P,
        )
        with self._lock:
            log = self.log
            log.rows += found.count
            log.gradient_rows += int(counts.sum())
            log.tokens += int(found.rollouts.length_B.sum())
            log.prompt_tokens += sum(map(len, found.rollouts.prompts))
            log.seconds += time.perf_counter() - began
        return changed
