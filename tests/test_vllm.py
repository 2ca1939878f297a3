"""The sampler for vLLM against an engine that answers its calls with the native one; vLLM itself is in test_vllm_real.py."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import PAD, random_stack, some_prompts, tiny_backbone
from loop_helpers import events, run_tiny, tiny_config

from soar.config import ConfigError, SamplingConfig
from soar.engine.policy import load_adapter
from soar.engine.rollouts import Request
from soar.engine.sampler import NativeSampler
from soar.engine.vllm import Completion, VllmSampler, open_vllm, rollouts_of

GREEDY = SamplingConfig(max_tokens=12).model_copy(update={"temperature": 0.0})
Row = tuple[Sequence[int], str, int]  # prompt, folder of the adapter, seed


class Native(VllmSampler):
    """Answers with the native sampler and the adapters that lie in the files."""

    def _open(self, memory: float) -> None:
        self.asked: list[Row] = []

    def generate(self, rows: list[Row], sampling: SamplingConfig) -> list[Completion]:
        self.asked += rows
        found: dict[int, Completion] = {}
        for folder in dict.fromkeys(folder for _, folder, _ in rows):
            mine = [i for i, row in enumerate(rows) if row[1] == folder]
            stack = load_adapter(self.backbone, Path(folder)) if folder else None
            request = Request([[list(rows[i][0]) for i in mine]], 1, [[rows[i][2] for i in mine]], sampling)
            rollouts = NativeSampler(self.backbone).sample(stack, request)
            for row, i in enumerate(mine):
                length = int(rollouts.length_B[row])
                tokens, logprobs = rollouts.tokens_B_T[row, :length], rollouts.logprob_B_T[row, :length]
                found[i] = (tokens.tolist(), logprobs.tolist(), bool(rollouts.ended_B[row]))
        return [found[i] for i in range(len(rows))]


@pytest.mark.parametrize("stop", [(), ("5 ", "a")])
def test_greedy_rows_are_those_of_the_native_engine(stop):
    backbone = tiny_backbone()
    sampler = Native(backbone, 4, 128, 0.5)
    stack = random_stack(backbone, 3)
    prompts = [some_prompts(2, seed=p) for p in range(3)]
    seeds = [[10 * p + q for q in range(2)] for p in range(3)]
    request = Request(prompts, 2, seeds, GREEDY.model_copy(update={"stop": stop}))
    wanted, found = NativeSampler(backbone).sample(stack, request), sampler.sample(stack, request)
    assert found.prompts == wanted.prompts
    assert torch.equal(found.length_B, wanted.length_B) and torch.equal(found.ended_B, wanted.ended_B)
    inside = torch.arange(found.tokens_B_T.shape[1])[None] < found.length_B[:, None]
    assert torch.equal(found.tokens_B_T[inside], wanted.tokens_B_T[inside])
    torch.testing.assert_close(found.logprob_B_T, wanted.logprob_B_T, rtol=1e-4, atol=1e-5)
    assert len({folder for _, folder, _ in sampler.asked}) == 3


def test_a_changed_adapter_is_loaded_anew_and_the_oldest_makes_room():
    backbone = tiny_backbone()
    sampler = Native(backbone, 2, 128, 0.5)
    stack, prompts = random_stack(backbone, 2), [some_prompts(3), some_prompts(3)]
    ask = Request(prompts, 1, [[1, 2, 3]] * 2, GREEDY)
    first = sampler.sample(stack, ask)
    again = sampler.sample(stack, ask)
    folders = list(sampler.written.values())
    assert [Path(folder).name for folder in folders] == ["1", "2"] and torch.equal(first.tokens_B_T, again.tokens_B_T)
    with torch.no_grad():
        for tensor in stack.tensors.values():
            tensor[1] += 0.5  # in place, as an optimizer step
    changed = sampler.sample(stack, ask)
    assert [Path(folder).name for folder in sampler.written.values()] == ["1", "3"] and not Path(folders[1]).exists()
    assert changed.select([0, 1, 2]).tokens_B_T[:, :4].equal(first.select([0, 1, 2]).tokens_B_T[:, :4])
    assert not torch.equal(changed.logprob_B_T[3:], first.logprob_B_T[3:])


def test_configs_that_vllm_cannot_serve_are_refused(monkeypatch):
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
    rows = [((5, 6), (-0.5, float("nan")), False), ((7,), (-0.25,), False)]
    found = rollouts_of(((1,), (1, 2)), rows, PAD)
    assert found.failed_B.tolist() == [True, False] and found.ended_B.tolist() == [True, False]
    assert found.tokens_B_T.tolist() == [[5, 6], [7, PAD]] and found.logprob_B_T.tolist() == [[-0.5, 0.0], [-0.25, 0.0]]


def test_a_whole_run_goes_through_it(tmp_path, monkeypatch):
    made: list[Native] = []
    monkeypatch.setattr("soar.engine.vllm.VllmSampler", lambda *given: made.append(Native(*given)) or made[0])
    model = ("model.adapter=lora", "model.sampler=vllm")
    run_tiny(tmp_path / "run", *model, "teacher.steps=1", "problems.limit=8", 'arms.run=["base","ps"]')
    (sampler,) = made
    assert len({folder for _, folder, _ in sampler.asked}) >= 5
    (step,) = events(tmp_path / "run", "outer_step")
    assert step["student_last"]["logprob_gap"] < 1e-3
    assert sampler.asked[0][1] == ""  # screening asks the base model
