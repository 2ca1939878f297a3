"""Single steps of a decoding step at a model's shape, ours beside the usual way; section `micro` of engine.py.

Device time of one call inside a captured graph, over as many different weights as it takes to leave the L2 cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from engine_models import SHAPES, device_of
from torch import Tensor
from torch.nn import functional

from soar.engine import adapted, kernels, layer_kernels, products
from soar.engine.attention import Window, decoding, grouped_attention
from soar.engine.rollouts import draw

Row = dict[str, Any]
RANK, POLICIES = 16, 16


def microseconds(works: list[Callable[[], Any]]) -> float:
    """Device time of one of the works, run one after another; the least of five rounds."""
    for work in works[:1] * 2:
        work()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for work in works:
            work()
        return 1e6 * (time.perf_counter() - began) / len(works)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    found = []
    for _ in range(5):
        began_at, ended_at = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        began_at.record()
        graph.replay()
        ended_at.record()
        ended_at.synchronize()
        found.append(1000 * began_at.elapsed_time(ended_at) / len(works))
    return min(found)


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Micro:
    """The operations of one shape and their times."""

    def __init__(self, name: str, rows: int, policies: int, bandwidth: float) -> None:
        self.name, self.rows, self.policies, self.bandwidth = name, rows, policies, bandwidth
        self.shape, self.device = SHAPES[name], device_of()
        self.kind = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.found: list[Row] = []

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.kind) / size[-1] ** 0.5

    def note(self, what: str, way: str, us: float, moved: float, flops: float = 0.0) -> None:
        """One line of the table; moved: the fewest bytes that this operation can move."""
        row: Row = {
            "section": "micro",
            "what": f"{self.name} {what}: {way}",
            "microseconds": us,
            "megabytes": moved / 1e6,
        }
        row["copy_share"] = moved / (us * 1e-6) / self.bandwidth
        if flops:
            row["tflops"] = flops / us / 1e6
        self.found.append(row)
        numbers = "  ".join(f"{k} {v:,.4g}" for k, v in row.items() if isinstance(v, float))
        print(f"{row['what']:78s} {numbers}", flush=True)

    def adapters(self, inputs: int, sizes: list[int], count: int) -> list[products.Adapters]:
        made = []
        for _ in range(count):
            a, b = (
                self.random(self.policies, inputs, RANK * len(sizes)),
                self.random(self.policies, RANK * len(sizes), sum(sizes)),
            )
            keep = torch.zeros_like(b)
            first = 0
            for i, size in enumerate(sizes):
                keep[:, RANK * i : RANK * (i + 1), first : first + size] = 1
                first += size
            made.append(products.Adapters(a, b * keep, RANK, 2.0))
        return made

    def product(self, what: str, inputs: int, sizes: list[int], residual: bool = False, is_gated: bool = False) -> None:
        """A joined product: separate products, joined ones of PyTorch, ours, ours without adapters, ours tile by tile."""
        outputs, rows = sum(sizes), self.rows
        count = max(2, min(24, int(1e8 / (2 * outputs * inputs))))
        weights = [self.random(outputs, inputs) for _ in range(count)]
        adapters, x = self.adapters(inputs, sizes, count), self.random(rows, inputs)
        added = self.random(rows, outputs) if residual else None
        width = outputs // 2 if is_gated else outputs
        moved = x.element_size() * (
            rows * (inputs + width * (2 if residual else 1))
            + outputs * inputs
            + self.policies * RANK * (inputs * len(sizes) + outputs)
        )
        flops = 2.0 * rows * (outputs * inputs + RANK * (len(sizes) * inputs + outputs))

        def one(way: str, call: Callable[[Tensor, products.Adapters], Tensor]) -> Tensor:
            us = microseconds([lambda w=w, a=a: call(w, a) for w, a in zip(weights, adapters, strict=True)])  # type: ignore[misc]
            self.note(what, way, us, moved, flops)
            return call(weights[0], adapters[0])

        one("separate products", lambda w, a: self.separate(x, w, a, sizes, added, is_gated))
        if is_gated:
            wanted = one("joined, PyTorch", lambda w, a: products.gated_plain(x, w, a))
        else:
            wanted = one("joined, PyTorch", lambda w, a: products.project_plain(x, w, None, a, added))
        one("joined, PyTorch, no adapters", lambda w, a: products.project_plain(x, w, None, None, None))
        if not kernels.available(x):
            return
        if is_gated:
            call = products.gated_kernel
            tiles = products.fitting(products.GATED_TILES, rows // self.policies, [width])
            one("ours, no adapters", lambda w, a: call(x, w, None))
            results = [one(f"ours {_short(t)}", lambda w, a, t=t: call(x, w, a, t)) for t in tiles]  # type: ignore[misc]
        else:
            run = products.project_kernel
            tiles = products.fitting(products.TILES, rows // self.policies, sizes)
            one("ours, no adapters", lambda w, a: run(x, w, None, None, [outputs], added))
            results = [one(f"ours {_short(t)}", lambda w, a, t=t: run(x, w, None, a, sizes, added, t)) for t in tiles]  # type: ignore[misc]
        gap = max(((r.float() - wanted.float()).norm() / wanted.float().norm()).item() for r in results)
        equal = all(torch.equal(results[0], r) for r in results)
        print(f"    relative gap to PyTorch {gap:.1e}; all tiles equal bit for bit: {equal}", flush=True)

    def training(self, what: str, inputs: int, sizes: list[int]) -> None:
        """Forward and backward pass of joined layers with adapters: autograd of each, and ours (adapted.py)."""
        x, grad = self.random(self.rows, inputs).requires_grad_(True), self.random(self.rows, sum(sizes))
        weight, joined = self.random(sum(sizes), inputs), self.adapters(inputs, sizes, 1)[0]
        parts, first = [], 0
        for i, size in enumerate(sizes):
            low = slice(i * RANK, (i + 1) * RANK)
            pair = joined.a_P_K_W[:, :, low], joined.b_P_W_N[:, low, first : first + size]
            parts.append(tuple(part.float().contiguous().requires_grad_(True) for part in pair))
            first += size
        rows_P, flops = x.view(self.policies, -1, inputs), 4.0 * self.rows * inputs * sum(sizes)

        def apart() -> None:
            outs, first = [], 0
            for size, (a, b) in zip(sizes, parts, strict=True):
                plain = functional.linear(rows_P, weight[first : first + size])
                low = torch.bmm(rows_P, a.to(self.kind))
                outs.append(plain.baddbmm_(low, b.to(self.kind), alpha=2.0))
                first += size
            torch.autograd.backward(outs, list(grad.view(self.policies, -1, sum(sizes)).split(sizes, dim=-1)))

        def ours() -> None:
            adapted.adapted(x, weight, None, sizes, 2.0, parts).backward(grad)  # type: ignore[arg-type]

        for way, call in (("apart", apart), ("joined", ours)):
            for _ in range(2):
                call()
            wait_for_device()
            began = time.perf_counter()
            for _ in range(5):
                call()
            wait_for_device()
            self.note(f"training {what}", way, 2e5 * (time.perf_counter() - began), 0.0, flops)

    def separate(
        self, x: Tensor, w: Tensor, a: products.Adapters, sizes: list[int], added: Tensor | None, is_gated: bool
    ) -> Tensor:
        """What the layers do one by one."""
        outs, first = [], 0
        for i, size in enumerate(sizes):
            low = slice(i * RANK, (i + 1) * RANK)
            part = products.Adapters(a.a_P_K_W[:, :, low], a.b_P_W_N[:, low, first : first + size], RANK, a.scale)
            outs.append(products.project_plain(x, w[first : first + size], None, part, None))
            first += size
        if is_gated:
            return functional.silu(outs[0]) * outs[1]
        return outs[0] if added is None else added + outs[0]

    def between(self) -> None:
        """Norm, rotary embedding with cache entry, attention, output layer and draw."""
        shape, rows = self.shape, self.rows
        hidden, heads, kv, width = (
            shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"],
        )  # fmt: skip
        item, places, filled = torch.finfo(self.kind).bits // 8, 320, 180
        x, weight = self.random(rows, hidden), self.random(hidden)
        ways: list[tuple[str, Callable[[], Any]]] = [("PyTorch", lambda: layer_kernels.norm_plain(x, weight, 1e-5))]
        if kernels.available(x):
            ways.append(("ours", lambda: layer_kernels.norm_kernel(x, weight, 1e-5)))
        for way, call in ways:
            self.note("norm", way, microseconds([call] * 8), item * 2 * rows * hidden)
        total = (heads + 2 * kv) * width
        qkv, cos, sin = self.random(rows, total), self.random(rows, width), self.random(rows, width)
        key, value = self.random(rows, kv, places, width), self.random(rows, kv, places, width)
        place = torch.tensor([filled - 1], device=self.device)
        ways = [("PyTorch", lambda: layer_kernels.enter_plain(qkv, cos, sin, key, value, place, heads))]
        if kernels.available(x):
            ways.append(("ours", lambda: layer_kernels.enter_kernel(qkv, cos, sin, key, value, place, heads)))
        for way, call in ways:
            self.note("rotary and cache", way, microseconds([call] * 8), item * 2 * rows * (total + width))
        query = self.random(rows, heads, 1, width)
        window = Window(
            torch.zeros(rows, dtype=torch.int32, device=self.device),
            torch.tensor([filled], dtype=torch.int32, device=self.device),
        )

        def attend() -> None:
            with decoding(window):
                grouped_attention(torch.nn.Identity(), query, key, value, None)

        self.note(
            f"attention, {filled} places", "ours", microseconds([attend] * 4), item * 2 * rows * kv * width * filled
        )
        words = shape["vocab_size"]
        head, uniform = self.random(words, hidden), torch.rand(rows, device=self.device)
        moved = item * (rows * (hidden + words) + words * hidden)
        self.note(
            "output layer",
            "PyTorch",
            microseconds([lambda: functional.linear(x, head)] * 2),
            moved,
            2.0 * rows * words * hidden,
        )
        logits = functional.linear(x, head)
        ways = [("PyTorch", lambda: draw(logits.float(), uniform, 1.0, 1.0))]
        if kernels.available(x):
            ways.append(("ours", lambda: kernels.draw(logits, uniform, 1.0)))
        for way, call in ways:
            self.note("draw", way, microseconds([call] * 2), item * rows * words)


def _short(tile: products.Tile) -> str:
    return f"{tile.rows}x{tile.columns} warps {tile.warps} stages {tile.stages}"


def bench_micro(toy: bool, bandwidth: float) -> list[Row]:
    """Every operation at the two shapes."""
    found = []
    for name, rows in (("toy", 32),) if toy else (("135m", 2048), ("3b", 1024)):
        micro = Micro(name, rows, 4 if toy else POLICIES, bandwidth)
        shape = micro.shape
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        query, kv = (shape[n] * shape["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
        micro.product("query, key, value", hidden, [query, kv, kv])
        micro.product("attention output + residual", query, [hidden], residual=True)
        micro.product("gate, up, product", hidden, [inner, inner], is_gated=True)
        micro.product("down + residual", inner, [hidden], residual=True)
        micro.between()
        long = Micro(name, 64 if toy else 1 << 16 if name == "135m" else 1 << 14, micro.policies, bandwidth)
        long.training("query, key, value", hidden, [query, kv, kv])
        long.training("gate, up", hidden, [inner, inner])
        long.training("down", inner, [hidden])
        found += micro.found + long.found
    return found
