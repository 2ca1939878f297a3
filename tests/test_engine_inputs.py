"""Models and settings that a run must refuse, or take in its stride, before it starts."""

from __future__ import annotations

import pytest
import torch
from helpers import PAD, some_prompts, tiny_model, tiny_tokenizer
from loop_helpers import tiny_config

from soar import record
from soar.config import ConfigError
from soar.policy import Backbone
from soar.sampler import NativeSampler
from soar.settings import ModelConfig, SamplingConfig


@pytest.mark.parametrize("change", ["student.attempts=1", "teacher.datasets=1"])
def test_groups_of_one_have_no_leave_one_out_baseline(change: str) -> None:
    with pytest.raises(ConfigError, match="Input should be greater than or equal to 2"):
        tiny_config(change)


def test_code_of_a_model_is_run_only_when_asked_for_and_the_run_records_it() -> None:
    assert ModelConfig().trust_remote_code is False
    assert tiny_config("model.trust_remote_code=true").resolved()["model"]["trust_remote_code"] is True
    assert "model.trust_remote_code" not in record.HARMLESS


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
