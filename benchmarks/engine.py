"""The population engine against its ceilings and against the usual tools, side by side in one run on one GPU.

    python benchmarks/engine.py [--out FILE] [--toy] [--profile] [--only SECTION ...] [--seconds N] [--lengths FILE]

Weights are random in the shape of SmolLM2-135M and Llama-3.2-3B (speed does not depend on them), no row ends early.
decode: tokens a second, and the share of the roofline: the time that the bytes of a step (weights, adapters, cache read,
logits) take at the measured copy bandwidth, or its FLOPs at the measured matmul rate, whichever is longer. Beside it
`transformers.generate` on the base model; batching: its continuous batching. adapters: the same rows with 1, 4, 16, 64
adapters. train: tokens a second and MFU (`engine_train.py`; FLOPs of the forward pass and of the gradients of activations,
base weights frozen; recomputation is not counted). train-skipped: an update of which half of the groups teaches. inner:
16 students x 10 RLOO steps with the time of its stages. trl: TRL's RLOOTrainer on the same work, one student, two steps
measured, times 16 x 10, with `generate` and with its continuous batching. tails: rows of very different lengths, against
full ones; without --lengths (a JSON list, drawn from) a row ends with the same chance at every token, such that as many
are cut off as in the pilot on MATH. screen: screening, grading aside, against the sampler alone. few: a decoding step with
few policies and rows at the Qwen2.5-1.5B shape (`engine_few.py`). vllm: `engine_vllm.py` at the 0.5B shape. --profile:
where the device's time goes in an update, in sampling with many adapters, and in a step of `few`. --toy: tiny shapes, any
device, to see that the script runs. --seconds: no section begins later. Every section is written to FILE when it ends, its
rows with commit, date, cores and ceilings of their call; the file's other sections stay. Its summary has figures by name.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from engine_few import bench_few
from engine_generate import bench_batching, bench_generate
from engine_models import (
    SHAPES,
    backbone_of,
    clocked,
    commit,
    dataset,
    prompts_of,
    random_stack,
    reward_of_text,
    step_bytes_and_flops,
    surroundings,
    timed,
    tokenizer_of,
    wait,
)
from engine_train import bench_skipped, bench_train
from engine_trl import bench_trl
from engine_vllm import bench_vllm

import soar
from soar.config import Config, OptimizerConfig, SamplingConfig, StudentConfig
from soar.engine import rollouts as engine_rollouts
from soar.engine.policy import AdapterStack
from soar.engine.rollouts import Request, Rollouts
from soar.engine.sampler import NativeSampler
from soar.loop import student
from soar.loop.population import train_population
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Plan
from soar.problems.prompts import PromptFormat
from soar.run import screen as run_screen
from soar.types import Problem, Verdict

Row = dict[str, Any]


def ceilings(toy: bool) -> tuple[float, float]:
    """(bytes a second of a large copy, read and write counted; FLOP/s of a large bf16 product) on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, side = (1 << 22, 256) if toy else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 2 / timed(lambda: target.copy_(source), 3, 10)
    one = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    rate = 2 * side**3 / timed(lambda: one @ one, 3, 10)
    return bandwidth, rate


def sample(
    sampler: NativeSampler,
    stack: AdapterStack | None,
    policies: int,
    rows: int,
    length: int,
    new: int,
    attempts: int,
    stop: tuple[str, ...] = (),
) -> Rollouts:
    """rows // (policies * attempts) prompts per policy, `attempts` completions of `new` tokens each."""
    questions = rows // (policies * attempts)
    prompts = prompts_of(sampler.backbone, policies, questions, length)
    seeds = [[1000 * p + q for q in range(questions)] for p in range(policies)]
    return sampler.sample(stack, Request(prompts, attempts, seeds, SamplingConfig(max_tokens=new, stop=stop)))


def bench_decode(name: str, toy: bool, ceiling: tuple[float, float], with_generate: bool) -> list[Row]:
    """Sections decode-135m and decode-3b."""
    rows, length, new = (32, 12, 8) if toy else (2048, 100, 160) if name == "135m" else (1024, 100, 520)
    policies, attempts = (4, 4) if toy else (16, 32)
    backbone = backbone_of("toy" if toy else name)
    config, stack = backbone.model.config, random_stack(backbone, policies)
    sampler = NativeSampler(backbone)
    runs = 1 if name == "3b" else 3
    found = []
    print(f"liger: {backbone.fused}")
    ways: list[tuple[str, AdapterStack | None]] = [(f"{policies} adapters", stack), ("base only", None)]
    for label, given in ways:
        count = policies if given is not None else 1
        if name == "3b":  # kernels are made in a short call; a long one as warm-up would cost a minute
            sample(sampler, given, count, rows, length, 8, attempts)
        seconds = timed(
            lambda s=given, c=count: sample(sampler, s, c, rows, length, new, attempts), int(name != "3b"), runs
        )
        size, flops = step_bytes_and_flops(config, rows, length + new / 2, count if given is not None else 0, 16)
        ideal = new * max(size / ceiling[0], flops / ceiling[1])
        found.append(
            {
                "section": f"decode-{name}",
                "what": f"soar, {label}",
                "tokens_per_second": rows * new / seconds,
                "roofline_share": ideal / seconds,
                "seconds": seconds,
                "milliseconds_per_step": 1000 * seconds / new,
            }
        )
    sampler.decoder.release()
    if with_generate:
        found += bench_generate(toy, rows, length, new, attempts)
        for row in found[2:]:
            row["soar_ratio"] = found[0]["tokens_per_second"] / row["tokens_per_second"]
    return found


