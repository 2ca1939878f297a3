"""Log-probabilities of packed rows against a plain forward pass a row, attention against torch's own, and the Triton kernels
against PyTorch, in Triton's interpreter (no GPU)."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, logprobs_of, plain_logprobs, random_rollouts, random_stack, tiny_backbone, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from soar.engine import attention, logprobs
from soar.engine.attention import Packed, grouped_attention


@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, 70) for name in ARCHITECTURES), ("gemma2", 1), ("llama", 1 << 27)]
)
def test_values_and_gradients_are_those_of_the_plain_way(name, chunk, monkeypatch):
    backbone, rollouts = tiny_backbone(name), random_rollouts(6)
    weight_B_T = torch.randn(rollouts.tokens_B_T.shape, generator=torch.Generator().manual_seed(1))
    values, gradients = [], []
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    for plain in (False, True):
        logprobs._heads[backbone] = None if plain else logprobs._Head(backbone)
        stack = random_stack(backbone, 2).trainable()
        values.append(logprobs_of(backbone, stack, rollouts, [[0, 1, 2], [3, 4, 5]], 0.7))
        gradients.append(torch.autograd.grad((values[-1] * weight_B_T).sum(), list(stack.tensors.values())))
    assert torch.allclose(*values, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4) and one.abs().max() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_shared_by_its_completions_is_right_for_each(name):
    """Beyond the sliding window, one-token completions among them, the chunked way of every architecture."""
    backbone, rollouts = tiny_backbone(name), random_rollouts(7, seed=1)
    rollouts = replace(rollouts, prompts=tuple(rollouts.prompts[i] for i in (1, 3, 1, 1, 2, 2, 0)))
    with torch.no_grad():
        value_B_T = logprobs_of(backbone, None, rollouts, [[0, 1, 2, 3], [4, 5, 6]])
    assert logprobs._heads[backbone] is not None
    for row, (prompt, n) in enumerate(zip(rollouts.prompts, rollouts.length_B.tolist(), strict=True)):
        wanted_T = plain_logprobs(tiny_model(name), prompt, rollouts.tokens_B_T[row, :n].tolist())
        assert torch.allclose(value_B_T[row, :n], wanted_T.detach(), atol=1e-4)
        assert (value_B_T[row, n:] == 0).all()


@pytest.mark.parametrize("divisor", [4.0, 1.0])
def test_a_model_with_another_head_takes_the_plain_way(divisor):
    """One that scales its logits behind the output layer is noticed by the probe, and (1.0) one that is its own decoder."""
    backbone, rollouts = tiny_backbone(), random_rollouts(3)
    real = backbone.model.forward

    def scaled(*args: object, **more: object) -> object:
        out = real(*args, **more)
        out.logits = out.logits / divisor
        return out

    backbone.model.forward = scaled
    if divisor == 1.0:  # as Llama 4 says of itself
        backbone.model.get_decoder = lambda: backbone.model
    with torch.no_grad():
        found_B_T = logprobs_of(backbone, None, rollouts, [[0, 1, 2]])
    assert logprobs._heads[backbone] is None
    wanted_T = plain_logprobs(tiny_model(), rollouts.prompts[0], rollouts.tokens_B_T[0, :1].tolist(), divisor)
    assert torch.allclose(found_B_T[0, :1], wanted_T.detach(), atol=1e-4)


def scores_of(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[heads, Q, K] of one sequence, grouped heads repeated; causal to the lower right, as the flash kernel's."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    return scores.masked_fill(~seen, -torch.inf) if causal else scores


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What torch's kernel gives for sequences end to end: a query without a key is 0, its normaliser inf."""
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and cu_q.dtype == cu_k.dtype == torch.int32
    assert (most_q, most_k) == tuple(int(cu.diff().max()) for cu in (cu_q, cu_k))
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    out, norm = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf)
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if b > a and d > c:
            scores = scores_of(q[a:b], k[c:d], causal, scale)
            wide_v = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide_v)
            norm[:, a:b] = scores.logsumexp(-1)
    return out, norm, torch.zeros(2), torch.zeros(0), torch.zeros(0)


