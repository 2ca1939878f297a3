"""vLLM itself against the native engine, on tiny random models; skipped where vLLM is not installed.

    pytest -n 0 -s tests/test_vllm_real.py

prints the figures of docs/results/vllm.md.
"""

import os

import pytest
import torch
from helpers import random_stack, some_prompts, tiny_model, tiny_tokenizer

from soar.config import ModelConfig, OptimizerConfig, SamplingConfig
from soar.engine.policy import Backbone
from soar.engine.rollouts import Request, Rollouts
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update
from soar.engine.vllm import VllmSampler

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
vllm = pytest.importorskip("vllm")

P, Q, N = 3, 8, 2
SEEDS = [[100 * p + q for q in range(Q)] for p in range(P)]
PROMPTS = [some_prompts(Q, seed=p) for p in range(P)]


def common(a: Rollouts, b: Rollouts) -> tuple[int, float]:
    """Rows with equal tokens, and the largest difference of log-probabilities in them."""
    equal, gap = 0, 0.0
    for row in range(a.rows):
        n, m = int(a.length_B[row]), int(b.length_B[row])
        if n == m and torch.equal(a.tokens_B_T[row, :n], b.tokens_B_T[row, :n]):
            equal += 1
            gap = max(gap, (a.logprob_B_T[row, :n] - b.logprob_B_T[row, :n]).abs().max().item())
    return equal, gap


def test_vllm_is_the_native_engine(tmp_path):
    """Greedy tokens are equal; log-probabilities of drawn ones are the trainer's, unless its weights moved on."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=32, num_attention_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.dim() > 1 else 1.0)  # in logits of a hundred float32 itself is coarse
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), lora_rank=4, lora_alpha=6.0, device="cpu", dtype="float32")
    backbone = Backbone(model, tiny_tokenizer(), config)
    sampler, stack, stale = VllmSampler(backbone, P, 128, 0.4), *(random_stack(backbone, P, s, 0.1) for s in (3, 4))
    for name, given in (("base model", None), (f"{P} adapters in one batch", stack)):
        ask = (given, Request(PROMPTS, N, SEEDS, SamplingConfig(max_tokens=24).model_copy(update={"temperature": 0.0})))
        drawn, wanted = sampler.sample(*ask), NativeSampler(backbone).sample(*ask)
        equal, gap = common(drawn, wanted)
        print(f"\ngreedy, {name}: {equal} of {wanted.rows} rows equal, log-probabilities within {gap:.1e}")
        assert equal == wanted.rows and gap < 1e-3 and torch.equal(drawn.ended_B, wanted.ended_B)
    for temperature in (1.0, 0.7):
        sampling = SamplingConfig(max_tokens=24, temperature=temperature)
        drawn, again, other = (
            sampler.sample(stack, Request(PROMPTS, N, [[s + more for s in row] for row in SEEDS], sampling))
            for more in (0, 0, 1)
        )
        assert common(drawn, again)[0] == drawn.rows > common(drawn, other)[0]
        gaps = []
        for trained in (stack.select([0, 1, 2]), stale.select([0, 1, 2])):
            optimizer, advantage_B = StackOptimizer(trained, OptimizerConfig(kl=0.0)), torch.tensor([1.0, -1.0] * P * Q)
            stats = update(backbone, optimizer, drawn, advantage_B, 1e-6, sampling)
            gaps.append(stats.gap_P.max().item())
        print(f"\ntemperature {temperature}: gap {gaps[0]:.1e} nats a token, with stale weights {gaps[1]:.2f}")
        assert gaps[0] < 1e-3 and gaps[1] > 0.1