PROFILE = False


def profiled(work: Callable[[], Any], top: int = 32) -> list[Row]:
    """With --profile: print where the device's time goes, and give it as rows."""
    if not PROFILE or not torch.cuda.is_available():
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        wait()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    for e in events[:top]:
        print(f"  {e.self_device_time_total:9,.0f} us  {e.count:6.0f} x  {e.key[:86]}", flush=True)
    return [{"kernel": e.key[:86], "launches": e.count, "microseconds": e.self_device_time_total} for e in events]


def bench_adapters(toy: bool) -> list[Row]:
    """The same rows, split among 1, 4, 16 and 64 adapters."""
    backbone = backbone_of("toy" if toy else "135m")
    rows, length, new = (64, 12, 8) if toy else (2048, 100, 64)
    sampler, found = NativeSampler(backbone), []
    for policies in (1, 4, 16, 64):
        stack = random_stack(backbone, policies)
        attempts = min(32, rows // policies)
        work = partial(sample, sampler, stack, policies, rows, length, new, attempts)
        seconds = timed(work, 1, 3)
        found.append(
            {
                "section": "adapters",
                "what": f"{policies} adapters",
                "tokens_per_second": rows * new / seconds,
                "seconds": seconds,
            }
        )
        found[-1]["slower_than_1"] = seconds / found[0]["seconds"]
        if policies > 4 and (kernels := profiled(work)):
            found[-1]["kernels"] = kernels
        sampler.decoder.release()
    return found


def summary(rows: list[Row]) -> Row:
    """The figures by name; None where the section has not run."""

    def one(section: str, key: str) -> float | None:
        return next((row[key] for row in rows if row["section"] == section and key in row), None)

    updates = {
        f"update_{name}": {
            "tokens_per_s": one(f"train-{name}", "tokens_per_second"),
            "mfu": one(f"train-{name}", "mfu"),
        }
        for name in ("135m", "0.5b", "3b")
    }
    inner, trl = one("inner", "seconds"), [row["seconds"] for row in rows if row["section"] == "trl"]
    return {
        **updates,
        "inner_vs_trl": min(trl) / inner if trl and inner else None,
        "decode_vs_vllm": one("vllm", "decode_vs_vllm"),
        "adapters_64_vs_1": next((row["slower_than_1"] for row in rows if row["what"] == "64 adapters"), None),
        "decode_few": {row["what"]: row["decode_few"] for row in rows if "decode_few" in row} or None,
        "tails_vs_full": one("tails", "tails_vs_full"),
        "screen_vs_sampler": one("screen", "screen_vs_sampler"),
    }


class Checker:
    """Verdicts that cost nothing."""

    def check(self, texts: list[str], golds: list[str], columns: Any = None) -> list[Verdict]:
        return [Verdict.CORRECT if reward_of_text(text) else Verdict.WRONG for text in texts]

    def outcomes(self, texts: list[str], *given: Any) -> list[tuple[str, str]]:
        return [("wrong", "") for _ in texts]


def bare_env(name: str) -> RolloutEnv:
    """Prompts are the questions themselves."""
    backbone = backbone_of(name)
    bare = PromptFormat("bare", "marker", teacher_template="", student_template="{question}", turns=False)
    return RolloutEnv(backbone, NativeSampler(backbone), bare, Checker())  # type: ignore[arg-type]


class GivenLengths:
    """In place of stop strings: rows end at given lengths, and run on until somebody looks, as with stop strings."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def ends(self, tokens_B_T: torch.Tensor, length_B: torch.Tensor, first: int, upto: int) -> list[tuple[int, int]]:
        asked = enumerate(self.lengths[: len(tokens_B_T)])
        return [(row, length) for row, length in asked if first < length <= upto and length < tokens_B_T.shape[1]]


def bench_tails(toy: bool, lengths_file: Path | None) -> list[Row]:
    """Tokens a second of rows of very different lengths, and of as many full ones.

    Lengths are drawn from the file; without one a row ends with the same probability at every token, so that a third is
    cut off at 640, as Qwen2.5-Coder-0.5B's were.
    """
    rows, length, new = (64, 12, 24) if toy else (2048, 100, 640)
    policies, attempts = (4, 4) if toy else (16, 32)
    backbone = backbone_of("toy" if toy else "0.5b")
    sampler, stack, found = NativeSampler(backbone), random_stack(backbone, policies), []
    ends, stop, real = 0, (), engine_rollouts.StopStrings
    if lengths_file:
        given = random.Random(0).choices(json.loads(lengths_file.read_text(encoding="utf-8")), k=rows)
        stop = ("looked for",)
    else:
        short = sample(sampler, stack, policies, rows, length, 16, attempts).tokens_B_T
        fresh = (short[:, 1:] != short[:, :-1]).double().mean().item()  # random models repeat themselves
        ends = max(1, round(backbone.vocabulary * (1 - 0.34 ** (1 / new)) / fresh))
    for lengths in ("full", "mixed"):
        backbone.end_ids = frozenset(range(5, 5 + ends)) if lengths == "mixed" and ends else frozenset((-1,))
        sampler.decoder.release()  # graphs hold the end tokens
        if lengths_file:
            asked = GivenLengths(given if lengths == "mixed" else [])
            engine_rollouts.StopStrings = lambda *_, asked=asked: asked  # type: ignore[assignment,misc]
        drawn: list[Rollouts] = []
        work = partial(sample, sampler, stack, policies, rows, length, new, attempts, stop)
        seconds = timed(lambda d=drawn, w=work: d.append(w()), 1, 1)
        length_B = drawn[-1].length_B.double()
        found.append(
            {
                "section": "tails",
                "what": f"{rows} rows, {policies} adapters, {length} + {new} tokens, {lengths}",
                "tokens_per_second": length_B.sum().item() / seconds,
                "seconds": seconds,
                "mean_length": length_B.mean().item(),
                "cut_off": (~drawn[-1].ended_B).double().mean().item(),
                **({"lengths": lengths_file.name} if lengths_file else {}),
            }
        )
    engine_rollouts.StopStrings = real  # type: ignore[misc]
    found[1]["tails_vs_full"] = found[1]["tokens_per_second"] / found[0]["tokens_per_second"]
    return found


def bench_screen(toy: bool) -> list[Row]:
    """Tokens a second of a screening in its waves, and of the sampler alone with the same rows."""
    count, attempts, new = (8, 32, 8) if toy else (512, 64, 160)
    env = bare_env("toy" if toy else "135m")
    problems = [Problem(str(i), question, "-") for i, question in enumerate(dataset(count))]
    screen = {"attempts": attempts, "early_stop": False}
    config = Config.model_validate({"student": {"sampling": {"max_tokens": new}}, "screen": screen})
    folder: Any = SimpleNamespace(path="", rows=lambda *given: [], append=lambda *given: None)
    prompts, seeds = [[env.prompt(problem) for problem in problems]], [list(range(count))]

    def screening() -> None:
        run_screen.screen(env, problems, config, folder, {}, lambda done, total: None)

    def alone() -> None:
        env.sampler.sample(None, Request(prompts, attempts, seeds, config.student.sampling))

    found: list[Row] = []
    for what, work in (("sampler alone", alone), ("screening", screening)):
        seconds = timed(work, 1, 1)
        row = {"section": "screen", "what": f"{what}, {count} problems x {attempts} attempts x {new} tokens"}
        found.append({**row, "tokens_per_second": count * attempts * new / seconds, "seconds": seconds})
    found[1]["screen_vs_sampler"] = found[0]["seconds"] / found[1]["seconds"]
    return found


def bench_inner(toy: bool) -> list[Row]:
    """16 students x 10 RLOO steps x 8 prompts x 32 attempts, and how long each stage of it takes."""
    students, steps, prompts, attempts, new = (2, 2, 2, 4, 8) if toy else (16, 10, 8, 32, 160)
    env = bare_env("toy" if toy else "135m")
    backbone, sampler = env.backbone, cast(NativeSampler, env.sampler)
    questions = dataset(prompts * steps)
    problems = [Problem(str(i), question, "-") for i, question in enumerate(questions)]
    config = StudentConfig(
        attempts=attempts,
        prompts_per_step=prompts,
        steps=steps,
        reward="binary",
        sampling=SamplingConfig(max_tokens=new),
        optimizer=OptimizerConfig(lr=1e-5, kl=0.0),
    )
    batches = [[problems[s * prompts : (s + 1) * prompts] for s in range(steps)] for _ in range(students)]
    start = random_stack(backbone, 1)
    plans = [Plan(batches_S, seed) for seed, batches_S in enumerate(batches)]
    one_step = [Plan(plan.batches[:1], plan.seed) for plan in plans]
    train_population(env, start, one_step, config)  # kernels and graphs are made here
    spent = {"sampling": 0.0, "update": 0.0}

    sampler.sample = clocked(spent, "sampling", sampler.sample)  # type: ignore[method-assign]
    real = student.update
    student.update = clocked(spent, "update", real)
    seconds = timed(lambda: train_population(env, start, plans, config), 0, 1)
    student.update = real
    found = [
        {
            "section": "inner",
            "what": f"soar, {students} students x {steps} steps x {prompts} x {attempts}, {new} new tokens",
            "seconds": seconds,
            **{f"{stage}_seconds": took for stage, took in spent.items()},
        }
    ]
    sampler.decoder.release()
    return found


def run_sections(
    arguments: argparse.Namespace, sections: dict[str, Callable[[], list[Row]]], head: Row, rows: list[Row]
) -> None:
    """One section after another; each is printed, and written to the file, when it ends."""
    begun = time.perf_counter()
    keys = ("commit", "date", "cpu_count", "copy_bytes_per_second", "matmul_flops_per_second")
    of_call = {key: head[key] for key in keys}
    for name in arguments.only:
        if time.perf_counter() - begun > arguments.seconds:
            print(f"{name}: left out, {arguments.seconds:.0f} s are over", flush=True)
            continue
        print(f"--- {name} at {time.perf_counter() - begun:.0f} s", flush=True)
        try:
            rows += [{**row, **of_call} for row in sections[name]()]
        except Exception:  # the other sections still have their say; the failure is printed and the table lacks it
            traceback.print_exc()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for row in [row for row in rows if row["section"] == name]:  # printed as they came
            numbers = {k: v for k, v in row.items() if isinstance(v, float) and k not in of_call}
            print(
                f"{row['section']:13s} {row['what']:62s} " + "  ".join(f"{k} {v:,.4g}" for k, v in numbers.items()),
                flush=True,
            )
        if arguments.out:
            kept = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if arguments.out.exists() else []
            kept = [row for row in kept if row["section"] not in {row["section"] for row in rows}]
            table = {**head, "summary": summary(kept + rows), "rows": kept + rows}
            arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [
        "decode-135m", "train-135m", "train-0.5b", "inner", "trl", "decode-3b", "adapters", "train-3b", "batching",
        "tails", "screen", "few", "train-skipped", "vllm",
    ]  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no section begins later than this")
    parser.add_argument("--out", type=Path, help="write the table as JSON; sections of an earlier run there are kept")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--lengths", type=Path, help="of completions, for `tails`: a JSON list of whole numbers")
    arguments = parser.parse_args()
    globals()["PROFILE"] = arguments.profile
    assert set(SHAPES) >= {"135m", "3b", "toy"} and tokenizer_of("toy")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    ceiling = ceilings(arguments.toy)
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "soar": soar.__version__,
        "commit": commit(),
        **surroundings(),
        "copy_bytes_per_second": ceiling[0],
        "matmul_flops_per_second": ceiling[1],
    }
    print(
        f"{device}, torch {torch.__version__}: copy {ceiling[0] / 1e12:.2f} TB/s, bf16 {ceiling[1] / 1e12:.0f} TFLOP/s"
    )
    rows: list[Row] = []
    sections: dict[str, Callable[[], list[Row]]] = {
        "decode-135m": lambda: bench_decode("135m", arguments.toy, ceiling, True),
        "decode-3b": lambda: bench_decode("3b", arguments.toy, ceiling, False),
        "adapters": lambda: bench_adapters(arguments.toy),
        "train-135m": lambda: bench_train("135m", arguments.toy, ceiling, profiled),
        "train-0.5b": lambda: bench_train("0.5b", arguments.toy, ceiling, profiled),
        "train-3b": lambda: bench_train("3b", arguments.toy, ceiling, profiled),
        "inner": lambda: bench_inner(arguments.toy),
        "batching": lambda: bench_batching(arguments.toy),
        "trl": lambda: bench_trl(arguments.toy, rows),
        "tails": lambda: bench_tails(arguments.toy, arguments.lengths),
        "screen": lambda: bench_screen(arguments.toy),
        "few": lambda: bench_few(arguments.toy, ceiling, profiled),
        "train-skipped": lambda: bench_skipped(arguments.toy),
        "vllm": lambda: bench_vllm("toy" if arguments.toy else "0.5b"),
    }
    run_sections(arguments, sections, head, rows)


if __name__ == "__main__":
    main()
