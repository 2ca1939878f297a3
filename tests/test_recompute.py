"""Gradient checkpointing: the same step, and when it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, random_rollouts, random_stack, same_stacks, tiny_backbone
from torch import Tensor

from soar.config import OptimizerConfig
from soar.engine import update as update_room
from soar.engine.logprobs import Pack
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.update import StackOptimizer, update

POLICIES = 3
ADVANTAGE = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.0, 0.5, -3.0, 0.0, 0.25, 1.0, -1.0, 0.5])


def stepped(backbone: Backbone, kl: float = 0.1) -> AdapterStack:
    stack = random_stack(backbone, POLICIES)
    optimizer = StackOptimizer(stack, OptimizerConfig(kl=kl))
    update(backbone, stack, optimizer, random_rollouts(12), ADVANTAGE, 0.01, 0.8, 10)
    return stack


def calls_of_layers(backbone: Backbone) -> list[int]:
    """Appended to by every pass of an MLP with gradients."""
    calls: list[int] = []
    for i, layer in enumerate(backbone.model.get_decoder().layers):
        plain = layer.mlp.forward

        def forward(x: Tensor, plain: Any = plain, i: int = i) -> Tensor:
            if torch.is_grad_enabled():
                calls.append(i)
            return plain(x)

        layer.mlp.forward = forward
    return calls


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_step_is_the_same_bit_for_bit(name: str, adapter: str) -> None:
    once, twice = (tiny_backbone(name, adapter, gradient_checkpointing=way) for way in ("off", "on"))
    layers = once.model.config.num_hidden_layers
    counts = [calls_of_layers(backbone) for backbone in (once, twice)]
    assert same_stacks(stepped(once), stepped(twice))
    assert (len(counts[0]), len(counts[1])) == (layers, 2 * layers)  # the whole forward pass a second time


@pytest.mark.parametrize("way", ["auto", "off"])
def test_it_is_taken_when_the_smallest_piece_does_not_fit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama", gradient_checkpointing=way, micro_batch_tokens=90)
    real = update_room.token_logprobs

    def short_of_memory(backbone: Backbone, packed: Pack, temperature: float) -> Tensor:
        if not backbone.recomputing:
            raise torch.cuda.OutOfMemoryError("no room")
        return real(backbone, packed, temperature)

    monkeypatch.setattr(update_room, "SMALLEST_MICRO_BATCH", 45)
    monkeypatch.setattr(update_room, "token_logprobs", short_of_memory)
    with pytest.warns(UserWarning, match="from here on micro-batches of 45 tokens"):
        if way == "off":
            with pytest.raises(torch.cuda.OutOfMemoryError):
                stepped(backbone)
            return
        with pytest.warns(UserWarning, match="from here on with gradient checkpointing"):
            found = stepped(backbone)
    assert backbone.micro_batch_tokens == 90  # smaller pieces are not needed any more
    assert same_stacks(found, stepped(tiny_backbone("llama", micro_batch_tokens=90, gradient_checkpointing="on")))
    assert not backbone.recompute()
