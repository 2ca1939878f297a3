"""vLLM itself against the native engine, on tiny random models; skipped where vLLM is not installed.

    pytest -n 0 -s tests/test_vllm_real.py

prints the figures of docs/results/vllm.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import random_stack, some_prompts, tiny_model, tiny_tokenizer

from soar.config import ModelConfig, OptimizerConfig, SamplingConfig
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update
from soar.engine.vllm import VllmSampler

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
vllm = pytest.importorskip("vllm")

P, Q, N = 3, 8, 2
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
GREEDY = SamplingConfig(max_tokens=24)
SEEDS = [[100 * p + q for q in range(Q)] for p in range(P)]
PROMPTS = [some_prompts(Q, seed=p) for p in range(P)]


@pytest.fixture(scope="module", params=["llama"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Backbone, VllmSampler]]:
    """A backbone and the vLLM sampler on the same files."""
    folder: Path = tmp_path_factory.mktemp("model")
    model = tiny_model(request.param, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4)  # wide draws make logits of a hundred, where float32 itself is coarse
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = ModelConfig(path=str(folder), lora_rank=4, lora_alpha=6.0, device="cpu", dtype="float32")
    backbone = Backbone(model, tiny_tokenizer(), config)
    yield backbone, VllmSampler(backbone, slots=P, context=128, memory=0.4)


def small_stack(backbone: Backbone, seed: int) -> AdapterStack:
    return random_stack(backbone, P, seed=seed, size=0.1)


def common(a: Rollouts, b: Rollouts) -> tuple[int, int, float]:
    """Rows with equal tokens, rows, and the largest difference of log-probabilities in the equal ones."""
    equal, gap = 0, 0.0
    for row in range(a.rows):
        n, m = int(a.length_B[row]), int(b.length_B[row])
        if n == m and torch.equal(a.tokens_B_T[row, :n], b.tokens_B_T[row, :n]):
            equal += 1
            gap = max(gap, (a.logprob_B_T[row, :n] - b.logprob_B_T[row, :n]).abs().max().item())
    return equal, a.rows, gap


def test_greedy_tokens_are_equal(both: tuple[Backbone, VllmSampler]) -> None:
    backbone, sampler = both
    native = NativeSampler(backbone)
    for name, stack in (("base model", None), (f"{P} adapters in one batch", small_stack(backbone, 1))):
        ask = (PROMPTS, N, SEEDS, GREEDY, True)
        found, wanted = sampler.sample(stack, *ask), native.sample(stack, *ask)
        equal, rows, gap = common(found, wanted)
        tokens = int(wanted.length_B.sum())
        print(f"\ngreedy, {name}: {equal} of {rows} rows equal ({tokens} tokens), log-probabilities within {gap:.1e}")
        assert equal == rows and gap < 1e-3
        assert torch.equal(found.ended_B, wanted.ended_B)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gap_of_sampled_rows(both: tuple[Backbone, VllmSampler], temperature: float) -> None:
    """Log-probabilities of the sampled tokens against the trainer's, and against a trainer whose weights moved on."""
    backbone, sampler = both
    sampling = SamplingConfig(max_tokens=24, temperature=temperature)
    stack = small_stack(backbone, 3)
    rollouts = sampler.sample(stack, PROMPTS, N, SEEDS, sampling)
    again = sampler.sample(stack, PROMPTS, N, SEEDS, sampling)
    assert common(rollouts, again)[0] == rollouts.rows
    other = sampler.sample(stack, PROMPTS, N, [[s + 1 for s in row] for row in SEEDS], sampling)
    assert common(rollouts, other)[0] < rollouts.rows
    gaps = []
    for trained in (stack, small_stack(backbone, 4)):
        optimizer = StackOptimizer(trained, OptimizerConfig(kl=0.0))
        advantage_B = torch.tensor([1.0, -1.0]).repeat(P * Q)
        gaps.append(
            update(backbone, trained, optimizer, rollouts, advantage_B, 1e-6, temperature, 24).gap_P.max().item()
        )
    print(f"\ntemperature {temperature}: gap {gaps[0]:.1e} nats a token, with stale weights {gaps[1]:.2f}")
    assert gaps[0] < 1e-3 and gaps[1] > 0.1
