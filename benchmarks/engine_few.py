"""Section `few` of benchmarks/engine.py: a decoding step with few policies and few rows, as a run on MATH makes them.

A step is timed at 500 filled places of a cache for 150 + 1,024 tokens, with adapters and (`base`) without. What decides comes
first: 2 policies with 256 rows in all (of 512 rows of a run some 260 are alive). A part that fails is a row with its error;
none begins after `SECONDS`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from engine_models import backbone_of, prompts_of, random_stack, step_bytes_and_flops, timed, wait

from soar.config import SamplingConfig
from soar.engine.graphs import Program, SlotBatch, StaticDecoder
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request
from soar.types import no_tick

Row = dict[str, Any]
Profile = Callable[[Callable[[], Any]], list[Row]]

SECONDS = 60.0
RANK = 16
POLICIES = (0, 2, 1, 4)  # 0: the base model
SIZES = {False: ((256, 512, 64, 1024), 150, 500, 32, 1024), True: ((16, 8), 12, 20, 4, 32)}
"""By toy: rows (what decides first), tokens of a prompt, filled places, steps timed, tokens that the cache has room for."""


def begun(backbone: Backbone, decoder: StaticDecoder, stack: AdapterStack | None, rows: int, toy: bool) -> SlotBatch:
    """Rows in their slots, prompts read."""
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
    rows: int,
    toy: bool,
    ceiling: tuple[float, float],
    profiled: Profile,
) -> Row:
    """One decoding step, timed over some of them; `stack` None: the base model.

    capture_seconds: of the first step, captured; Triton's kernels are compiled in the very first.
    """
    _, length, filled, new, _ = SIZES[toy]
    decoder, policies = StaticDecoder(backbone), 0 if stack is None else stack.policies
    try:
        program = begun(backbone, decoder, stack, rows, toy).program
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
        "what": f"step, {rows} rows, {f'{policies} policies' if policies else 'base'}",
        "milliseconds_per_step": 1000 * seconds / new,
        "tokens_per_second": rows * new / seconds,
        "roofline_share": new * max(size / ceiling[0], flops / ceiling[1]) / seconds,
        "capture_seconds": capture,
        **({"kernels": kernels} if kernels else {}),
    }


def bench_few(toy: bool, ceiling: tuple[float, float], profiled: Callable[..., list[Row]]) -> list[Row]:
    """Steps of every number of policies and rows, those that decide first."""
    began, found = time.perf_counter(), list[Row]()
    backbone = backbone_of("toy" if toy else "1.5b")
    stacks: dict[int, AdapterStack | None] = {n: random_stack(backbone, n) if n else None for n in POLICIES}
    sizes, base_of = SIZES[toy][0], dict[int, float]()

    def profile(work: Callable[[], Any]) -> list[Row]:
        return profiled(work, top=15)

    for rows in sizes:
        for policies in POLICIES:
            if time.perf_counter() - began > SECONDS:
                print(f"step, {rows} rows, {policies} policies: left out, {SECONDS:.0f} s are over", flush=True)
                continue
            deciding = rows == sizes[0] and policies in (0, 2)
            try:
                row = bench_step(
                    backbone, stacks[policies], rows, toy, ceiling, profile if deciding else lambda work: []
                )
            except Exception as error:
                traceback.print_exc()
                row = {"section": "few", "what": f"step, {rows} rows, {policies} policies", "error": repr(error)[:300]}
            took = row.get("milliseconds_per_step")
            if took and not policies:
                base_of[rows] = took
            elif took and rows in base_of:
                row["adapters_milliseconds"] = took - base_of[rows]
            if took and deciding:
                row["decode_few"] = took
            figures = "  ".join(f"{k} {v:,.4g}" for k, v in row.items() if isinstance(v, float))
            print(f"{time.perf_counter() - began:3.0f} s  {row['what']:38s} {row.get('error', figures)}", flush=True)
            found.append(row)
    return found
