"""Small runs on the embedded model, and fakes with which one outer step can be worked out by hand."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from helpers import EOS, handmade_rollouts
from tables import write_jsonl
from torch import Tensor
from world_text import ANSWER_MARK, WorldText

from soar.config import Config, load
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request, Rollouts
from soar.engine.update import StackOptimizer, UpdateStats
from soar.loop.population import Population
from soar.loop.rollout import RolloutBatch
from soar.loop.teacher import LoopState, OuterLoop
from soar.loop.write import QuestionSets
from soar.run.folder import RunFolder
from soar.run.pipeline import execute
from soar.run.progress import Progress
from soar.types import Problem, Verdict

TINY = tuple((Path(__file__).parent / "cases" / "tiny.txt").read_text(encoding="utf-8").split())
"""Overrides of the recipe `tiny`: a run of a second or two in which all problems count as hard, every step promotes."""
BRIEF = ("student.sampling.max_tokens=10", "teacher.sampling.max_tokens=16")
"""Overrides for easy problems, whose answers are shorter: a run takes as long as its longest rows."""


def sets(*overrides: str) -> list[str]:
    """Overrides as words of a command."""
    return [part for override in overrides for part in ("--set", override)]


def tiny_config(*overrides: str) -> Config:
    """The recipe `tiny` with TINY and further overrides."""
    return load(None, [*TINY, *overrides])


def run_tiny(out: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """A run in this process; returns its summary."""
    config, progress = tiny_config(*overrides), Progress(quiet=True)
    with progress, RunFolder(out, config, ["soar", "run", *overrides], resume, progress.insist) as folder:
        return execute(folder, config, progress)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a line ends at a newline only, not at the other separators of `splitlines`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one kind or all."""
    return [row for row in read_jsonl(folder / "metrics.jsonl") if kind is None or row["event"] == kind]


def without_clock(value: Any) -> Any:
    """The value without what a clock gave: `seconds` and `wall_seconds`, at any depth."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in ("seconds", "wall_seconds")}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def outcome(folder: Path, *left_out: str) -> dict[str, Any]:
    """What equal runs have in common: events (but for the keys `left_out`) and summary without clocks, bytes of the rest."""
    kept = r"(hard|teacher|student|arms)/|(questions|pq|rollouts)\.jsonl$"
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    rows = [{k: v for k, v in row.items() if k not in left_out} for row in without_clock(events(folder))]
    summary = without_clock(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    files = {name: path.read_bytes() for name, path in names.items() if re.match(kept, name)}
    return {**files, "metrics.jsonl": rows, "summary.json": summary}


def easy_problems(count: int, seed: int = 0) -> list[Problem]:
    """Distinct well-posed questions from the embedded model's pretraining text: some it solves, some it does not."""
    text, rng = WorldText("tiny"), random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        _, completion = text.document(rng)
        question = completion.partition(ANSWER_MARK)[0].strip()
        if (answer := text.world.solve(question)) is not None:
            name = f"easy-{len(found)}" if len(found) != 9 else "tensors"  # a checkpoint's own word
            found.setdefault(question, Problem(name, question, answer))
    return list(found.values())


def write_problems(path: Path, problems: Sequence[Problem]) -> Path:
    return write_jsonl(path, [{"id": p.id, "question": p.question, "answer": p.answer} for p in problems])


def rollouts_of(backbone: Backbone, texts: Sequence[str], prompt: Sequence[int]) -> Rollouts:
    """Rollouts that say `texts` after one prompt, each with an end token."""
    rows = [[*backbone.tokenizer.encode(text, add_special_tokens=False), min(backbone.end_ids)] for text in texts]
    return handmade_rollouts([prompt] * len(rows), rows)


class Says:
    """A sampler that says given texts, each as an attempt at the first prompt: round and round, or what a function of the
    prompts as text and the number of attempts gives. said: how many so far."""

    def __init__(self, backbone: Backbone, texts: Sequence[str] | Callable[[list[str], int], list[str]]) -> None:
        self.backbone, self.texts, self.said = backbone, texts, 0

    def sample(self, stack: Any, request: Request) -> Rollouts:
        (prompts,), attempts = request.prompts_P_Q, request.attempts
        if callable(self.texts):
            texts = self.texts(self.backbone.tokenizer.batch_decode(prompts), attempts)
        else:
            texts = [self.texts[(self.said + i) % len(self.texts)] for i in range(attempts * len(prompts))]
        self.said += len(texts)
        return rollouts_of(self.backbone, texts, prompts[0])


def skills(values: Sequence[float]) -> AdapterStack:
    """A stack of one student per value; the value is its skill (see `FakeExaminer`)."""
    return AdapterStack("full", {"skill": torch.tensor(values, dtype=torch.float32)[:, None]})


