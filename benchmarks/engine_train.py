"""Sections `train-*` of benchmarks/engine.py: one RLOO update of many policies.

python benchmarks/engine_train.py     the share of padding in each, by counting, without a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from engine_models import backbone_of, prompts_of, random_stack, step_bytes_and_flops, timed
from transformers import LlamaConfig

from soar.config import OptimizerConfig, SamplingConfig
from soar.engine import update as engine_update
from soar.engine.policy import Backbone
from soar.engine.rollouts import Rollouts
from soar.engine.update import StackOptimizer

Row = dict[str, Any]

WORK = {  # tokens of a prompt, of a completion; (policies, prompts of each, completions of a prompt), that of the page first
    "135m": (100, 160, ((16, 2, 32), (1, 32, 32), (64, 1, 32))),
    "0.5b": (100, 160, ((16, 1, 32),)),
    "3b": (100, 260, ((16, 1, 8),)),
    "toy": (12, 8, ((4, 2, 2), (1, 8, 2), (8, 1, 2))),
}
LIMIT = 60_000  # tokens of a micro-batch where padding is counted; on an H200 it follows from the free memory


def rollouts_of(backbone: Backbone, prompts: int, attempts: int, length: int, new: int, mixed: bool) -> Rollouts:
    """Random completions of `new` tokens, `attempts` to a prompt; mixed: of an eighth of them to all."""
    rows, generator = prompts * attempts, torch.Generator().manual_seed(0)
    tokens_B_T = torch.randint(5, 400, (rows, new), generator=generator)
    length_B = torch.full((rows,), new)
    if mixed:
        length_B = torch.randint(new // 8, new + 1, (rows,), generator=generator)
    given = [tuple(ids) for ids in prompts_of(backbone, 1, prompts, length)[0] for _ in range(attempts)]
    no = torch.zeros(rows, dtype=torch.bool)
    return Rollouts(tuple(given), tokens_B_T, length_B, torch.zeros(rows, new), no, no)


def update_of(
    backbone: Backbone, policies: int, rollouts: Rollouts, advantage_B: torch.Tensor, new: int
) -> Callable[[], None]:
    """An update of fresh random adapters, to be timed."""
    optimizer = StackOptimizer(random_stack(backbone, policies), OptimizerConfig(kl=0.0))

    def work() -> None:
        engine_update.update(backbone, optimizer, rollouts, advantage_B, 1e-6, SamplingConfig(max_tokens=new))

    return work


def bench_train(name: str, toy: bool, ceiling: tuple[float, float], profiled: Callable[..., list[Row]]) -> list[Row]:
    """One RLOO update: of 16 policies, completions of full length and of mixed lengths; at 135M also of 1 and of 64.

    tokens_per_second counts the prompt for every completion, as a trainer that computes it anew does; mfu the FLOPs of
    what is computed, mfu_per_attempt those of what such a trainer computes.
    """
    backbone = backbone_of("toy" if toy else name)
    length, new, settings = WORK["toy" if toy else name]
    found = []
    ways = [(*settings[0], "full"), (*settings[0], "mixed"), *((*setting, "full") for setting in settings[1:])]
    for policies, prompts, attempts, lengths in ways:
        rows = policies * prompts * attempts
        advantage_B = torch.randn(rows, generator=torch.Generator().manual_seed(1))
        rollouts = rollouts_of(backbone, policies * prompts, attempts, length, new, lengths == "mixed")
        length_B = rollouts.length_B
        work = update_of(backbone, policies, rollouts, advantage_B, new)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(work, 1, 3)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        kernels = profiled(work) if lengths == "full" and policies == settings[0][0] else []
        once, each = (
            train_flops(backbone.model.config, policies, length, attempts, length_B, s) for s in (True, False)
        )
        found.append(
            {
                "section": f"train-{name}",
                "what": f"{policies} adapters, {rows} rows, {attempts} a prompt, {length} + {new} tokens, {lengths}",
                "tokens_per_second": (int(length_B.sum()) + rows * length) / seconds,
                "mfu": once / seconds / ceiling[1],
                "mfu_per_attempt": each / seconds / ceiling[1],
                "seconds": seconds,
                "padding": padding(
                    backbone, policies, rollouts, advantage_B, engine_update.micro_batch_limit(backbone)
                ),
                "peak_gib": peak,
                **({"kernels": kernels} if kernels else {}),
            }
        )
    return found


def train_flops(
    config: LlamaConfig, policies: int, length: int, attempts: int, length_B: torch.Tensor, shared: bool
) -> float:
    """Forward pass and gradients of the activations; a prompt once for its attempts, or for each."""
    _, per_token = step_bytes_and_flops(config, 1, 0, policies, 16)
    head, width = 2 * config.vocab_size * config.hidden_size, config.num_attention_heads * config.head_dim
    new, prompts = length_B.double(), len(length_B) / (attempts if shared else 1)
    pairs = prompts * length**2 / 2 + (new**2 / 2 + new * length).sum().item()
    tokens = new.sum().item() + prompts * length
    linear = 2 * (tokens * (per_token - head) + new.sum().item() * head)
    return linear + 3 * config.num_hidden_layers * 4 * width * pairs


def groups_that_teach(policies: int, prompts: int, attempts: int, seed: int) -> dict[str, torch.Tensor]:
    """Advantages of all rows, by which half of the groups teaches; the other half's are 0."""
    generator, groups = torch.Generator().manual_seed(seed), policies * prompts
    half = torch.randperm(groups, generator=generator)[: groups // 2]
    ways = {
        "a random half of the groups teaches": torch.zeros(groups).index_fill(0, half, 1.0),
        "half of each policy's groups teaches": (torch.arange(groups) % 2).float(),
    }
    values_B = torch.randn(groups * attempts, generator=generator)
    return {what: teaches_G.repeat_interleave(attempts) * values_B for what, teaches_G in ways.items()}


def padding(backbone: Backbone, policies: int, rollouts: Rollouts, advantage_B: torch.Tensor, limit: int) -> float:
    """Share of the places that go through the model and hold no token of the rows that teach, nor of their prompts."""
    kept_P = engine_update.rows_that_count(rollouts, advantage_B, policies, OptimizerConfig(kl=0.0))
    used, places = 0, 0
    for _, packed in engine_update.micro_batches(backbone, rollouts, kept_P, limit):
        rows = packed.row_R.tolist()
        prompts = {(row // (rollouts.rows // policies), rollouts.prompts[row]) for row in rows}
        used += int((rollouts.length_B[rows] - 1).sum()) + sum(len(prompt) for _, prompt in prompts)
        places += packed.ids_P_n.numel()
    return 1 - used / places


SKIPPED = {"0.5b": (16, 8, 16, 100, 160), "toy": (4, 4, 2, 12, 8)}


def bench_skipped(toy: bool) -> list[Row]:
    """An update of which half of the groups teaches; tokens_per_second counts their rows alone, each with its prompt."""
    name = "toy" if toy else "0.5b"
    policies, prompts, attempts, length, new = SKIPPED[name]
    backbone = backbone_of(name)
    rollouts = rollouts_of(backbone, policies * prompts, attempts, length, new, False)
    found = []
    for what, advantage_B in groups_that_teach(policies, prompts, attempts, 1).items():
        seconds = timed(update_of(backbone, policies, rollouts, advantage_B, new), 1, 3)
        teaching = int((advantage_B != 0).sum())
        limit = engine_update.micro_batch_limit(backbone)
        found.append(
            {
                "section": "train-skipped",
                "what": f"{policies} adapters, {rollouts.rows} rows, {attempts} a prompt, {length} + {new} tokens, {what}",
                "tokens_per_second": teaching * (length + new) / seconds,
                "padding": padding(backbone, policies, rollouts, advantage_B, limit),
                "rows_that_teach": teaching,
                "seconds": seconds,
            }
        )
    return found


def main() -> None:
    """Print the padding of every section, by counting: no GPU, a tiny model, the sections' rows and lengths."""
    backbone = backbone_of("toy")
    works: dict[str, list[tuple[int, Rollouts, torch.Tensor]]] = {}
    for name in ("135m", "0.5b", "3b"):
        length, new, ((policies, prompts, attempts), *_) = WORK[name]
        mixed = rollouts_of(backbone, policies * prompts, attempts, length, new, True)
        works[f"train-{name}, mixed lengths"] = [(policies, mixed, torch.ones(mixed.rows))]
    policies, prompts, attempts, length, new = SKIPPED["0.5b"]
    full = rollouts_of(backbone, policies * prompts, attempts, length, new, False)
    for seed in range(1, 6):
        for what, advantage_B in groups_that_teach(policies, prompts, attempts, seed).items():
            works.setdefault(f"train-skipped, {what}", []).append((policies, full, advantage_B))
    for backbone.lanes in (False, True):
        print("a lane for each policy" if not backbone.lanes else "or for each prompt, where it is shorter: on a GPU")
        for what, draws in works.items():
            print(f"  {what}: {', '.join(f'{padding(backbone, *draw, LIMIT):.1%}' for draw in draws)}")


if __name__ == "__main__":
    main()
