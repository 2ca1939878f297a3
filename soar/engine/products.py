"""Products of a decoding step with their adapters inside: one kernel a product, on a GPU.

`project` is residual + x W^T + bias + scale * (x A_p) B_p for rows x ordered by policy p, where W may be the weights of
several layers that read the same input (query, key and value), one below the other. `gated` is the first half of a
SwiGLU block, silu(gate) * up, both with their adapters. A program of the kernel holds rows of one policy only, sums x A
beside x W over the same pieces of x, and adds the low-rank term at the end, so no intermediate is written. The columns of
a joined product belong to parts: part i has its own `rank` columns of A and rows of B.

The first tile that fits is taken (`tile_of`): on an H200 it was at most 1.3 times slower than the best one at every shape
of a 135M model (benchmarks/engine.py --only micro times them all). Without a GPU, and for large weights, where cuBLAS is
faster, the same is made of PyTorch's products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from soar.engine import kernels

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = None

LARGEST_WEIGHT = 1 << 23  # elements of a weight up to which our kernel is used; a fixed rule, so that runs repeat


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result that one program makes, with its warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int
    inner: int = 64


TILES = (Tile(64, 64, 4, 4), Tile(128, 64, 4, 4), Tile(128, 64, 8, 4), Tile(64, 128, 4, 3), Tile(128, 128, 8, 3),
         Tile(64, 32, 4, 4))  # fmt: skip
GATED_TILES = (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 4), Tile(128, 32, 4, 4), Tile(128, 128, 8, 3))

DEEP = (Tile(128, 64, 4, 4), *TILES)
"""For products with more inputs than outputs: there the whole step of a 135M model was 1.5 % faster with it (H200)."""

TRIED: dict[tuple[int, int], Tile] = {}
"""(outputs, inputs) of a product -> a tile that a benchmark tries instead."""


@dataclass(frozen=True)
class Adapters:
    """Adapters of one joined product: a_P_K_W, b_P_W_N with W = parts * rank; b is zero outside its part's columns."""

    a_P_K_W: Tensor
    b_P_W_N: Tensor
    rank: int
    scale: float

    @property
    def policies(self) -> int:
        return self.a_P_K_W.shape[0]


