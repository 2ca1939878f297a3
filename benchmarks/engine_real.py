"""Sampling and update on a real model's own completions: tokens a second, and what rows of very different lengths cost.

python benchmarks/engine_real.py MODEL PROBLEMS.jsonl OUT.json [ROWS [TOKENS]]

Samples ROWS completions (2,048) of TOKENS at most (1,024) as a run of recipe maths-qwen does, by one policy; the same
without an end; then one RLOO update on the first 256 of them, of which all or half of the groups teach. The lengths go beside
OUT, for `python benchmarks/engine.py --only tails --lengths FILE`. Every figure is written when it is found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from soar.config import OptimizerConfig, load
from soar.engine.rollouts import Request
from soar.engine.update import StackOptimizer, update
from soar.run.setup import open_env
from soar.types import Problem

ATTEMPTS, TRAINED = 16, 256


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """The second of two calls: the first compiles."""
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start, result = time.perf_counter(), work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(model: str, problems: Path, out: Path, rows: int = 2048, new: int = 1024) -> None:
    keys = [f"model.path={json.dumps(model)}", f"problems.source={json.dumps(str(problems))}"]
    lines = problems.read_text(encoding="utf-8").splitlines()
    config, found = load("maths-qwen", [*keys, f"student.sampling.max_tokens={new}"]), list[dict[str, Any]]()

    def note(**row: Any) -> None:
        found.append(row)
        print(row, flush=True)
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    with open_env(config) as env:
        backbone, ends, sampling = env.backbone, env.backbone.end_ids, config.student.sampling
        asked = [env.prompt(Problem(row["id"], row["question"], row["answer"])) for row in map(json.loads, lines)]
        prompts = [asked[i % len(asked)] for i in range(max(1, rows // ATTEMPTS))]
        stack = backbone.new_stack(1)
        request = Request([prompts], ATTEMPTS, [list(range(len(prompts)))], sampling)
        drawn = {}
        for what in ("as they end", "without an end"):
            backbone.end_ids = ends if what == "as they end" else frozenset((-1,))
            env.sampler.release()  # its graphs know the old ends
            seconds, drawn[what] = seconds_of(lambda: env.sampler.sample(stack, request))
            length_B = drawn[what].length_B
            tokens, cut = int(length_B.sum()), float((~drawn[what].ended_B).float().mean())
            shape = {"rows": len(length_B), "mean_length": tokens / len(length_B), "cut_off": cut}
            note(what=f"sampling {what}", **shape, seconds=seconds, tokens_per_second=tokens / seconds)
        backbone.end_ids = ends
        env.sampler.release()
        real, full = found
        lengths = drawn["as they end"].length_B
        note(
            what="tails",
            time_share=real["seconds"] / full["seconds"],
            token_share=int(lengths.sum()) / int(drawn["without an end"].length_B.sum()),
        )
        out.with_suffix(".lengths.json").write_text(json.dumps(lengths.tolist()), encoding="utf-8")
        trained = drawn["as they end"].select(list(range(min(len(lengths), TRAINED))))
        optimizer, generator = StackOptimizer(stack, OptimizerConfig(kl=0.0)), torch.Generator().manual_seed(1)
        for share in (1.0, 0.5):
            groups = trained.rows // ATTEMPTS
            teaches = (torch.rand(groups, generator=generator) < share).repeat_interleave(ATTEMPTS)
            advantage_B = torch.randn(trained.rows, generator=generator) * teaches
            work = (backbone, optimizer, trained, advantage_B, 1e-5, sampling)
            seconds = seconds_of(lambda work=work: update(*work))[0]
            tokens = int(trained.length_B[teaches].sum())
            note(
                what=f"update, {share:.0%} of the groups teach",
                rows=int(teaches.sum()),
                completion_tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
            )


if __name__ == "__main__":
    model, problems, out, *sizes = sys.argv[1:]
    measure(model, Path(problems), Path(out), *map(int, sizes))
