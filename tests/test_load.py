"""How a base model is loaded: any file, any family, with torch's norm and liger on a GPU; or refused by name."""

import copy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import transformers
from helpers import COMMON, EOS, random_stack, some_prompts, tiny_model, tiny_tokenizer
from loop_helpers import tiny_config
from tables import cases
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from soar.config import ConfigError, ModelConfig, OptimizerConfig, SamplingConfig
from soar.engine import kernels, load
from soar.engine.load import choose_dtype, fuse, load_backbone
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update
from soar.run.setup import open_env
from soar.run.sizes import check_fits, size_of


def save_tiny(folder: Path, template: str | None = None) -> Path:
    tiny_model().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_gguf_file_alone_names_itself(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").touch()
    for path in (tmp_path, tmp_path / "a.gguf"):
        config = ModelConfig(path=str(path))
        assert (config.path, config.gguf_file) == (str(tmp_path), "a.gguf")
    assert ModelConfig(path=str(tmp_path / "b.gguf"), gguf_file="a.gguf").gguf_file == "b.gguf"
    (tmp_path / "both").mkdir()
    for name in ("config.json", "x.gguf"):
        (tmp_path / "both" / name).touch()
    assert ModelConfig(path=str(tmp_path / "both")).gguf_file is None  # a folder as transformers writes it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'package gguf is not installed; pip install "soar-rl\[train,gguf\]"'):
        load_backbone(ModelConfig(path=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(("template", "said"), cases("load", "template"))
def test_a_chat_template_ends_and_its_failure_is_named(template, said, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "TEMPLATE_SECONDS", 0.5)
    tokenizer = load_backbone(ModelConfig(path=str(save_tiny(tmp_path, template)), device="cpu")).tokenizer
    with pytest.raises(ConfigError, match=f"chat template {said}.*problems.format without turns"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


def test_a_chat_template_gets_the_options(tmp_path):
    folder = save_tiny(tmp_path, "{% if think is not defined or think %}<think>{% endif %}{{ messages[0].content }}")
    for options, text in (({}, "<think>a"), ({"think": False}, "a")):
        tokenizer = load_backbone(ModelConfig(path=str(folder), device="cpu", template_options=options)).tokenizer
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == text
    with pytest.raises(ConfigError, match=r"template_options: the chat template nowhere reads thnk; leave it out"):
        load_backbone(ModelConfig(path=str(folder), device="cpu", template_options={"think": False, "thnk": False}))
    dated = "\n{{ strftime_now(format='%d %b %Y, %A %-d %B %H:%M') }} {{ messages[0].content }}"
    for own, options in ((dated, {}), ("{{ messages }}", {"chat_template": dated, "continue_final_message": False})):
        folder = str(save_tiny(tmp_path / "dated", own))
        tokenizer = load_backbone(ModelConfig(path=folder, device="cpu", template_options=options)).tokenizer
        said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert said == "\n01 Jan 2026, Thursday 1 January 00:00 a", "the same day whenever a run goes on"
    (tokenizer := tiny_tokenizer()).chat_template = {"one": dated, "two": dated}
    load._bound_template(tokenizer, {})  # none is the default: said where it is used


@pytest.mark.parametrize("template", ["{{ 9 ** 9 ** 9 ** 9 }}{{ 9 ** (9 ** 9) }}", "{{ 'x' * 9999999999 }}"])
def test_a_chat_template_that_does_not_end_or_takes_all_memory_is_refused(template, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "TEMPLATE_SECONDS", 0.5)
    said = r"chat template takes more than 0.5 s or 1 GiB.*problems.format without turns"
    with pytest.raises(ConfigError, match=said):
        load_backbone(ModelConfig(path=str(save_tiny(tmp_path, template)), device="cpu"))


SIZES = COMMON | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}


@pytest.mark.parametrize(("name", "reason", "settings"), cases("load", "family"))
def test_families_of_2026_sample_and_train(name, reason, settings):
    """Sampler and trainer agree, and small micro-batches give the gradient of all together. reason: why a
    family goes its own way ("": it does not)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SIZES | settings))
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    gradients = []
    for tokens in (0, 40):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = ModelConfig(lora_rank=4, device="cpu", micro_batch_tokens=tokens)
            backbone = Backbone(copy.deepcopy(model), tiny_tokenizer(), config)
        assert backbone.apart is any("own attention and cache" in str(w.message) for w in said) is bool(reason)
        assert not reason or any(reason in str(w.message) for w in said)
        backbone.end_ids = frozenset((EOS, 7, 9))
        load._try(backbone)
        stack = random_stack(backbone, 2, size=0.1)
        sampling, prompts = SamplingConfig(max_tokens=10), [some_prompts(3, seed=p) for p in range(2)]
        rollouts = NativeSampler(backbone).sample(stack, Request(prompts, 2, [[1, 2, 3]] * 2, sampling))
        assert len(set(rollouts.length_B.tolist())) > 1
        optimizer = StackOptimizer(stack, OptimizerConfig(kl=0.1))
        stats = update(backbone, optimizer, rollouts, torch.tensor([1.0, -1.0] * 6), 1e-3, sampling)
        assert stats.gap_P.max() < 1e-4 and not stats.failed_P.any()
        gradients.append({key: tensor.grad for key, tensor in stack.tensors.items()})
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-3 * largest)  # chunked states round


@pytest.mark.parametrize(("name", "said", "settings"), cases("load", "refused"))
def test_a_family_that_cannot_be_served_is_refused_by_name(name, said, settings, tmp_path):
    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for adapter in ("lora", "full"):
        with pytest.raises(ConfigError, match=rf"{name}ForCausalLM does not take .*{said}.*; leave layers out \("):
            load_backbone(ModelConfig(path=str(tmp_path), device="cpu", adapter=adapter))
    if "cache" in said:  # vLLM has its own
        load_backbone(ModelConfig(path=str(tmp_path), device="cpu", sampler="vllm"))


def test_the_trial_of_a_model_takes_no_room_and_leaves_a_lost_gpu_its_name(tmp_path, monkeypatch):
    room, real = list[int](), AdapterStack.apply

    def apply(stack: AdapterStack, *given: Any) -> torch.Tensor:
        room.append(max(t.untyped_storage().nbytes() for t in (*stack.tensors.values(), *stack._merged.values())))
        return real(stack, *given)

    monkeypatch.setattr(AdapterStack, "apply", apply)
    backbone = load_backbone(ModelConfig(path=str(save_tiny(tmp_path)), device="cpu", adapter="full"))
    assert len(room) == len(backbone.layers) and set(room) == {4}
    monkeypatch.setattr(AdapterStack, "apply", Mock(side_effect=RuntimeError("CUDA error: unspecified launch failure")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        load_backbone(backbone.config)


def test_a_model_that_does_not_fit_is_refused_before_loading(tmp_path, monkeypatch):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    parameters = sum(p.numel() for p in model.parameters())
    config = tiny_config(f"model.path={tmp_path}", "model.adapter=lora", "model.dtype=bfloat16")
    size = size_of(config.model)
    assert size is not None and (size.parameters, size.token_values) == (parameters, 2 * 2 * 1 * 8)
    needed = 2 * parameters + 2 * 32 * (1 + max(config.student.sampling.max_tokens, config.teacher.sampling.max_tokens))
    check_fits(config, needed, "cpu")
    monkeypatch.setattr("soar.run.setup.free_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError) as refused, open_env(config):
        pass
    with patch("soar.run.setup.__doc__", None), pytest.raises(ConfigError, match="PYTHONOPTIMIZE=2"), open_env(config):
        pass
    said = str(refused.value)
    assert f"{parameters:,} parameters x 2 bytes" in said and "one device: take a larger one" in said
    check_fits(tiny_config("model.path=nobody/model-70B", "model.adapter=lora"), 1, "cpu")  # a name is no proof
    for text in ("", "[]", '{"hidden_size": "x"}', '{"num_attention_heads": 0, "hidden_size": 1}'):
        (tmp_path / "config.json").write_text(text)
        assert size_of(config.model) is None
    for path, parameters in (("meta/Llama-3.2-3B-Instruct", 3e9), ("SmolLM2-135M", 135e6), ("gpt2", None)):
        size = size_of(ModelConfig(path=path))
        assert (size.parameters if size is not None else None) == parameters


@pytest.mark.parametrize("right", [True, False])
def test_torchs_norm_is_taken_where_it_is_right(right, monkeypatch):
    model = tiny_model("llama")
    ids = torch.arange(9)[None]
    plain = model(ids).logits
    assert fuse(model) is False  # no GPU
    monkeypatch.setattr(kernels, "available", lambda tensor: True)
    made: list[float] = []

    def norm(x: torch.Tensor, normalized_shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        made.append(eps)
        return real(x, normalized_shape, weight if right else weight + 0.1, eps)

    real = torch.nn.functional.rms_norm
    monkeypatch.setattr("torch.nn.functional.rms_norm", norm)
    gated = transformers.Qwen3_5TextConfig(**SIZES, **cases("load", "family")[0][2])
    seeing = transformers.Gemma3Config(text_config={**SIZES, "head_dim": 8}, vision_config=SIZES)
    for other in (gated, seeing):  # their norms are no plain ones, and the one with a gate stays its own
        assert fuse(AutoModelForCausalLM.from_config(other)) is False and not made
    assert fuse(model) is False and len(made) == 5  # liger is not there
    torch.testing.assert_close(model(ids).logits, plain)
    assert len(made) == (10 if right else 5)


@pytest.mark.parametrize("case", ["old", "right", "wrong"])
def test_liger_is_taken_where_it_is_right(case, monkeypatch):
    plain, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm

    def patch(model: Any, **no_losses: bool) -> None:
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *rest, **more: plain(q, k * 1.0, *rest, **more)
        modeling_llama.LlamaRMSNorm = object  # names that other models need
        if case == "wrong":
            model.lm_head.weight.data *= 1.1

    monkeypatch.setattr(kernels, "available", lambda tensor: True)
    monkeypatch.setattr("torch.nn.functional.rms_norm", lambda x, **named: x)  # wrong: not taken
    offered = SimpleNamespace() if case == "old" else SimpleNamespace(_apply_liger_kernel_to_instance=patch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, module in (("", object()), (".transformers", object()), (".transformers.monkey_patch", offered)):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain)  # undone in the end
    if case == "old":
        with pytest.warns(UserWarning, match="liger-kernel cannot be used, going on without"):
            assert fuse(tiny_model("llama")) is False
    elif case == "wrong":
        with pytest.raises(ConfigError, match="liger-kernel changes the logits of this llama model"):
            fuse(tiny_model("llama"))
    else:
        assert fuse(tiny_model("llama")) is True
    assert modeling_llama.LlamaRMSNorm is norm


def test_a_gpu_without_bfloat16_computes_in_float32_and_that_is_said(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    # Emulated bfloat16 counts as supported unless it is asked not to.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.warns(UserWarning, match="does not compute in bfloat16: going on in float32"):
        assert choose_dtype("auto", gpu) is torch.float32
    assert choose_dtype("auto", cpu) is torch.float32
    assert choose_dtype("bfloat16", gpu) is choose_dtype("bfloat16", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_dtype("auto", gpu) is torch.bfloat16
    for change in ("student.attempts=1", "teacher.datasets=1"):
        with pytest.raises(ConfigError, match="Input should be greater than or equal to 2"):
            tiny_config(change)
