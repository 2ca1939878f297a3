"""A decoding step of llama-like models in eight kernels a layer, adapters included.

transformers' own forward pass launches some thirty small kernels a layer with adapters. This is the same step for the
model types whose layers are known here: query, key and value are one product, and so are gate and up; adapters, bias,
residual sum and gated product happen inside those products (products.py), rotary embedding and cache entry in one kernel
(layer_kernels.py). The joined weights take the place of the layers' own, which become views of them: no second copy.
Models of other types, and layers with anything unusual, are left to transformers: `lean_of` gives None. What a new model
computes is compared with transformers' once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from soar.adapted import join_weights
from soar.attention import StaticLayer, Window, decoding, grouped_attention, static_cache
from soar.layer_kernels import HeadNorm, enter, norm
from soar.policy import AdapterStack, Backbone, StackedLinear
from soar.products import Adapters, gated, project

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of the largest logit


@dataclass(frozen=True)
class Joined:
    """Linear layers that read the same input, as one: weight_N_K, bias_N, columns and adapter name of each part."""

    weight_N_K: Tensor
    bias_N: Tensor | None
    sizes: list[int]
    names: list[str | None]


@dataclass(frozen=True)
class LeanLayer:
    """What a decoder layer consists of."""

    attention: Any
    first_norm: Any
    second_norm: Any
    qkv: Joined
    out: Joined
    gate_up: Joined
    down: Joined
    head_norm: HeadNorm | None
    sliding: int | None


@dataclass
class HeldStack(AdapterStack):
    """Adapters in the compute type at fixed addresses; `tensors` are views of the joined ones, by first part's name."""

    joined: dict[int, Adapters] = field(default_factory=dict)


class LeanModel:
    """The decoding step of one backbone; made by `lean_of`."""

    def __init__(self, backbone: Backbone, layers: list[LeanLayer]) -> None:
        self.backbone, self.layers = backbone, layers
        self.decoder = backbone.model.get_decoder()
        config = backbone.model.config
        self.heads = config.num_attention_heads
        self.head = backbone.model.get_output_embeddings()

    def hold(self, stack: AdapterStack) -> HeldStack:
        """Buffers for a stack of this shape, filled by whoever holds it: every tensor is a view of its joined one."""
        rank = next(t.shape[2] for name, t in stack.tensors.items() if name.endswith(".A"))
        held = HeldStack(stack.kind, {}, stack.scale)
        for layer in self.layers:
            for part in (layer.qkv, layer.out, layer.gate_up, layer.down):
                if not any(part.names):
                    continue
                outputs, inputs = part.weight_N_K.shape
                width, kind = rank * len(part.names), self.backbone.dtype
                a_P_K_W = torch.zeros(stack.policies, inputs, width, dtype=kind, device=self.backbone.device)
                b_P_W_N = torch.zeros(stack.policies, width, outputs, dtype=kind, device=self.backbone.device)
                held.joined[id(part)] = Adapters(a_P_K_W, b_P_W_N, rank, stack.scale)
                first = 0
                for i, (name, size) in enumerate(zip(part.names, part.sizes, strict=True)):
                    low = slice(i * rank, (i + 1) * rank)
                    if name is not None:
                        held.tensors[f"{name}.A"] = a_P_K_W[:, :, low]
                        held.tensors[f"{name}.B"] = b_P_W_N[:, low, first : first + size]
                    first += size
        return held

    def logits(
        self,
        token_R_1: Tensor,
        position_R_1: Tensor,
        cache: list[StaticLayer],
        window: Window,
        place_1: Tensor,
        held: AdapterStack | None,
    ) -> Tensor:
        """Logits [R, V] of one new token a row, which enters the cache at `place_1`; held: of `hold`, or None."""
        joined = held.joined if isinstance(held, HeldStack) else {}
        x_R_N = self.decoder.embed_tokens(token_R_1)
        cos, sin = self.decoder.rotary_emb(x_R_N, position_ids=position_R_1)
        cos_R_D, sin_R_D, x_R_N = cos[:, 0], sin[:, 0], x_R_N[:, 0]
        for layer, kept in zip(self.layers, cache, strict=True):
            x_R_N = self._layer(layer, kept, x_R_N, cos_R_D, sin_R_D, window, place_1, joined)
        last = self.decoder.norm
        return functional.linear(norm(x_R_N, last.weight, last.variance_epsilon), self.head.weight, self.head.bias)

    def _layer(
        self,
        layer: LeanLayer,
        kept: StaticLayer,
        x_R_N: Tensor,
        cos_R_D: Tensor,
        sin_R_D: Tensor,
        window: Window,
        place_1: Tensor,
        joined: dict[int, Adapters],
    ) -> Tensor:
        def times(part: Joined, given: Tensor, residual: Tensor | None = None) -> Tensor:
            return project(given, part.weight_N_K, part.bias_N, joined.get(id(part)), part.sizes, residual)

        assert kept.keys is not None and kept.values is not None
        normed_R_N = norm(x_R_N, layer.first_norm.weight, layer.first_norm.variance_epsilon)
        qkv_R_N = times(layer.qkv, normed_R_N)
        query = enter(qkv_R_N, cos_R_D, sin_R_D, kept.keys, kept.values, place_1, self.heads, layer.head_norm)
        with decoding(window):
            scale, sliding = layer.attention.scaling, layer.sliding
            seen, _ = grouped_attention(
                layer.attention,
                query,
                kept.keys,
                kept.values,
                None,
                scaling=scale,
                sliding_window=sliding,
            )
        x_R_N = times(layer.out, seen.reshape(len(x_R_N), -1), x_R_N)
        normed_R_N = norm(x_R_N, layer.second_norm.weight, layer.second_norm.variance_epsilon)
        inner_R_M = gated(normed_R_N, layer.gate_up.weight_N_K, joined.get(id(layer.gate_up)))
        return times(layer.down, inner_R_M, x_R_N)


