"""Layers trained as one product give the outputs and gradients that they give by themselves."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, WORDS, random_stack, tiny_backbone
from torch import Tensor

from soar.engine.groups import Group
from soar.engine.policy import AdapterStack, Backbone

POLICIES = 3


def logits_and_gradients(backbone: Backbone, stack: AdapterStack) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, len(WORDS), (2 * POLICIES, 7), generator=generator)
    weight = torch.randn(2 * POLICIES, 7, len(WORDS), generator=generator)
    stack = stack.select(list(range(POLICIES))).trainable()
    with backbone.use(stack):
        logits = backbone.model(input_ids=ids, use_cache=False).logits
        (logits * weight).sum().backward()
    gradients = {name: tensor.grad for name, tensor in stack.tensors.items() if tensor.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_joined_layers_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(name)
    stack = random_stack(backbone, POLICIES)
    wanted, gradients = logits_and_gradients(backbone, stack)
    digest = backbone.base_digest()
    backbone.join_layers()
    monkeypatch.setattr(Group, "large", 0)
    assert sorted(len(group.layers) for group in backbone.groups) == [2, 2, 3, 3]
    calls: list[int] = []
    plain = Group.joined

    def counted(group: Group, x: Tensor, stack: AdapterStack) -> Tensor:
        calls.append(len(group.layers))
        return plain(group, x, stack)

    monkeypatch.setattr(Group, "joined", counted)
    found, again = logits_and_gradients(backbone, stack)
    assert sorted(calls) == [2, 2, 3, 3]  # one product for each group, not one for each layer
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert gradients.keys() == again.keys() == stack.tensors.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(again[key], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item(), msg=key)
    assert backbone.base_digest() == digest


def test_layers_without_all_their_siblings_stay_by_themselves() -> None:
    backbone = tiny_backbone("llama", target_modules=("q_proj", "v_proj", "up_proj", "o_proj"))
    backbone.join_layers()
    assert backbone.groups == []
    assert all(layer.group is None for layer in backbone.layers.values())


def test_two_layers_are_joined_only_where_they_are_large() -> None:
    backbone = tiny_backbone("llama")
    backbone.join_layers()
    stack = random_stack(backbone, POLICIES)
    takes = {len(group.layers): group.takes(stack) for group in backbone.groups}
    assert takes == {2: False, 3: True}


def test_without_gradients_the_layers_are_by_themselves_and_nothing_waits() -> None:
    backbone = tiny_backbone("llama")
    stack = random_stack(backbone, POLICIES)
    ids = torch.ones(POLICIES, 3, dtype=torch.long)
    with torch.no_grad(), backbone.use(stack):
        wanted = backbone.model(input_ids=ids, use_cache=False).logits
        backbone.join_layers()
        assert torch.equal(backbone.model(input_ids=ids, use_cache=False).logits, wanted)
    layer = backbone.layers["model.layers.0.self_attn.q_proj"]
    with backbone.use(stack.trainable()):
        layer(torch.randn(POLICIES, 2, layer.base.in_features))
        assert backbone._active.waiting  # keys and values that nobody fetched
        with pytest.raises(ValueError, match="do not divide"):
            layer(torch.randn(POLICIES + 1, 2, layer.base.in_features))
    assert not backbone._active.waiting
