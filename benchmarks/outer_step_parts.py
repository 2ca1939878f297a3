"""What `outer_step.py` does: the env on random weights, the timed loop, the comparison, the extrapolation."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_models import SHAPES, backbone_of, commit, wait
from random_domain import QUESTION_WORDS, RANDOM, words
from soar.plan.calibrate import calibrate, device_name

import soar
from soar.config import Config, load
from soar.domains.candidates import candidates
from soar.engine.load import GIB, LLAMA, counted, memory_of
from soar.engine.sampler import NativeSampler
from soar.loop.rollout import RolloutBatch, RolloutEnv, usable
from soar.loop.teacher import OuterLoop, new_state
from soar.plan import forecast
from soar.plan.forecast import Assumptions, Forecast, Rates, assumed
from soar.problems.domain import load_domain
from soar.problems.grading import open_pool
from soar.run.setup import choose_threads

PAPER_STEP_HOURS = (1536 / 200, 1920 / 200)  # GPU-hours of the paper's run in 200 outer steps, arms and all
PAPER_MEANS = (256, 400, 512)  # completion tokens of the extrapolation; the paper does not give its own
STUDENT_PROMPT = 150  # tokens
LINES = ("teacher writes", "students train", "students measured", "teacher learns")


ONLY_THE_LOOP = {"arms.run": '["base"]'}


class Watch(RolloutEnv):
    """An env that adds up the seconds, rows and tokens of `attempt`."""

    seconds, rows, tokens = 0.0, 0, 0

    def attempt(self, *arguments: Any, **named: Any) -> RolloutBatch:
        """As the env's."""
        wait()
        began = time.perf_counter()
        found = super().attempt(*arguments, **named)
        self.seconds += time.perf_counter() - began
        self.rows += found.count
        self.tokens += int(found.rollouts.length_B.sum())
        return found


class TimedLoop(OuterLoop):
    """The outer loop with the seconds of each of its parts, and of the sampling within."""

    def __init__(self, env: Watch, *arguments: Any) -> None:
        super().__init__(env, *arguments)
        self.taken: dict[str, float] = {}
        self.sampling: dict[str, float] = {}
        self.counted: dict[str, tuple[int, int]] = {}

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        watch = self.env
        assert isinstance(watch, Watch)
        watch.seconds, watch.rows, watch.tokens = 0.0, 0, 0
        wait()
        began = time.perf_counter()
        yield
        wait()
        self.taken[name], self.sampling[name] = time.perf_counter() - began, watch.seconds
        self.counted[name] = (watch.rows, watch.tokens)
        print(
            f"  {name:18s} {self.taken[name]:8.1f} s, of which sampling and grading {watch.seconds:.1f} s", flush=True
        )

    def write(self) -> Any:
        """Step 1."""
        with self._part("teacher writes"):
            return super().write()

    def teach(self, question_sets: Any) -> Any:
        """Step 2a."""
        with self._part("students train"):
            return super().teach(question_sets)

    def measure(self, population: Any) -> Any:
        """Step 2b."""
        with self._part("students measured"):
            return super().measure(population)

    def learn(self, question_sets: Any, reward_U: Any) -> Any:
        """Step 4."""
        with self._part("teacher learns"):
            return super().learn(question_sets, reward_U)


def config_of(arguments: argparse.Namespace, source: Path) -> Config:
    """The paper's setting with the counts of the command line, and nothing but the loop."""
    domain = f"{Path(__file__).parent / 'random_domain.py'}:RANDOM"
    changes = {
        "problems.source": source,
        "problems.domain": domain,
        "problems.verify_workers": arguments.verify_workers,
        "screen.attempts": 0,
        "teacher.steps": 1,
        "teacher.datasets": arguments.datasets,
        "teacher.questions": arguments.questions,
        "teacher.sampling.max_tokens": min(512, arguments.max_tokens),
        "student.repeats": arguments.repeats,
        "student.steps": arguments.steps,
        "student.prompts_per_step": arguments.prompts,
        "student.attempts": arguments.attempts,
        "student.sampling.max_tokens": arguments.max_tokens,
        "reward.questions": arguments.reward_questions,
        "evaluate.attempts": 1,
        "evaluate.ks": "[1]",
        "threads": 1,
        **ONLY_THE_LOOP,
    }
    return load("paper-math", [f"{key}={value}" for key, value in changes.items()])


