"""Models and settings that a run must refuse, or take in its stride, before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import PAD, some_prompts, tiny_model, tiny_tokenizer
from loop_helpers import run_tiny, tiny_config

from soar.config import ConfigError, ModelConfig, SamplingConfig
from soar.engine.load import choose_dtype
from soar.engine.policy import Backbone
from soar.engine.sampler import NativeSampler
from soar.run import folder as record


@pytest.mark.parametrize("change", ["student.attempts=1", "teacher.datasets=1"])
def test_groups_of_one_have_no_leave_one_out_baseline(change: str) -> None:
    with pytest.raises(ConfigError, match="Input should be greater than or equal to 2"):
        tiny_config(change)


def test_code_of_a_model_is_run_only_when_asked_for_and_the_run_records_it() -> None:
    assert ModelConfig().trust_remote_code is False
    assert tiny_config("model.trust_remote_code=true").resolved()["model"]["trust_remote_code"] is True
    assert "model.trust_remote_code" not in record.HARMLESS


def test_a_gpu_without_bfloat16_computes_in_float32_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def supported(answer: bool) -> None:
        # Emulated bfloat16 counts as supported unless it is asked not to.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: answer or including_emulation
        )

    supported(True)
    assert choose_dtype("auto", gpu) is torch.bfloat16
    supported(False)
    with pytest.warns(UserWarning, match="does not compute in bfloat16: going on in float32"):
        assert choose_dtype("auto", gpu) is torch.float32
    assert choose_dtype("auto", cpu) is torch.float32
    assert choose_dtype("bfloat16", gpu) is choose_dtype("bfloat16", cpu) is torch.bfloat16
    assert choose_dtype("float32", gpu) is torch.float32


def test_a_run_goes_on_in_the_numbers_it_began_with(tmp_path: Path) -> None:
    """Begun on a GPU in bfloat16, resumed on a CPU: what differs is named, and not the model."""
    run_tiny(tmp_path / "run", "teacher.steps=1", 'arms.run=["base"]')
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["hashes"]["dtype"] == "float32"
    manifest["hashes"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    words = r"dtype changed since the run began \(bfloat16 then, float32 now\); restore the old one or start a new run"
    with pytest.raises(record.RunFolderError, match=words):
        run_tiny(tmp_path / "run", "teacher.steps=1", 'arms.run=["base"]', resume=True)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_padding_needs_no_token_of_its_own(pad: str | None) -> None:
    """A missing padding token, or one that is the end token, changes no sampled token."""
    found = []
    for token in ("<pad>", pad):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = token
        backbone = Backbone(tiny_model(), tokenizer, ModelConfig(lora_rank=4, device="cpu"))
        found.append((backbone.pad_id, NativeSampler(backbone).sample(
            None, [some_prompts(5)], 4, [list(range(5))], SamplingConfig(max_tokens=12)
        )))  # fmt: skip
    (first_pad, first), (second_pad, second) = found
    assert first_pad == PAD != second_pad
    assert torch.equal(first.length_B, second.length_B)
    for row, length in enumerate(first.length_B.tolist()):
        assert first.tokens_B_T[row, :length].tolist() == second.tokens_B_T[row, :length].tolist()
    assert len(set(first.length_B.tolist())) > 1
