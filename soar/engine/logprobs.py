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
from soar.engine.rollouts import CHUNK, Rollouts


class _ChosenLogprob(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] for each row, chunk by chunk.

    The gradient of a row is its slope times one number: a kernel takes the slope while the logits are there, elsewhere
    they are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden_N_D: Tensor, head: "_Head", target_N: Tensor, temperature: float) -> Tensor:
        ctx.at_once = head.by_kernel and ctx.needs_input_grad[0]
        chunks = zip(hidden_N_D.split(head.rows), target_N.split(head.rows), strict=True)
        pairs = [head.choose(*chunk, temperature, ctx.at_once) for chunk in chunks]
        chosen_N, rest = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        ctx.save_for_backward(*((rest,) if ctx.at_once else (hidden_N_D, target_N, rest)))
        ctx.head, ctx.temperature = head, temperature
        return chosen_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.at_once:
            slope_N_D = ctx.saved_tensors[0]
            return (slope_N_D * gradients[0][:, None]).to(slope_N_D.dtype), None, None, None
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

    def logits(self, hidden_n_D: Tensor) -> Tensor:
        """[n, V] as in sampling: for the kernels in the model's type, else float32, capped."""
        logits_n_V = functional.linear(hidden_n_D, self.weight_V_D, self.bias)
        if self.by_kernel:
            return logits_n_V
        logits_n_V = logits_n_V.float()
        return logits_n_V if self.softcap is None else torch.tanh(logits_n_V / self.softcap) * self.softcap

    def choose(self, hidden_n_D: Tensor, target_n: Tensor, temperature: float, slope: bool) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the targets, and their slope for the hidden states, or the logarithm of the normaliser."""
        logits_n_V = self.logits(hidden_n_D)
        if self.by_kernel:
            chosen_n = kernels.choose(logits_n_V, target_n, temperature, slope)
            return chosen_n, logits_n_V @ self.weight_V_D if slope else chosen_n  # nobody asks for a normaliser
        scaled_n_V = logits_n_V / temperature
        total_n = scaled_n_V.logsumexp(-1)
        return scaled_n_V.gather(1, target_n[:, None])[:, 0] - total_n, total_n

    def slope(
        self, hidden_n_D: Tensor, target_n: Tensor, total_n: Tensor, gradient_n: Tensor, temperature: float
    ) -> Tensor:
        """Gradient of `choose` with respect to the hidden states, times gradient_n."""
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
            seen = backbone.model.get_decoder()(input_ids=ids, use_cache=False)
            logits = head.logits(seen.last_hidden_state[0]) if "last_hidden_state" in seen else torch.tensor(0.0)
        same = logits.shape == wanted[0].shape and torch.allclose(wanted[0], logits.float(), rtol=1e-3, atol=1e-3)
        _heads[backbone] = head if same else None
    return _heads[backbone]


@dataclass(frozen=True)
class Pack:
    """Rows of a micro-batch without padding, on the device: each lane's prompts, every one once, then its completions.

    row_R: their numbers in the rollouts, lane after lane. ids_P_n, position_P_n: tokens as they go through the model, without
    the last of a completion, which predicts nothing. view: who sees whom; None with a line for each row in place of one
    for each lane. mask_R_T: where a row has a token. For the N such tokens, row after row: target_N, and place_N in
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
    """The named rows of every lane, none of them empty, on the backbone's device."""
    given, length_B, tokens_B_T = rollouts.prompts, rollouts.length_B.numpy(), rollouts.tokens_B_T.numpy()
    lines: list[dict[tuple[int, ...], list[int]]] = []  # of what goes through the model: prompts, each with its rows
    for rows in rows_P:
        if backbone.apart:  # each row in a line of its own, short lanes filled up with lines that nobody reads
            lines += [{given[row]: [row]} for row in rows] + [{}] * (max(map(len, rows_P)) - len(rows))
            continue
        lines.append({} if rows else {(backbone.pad_id,): []})  # every lane has a prompt
        for row in rows:
            lines[-1].setdefault(given[row], []).append(row)
    split = max(sum(map(len, line)) for line in lines)
    n = split + max(1, *(int((length_B[rows] - 1).sum()) for rows in rows_P))
    if backbone.apart:
        n = max(len(given[row]) + int(length_B[row]) - 1 for rows in rows_P for row in rows)
    shape = len(lines), n
    ids_P_n = np.full(shape, backbone.pad_id, dtype=np.int64)
    position_P_n = np.full(shape, np.arange(n) if backbone.apart else 0, dtype=np.int64)
    prompts: list[tuple[int, int, int]] = []
    completions: list[tuple[int, int, int]] = []
    order: list[int] = []
    places: list[np.ndarray] = []
    for p, line in enumerate(lines):
        first, behind = 0, split
        for prompt, rows in line.items():
            start = len(prompt)
            ids_P_n[p, first : first + start], position_P_n[p, first : first + start] = prompt, np.arange(start)
            behind = start if backbone.apart else behind
            for row in rows:
                inner = int(length_B[row]) - 1
                here = slice(behind, behind + inner)
                ids_P_n[p, here], position_P_n[p, here] = tokens_B_T[row, :inner], np.arange(start, start + inner)
                completions.append((len(prompts), behind, inner))
                places.append(p * n + np.concatenate(([first + start - 1], np.arange(behind, behind + inner))))
                behind += inner
            order += rows
            prompts.append((p, first, start))
            first += start
    view = None if backbone.apart else Packed(shape, split, prompts, completions, backbone.device)
    row_R = torch.tensor(order)
    length_R = rollouts.length_B[row_R]
    T = int(length_R.max())
    mask_R_T = torch.arange(T)[None] < length_R[:, None]
    target_N, sampled_R_T = rollouts.tokens_B_T[row_R, :T][mask_R_T], rollouts.logprob_B_T[row_R, :T]
    ids, position, place_N = map(torch.from_numpy, (ids_P_n, position_P_n, np.concatenate(places)))
    tensors = row_R, ids, position, mask_R_T, target_N, place_N, sampled_R_T
    return Pack(view, *(sent(tensor, backbone.device) for tensor in tensors))


def token_logprobs(backbone: Backbone, stack: AdapterStack | None, packed: Pack, temperature: float) -> Tensor:
    """Log-probability (nats) [R, T] of every completion token under the stack (None: the base model), 0 on padding.

    One forward pass. Gradients flow if enabled.
    """
    model, head = backbone.model, _plain_head(backbone)
    given: dict[str, Any] = {"input_ids": packed.ids_P_n, "position_ids": packed.position_P_n, "use_cache": False}
    if packed.view is not None:  # a mask of four axes is taken as it is; what counts is the view
        given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=backbone.device)
    with backbone.use(stack, packed.view):
        out = model(**given).logits if head is None else model.get_decoder()(**given).last_hidden_state
    # As an embedding: attempts share the place behind their prompt, and its gradient adds theirs in a fixed order.
    out_N_X = functional.embedding(packed.place_N, out.flatten(0, 1))
    if head is None:
        scaled_N_V = out_N_X.float() / temperature
        chosen_N = scaled_N_V.gather(1, packed.target_N[:, None])[:, 0] - scaled_N_V.logsumexp(-1)
    else:
        chosen_N = _ChosenLogprob.apply(out_N_X, head, packed.target_N, temperature)
    return torch.zeros(packed.mask_R_T.shape, device=backbone.device).masked_scatter(packed.mask_R_T, chosen_N)
