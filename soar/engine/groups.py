"""Which linear layers of a model are trained as one product: those that read the same input.

The layers stay where they are in transformers' model. The first of a group that is called computes the outputs of all of
them (adapted.py); the others, called with the very same tensor, find theirs waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from soar.engine.adapted import adapted, join_weights, silu_mul

Waiting = dict[int, tuple[Tensor, dict[str, Tensor]]]
"""Group -> its input, and the outputs that no layer has fetched yet."""

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input in every model that has them beside each other."""


class Group:
    """Layers that read the same input, joined while gradients are taken (lora only).

    layers: StackedLinear of policy.py; active: what they share, with the stack in use and what waits.

    The layers are called one after another with the very same tensor, as query, key and value are; a layer that is
    called with another tensor starts over.
    """

    on = True
    large = 1 << 23
    """Elements of the joined weight from which two layers are joined: with fewer, each by itself is faster (H200, 135M)."""

    def __init__(self, layers: list[Any], active: Any) -> None:
        self.layers, self._active = layers, active
        self.sizes = [layer.base.out_features for layer in layers]
        self.weight_N_K = join_weights([layer.base for layer in layers])
        biases: list[Tensor] = [layer.base.bias for layer in layers if layer.base.bias is not None]
        self.bias_N = torch.cat([bias.data for bias in biases]) if biases else None

    def takes(self, stack: Any) -> bool:
        """Whether the joined product is the way for this stack now."""
        return self.trained_as_one(stack) and torch.is_grad_enabled()

    def trained_as_one(self, stack: Any) -> bool:
        """Whether the layers are joined where gradients are taken."""
        worth = len(self.layers) > 2 or self.weight_N_K.numel() >= self.large
        return bool(self.on and worth and stack.kind == "lora")

    def joined(self, x: Tensor, stack: Any) -> Tensor:
        """The outputs of all layers, one beside the other."""
        if x.shape[0] % stack.policies:
            raise ValueError(f"{x.shape[0]} rows do not divide among {stack.policies} policies; give each equally many")
        parts: list[tuple[Tensor, Tensor] | None] = [
            (stack.tensors[f"{layer.name}.A"], stack.tensors[f"{layer.name}.B"]) for layer in self.layers
        ]
        return adapted(x, self.weight_N_K, self.bias_N, self.sizes, stack.scale, parts)

    def output(self, layer: Any, x: Tensor, stack: Any) -> Tensor:
        """The output of one of the layers."""
        waiting = self._active.waiting.get(id(self))
        if waiting is None or waiting[0] is not x or layer.name not in waiting[1]:
            outputs = self.joined(x, stack).split(self.sizes, dim=-1)
            waiting = (x, {one.name: out for one, out in zip(self.layers, outputs, strict=True)})
            self._active.waiting[id(self)] = waiting
        found: Tensor = waiting[1].pop(layer.name)
        if not waiting[1]:
            del self._active.waiting[id(self)]
        return found


def grouped(model: nn.Module, layers: dict[str, Any], active: Any) -> list[Group]:
    """Wrapped plain linear layers that read the same input, as groups; a layer without siblings stays as it is."""
    groups: list[Group] = []
    plain = {name: layer for name, layer in layers.items() if type(layer.base) is nn.Linear}
    for name, layer in plain.items():
        parent, _, child = name.rpartition(".")
        if layer.group is not None:
            continue
        names = next((names for names in TOGETHER if child in names), ())
        siblings = [plain[f"{parent}.{n}"] for n in names if f"{parent}.{n}" in plain]
        alike = len({(s.base.in_features, s.base.bias is None) for s in siblings}) == 1
        if not names or len(siblings) < len(names) or not alike:
            continue
        group = Group(siblings, active)
        for one in group.layers:
            one.group = group
        groups.append(group)
        if len(group.layers) == 2:
            _join_gate(model.get_submodule(parent), group, active)
    return groups


def _join_gate(mlp: Any, group: Group, active: Any) -> None:
    """Let a SwiGLU block of joined gate and up make its product in one kernel, where it is nothing else than that."""
    config, plain = getattr(mlp, "config", None), mlp.forward
    known = type(mlp).__name__ in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
    if not known or getattr(config, "hidden_act", "") != "silu":
        return

    def forward(x: Tensor) -> Tensor:
        stack = active.stack
        if stack is None or not group.takes(stack):
            unchanged: Tensor = plain(x)
            return unchanged
        result: Tensor = mlp.down_proj(silu_mul(group.joined(x, stack)))
        return result

    mlp.forward = forward
