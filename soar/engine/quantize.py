"""A frozen base model in 8 or 4 bits a weight: linear layers whose weights are stored small and multiplied in full.

8 bit: one scale for each output (largest magnitude over 127). 4 bit: the 16 levels of NF4 (Dettmers et al. 2023, QLoRA,
appendix E: quantiles of the normal distribution), one scale for each 64 weights. The weight is unpacked for each product, and
once more for the gradient, so no full copy outlives its layer; inputs are not quantized, so a row does not depend on its
batch. It saves memory, not time. Adapters stay float32. Left out: embeddings and the output layer, which keep their type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUP = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class _FrozenProduct(torch.autograd.Function):
    """x_N_I @ weight.T, the weight unpacked in the forward pass and once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.full_weight(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.full_weight(gradients[0].dtype), None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of `bits` 8 or 4. full_weight gives [out, in]."""

    def __init__(self, base: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = base.in_features, base.out_features, bits
        self.register_parameter("bias", base.bias)
        packed, scale = (_pack8 if bits == 8 else _pack4)(base.weight.detach())
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        if bits == 4:
            self.register_buffer("levels", torch.tensor(NF4), persistent=False)
        self.packed: Tensor
        self.scale: Tensor
        self.levels: Tensor

    def full_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer stands for."""
        if self.bits == 8:
            return self.packed.to(dtype) * self.scale[:, None].to(dtype)
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=-1).reshape(len(self.scale), GROUP)
        values = self.levels.to(dtype)[codes.int()] * self.scale[:, None].to(dtype)
        return values.reshape(-1)[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        # Two axes, so that the product is no view: adapters add to it in place.
        rows = _FrozenProduct.apply(input.reshape(-1, self.in_features), self)
        return rows.view(*input.shape[:-1], self.out_features)


def _pack8(weight_O_I: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight_O_I.float()
    scale_O = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale_O[:, None]).round().to(torch.int8), scale_O


def _pack4(weight_O_I: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte [groups * 32], one scale a group."""
    flat = weight_O_I.float().reshape(-1)
    flat = functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    scale = flat.abs().amax(dim=1).clamp(min=1e-12)
    levels = torch.tensor(NF4, device=flat.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(flat / scale[:, None], middles).to(torch.uint8).view(-1, GROUP // 2, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).reshape(-1), scale


def quantize(model: Any, bits: int, device: torch.device) -> None:
    """Replace every linear layer of the model but the output layer, one after another, and put it on the device.

    The full weights of one layer at a time are on the device.
    """
    output = model.get_output_embeddings()
    chosen = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not output]
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(module.to(device), bits))
    model.to(device)
