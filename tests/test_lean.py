"""The joined decoding step gives what transformers' own forward pass gives, for the models that it knows."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, random_stack, some_prompts, tiny_backbone

from soar.config import SamplingConfig
from soar.engine import lean, products
from soar.engine.fused import probe_ids
from soar.engine.lean import lean_of, way_of
from soar.engine.policy import Backbone
from soar.engine.sampler import NativeSampler, Rollouts

KNOWN = ("llama", "mistral", "qwen2", "qwen3")


def sampled(backbone: Backbone, stack: object, fused: bool, greedy: bool = False) -> tuple[Rollouts, bool]:
    prompts = some_prompts(6, seed=3)
    prompts_P_Q = [prompts[:2], prompts[2:4], prompts[4:]]
    sampler = NativeSampler(backbone, static=True, fused=fused)
    sampling = SamplingConfig(max_tokens=30, temperature=0.8)
    found = sampler.sample(stack, prompts_P_Q, 5, [[1, 2], [3, 4], [5, 6]], sampling, greedy)  # type: ignore[arg-type]
    return found, sampler.decoder.lean is not None


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("greedy", [False, True])
def test_the_joined_step_changes_nothing(name: str, greedy: bool) -> None:
    backbone = tiny_backbone(name)
    stack = random_stack(backbone, 3)
    plain, used = sampled(backbone, stack, fused=False, greedy=greedy)
    assert not used
    fused, used = sampled(backbone, stack, fused=True, greedy=greedy)
    assert used == (name in KNOWN)  # the others are left to transformers, without a word
    assert torch.equal(fused.tokens_B_T, plain.tokens_B_T)
    assert torch.equal(fused.length_B, plain.length_B)
    assert torch.allclose(fused.logprob_B_T, plain.logprob_B_T, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",)])
def test_layers_without_an_adapter_stay_plain(targets: tuple[str, ...]) -> None:
    backbone = tiny_backbone("qwen2", target_modules=targets)
    stack = random_stack(backbone, 3, size=0.5)
    plain, _ = sampled(backbone, stack, fused=False)
    fused, used = sampled(backbone, stack, fused=True)
    assert used
    assert torch.equal(fused.tokens_B_T, plain.tokens_B_T)
    assert not torch.equal(fused.tokens_B_T, sampled(backbone, None, fused=True)[0].tokens_B_T)


def test_joined_weights_are_the_layers_own() -> None:
    """No second copy of the weights, and nothing of the model changes: not its digest, not its logits."""
    backbone = tiny_backbone("llama")
    ids = torch.arange(8)[None]
    before, logits = backbone.base_digest(), backbone.model(input_ids=ids).logits
    made = lean_of(backbone)
    assert made is not None
    query = backbone.layers["model.layers.0.self_attn.q_proj"].base
    joined = made.layers[0].qkv.weight_N_K
    assert query.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert backbone.base_digest() == before
    assert torch.equal(backbone.model(input_ids=ids).logits, logits)


def test_a_step_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    monkeypatch.setattr(lean, "norm", lambda x, weight, eps, early=False: x * weight)
    with pytest.warns(UserWarning, match="fused decoding step differs"):
        assert lean_of(backbone) is None
    assert lean_of(backbone) is None  # said once


def test_an_unusual_layer_is_left_to_transformers() -> None:
    backbone = tiny_backbone("llama", hidden_act="gelu")
    assert lean_of(backbone) is None
    backbone = tiny_backbone("llama", mlp_bias=True)
    assert lean_of(backbone) is None


@pytest.mark.parametrize("policies", [0, 1, 2, 3, 4])
def test_two_lanes_change_nothing(policies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in two halves, each with its own policies' adapters; three policies cannot be halved and stay together."""
    backbone = tiny_backbone("qwen2")
    made = lean_of(backbone)
    assert made is not None
    stack = random_stack(backbone, policies, size=0.5) if policies else None
    every = some_prompts(4 * max(1, policies), seed=5)
    prompts = [every[4 * p : 4 * p + 4] for p in range(max(1, policies))]
    seeds = [[10 * p + q for q in range(4)] for p in range(max(1, policies))]
    sampling = SamplingConfig(max_tokens=20, temperature=0.8)
    found, most = [], []
    cuts: list[int] = []
    cut = made._cut
    monkeypatch.setattr(made, "_cut", lambda *given: cuts.append(len(made_lanes := cut(*given))) or made_lanes)
    # None: by itself, as on a GPU with rows enough for two lanes.
    monkeypatch.setattr(made, "_ours", True)
    monkeypatch.setattr(made, "_major", 9)
    monkeypatch.setattr(lean, "LANE_ROWS", 4)
    for lanes in (1, 2, None):
        monkeypatch.setattr(made, "lanes", lanes)
        cuts.clear()
        found.append(NativeSampler(backbone, static=True, fused=True).sample(stack, prompts, 3, seeds, sampling))
        most.append(max(cuts))
    assert most == ([1, 1, 1] if policies == 3 else [1, 2, 2])
    for other in found[1:]:
        assert torch.equal(found[0].tokens_B_T, other.tokens_B_T)
        assert torch.allclose(found[0].logprob_B_T, other.logprob_B_T, atol=1e-5)


def test_the_way_of_a_step_follows_rows_policies_and_device() -> None:
    hopper = {"ours": True, "major": 9}
    assert way_of(2048, 16, **hopper) == (2, True)  # the benchmark's step
    assert way_of(4096, 1, **hopper) == (2, True)
    assert way_of(1024, 16, **hopper) == (1, True)  # too few rows for two
    assert way_of(2048, 3, **hopper) == (1, True)  # three policies cannot be halved
    assert way_of(2048, 16, ours=True, major=8) == (2, False)
    assert way_of(2048, 16, ours=False, major=9) == (1, False)  # products of cuBLAS
    made = lean_of(tiny_backbone("llama"))
    assert made is not None and made.way(1 << 20, 16) == (1, False)  # a CPU


def test_deep_products_take_a_tall_tile() -> None:
    down = products.tile_of(576, 1536, 128, [576])
    assert (down.rows, down.columns, down.warps, down.stages, down.inner) == (128, 64, 4, 4, 64)
    assert products.tile_of(576, 1536, 64, [576]).rows == 64  # few rows a policy
    assert products.tile_of(960, 576, 128, [576, 192, 192]) == products.TILES[0]


def test_the_check_of_fused_kernels_does_not_ask_about_special_tokens() -> None:
    for vocabulary in (8, 300, 49_152):
        ids = probe_ids(vocabulary)
        assert torch.equal(ids, probe_ids(vocabulary))
        assert ids.min() >= 0 and ids.max() < vocabulary
    assert (ids > 100).all() and len(set(ids.tolist())) > 30
