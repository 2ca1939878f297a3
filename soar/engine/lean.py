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
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from soar.engine import kernels
from soar.engine.adapted import join_weights
from soar.engine.attention import StaticLayer, Window, decoding, grouped_attention, static_cache
from soar.engine.layer_kernels import HeadNorm, enter, norm
from soar.engine.policy import AdapterStack, Backbone, StackedLinear
from soar.engine.products import Adapters, by_kernel, gated, project

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of the largest logit
LANE_ROWS = 1024  # rows of a lane, at least: with fewer its products no longer fill the device


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


@dataclass
class Lane:
    """The rows `rows` of a step, on their way through the layers on a stream of their own (None: the current one)."""

    rows: slice
    x_R_N: Tensor
    cos_R_D: Tensor
    sin_R_D: Tensor
    window: Window
    joined: dict[int, Adapters]
    stream: Any = None


class LeanModel:
    """The decoding step of one backbone; made by `lean_of`.

    lanes: 2: the rows go in two halves, on a GPU on two streams, so that the attention of one half, which waits for
    memory, runs beside the products of the other. early: a kernel may start while the one before it ends. None: as
    `way_of` says; a test or benchmark sets them.
    """

    lanes: int | None = None
    early: bool | None = None

    def __init__(self, backbone: Backbone, layers: list[LeanLayer]) -> None:
        self.backbone, self.layers = backbone, layers
        self.decoder = backbone.model.get_decoder()
        config = backbone.model.config
        self.heads = config.num_attention_heads
        self.head = backbone.model.get_output_embeddings()
        self._streams: list[Any] = []
        # Products of cuBLAS stay on one stream: two lanes would read a large weight twice, and it knows no early start.
        self._ours = all(
            by_kernel(torch.empty(0, part.weight_N_K.shape[1], dtype=backbone.dtype, device=backbone.device),
                      part.weight_N_K, part.sizes)
            for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )  # fmt: skip
        self._major = torch.cuda.get_device_capability(backbone.device)[0] if self._ours else 0

    def way(self, rows: int, policies: int) -> tuple[int, bool]:
        """(lanes, early) of a step with so many rows."""
        lanes, early = way_of(rows, policies, self._ours, self._major)
        return lanes if self.lanes is None else self.lanes, early if self.early is None else self.early

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
        policies = held.policies if held is not None else 1
        count, early = self.way(len(x_R_N), policies)
        lanes = self._cut(count, x_R_N[:, 0], cos[:, 0], sin[:, 0], window, joined, policies)
        weight, last = self.head.weight, self.decoder.norm
        if len(lanes) == 1:
            (lane,) = lanes
            for layer, kept in zip(self.layers, cache, strict=True):
                self._layer(layer, kept, lane, place_1, early)
            normed_R_N = norm(lane.x_R_N, last.weight, last.variance_epsilon, early)
            return functional.linear(normed_R_N, weight, self.head.bias)
        logits_R_V = x_R_N.new_empty(len(x_R_N), len(weight))
        for lane in lanes:
            _behind(lane.stream, _current(lane.stream))
        for layer, kept in zip(self.layers, cache, strict=True):
            for lane in lanes:
                self._layer(layer, kept, lane, place_1, early)
        for lane in lanes:
            with _on(lane.stream):
                normed_R_N = norm(lane.x_R_N, last.weight, last.variance_epsilon, early)
                torch.mm(normed_R_N, weight.T, out=logits_R_V[lane.rows])
        for lane in lanes:
            _behind(_current(lane.stream), lane.stream)
        return logits_R_V if self.head.bias is None else logits_R_V.add_(self.head.bias)

    def _cut(
        self,
        count: int,
        x_R_N: Tensor,
        cos_R_D: Tensor,
        sin_R_D: Tensor,
        window: Window,
        joined: dict[int, Adapters],
        policies: int,
    ) -> list[Lane]:
        """The rows as lanes: all of them, or two halves where the policies can be halved."""
        R = len(x_R_N)
        if count == 1 or R % 2 or (policies > 1 and policies % 2):
            return [Lane(slice(0, R), x_R_N, cos_R_D, sin_R_D, window, joined)]
        if x_R_N.is_cuda and not self._streams:
            # The products go first: they are short, and the next of them waits for each.
            self._streams = [torch.cuda.Stream(priority=p) for p in (-1, -1, 0)]
        found = []
        for i in range(2):
            rows = slice(i * R // 2, (i + 1) * R // 2)
            own = joined
            if policies > 1:
                half = slice(i * policies // 2, (i + 1) * policies // 2)
                own = {
                    key: Adapters(each.a_P_K_W[half], each.b_P_W_N[half], each.rank, each.scale)
                    for key, each in joined.items()
                }
            seen = Window(window.start_B[rows], window.filled_1)
            stream = self._streams[i] if self._streams else None
            found.append(Lane(rows, x_R_N[rows], cos_R_D[rows], sin_R_D[rows], seen, own, stream))
        return found

    def _layer(self, layer: LeanLayer, kept: StaticLayer, lane: Lane, place_1: Tensor, early: bool) -> None:
        """One layer of the rows of a lane; lane.x_R_N becomes its output."""
        joined = lane.joined
        assert kept.keys is not None and kept.values is not None
        key, value = kept.keys[lane.rows], kept.values[lane.rows]

        def times(part: Joined, given: Tensor, residual: Tensor | None, early: bool) -> Tensor:
            return project(given, part.weight_N_K, part.bias_N, joined.get(id(part)), part.sizes, residual, early)

        with _on(lane.stream):
            normed_R_N = norm(lane.x_R_N, layer.first_norm.weight, layer.first_norm.variance_epsilon, early)
            qkv_R_N = times(layer.qkv, normed_R_N, None, early)
            query = enter(qkv_R_N, lane.cos_R_D, lane.sin_R_D, key, value, place_1, self.heads, layer.head_norm, early)
            seen = query.new_empty(len(query), 1, *query.shape[1:2], query.shape[3]) if query.is_cuda else None
        # Attention of all lanes is one after another on a stream of its own: beside it run products, not attention.
        alone = lane.stream is None
        attending = None if alone else self._streams[2]
        _behind(attending, lane.stream)
        with _on(attending):
            seen = self._attend(layer, query, key, value, lane.window, seen, early and alone)
        _behind(lane.stream, attending)
        with _on(lane.stream):
            x_R_N = times(layer.out, seen.reshape(len(query), -1), lane.x_R_N, early and alone)
            normed_R_N = norm(x_R_N, layer.second_norm.weight, layer.second_norm.variance_epsilon, early)
            part = layer.gate_up
            inner_R_M = gated(normed_R_N, part.weight_N_K, joined.get(id(part)), early)
            lane.x_R_N = times(layer.down, inner_R_M, x_R_N, early)

    def _attend(
        self,
        layer: LeanLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window,
        out: Tensor | None,
        early: bool,
    ) -> Tensor:
        """Attention of the new token [R, 1, H, D]; out: memory for it, of the stream that reads it (on a GPU)."""
        scale, sliding = layer.attention.scaling, layer.sliding
        if kernels.available(query):
            return kernels.decode_attention(
                query, key, value, window.start_B, window.filled_1, scale, None, sliding, out, early
            )
        with decoding(window):
            return grouped_attention(layer.attention, query, key, value, None, scaling=scale, sliding_window=sliding)[0]


def _current(stream: Any) -> Any:
    return None if stream is None else torch.cuda.current_stream()


def _behind(stream: Any, other: Any) -> None:
    """What comes on `stream` waits for what is on `other` now."""
    if stream is not None:
        stream.wait_stream(other)


def _on(stream: Any) -> Any:
    """What comes in this block goes to `stream`; None: to the current one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def way_of(rows: int, policies: int, ours: bool, major: int) -> tuple[int, bool]:
    """(lanes, early) of a step, by what was faster on an H200 (docs/performance.md).

    ours: all products of the layers are made by the kernels of products.py; major: compute capability of the device, which
    knows early starts from 9 on. Two lanes take rows for both, and policies that can be halved (or rows of one).
    """
    if not ours:
        return 1, False
    halves = (policies <= 1 or policies % 2 == 0) and rows >= 2 * LANE_ROWS
    return 2 if halves else 1, major >= 9


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
