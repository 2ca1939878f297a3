"""Log-probabilities of given completions under the active policies, with gradients.

The output layer is frozen, so its gradient is wanted for the hidden states alone. It runs over a few thousand tokens at a
time, forward and backward, and only where a completion stands: logits of the whole batch [B, T, V] never exist. A model
whose logits are not simply its output layer of the decoder's hidden states (probed once) takes the plain way.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from soar.engine import kernels
from soar.engine.policy import Backbone
from soar.engine.rollouts import Rollouts

CHUNK = 1 << 27  # logits held at once


class _ChosenLogprob(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] for each row, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_N_D: Tensor, head: _Head, target_N: Tensor, temperature: float) -> Tensor:
        size = head.rows()
        chosen, normaliser = [], []
        for first in range(0, len(hidden_N_D), size):
            if head.fits(hidden_N_D):
                plain_n_V = head.plain_logits(hidden_N_D[first : first + size])
                value_n, total_n = kernels.choose(plain_n_V, target_N[first : first + size], temperature)
                chosen.append(value_n)
                normaliser.append(total_n)
                continue
            scaled_n_V = head.logits(hidden_N_D[first : first + size]) / temperature
            total_n = scaled_n_V.logsumexp(-1)
            chosen.append(scaled_n_V.gather(1, target_N[first : first + size, None])[:, 0] - total_n)
            normaliser.append(total_n)
        ctx.save_for_backward(hidden_N_D, target_N, torch.cat(normaliser))
        ctx.head, ctx.temperature = head, temperature
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        hidden_N_D, target_N, total_N = ctx.saved_tensors
        head, size, gradient_N = ctx.head, ctx.head.rows(), gradients[0]
        parts = []
        for first in range(0, len(hidden_N_D), size):
            part = slice(first, first + size)
            if head.fits(hidden_N_D):
                plain_n_V = head.plain_logits(hidden_N_D[part])
                kernels.slope_(plain_n_V, target_N[part], total_N[part], gradient_N[part], ctx.temperature)
                parts.append(plain_n_V @ head.weight_V_D)
                continue
            logits_n_V = head.logits(hidden_N_D[part])
            slope_n_V = -torch.exp(logits_n_V / ctx.temperature - total_N[part, None])
            slope_n_V.scatter_add_(1, target_N[part, None], torch.ones_like(slope_n_V[:, :1]))
            slope_n_V *= gradient_N[part, None] / ctx.temperature
            if head.softcap is not None:
                slope_n_V *= 1 - (logits_n_V / head.softcap) ** 2
            parts.append(slope_n_V.to(hidden_N_D.dtype) @ head.weight_V_D)
        return torch.cat(parts), None, None, None


class _Head:
    """The frozen output layer: weight [V, D], maybe a bias, maybe a soft cap on the logits."""

    def __init__(self, backbone: Backbone) -> None:
        layer = backbone.model.get_output_embeddings()
        self.weight_V_D, self.bias = layer.weight, getattr(layer, "bias", None)
        self.softcap = getattr(backbone.model.config.get_text_config(), "final_logit_softcapping", None)

    def rows(self) -> int:
        return max(1, CHUNK // self.weight_V_D.shape[0])

    def fits(self, hidden_N_D: Tensor) -> bool:
        """Whether the kernels do this layer's work: on a GPU, without a soft cap."""
        return self.softcap is None and kernels.available(hidden_N_D)

    def plain_logits(self, hidden_n_D: Tensor) -> Tensor:
        """[n, V] in the model's type, as in sampling, before any cap."""
        return functional.linear(hidden_n_D, self.weight_V_D, self.bias)

    def logits(self, hidden_n_D: Tensor) -> Tensor:
        """float32 [n, V], capped."""
        logits_n_V = self.plain_logits(hidden_n_D).float()
        return logits_n_V if self.softcap is None else torch.tanh(logits_n_V / self.softcap) * self.softcap


_heads: WeakKeyDictionary[Backbone, _Head | None] = WeakKeyDictionary()


def _plain_head(backbone: Backbone) -> _Head | None:
    """The output layer, when the model's logits are that layer of its decoder's hidden states (looked at once)."""
    if backbone not in _heads:
        ids = torch.arange(min(4, backbone.vocabulary), device=backbone.device)[None]
        head = _Head(backbone)
        with torch.no_grad(), backbone.use(None):
            wanted = backbone.model(input_ids=ids, use_cache=False).logits.float()
            logits = head.logits(backbone.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
        _heads[backbone] = head if torch.allclose(wanted[0], logits, rtol=1e-3, atol=1e-3) else None
    return _heads[backbone]


def token_logprobs(backbone: Backbone, rollouts: Rollouts, temperature: float) -> Tensor:
    """Log-probability (nats) [B, T] of every completion token under the active stack, 0 on padding.

    One forward pass; rows right-padded, so causal attention needs no mask. Gradients flow if enabled.
    """
    device = backbone.device
    length_B, T = rollouts.length_B, int(rollouts.length_B.max())
    start_B = torch.tensor([len(prompt) for prompt in rollouts.prompts])
    width = int((start_B + length_B).max())
    ids = np.full((rollouts.rows, width), backbone.pad_id, dtype=np.int64)
    tokens = rollouts.tokens_B_T.numpy()
    for row, (prompt, n) in enumerate(zip(rollouts.prompts, length_B.tolist(), strict=True)):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + n] = tokens[row, :n]
    ids_B_S = torch.from_numpy(ids).to(device)
    position_1_S = torch.arange(width - 1, device=device)[None]
    place_T = torch.arange(T)
    mask_B_T = place_T[None] < length_B[:, None]
    before_B_T = (start_B - 1)[:, None] + place_T[None]  # the place whose output predicts the token
    head = _plain_head(backbone)
    if head is None:
        first = int(start_B.min()) - 1
        logits_B_S_V = backbone.model(
            input_ids=ids_B_S[:, :-1], position_ids=position_1_S, use_cache=False, logits_to_keep=width - 1 - first
        ).logits
        scaled_B_S_V = logits_B_S_V.float() / temperature
        chosen_B_S = scaled_B_S_V.gather(-1, ids_B_S[:, first + 1 :, None])[..., 0] - scaled_B_S_V.logsumexp(-1)
        place_B_T = (before_B_T - first).clamp(max=chosen_B_S.shape[1] - 1).to(device)
        return chosen_B_S.gather(1, place_B_T) * mask_B_T.to(device)
    hidden_B_S_D = backbone.model.get_decoder()(
        input_ids=ids_B_S[:, :-1], position_ids=position_1_S, use_cache=False
    ).last_hidden_state
    flat_N = (torch.arange(rollouts.rows)[:, None] * (width - 1) + before_B_T)[mask_B_T].to(device)
    hidden_N_D = hidden_B_S_D.reshape(-1, hidden_B_S_D.shape[-1]).index_select(0, flat_N)
    target_N = rollouts.tokens_B_T[:, :T][mask_B_T].to(device)
    chosen_N = _ChosenLogprob.apply(hidden_N_D, head, target_N, temperature)
    result_B_T = torch.zeros(rollouts.rows, T, device=device)
    return result_B_T.masked_scatter(mask_B_T.to(device), chosen_N)
