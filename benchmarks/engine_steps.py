"""One decoding step alone, way by way; section `steps` of engine.py, also `python benchmarks/engine_steps.py NAME`.

A step is the captured graph that the sampler replays, at the middle of the benchmark's length. Ways: rows in one or two
lanes, kernels that start early or not (lean.py); then, product by product, other tiles, each kept only where the whole
step is faster with it: in the step a product finds nothing in the cache, which no timing of it alone shows. Every way
must draw the tokens of the first one, but for rounding; the share of rows that are equal is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engine_models import backbone_of, prompts_of, random_stack

from soar.config import SamplingConfig
from soar.engine import products
from soar.engine.graphs import Shape
from soar.engine.policy import AdapterStack
from soar.engine.products import Tile
from soar.engine.sampler import NativeSampler

Row = dict[str, Any]
SIZES = {"toy": (32, 12, 8, 4), "135m": (2048, 100, 160, 16), "3b": (1024, 100, 520, 16)}
PLAIN = (Tile(64, 64, 4, 4), Tile(64, 64, 4, 3), Tile(128, 64, 4, 4), Tile(128, 64, 8, 4), Tile(64, 64, 4, 3, 128))
PAIRS = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 4), Tile(64, 64, 8, 4), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3))

BEST: dict[str, dict[str, Any]] = {}
"""Model -> the best way of its step, as section `steps` found it."""


def bench_steps(name: str, toy: bool) -> list[Row]:
    """Sections steps-135m and steps-3b: in a process of its own, because a way that fails takes its process with it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        words = [sys.executable, __file__, "toy" if toy else name]
        try:
            subprocess.run([*words, "--out", str(out)], timeout=130)
        except subprocess.TimeoutExpired:
            print(f"steps-{name}: stopped after 130 s", flush=True)
        answer = json.loads(out.read_text(encoding="utf-8"))
    BEST[name] = answer["best"]
    print(f"steps-{name}: best {answer['best']}", flush=True)
    return [*answer["rows"], {"section": f"steps-{name}", "what": "best", "way": answer["best"]}]


def tuned(name: str, sampler: NativeSampler) -> NativeSampler:
    """The sampler with the best way of its step, where section `steps` has run."""
    best, lean = BEST.get(name), sampler.decoder.lean
    products.TRIED.clear()
    if best is not None and lean is not None:
        lean.lanes, lean.early = best["lanes"], best["early"]
        for key, tile in best["tiles"].items():
            outputs, inputs = map(int, key.split("x"))
            products.TRIED[outputs, inputs] = products.Tile(*tile)
    return sampler


