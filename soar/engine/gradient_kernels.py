"""What a backward pass needs beside the large products: gradients of adapters, and of silu(gate) * up.

The gradient of an adapter is a product of two tall matrices with few columns each. A program sums a piece of the rows;
the pieces are added afterwards in their order, so a gradient is the same bit for bit every time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from soar.engine import kernels

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _outer(
        tall, thin, out, M, C, W, pieces, scale,
        WP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        policy, piece = tl.cast(tl.program_id(1) // pieces, tl.int64), tl.program_id(1) % pieces
        c, w = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, WP)
        steps = tl.cdiv(tl.cdiv(M, BM), pieces)
        acc = tl.zeros([BC, WP], tl.float32)
        tall += policy * M * C
        thin += policy * M * W
        for step in range(piece * steps, (piece + 1) * steps):
            m = step * BM + tl.arange(0, BM)
            seen = (m < M)[:, None]
            x = tl.load(tall + m[:, None] * C + c[None, :], mask=seen & (c < C)[None, :], other=0.0)
            y = tl.load(thin + m[:, None] * W + w[None, :], mask=seen & (w < W)[None, :], other=0.0)
            acc = tl.dot(tl.trans(x), y, acc, input_precision="ieee")
        place = (tl.cast(tl.program_id(1), tl.int64) * C + c[:, None]) * W + w[None, :]
        tl.store(out + place, acc * scale, mask=(c < C)[:, None] & (w < W)[None, :])

    @triton.jit
    def _silu_mul(pair, out, N, BLOCK: tl.constexpr):
        row = tl.cast(tl.program_id(0), tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(pair + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
        up = tl.load(pair + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
        kind = out.dtype.element_ty
        active = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        tl.store(out + row * N + n, (active * up).to(kind), mask=n < N)

    @triton.jit
    def _silu_mul_back(pair, grad, out, N, BLOCK: tl.constexpr):
        row = tl.cast(tl.program_id(0), tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(pair + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
        up = tl.load(pair + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
        g = tl.load(grad + row * N + n, mask=n < N, other=0.0).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(-gate))
        slope = share * (1.0 + gate * (1.0 - share))
        kind = out.dtype.element_ty
        tl.store(out + row * 2 * N + n, (g * up * slope).to(kind), mask=n < N)
        tl.store(out + row * 2 * N + N + n, (g * gate * share).to(kind), mask=n < N)


def outer(tall_P_M_C: Tensor, thin_P_M_W: Tensor, scale: float) -> Tensor:
    """scale * tall^T thin for every policy, float32 [P, C, W]: the gradient of an adapter."""
    if not kernels.available(tall_P_M_C) or tall_P_M_C.dtype.itemsize > 2:
        return torch.bmm(tall_P_M_C.transpose(1, 2), thin_P_M_W).float() * scale
    return outer_kernel(tall_P_M_C.contiguous(), thin_P_M_W.contiguous(), scale)


def outer_kernel(tall_P_M_C: Tensor, thin_P_M_W: Tensor, scale: float) -> Tensor:
    """`outer` by the Triton kernel: the rows are cut in pieces, whose sums are added afterwards, always in one order."""
    P, M, C = tall_P_M_C.shape
    W = thin_P_M_W.shape[2]
    rows, columns = 64, 64
    blocks = triton.cdiv(C, columns) * P
    pieces = max(1, min(triton.cdiv(M, 4 * rows), triton.cdiv(1024, blocks)))
    out = torch.empty(P, pieces, C, W, dtype=torch.float32, device=tall_P_M_C.device)
    _outer[(triton.cdiv(C, columns), P * pieces)](
        tall_P_M_C, thin_P_M_W, out, M, C, W, pieces, scale,
        WP=max(16, triton.next_power_of_2(W)), BM=rows, BC=columns, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out.sum(1) if pieces > 1 else out[:, 0]


def silu_mul(pair_M_2N: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of every row."""
    if not kernels.available(pair_M_2N):
        gate_M_N, up_M_N = pair_M_2N.chunk(2, dim=1)
        return functional.silu(gate_M_N) * up_M_N
    M, N = pair_M_2N.shape[0], pair_M_2N.shape[1] // 2
    out_M_N = pair_M_2N.new_empty(M, N)
    block = min(1024, triton.next_power_of_2(N))
    _silu_mul[(M, triton.cdiv(N, block))](pair_M_2N, out_M_N, N, BLOCK=block, num_warps=4)
    return out_M_N


def silu_mul_back(pair_M_2N: Tensor, grad_M_N: Tensor) -> Tensor:
    """The gradient of `silu_mul` with respect to its input, [M, 2N]."""
    if not kernels.available(pair_M_2N):
        gate_M_N, up_M_N = pair_M_2N.chunk(2, dim=1)
        share_M_N = torch.sigmoid(gate_M_N)
        slope_M_N = share_M_N * (1 + gate_M_N * (1 - share_M_N))
        return torch.cat((grad_M_N * up_M_N * slope_M_N, grad_M_N * gate_M_N * share_M_N), dim=1)
    M, N = grad_M_N.shape
    out_M_2N = torch.empty_like(pair_M_2N)
    block = min(1024, triton.next_power_of_2(N))
    _silu_mul_back[(M, triton.cdiv(N, block))](pair_M_2N, grad_M_N, out_M_2N, N, BLOCK=block, num_warps=4)
    return out_M_2N
