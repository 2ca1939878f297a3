"""Log-probabilities of given completions under the policies of a stack, with gradients.

The frozen output layer runs over a few thousand tokens at a time, forward and backward, and only where a completion stands:
logits [B, T, V] never exist. A model whose logits are not that layer of its decoder's output (probed once) goes plainly.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from soar.engine import kernels
from soar.engine.attention import Packed, sent
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts

CHUNK = 1 << 27  # logits held at once


class _ChosenLogprob(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] for each row, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_N_D: Tensor, head: "_Head", target_N: Tensor, temperature: float) -> Tensor:
        chunks = zip(hidden_N_D.split(head.rows), target_N.split(head.rows), strict=True)
        pairs = [head.choose(*chunk, temperature) for chunk in chunks]
        chosen_N, total_N = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        ctx.save_for_backward(hidden_N_D, target_N, total_N)
        ctx.head, ctx.temperature = head, temperature
        return chosen_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        chunks = zip(*(x.split(ctx.head.rows) for x in (*ctx.saved_tensors, gradients[0])), strict=True)
        return torch.cat([ctx.head.slope(*chunk, ctx.temperature) for chunk in chunks]), None, None, None


class _Head:
    """The frozen output layer: weight [V, D], maybe a bias, maybe a soft cap on the logits. rows: taken at once."""

    def __init__(self, backbone: Backbone) -> None:
        layer = backbone.model.get_output_embeddings()
        self.weight_V_D, self.bias = layer.weight, getattr(layer, "bias", None)
        self.softcap = getattr(backbone.model.config.get_text_config(), "final_logit_softcapping", None)
        self.by_kernel = self.softcap is None and kernels.available(layer.weight)
        self.rows = max(1, CHUNK // len(self.weight_V_D))

    def plain_logits(self, hidden_n_D: Tensor) -> Tensor:
        """[n, V] in the model's type, as in sampling, before any cap."""
        return functional.linear(hidden_n_D, self.weight_V_D, self.bias)

    def logits(self, hidden_n_D: Tensor) -> Tensor:
        """float32 [n, V], capped."""
        logits_n_V = self.plain_logits(hidden_n_D).float()
        return logits_n_V if self.softcap is None else torch.tanh(logits_n_V / self.softcap) * self.softcap

    def choose(self, hidden_n_D: Tensor, target_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the targets, and the logarithms of the normalisers."""
        if self.by_kernel:
            return kernels.choose(self.plain_logits(hidden_n_D), target_n, temperature)
        scaled_n_V = self.logits(hidden_n_D) / temperature
        total_n = scaled_n_V.logsumexp(-1)
        return scaled_n_V.gather(1, target_n[:, None])[:, 0] - total_n, total_n

    def slope(
        self, hidden_n_D: Tensor, target_n: Tensor, total_n: Tensor, gradient_n: Tensor, temperature: float
    ) -> Tensor:
        """Gradient of `choose` with respect to the hidden states, times gradient_n."""
        if self.by_kernel:
            plain_n_V = self.plain_logits(hidden_n_D)
            return kernels.slope_(plain_n_V, target_n, total_n, gradient_n, temperature) @ self.weight_V_D
        logits_n_V = self.logits(hidden_n_D)
        slope_n_V = -torch.exp(logits_n_V / temperature - total_n[:, None])
        slope_n_V.scatter_add_(1, target_n[:, None], torch.ones_like(slope_n_V[:, :1]))
        slope_n_V *= gradient_n[:, None] / temperature
        if self.softcap is not None:
            slope_n_V *= 1 - (logits_n_V / self.softcap) ** 2
        return slope_n_V.to(hidden_n_D.dtype) @ self.weight_V_D


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


@dataclass(frozen=True)
class Pack:
    """Rows of a micro-batch without padding, on the device: each policy's prompts, every one once, then its completions.

    row_R: their numbers in the rollouts, policy-major. ids_P_n, position_P_n: tokens as they go through the model, without
    the last of a completion, which predicts nothing. view: who sees whom; None with a line for each row in place of one
    for each policy. mask_R_T: where a row has a token. For the N such tokens, row after row: target_N, and place_N in
    [P * n], whose output predicts it. sampled_R_T: the sampler's log-probabilities.
    """

    view: Packed | None
    row_R: Tensor
    ids_P_n: Tensor
    position_P_n: Tensor
    mask_R_T: Tensor
    target_N: Tensor
    place_N: Tensor
    sampled_R_T: Tensor


def pack(backbone: Backbone, rollouts: Rollouts, rows_P: list[list[int]]) -> Pack:
    """The named rows of every policy, none of them empty, on the backbone's device."""
    order, ids, position, places, view = (_apart if backbone.apart else _packed)(backbone, rollouts, rows_P)
    row_R = torch.tensor(order)
    length_R = rollouts.length_B[row_R]
    T = int(length_R.max())
    mask_R_T = torch.arange(T)[None] < length_R[:, None]
    ids_P_n, position_P_n, place_N = map(torch.from_numpy, (ids, position, np.concatenate(places)))
    target_N, sampled_R_T = rollouts.tokens_B_T[row_R, :T][mask_R_T], rollouts.logprob_B_T[row_R, :T]
    tensors = row_R, ids_P_n, position_P_n, mask_R_T, target_N, place_N, sampled_R_T
    return Pack(view, *(sent(tensor, backbone.device) for tensor in tensors))


Laid = tuple[list[int], np.ndarray, np.ndarray, list[np.ndarray], Packed | None]
"""Numbers of the rows, ids, positions, the places that predict each row's tokens, the view."""


def _packed(backbone: Backbone, rollouts: Rollouts, rows_P: list[list[int]]) -> Laid:
    P, length_B, tokens_B_T = len(rows_P), rollouts.length_B.numpy(), rollouts.tokens_B_T.numpy()
    rows_P_U: list[dict[tuple[int, ...], list[int]]] = [{} for _ in rows_P]
    for rows_U, rows in zip(rows_P_U, rows_P, strict=True):
        for row in rows:
            rows_U.setdefault(rollouts.prompts[row], []).append(row)
        if not rows:
            rows_U[(backbone.pad_id,)] = []  # every policy has a prompt
    split = max(sum(len(prompt) for prompt in rows_U) for rows_U in rows_P_U)
    n = split + max(1, *(int((length_B[rows] - 1).sum()) for rows in rows_P))
    ids_P_n, position_P_n = np.full((P, n), backbone.pad_id, dtype=np.int64), np.zeros((P, n), dtype=np.int64)
    prompts: list[tuple[int, int, int]] = []
    completions: list[tuple[int, int, int]] = []
    order: list[int] = []
    places: list[np.ndarray] = []
    for p, rows_U in enumerate(rows_P_U):
        first, behind = 0, split
        for prompt, rows in rows_U.items():
            start = len(prompt)
            ids_P_n[p, first : first + start], position_P_n[p, first : first + start] = prompt, np.arange(start)
            for row in rows:
                inner = int(length_B[row]) - 1
                here = slice(behind, behind + inner)
                ids_P_n[p, here], position_P_n[p, here] = tokens_B_T[row, :inner], np.arange(start, start + inner)
                completions.append((len(prompts), behind, inner))
                places.append(np.arange(p * n + behind - 1, p * n + behind + inner))
                places[-1][0] = p * n + first + start - 1
                behind += inner
            order += rows
            prompts.append((p, first, start))
            first += start
    return order, ids_P_n, position_P_n, places, Packed((P, n), split, prompts, completions, backbone.device)


def _apart(backbone: Backbone, rollouts: Rollouts, rows_P: list[list[int]]) -> Laid:
    """Each row with its prompt in a line of its own, short policies filled up with lines that nobody reads."""
    length_B, most = rollouts.length_B.tolist(), max(len(rows) for rows in rows_P)
    order = [row for rows in rows_P for row in rows]
    n = max(len(rollouts.prompts[row]) + length_B[row] - 1 for row in order)
    ids = np.full((len(rows_P) * most, n), backbone.pad_id, dtype=np.int64)
    places: list[np.ndarray] = []
    for p, rows in enumerate(rows_P):
        for line, row in enumerate(rows, start=p * most):
            start, inner = len(rollouts.prompts[row]), length_B[row] - 1
            ids[line, : start + inner] = [*rollouts.prompts[row], *rollouts.tokens_B_T[row, :inner].tolist()]
            places.append(np.arange(line * n + start - 1, line * n + start + inner))
    return order, ids, np.broadcast_to(np.arange(n), ids.shape).copy(), places, None


def token_logprobs(backbone: Backbone, stack: AdapterStack | None, packed: Pack, temperature: float) -> Tensor:
    """Log-probability (nats) [R, T] of every completion token under the stack (None: the base model), 0 on padding.

    One forward pass. Gradients flow if enabled.
    """
    head = _plain_head(backbone)
    given: dict[str, Any] = {"input_ids": packed.ids_P_n, "position_ids": packed.position_P_n, "use_cache": False}
    if packed.view is not None:  # a mask of four axes is taken as it is; what counts is the view
        given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=backbone.device)
    with backbone.use(stack, packed.view):
        out = (
            backbone.model(**given).logits if head is None else backbone.model.get_decoder()(**given).last_hidden_state
        )
    # As an embedding: attempts share the place behind their prompt, and its gradient adds theirs in a fixed order.
    out_N_X = functional.embedding(packed.place_N, out.flatten(0, 1))
    if head is None:
        scaled_N_V = out_N_X.float() / temperature
        chosen_N = scaled_N_V.gather(1, packed.target_N[:, None])[:, 0] - scaled_N_V.logsumexp(-1)
    else:
        chosen_N = _ChosenLogprob.apply(out_N_X, head, packed.target_N, temperature)
    return torch.zeros(packed.mask_R_T.shape, device=backbone.device).masked_scatter(packed.mask_R_T, chosen_N)
