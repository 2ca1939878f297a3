"""Stacked adapters are PEFT's adapters: same outputs, same gradients, in files that PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, WORDS, random_stack, same_stacks, tiny_backbone, tiny_model
from torch import Tensor

from soar.config import ConfigError
from soar.engine.policy import AdapterStack, Backbone, load_adapter
from soar.run.setup import save_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

POLICIES, ROWS, LENGTH = 2, 2, 8


def inputs(policies: int = POLICIES) -> Tensor:
    return torch.randint(1, len(WORDS), (policies * ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def weights(policies: int = POLICIES) -> Tensor:
    """Random weights of the logits in a loss, so that every logit matters."""
    return torch.randn(policies * ROWS, LENGTH, len(WORDS), generator=torch.Generator().manual_seed(6))


def stacked_logits(backbone: Backbone, stack: AdapterStack, ids: Tensor) -> Tensor:
    with backbone.use(stack):
        return backbone.model(input_ids=ids, use_cache=False).logits


def peft_model(name: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(tiny_model(name), folder, is_trainable=True)


def near(ours: Tensor, theirs: Tensor) -> None:
    size = theirs.abs().max().item()
    assert size > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5 * size)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mistral"])
def test_lora_outputs_and_gradients_equal_peft(name: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(name)
    stack = random_stack(backbone, POLICIES).trainable()
    logits = stacked_logits(backbone, stack, inputs())
    (logits * weights()).sum().backward()
    base_logits = tiny_model(name)(inputs()).logits
    for p in range(POLICIES):
        save_adapter(backbone, stack, tmp_path / str(p), policy=p)
        reference = peft_model(name, tmp_path / str(p))
        rows = slice(p * ROWS, (p + 1) * ROWS)
        theirs = reference(input_ids=inputs()[rows]).logits
        near(logits[rows].detach(), theirs.detach())
        assert (theirs - base_logits[rows]).abs().max() > 0.05
        (theirs * weights()[rows]).sum().backward()
        compared = 0
        for path, parameter in reference.named_parameters():
            if ".lora_" in path:
                layer, _, rest = path.removeprefix("base_model.model.").partition(".lora_")
                gradient = stack.tensors[f"{layer}.{rest[0]}"].grad
                assert gradient is not None
                near(gradient[p].T, parameter.grad)
                compared += 1
        assert compared == len(stack.tensors) == 28


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_full_deltas_are_exported_as_an_exact_lora(name: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(name, adapter="full")
    stack = random_stack(backbone, POLICIES)
    with torch.no_grad():
        logits = stacked_logits(backbone, stack, inputs())
    for p in range(POLICIES):
        save_adapter(backbone, stack, tmp_path / str(p), policy=p)
        reference = peft_model(name, tmp_path / str(p))
        rows = slice(p * ROWS, (p + 1) * ROWS)
        near(logits[rows], reference(input_ids=inputs()[rows]).logits.detach())
        merged = reference.merge_and_unload()
        near(logits[rows], merged(input_ids=inputs()[rows]).logits.detach())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_saved_adapter_comes_back_bit_for_bit(adapter: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("llama", adapter=adapter)
    stack = random_stack(backbone, 3)
    save_adapter(backbone, stack, tmp_path, policy=1)
    loaded = load_adapter(backbone, tmp_path)
    assert loaded.policies == 1
    assert same_stacks(loaded, stack.select([1]))
    assert loaded.digest() == stack.digest(1) != stack.digest(0)
    with torch.no_grad():
        ours = stacked_logits(backbone, stack.select([1]), inputs(1))
        assert torch.equal(stacked_logits(backbone, loaded, inputs(1)), ours)


def test_a_lora_can_be_read_as_a_full_delta(tmp_path: Path) -> None:
    writer, reader = tiny_backbone("llama"), tiny_backbone("llama", adapter="full")
    stack = random_stack(writer, 1)
    save_adapter(writer, stack, tmp_path)
    with torch.no_grad():
        ours = stacked_logits(reader, load_adapter(reader, tmp_path), inputs(1))
        near(ours, stacked_logits(writer, stack, inputs(1)))


def test_loading_an_adapter_that_does_not_fit_says_why(tmp_path: Path) -> None:
    writer = tiny_backbone("llama")
    save_adapter(writer, random_stack(writer, 1), tmp_path)
    with pytest.raises(ConfigError, match=r"rank 4, expected model\.lora_rank = 8"):
        load_adapter(tiny_backbone("llama", lora_rank=8), tmp_path)
    with pytest.raises(
        ConfigError, match=r"layer model\.layers\.0\.self_attn\.k_proj is \(16, 8\).* expected \(16, 4\)"
    ):
        load_adapter(tiny_backbone("llama", num_key_value_heads=1), tmp_path)
    narrow = tiny_backbone("llama", target_modules=("q_proj",))
    save_adapter(narrow, random_stack(narrow, 1), tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"no weights for layer model\.layers\.0\.self_attn\.k_proj"):
        load_adapter(writer, tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"down_proj\.lora_A\.weight and 23 more fit no layer"):
        load_adapter(narrow, tmp_path)