def flash_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int,
    most_k: int, dropout: float, causal: bool, seed: Tensor, unused: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients from the result and the normaliser that are given, whatever other keys they have in them."""
    assert norm.is_contiguous() and norm.shape == (q.shape[1], len(q))
    assert all(x.stride(-1) == 1 for x in (slope, q, k, v, out))
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if b > a and d > c:
            wide_k, wide_v = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
            weight = (scores_of(q[a:b], k[c:d], causal, scale) - norm[:, a:b, None]).exp()
            inner = torch.einsum("qhd,khd->hqk", slope[a:b], wide_v) - (slope[a:b] * out[a:b]).sum(-1).T[..., None]
            bent = weight * inner * scale
            dq[a:b] = torch.einsum("hqk,khd->qhd", bent, wide_k)
            dk[c:d] = torch.einsum("hqk,qhd->khd", bent, q[a:b]).unflatten(1, (-1, group)).sum(2)
            dv[c:d] = torch.einsum("hqk,qhd->khd", weight, slope[a:b]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


@pytest.mark.parametrize("policies", [1, 2, 3])
def test_the_flash_way_is_the_padded_one(policies, monkeypatch):
    """With torch's kernel written out: padding behind prompts and completions, an empty completion, grouped heads."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
    prompts = [(0, 0, 3), (0, 3, 4), (1, 0, 9), (2, 0, 9)]
    completions = [(0, 9, 5), (0, 14, 0), (1, 14, 6), (2, 9, 4), (2, 13, 8), (3, 9, 0)]
    count = sum(prompt[0] < policies for prompt in prompts)
    view = Packed((policies, 24), 9, prompts[:count], [c for c in completions if c[0] < count], "cpu")
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(policies, heads, 24, 8, generator=generator) for heads in (4, 2, 2)]
    slope = torch.randn(policies, 24, 4, 8, generator=generator)
    live = (view.tables[3].view(policies, 24) != view.tables[3].view(policies, 24)[:, -1:]).float()
    live[:, 0] = 1.0  # padding is sent to the policy's first place
    found = []
    for flash in (True, False):
        monkeypatch.setattr(attention, "_flash_fits", lambda q, flash=flash: flash)
        leaves = [state.clone().requires_grad_() for state in states]
        out = view.attend(*leaves, 0.3, None, None)
        out.backward(slope * live[..., None, None])
        found.append([out.detach() * live[..., None, None], *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def states(heads: int, kv_heads: int, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 100 + length)
    shapes = [(3, heads, length, 8), (3, kv_heads, keys, 8), (3, kv_heads, keys, 8)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("length", "keys"), [(5, 5), (1, 7), (3, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch_attention(kv_heads, length, keys, masked):
    query, key, value = states(6, kv_heads, length, keys)
    causal = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    mask = None
    if masked:
        mask = causal.expand(3, 1, length, keys).clone()
        mask[1, :, :, 1 : keys // 2] = False
    out, weights = grouped_attention(nn.Module(), query, key, value, mask, scaling=0.3)
    seen = causal if mask is None else mask
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_row_that_may_look_nowhere_stays_finite_and_what_would_be_ignored_is_refused():
    """Queries on padding: their output means nothing, but must not be NaN, which would spread through the cache."""
    query, key, value = states(4, 2, 3, 3)
    out, _ = grouped_attention(nn.Module(), query, key, value, torch.zeros(3, 1, 3, 3, dtype=torch.bool))
    assert torch.isfinite(out).all()
    for extra in ("s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match="no attention sinks or position biases"):
            grouped_attention(nn.Module(), query, key, value, None, **{extra: torch.zeros(4)})


PROGRAM = (Path(__file__).parent / "cases" / "kernels.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_agree_with_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels agree" in done.stdout