def lean_of(backbone: Backbone) -> LeanModel | None:
    """The lean step of this model, compared once with transformers' own; None where it does not apply or agree."""
    if not hasattr(backbone, "lean"):
        backbone.lean = _make(backbone)  # type: ignore[attr-defined]
    return backbone.lean  # type: ignore[attr-defined]


def _make(backbone: Backbone) -> LeanModel | None:
    model = backbone.model
    if model.config.model_type not in KNOWN or getattr(model.config, "hidden_act", "") != "silu":
        return None
    every = list(model.get_decoder().layers)
    try:
        parts = [found for layer in every if (found := _parts(layer)) is not None]
    except AttributeError:
        return None
    if len(parts) < len(every):
        return None
    lean = LeanModel(backbone, [_join(layer, found) for layer, found in zip(every, parts, strict=True)])
    gap, limit = _gap(lean)
    if not gap <= limit:
        warnings.warn(
            f"the fused decoding step differs from transformers' by {gap:.3g} in a logit of this "
            f"{model.config.model_type} model (at most {limit:.3g} is rounding); decoding goes the plain, slower way",
            stacklevel=2,
        )
        return None
    return lean


def _parts(layer: Any) -> dict[str, list[Any]] | None:
    """The linear layers of a decoder layer by joined product; None where one is not a plain linear layer."""
    attention, mlp = layer.self_attn, layer.mlp
    found = {
        "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
        "out": [attention.o_proj],
        "gate_up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }
    linears = [getattr(m, "base", m) for group in found.values() for m in group]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    plain = all(type(m) is nn.Linear for m in linears) and all(hasattr(n, "variance_epsilon") for n in norms)
    biased = any(getattr(m, "base", m).bias is not None for m in found["gate_up"])
    same = len({getattr(m, "base", m).bias is None for m in found["qkv"]}) == 1
    return found if plain and same and not biased else None


def _join(layer: Any, parts: dict[str, list[Any]]) -> LeanLayer:
    attention, config = layer.self_attn, layer.self_attn.config
    sliding = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    head_norm = None
    if hasattr(attention, "q_norm"):
        head_norm = HeadNorm(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    joined = {name: _joined(modules) for name, modules in parts.items()}
    return LeanLayer(
        attention, layer.input_layernorm, layer.post_attention_layernorm, joined["qkv"], joined["out"],
        joined["gate_up"], joined["down"], head_norm, sliding,
    )  # fmt: skip


def _joined(modules: list[Any]) -> Joined:
    """The modules as one; their weights become views of the joined weight."""
    linears: list[nn.Linear] = [getattr(m, "base", m) for m in modules]
    names = [m.name if isinstance(m, StackedLinear) else None for m in modules]
    sizes = [linear.out_features for linear in linears]
    if len(linears) == 1:
        return Joined(linears[0].weight.data, linears[0].bias, sizes, names)
    weight_N_K = join_weights(linears)
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return Joined(weight_N_K, torch.cat(biases) if biases else None, sizes, names)


@torch.no_grad()
def _gap(lean: LeanModel) -> tuple[float, float]:
    """(largest difference of a logit from transformers' own, what rounding may explain) for a short text."""
    backbone, length = lean.backbone, 4
    config, device = backbone.model.config, backbone.device
    ids_2_S = torch.arange(2 * length, device=device).view(2, length) % backbone.vocabulary
    place_1 = torch.zeros(1, dtype=torch.long, device=device)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (2, config.num_key_value_heads, 64, head_dim)

    def layer() -> StaticLayer:
        keys, values = (torch.zeros(shape, dtype=backbone.dtype, device=device) for _ in range(2))
        return StaticLayer(keys, values, place_1)

    cache = static_cache(config, [layer() for _ in lean.layers])
    start_2 = torch.zeros(2, dtype=torch.int32, device=device)
    gap = largest = 0.0
    with backbone.use(None):
        wanted_2_S_V = backbone.model(input_ids=ids_2_S, use_cache=False).logits.float()
    for place in range(length):
        window = Window(start_2, torch.full((1,), place + 1, dtype=torch.int32, device=device))
        position = place_1[None].expand(2, 1)
        found_2_V = lean.logits(ids_2_S[:, place : place + 1], position, list(cache.layers), window, place_1, None)
        gap = max(gap, (found_2_V.float() - wanted_2_S_V[:, place]).abs().max().item())
        largest = max(largest, wanted_2_S_V[:, place].abs().max().item())
        place_1 += 1
    return gap, TOLERANCE.get(backbone.dtype, 0.05) * max(1.0, largest)
