"""Gradient checkpointing: a decoder layer keeps its input alone, and computes the rest again for its backward pass.

transformers has a switch for it, but only for a model in training mode, which would also turn dropout on, and the second
forward pass comes when the update has left the block that says which adapters are in use. So the layers' own forward
functions are wrapped: what is computed again goes through the stack of the first time. Left out: models whose decoder is
not a list of layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from soar.policy import Backbone


def is_on(backbone: Backbone) -> bool:
    """Whether the layers of this backbone recompute their activations."""
    return getattr(backbone, "recomputing", False)


def turn_on(backbone: Backbone) -> bool:
    """From here on passes with gradients recompute; False when they do already, or the model's layers are not known."""
    layers = getattr(backbone.model.get_decoder(), "layers", None)
    if is_on(backbone) or not isinstance(layers, nn.ModuleList):
        return False
    for layer in layers:
        _wrap(layer, backbone)
    backbone.recomputing = True  # type: ignore[attr-defined]
    return True


def _wrap(layer: Any, backbone: Backbone) -> None:
    plain = layer.forward

    def forward(*given: Any, **named: Any) -> Any:
        stack = backbone.active
        if stack is None or not torch.is_grad_enabled():
            return plain(*given, **named)

        def again(*given: Any, **named: Any) -> Any:
            with backbone.use(stack):  # on a GPU the second time comes in autograd's thread, which has none in use
                return plain(*given, **named)

        return checkpoint(again, *given, use_reentrant=False, preserve_rng_state=False, **named)

    layer.forward = forward
