"""The sampler for vLLM against an engine that answers its calls with the native one; vLLM itself is in test_vllm_real.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import PAD, random_stack, some_prompts, tiny_backbone
from loop_helpers import events, run_tiny, tiny_config
from torch import Tensor

from soar.config import ConfigError, OptimizerConfig, SamplingConfig
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update
from soar.engine.vllm import Completion, VllmSampler, open_vllm, rollouts_of
from soar.report.alarms import LOGPROB_GAP

GREEDY = SamplingConfig(max_tokens=12)
Row = tuple[list[int], int, int]  # prompt, adapter, seed


class NativeEngine:
    """A `VllmEngine` on the native sampler. log: what it was asked. stale: adapters after the first are taken for it."""

    def __init__(self, backbone: Backbone, stale: bool = False) -> None:
        self.backbone, self.stale = backbone, stale
        self.adapters: dict[int, AdapterStack] = {}
        self.log: list[tuple[str, int]] = []
        self.rows: list[Row] = []

    def load(self, adapter: int, tensors: dict[str, Tensor], rank: int, alpha: float) -> None:
        assert adapter not in self.adapters
        own = {}
        for name, tensor in tensors.items():
            layer, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
            own[f"{layer}.{part}"] = tensor.T[None].clone()
        stack = AdapterStack("lora", own, alpha / rank)
        self.adapters[adapter] = next(iter(self.adapters.values()), stack) if self.stale else stack
        self.log.append(("load", adapter))

    def drop(self, adapter: int) -> None:
        if not self.stale:
            del self.adapters[adapter]
        self.log.append(("drop", adapter))

    def generate(
        self, rows: list[Row], sampling: SamplingConfig, greedy: bool, end_ids: tuple[int, ...]
    ) -> list[Completion]:
        assert set(end_ids) == self.backbone.end_ids and sampling.stop == ()
        self.rows += rows
        found: dict[int, Completion] = {}
        for adapter in dict.fromkeys(adapter for _, adapter, _ in rows):
            mine = [i for i, row in enumerate(rows) if row[1] == adapter]
            stack = self.adapters[adapter] if adapter else None
            prompts, seeds = [[rows[i][0] for i in mine]], [[rows[i][2] for i in mine]]
            rollouts = NativeSampler(self.backbone).sample(stack, prompts, 1, seeds, sampling, greedy)
            for row, i in enumerate(mine):
                length = int(rollouts.length_B[row])
                tokens, logprobs = rollouts.tokens_B_T[row, :length], rollouts.logprob_B_T[row, :length]
                found[i] = Completion(tokens.tolist(), logprobs.tolist(), bool(rollouts.ended_B[row]))
        return [found[i] for i in range(len(rows))]


def pair(slots: int = 4, stale: bool = False) -> tuple[Backbone, NativeEngine, VllmSampler]:
    backbone = tiny_backbone()
    engine = NativeEngine(backbone, stale)
    return backbone, engine, VllmSampler(backbone, engine, slots)  # type: ignore[arg-type]


def test_stop_strings_end_rows_as_in_the_native_engine() -> None:
    backbone, _, sampler = pair()
    stack, prompts = random_stack(backbone, 2), some_prompts(4, seed=3)
    native = NativeSampler(backbone)

    def ask(engine: NativeSampler | VllmSampler, stop: tuple[str, ...]) -> Rollouts:
        sampling = SamplingConfig(max_tokens=30, stop=stop)
        return engine.sample(stack, [prompts[:2], prompts[2:]], 1, [[1, 2], [3, 4]], sampling, True)

    words = max(ask(native, ()).texts(backbone), key=len).split(" ")
    stop = (f"{words[2]} {words[3]}",)
    found, expected = ask(sampler, stop), ask(native, stop)
    assert found.texts(backbone) == expected.texts(backbone)
    assert torch.equal(found.length_B, expected.length_B) and torch.equal(found.ended_B, expected.ended_B)
    assert any(text.endswith(stop) for text in found.texts(backbone))
    longest = int(found.length_B.max())
    torch.testing.assert_close(found.logprob_B_T[:, :longest], expected.logprob_B_T[:, :longest])


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_greedy_rows_are_those_of_the_native_engine(slots: int) -> None:
    backbone, engine, sampler = pair(slots)
    stack = random_stack(backbone, 3)
    prompts = [some_prompts(2, seed=p) for p in range(3)]
    seeds = [[10 * p + q for q in range(2)] for p in range(3)]
    wanted = NativeSampler(backbone).sample(stack, prompts, 2, seeds, GREEDY, greedy=True)
    found = sampler.sample(stack, prompts, 2, seeds, GREEDY, greedy=True)
    assert found.prompts == wanted.prompts
    assert torch.equal(found.length_B, wanted.length_B) and torch.equal(found.ended_B, wanted.ended_B)
    inside = torch.arange(found.tokens_B_T.shape[1])[None] < found.length_B[:, None]
    assert torch.equal(found.tokens_B_T[inside], wanted.tokens_B_T[inside])
    torch.testing.assert_close(found.logprob_B_T, wanted.logprob_B_T, rtol=1e-4, atol=1e-5)
    assert len({adapter for _, adapter, _ in engine.rows}) == 3


def test_prompts_go_in_as_they_are_and_rows_have_their_own_seeds() -> None:
    _, engine, sampler = pair()
    prompts = some_prompts(2)
    sampler.sample(None, [prompts], 3, [[7, 8]], SamplingConfig(max_tokens=4, temperature=0.5, top_p=0.9))
    assert [prompt for prompt, _, _ in engine.rows] == [ids for ids in prompts for _ in range(3)]
    assert len({seed for _, _, seed in engine.rows}) == 6
    assert all(0 <= seed < 2**63 and adapter == 0 for _, adapter, seed in engine.rows)
    alone = list(engine.rows)
    engine.rows.clear()
    sampler.sample(None, [prompts[1:]], 2, [[8]], SamplingConfig(max_tokens=4))
    assert [seed for _, _, seed in engine.rows] == [seed for _, _, seed in alone[3:5]]


def test_a_changed_adapter_is_loaded_anew_and_changes_the_output() -> None:
    backbone, engine, sampler = pair()
    stack, prompts = random_stack(backbone, 2), [some_prompts(3), some_prompts(3)]
    ask = (prompts, 1, [[1, 2, 3]] * 2, GREEDY, True)
    first = sampler.sample(stack, *ask)
    again = sampler.sample(stack, *ask)
    assert engine.log == [("load", 1), ("load", 2)] and torch.equal(first.tokens_B_T, again.tokens_B_T)
    with torch.no_grad():
        for tensor in stack.tensors.values():
            tensor[1] += 0.5  # in place, as an optimizer step
    changed = sampler.sample(stack, *ask)
    assert engine.log[2:] == [("load", 3)]
    assert changed.select([0, 1, 2]).tokens_B_T[:, :4].equal(first.select([0, 1, 2]).tokens_B_T[:, :4])
    assert not torch.equal(changed.logprob_B_T[3:], first.logprob_B_T[3:])


def test_old_versions_make_room() -> None:
    backbone, engine, sampler = pair(slots=2)
    prompts = [some_prompts(1)]
    for version in range(4):
        sampler.sample(random_stack(backbone, 1, seed=version), prompts, 1, [[1]], GREEDY, True)
    assert engine.log == [("load", 1), ("load", 2), ("drop", 1), ("load", 3), ("drop", 2), ("load", 4)]
    assert sorted(engine.adapters) == [3, 4]
    # A version that is still there counts as used: the other one goes.
    sampler.sample(random_stack(backbone, 1, seed=2), prompts, 1, [[1]], GREEDY, True)
    sampler.sample(random_stack(backbone, 1, seed=9), prompts, 1, [[1]], GREEDY, True)
    assert sorted(engine.adapters) == [3, 5]


@pytest.mark.parametrize("stale", [False, True])
def test_stale_weights_show_in_the_gap(stale: bool) -> None:
    """The trainer's log-probabilities against the sampler's, as every update logs them."""
    backbone, _, sampler = pair(stale=stale)
    prompts, sampling = [some_prompts(4)], SamplingConfig(max_tokens=8)
    sampler.sample(random_stack(backbone, 1, seed=1), prompts, 2, [[1, 2, 3, 4]], sampling)
    stack = random_stack(backbone, 1, seed=2)
    rollouts = sampler.sample(stack, prompts, 2, [[1, 2, 3, 4]], sampling)
    optimizer = StackOptimizer(stack, OptimizerConfig(kl=0.0))
    stats = update(backbone, stack, optimizer, rollouts, torch.tensor([1.0, -1.0] * 4), 1e-5, 1.0, 8)
    assert (stats.gap_P.item() > LOGPROB_GAP) is stale
    assert stale or stats.gap_P.item() < 1e-4


def test_a_row_without_numbers_has_failed() -> None:
    rows = [Completion((5, 6), (-0.5, float("nan")), False), Completion((7,), (-0.25,), False)]
    found = rollouts_of(((1,), (1, 2)), rows, PAD)
    assert found.failed_B.tolist() == [True, False] and found.ended_B.tolist() == [True, False]
    assert found.tokens_B_T.tolist() == [[5, 6], [7, PAD]] and found.logprob_B_T.tolist() == [[-0.5, 0.0], [-0.25, 0.0]]


def test_configs_that_vllm_cannot_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    for change, said in (
        ("model.adapter=full", "serves LoRA adapters"),
        ('model.gguf_file="x.gguf"', "no model.gguf_file"),
        ("model.lora_rank=4096", "at most 512"),
    ):
        changes = ("model.adapter=lora", change) if "adapter" not in change else (change,)
        with pytest.raises(ConfigError, match=said):
            open_vllm(backbone, tiny_config(*changes))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install .*vllm"):
        open_vllm(backbone, tiny_config("model.adapter=lora"))


def test_a_whole_run_goes_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[NativeEngine] = []

    class Small(NativeEngine):
        def __init__(self, backbone: Backbone, *rest: object) -> None:
            super().__init__(backbone)
            engines.append(self)

    monkeypatch.setattr("soar.engine.vllm.VllmEngine", Small)
    changes = (
        "model.adapter=lora",
        "model.sampler=vllm",
        "teacher.steps=1",
        "problems.limit=8",
        'arms.run=["base","ps"]',
    )
    run_tiny(tmp_path / "run", *changes)
    (engine,) = engines
    assert [kind for kind, _ in engine.log].count("load") >= 4
    (step,) = events(tmp_path / "run", "outer_step")
    assert step["student_last"]["logprob_gap"] < 1e-3
    assert engine.rows[0][1] == 0  # screening asks the base model
