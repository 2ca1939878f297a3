"""Section `few` of benchmarks/engine.py: a decoding step with few policies and few rows, as a run on MATH makes them.

A step is timed at 500 filled places of a cache for 150 + 1,024 tokens, with adapters and (`base`) without. `WAYS` are ways to
compute x W^T + scale (x A) B: `bmm` is the engine's; `plain` and `plain-t` make one product of all rows with all policies' A
and take its diagonal blocks, which cuBLAS may split along the sum (A stored as [in, P, rank] or as [P, rank, in]); `joined`
has A's rows below those of the base weight. They take the place of `_LowRank.forward` here alone. Then the products by
themselves, captured, with as many sets of weights in turn as a step reads, so that none is in the cache of the device. With
one policy `bmm` is a plain product already: torch calls gemm for a batch of one.

What decides comes first: 2 policies with 256 rows in all (of 512 rows of a run some 260 are alive). A part that fails is a
row with its error; none begins after `SECONDS`.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from engine_models import backbone_of, prompts_of, random_stack, step_bytes_and_flops, timed, wait
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from soar.config import SamplingConfig
from soar.engine import policy
from soar.engine.graphs import Program, SlotBatch, StaticDecoder
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request
from soar.types import no_tick

Row = dict[str, Any]
Profile = Callable[[Callable[[], Any]], list[Row]]

SECONDS = 60.0
RANK = 16
REPLAYS = 5
POLICIES = (1, 2, 4)
SIZES = {False: ((256, 64, 1024), 150, 500, 32, 1024), True: ((16, 8, 32), 12, 20, 4, 32)}
"""By toy: rows (what decides first), tokens of a prompt, filled places, steps timed, tokens that the cache has room for."""

JOINED: dict[int, Tensor] = {}
"""By the address of a base weight: it and below it the A of every policy [out + P * rank, in]."""


def low_of(x_P_N_I: Tensor, a_P_I_r: Tensor) -> Tensor:
    """x A [P, N, rank] by one product of all rows with all policies' A, of which the diagonal blocks are a view."""
    (P, N, inner), rank = x_P_N_I.shape, a_P_I_r.shape[2]
    a_I_Pr = a_P_I_r.transpose(0, 1).reshape(inner, P * rank)
    if a_I_Pr.data_ptr() != a_P_I_r.data_ptr():
        raise RuntimeError("A is copied for every product, so its speed says nothing: store it as `laid` does")
    return blocks((x_P_N_I.reshape(P * N, inner) @ a_I_Pr).view(P, N, P, rank))


def blocks(low_P_N_P_r: Tensor) -> Tensor:
    """Every policy's rows with its own A [P, N, rank], not copied."""
    return low_P_N_P_r.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def plain(ctx: Any, *given: Any) -> Tensor:
    """`_LowRank.forward` with `low_of`."""
    x_P_N_I, weight_O_I, bias, a_P_I_r, b_P_r_O, scale = given
    low_P_N_r = low_of(x_P_N_I, a_P_I_r)
    return functional.linear(x_P_N_I, weight_O_I, bias).baddbmm_(low_P_N_r, b_P_r_O, alpha=scale)


def joined(ctx: Any, *given: Any) -> Tensor:
    """`_LowRank.forward` with one product for W and every A; no bias."""
    x_P_N_I, weight_O_I, _, a_P_I_r, b_P_r_O, scale = given
    (policies, _, rank), outputs = a_P_I_r.shape, len(weight_O_I)
    both_P_N_X = functional.linear(x_P_N_I, JOINED[weight_O_I.data_ptr()])
    low_P_N_r = blocks(both_P_N_X[..., outputs:].unflatten(-1, (policies, rank)))
    return both_P_N_X[..., :outputs].baddbmm_(low_P_N_r, b_P_r_O, alpha=scale)


