"""A whole run: load, screen, outer loop, arms, evaluation, summary, report. Each stage ends in a checkpoint."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from soar import seeds
from soar.arms import TRAINED, arm_batches, budget_steps, train_arms
from soar.config import Config, ConfigError
from soar.data import fits_budget, load_problems, split, write_hard
from soar.evaluate import count_correct, paired_difference, summarize
from soar.policy import AdapterStack, Backbone, concat, load_backbone, save_adapter
from soar.progress import Progress
from soar.prompts import get_format
from soar.record import Checkpoint, RunFolder, write_json
from soar.report import write_report
from soar.rollout import Examiner
from soar.sampler import NativeSampler
from soar.screening import evidence_key, screen, screen_event
from soar.student import Population
from soar.teacher import LoopState, OuterLoop, new_state
from soar.types import Problem, Screening, Verdict
from soar.update import StackOptimizer
from soar.verify import VerifierPool
from soar.worlds import get_world

SMALL_MODEL = 5_000_000  # parameters under which worker threads beat threads inside one operation on a CPU
STAGES = ("loop", "arms", "evaluate", "done")


class NothingToDo(RuntimeError):
    """The problem set holds too few hard problems for a run."""


@dataclass
class RunState:
    """What a checkpoint holds: the stage to do next, the loop's state, finished arms, seconds per phase."""

    stage: str
    loop: LoopState
    arms: dict[str, AdapterStack] = field(default_factory=dict)
    arm_rollouts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def choose_workers(backbone: Backbone, threads: int) -> int:
    """CPU worker threads, and torch's own threads set to match.

    A small model is split among worker threads of one operation thread each; a large one, or a GPU, uses one worker.
    """
    cores = (
        threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count() or 1
    )
    parameters = sum(p.numel() for p in backbone.model.parameters())
    if backbone.device.type != "cpu":
        return 1
    small = parameters < SMALL_MODEL
    torch.set_num_threads(1 if small else cores)
    return cores if small else 1


@contextmanager
def open_examiner(config: Config) -> Iterator[Examiner]:
    """Backbone, sampler, prompts and verifier pool of a config; the pool is closed at the end."""
    backbone = load_backbone(config.model)
    fmt = get_format(config.problems.format)
    with VerifierPool(
        config.problems.verifier,
        answer_style=fmt.answer_style,
        timeout_s=config.problems.verify_timeout_s,
        workers=config.problems.verify_workers,
    ) as verifier:
        yield Examiner(backbone, NativeSampler(backbone), fmt, verifier, config.student.reward)


def candidates(config: Config) -> tuple[list[Problem], list[str], str]:
    """Candidate problems of a config, the loader's notes as lines, and a hash of the problems."""
    source, limit = config.problems.source, config.problems.limit
    if source.startswith("world:"):
        try:
            problems = get_world(source.removeprefix("world:")).hard_problems(limit or 256, config.seed)
        except ValueError as error:
            raise ConfigError(f"problems.source = {source!r}, problems.limit = {limit}: {error}") from error
        notes = [f"{source}: {len(problems)} candidate problems"]
    else:
        problems, report = load_problems(
            source,
            question_column=config.problems.question_column,
            answer_column=config.problems.answer_column,
        )
        notes = report.lines()
        problems = problems[:limit] if limit else problems
    digest = hashlib.sha256("\n".join(f"{p.id}\t{p.question}\t{p.answer}" for p in problems).encode()).hexdigest()
    return problems, notes, digest


