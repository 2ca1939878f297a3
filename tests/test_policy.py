"""Stacked policies: each row sees its own slice only, the base model stays as it is, adapters are those of PEFT."""

import json
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from helpers import ARCHITECTURES, WORDS, logits_of, random_stack, tiny_backbone, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tables import cases
from torch import Tensor

from soar.config import ConfigError, ModelConfig
from soar.engine.load import choose_device, load_backbone
from soar.engine.policy import AdapterStack, Backbone, load_adapter
from soar.run.setup import save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

POLICIES, ROWS, LENGTH = 3, 2, 7


def inputs(rows: int = POLICIES * ROWS) -> Tensor:
    return torch.randint(1, len(WORDS), (rows, LENGTH), generator=torch.Generator().manual_seed(5))


def test_the_base_model_takes_no_gradient_and_keeps_its_bytes():
    backbone = tiny_backbone()
    before = backbone.base_digest()
    logits_of(backbone, random_stack(backbone, POLICIES).trainable(), inputs()).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert backbone.base_digest() == before == tiny_backbone().base_digest()
    assert tiny_backbone(seed=1).base_digest() != before
    backbone.layers["model.layers.1.mlp.down_proj"].base.weight.data[-1, -1] *= 1 + 1e-6
    assert backbone.base_digest() != before
    model, words = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = [2, 9], 11
    assert Backbone(model, words, ModelConfig()).end_ids == {2, 9, 11}
    model.generation_config.eos_token_id = model.config.eos_token_id = words.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text token"):
        Backbone(model, words, ModelConfig())
    model.config.eos_token_id = len(words) + 1000
    with pytest.raises(ConfigError, match=f"eos_token_id {len(words) + 1000} is none of the"):
        Backbone(model, words, ModelConfig())


def test_new_stacks_are_seeded_and_lora_starts_as_peft_does():
    """A uniform in +-1/sqrt(in) (`kaiming_uniform_` with a = sqrt(5)), B zero; full weights start without a change."""
    backbone = tiny_backbone(lora_rank=16)
    stack = backbone.new_stack(7, policies=2)
    assert stack.digest(0) == stack.digest(1) == backbone.new_stack(7).digest() != backbone.new_stack(8).digest()
    a_I_r = stack.tensors["model.layers.0.mlp.down_proj.A"][0]
    bound = 24**-0.5
    assert a_I_r.shape == (24, 16)
    assert bound * 0.95 < a_I_r.abs().max().item() <= bound
    assert abs(a_I_r.std().item() - bound / 3**0.5) < 0.1 * bound
    assert all(not tensor.any() for name, tensor in stack.tensors.items() if name.endswith(".B"))
    assert not any(tensor.any() for tensor in tiny_backbone(adapter="full").new_stack(7).tensors.values())


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("more", [{"use_rslora": True}, {"alpha_pattern": {r"layers\.0\..*_proj": 24, "up_proj": 2}}])
def test_adapters_of_other_trainers_have_the_scale_of_peft_and_are_float32_here(adapter, more, tmp_path):
    """In bfloat16 half as many bytes in the file; numpy, by which they travel and are named, knows no bfloat16."""
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules="all-linear", init_lora_weights=False, **more)
    peft.get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    backbone, file = tiny_backbone(adapter=adapter), tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    stack, theirs = load_adapter(backbone, tmp_path), peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert {tensor.dtype for tensor in stack.tensors.values()} == {torch.float32}
    assert pickle.loads(pickle.dumps(stack)).digest() == stack.digest()
    with torch.no_grad():
        near(logits_of(backbone, stack, inputs(1)), theirs(inputs(1)).logits)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for other, said in cases("load", "not plain"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **other}))
        with pytest.raises(ConfigError, match=said):
            load_adapter(backbone, tmp_path)


def test_weights_travel_beside_the_pickle_and_may_be_written_where_they_came():
    """Ray copies what is inside a pickle several times; what it hands over in shared memory is read-only."""
    stack, beside = random_stack(tiny_backbone(), 2).trainable(), list[pickle.PickleBuffer]()
    sent = pickle.dumps(stack, protocol=5, buffer_callback=beside.append)
    assert sum(len(part.raw()) for part in beside) == sum(tensor.nbytes for tensor in stack.tensors.values())
    there = pickle.loads(sent, buffers=[bytes(part) for part in beside])
    assert [there.digest(p) for p in range(2)] == [stack.digest(p) for p in range(2)] and there.scale == stack.scale
    assert all(tensor.add_(1).min() > -10 for tensor in there.tensors.values())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_each_thread_uses_its_own_stack(adapter):
    """While one thread is inside `use`, another one that uses nothing sees the base model."""
    backbone = tiny_backbone(adapter=adapter)
    stacks: list[AdapterStack | None] = [random_stack(backbone, 1, seed=s) for s in range(3)]
    stacks.append(None)
    ids, barrier = inputs(1), threading.Barrier(4)

    def logits_within(stack: AdapterStack | None) -> Tensor:
        with torch.no_grad(), backbone.use(stack):
            barrier.wait(20)
            logits: Tensor = backbone.model(input_ids=ids, use_cache=False).logits
            barrier.wait(20)
        return logits

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(logits_within, stacks))
    with torch.no_grad():
        for logits, stack in zip(together, stacks, strict=True):
            assert torch.equal(logits, logits_of(backbone, stack, ids))
    assert len({logits.sum().item() for logits in together}) == 4


