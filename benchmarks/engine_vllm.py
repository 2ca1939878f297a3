"""Sampling by the native engine and by vLLM with multi-LoRA: the same GPU, model, adapters, prompts and numbers of tokens.

    python benchmarks/engine_vllm.py [--shape 135m 0.5b 3b] [--adapters 16] [--ways bare seeded] [--limit 150] [--out FILE]

Random weights, no row ends early. Each side runs in a process of its own, one after the other: calls of 256 rows with 32
and with all tokens, then of all rows twice. Every rate is printed as it is measured; the one of the most rows counts, also
when --limit seconds are over before all is done. vLLM is measured bare (no seeds, no log-probabilities) and seeded (as this
package calls it: one of each for every row). Prints tokens a second and the ratio to vLLM's faster way; needs the extra
`vllm` and a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_models import prompts_of, random_stack, save_plain, surroundings, timed

from soar.config import ModelConfig, SamplingConfig
from soar.engine.rollouts import Request

WORK = {
    "135m": (2048, 100, 160),
    "0.5b": (2048, 100, 160),
    "3b": (1024, 100, 520),
    "toy": (64, 12, 8),
}  # rows, prompt, new
RANK, WAYS = 16, ("bare", "seeded")
FIRST_ROWS, FIRST_TOKENS = 256, 32


def measure(side: str, folder: str, shape: str, adapters: int, ways: list[str]) -> None:
    """Print the rates of one side as they are measured."""
    from soar.engine.load import load_backbone
    from soar.engine.sampler import NativeSampler

    rows, length, new = WORK[shape]
    backbone = load_backbone(ModelConfig(path=folder, lora_rank=RANK, dtype="bfloat16"))
    backbone.end_ids = frozenset()
    stack = random_stack(backbone, adapters)

    def rates(name: str, work: Callable[[list[list[list[int]]], int, int], Any]) -> None:
        """work(prompts_P_Q, attempts, new tokens), first small, then all of it, and that once more."""
        for count, tokens in ((FIRST_ROWS, FIRST_TOKENS), (FIRST_ROWS, new), (rows, new), (rows, new)):
            count, tokens = min(count, rows), min(tokens, new)
            attempts = min(32, count // adapters)
            prompts = prompts_of(backbone, adapters, count // adapters // attempts, length)
            seconds = timed(lambda p=prompts, a=attempts, t=tokens: work(p, a, t), 0, 1)
            print(
                f"RATE {name} {count * tokens / seconds} {count} rows of {tokens} tokens, {seconds:.1f} s", flush=True
            )

    def seeded(sampler: Any) -> Callable[[list[list[list[int]]], int, int], Any]:
        def work(prompts: list[list[list[int]]], attempts: int, tokens: int) -> None:
            seeds = [[1000 * p + q for q in range(len(asked))] for p, asked in enumerate(prompts)]
            sampler.sample(stack, Request(prompts, attempts, seeds, SamplingConfig(max_tokens=tokens)))

        return work

    if side == "soar":
        return rates("soar", seeded(NativeSampler(backbone)))
    from soar.engine.vllm import VllmSampler

    backbone.model.cpu()  # weights for the adapters' names and the digest are enough
    torch.cuda.empty_cache()
    began = time.perf_counter()
    sampler = VllmSampler(backbone, adapters, length + new, 0.85)
    print(f"vLLM is ready after {time.perf_counter() - began:.0f} s", flush=True)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    def bare(prompts: list[list[list[int]]], attempts: int, tokens: int) -> None:
        folders = sampler.adapters(stack)
        asked = [(ids, folder) for part, folder in zip(prompts, folders, strict=True) for ids in part * attempts]
        plain = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        loras = [LoRARequest(folder, int(Path(folder).name), folder) for _, folder in asked]
        sampler.llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], plain, lora_request=loras, use_tqdm=False)

    for way in ways:
        rates(f"vllm_{way}", bare if way == "bare" else seeded(sampler))


def child_rates(side: str, shape: str, folder: Path, adapters: int, ways: list[str], limit: float) -> dict[str, Any]:
    """The rate of every way at the most rows that a process of its own has printed within the limit, and all it printed."""
    words = [sys.executable, "-u", __file__, "--side", side, str(folder), "--shape", shape, "--adapters", str(adapters)]
    words += ["--ways", *ways]
    best: dict[str, tuple[int, float]] = {}  # rows x tokens and rate
    printed: list[str] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        timer = threading.Timer(limit, child.kill)
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            if line.startswith(("RATE ", "vLLM is ready")):
                printed.append(line.removeprefix("RATE ").strip())
            if line.startswith("RATE "):
                _, name, rate, rows, _, _, tokens, *_ = line.split()
                best[name] = max(best.get(name, (0, 0.0)), (int(rows) * int(tokens), float(rate)))
        timer.cancel()
    return {name: rate for name, (_, rate) in best.items()} | {f"{side}_printed": printed}


def compare(shape: str, adapters: int, ways: list[str], limit: float) -> dict[str, Any]:
    """Rates of both sides at one shape, and how many times as fast as vLLM's fastest way the native engine is."""
    rows, length, new = WORK[shape]
    found: dict[str, Any] = {"work": f"{rows} rows, {length} + {new} tokens, {adapters} adapters"}
    folder = save_plain(shape)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for side in ("soar", "vllm"):
        found |= child_rates(side, shape, folder, adapters, ways, limit)
    theirs = [rate for name, rate in found.items() if name in map("vllm_{}".format, WAYS)]
    if "soar" in found and theirs:
        found["decode_vs_vllm"] = found["soar"] / max(theirs)
    return found


def bench_vllm(shape: str) -> list[dict[str, Any]]:
    """Section `vllm` of engine.py."""
    found = compare(shape, 4 if shape == "toy" else 16, list(WAYS), 150.0)
    return [{"section": "vllm", "what": found.pop("work"), **found}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(WORK), default=["135m", "0.5b", "3b"])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for each side, loading included")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(*arguments.side, arguments.shape[0], arguments.adapters, arguments.ways)
        return
    table: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **surroundings()}
    if torch.cuda.is_available():
        table["device"] = torch.cuda.get_device_name()
    for shape in arguments.shape:
        table[shape] = compare(shape, arguments.adapters, arguments.ways, arguments.limit)
        print(shape, json.dumps(table[shape]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
