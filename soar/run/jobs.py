"""Students that another trainer trains: the sets of an outer step go out as files, pass rates or adapters come back.

`soar student --emit` begins such a run, `soar measure` goes on with it: the loop stops, saved, where students would train,
until there is a result of every set in `sets/STEP/results`. Teacher, base model and the measurement of adapters stay here.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from soar.config import ConfigError, Section, resolve_path
from soar.engine.policy import AdapterStack, concat
from soar.files import Row, finite, read_object, shell_words, write_atomic, write_json
from soar.loop.arms import read_adapter
from soar.loop.population import Population
from soar.loop.teacher import Measurement, OuterLoop
from soar.loop.write import QuestionSets
from soar.report.export import card, files_of, source_columns
from soar.run.folder import RunFolder
from soar.run.interrupts import Stopped, trust_word
from soar.run.setup import save_adapter
from soar.types import Decision, Problem


class Result(Section):
    """What a file in `results` says of one set. adapter: PEFT folder, from the file's own place. tokens: generated for it."""

    set: str
    pass_rate: float | None = Field(None, ge=0, le=1)
    adapter: Path | None = None
    tokens: int = Field(0, ge=0)


def read_results(folder: Path, names: list[str]) -> list[Result]:
    """The results of all sets in order, paths resolved; none when the folder is empty. Raises ConfigError."""
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        row, notes = read_object(path)
        if notes:
            raise ConfigError(f"{folder}/{notes[0]}; give the result of this set again")
        result = Result.read(row, str(path))
        if result.set not in names:
            raise ConfigError(f"{path}: set = {result.set!r}: expected one of {', '.join(names)}")
        if result.set in results:
            raise ConfigError(f"{path}: set {result.set} has another result in this folder; keep one of them")
        if result.pass_rate is None and result.adapter is None:
            raise ConfigError(f"{path}: expected pass_rate (0 to 1), adapter (a PEFT folder) or both")
        results[result.set] = result.model_copy(update={"adapter": result.adapter and path.parent / result.adapter})
    if results and (missing := [name for name in names if name not in results]):
        raise ConfigError(f"{folder} has no result of the set {', '.join(missing)}; add them, then measure again")
    return [results[name] for name in names] if results else []


class FileLoop(OuterLoop):
    """The outer loop of a run in `folder`. save(): write a checkpoint now."""

    def __init__(self, folder: RunFolder, save: Callable[[], None], *given: Any) -> None:
        super().__init__(*given)
        self.folder, self.say, self.save = folder.path, folder.say, save
        self.results: list[Result] = []
        self.go_on = f"soar measure {shell_words(folder.path)}{trust_word(folder.path)}"  # reads the results

    def write(self) -> QuestionSets:
        """Once for a step, however often it is begun again."""
        state, sets = self.state, self.state.written.get("sets")
        if state.written.get("step") != state.step or not isinstance(sets, QuestionSets):
            sets = super().write()
            state.written = {"step": state.step, "sets": sets}
            self.save()
        return sets

    def teach(self, question_sets: QuestionSets) -> Population:
        """Students that came back; the baseline for those with a pass rate alone. Raises Stopped until then, ConfigError."""
        student, state = self.config.student, self.state
        names = [f"{k}-{j}" for k in range(self.config.teacher.datasets) for j in range(student.repeats)]
        place = self.folder / "sets" / f"{state.step:04d}"
        plans, how = self.plans(question_sets)
        rows_P = [[problem for batch in plan.batches for problem in batch] for plan in plans]
        if not (place / "jobs.json").is_file():
            jobs = {"step": state.step, "sets": names, "rloo_steps": len(plans[0].batches)}
            jobs |= {"learning_rate": how.optimizer.lr}
            self._emit(place, dict(zip(names, rows_P, strict=True)), jobs)
        self.results = read_results(results := place / "results", names)
        if not self.results:
            why = f"outer step {state.step} waits for students of the {len(names)} training sets in {place}"
            advice = f"{place / 'README.md'} says how to train them; with a result of each in {results} continue with"
            raise Stopped(why, f"{advice}: {self.go_on}")
        stack = concat([self._load(r.set, r.adapter) if r.adapter else state.baseline for r in self.results])
        rollouts = sum(map(len, rows_P)) * student.attempts  # as the sets ask for
        state.student_rollouts += rollouts
        with self._spends("students"):
            self.env.tokens += sum(result.tokens for result in self.results)
        return Population(stack, torch.zeros(len(names), dtype=torch.bool), [{}], rollouts)

    def rates(self, students: AdapterStack, questions: list[Problem]) -> tuple[list[float], list[bool], list[Row]]:
        """Those that were given, the others measured here."""
        unknown = [p for p, result in enumerate(self.results) if result.pass_rate is None]
        rates, diverged, kept = super().rates(students.select(unknown), questions) if unknown else ([], [], [])
        measured = dict(zip(unknown, zip(rates, diverged, strict=True), strict=True))
        pairs = [measured.get(p, (result.pass_rate or 0.0, False)) for p, result in enumerate(self.results)]
        return [rate for rate, _ in pairs], [failed for _, failed in pairs], kept

    def _promote(
        self, decision: Decision, question_sets: QuestionSets, population: Population, measured: Measurement
    ) -> Row:
        name = f"{decision.dataset}-{decision.repeat}"
        if any(result.set == name and result.adapter is None for result in self.results):
            why = "the next step begins with its weights: its result has a pass_rate alone"
            raise ConfigError(f"the student of set {name} is promoted, and {why}; add its adapter, then measure again")
        return super()._promote(decision, question_sets, population, measured)

    def _load(self, name: str, folder: Path) -> AdapterStack:
        """An adapter as a student of the run, with the run's scale. Raises ConfigError."""
        try:
            stack, scale = read_adapter(self.env.backbone, folder, self.say), self.state.baseline.scale
        except ConfigError as error:
            raise ConfigError(f"adapter of set {name}: {error}; give it again, then measure again") from error
        tensors = {key: t * (stack.scale / scale) if key.endswith(".B") else t for key, t in stack.tensors.items()}
        return replace(stack, tensors=tensors, scale=scale)

    def _emit(self, place: Path, sets: dict[str, list[Problem]], jobs: dict[str, Any]) -> None:
        """The folder of a step; jobs.json comes last."""
        domain, model, config = self.env.verifier.domain, self.config.model, self.config.resolved()
        forms = ("trl", "verl") if importlib.util.find_spec("pyarrow") else ("trl",)
        about = {"step": self.state.step, "dataset": None, "reward": None}
        shared = json.loads(json.dumps(finite(source_columns(self.env.shared)), default=str))  # parquet has dates too
        for name, problems in {**sets, "measure": self.draw_reward_questions()}.items():
            kind = {"kind": "hard" if name == "measure" else "accepted"}
            rows = [{**shared, "question": p.question, "answer": p.answer, **kind, **about} for p in problems]
            for file, content in (item for form in forms for item in files_of(form, domain, rows, config).items()):
                write_atomic(place / file if file.endswith(".py") else place / name / file, content)
        save_adapter(self.env.backbone, self.state.baseline, place / "start")
        (place / "results").mkdir(parents=True, exist_ok=True)
        jobs |= {"model": resolve_path(model.path), "lora_rank": model.lora_rank, "lora_alpha": model.lora_alpha}
        jobs |= {"student": self.config.student.model_dump(mode="json")}
        write_atomic(place / "README.md", card("sets", jobs=jobs, student=jobs["student"], go_on=self.go_on))
        write_json(place / "jobs.json", jobs)
