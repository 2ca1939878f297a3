"""Sampling by the native engine and by vLLM with multi-LoRA: the same GPU, model, adapters, prompts and numbers of tokens.

    python benchmarks/engine_vllm.py [--shape 135m 0.5b 3b] [--adapters 16] [--out FILE]

Random weights, no row ends early. Each side runs in a process of its own, one after the other: a short call first, then the
fastest of three. vLLM is measured as this package calls it (a seed and a log-probability for every row) and bare (neither).
Prints tokens a second and the ratio; needs the extra `vllm` and a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from engine_models import prompts_of, random_stack, save_plain, surroundings, timed

from soar.config import ModelConfig, SamplingConfig

WORK = {
    "135m": (2048, 100, 160),
    "0.5b": (2048, 100, 160),
    "3b": (1024, 100, 520),
    "toy": (64, 12, 8),
}  # rows, prompt, new
RANK, ATTEMPTS = 16, 32


def measure(side: str, folder: str, shape: str, adapters: int) -> dict[str, float]:
    """Tokens a second of one side."""
    from soar.engine.load import load_backbone
    from soar.engine.sampler import NativeSampler

    rows, length, new = WORK[shape]
    backbone = load_backbone(ModelConfig(path=folder, lora_rank=RANK, dtype="bfloat16"))
    backbone.end_ids = frozenset()
    stack = random_stack(backbone, adapters)
    questions = rows // adapters // ATTEMPTS or 1
    attempts = rows // adapters // questions
    prompts = prompts_of(backbone, adapters, questions, length)
    seeds = [[1000 * p + q for q in range(questions)] for p in range(adapters)]

    def rate(sampler: Any) -> float:
        sampler.sample(stack, prompts, attempts, seeds, SamplingConfig(max_tokens=8))
        seconds = timed(lambda: sampler.sample(stack, prompts, attempts, seeds, SamplingConfig(max_tokens=new)), 1, 3)
        return rows * new / seconds

    if side == "soar":
        return {"soar": rate(NativeSampler(backbone))}
    from soar.engine.vllm import VllmEngine, VllmSampler

    backbone.model.cpu()  # weights for the adapters' names and the digest are enough
    torch.cuda.empty_cache()
    engine = VllmEngine(backbone, RANK, adapters, length + new, 0.85)
    sampler = VllmSampler(backbone, engine, adapters)
    found = {"vllm_as_called_here": rate(sampler)}
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    held = list(sampler.loaded.values())
    texts = [{"prompt_token_ids": ids} for asked in prompts for ids in asked for _ in range(attempts)]
    loras = [LoRARequest(f"soar-{i}", i, "in memory") for i in held for _ in range(questions * attempts)]
    plain = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
    for name, given in (("vllm_bare", loras), ("vllm_bare_no_adapters", None)):
        seconds = timed(lambda given=given: engine.llm.generate(texts, plain, lora_request=given, use_tqdm=False), 1, 3)
        found[name] = rows * new / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(WORK), default=["135m", "0.5b", "3b"])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print("RESULT " + json.dumps(measure(*arguments.side, arguments.shape[0], arguments.adapters)), flush=True)
        return
    table: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **surroundings()}
    if torch.cuda.is_available():
        table["device"] = torch.cuda.get_device_name()
    for shape in arguments.shape:
        folder = save_plain(shape)
        found: dict[str, Any] = {}
        for side in ("soar", "vllm"):
            words = [sys.executable, __file__, "--side", side, str(folder), "--shape", shape]
            lines = []
            words += ["--adapters", str(arguments.adapters)]
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
                assert child.stdout
                for line in child.stdout:
                    print(line, end="", flush=True)
                    lines += [line] if line.startswith("RESULT ") else []
            if not lines:
                print(f"{shape} {side}: failed", flush=True)
                continue
            found |= json.loads(lines[-1].removeprefix("RESULT "))
        rows, length, new = WORK[shape]
        table[shape] = found | {"work": f"{rows} rows, {length} + {new} tokens, {arguments.adapters} adapters"}
        if {"soar", "vllm_as_called_here"} <= set(found):
            table[shape]["decode_vs_vllm"] = found["soar"] / max(found["vllm_as_called_here"], found["vllm_bare"])
        print(shape, json.dumps(table[shape]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