def write_problems(path: Path, count: int) -> Path:
    """Questions of as many words as the teacher's."""
    rows = [{"question": words(QUESTION_WORDS, i) + f" w{300 + i}", "answer": "1"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(expected: Forecast) -> dict[str, float]:
    """Seconds of the four parts of the loop."""
    pairs = zip(expected.works, expected.seconds, strict=True)
    return {work.name: seconds or 0.0 for work, seconds in pairs if work.name in LINES}


def compare(expected: dict[str, float], actual: dict[str, float]) -> dict[str, float]:
    """Print forecast, actual and error of every part and in all; returns the errors."""
    rows = {name: (expected[name], actual[name]) for name in LINES}
    rows["in all"] = (sum(expected.values()), sum(actual.values()))
    print(f"\n  {'':18s} {'forecast':>10s} {'actual':>10s} {'error':>8s}   (actual / forecast - 1)")
    errors = {}
    for name, (before, after) in rows.items():
        errors[name] = after / max(before, 1e-9) - 1
        print(f"  {name:18s} {before:8.1f} s {after:8.1f} s {errors[name]:+8.1%}", flush=True)
    return errors


def paper_step(rates: Rates, known: Assumptions, tokens: int) -> dict[str, float]:
    """Seconds by part of one outer step of the paper's setting at these rates, with so many tokens a completion."""
    changes = {"teacher.steps": 1, "screen.attempts": 0, "problems.source": "none.jsonl", **ONLY_THE_LOOP}
    config = load("paper-math", [f"{key}={value}" for key, value in changes.items()])
    values = {"candidates": 256.0, "hard_share": 1.0, "reward_tokens": float(tokens), "question_tokens": float(tokens)}
    values |= {"teacher_tokens": min(256.0, float(tokens))}
    return lines_of(forecast(config, known.with_values(values, "given"), rates))


def actual_rates(loop: TimedLoop, config: Config, measured: Assumptions, rates: Rates) -> Rates:
    """The rates of the step that was done; the teacher's as calibrated, which is a few seconds of it."""
    rows, tokens = loop.counted["students train"]
    sampling, whole = loop.sampling["students train"], loop.taken["students train"]
    trained = (tokens + rows * measured.question_prompt_tokens) / max(1e-9, whole - sampling)
    asked = loop.counted["students measured"][1] / max(1e-9, loop.taken["students measured"])
    return Rates(
        {**rates.sample, "student": tokens / max(1e-9, sampling), "measure": asked},
        {**rates.train, "student": trained},
        "of this step",
    )


def extrapolate(rates: Rates, measured: Assumptions) -> list[dict[str, float]]:
    """Print what the paper's outer step would take at these rates, for several mean lengths."""
    low, high = PAPER_STEP_HOURS
    print(
        "\nextrapolated, not measured: the paper's outer step (16 students x 10 RLOO steps x 8 x 32 rollouts, 256 pairs, 64 "
        f"reward questions)\nat the rates of this step; the paper's run took {low:.1f} to {high:.1f} GPU-hours for each of "
        "200 outer steps, everything else included"
    )
    found = []
    for tokens in PAPER_MEANS:
        by_part = paper_step(rates, measured, tokens)
        hours = sum(by_part.values()) / 3600
        parts = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in by_part.items())
        less = f"{low / hours:.0f} to {high / hours:.0f} times less"
        print(f"  {tokens} tokens a completion: {hours:.2f} GPU-hours ({less}): {parts}")
        found.append({"tokens": tokens, "gpu_hours": hours, **by_part})
    return found


def prepared(arguments: argparse.Namespace, folder: Path) -> tuple[Config, Watch]:
    """The config and an env on random weights."""
    config = config_of(arguments, write_problems(folder / "problems.jsonl", 2 * max(16, arguments.reward_questions)))
    backbone = backbone_of(arguments.shape)
    backbone.end_ids = frozenset(range(4, backbone.vocabulary, arguments.mean))
    pool = open_pool(load_domain(config.problems.domain), config.problems)
    return config, Watch(backbone, NativeSampler(backbone), RANDOM.prompts, pool, config.student.reward)


def memory_words(arguments: argparse.Namespace, config: Config, env: RolloutEnv) -> str:
    """Memory by arithmetic beside the most that PyTorch had allocated."""
    shape = LLAMA["3B"]
    if arguments.shape != "3b":
        own = SHAPES[arguments.shape]
        widths = [own[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")]
        shape = counted(*widths, own["num_key_value_heads"], own["head_dim"], own["vocab_size"], True, arguments.shape)
    kind = "bfloat16" if env.backbone.dtype is torch.bfloat16 else "float32"
    needed = memory_of(config, shape, STUDENT_PROMPT, kind)
    text = f"memory: at least {needed.least / GIB:.2f} GiB by arithmetic"
    if env.backbone.device.type == "cuda":
        text += f"; most allocated {torch.cuda.max_memory_allocated() / GIB:.2f} GiB, batches grow with what is free"
    return text


def main(arguments: argparse.Namespace) -> None:
    """Calibrate, forecast, do the step, compare, extrapolate."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        config, env = prepared(arguments, Path(name))
        with env.verifier:
            workers = choose_threads(env.backbone, config.threads)
            device = device_name(env)
            say(f"random weights in the shape {arguments.shape} on {device}; calibrating")
            known, rates = calibrate(env, config, workers, assumed(config), arguments.calibrate)
            expected = forecast(config, known, rates)
            say("forecast of this step:")
            print("\n".join(expected.lines()), flush=True)
            problems, _ = usable(env, config, candidates(config).problems, print)
            hard = problems[: len(problems) // 2]
            say("the outer step:")
            loop = TimedLoop(env, hard, config, new_state(env, config), workers)
            events, _ = loop.step()
            first = dict(loop.taken)
            if arguments.warm:
                say("once more, for the comparison:")
                loop.state.pass_rates.clear()  # so that the baseline is measured again, as in the forecast
                events, _ = loop.step()
    errors = compare(lines_of(expected), loop.taken)
    gap = events[0]["student_last"]["logprob_gap"]
    length = statistics.fmean([loop.counted["students train"][1] / loop.counted["students train"][0]])
    say(f"{length:.0f} tokens a completion, log-probability gap of sampler and trainer {gap:.1e} nats a token")
    print(memory_words(arguments, config, env))
    own = actual_rates(loop, config, known, rates)
    print(
        f"rates of this step: {own.sample['student']:,.0f} tokens/s sampled, {own.train['student']:,.0f} trained (KL term in)"
    )
    paper = extrapolate(own, replace(known, promotions=0.0))
    say("done")
    if arguments.json is not None:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        figures = {
            "date": time.strftime("%Y-%m-%d"), "commit": commit(),
            "device": device, "torch": torch.__version__, "soar": soar.__version__, "settings": settings,
            "forecast_s": lines_of(expected), "actual_s": loop.taken, "first_step_s": first,
            "sampling_s": loop.sampling, "errors": errors,
            "calibrated": expected.event(device), "rates": {"sample": dict(own.sample), "train": dict(own.train)},
            "paper_step": paper, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