class Steps:
    """The step of one shape, timed in the ways that are asked for."""

    def __init__(self, name: str, policies: int | None = None) -> None:
        self.name = name
        self.rows, self.length, self.new, every = SIZES[name]
        self.policies = every if policies is None else policies
        if name == "3b" and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 90e9:
            self.rows //= 2  # the cache of all of them takes 75 GB
        self.backbone = backbone_of(name)
        self.stack: AdapterStack | None = random_stack(self.backbone, self.policies) if self.policies else None
        self.sampler = NativeSampler(self.backbone, static=True, fused=True)
        self.lean = self.sampler.decoder.lean
        assert self.lean is not None
        self.found: list[Row] = []

    def draw(self) -> torch.Tensor:
        """Tokens of a short greedy call."""
        count = max(1, self.policies)
        prompts = prompts_of(self.backbone, count, 2, 12)
        seeds = [[2 * p, 2 * p + 1] for p in range(count)]
        attempts = self.rows // (2 * count)
        return self.sampler.sample(self.stack, prompts, attempts, seeds, SamplingConfig(max_tokens=8), True).tokens_B_T

    def milliseconds(self, runs: int = 30) -> float:
        """Time of one step; the least of three rounds."""
        decoder = self.sampler.decoder
        decoder.programs.clear()
        places = -(-(self.length + self.new) // 64) * 64
        shape = Shape(self.policies, self.rows, places, self.new, False, 1.0, 1.0)
        assert decoder.storage is not None
        decoder.storage.reserve(self.rows * places)
        program = decoder.program(shape, decoder._hold(self.stack))
        program.ended_R.zero_()
        best = float("inf")
        for _ in range(4):
            program.filled_1.fill_(self.length + self.new // 2)
            program.place_1.fill_(self.length + self.new // 2 - 1)
            program.step_1.zero_()
            program.position_R_1.fill_(self.length)
            program.step()  # the first one captures
            program.step_1.zero_()
            _wait()
            began = time.perf_counter()
            for _ in range(min(runs, self.new - 2)):
                program.step()
            _wait()
            best = min(best, 1000 * (time.perf_counter() - began) / min(runs, self.new - 2))
        if self.backbone.device.type == "cuda" and not program.graph:
            raise RuntimeError("this way cannot be captured")
        return best

    def way(self, what: str, wanted: torch.Tensor | None = None) -> float:
        ms = self.milliseconds()
        row: Row = {"section": f"steps-{self.name}", "what": f"step, {what}", "milliseconds": ms}
        if wanted is not None:
            row["rows_equal"] = (self.draw() == wanted).all(1).float().mean().item()
        self.found.append(row)
        equal = f"  rows equal {row['rows_equal']:.3f}" if wanted is not None else ""
        print(f"{self.name:5s} {what:66s} {ms:8.3f} ms{equal}", flush=True)
        return ms

    def lanes(self) -> dict[str, Any]:
        """The best of the ways of lean.py, which stays set."""
        assert self.lean is not None
        wanted = self.draw()
        best, chosen = float("inf"), {"lanes": 1, "early": False}
        for lanes in (1, 2):
            for early in (False, True):
                self.lean.lanes, self.lean.early = lanes, early
                try:
                    ms = self.way(f"{self.policies} adapters, {lanes} lanes, early {early}", wanted)
                except RuntimeError as error:
                    print(f"{self.name} {lanes} lanes, early {early}: {error}", flush=True)
                    continue
                right = self.found[-1]["rows_equal"] >= 0.5  # bfloat16 ties fall either way
                if right and ms < 0.99 * best:
                    best, chosen = ms, {"lanes": lanes, "early": early}
        self.lean.lanes, self.lean.early = chosen["lanes"], chosen["early"]
        return chosen

    def tiles(self) -> dict[str, list[int]]:
        """Other tiles, product by product; the better ones stay set."""
        assert self.lean is not None
        layer, width = self.lean.layers[0], self.rows // max(1, self.policies)
        best = self.way("tiles as they are")
        kept: dict[str, list[int]] = {}
        for label, part, tiles in (
            ("qkv", layer.qkv, PLAIN), ("gate_up", layer.gate_up, PAIRS), ("down", layer.down, PLAIN),
            ("out", layer.out, PLAIN[:4]),
        ):  # fmt: skip
            key = tuple(part.weight_N_K.shape)
            sizes = part.sizes if part is not layer.gate_up else [part.sizes[0]]
            paired = part is layer.gate_up
            first = (
                products.fitting(products.GATED_TILES, width, sizes)[0]
                if paired
                else products.tile_of(*key, width, sizes)
            )
            chosen = None
            for tile in products.fitting(tiles, width, sizes)[:-1]:
                if tile == first:
                    continue
                products.TRIED[key] = tile  # type: ignore[index]
                try:
                    ms = self.way(f"{label} {asdict(tile)}")
                except Exception as error:  # too much shared memory, say
                    print(f"{label} {tile}: {type(error).__name__} {str(error)[:90]}", flush=True)
                    continue
                if ms < 0.995 * best:
                    best, chosen = ms, tile
            products.TRIED.pop(key, None)  # type: ignore[call-overload]
            if chosen is not None:
                products.TRIED[key] = chosen  # type: ignore[index]
                kept["x".join(map(str, key))] = [chosen.rows, chosen.columns, chosen.warps, chosen.stages, chosen.inner]
        return kept

    def profile(self, rows: int = 18) -> None:
        """Where the device's time goes in one step."""
        if self.backbone.device.type != "cuda":
            return
        from torch.profiler import ProfilerActivity, profile

        (program,) = self.sampler.decoder.programs.values()
        program.step_1.zero_()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(4):
                program.step()
            _wait()
        kernels = print_profile(profiler, 4, rows)
        places = int(program.filled_1)
        self.found.append({"section": f"steps-{self.name}", "what": f"profile at {places} places", "kernels": kernels})


def print_profile(profiler: Any, times: int, rows: int) -> list[Row]:
    """Kernels by time: microseconds and number per step, the first `rows` printed, all given back."""
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    print(f"  kernels {total / times:,.0f} us, {sum(e.count for e in events) / times:,.0f} launches, each by itself:")
    events.sort(key=lambda e: -e.self_device_time_total)
    for e in events[:rows]:
        print(f"  {e.self_device_time_total / times:9,.0f} us  {e.count / times:6.0f} x  "
              f"{e.self_device_time_total / e.count:8.1f} us  {e.key[:86]}", flush=True)  # fmt: skip
    return [
        {"kernel": e.key[:86], "launches": e.count / times, "microseconds": e.self_device_time_total / times}
        for e in events
    ]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SIZES))
    parser.add_argument("--out", type=Path, required=True, help="JSON with the rows and the best way")
    arguments = parser.parse_args()
    steps = Steps(arguments.name)
    answer: dict[str, Any] = {"rows": steps.found, "best": {"lanes": 1, "early": False, "tiles": {}}}

    def save() -> None:
        arguments.out.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")

    steps.draw()
    steps.way(f"{steps.policies} adapters, {steps.rows} rows, as it is")
    steps.profile()
    answer["best"].update(steps.lanes())
    save()
    if arguments.name == "3b":
        before, products.LARGEST_WEIGHT = products.LARGEST_WEIGHT, 1 << 26
        steps.way("our products for all weights, best lanes")
        products.LARGEST_WEIGHT = before
    else:
        answer["best"]["tiles"] = steps.tiles()
    save()
    steps.way("the best of all")
    steps.profile()
    save()


if __name__ == "__main__":
    main()
