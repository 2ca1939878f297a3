"""Our attention function and key/value cache, plugged into transformers' own model classes.

The query heads of one group become rows of one product. The cache returns its whole buffer, unfilled places masked:
contiguous operands are fast on a CPU, and a captured graph needs them. Left out: sinks, ALiBi-style biases, paged blocks.
"""

import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from soar.engine import kernels

NAME = "soar"
GROWTH = 16  # positions by which a full buffer grows
UNTOLD = ("doge", "moshi", "phimoe", "qwen2_moe")  # model types whose window is in the mask alone
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that keep keys and values alone


@dataclass(frozen=True)
class Window:
    """Which cache places a row's new token may see: start_B .. filled_1 - 1 (int32, on the device)."""

    start_B: Tensor
    filled_1: Tensor


def sent(tensor: Tensor, device: Any) -> Tensor:
    """The tensor on a device, without waiting for what runs there: the next micro-batch is packed meanwhile."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(eq=False)
class Packed:
    """Attention of packed tokens: a prompt sees itself, a completion its prompt and itself, all of them causally.

    Lane p has columns 0 .. S-1 for its prompts, each once, and S .. n-1 for completions, in the order of their prompts.
    prompts: (lane, column, length) of each prompt; completions: (number of its prompt, column, length). Lane after lane;
    every lane has a prompt. What stands behind the last of either is padding.
    """

    shape: tuple[int, int]
    split: int
    prompts: Any
    completions: Any
    device: Any

    def __post_init__(self) -> None:
        self.prompts = np.array(self.prompts).reshape(-1, 3)
        self.completions = np.array(self.completions, dtype=np.int64).reshape(-1, 3)
        self.longest = int(self.prompts[:, 2].max() + self.completions[:, 2].max(initial=0))

    @cached_property
    def bounds(self) -> tuple[tuple[Tensor, Tensor, int, int], ...]:
        """Cumulative lengths (int32) of queries and of keys, and the longest of each: of all sequences onto themselves; of
        queries from place S on and of the keys of prompts, where padding behind completions goes with the last prompt,
        and the rest has no partner.
        """
        (P, n), S, (of_U, column_U, length_U) = self.shape, self.split, self.prompts.T
        of_R, column_R, length_R = self.completions.T
        behind_U = np.bincount(of_R, length_R, len(of_U)).astype(int)  # tokens of the completions of each prompt
        queries, keys = [], []
        for p in range(P):
            lengths, given = behind_U[of_U == p].tolist(), length_U[of_U == p].tolist()
            lengths[-1] += n - S - sum(lengths)
            queries += [*lengths, 0, S]
            keys += [*given, S - sum(given), 0]
        first_U, first_R = of_U * n + column_U, of_U[of_R] * n + column_R
        edges = np.r_[first_U, first_U + length_U, np.arange(P) * n + S, first_R, first_R + length_R, P * n]
        sizes: list[list[int]] = [np.diff(np.unique(edges)).tolist(), queries[:-1], keys[:-1]]
        ends = [sent(torch.tensor(np.cumsum([0, *x]), dtype=torch.int32), self.device) for x in sizes]
        most = [max(x) for x in sizes]
        return (ends[0], ends[0], most[0], most[0]), (ends[1], ends[2], most[1], most[2])

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flat places [U, S] of prompts and [R, T] of completions, each one's prompt [R], and where each place went [P * n].

        Behind the end of a sequence stands its first place: no other policy's values, were they NaN.
        """
        P, n = self.shape
        prompt_U_S, inside_U_S = _places(self.prompts[:, 0] * n + self.prompts[:, 1], self.prompts[:, 2])
        of_R, column_R, length_R = self.completions.T
        column_R = np.where(length_R > 0, column_R, self.prompts[of_R, 1])
        row_R_T, inside_R_T = _places(self.prompts[of_R, 0] * n + column_R, length_R)
        back = np.repeat(np.searchsorted(self.prompts[:, 0], np.arange(P)) * prompt_U_S.shape[1], n)
        back[prompt_U_S[inside_U_S]] = np.flatnonzero(inside_U_S)
        back[row_R_T[inside_R_T]] = prompt_U_S.size + np.flatnonzero(inside_R_T)
        tables = (prompt_U_S, row_R_T, np.array(of_R), back)
        return tuple(sent(torch.from_numpy(np.ascontiguousarray(table)), self.device) for table in tables)  # type: ignore[return-value]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None
    ) -> Tensor:
        """[P, n, heads, D] for q [P, heads, n, D], k and v [P, kv_heads, n, D].

        By the flash kernel, or every sequence as a row of its own, beside the keys and values of its prompt.
        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if softcap is None and (window is None or window >= self.longest) and _flash_fits(q):
            return _Flash.apply(q, k, v, self, scale)
        prompt_U_S, row_R_T, of_R, back = self.tables
        D = q.shape[-1]

        def rows(x: Tensor, places: Tensor) -> Tensor:  # embedding: its gradient adds in the order of the places
            return functional.embedding(places, x.reshape(-1, x.shape[2] * D)).unflatten(-1, (-1, D)).transpose(1, 2)

        place_S, place_T = (torch.arange(table.shape[1], device=self.device) for table in (prompt_U_S, row_R_T))
        far = self.longest if window is None else window
        gap_S_S = place_S[:, None] - place_S
        causal = ((gap_S_S >= 0) & (gap_S_S < far))[None, None]
        key_U, value_U = rows(k, prompt_U_S), rows(v, prompt_U_S)
        out = grouped_attention(None, rows(q, prompt_U_S), key_U, value_U, causal, scaling=scale, softcap=softcap)[0]
        outs = [out.flatten(0, 1)]
        if len(of_R):
            key, value = (torch.cat([x[of_R], rows(y, row_R_T)], 2) for x, y in ((key_U, k), (value_U, v)))
            before_R = torch.tensor(self.prompts[self.completions[:, 0], 2], device=self.device)[:, None, None]
            gap_T_T = place_T[:, None] - place_T
            prompt_seen = (place_S < before_R) & (before_R + place_T[:, None] - place_S < far)
            inner_seen = ((gap_T_T >= 0) & (gap_T_T < far)).expand(len(of_R), -1, -1)
            seen = torch.cat([prompt_seen, inner_seen], 2)[:, None]
            out = grouped_attention(None, rows(q, row_R_T), key, value, seen, scaling=scale, softcap=softcap)[0]
            outs.append(out.flatten(0, 1))
        return functional.embedding(back, torch.cat(outs).flatten(1)).view(*self.shape, -1, D)


def _places(first_X: np.ndarray, length_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [X, L] that follow each first one, and which of them are within its length."""
    place_L = np.arange(max(1, length_X.max(initial=0)))
    inside_X_L = place_L < length_X[:, None]
    return first_X[:, None] + place_L * inside_X_L, inside_X_L


