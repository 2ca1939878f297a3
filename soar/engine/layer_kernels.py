"""The steps between the products of a decoder layer, one kernel each on a GPU: the norm, and the rotary embedding of a new
token with its entry into the cache. Each has a PyTorch path, which is also what the kernels are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soar.engine import kernels

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = None


@dataclass(frozen=True)
class HeadNorm:
    """Norms of every query and key head (Qwen3): weights [D] and their epsilon."""

    query_D: Tensor
    key_D: Tensor
    eps: float


if triton is not None:

    @triton.jit
    def _norm(x, weight, out, eps, N, BLOCK: tl.constexpr, EARLY: tl.constexpr):
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.cast(tl.program_id(0), tl.int64)
        n = tl.arange(0, BLOCK)
        values = tl.load(x + row * N + n, mask=n < N, other=0.0).to(tl.float32)
        values = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / N + eps))
        # Rounded before the weight, as transformers does it.
        rounded = values.to(out.dtype.element_ty).to(tl.float32)
        w = tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + row * N + n, (rounded * w).to(out.dtype.element_ty), mask=n < N)

    @triton.jit
    def _enter(
        qkv, cos, sin, key, value, place_1, query_norm, key_norm, eps, cos_row, kv_row, kv_head, kv_place,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
        EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.cast(tl.program_id(0), tl.int64)
        place = tl.load(place_1).to(tl.int64)
        h, d = tl.arange(0, HP), tl.arange(0, HALF)
        base = qkv + row * ((H + 2 * KV) * D) + h[:, None] * D + d[None, :]
        wide = (d < D // 2)[None, :]
        inside = (h < H + 2 * KV)[:, None] & wide
        low = tl.load(base, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(base + D // 2, mask=inside, other=0.0).to(tl.float32)
        is_query, is_key = (h < H)[:, None], ((h >= H) & (h < H + KV))[:, None]
        is_value = (h >= H + KV)[:, None]
        kind = qkv.dtype.element_ty
        if NORMED:
            factor = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)
            near = d < D // 2
            low_weight = tl.where(
                is_query,
                tl.load(query_norm + d, mask=near, other=0.0)[None, :],
                tl.load(key_norm + d, mask=near, other=0.0)[None, :],
            ).to(tl.float32)
            high_weight = tl.where(
                is_query, tl.load(query_norm + D // 2 + d, mask=near, other=0.0)[None, :],
                tl.load(key_norm + D // 2 + d, mask=near, other=0.0)[None, :],
            ).to(tl.float32)  # fmt: skip
            low_normed = ((low * factor[:, None]).to(kind).to(tl.float32) * low_weight).to(kind).to(tl.float32)
            high_normed = ((high * factor[:, None]).to(kind).to(tl.float32) * high_weight).to(kind).to(tl.float32)
            low, high = tl.where(is_value, low, low_normed), tl.where(is_value, high, high_normed)
        angle = row * cos_row + d
        near = d < D // 2
        cos_low = tl.load(cos + angle, mask=near, other=0.0).to(tl.float32)[None, :]
        cos_high = tl.load(cos + angle + D // 2, mask=near, other=0.0).to(tl.float32)[None, :]
        sin_low = tl.load(sin + angle, mask=near, other=0.0).to(tl.float32)[None, :]
        sin_high = tl.load(sin + angle + D // 2, mask=near, other=0.0).to(tl.float32)[None, :]
        turned_low = tl.where(is_value, low, low * cos_low - high * sin_low).to(kind)
        turned_high = tl.where(is_value, high, high * cos_high + low * sin_high).to(kind)
        tl.store(base, turned_low, mask=is_query & wide)
        tl.store(base + D // 2, turned_high, mask=is_query & wide)
        spot = row * kv_row + place * kv_place + d[None, :]
        as_key = key + spot + (h - H)[:, None] * kv_head
        tl.store(as_key, turned_low, mask=is_key & wide)
        tl.store(as_key + D // 2, turned_high, mask=is_key & wide)
        as_value = value + spot + (h - H - KV)[:, None] * kv_head
        tl.store(as_value, turned_low, mask=is_value & inside)
        tl.store(as_value + D // 2, turned_high, mask=is_value & inside)


def norm(x_R_N: Tensor, weight_N: Tensor, eps: float, early: bool = False) -> Tensor:
    """RMSNorm of every row, rounded as transformers rounds it."""
    if kernels.available(x_R_N):
        return norm_kernel(x_R_N, weight_N, eps, early)
    return norm_plain(x_R_N, weight_N, eps)


def norm_plain(x_R_N: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """`norm` in PyTorch."""
    wide_R_N = x_R_N.float()
    scaled_R_N = wide_R_N * torch.rsqrt(wide_R_N.pow(2).mean(-1, keepdim=True) + eps)
    return weight_N * scaled_R_N.to(x_R_N.dtype)


def norm_kernel(x_R_N: Tensor, weight_N: Tensor, eps: float, early: bool = False) -> Tensor:
    """`norm` by the Triton kernel."""
    R, N = x_R_N.shape
    out_R_N = torch.empty_like(x_R_N)
    _norm[(R,)](
        x_R_N, weight_N, out_R_N, eps, N, BLOCK=triton.next_power_of_2(N), num_warps=2 if N <= 1024 else 8,
        **kernels.start_early(early),
    )  # fmt: skip
    return out_R_N


def enter(
    qkv_R_N: Tensor,
    cos_R_D: Tensor,
    sin_R_D: Tensor,
    key_R_K_S_D: Tensor,
    value_R_K_S_D: Tensor,
    place_1: Tensor,
    heads: int,
    head_norm: HeadNorm | None = None,
    early: bool = False,
) -> Tensor:
    """Turn the new token's queries and keys, write key and value at `place_1` of the cache; returns query [R, H, 1, D].

    qkv_R_N: queries, keys and values of one token a row, head after head; changed in place. head_norm: applied to query
    and key heads first.
    """
    if kernels.available(qkv_R_N):
        return enter_kernel(qkv_R_N, cos_R_D, sin_R_D, key_R_K_S_D, value_R_K_S_D, place_1, heads, head_norm, early)
    return enter_plain(qkv_R_N, cos_R_D, sin_R_D, key_R_K_S_D, value_R_K_S_D, place_1, heads, head_norm)


def enter_plain(
    qkv_R_N: Tensor,
    cos_R_D: Tensor,
    sin_R_D: Tensor,
    key_R_K_S_D: Tensor,
    value_R_K_S_D: Tensor,
    place_1: Tensor,
    heads: int,
    head_norm: HeadNorm | None = None,
) -> Tensor:
    """`enter` in PyTorch."""
    R, D, kv = qkv_R_N.shape[0], cos_R_D.shape[-1], key_R_K_S_D.shape[1]
    query, key, value = qkv_R_N.view(R, -1, D).split([heads, kv, kv], dim=1)
    if head_norm is not None:
        query = norm_plain(query, head_norm.query_D, head_norm.eps)
        key = norm_plain(key, head_norm.key_D, head_norm.eps)
    key_R_K_S_D.index_copy_(2, place_1, _turn(key, cos_R_D, sin_R_D)[:, :, None])
    value_R_K_S_D.index_copy_(2, place_1, value[:, :, None])
    return _turn(query, cos_R_D, sin_R_D)[:, :, None]


def _turn(x_R_H_D: Tensor, cos_R_D: Tensor, sin_R_D: Tensor) -> Tensor:
    low, high = x_R_H_D.chunk(2, dim=-1)
    return x_R_H_D * cos_R_D[:, None] + torch.cat((-high, low), dim=-1) * sin_R_D[:, None]


def enter_kernel(
    qkv_R_N: Tensor,
    cos_R_D: Tensor,
    sin_R_D: Tensor,
    key_R_K_S_D: Tensor,
    value_R_K_S_D: Tensor,
    place_1: Tensor,
    heads: int,
    head_norm: HeadNorm | None = None,
    early: bool = False,
) -> Tensor:
    """`enter` by the Triton kernel."""
    R, D, kv = qkv_R_N.shape[0], cos_R_D.shape[-1], key_R_K_S_D.shape[1]
    assert key_R_K_S_D.stride() == value_R_K_S_D.stride() and qkv_R_N.is_contiguous()
    total = triton.next_power_of_2(heads + 2 * kv)
    _enter[(R,)](
        qkv_R_N, cos_R_D, sin_R_D, key_R_K_S_D, value_R_K_S_D, place_1,
        qkv_R_N if head_norm is None else head_norm.query_D, qkv_R_N if head_norm is None else head_norm.key_D,
        0.0 if head_norm is None else head_norm.eps, cos_R_D.stride(0),
        key_R_K_S_D.stride(0), key_R_K_S_D.stride(1), key_R_K_S_D.stride(2),
        H=heads, KV=kv, D=D, HP=total, HALF=max(2, triton.next_power_of_2(D // 2)), NORMED=head_norm is not None,
        num_warps=2 if total * D <= 2048 else 8, **kernels.start_early(early),
    )  # fmt: skip
    return qkv_R_N[:, : heads * D].view(R, heads, 1, D)