def test_what_cannot_be_loaded_or_used_is_named(tmp_path, monkeypatch):
    """Rows that do not divide, targets that name nothing, a tokenizer larger than its model, pickles, paths, devices."""
    backbone, words, model = tiny_backbone(), tiny_tokenizer(), tiny_model("llama")
    for join in (dict, backbone.join):  # dict: nothing is joined
        join()
        with pytest.raises(ValueError, match="5 rows do not divide among 3 policies"):
            logits_of(backbone, random_stack(backbone, 3), inputs(5))
    for targets in (("q_projection",), ("lm_head",)):
        with pytest.raises(ConfigError, match=r"names no linear layer .* linear layers here: .*down_proj.*q_proj"):
            tiny_backbone(target_modules=targets)
    model.config.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for path, said in ((tmp_path, r"model\.path = .* cannot be loaded"), ("builtin:huge", "no such embedded model")):
        with pytest.raises(ConfigError, match=said):
            load_backbone(ModelConfig(path=str(path), device="cpu"))
    words.add_tokens(["extra"])
    with pytest.raises(ConfigError, match=f"^model.path: {len(WORDS) + 1} tokens in the .* {len(WORDS)} in the output"):
        Backbone(model, words, ModelConfig())
    for device, seen, said in cases("load", "device"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        with pytest.raises(ConfigError, match=f"model.device = '{device}': .*{said}"):
            choose_device(device)


def weights() -> Tensor:
    """Random weights of the logits in a loss, so that every logit matters."""
    return torch.randn(POLICIES * ROWS, LENGTH, len(WORDS), generator=torch.Generator().manual_seed(6))


def near(ours: Tensor, theirs: Tensor) -> None:
    size = theirs.abs().max().item()
    assert size > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5 * size)


PAIRS = [*((name, "lora", False) for name in ARCHITECTURES if name != "mistral"), ("qwen2", "lora", True)]
PAIRS += [("gemma2", "lora", True), ("qwen2", "full", False), ("gemma2", "full", False)]


@pytest.mark.parametrize(("name", "adapter", "joined"), PAIRS)
def test_outputs_and_gradients_equal_peft(name, adapter, joined, tmp_path):
    """PEFT's model of every policy, from what we save and read back bit for bit. There a full delta is an exact LoRA."""
    backbone = tiny_backbone(name, adapter=adapter)
    stack, held = random_stack(backbone, POLICIES).trainable(), list[Any]()
    if joined:
        backbone.join()
        assert sum(len(layer.behind) for layer in backbone.layers.values()) == 6
        up = backbone.layers["model.layers.1.mlp.up_proj"]
        hook = up.register_forward_pre_hook(lambda _, given: held.append(weakref.ref(given[0])) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(backbone, stack, inputs())
        hook.remove()
        assert [x() for x in held] == [None], "nothing is kept of what an error cut off"
    logits = logits_of(backbone, stack, inputs())
    (logits * weights()).sum().backward()
    base_logits = tiny_model(name)(inputs()).logits
    for p in range(POLICIES):
        save_adapter(backbone, stack.select([p]), tmp_path / str(p))
        ours, rows = load_adapter(backbone, tmp_path / str(p)), slice(p * ROWS, (p + 1) * ROWS)
        assert (ours.policies, ours.scale, ours.digest()) == (1, stack.scale, stack.digest(p))
        reference: Any = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path / str(p), is_trainable=True)
        theirs = reference(input_ids=inputs()[rows]).logits
        near(logits[rows].detach(), theirs.detach())
        assert (theirs - base_logits[rows]).abs().max() > 0.05
        if adapter == "full":
            near(logits[rows].detach(), reference.merge_and_unload()(input_ids=inputs()[rows]).logits.detach())
            continue
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


def test_a_saved_lora_can_be_read_as_a_full_delta_or_says_why_not(tmp_path):
    writer, reader = tiny_backbone("llama"), tiny_backbone("llama", adapter="full")
    stack = random_stack(writer, 1)
    save_adapter(writer, stack, tmp_path)
    with torch.no_grad():
        ours = logits_of(reader, load_adapter(reader, tmp_path), inputs(1))
        near(ours, logits_of(writer, stack, inputs(1)))
    with pytest.raises(ConfigError, match=r"rank 4, expected model\.lora_rank = 8"):
        load_adapter(tiny_backbone("llama", lora_rank=8), tmp_path)
    with pytest.raises(ConfigError, match=r"layer model\.layers\.0.*k_proj is \(16, 8\).* expected \(16, 4\)"):
        load_adapter(tiny_backbone("llama", num_key_value_heads=1), tmp_path)
    narrow = tiny_backbone("llama", target_modules=("q_proj",))
    save_adapter(narrow, random_stack(narrow, 1), tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"no weights for layer model\.layers\.0\.self_attn\.k_proj"):
        load_adapter(writer, tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"down_proj\.lora_A\.weight and 23 more fit no layer"):
        load_adapter(narrow, tmp_path)
