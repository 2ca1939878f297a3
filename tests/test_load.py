"""How a base model is loaded: in 8 or 4 bits, with kernels of liger, refused where it does not fit its device."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_stack, some_prompts, tiny_model, tiny_tokenizer
from loop_helpers import tiny_config
from transformers.models.llama import modeling_llama

from soar.config import ConfigError, ModelConfig, OptimizerConfig, SamplingConfig
from soar.engine import load as memory
from soar.engine.load import GIB, TooLarge, check_fits, fuse, load_backbone, memory_of
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update


def test_fewer_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'model\.quantization = "4bit": bitsandbytes is not installed'):
        load_backbone(ModelConfig(quantization="4bit", device="cpu"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_train_on_a_base_in_fewer_bits(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("qwen2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone = load_backbone(ModelConfig(path=str(tmp_path), quantization=bits, device="cpu", lora_rank=4))  # type: ignore[arg-type]
    kinds = {type(layer.base).__name__ for layer in backbone.layers.values()}
    assert kinds == {{"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]}
    base, stack = backbone.base_digest(), random_stack(backbone, 2)
    sampling, prompts = SamplingConfig(max_tokens=6), [some_prompts(3, seed=p) for p in range(2)]
    rollouts = NativeSampler(backbone).sample(stack, prompts, 2, [[1, 2, 3]] * 2, sampling)
    before = stack.digest()
    optimizer = StackOptimizer(stack, OptimizerConfig(kl=0.1))
    stats = update(backbone, stack, optimizer, rollouts, torch.tensor([1.0, -1.0] * 6), 1e-3, 1.0, 6)
    assert stats.gap_P.max() < 0.1 and not stats.failed_P.any() and (stats.gradient_norm_P > 0).all()
    assert stack.digest() != before and backbone.base_digest() == base


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


class OnGPU:
    """A tiny Llama on the CPU that says it is on a GPU; `fuse` finds its module by its class."""

    __module__ = modeling_llama.__name__

    def __init__(self) -> None:
        self.model = tiny_model("llama")
        self.config = self.model.config

    def parameters(self) -> Iterator[Any]:
        yield SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"))

    def __call__(self, **named: Any) -> Any:
        return self.model(**named)


@pytest.mark.parametrize("case", ["old", "right", "wrong"])
def test_liger_is_taken_where_it_is_right(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm

    def patch(model: OnGPU, **no_losses: bool) -> None:
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *rest, **more: plain(q, k * 1.0, *rest, **more)
        modeling_llama.LlamaRMSNorm = object  # names that other models need
        if case == "wrong":
            model.model.lm_head.weight.data *= 1.1

    offered = SimpleNamespace() if case == "old" else SimpleNamespace(_apply_liger_kernel_to_instance=patch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, module in (("", object()), (".transformers", object()), (".transformers.monkey_patch", offered)):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain)  # undone in the end
    if case == "old":
        with pytest.warns(UserWarning, match="liger-kernel cannot be used, going on without"):
            assert fuse(OnGPU(), "auto") is False
    elif case == "wrong":
        with pytest.raises(ConfigError, match="liger-kernel changes the logits of this llama model"):
            fuse(OnGPU(), "auto")
    else:
        assert fuse(OnGPU(), "off") is False and fuse(tiny_model("llama"), "auto") is False
        assert fuse(OnGPU(), "auto") is True
    assert modeling_llama.LlamaRMSNorm is norm