if triton is not None:

    @triton.jit
    def _low(x, low_a, k, j, acc, K, A_WIDTH, RANK: tl.constexpr, PART, EVEN: tl.constexpr):
        """acc + x @ (A's columns of the part)."""
        place = k[:, None] * A_WIDTH + PART * RANK + j[None, :]
        if EVEN:
            a = tl.load(low_a + place, mask=(j < RANK)[None, :], other=0.0)
        else:
            a = tl.load(low_a + place, mask=(j < RANK)[None, :] & (k < K)[:, None], other=0.0)
        return tl.dot(x, a, acc, input_precision="ieee")

    @triton.jit
    def _project(
        x, weight, bias, residual, low_a, low_b, out, width, K, N, scale, x_row, w_n, w_k,
        first_split, second_split, A_WIDTH,
        RANK: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
        HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ADAPTED: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        blocks = tl.cdiv(width, BM)
        policy = tl.cast(tl.program_id(0) // blocks, tl.int64)
        local = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
        row = policy * width + tl.minimum(local, width - 1)
        n0 = tl.program_id(1) * BN
        n = n0 + tl.arange(0, BN)
        column = tl.minimum(n, N - 1)
        j = tl.arange(0, RP)
        part = 0
        if ADAPTED:
            part = (n0 >= first_split).to(tl.int32) + (n0 >= second_split).to(tl.int32)
            low_a += policy * K * A_WIDTH
        acc = tl.zeros([BM, BN], tl.float32)
        low = tl.zeros([BM, RP], tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            x_place = x + row[:, None] * x_row + k[None, :]
            w_place = weight + column[None, :] * w_n + k[:, None] * w_k
            if EVEN:
                xs, ws = tl.load(x_place), tl.load(w_place)
            else:
                xs = tl.load(x_place, mask=(k < K)[None, :], other=0.0)
                ws = tl.load(w_place, mask=(k < K)[:, None], other=0.0)
            acc = tl.dot(xs, ws, acc, input_precision="ieee")
            if ADAPTED:
                low = _low(xs, low_a, k, j, low, K, A_WIDTH, RANK, part, EVEN)
        if ADAPTED:
            place = policy * A_WIDTH * N + (part * RANK + j)[:, None] * N + column[None, :]
            b = tl.load(low_b + place, mask=(j < RANK)[:, None], other=0.0)
            acc += scale * tl.dot(low.to(b.dtype), b, input_precision="ieee")
        if HAS_BIAS:
            acc += tl.load(bias + column).to(tl.float32)[None, :]
        place = row[:, None] * N + n[None, :]
        inside = (local < width)[:, None] & (n < N)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated(
        x, weight, low_a, low_b, out, width, K, N, scale, x_row, A_WIDTH,
        RANK: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
        ADAPTED: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        blocks = tl.cdiv(width, BM)
        policy = tl.cast(tl.program_id(0) // blocks, tl.int64)
        local = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
        row = policy * width + tl.minimum(local, width - 1)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        column = tl.minimum(n, N - 1)
        j = tl.arange(0, RP)
        if ADAPTED:
            low_a += policy * K * A_WIDTH
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        gate_low = tl.zeros([BM, RP], tl.float32)
        up_low = tl.zeros([BM, RP], tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            x_place = x + row[:, None] * x_row + k[None, :]
            w_place = weight + column[None, :] * K + k[:, None]
            if EVEN:
                xs, gs, us = tl.load(x_place), tl.load(w_place), tl.load(w_place + N * K)
            else:
                xs = tl.load(x_place, mask=(k < K)[None, :], other=0.0)
                gs = tl.load(w_place, mask=(k < K)[:, None], other=0.0)
                us = tl.load(w_place + N * K, mask=(k < K)[:, None], other=0.0)
            gate = tl.dot(xs, gs, gate, input_precision="ieee")
            up = tl.dot(xs, us, up, input_precision="ieee")
            if ADAPTED:
                gate_low = _low(xs, low_a, k, j, gate_low, K, A_WIDTH, RANK, 0, EVEN)
                up_low = _low(xs, low_a, k, j, up_low, K, A_WIDTH, RANK, 1, EVEN)
        if ADAPTED:
            # b is [2 * rank, 2 * N]: gate's block at the upper left, up's at the lower right.
            place = policy * A_WIDTH * 2 * N + j[:, None] * (2 * N) + column[None, :]
            b = tl.load(low_b + place, mask=(j < RANK)[:, None], other=0.0)
            gate += scale * tl.dot(gate_low.to(b.dtype), b, input_precision="ieee")
            b = tl.load(low_b + place + RANK * 2 * N + N, mask=(j < RANK)[:, None], other=0.0)
            up += scale * tl.dot(up_low.to(b.dtype), b, input_precision="ieee")
        result = gate / (1.0 + tl.exp(-gate)) * up
        inside = (local < width)[:, None] & (n < N)[None, :]
        tl.store(out + row[:, None] * N + n[None, :], result.to(out.dtype.element_ty), mask=inside)


def fitting(tiles: tuple[Tile, ...], width: int, sizes: list[int]) -> list[Tile]:
    """Those of the tiles, cut to so many rows a policy, whose columns do not cross the end of a part."""
    rows = max(16, 1 << (width - 1).bit_length())
    every = [t if t.rows <= rows else Tile(rows, t.columns, t.warps, t.stages, t.inner) for t in tiles]
    every += [Tile(min(64, rows), 16, 4, 4)]
    last = len(sizes) == 1
    return list(dict.fromkeys(t for t in every if last or all(size % t.columns == 0 for size in sizes)))


def tile_of(outputs: int, inputs: int, width: int, sizes: list[int]) -> Tile:
    """The tile of `project` for so many rows a policy."""
    deep = inputs > outputs and width >= DEEP[0].rows
    return TRIED.get((outputs, inputs)) or fitting(DEEP if deep else TILES, width, sizes)[0]


def by_kernel(x_R_K: Tensor, weight_N_K: Tensor, sizes: list[int]) -> bool:
    """Whether our kernels are the way for this product: on a GPU, 16-bit, in whole tiles, the weight not too large."""
    small = weight_N_K.numel() <= LARGEST_WEIGHT and x_R_K.dtype.itemsize == 2
    return small and kernels.available(x_R_K) and all(size % 16 == 0 for size in [x_R_K.shape[1], *sizes])


def project(
    x_R_K: Tensor,
    weight_N_K: Tensor,
    bias_N: Tensor | None,
    adapters: Adapters | None,
    sizes: list[int],
    residual_R_N: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """residual + x W^T + bias + scale (x A_p) B_p, [R, N]; sizes: columns of each part (at most three)."""
    if by_kernel(x_R_K, weight_N_K, sizes):
        return project_kernel(x_R_K, weight_N_K, bias_N, adapters, sizes, residual_R_N, early=early)
    return project_plain(x_R_K, weight_N_K, bias_N, adapters, residual_R_N)


def gated(x_R_K: Tensor, weight_2N_K: Tensor, adapters: Adapters | None, early: bool = False) -> Tensor:
    """silu(gate) * up [R, N] of the joined weight (gate's rows above up's), each with its adapter."""
    if by_kernel(x_R_K, weight_2N_K, [weight_2N_K.shape[0] // 2]):
        return gated_kernel(x_R_K, weight_2N_K, adapters, early=early)
    return gated_plain(x_R_K, weight_2N_K, adapters)


def project_plain(
    x_R_K: Tensor, weight_N_K: Tensor, bias_N: Tensor | None, adapters: Adapters | None, residual_R_N: Tensor | None
) -> Tensor:
    """`project` from PyTorch's products."""
    if adapters is None:
        out_R_N = functional.linear(x_R_K, weight_N_K, bias_N)
        return out_R_N if residual_R_N is None else residual_R_N + out_R_N
    x_P_M_K = x_R_K.view(adapters.policies, -1, x_R_K.shape[1])
    low_P_M_W = torch.bmm(x_P_M_K, adapters.a_P_K_W)
    out_R_N = functional.linear(x_R_K, weight_N_K, bias_N)
    out_R_N.view(adapters.policies, -1, out_R_N.shape[1]).baddbmm_(low_P_M_W, adapters.b_P_W_N, alpha=adapters.scale)
    return out_R_N if residual_R_N is None else out_R_N.add_(residual_R_N)


def gated_plain(x_R_K: Tensor, weight_2N_K: Tensor, adapters: Adapters | None) -> Tensor:
    """`gated` from PyTorch's products."""
    gate_R_N, up_R_N = project_plain(x_R_K, weight_2N_K, None, adapters, None).chunk(2, dim=1)
    return functional.silu(gate_R_N) * up_R_N


def project_kernel(
    x_R_K: Tensor,
    weight_N_K: Tensor,
    bias_N: Tensor | None,
    adapters: Adapters | None,
    sizes: list[int],
    residual_R_N: Tensor | None = None,
    tile: Tile | None = None,
    early: bool = False,
) -> Tensor:
    """`project` by the Triton kernel; tile None: `tile_of`'s."""
    R, K = x_R_K.shape
    N = weight_N_K.shape[0]
    out_R_N = x_R_K.new_empty(R, N)
    policies, rank, a, b, scale = _parts_of(adapters, x_R_K)
    splits = [sum(sizes[: i + 1]) if i + 1 < len(sizes) else N for i in range(2)]
    width = R // policies

    def launch(t: Tile) -> None:
        _project[(policies * triton.cdiv(width, t.rows), triton.cdiv(N, t.columns))](
            x_R_K, weight_N_K, x_R_K if bias_N is None else bias_N, x_R_K if residual_R_N is None else residual_R_N,
            a, b, out_R_N, width, K, N, scale, x_R_K.stride(0),
            weight_N_K.stride(0), weight_N_K.stride(1), splits[0], splits[1], a.shape[-1],
            RANK=rank, RP=max(16, triton.next_power_of_2(rank)), BM=t.rows, BN=t.columns, BK=t.inner,
            EVEN=K % t.inner == 0, HAS_BIAS=bias_N is not None, HAS_RESIDUAL=residual_R_N is not None,
            ADAPTED=adapters is not None, num_warps=t.warps, num_stages=t.stages, **kernels.start_early(early),
        )  # fmt: skip

    if tile is None:
        tile = tile_of(N, K, width, sizes if adapters is not None else [N])
    launch(tile)
    return out_R_N


def gated_kernel(
    x_R_K: Tensor, weight_2N_K: Tensor, adapters: Adapters | None, tile: Tile | None = None, early: bool = False
) -> Tensor:
    """`gated` by the Triton kernel; tile None: the first that fits."""
    R, K = x_R_K.shape
    N = weight_2N_K.shape[0] // 2
    out_R_N = x_R_K.new_empty(R, N)
    policies, rank, a, b, scale = _parts_of(adapters, x_R_K)
    width = R // policies

    def launch(t: Tile) -> None:
        _gated[(policies * triton.cdiv(width, t.rows), triton.cdiv(N, t.columns))](
            x_R_K, weight_2N_K, a, b, out_R_N, width, K, N, scale, x_R_K.stride(0), a.shape[-1],
            RANK=rank, RP=max(16, triton.next_power_of_2(rank)), BM=t.rows, BN=t.columns, BK=t.inner,
            EVEN=K % t.inner == 0, ADAPTED=adapters is not None, num_warps=t.warps, num_stages=t.stages,
            **kernels.start_early(early),
        )  # fmt: skip

    if tile is None:
        tile = TRIED.get((2 * N, K)) or fitting(GATED_TILES, width, [N])[0]
    launch(tile)
    return out_R_N


def _parts_of(adapters: Adapters | None, x_R_K: Tensor) -> tuple[int, int, Tensor, Tensor, float]:
    """(policies, rank, A, B, scale); stand-ins where there are no adapters."""
    if adapters is None:
        return 1, 1, x_R_K, x_R_K, 0.0
    return adapters.policies, adapters.rank, adapters.a_P_K_W, adapters.b_P_W_N, adapters.scale
