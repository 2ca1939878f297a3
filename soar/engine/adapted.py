"""Linear layers with stacked adapters, joined where they read the same input, with their own gradients.

Autograd would take each of query, key and value by itself, and the base and the adapter of each: six products that read
the same input, and six gradients of it to be summed. Here one product makes all of them, and one its gradient; the base
weight is frozen, so it has none. The low-rank sums x A are kept for the backward pass, one value per rank and row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from soar.engine import gradient_kernels
from soar.engine.products import Adapters


def join_weights(linears: list[nn.Linear]) -> Tensor:
    """The weights one below the other [N, K]; the layers' own become views of it, so nothing is held twice."""
    first = linears[0].weight.data
    if len(linears) == 1:
        return first
    rows = [linear.weight.shape[0] for linear in linears]
    at = [first.data_ptr() + sum(rows[:i]) * first.shape[1] * first.element_size() for i in range(len(rows))]
    storage = first.untyped_storage()
    same = all(linear.weight.untyped_storage().data_ptr() == storage.data_ptr() for linear in linears)
    if same and first.is_contiguous() and all(w.weight.data_ptr() == a for w, a in zip(linears, at, strict=True)):
        return first.as_strided((sum(rows), first.shape[1]), first.stride())
    joined_N_K = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, joined_N_K.split(rows), strict=True):
        linear.weight.data = part
    return joined_N_K


def join_adapters(
    a_parts: list[Tensor | None], b_parts: list[Tensor | None], sizes: list[int], scale: float, kind: torch.dtype
) -> Adapters | None:
    """Adapters of the parts as one, in the compute type (see products.Adapters); None when no part has any."""
    known_a = [a for a in a_parts if a is not None]
    known_b = [b for b in b_parts if b is not None]
    if not known_a:
        return None
    P, inputs, rank = known_a[0].shape
    a_P_K_W = known_a[0].new_zeros(P, inputs, rank * len(sizes), dtype=kind)
    b_P_W_N = known_b[0].new_zeros(P, rank * len(sizes), sum(sizes), dtype=kind)
    first = 0
    for i, (a, b, size) in enumerate(zip(a_parts, b_parts, sizes, strict=True)):
        if a is not None and b is not None:
            a_P_K_W[:, :, i * rank : (i + 1) * rank] = a
            b_P_W_N[:, i * rank : (i + 1) * rank, first : first + size] = b
        first += size
    return Adapters(a_P_K_W, b_P_W_N, rank, scale)


def _with_low(x_M_K: Tensor, weight_N_K: Tensor, bias_N: Tensor | None, adapters: Adapters) -> tuple[Tensor, Tensor]:
    """(x W^T + bias + scale x A B, x A) for rows ordered by policy."""
    low_P_m_W = torch.bmm(x_M_K.view(adapters.policies, -1, x_M_K.shape[1]), adapters.a_P_K_W)
    out_M_N = functional.linear(x_M_K, weight_N_K, bias_N)
    out_P_m_N = out_M_N.view(adapters.policies, -1, out_M_N.shape[1])
    out_P_m_N.baddbmm_(low_P_m_W, adapters.b_P_W_N, alpha=adapters.scale)
    return out_M_N, low_P_m_W.view(x_M_K.shape[0], -1)


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A_p) B_p; parts: A and B of each part in turn (None: that part has no adapter)."""

    @staticmethod
    def forward(
        ctx: Any, x_M_K: Tensor, weight_N_K: Tensor, bias_N: Tensor | None, sizes: list[int], scale: float, *parts: Any
    ) -> Tensor:
        adapters = join_adapters(list(parts[::2]), list(parts[1::2]), sizes, scale, x_M_K.dtype)
        assert adapters is not None
        out_M_N, low_M_W = _with_low(x_M_K, weight_N_K, bias_N, adapters)
        ctx.save_for_backward(x_M_K, low_M_W)
        ctx.weight_N_K, ctx.adapters, ctx.sizes, ctx.with_parts = (
            weight_N_K,
            adapters,
            sizes,
            [p is not None for p in parts],
        )
        return out_M_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_M_K, low_M_W = ctx.saved_tensors
        adapters, sizes = ctx.adapters, ctx.sizes
        P, rank, width = adapters.policies, adapters.rank, adapters.a_P_K_W.shape[2]
        grad_M_N = gradients[0].contiguous()
        # Turned round, and filled up to a power of two: a kernel loads no odd number of columns at full speed.
        full = 1 << (width - 1).bit_length()
        a_P_W_K = functional.pad(adapters.a_P_K_W.transpose(1, 2), (0, 0, 0, full - width)).contiguous()
        b_P_N_W = functional.pad(adapters.b_P_W_N.transpose(1, 2), (0, full - width)).contiguous()
        turned = Adapters(b_P_N_W, a_P_W_K, full, adapters.scale)
        dx_M_K, back_M_W = _with_low(grad_M_N, ctx.weight_N_K.T, None, turned)
        da_P_K_W = gradient_kernels.outer(x_M_K.view(P, -1, x_M_K.shape[1]), back_M_W.view(P, -1, full), adapters.scale)
        db_P_N_W = gradient_kernels.outer(
            grad_M_N.view(P, -1, grad_M_N.shape[1]), low_M_W.view(P, -1, width), adapters.scale
        )
        found: list[Tensor | None] = []
        first = 0
        for i, size in enumerate(sizes):
            if ctx.with_parts[2 * i]:
                low = slice(i * rank, (i + 1) * rank)
                found += [da_P_K_W[:, :, low], db_P_N_W[:, first : first + size, low].transpose(1, 2)]
            else:
                found += [None, None]
            first += size
        return dx_M_K, None, None, None, None, *found


class _SiluMul(torch.autograd.Function):
    """silu of the first half of every row times the second half."""

    @staticmethod
    def forward(ctx: Any, pair_M_2N: Tensor) -> Tensor:
        ctx.save_for_backward(pair_M_2N)
        return gradient_kernels.silu_mul(pair_M_2N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradient_kernels.silu_mul_back(ctx.saved_tensors[0], gradients[0].contiguous())


def adapted(
    x: Tensor,
    weight_N_K: Tensor,
    bias_N: Tensor | None,
    sizes: list[int],
    scale: float,
    parts: list[tuple[Tensor, Tensor] | None],
) -> Tensor:
    """The joined layers' output [..., N] for rows x [P*B, ..., K] ordered by policy; parts: (A, B) of each layer."""
    flat: list[Tensor | None] = []
    for part in parts:
        flat += [None, None] if part is None else list(part)
    out_M_N = _Adapted.apply(x.reshape(-1, x.shape[-1]), weight_N_K, bias_N, sizes, scale, *flat)
    return out_M_N.view(*x.shape[:-1], -1)


def silu_mul(pair: Tensor) -> Tensor:
    """silu(gate) * up for [..., 2N] -> [..., N]."""
    return _SiluMul.apply(pair.reshape(-1, pair.shape[-1])).view(*pair.shape[:-1], -1)