class Run:
    """One run in its folder; `execute` does what is left of it."""

    def __init__(self, config: Config, folder: RunFolder, examiner: Examiner, progress: Progress) -> None:
        self.config, self.folder, self.examiner, self.progress = config, folder, examiner, progress
        self.workers = choose_workers(examiner.backbone, config.threads)
        self.hard_train: list[Problem] = []
        self.hard_test: list[Problem] = []
        self.state = RunState("loop", new_state(examiner, config))
        self._current: tuple[str, float] | None = None

    def execute(self) -> dict[str, Any]:
        """Do every stage that is not done; returns the summary."""
        checkpoint = self.folder.load()
        with self._phase("screen"):
            self._find_hard(first=checkpoint is None)
        if checkpoint is None:
            self._save()
        else:
            self._restore(checkpoint)
        stages: dict[str, Callable[[], None]] = {"loop": self._loop, "arms": self._arms, "evaluate": self._evaluate}
        for name, stage in stages.items():
            if STAGES.index(self.state.stage) <= STAGES.index(name):
                with self._phase(name):
                    stage()
                self.state.stage = STAGES[STAGES.index(name) + 1]
                self._save()
        summary = self._summary()
        write_json(self.folder.path / "summary.json", summary)
        write_report(self.folder.path)
        return summary

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._current = (name, time.monotonic())
        try:
            yield
        finally:
            self.state.seconds, self._current = self._seconds(), None

    def _seconds(self) -> dict[str, float]:
        """Seconds per phase, the running one included."""
        if self._current is None:
            return self.state.seconds
        name, started = self._current
        return {**self.state.seconds, name: self.state.seconds.get(name, 0.0) + time.monotonic() - started}

    def _find_hard(self, first: bool) -> None:
        config, backbone = self.config, self.examiner.backbone
        problems, notes, digest = candidates(config)
        model_hash = backbone.base_digest()
        self.folder.note_hashes(problems=digest, model=model_hash, prompts=self.examiner.fmt.fingerprint())
        problems, left_out = self._usable(problems)
        for line in notes:
            self.progress.say(line)
        evidence = evidence_key(config, backbone, self.examiner.fmt, model_hash)
        if config.screen.attempts:
            with self.progress.task("screening", len(problems)) as advance:
                found = screen(self.examiner, problems, config, self.folder, evidence, self.workers, advance)
        else:
            found = {problem.id: Screening(0, 0) for problem in problems}
        hard = [p for p in problems if found[p.id].successes <= config.screen.max_successes]
        if config.problems.max_hard:
            hard = hard[: config.problems.max_hard]
        event = {**screen_event(found, config), **left_out}
        if len(hard) < 4:
            raise NothingToDo(
                f"{len(hard)} of {len(problems)} problems are hard (at most {config.screen.max_successes} of "
                f"{config.screen.attempts} attempts correct); {left_out['too_long']} more do not fit in the model's context, "
                f"and the gold answers of {left_out['ungradable']} cannot be graded by problems.verifier = "
                f"{config.problems.verifier!r}. A run needs at least 4: give harder problems, raise "
                "screen.max_successes, or choose another verifier. If most problems are solved sometimes, plain RL "
                "already has a signal."
            )
        self.hard_train, self.hard_test = split(hard, config.seed, config.problems.test_share)
        if first:
            for name, part in (("train", self.hard_train), ("test", self.hard_test)):
                write_hard(self.folder.path / "hard" / f"{name}.jsonl", part, [found[p.id] for p in part], evidence)
            self.folder.append("metrics.jsonl", [event])
        self.progress.say(
            f"{len(hard)} of {len(problems)} candidates are hard: at most {config.screen.max_successes} of "
            f"{config.screen.attempts} attempts correct; {len(self.hard_train)} to train, {len(self.hard_test)} held out"
        )

    def _usable(self, problems: list[Problem]) -> tuple[list[Problem], dict[str, int]]:
        """Problems that fit in the context and whose gold answer can be graded; how many are left out, by reason."""
        tokens, context = self.config.student.sampling.max_tokens, self.examiner.backbone.context
        kept, dropped = fits_budget(problems, lambda problem: len(self.examiner.prompt(problem)), context, tokens)
        for row in dropped[:5]:
            self.progress.say(f"left out: {row}")
        verdicts = self.examiner.verifier.check_golds([problem.answer for problem in kept])
        bad = [p for p, verdict in zip(kept, verdicts, strict=True) if verdict is Verdict.UNSCORABLE]
        for problem in bad[:5]:
            self.progress.say(f"left out: the gold answer of {problem.id} cannot be graded: {problem.answer[:80]!r}")
        gone = {problem.id for problem in bad}
        kept = [problem for problem in kept if problem.id not in gone]
        return kept, {"too_long": len(dropped), "ungradable": len(bad)}

    def _loop(self) -> None:
        config, state = self.config, self.state.loop
        with (
            self.progress.task("outer loop", config.teacher.steps) as advance,
            self.progress.task("  students of this step", 1, transient=True) as inner,
        ):
            advance(state.step)
            loop = OuterLoop(self.examiner, self.hard_train, config, state, self.workers, inner.set)
            while state.step < config.teacher.steps:
                known = len(state.pq)
                events, rows = loop.step()
                self.folder.append("metrics.jsonl", events)
                self.folder.append("questions.jsonl", self._labelled(rows))
                self.folder.append("pq.jsonl", self._labelled(state.pq[known:]))
                self._save()
                self.progress.say(_step_line(events))
                advance(1)

    def _labelled(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with topic, well_posed and correct where the problem source has an exact oracle (for the record only)."""
        if not self.config.problems.source.startswith("world:"):
            return rows
        world = get_world(self.config.problems.source.removeprefix("world:"))
        return [
            {
                **row,
                "topic": world.topic(row["question"]),
                "well_posed": world.well_posed(row["question"]),
                "correct": world.solve(row["question"]) == row["answer"],
            }
            for row in rows
        ]

    def _arms(self) -> None:
        config, state = self.config, self.state
        steps = budget_steps(config, state.loop.student_rollouts)
        pq = [Problem(f"pq-{i}", row["question"], row["answer"]) for i, row in enumerate(state.loop.pq)]
        lengths = {"hard_only": steps, "pq": config.arms.pq_steps or steps}
        wanted = [arm for arm in TRAINED if arm in config.arms.run and arm not in state.arms]
        if "pq" in wanted and not pq:
            wanted.remove("pq")
            self.progress.say("no promotion, so there are no promotion questions: the arm pq is left out")
        batches: dict[str, list[list[Problem]]] = {
            arm: arm_batches(arm, config, self.hard_train, pq, lengths[arm]) for arm in wanted
        }
        with self.progress.task("arms", sum(len(b) for b in batches.values())) as advance:

            def keep(arm: str, population: Population, events: list[dict[str, Any]]) -> None:
                self.folder.append("metrics.jsonl", events)
                state.arms[arm], state.arm_rollouts[arm] = population.stack, population.rollouts
                self._save()

            fresh = self.examiner.backbone.new_stack(seeds.derive(config.seed, "student", "init"))
            train_arms(self.examiner, fresh, batches, config, self.workers, lambda arm: advance(1), keep)

    def _policies(self) -> dict[str, AdapterStack]:
        fresh = self.examiner.backbone.new_stack(seeds.derive(self.config.seed, "student", "init"))
        every = {"base": fresh, "ps": self.state.loop.baseline, **self.state.arms}
        return {arm: every[arm] for arm in self.config.arms.run if arm in every}

    def _evaluate(self) -> None:
        config, policies = self.config, self._policies()
        seed = seeds.derive(config.seed, "evaluate")
        correct_P_H = self._count_correct(list(policies.values()), seed) if policies else []
        events = []
        for arm, correct_H in zip(policies, correct_P_H, strict=True):
            events.append(
                {
                    "event": "evaluation",
                    "arm": arm,
                    **summarize(correct_H, config.evaluate.attempts, config.evaluate, seed),
                    "problems": len(self.hard_test),
                    "attempts": config.evaluate.attempts,
                    "student_rollouts": self._rollouts(arm),
                    "correct": correct_H,
                }
            )
        self.folder.append("metrics.jsonl", events)
        for name, stack in {"teacher": self.state.loop.teacher, "student": self.state.loop.baseline}.items():
            save_adapter(self.examiner.backbone, stack, self.folder.path / name)
        for name, stack in self.state.arms.items():
            save_adapter(self.examiner.backbone, stack, self.folder.path / "arms" / name)

    def _count_correct(self, policies: list[AdapterStack], seed: int) -> list[list[int]]:
        """Correct attempts [policies][held-out problems]."""
        config = self.config
        sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
        with self.progress.task("evaluation", len(self.hard_test)) as advance:
            correct_P_H, _ = count_correct(
                self.examiner,
                concat(policies),
                self.hard_test,
                config.evaluate.attempts,
                seed,
                sampling,
                workers=self.workers,
                block=8,
                on_block=lambda part, correct, truncated: advance(len(part)),
            )
        return correct_P_H.tolist()

    def _rollouts(self, arm: str) -> int:
        return {"base": 0, "ps": self.state.loop.student_rollouts, **self.state.arm_rollouts}[arm]

    def _summary(self) -> dict[str, Any]:
        config, state = self.config, self.state
        events = {r["arm"]: r for r in self.folder.rows("metrics.jsonl") if r["event"] == "evaluation"}
        arms = {
            arm: {k: v for k, v in row.items() if k not in ("event", "arm", "correct")} for arm, row in events.items()
        }
        if "pq" in arms:
            arms["pq"]["search_rollouts"] = state.loop.student_rollouts
        pairs = [(a, "hard_only") for a in ("ps", "pq") if a in events and "hard_only" in events]
        seed = seeds.derive(config.seed, "paired")
        paired = {
            f"{a} - {b}": {
                str(k): paired_difference(
                    events[a]["correct"],
                    events[b]["correct"],
                    config.evaluate.attempts,
                    k,
                    seed,
                    config.evaluate.bootstrap,
                )
                for k in config.evaluate.ks
            }
            for a, b in pairs
        }
        return {
            "arms": arms,
            "paired": paired,
            "promotions": state.loop.promotions,
            "outer_steps": state.loop.step,
            "seed": config.seed,
            "teacher_rollouts": state.loop.teacher_rollouts,
            "wall_seconds": {name: round(seconds, 1) for name, seconds in state.seconds.items()},
        }

    def _save(self) -> None:
        loop, state = self.state.loop, self.state
        tensors = {f"teacher/{k}": v for k, v in loop.teacher.tensors.items()}
        tensors |= {f"baseline/{k}": v for k, v in loop.baseline.tensors.items()}
        tensors |= {f"optimizer/{k}": v for k, v in loop.optimizer.state().items()}
        for arm, stack in state.arms.items():
            tensors |= {f"arm:{arm}/{k}": v for k, v in stack.tensors.items()}
        data = {
            "step": loop.step,
            "promotions": loop.promotions,
            "window": loop.window,
            "pq": loop.pq,
            "pass_rates": loop.pass_rates,
            "student_rollouts": loop.student_rollouts,
            "teacher_rollouts": loop.teacher_rollouts,
            "arm_rollouts": state.arm_rollouts,
            "seconds": self._seconds(),
        }
        self.folder.save(Checkpoint(state.stage, data, tensors))

    def _restore(self, checkpoint: Checkpoint) -> None:
        fresh, data, device = self.state.loop.baseline, checkpoint.data, self.examiner.backbone.device

        def stack(prefix: str) -> AdapterStack:
            start = f"{prefix}/"
            named = {k.removeprefix(start): v.to(device) for k, v in checkpoint.tensors.items() if k.startswith(start)}
            return AdapterStack(fresh.kind, named, fresh.scale)

        teacher = stack("teacher")
        optimizer = StackOptimizer(teacher, self.config.teacher.optimizer)
        prefix = "optimizer/"
        optimizer.restore({k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)})
        names = ("step", "promotions", "window", "pq", "pass_rates", "student_rollouts", "teacher_rollouts")
        loop = LoopState(teacher, optimizer, stack("baseline"), **{name: data[name] for name in names})
        arms = {arm: stack(f"arm:{arm}") for arm in data["arm_rollouts"]}
        screening = self.state.seconds.get("screen", 0.0)
        self.state = RunState(checkpoint.stage, loop, arms, data["arm_rollouts"], data["seconds"])
        self.state.seconds["screen"] = self.state.seconds.get("screen", 0.0) + screening


def _step_line(events: list[dict[str, Any]]) -> str:
    """One line on an outer step for the terminal."""
    step = events[0]
    best = max((r for r in step["reward_G"] if r is not None), default=float("nan"))
    mean = step["reward_mean"] if step["reward_mean"] is not None else float("nan")
    promoted = next((e for e in events if e["event"] == "promotion"), None)
    tail = f"  promoted dataset {promoted['dataset']}: pass rate {promoted['pass_rate']:.3f}" if promoted else ""
    return (
        f"step {step['step'] + 1:3d}  reward {mean:+.4f} (best {best:+.4f})  baseline {step['baseline_pass_rate']:.4f}  "
        f"accepted {step['accepted']}/{step['sampled']}  distinct {step['distinct_share']:.2f}{tail}"
    )


def execute(config: Config, out: Path, resume: bool, command: list[str], progress: Progress) -> dict[str, Any]:
    """Run `config` in the folder `out`; returns the summary. Raises ConfigError, DataError, RunFolderError, NothingToDo."""
    with RunFolder(out, config, command, resume) as folder, open_examiner(config) as examiner:
        return Run(config, folder, examiner, progress).execute()
