"""The groundwork of studies/smollm2: does each thing that SOAR needs hold for the model, before SOAR is run?

    python benchmarks/smollm2.py FOLDER --model DIR [--minutes 9] [--stages prompts ladder bounds screen pilot]

Five stages, each printed as it goes and kept in FOLDER/state.json, so that a later call goes on with what is left:

1. prompts: lists of worked sums that the teacher may continue; which one gives most right additions per accepted pair?
2. ladder: pass@1 of long chains of one-digit numbers; the hard level is the shortest with at most `--hardest` of it.
3. bounds: fresh students on right sums of 2 to 8 numbers, on right short sums, on the untrained teacher's questions, on those
   with the base model's majority answer, and on hard problems alone; questions first, then hard problems; one population per
   learning rate. pass@1 on levels between, and pass@k on held-out hard sums that the study does not use.
4. screen: `soar screen` of other sums of the hard level; FOLDER/screen/hard.jsonl with its evidence, and the curated file.
5. pilot: `soar run` with a few outer steps on them: rewards, promotions, seconds a step.

`--level`, `--list` and `--lr` take the place of a choice. Every key of the recipe can be set with `--set`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ladder import answer_of, as_problems, level_problems, teacher_report
from make_sums import sums

from soar import seeds
from soar.config import Config, load
from soar.engine.memory import release_memory
from soar.engine.sampler import NativeSampler
from soar.files import write_json
from soar.loop.arms import teacher_questions
from soar.loop.evaluate import count_correct
from soar.loop.rollout import RolloutEnv
from soar.loop.statistics import pass_at_k
from soar.loop.student import Plan, Training, TrainState, rloo_steps, shuffled_passes
from soar.problems.prompts import FORMATS
from soar.run.setup import open_env
from soar.types import Problem

STAGES = ("prompts", "ladder", "bounds", "screen", "pilot")
TUNING, STUDY = 7_000, 1_024  # seeds of the sums: those that choices are made on, and those of the study
TWO = ("6 + 9: 6 + 9 = 15", "4 + 8: 4 + 8 = 12", "9 + 5: 9 + 5 = 14")
THREE = (
    "7 + 5 + 8: 7 + 5 = 12, 12 + 8 = 20",
    "2 + 9 + 4: 2 + 9 = 11, 11 + 4 = 15",
    "8 + 6 + 3: 8 + 6 = 14, 14 + 3 = 17",
)
FOUR = (
    "3 + 8 + 4 + 9: 3 + 8 = 11, 11 + 4 = 15, 15 + 9 = 24",
    "5 + 2 + 9 + 7: 5 + 2 = 7, 7 + 9 = 16, 16 + 7 = 23",
)
SIX = ("4 + 7 + 2 + 8 + 5 + 6: 4 + 7 = 11, 11 + 2 = 13, 13 + 8 = 21, 21 + 5 = 26, 26 + 6 = 32",)
LISTS = {
    "3 2 4": FORMATS["sums"].default_subject.split("\n"),
    "2 3": [TWO[0], THREE[0]],
    "3 2": [THREE[0], TWO[0]],
    "2 3 4": [TWO[0], THREE[0], FOUR[0]],
    "4 3 2": [FOUR[0], THREE[0], TWO[0]],
    "2 3 2 3": [TWO[0], THREE[0], TWO[1], THREE[1]],
    "2 2 3 3 4": [TWO[0], TWO[1], THREE[0], THREE[1], FOUR[0]],
    "3 2 4 2 3 4": [THREE[0], TWO[0], FOUR[0], TWO[1], THREE[1], FOUR[1]],
    "3 4 2 3 4 2 3": [THREE[0], FOUR[0], TWO[0], THREE[1], FOUR[1], TWO[1], THREE[2]],
    "4 3 4 3": [FOUR[0], THREE[0], FOUR[1], THREE[1]],
    "4 6 3 4": [FOUR[0], SIX[0], THREE[0], FOUR[1]],
    "2 4 3 6 2 3": [TWO[0], FOUR[0], THREE[0], SIX[0], TWO[1], THREE[1]],
}


class TimeUp(Exception):
    """The minutes of this call are spent."""


class Groundwork:
    """The stages of one folder. config: of the recipe with `--set`; the level and the list are put in by `settings`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given, self.folder = arguments, arguments.folder
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "state.json"
        self.state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def note(self, stage: str, key: str, row: dict[str, Any]) -> None:
        """Keep one result and print it; raises TimeUp behind it."""
        self.state.setdefault(stage, {})[key] = row
        write_json(self.folder / "state.json", self.state)
        left = self.ends - time.monotonic()
        print(f"{stage} {key}: {json.dumps(row)}   [{left / 60:.1f} min left]", flush=True)
        if left < 0:
            raise TimeUp

    def level(self) -> int:
        """Numbers in a hard sum: the shortest chain that is hard enough, else the longest that was measured."""
        rows = self.state.get("ladder", {})
        if self.given.level or not rows:
            return int(self.given.level or 12)
        hard = [int(terms) for terms, row in rows.items() if row["pass@1"] <= self.given.hardest]
        return min(hard) if hard else max(map(int, rows))

    def teacher_choice(self) -> list[str]:
        """Overrides for list and temperature: those that gave most right additions per accepted pair."""
        rows = self.state.get("prompts", {})
        name = self.given.list
        if not name and rows:
            name = max(rows, key=lambda key: rows[key]["right additions"])
        return teacher_settings(*(name or "3 2 4 @1").split(" @"))

    def settings(self, terms: int | None = None) -> list[str]:
        """Overrides of the recipe: model, room for the working of a sum, the teacher's list."""
        room = 11 * (terms or self.level())
        return [
            f"model.path={json.dumps(self.given.model)}",
            f"student.sampling.max_tokens={room}",
            "teacher.sampling.max_tokens=96",
            *self.teacher_choice(),
            *self.given.overrides,
        ]

    def config(self, terms: int | None = None) -> Config:
        """The recipe with `settings`."""
        return load(self.given.recipe, self.settings(terms))

    def done(self, stage: str, key: str) -> bool:
        """Whether a result is there already."""
        return key in self.state.get(stage, {})

    def measure(self, stages: list[str]) -> None:
        """The stages that share one loaded model; its memory is given back."""
        with open_env(self.config()) as env:
            for name in stages:
                getattr(self, name)(env)
            if isinstance(env.sampler, NativeSampler):
                env.sampler.decoder.release()
        del env
        release_memory()

    def prompts(self, env: RolloutEnv) -> None:
        """What the untrained teacher writes behind each list."""
        for name in [f"{name} @{temperature:g}" for temperature in self.given.temperatures for name in LISTS]:
            if self.done("prompts", name):
                continue
            config = load(self.given.recipe, [*self.settings(), *teacher_settings(*name.split(" @"))])
            began, row = time.monotonic(), teacher_report(env, config, self.given.texts)
            pairs = max(1.0, row["accepted"] * self.given.texts)
            row["right additions"] = sum((terms - 1) * count for terms, count in row["right terms"].items()) / pairs
            row["texts"], row["seconds"] = row["texts"][:3], round(time.monotonic() - began, 1)
            self.note("prompts", name, row)
        print(f"teacher: {self.teacher_choice()}", flush=True)

    def ladder(self, env: RolloutEnv) -> None:
        """pass@1 of the base model on chains."""
        for terms in self.given.levels:
            if self.done("ladder", str(terms)):
                continue
            began, config = time.monotonic(), self.config(terms)
            problems = as_problems(level_problems(f"1x{terms}", self.given.count, TUNING))
            row = rates(env, config, None, problems, self.given.attempts)[0]
            self.note("ladder", str(terms), {**row, "seconds": round(time.monotonic() - began, 1)})
        print(f"hard level: 1x{self.level()}", flush=True)

    def bounds(self, env: RolloutEnv) -> None:
        """Students on each training set, as one population per learning rate."""
        given, config, terms = self.given, self.config(), self.level()
        left = [lr for lr in given.lr if not self.done("bounds", f"lr {lr:g} step {given.steps}")]
        if not left:
            return
        hard = as_problems(level_problems(f"1x{terms}", 3 * given.count, TUNING + 1))
        train, test = hard[: 2 * given.count], hard[2 * given.count :]
        sets = training_sets(env, config, self.note)
        probes = {str(t): as_problems(level_problems(f"1x{t}", given.count, TUNING + 2)) for t in given.probes}
        probes[f"{terms} hard"] = test
        per_step, names = config.student.prompts_per_step, list(sets)
        batches = []
        for name, questions in sets.items():
            seed, first = seeds.derive(TUNING, name), given.question_steps if questions else 0
            batches.append(
                [
                    *(shuffled_passes(questions, seed, first, per_step) if first else []),
                    *shuffled_passes(train, seed + 1, given.steps - first, per_step),
                ]
            )
        fresh = env.backbone.new_stack(seeds.derive(TUNING, "init"))
        for lr in left:
            began = time.monotonic()

            def look(students: Training, lr: float = lr, began: float = began) -> None:
                row: dict[str, Any] = {"trained s": round(time.monotonic() - began, 1)}
                for probe, problems in probes.items():
                    attempts = given.look_attempts if "hard" in probe else max(1, given.look_attempts // 4)
                    found = rates(env, config, students.stack, problems, attempts)
                    row[probe] = dict(zip(names, found, strict=True))
                print(table(row, names), flush=True)
                row["seconds"] = round(time.monotonic() - began, 1)
                self.note("bounds", f"lr {lr:g} step {students.step}", row)

            plans = [Plan(b, seeds.derive(TUNING, name, "student")) for name, b in zip(names, batches, strict=True)]
            students = Training(env.backbone, plans, [TrainState(0, fresh)] * len(names), config.student)
            for _ in rloo_steps(env, students, config.student, lr):
                if students.step == given.steps or students.step in given.looks:
                    look(students)

    def screen(self) -> None:
        """Hard problems of the study with their evidence, and curated sums for the arm real."""
        terms = self.level()
        candidates, real = self.folder / f"candidates-1x{terms}.jsonl", self.folder / "curated.jsonl"
        write_rows(candidates, level_problems(f"1x{terms}", self.given.candidates, STUDY))
        write_rows(real, curated(self.given.curated, STUDY))
        began, out = time.monotonic(), self.folder / "screen"
        again = ["--resume"] if (out / "manifest.json").is_file() else []
        self.soar("screen", self.given.recipe, "--problems", str(candidates), "--out", str(out), *again)
        event = json.loads((out / "screen.json").read_text(encoding="utf-8"))
        self.note("screen", f"1x{terms}", {**event, "seconds": round(time.monotonic() - began, 1)})

    def pilot(self) -> None:
        """A few outer steps on the tuning half of another seed; the study's seeds stay unused."""
        out = self.folder / f"pilot-1x{self.level()}"
        left = max(0.5, (self.ends - time.monotonic()) / 60 - 0.5)
        again = ["--resume"] if (out / "manifest.json").is_file() else []
        problems = ["--problems", str(self.folder / "screen" / "hard.jsonl")]
        sets = ["seed=100", f"teacher.steps={self.given.pilot_steps}", 'arms.run=["base", "ps"]']
        sets += [f"limits.max_hours={left / 60:.4f}"]
        began = time.monotonic()
        words = [word for text in sets for word in ("--set", text)]
        code = self.soar("run", self.given.recipe, *problems, *words, "--out", str(out), *again)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [
            {key: row[key] for key in ("step", "reward_G", "baseline_pass_rate", "promoted", "seconds")}
            for row in rows
            if row["event"] == "outer_step"
        ]
        arms = {row["arm"]: row["pass_at"] for row in rows if row["event"] == "evaluation"}
        row = {"code": code, "steps": steps, "arms": arms, "seconds": round(time.monotonic() - began, 1)}
        self.note("pilot", f"1x{self.level()}" + (" unfinished" if code else ""), row)

    def soar(self, *words: str) -> int:
        """One command of the package with this folder's settings, its lines passed on."""
        sets = [word for text in self.settings() for word in ("--set", text)]
        return subprocess.run([sys.executable, "-m", "soar.cli", *words, *sets]).returncode


def teacher_settings(name: str, temperature: str) -> list[str]:
    """Overrides for a list of worked sums and a temperature."""
    return [f"teacher.subject={json.dumps(chr(10).join(LISTS[name]))}", f"teacher.sampling.temperature={temperature}"]


def rates(
    env: RolloutEnv, config: Config, stack: Any, problems: list[Problem], attempts: int
) -> list[dict[str, float]]:
    """pass@1, pass@k at the most attempts (at most 32), and the share never solved, of every slice of `stack`."""
    seed = seeds.derive(TUNING, "rates")
    correct_P_H, cut_P_H, _ = count_correct(env, stack, problems, attempts, seed, config.student.sampling)
    k = min(32, attempts)
    return [
        {
            "pass@1": float(correct_H.mean()) / attempts,
            f"pass@{k}": sum(pass_at_k(attempts, int(c), k) for c in correct_H) / len(correct_H),
            "never": float((correct_H == 0).mean()),
            "cut": float(cut_H.mean()) / attempts,
        }
        for correct_H, cut_H in zip(correct_P_H, cut_P_H, strict=True)
    ]


def training_sets(env: RolloutEnv, config: Config, note: Any) -> dict[str, list[Problem]]:
    """Questions of every set: name -> problems, none of Hard-Only."""
    written = teacher_questions(env, None, config, "base_t")
    count = config.arms.questions
    found = {
        "real 2-8": as_problems(curated(count, TUNING)),
        "real 2-4": as_problems(curated(count, TUNING, (2, 3, 4))),
        "base_t": written,
        "hard only": [],
    }
    right = {}
    for name, problems in found.items():
        pairs = [(p.answer, answer) for p in problems if (answer := answer_of(p.question)) is not None]
        right[name] = [sum(given == answer for given, answer in pairs), len(pairs), len(problems)]
    note("sets", "right, sums, questions", right)
    return {name: problems for name, problems in found.items() if problems or name == "hard only"}


def curated(count: int, seed: int, terms: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)) -> list[dict[str, str]]:
    """Rows of sums with right answers, of all these lengths (of two one-digit numbers there are 81, so fewer of them)."""
    return sums(list(terms), 1, count, seed, "+", bare=True)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A problem file, unless it is there."""
    if not path.is_file():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(row: dict[str, Any], names: list[str]) -> str:
    """pass@1 of every training set on every probe; of the last probe pass@k too."""
    probes = [key for key, value in row.items() if isinstance(value, dict)]
    last = [key for key in row[probes[-1]][names[0]] if key.startswith("pass@")][-1]
    lines = [f"{'':10s}" + "".join(f"{probe:>10s}" for probe in probes) + f"{last:>10s}"]
    for name in names:
        cells = "".join(f"{row[probe][name]['pass@1']:10.4f}" for probe in probes)
        lines.append(f"{name:10s}{cells}{row[probes[-1]][name][last]:10.4f}")
    return "\n".join(lines)


def main() -> None:
    """Do the stages that are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", default="smollm2-sums")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--level", type=int, help="numbers in a hard sum, instead of the ladder's choice")
    parser.add_argument("--list", metavar="'NAME @TEMPERATURE'", help="the teacher's list, instead of the best one")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7])
    parser.add_argument("--hardest", type=float, default=1e-4, help="largest pass@1 of a hard level")
    parser.add_argument("--levels", type=int, nargs="+", default=[8, 9, 10, 11, 12, 14])
    parser.add_argument("--probes", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--question-steps", type=int, default=60)
    parser.add_argument("--looks", type=int, nargs="+", default=[15, 30, 60])
    parser.add_argument("--count", type=int, default=64, help="problems of a level")
    parser.add_argument("--attempts", type=int, default=128, help="of the ladder at each")
    parser.add_argument("--look-attempts", type=int, default=32, help="of bounds at each hard one, a quarter at others")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--curated", type=int, default=512)
    parser.add_argument("--pilot-steps", type=int, default=4)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    work = Groundwork(parser.parse_args())
    try:
        if wanted := [name for name in ("prompts", "ladder", "bounds") if name in work.given.stages]:
            work.measure(wanted)
        for name in [name for name in ("screen", "pilot") if name in work.given.stages]:
            if not work.done(name, f"1x{work.level()}"):
                getattr(work, name)()
    except TimeUp:
        print("time is up; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
