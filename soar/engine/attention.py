"""Our attention function and key/value cache, plugged into transformers' own model classes.

Grouped key/value heads are never expanded: the query heads of one group become rows of one product. The cache returns
its whole buffer, unfilled places masked, because a contiguous operand is what makes the products fast on a CPU and what
a captured graph needs on a GPU. Left out: attention sinks, ALiBi-style biases, paged blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from soar.engine import kernels

NAME = "soar"
GROWTH = 16  # positions by which a full buffer grows


@dataclass(frozen=True)
class Window:
    """Which cache places a row's new token may see: start_B .. filled_1 - 1 (int32, on the device)."""

    start_B: Tensor
    filled_1: Tensor


class _Decoding(threading.local):
    window: Window | None = None


_decoding = _Decoding()


@contextmanager
def decoding(window: Window) -> Iterator[None]:
    """Within the block, attention of one new token reads the places of `window`, whatever mask the model made."""
    _decoding.window = window
    try:
        yield
    finally:
        _decoding.window = None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, same contract as transformers' `sdpa` function.

    query [B, heads, q, D], key and value [B, kv_heads, S, D], attention_mask bool [B, 1, q, S] (True: may look) or None
    (causal). Returns ([B, q, heads, D], None). Raises NotImplementedError for attention sinks, which would be ignored.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            "attention sinks or position biases of this model are not supported by soar's attention"
        )
    B, heads, length, D = query.shape
    scale = D**-0.5 if scaling is None else scaling
    window = _decoding.window
    if window is not None and length == 1:
        sliding = kwargs.get("sliding_window")
        if kernels.available(query):
            return kernels.decode_attention(
                query, key, value, window.start_B, window.filled_1, scale, softcap, sliding
            ), None
        attention_mask = _visible(window, key.shape[2], sliding)
    if query.is_cuda and length > 1 and softcap is None:
        causal = attention_mask is None
        grouped = key.shape[1] != heads
        if grouped and attention_mask is not None:
            repeats = heads // key.shape[1]
            key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None
    kv_heads, S = key.shape[1], key.shape[2]
    group = heads // kv_heads
    query_rows = query.reshape(B * kv_heads, group * length, D)
    scores = torch.bmm(query_rows, key.reshape(B * kv_heads, S, D).transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None and length > 1:
        attention_mask = torch.ones(length, S, dtype=torch.bool, device=query.device).tril(S - length)[None, None]
    if attention_mask is not None:
        shaped = scores.view(B, kv_heads, group, length, S)
        scores = shaped.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min).view_as(scores)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    out_rows = torch.bmm(weights, value.reshape(B * kv_heads, S, D))
    return out_rows.view(B, heads, length, D).transpose(1, 2).contiguous(), None


def _visible(window: Window, places: int, sliding: int | None) -> Tensor:
    """The mask [B, 1, 1, places] of a window."""
    first_B = window.start_B if sliding is None else torch.maximum(window.start_B, window.filled_1 - sliding)
    place_S = torch.arange(places, device=first_B.device)
    return ((place_S[None] >= first_B[:, None]) & (place_S[None] < window.filled_1))[:, None, None]


def install(model: Any) -> None:
    """Make `model` use `grouped_attention`. Raises ValueError for a model class without pluggable attention.

    Turns cuDNN's attention off in this process: nearly every micro-batch has a new shape, and updates of a run at the 3B
    shape took a fifth longer with it (docs/performance.md).
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} has no pluggable attention (older than transformers' interface for it)"
        )
    torch.backends.cuda.enable_cudnn_sdp(False)
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


class BufferLayer(DynamicLayer):
    """Keys and values [rows, kv_heads, capacity, D] of one layer; the first `filled` positions are valid."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filled = 0

    def _capacity(self, length: int) -> int:
        """Buffer size once `length` positions are filled."""
        current = self.keys.shape[-2] if self.is_initialized else 0
        return current if length <= current else length if not self.filled else length + GROWTH

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, _ = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, 0, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, heads, 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.filled + key_states.shape[-2]
        missing = self._capacity(length) - self.keys.shape[-2]
        if missing:
            self.keys = F.pad(self.keys, (0, 0, 0, missing))
            self.values = F.pad(self.values, (0, 0, 0, missing))
        self.keys[:, :, self.filled : length] = key_states
        self.values[:, :, self.filled : length] = value_states
        self.filled = length
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._capacity(self.filled + query_length), 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.filled:
            self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)


class StaticLayer(DynamicLayer):
    """Keys and values of one layer at fixed addresses; the new token is written at `place_1`, a number on the device."""

    def __init__(self, keys: Tensor, values: Tensor, place_1: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.place_1 = keys, values, place_1
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place_1, key_states)
        self.values.index_copy_(2, self.place_1, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


def buffer_cache(config: Any, whole: bool = False) -> DynamicCache | None:
    """A cache for a model of this config: full-attention layers are `BufferLayer`, others stay transformers' own.

    whole: sliding layers keep every place too; None for a model with layers that hold other state.
    """
    cache, plain = DynamicCache(config=config), (DynamicLayer, DynamicSlidingWindowLayer)
    if whole and any(type(layer) not in plain for layer in cache.layers):
        return None
    buffered = plain if whole else (DynamicLayer,)
    cache.layers = [BufferLayer() if type(layer) in buffered else layer for layer in cache.layers]
    return cache
