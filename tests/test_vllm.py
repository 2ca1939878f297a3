"""The sampler for vLLM against an engine that answers its calls with the native one; vLLM itself is in test_vllm_real.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import PAD, random_stack, some_prompts, tiny_backbone
from loop_helpers import events, run_tiny, tiny_config
from torch import Tensor

from soar.config import ConfigError, SamplingConfig
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.sampler import NativeSampler
from soar.engine.vllm import Completion, VllmSampler, open_vllm, rollouts_of

GREEDY = SamplingConfig(max_tokens=12)
Row = tuple[list[int], int, int]  # prompt, adapter, seed


class NativeEngine:
    """A `VllmEngine` on the native sampler. log: what it was asked."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.adapters: dict[int, AdapterStack] = {}
        self.log: list[tuple[str, int]] = []
        self.rows: list[Row] = []

    def load(self, adapter: int, tensors: dict[str, Tensor], rank: int, alpha: float) -> None:
        assert adapter not in self.adapters
        own = {}
        for name, tensor in tensors.items():
            layer, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
            own[f"{layer}.{part}"] = tensor.T[None].clone()
        self.adapters[adapter] = AdapterStack("lora", own, alpha / rank)
        self.log.append(("load", adapter))

    def drop(self, adapter: int) -> None:
        del self.adapters[adapter]
        self.log.append(("drop", adapter))

    def generate(
        self, rows: list[Row], sampling: SamplingConfig, greedy: bool, end_ids: tuple[int, ...]
    ) -> list[Completion]:
        assert set(end_ids) == self.backbone.end_ids
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


def pair(slots: int = 4) -> tuple[Backbone, NativeEngine, VllmSampler]:
    backbone = tiny_backbone()
    engine = NativeEngine(backbone)
    return backbone, engine, VllmSampler(backbone, engine, slots)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [(), ("5 ", "a")])
def test_greedy_rows_are_those_of_the_native_engine(stop: tuple[str, ...]) -> None:
    backbone, engine, sampler = pair()
    stack = random_stack(backbone, 3)
    prompts = [some_prompts(2, seed=p) for p in range(3)]
    seeds = [[10 * p + q for q in range(2)] for p in range(3)]
    sampling = GREEDY.model_copy(update={"stop": stop})
    wanted = NativeSampler(backbone).sample(stack, prompts, 2, seeds, sampling, greedy=True)
    found = sampler.sample(stack, prompts, 2, seeds, sampling, greedy=True)
    assert found.prompts == wanted.prompts
    assert torch.equal(found.length_B, wanted.length_B) and torch.equal(found.ended_B, wanted.ended_B)
    inside = torch.arange(found.tokens_B_T.shape[1])[None] < found.length_B[:, None]
    assert torch.equal(found.tokens_B_T[inside], wanted.tokens_B_T[inside])
    torch.testing.assert_close(found.logprob_B_T, wanted.logprob_B_T, rtol=1e-4, atol=1e-5)
    assert len({adapter for _, adapter, _ in engine.rows}) == 3


def test_a_changed_adapter_is_loaded_anew_and_the_oldest_makes_room() -> None:
    backbone, engine, sampler = pair(slots=2)
    stack, prompts = random_stack(backbone, 2), [some_prompts(3), some_prompts(3)]
    ask = (prompts, 1, [[1, 2, 3]] * 2, GREEDY, True)
    first = sampler.sample(stack, *ask)
    again = sampler.sample(stack, *ask)
    assert engine.log == [("load", 1), ("load", 2)] and torch.equal(first.tokens_B_T, again.tokens_B_T)
    with torch.no_grad():
        for tensor in stack.tensors.values():
            tensor[1] += 0.5  # in place, as an optimizer step
    changed = sampler.sample(stack, *ask)
    assert engine.log[2:] == [("drop", 2), ("load", 3)] and sorted(engine.adapters) == [1, 3]
    assert changed.select([0, 1, 2]).tokens_B_T[:, :4].equal(first.select([0, 1, 2]).tokens_B_T[:, :4])
    assert not torch.equal(changed.logprob_B_T[3:], first.logprob_B_T[3:])


def test_a_row_without_numbers_has_failed() -> None:
    rows = [Completion((5, 6), (-0.5, float("nan")), False), Completion((7,), (-0.25,), False)]
    found = rollouts_of(((1,), (1, 2)), rows, PAD)
    assert found.failed_B.tolist() == [True, False] and found.ended_B.tolist() == [True, False]
    assert found.tokens_B_T.tolist() == [[5, 6], [7, PAD]] and found.logprob_B_T.tolist() == [[-0.5, 0.0], [-0.25, 0.0]]


def test_configs_that_vllm_cannot_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    for change, said in (
        ("model.adapter=full", "serves LoRA adapters; .*or set model.sampler"),
        ('model.gguf_file="x.gguf"', "reads no model.gguf_file"),
        ("model.lora_rank=4096", "model.lora_rank of at most 512"),
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
