"""A base model in 8 or 4 bits: what is stored, that gradients are exact, that rows stay apart; and models that do not fit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import random_stack, some_prompts, tiny_backbone, tiny_model, tiny_tokenizer
from loop_helpers import events, run_tiny, tiny_config
from torch import nn

from soar.config import ConfigError, ModelConfig, OptimizerConfig, SamplingConfig
from soar.engine import memory
from soar.engine.memory import BYTES, GIB, TooLarge, check_fits, memory_of
from soar.engine.policy import Backbone, load_backbone
from soar.engine.quantize import NF4, QuantizedLinear, quantize
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update


def linear(outputs: int = 48, inputs: int = 80, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 80), (3, 7), (1, 64)])
def test_weights_are_near(bits: int, outputs: int, inputs: int) -> None:
    base = linear(outputs, inputs)
    found = QuantizedLinear(base, bits).full_weight(torch.float32)
    assert found.shape == base.weight.shape
    error = (found - base.weight).abs()
    if bits == 8:
        assert (error <= base.weight.abs().amax(1, keepdim=True) / 254 + 1e-6).all()
        return
    # The widest gap of the levels is the one at -1; groups run over the flattened weight.
    flat = torch.nn.functional.pad(base.weight.reshape(-1), (0, -base.weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1).repeat_interleave(64)[: base.weight.numel()].view(outputs, inputs)
    widest = max(b - a for a, b in pairwise(NF4))
    assert (error <= largest * widest / 2 + 1e-6).all()


def test_levels_and_zero_survive() -> None:
    layer = nn.Linear(16, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(NF4).repeat(4, 1) * 0.25)
    torch.testing.assert_close(QuantizedLinear(layer, 4).full_weight(torch.float32), layer.weight.detach())
    with torch.no_grad():
        layer.weight.zero_()
    for bits in (4, 8):
        assert QuantizedLinear(layer, bits).full_weight(torch.float32).abs().max() == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_output_and_gradient_are_those_of_the_full_weight(bits: int) -> None:
    layer = QuantizedLinear(linear(), bits)
    x = torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.nn.functional.linear(x, layer.full_weight(torch.float32), layer.bias)
    (wanted,) = torch.autograd.grad((y**2).sum(), x)
    (found,) = torch.autograd.grad((layer(x) ** 2).sum(), x)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("bits", "name"), [(8, "8bit"), (4, "4bit")])
def test_bytes_are_as_forecast(bits: int, name: str) -> None:
    layer = QuantizedLinear(linear(256, 512, bias=False), bits)
    stored = layer.packed.numel() * layer.packed.element_size()
    scales = layer.scale.numel() * layer.scale.element_size()
    assert stored + scales == pytest.approx(256 * 512 * BYTES[name], rel=0.01)


def quantized(bits: int) -> Backbone:
    model = tiny_model("qwen2")
    quantize(model, bits, torch.device("cpu"))
    return Backbone(model, tiny_tokenizer(), ModelConfig(lora_rank=4, lora_alpha=6.0, device="cpu"))


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_train_on_a_quantized_base(bits: int) -> None:
    backbone = quantized(bits)
    plain = tiny_backbone("qwen2")
    assert set(backbone.layers) == set(plain.layers)
    assert all(isinstance(layer.base, QuantizedLinear) for layer in backbone.layers.values())
    assert not isinstance(backbone.model.get_output_embeddings(), QuantizedLinear)
    assert backbone.base_digest() != plain.base_digest()
    stack = random_stack(backbone, 2)
    sampler, sampling = NativeSampler(backbone), SamplingConfig(max_tokens=6)
    prompts = [some_prompts(3, seed=p) for p in range(2)]
    rollouts = sampler.sample(stack, prompts, 2, [[1, 2, 3]] * 2, sampling)
    alone = sampler.sample(stack.select([1]), prompts[1:], 2, [[1, 2, 3]], sampling)
    for row in range(6):
        n = int(alone.length_B[row])
        assert torch.equal(rollouts.tokens_B_T[6 + row, :n], alone.tokens_B_T[row, :n])
    before = stack.digest()
    packed = next(iter(backbone.layers.values())).base.packed.clone()
    optimizer = StackOptimizer(stack, OptimizerConfig(kl=0.1))
    stats = update(backbone, stack, optimizer, rollouts, torch.tensor([1.0, -1.0] * 6), 1e-3, 1.0, 6)
    assert stats.gap_P.max() < 1e-4 and not stats.failed_P.any() and (stats.gradient_norm_P > 0).all()
    assert stack.digest() != before
    assert torch.equal(next(iter(backbone.layers.values())).base.packed, packed)


def test_a_run_on_a_quantized_base(tmp_path: Path) -> None:
    changes = ("model.adapter=lora", "model.quantization=8bit", "teacher.steps=1", 'arms.run=["base","ps"]')
    run_tiny(tmp_path / "run", *changes)
    (step,) = events(tmp_path / "run", "outer_step")
    assert step["student_last"]["logprob_gap"] < 1e-3
    backbone = load_backbone(tiny_config(*changes).model)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["hashes"]["model"] == backbone.base_digest()


def test_impossible_combinations_are_refused() -> None:
    for change in ("model.adapter=full", "model.sampler=vllm"):
        with pytest.raises(ConfigError, match="quantization = '4bit' is for"):
            tiny_config("model.adapter=lora", "model.quantization=4bit", change)


def test_memory_of_a_quantized_base_by_hand() -> None:
    shape = memory.LLAMA["70B"]
    layers = 80 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert shape.linear_parameters == layers
    found = memory_of(tiny_config("model.adapter=lora", "model.quantization=4bit"), shape, 100, "bfloat16")
    assert found.weights == (shape.parameters - layers) * 2 + layers * 0.5625
    assert "4bit in the layers, bfloat16 elsewhere" in "\n".join(found.lines())


def config_of_70b(folder: Path) -> str:
    shape = memory.LLAMA["70B"]
    config = {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_model_that_does_not_fit_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from soar.run.setup import open_env

    path = config_of_70b(tmp_path / "big")
    config = tiny_config(f"model.path={path}", "model.adapter=lora", "model.dtype=bfloat16")
    monkeypatch.setattr("soar.run.setup.machine_bytes", lambda: 80 * GIB)
    with pytest.raises(TooLarge) as refused, open_env(config):
        pass
    said = str(refused.value)
    assert "70,553,706,496 parameters x 2 bytes" in said and "80.0 GiB free" in said
    assert 'model.quantization = "8bit" needs' in said and 'model.quantization = "4bit" needs' in said
    four = tiny_config(f"model.path={path}", "model.adapter=lora", "model.dtype=bfloat16", "model.quantization=4bit")
    check_fits(four, 110 * GIB, "cpu")
    small = four.model.model_copy(update={"micro_batch_tokens": 256})
    check_fits(four.model_copy(update={"model": small}), 70 * GIB, "cpu")
    with pytest.raises(TooLarge, match="micro_batch_tokens\nOne process"):
        check_fits(four, 30 * GIB, "cpu")
    check_fits(config, None, "cpu")
    check_fits(tiny_config("model.path=nobody/model-70B", "model.adapter=lora"), GIB, "cpu")  # a name is no proof
