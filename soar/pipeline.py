"""A whole run: load, screen, outer loop, arms, evaluation, summary, report. Each stage ends in a checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from soar import seeds
from soar.arms import TRAINED, arm_batches, arm_steps, left_out, train_arms
from soar.config import Config
from soar.data import split, write_hard
from soar.evaluate import count_correct, paired_difference, summarize
from soar.files import write_json, write_lines
from soar.hardset import find_hard
from soar.lessons import TeacherError
from soar.policy import AdapterStack, concat, save_adapter
from soar.progress import Progress
from soar.record import Checkpoint, RunFolder
from soar.report import write_report
from soar.rollout import Examiner
from soar.state import STAGES, RunState, from_checkpoint, to_checkpoint
from soar.student import Population
from soar.teacher import OuterLoop, new_state
from soar.training_sets import Material, read_pq, read_teacher, training_questions
from soar.types import Problem, UserError
from soar.workbench import choose_workers, open_examiner
from soar.worlds import get_world


class NothingToDo(UserError):
    """The problem set holds too few hard problems for a run."""


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
        config = self.config
        found = find_hard(self.examiner, config, self.folder, self.workers, self.progress)
        hard = found.problems
        if len(hard) < 4:
            raise NothingToDo(found.too_few(config))
        self.hard_train, self.hard_test = split(hard, config.seed, config.problems.test_share)
        if first:
            for name, part in (("train", self.hard_train), ("test", self.hard_test)):
                write_hard(self.folder.path / "hard" / f"{name}.jsonl", part, found.screenings(part), found.evidence)
            self.folder.append("metrics.jsonl", [found.event])
        self.progress.say(
            f"{len(hard)} of {len(found.found)} candidates are hard: at most {config.screen.max_successes} of "
            f"{config.screen.attempts} attempts correct; {len(self.hard_train)} to train, {len(self.hard_test)} held out"
        )

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
        wanted = [arm for arm in TRAINED if arm in config.arms.run and arm not in state.arms]
        material = self._material()
        batches: dict[str, list[list[Problem]]] = {}
        for arm in wanted:
            try:
                questions = training_questions(arm, self.examiner, config, material)
            except TeacherError as error:
                # A teacher that writes nothing acceptable any more is a result; the other arms are still worth having.
                self.folder.append("metrics.jsonl", [left_out(arm, str(error))])
                self.progress.say(f"the arm {arm} is left out: {error}")
                continue
            if arm == "hard_only" or questions:
                steps = arm_steps(arm, config, state.loop.student_rollouts)
                batches[arm] = arm_batches(arm, config, self.hard_train, questions, steps)
                self._keep_questions(arm, questions)
        write_lines(self.folder.path / "pq_labels.jsonl", material.labels)
        with self.progress.task("arms", sum(len(b) for b in batches.values())) as advance:

            def keep(arm: str, population: Population, events: list[dict[str, Any]]) -> None:
                self.folder.append("metrics.jsonl", events)
                state.arms[arm], state.arm_rollouts[arm] = population.stack, population.rollouts
                self._save()

            fresh = self.examiner.backbone.new_stack(seeds.derive(config.seed, "student", "init"))
            train_arms(self.examiner, fresh, batches, config, self.workers, lambda arm: advance(1), keep)

    def _material(self) -> Material:
        """What the arms can train on: this run's promotion questions and teacher, or those that the config names."""
        arms, loop = self.config.arms, self.state.loop
        rows, teacher = loop.pq, loop.teacher
        if arms.pq_from:
            rows = read_pq(Path(arms.pq_from))
            self.folder.note_hashes(pq_from=digest_of(rows))
        if arms.teacher_from:
            teacher = read_teacher(self.examiner.backbone, Path(arms.teacher_from))
            self.folder.note_hashes(teacher_from=teacher.digest())
        pq = [Problem(f"pq-{i}", row["question"], row["answer"]) for i, row in enumerate(rows)]
        return Material(pq, teacher, self.hard_test, self.workers, self.progress.say)

    def _keep_questions(self, arm: str, questions: list[Problem]) -> None:
        rows = self._labelled([{"question": p.question, "answer": p.answer} for p in questions])
        write_lines(self.folder.path / "arms" / arm / "questions.jsonl", rows)

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
        for arm, entry in arms.items():
            if (arm.startswith("pq") and not config.arms.pq_from) or (
                arm == "teacher_t" and not config.arms.teacher_from
            ):
                entry["search_rollouts"] = state.loop.student_rollouts
        pairs = [(a, "hard_only") for a in events if a not in ("base", "hard_only") and "hard_only" in events]
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
        self.folder.save(to_checkpoint(replace(self.state, seconds=self._seconds())))

    def _restore(self, checkpoint: Checkpoint) -> None:
        screening = self.state.seconds.get("screen", 0.0)
        self.state = from_checkpoint(checkpoint, self.examiner.backbone.device, self.config)
        self.state.seconds["screen"] = self.state.seconds.get("screen", 0.0) + screening


def digest_of(rows: list[dict[str, Any]]) -> str:
    """sha256 over questions and answers."""
    text = "\n".join(f"{row['question']}\t{row['answer']}" for row in rows)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
