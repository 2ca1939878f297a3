"""Students that another trainer trains: the sets of an outer step go out as files, adapters come back.

`soar student --emit` begins such a run, `soar measure` goes on with it: the loop stops, saved, where students would train,
until there is a folder `adapter` in every set of `sets/STEP`. Teacher, base model and the measurement stay here.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from soar.engine.load import resolve_path
from soar.engine.policy import AdapterStack, concat, load_adapter
from soar.engine.rollouts import Rollouts
from soar.files import write_atomic, write_json
from soar.loop.population import Population
from soar.loop.teacher import OuterLoop
from soar.loop.write import QuestionSets
from soar.problems.domain import domain_of
from soar.report.export import card, files_of
from soar.run.interrupts import Stopped
from soar.run.setup import save_adapter
from soar.types import Problem, UserError


class ResultError(UserError):
    """An adapter of a training set that cannot be used; the run is as it was, mend it and measure again."""


class FileLoop(OuterLoop):
    """The outer loop of a run in `folder`. save(): write a checkpoint now."""

    def __init__(self, folder: Path, save: Callable[[], None], *given: Any) -> None:
        super().__init__(*given)
        self.folder, self.save = folder, save

    def write(self) -> QuestionSets:
        """Once for a step, however often it is begun again."""
        state, written = self.state, self.state.written
        if written.get("step") != state.step:
            sets = super().write()
            state.written = {"step": state.step, "sets": asdict(sets)}
            self.save()
            return sets
        saved, rollouts = written["sets"], written["sets"]["rollouts"]
        rollouts = Rollouts(**{**rollouts, "prompts": tuple(map(tuple, rollouts["prompts"]))})
        problems_G_Q = [[Problem(**row) for row in rows] for rows in saved["problems_G_Q"]]
        return QuestionSets(**{**saved, "problems_G_Q": problems_G_Q, "rollouts": rollouts})

    def teach(self, question_sets: QuestionSets) -> Population:
        """The students that came back. Raises Stopped while some are missing, ResultError for one that cannot be used."""
        student, state = self.config.student, self.state
        names = [f"{k}-{j}" for k in range(self.config.teacher.datasets) for j in range(student.repeats)]
        place = self.folder / "sets" / f"{state.step:04d}"
        batches_P_S, _, lr = self.plans(question_sets)
        rows_P = [[problem for batch in batches for problem in batch] for batches in batches_P_S]
        if not (place / "jobs.json").is_file():
            jobs = {"step": state.step, "sets": names, "rloo_steps": len(batches_P_S[0]), "learning_rate": lr}
            self._emit(place, dict(zip(names, rows_P, strict=True)), jobs)
        if missing := [name for name in names if not (place / name / "adapter" / "adapter_config.json").is_file()]:
            raise Stopped(
                f"outer step {state.step} waits for the students of {len(missing)} of {len(names)} training sets in {place}: "
                f"{', '.join(missing)}",
                f"{place / 'README.md'} says how to train them; with a folder `adapter` in each set continue with: "
                f"soar measure {shlex.quote(str(self.folder))}",
            )
        stack = concat([self._load(place / name / "adapter") for name in names])
        rollouts = sum(map(len, rows_P)) * student.attempts  # as the sets ask for
        state.student_rollouts += rollouts
        return Population(stack, torch.zeros(len(names), dtype=torch.bool), [{}], rollouts)

    def _load(self, folder: Path) -> AdapterStack:
        """An adapter as a student of the run, with the run's scale. Raises ResultError."""
        try:
            stack, scale = load_adapter(self.env.backbone, folder), self.state.baseline.scale
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ResultError(f"{folder}: {error}; give the adapter of this set again, then measure again") from error
        tensors = {key: t * (stack.scale / scale) if key.endswith(".B") else t for key, t in stack.tensors.items()}
        return replace(stack, tensors=tensors, scale=scale)

    def _emit(self, place: Path, sets: dict[str, list[Problem]], jobs: dict[str, Any]) -> None:
        """The folder of a step; jobs.json comes last."""
        domain, model = domain_of(self.config.problems), self.config.model
        forms = ("trl", "verl") if importlib.util.find_spec("pyarrow") else ("trl",)
        about = {"step": self.state.step, "dataset": None, "reward": None}
        for name, problems in {**sets, "measure": self.draw_reward_questions()}.items():
            kind = {"kind": "hard" if name == "measure" else "accepted"}
            rows = [{"question": p.question, "answer": p.answer, **kind, **about} for p in problems]
            for file, content in (item for form in forms for item in files_of(form, domain, rows).items()):
                write_atomic(place / file if file == "reward.py" else place / name / file, content)
        save_adapter(self.env.backbone, self.state.baseline, place / "start")
        jobs |= {"model": resolve_path(model.path), "lora_rank": model.lora_rank, "lora_alpha": model.lora_alpha}
        jobs |= {"student": self.config.student.model_dump(mode="json")}
        write_atomic(place / "README.md", card("sets", jobs=jobs, student=jobs["student"], folder=self.folder))
        write_json(place / "jobs.json", jobs)