def _flash_fits(q: Tensor) -> bool:
    """Whether torch's flash kernel takes such queries."""
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in range(8, 257, 8)
    return fits and torch.cuda.get_device_capability(q.device)[0] >= 8


class _Flash(torch.autograd.Function):
    """`Packed.attend` by two calls of torch's flash kernel: each sequence onto itself, completions onto their prompts.

    They are joined by the logarithms of their normalisers, given which each backward call computes its part.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
        (P, n), S, (inner, across) = packed.shape, packed.split, packed.bounds
        q, k, v = (x.reshape(P * n, -1, x.shape[-1]) for x in (q, k, v))
        flash, heads = torch.ops.aten._flash_attention_forward, (P, n, -1, q.shape[-1])
        out, norm, *rest = flash(q, k, v, *inner, 0.0, True, False, scale=scale)
        ctx.save_for_backward(q, k, v, out, norm, *rest[:2])
        ctx.packed, ctx.scale = packed, scale
        given = (x.view(heads)[:, :S].flatten(0, 1) for x in (k, v))
        out_2, norm_2, *_ = flash(q[S:], *given, *across, 0.0, False, False, scale=scale)
        norm_2.masked_fill_(norm_2 == torch.inf, -torch.inf)  # of queries without a key
        total = torch.logaddexp(norm[:, S:], norm_2)
        out[S:].lerp_(out_2, (norm_2 - total).exp().T[..., None].to(out.dtype))
        norm[:, S:] = total
        return out.view(P, n, *out.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, out, norm, *rest = ctx.saved_tensors
        (P, n), S, (inner, across) = ctx.packed.shape, ctx.packed.split, ctx.packed.bounds
        flash, heads = torch.ops.aten._flash_attention_backward, (P, n, -1, q.shape[-1])
        slope = gradients[0].reshape(out.shape)
        dq, dk, dv = flash(slope, q, k, v, out, norm, *inner, 0.0, True, *rest, scale=ctx.scale)
        given = (x.view(heads)[:, :S].flatten(0, 1) for x in (k, v))
        behind = slope[S:], q[S:], *given, out[S:], norm[:, S:].contiguous()
        dq_2, dk_2, dv_2 = flash(*behind, *across, 0.0, False, *rest, scale=ctx.scale)
        dq[S:] += dq_2
        dq, dk, dv = (x.view(heads) for x in (dq, dk, dv))
        dk[:, :S] += dk_2.view(P, S, *dk.shape[2:])
        dv[:, :S] += dv_2.view(P, S, *dv.shape[2:])
        return dq, dk, dv, None, None


View = Window | Packed
current: ContextVar[View | None] = ContextVar("current", default=None)
"""What a token may see in this thread, whatever mask the model made (see `policy.Backbone.use`)."""


def grouped_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, same contract as transformers' `sdpa` function.

    query [B, heads, q, D], key and value [B, kv_heads, S, D], attention_mask bool [B, 1, q, S] (True: may look) or None
    (causal). Returns ([B, q, heads, D], None). Raises NotImplementedError for attention sinks, which would be ignored.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("soar's attention knows no attention sinks or position biases")
    B, heads, length, D = query.shape
    scale = D**-0.5 if scaling is None else scaling
    window, sliding = current.get(), kwargs.get("sliding_window")
    if isinstance(window, Packed) and module is not None:
        return window.attend(query, key, value, scale, softcap, sliding), None
    if isinstance(window, Window) and length == 1:
        if kernels.available(query):
            places = (window.start_B, window.filled_1)
            return kernels.decode_attention(query, key, value, *places, scale, softcap, sliding), None
        first_B = window.start_B if sliding is None else torch.maximum(window.start_B, window.filled_1 - sliding)
        place_S = torch.arange(key.shape[2], device=query.device)
        attention_mask = ((place_S >= first_B[:, None]) & (place_S < window.filled_1))[:, None, None]
    kv_heads, S = key.shape[1], key.shape[2]
    group = heads // kv_heads
    if query.is_cuda and length > 1 and softcap is None:
        causal = attention_mask is None
        if group > 1 and not causal:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scale, enable_gqa=causal and group > 1
        )
        return out.transpose(1, 2).contiguous(), None
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


def install(model: Any) -> bool:
    """Make `model` use `grouped_attention`; False for one that it does not fit, which is said and goes its own way.

    Turns cuDNN's attention off in this process: nearly every micro-batch has a new shape, and updates of a run at the 3B
    shape took a fifth longer with it (docs/performance.md).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    reason, config = "", model.config.get_text_config()
    width = getattr(config, "v_head_dim", 0)
    if not getattr(model, "_supports_attention_backend", False):
        reason = "has no pluggable attention"
    elif any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        reason = "has attention sinks"
    elif any(type(layer) not in PLAIN for layer in DynamicCache(config=model.config).layers):
        reason = "has layers that keep a state"
    elif "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        reason = "attends within chunks"
    elif config.model_type in UNTOLD and 0 < (config.sliding_window or 0) < config.max_position_embeddings:
        reason = "does not tell its attention of its window"
    elif width and width != (getattr(config, "qk_head_dim", 0) or config.head_dim):
        reason = "has values of another width than its keys"
    if reason:
        way = "it goes through its own attention and cache, a prompt anew for every completion in the update"
        warnings.warn(f"{type(model).__name__} {reason}: {way}, which is slower", stacklevel=2)
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


class BufferLayer(DynamicLayer):
    """Keys and values [rows, kv_heads, capacity, D] of one layer; the first `filled` positions are valid."""

    filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        capacity, first = self.get_mask_sizes(key_states.shape[-2])[0], self.filled
        self.filled += key_states.shape[-2]
        if not self.is_initialized:
            return super().update(key_states, value_states)
        if missing := capacity - self.keys.shape[-2]:
            super().update(*(functional.pad(x[:, :, :0], (0, 0, 0, missing)) for x in (self.keys, self.values)))
        self.keys[:, :, first : self.filled] = key_states
        self.values[:, :, first : self.filled] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.filled + query_length  # the mask is as wide as the buffer will be then
        current = self.keys.shape[-2] if self.is_initialized else length
        return current if length <= current else length + GROWTH, 0


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