WAYS: dict[str, tuple[Callable[..., Tensor], tuple[int, int, int]]] = {
    "bmm": (policy._LowRank.forward, (0, 1, 2)),
    "plain": (plain, (1, 0, 2)),
    "plain-t": (plain, (0, 2, 1)),
    "joined": (joined, (0, 1, 2)),
}
"""The forward pass, and the order of A's axes in memory."""


def laid(a_P_I_r: Tensor, order: tuple[int, int, int]) -> Tensor:
    """The same tensor, in memory in this order of its axes (each of them is its own inverse)."""
    return a_P_I_r.permute(order).contiguous().permute(order)


def join(weight_O_I: Tensor, a_P_I_r: Tensor) -> None:
    JOINED[weight_O_I.data_ptr()] = torch.cat([weight_O_I, a_P_I_r.mT.reshape(-1, weight_O_I.shape[1])])


@contextmanager
def low_rank(forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block the engine's low-rank layers compute so."""
    before = policy._LowRank.forward
    policy._LowRank.forward = staticmethod(forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        policy._LowRank.forward = staticmethod(before)  # type: ignore[method-assign]
        JOINED.clear()


def laid_stack(stack: AdapterStack, order: tuple[int, int, int]) -> AdapterStack:
    tensors = {name: laid(t, order) if name.endswith(".A") else t for name, t in stack.tensors.items()}
    return AdapterStack(stack.kind, tensors, stack.scale)


def begun(backbone: Backbone, decoder: StaticDecoder, stack: AdapterStack | None, rows: int, toy: bool) -> SlotBatch:
    """Rows in their slots, prompts read; `stack` is `StaticDecoder.hold`'s."""
    _, length, _, _, room = SIZES[toy]
    policies = 1 if stack is None else stack.policies
    attempts = min(32, rows // policies)
    prompts = prompts_of(backbone, policies, rows // policies // attempts, length)
    seeds = [[1000 * p + q for q in range(len(prompts[p]))] for p in range(policies)]
    request = Request(prompts, attempts, seeds, SamplingConfig(max_tokens=room))
    batch = SlotBatch(backbone, stack, request, no_tick)
    with backbone.use(stack):
        batch._begin(decoder)
    return batch


def at(program: Program, length: int, filled: int) -> None:
    """Go to the step whose new token sees so many places, its own among them."""
    program.filled_1.fill_(filled)
    program.place_1.fill_(filled - 1)
    program.position_R_1.fill_(filled - 1)
    program.step_1.fill_(filled - length)


def steps(program: Program, length: int, filled: int, new: int) -> None:
    at(program, length, filled)
    for _ in range(new):
        program.step()


@torch.no_grad()
def bench_step(
    backbone: Backbone,
    stack: AdapterStack | None,
    way: str,
    rows: int,
    toy: bool,
    ceiling: tuple[float, float],
    profiled: Profile,
) -> Row:
    """One decoding step, timed over some of them; `stack` None: the base model, and `way` is `base`.

    capture_seconds: of the first step, captured; Triton's kernels are compiled in the very first.
    """
    _, length, filled, new, _ = SIZES[toy]
    decoder, policies = StaticDecoder(backbone), 0 if stack is None else stack.policies
    forward, order = WAYS["bmm" if stack is None else way]
    try:
        with low_rank(forward):
            held = decoder.hold(None if stack is None else laid_stack(stack, order))
            if held is not None and way == "joined":
                for name, layer in backbone.layers.items():
                    join(layer.base.weight, held.tensors[f"{name}.A"])
            program = begun(backbone, decoder, held, rows, toy).program
            for tensor in decoder.flat:
                tensor.normal_()  # products with zeros are faster
            wait()
            began = time.perf_counter()
            steps(program, length, filled, 1)
            wait()
            capture = time.perf_counter() - began
            steps(program, length, filled, 8)
            seconds = timed(partial(steps, program, length, filled, new), 0, 2)
            at(program, length, filled)
            try:
                kernels = profiled(program.step)
            except Exception:  # the time is known
                traceback.print_exc()
                kernels = []
    finally:
        decoder.release()
    size, flops = step_bytes_and_flops(backbone.model.config, rows, filled + new / 2, policies, RANK)
    return {
        "section": "few",
        "what": f"step, {rows} rows, {f'{policies} policies, ' if policies else ''}{way}",
        "way": way,
        "milliseconds_per_step": 1000 * seconds / new,
        "tokens_per_second": rows * new / seconds,
        "roofline_share": new * max(size / ceiling[0], flops / ceiling[1]) / seconds,
        "capture_seconds": capture,
        **({"kernels": kernels} if kernels else {}),
    }


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    """The work as a captured graph; without a GPU as it is."""
    if not torch.cuda.is_available():
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    return replay


@torch.no_grad()
def bench_products(config: LlamaConfig, inner: int, outputs: int, policies: int, rows: int, ways: list[str]) -> Row:
    """Microseconds of one low-rank layer: the base product alone, x A in every way, and the whole layer in every way."""
    gpu, layers = torch.cuda.is_available(), config.num_hidden_layers
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    x_P_N_I = torch.randn(policies, rows // policies, inner, **kind)
    weight_L_O_I = torch.randn(layers, outputs, inner, **kind) * inner**-0.5
    a_L_P_I_r = torch.randn(layers, policies, inner, RANK, **kind) * inner**-0.5
    b_L_P_r_O = torch.randn(layers, policies, RANK, outputs, **kind)
    quiet = SimpleNamespace(save_for_backward=lambda *tensors: None)
    what = f"products {inner} to {outputs}, {policies} policies x {rows // policies} rows"
    took: dict[str, float] = {}
    gaps: dict[str, float] = {}
    failed: dict[str, str] = {}
    outs: list[Tensor] = []

    def clock(label: str, one: Callable[[int], Any]) -> None:
        """Microseconds of one(layer)."""

        def work() -> None:
            for layer in range(layers):
                one(layer)

        took[label] = 1e6 * timed(replayed(work), 1, 3) / (layers * (REPLAYS if gpu else 1))

    def try_way(way: str) -> None:
        forward, order = WAYS[way]
        a_L = [laid(a_P_I_r, order) for a_P_I_r in a_L_P_I_r]
        if way == "joined":
            for layer in range(layers):
                join(weight_L_O_I[layer], a_L[layer])
        given = [(x_P_N_I, weight_L_O_I[n], None, a_L[n], b_L_P_r_O[n], 2.0) for n in range(layers)]
        outs.append(forward(quiet, *given[-1]).float())
        gaps[way] = ((outs[-1] - outs[0]).norm() / outs[0].norm()).item()
        if not gaps[way] < (2e-2 if gpu else 1e-5):
            raise RuntimeError(
                f"{way} differs from the first way by {gaps[way]:.2g} of its length: its speed says nothing"
            )
        if way != "joined":
            clock(f"x A {way}", lambda n: torch.bmm(x_P_N_I, a_L[n]) if way == "bmm" else low_of(x_P_N_I, a_L[n]))
        clock(f"layer {way}", lambda n: forward(quiet, *given[n]))

    clock("base", lambda n: functional.linear(x_P_N_I, weight_L_O_I[n]))
    for way in ["bmm", *(way for way in ways if way != "bmm")]:
        try:
            try_way(way)
        except Exception as error:  # the other ways still have their say
            print(f"{what}, {way}:", flush=True)
            traceback.print_exc()
            failed[way] = repr(error)[:300]
    JOINED.clear()
    row = {"section": "few", "what": what, "microseconds": took, "bmm_to": ratios(took), "difference": gaps}
    return {**row, **({"failed": failed} if failed else {})}


def ratios(took: dict[str, float]) -> dict[str, float]:
    """How many times faster than `bmm`."""
    first = {part: took.get(f"{part} bmm") for part in ("x A", "layer")}
    by_part = {label: first.get(label.rpartition(" ")[0]) for label in took if not label.endswith("bmm")}
    return {label: before / took[label] for label, before in by_part.items() if before}


def bench_layer(config: LlamaConfig, policies: int, rows: int, ways: list[str]) -> list[Row]:
    """`bench_products` of every shape in a layer, and what they sum to in a step."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    shapes = [(hidden, width), (hidden, narrow), (hidden, narrow), (width, hidden), (hidden, inner), (hidden, inner)]
    counts = Counter([*shapes, (inner, hidden)])
    found = [bench_products(config, *shape, policies, rows, ways) for shape in counts]
    clocks = [row["microseconds"] for row in found]
    total = {
        label: config.num_hidden_layers * sum(n * took[label] for n, took in zip(counts.values(), clocks, strict=True))
        for label in clocks[0]
        if all(label in took for took in clocks)
    }
    what = f"all products of a step, {policies} policies x {rows // policies} rows"
    return [*found, {"section": "few", "what": what, "microseconds": total, "bmm_to": ratios(total)}]


def bench_few(
    toy: bool, ceiling: tuple[float, float], ways: list[str], profiled: Callable[..., list[Row]]
) -> list[Row]:
    """Steps and products of every number of policies and rows, those that decide first."""
    began, found = time.perf_counter(), list[Row]()
    backbone = backbone_of("toy" if toy else "1.5b")
    stacks = {policies: random_stack(backbone, policies) for policies in POLICIES}
    sizes = SIZES[toy][0]
    deciding = (2, sizes[0])
    others = [(p, n) for n in sizes for p in POLICIES if (p, n) != deciding]
    base_of: dict[int, float] = {}

    def part(what: str, work: Callable[[], list[Row]]) -> None:
        """Its rows, printed at once: a call that is cut off has shown what it had."""
        if time.perf_counter() - began > SECONDS:
            print(f"{what}: left out, {SECONDS:.0f} s are over", flush=True)
            return
        try:
            rows = work()
        except Exception as error:
            traceback.print_exc()
            rows = [{"section": "few", "what": what, "error": repr(error)[:300]}]
        for row in rows:
            print(f"{time.perf_counter() - began:3.0f} s  {told(row)}", flush=True)
        found.extend(rows)

    def step(way: str, policies: int, rows: int) -> list[Row]:
        def profile(work: Callable[[], Any]) -> list[Row]:
            print(f"one step, {way}:", flush=True)
            return profiled(work, top=15)

        stack = None if way == "base" else stacks[policies]
        profile_of: Profile = profile if (policies, rows) == deciding else lambda work: []
        row = bench_step(backbone, stack, way, rows, toy, ceiling, profile_of)
        took = row["milliseconds_per_step"]
        if way == "base":
            base_of[rows] = took
        elif rows in base_of:
            row["adapters_milliseconds"] = took - base_of[rows]
        if (policies, rows) == deciding:
            row["decode_few"] = took
        return [row]

    for policies, rows in (deciding, (2, 2 * sizes[0]), *others):
        for way in ([] if rows in base_of else ["base"]) + ways:
            part(f"step, {rows} rows, {policies} policies, {way}", partial(step, way, policies, rows))
        what = f"products of {policies} policies x {rows // policies} rows"
        part(what, partial(bench_layer, backbone.model.config, policies, rows, ways))
    return found


def told(row: Row) -> str:
    if "microseconds" not in row:
        return f"{row['what']:38s} {row.get('error', '')}" + "  ".join(
            f"{k} {v:,.4g}" for k, v in row.items() if isinstance(v, float)
        )
    ratio = {label: f" ({times:.2f})" for label, times in row["bmm_to"].items()}
    took = "  ".join(f"{label} {us:,.1f}{ratio.get(label, '')}" for label, us in row["microseconds"].items())
    return f"{row['what']}, us (times faster): {took}"
