"""Our attention function and cache against torch's and transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, PAD, WINDOW, some_prompts, tiny_backbone, tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from soar.engine import attention
from soar.engine.attention import buffer_cache, grouped_attention


def states(heads: int, kv_heads: int, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 100 + length)
    shapes = [(3, heads, length, 8), (3, kv_heads, keys, 8), (3, kv_heads, keys, 8)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("length", "keys"), [(5, 5), (1, 7), (3, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch_attention(kv_heads: int, length: int, keys: int, masked: bool) -> None:
    query, key, value = states(6, kv_heads, length, keys)
    causal = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    mask = None
    if masked:
        mask = causal.expand(3, 1, length, keys).clone()
        mask[1, :, :, 1 : keys // 2] = False
    out, weights = grouped_attention(nn.Module(), query, key, value, mask, scaling=0.3)
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=causal if mask is None else mask, scale=0.3, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_softcap_bounds_the_scores_before_the_mask() -> None:
    query, key, value = states(4, 2, 1, 6)
    mask = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    mask[0, :, :, :3] = False
    out, _ = grouped_attention(nn.Module(), query, key, value, mask, scaling=5.0, softcap=2.0)
    wide = key.repeat_interleave(2, dim=1)
    scores = 2.0 * torch.tanh(query @ wide.transpose(2, 3) * 5.0 / 2.0)
    scores = scores.masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_row_that_may_look_nowhere_stays_finite() -> None:
    """Queries on padding: their output means nothing, but must not be NaN, which would spread through the cache."""
    query, key, value = states(4, 2, 3, 3)
    out, _ = grouped_attention(nn.Module(), query, key, value, torch.zeros(3, 1, 3, 3, dtype=torch.bool))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("extra", ["s_aux", "position_bias"])
def test_what_would_be_ignored_is_refused(extra: str) -> None:
    query, key, value = states(4, 2, 1, 6)
    with pytest.raises(NotImplementedError, match="attention sinks or position biases"):
        grouped_attention(nn.Module(), query, key, value, None, **{extra: torch.zeros(4)})


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def decode(model: Any, cache: Any, prompts: list[list[int]], steps: int, drop: bool) -> list[Tensor]:
    """Logits of each step when every row is continued with the same made-up tokens; rows 0 and 2 are dropped train_state."""
    ids, mask, position = left_padded(prompts)
    found = []
    for step in range(steps):
        out = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        found.append(out.logits[:, -1])
        if drop and step == steps // 2:
            keep = torch.tensor([1, 3])
            cache.batch_select_indices(keep)
            mask = mask[keep]
        ids = torch.full((len(mask), 1), 4 + step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = mask.sum(1, keepdim=True) - 1
    return found


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("equal_lengths", [False, True])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_cache_equals_transformers_own(name: str, equal_lengths: bool, drop: bool) -> None:
    """Past the first growth of the buffer, past the sliding window, with and without padding, with dropped rows."""
    backbone = tiny_backbone(name)
    prompts = [[1, 5 + i, 9, 8 + i] for i in range(4)] if equal_lengths else some_prompts(4, seed=3)
    steps = attention.GROWTH + 4
    assert steps > WINDOW
    ours = decode(backbone.model, buffer_cache(backbone.model.config), prompts, steps, drop)
    model = tiny_model(name)
    theirs = decode(model, DynamicCache(config=model.config), prompts, steps, drop)
    for step in range(steps):
        torch.testing.assert_close(ours[step], theirs[step], rtol=1e-3, atol=1e-4)