class FakeExaminer:
    """Students of known skill: skill s solves the hard problems with a number < s; NaN is a diverged student.

    asked: ids of the problems of every call. unscorable: ids of problems whose check cannot decide.
    """

    def __init__(self, config: Config, unscorable: Sequence[str] = ()) -> None:
        self.backbone = SimpleNamespace(context=1000, device=torch.device("cpu"), config=config.model, tokenizer=None)
        self.backbone.new_stack = lambda seed, policies=1: skills([0.0] * policies)
        self.fmt = SimpleNamespace(name="tiny", teacher_ids=lambda tokenizer, subject: [1])  # without a tokenizer
        self.sampler = self.verifier = self.parallel = None
        self.threads, self.tokens = 1, 0
        self.asked: list[list[str]] = []
        self.unscorable = set(unscorable)

    def rollout(self, stack: Any, problems_P_Q: list[list[Problem]], attempts: int, *rest: Any, **more: Any) -> Any:
        self.asked.append([problem.id for problem in problems_P_Q[0]])
        skill_P = stack.tensors["skill"][:, 0]
        number_P_Q = torch.tensor([[float(p.id.removeprefix("hard-")) for p in problems] for problems in problems_P_Q])
        solved = (number_P_Q < skill_P[:, None])[:, :, None].repeat(1, 1, attempts)
        valid_Q = torch.tensor([problem.id not in self.unscorable for problem in problems_P_Q[0]])
        valid = valid_Q[None, :, None].expand_as(solved)
        verdicts = [Verdict.CORRECT if s else Verdict.WRONG for s in solved.flatten().tolist()]
        self.tokens += len(verdicts)
        return RolloutBatch(problems_P_Q, 1.0, None, verdicts, solved.float(), solved, valid, skill_P.isnan())


def hard_problems(count: int) -> list[Problem]:
    """hard-0, hard-1, ...; see `FakeExaminer`."""
    return [Problem(f"hard-{i}", f"hard question {i}", "0") for i in range(count)]


class ScriptedLoop(OuterLoop):
    """An outer loop whose students have given skills: skill_S_G_R, one entry a step; failed_S_G_R marks divergence in
    training. Questions are named after step, dataset and number, the fourth as the first; nothing is sampled or trained."""

    def __init__(
        self, config: Config, skill_S_G_R: Any, failed_S_G_R: Any = None, unscorable: Sequence[str] = ()
    ) -> None:
        env: Any = FakeExaminer(config, unscorable)
        teacher, baseline = skills([0.5]), skills([0.0])
        state = LoopState(teacher, StackOptimizer(teacher, config.teacher.optimizer), baseline)
        super().__init__(env, hard_problems(8), config, state)
        self.skill_S_G_R, self.failed_S_G_R = skill_S_G_R, failed_S_G_R
        self.populations: list[Population] = []
        self.question_sets: list[QuestionSets] = []

    def write(self) -> QuestionSets:
        G, n, step = self.config.teacher.datasets, self.config.teacher.questions, self.state.step
        names = [[(i, f"{step} {k} {i % 3}") for i in range(n)] for k in range(G)]
        sets = [[Problem(f"{name}/{i}", f"question {name}", str(i)) for i, name in some] for some in names]
        rollouts = handmade_rollouts([[1]] * (G * n), [[EOS]] * (G * n))
        self.question_sets.append(QuestionSets(sets, rollouts, G * n + 2, {"no_answer": 2}))
        return self.question_sets[-1]

    def teach(self, question_sets: QuestionSets) -> Population:
        skill_G_R = np.array(self.skill_S_G_R[self.state.step])
        failed = np.zeros_like(skill_G_R, bool) if self.failed_S_G_R is None else self.failed_S_G_R[self.state.step]
        failed_P = torch.tensor(np.array(failed, bool).reshape(-1))
        self.populations.append(Population(skills(skill_G_R.reshape(-1).tolist()), failed_P, [{"pass_rate": 0.0}], 0))
        return self.populations[-1]


class UpdateLog:
    """Takes the place of `teacher.update`: keeps the advantages [G, n] and the rate of each call, trains nothing."""

    def __init__(self, datasets: int) -> None:
        self.datasets = datasets
        self.advantages: list[Tensor] = []
        self.rates: list[float] = []

    def __call__(self, backbone: Any, optimizer: Any, rollouts: Rollouts, *rest: Any) -> Any:
        advantage_B, rate, *_ = rest
        self.advantages.append(advantage_B.view(self.datasets, -1))
        self.rates.append(rate)
        zero_P = torch.zeros(1)
        return UpdateStats(zero_P, zero_P, zero_P, zero_P.bool())
