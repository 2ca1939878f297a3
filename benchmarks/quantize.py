"""What an 8-bit or 4-bit base costs in accuracy and time, on the embedded model or another one.

    python benchmarks/quantize.py [--model PATH] [--gguf FILE] [--rows 64]

The full model samples; a quantized one scores the same tokens. Printed: bytes of the linear layers, mean and largest absolute
difference of log-probabilities a token, and the time to score them as a ratio.
Problems are those of the embedded world for its model, short sums else.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from soar.config import ModelConfig, SamplingConfig
from soar.domains.world import get_world
from soar.engine.logprobs import token_logprobs
from soar.engine.policy import Backbone, load_backbone
from soar.engine.quantize import QuantizedLinear
from soar.engine.sampler import NativeSampler
from soar.problems.prompts import get_format


def linear_bytes(backbone: Backbone) -> int:
    total = 0
    for layer in backbone.layers.values():
        base = layer.base
        kept = [base.packed, base.scale] if isinstance(base, QuantizedLinear) else [base.weight]
        total += sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return total


@torch.no_grad()
def scored(backbone: Backbone, rollouts: Any) -> tuple[torch.Tensor, float]:
    """Log-probabilities [B, T], and seconds of the fastest of three times."""
    best = float("inf")
    with backbone.use(None):
        for _ in range(3):
            began = time.perf_counter()
            found = token_logprobs(backbone, rollouts, 1.0)
            best = min(best, time.perf_counter() - began)
    return found, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--gguf")
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    tiny = arguments.model == "builtin:tiny"
    common: dict[str, Any] = {"path": arguments.model, "gguf_file": arguments.gguf}
    full = load_backbone(ModelConfig(**common))
    fmt = get_format("tiny" if tiny else "question_answer")
    world = get_world("tiny").hard_problems(arguments.rows, 0)
    asked = [p.question if tiny else f"What is {17 * i + 5} + {23 * i + 8}?" for i, p in enumerate(world)]
    prompts = [fmt.student_ids(full.tokenizer, question) for question in asked]
    sampling = SamplingConfig(max_tokens=48)
    rollouts = NativeSampler(full).sample(None, [prompts], 1, [list(range(len(prompts)))], sampling)
    mask = torch.arange(rollouts.tokens_B_T.shape[1])[None] < rollouts.length_B[:, None]
    wanted, plain = scored(full, rollouts)
    print(f"{arguments.model}: {int(mask.sum())} tokens, {linear_bytes(full):,} bytes of linear layers")
    for name in ("8bit", "4bit"):
        small = load_backbone(ModelConfig(quantization=name, **common))
        found, seconds = scored(small, rollouts)
        gap = (found - wanted).abs()[mask.to(found.device)]
        print(
            f"  {name}: {linear_bytes(small):,} bytes, log-probabilities differ by {gap.mean():.4f} nats a token "
            f"(at most {gap.max():.2f}), scoring takes {seconds / plain:.2f} times as long"
        )


if __name__ == "__main__":
    main()
