"""One frozen base model and the adapters stacked on it.

The policies are a tensor axis: every linear layer of the base holds, for the active `AdapterStack`, one slice per policy,
and rows of a batch are ordered by policy, equally many per policy. Rows of different policies never meet in a product. No
adapter at all is the base model, the reference of the KL term. Left out: adapters on embeddings and on the output layer,
Conv1D layers (GPT-2), fused expert tensors, routers.
"""

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from soar.config import ConfigError, ModelConfig
from soar.engine import attention
from soar.files import no_file

DAMAGE = (
    OSError, LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RecursionError, re.error, SafetensorError,
)  # fmt: skip
# Layers that one input passes through, one after another: joined, its low-rank products read it once
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Keys of PEFT's LoraConfig with which A and B alone, added everywhere, are another policy
NOT_PLAIN = ("alora_invocation_tokens", "use_dora", "lora_bias", "kasa_config", "use_bdlora", "modules_to_save")


@dataclass
class AdapterStack:
    """P adapters of one shape.

    tensors: `<module>.A` [P, in, rank] and `<module>.B` [P, rank, out] for lora, `<module>.delta` [P, in, out] for full,
    all float32. scale: factor on the low-rank product (alpha / rank); unused by full.
    """

    kind: str
    tensors: dict[str, Tensor]
    scale: float = 1.0
    _merged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ready: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def policies(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def select(self, policies: list[int]) -> "AdapterStack":
        """Detached copy of the named slices, in that order; a slice may be named more than once."""
        return AdapterStack(self.kind, {n: t.detach()[policies] for n, t in self.tensors.items()}, self.scale)

    def to(self, device: torch.device | str) -> "AdapterStack":
        """The same stack on a device: itself when it is there already."""
        if all(tensor.device == torch.device(device) for tensor in self.tensors.values()):
            return self
        return AdapterStack(self.kind, {n: t.detach().to(device) for n, t in self.tensors.items()}, self.scale)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: arrays, which Ray hands over in shared memory, read-only; no gradients."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.tensors.items()}
        return {"kind": self.kind, "tensors": arrays, "scale": self.scale, "_merged": {}, "_ready": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, tensors={n: torch.from_numpy(a.copy()) for n, a in state["tensors"].items()})

    def trainable(self) -> "AdapterStack":
        """Mark every tensor as a leaf that takes gradients; returns self."""
        for tensor in self.tensors.values():
            tensor.requires_grad_(True)
        return self

    def digest(self, policy: int = 0) -> str:
        """sha256 over one slice: equal exactly when every weight is equal bit for bit."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            sha.update(name.encode())
            sha.update(tensor[policy].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def apply(self, name: str, base: nn.Linear, x: Tensor) -> Tensor:
        """Output of the linear layer `name` for rows x [P*B, ..., in], ordered by policy."""
        x_P_N_I = x.reshape(self.policies, -1, x.shape[-1])
        if self.kind == "full":
            out_P_N_O = torch.bmm(x_P_N_I, self._full_weight(name, base).to(x.dtype))
            if base.bias is not None:
                out_P_N_O = out_P_N_O + base.bias
        elif type(base) is nn.Linear:
            return self.apply_joined({name: base}, x)[0]
        else:  # a layer with a forward pass of its own
            a_P_I_r, b_P_r_O = (self.tensors[f"{name}.{part}"].to(x.dtype) for part in "AB")
            out_P_N_O = base(x_P_N_I).baddbmm(torch.bmm(x_P_N_I, a_P_I_r), b_P_r_O, alpha=self.scale)
        return out_P_N_O.reshape(*x.shape[:-1], base.out_features)

    def apply_joined(self, layers: dict[str, nn.Linear], x: Tensor) -> list[Tensor]:
        """Outputs of linear layers of the same rows x [P*B, ..., in], as `apply` gives them one by one for lora."""
        parts = list[Tensor | None]()
        for name, base in layers.items():
            parts += [base.weight, base.bias, *(self.tensors[f"{name}.{part}"].to(x.dtype) for part in "AB")]
        out_G = _LowRank.apply(x.reshape(self.policies, -1, x.shape[-1]), self.scale, *parts)
        return [out.reshape(*x.shape[:-1], -1) for out in out_G]

    def _full_weight(self, name: str, base: nn.Linear) -> Tensor:
        """Base weight plus delta [P, in, out]; kept between calls while no gradient is taken (see `Backbone.use`)."""
        if torch.is_grad_enabled():
            return base.weight.T + self.tensors[f"{name}.delta"]
        merged = self._merged.get(name)  # one look: another thread that uses this stack may forget at any time
        if merged is None:
            merged = self._merged[name] = base.weight.T + self.tensors[f"{name}.delta"]
        return merged


class _LowRank(torch.autograd.Function):
    """x W^T + bias + scale (x A) B for frozen W, of several layers: the parts of a gradient are summed inside the products.

    parts: weight [O, I], bias, A [P, I, r] and B [P, r, O] of each layer.
    """

    @staticmethod
    def forward(ctx: Any, x_P_N_I: Tensor, scale: float, *parts: Any) -> tuple[Tensor, ...]:
        weights, biases, factors_a, factors_b = (parts[i::4] for i in range(4))
        a_P_I_R = torch.cat(factors_a, 2) if len(factors_a) > 1 else factors_a[0]  # no copy for one layer
        low_P_N_R = torch.bmm(x_P_N_I, a_P_I_R)
        ctx.save_for_backward(x_P_N_I, low_P_N_R, a_P_I_R, *weights, *factors_b)
        ctx.scale = scale
        layers = zip(weights, biases, low_P_N_R.chunk(len(weights), 2), factors_b, strict=True)
        return tuple(functional.linear(x_P_N_I, w, bias).baddbmm_(low, b, alpha=scale) for w, bias, low, b in layers)

    @staticmethod
    def backward(ctx: Any, *slope_G: Tensor) -> Any:
        (x_P_N_I, low_P_N_R, a_P_I_R, *rest), G = ctx.saved_tensors, len(slope_G)
        weights, factors_b, low_G, slope_x = rest[:G], rest[G:], low_P_N_R.chunk(G, 2), None
        back_P_N_R = torch.cat([torch.bmm(slope, b.mT) for slope, b in zip(slope_G, factors_b, strict=True)], 2)
        slope_a_G = torch.bmm(x_P_N_I.mT, back_P_N_R).mul_(ctx.scale).chunk(G, 2)
        slope_b_G = [torch.bmm(low.mT, slope).mul_(ctx.scale) for low, slope in zip(low_G, slope_G, strict=True)]
        if ctx.needs_input_grad[0]:
            slope_x = torch.matmul(slope_G[0], weights[0])
            for slope, weight in zip(slope_G[1:], weights[1:], strict=True):
                slope_x.flatten(0, 1).addmm_(slope.flatten(0, 1), weight)
            slope_x.baddbmm_(back_P_N_R, a_P_I_R.mT, alpha=ctx.scale)
        return slope_x, None, *(s for pair in zip(slope_a_G, slope_b_G, strict=True) for s in (None, None, *pair))


def concat(stacks: list[AdapterStack]) -> AdapterStack:
    """Stacks of one kind and shape joined along the policy axis (detached copy)."""
    first = stacks[0]
    tensors = {name: torch.cat([s.tensors[name].detach() for s in stacks]) for name in first.tensors}
    return AdapterStack(first.kind, tensors, first.scale)


class StackedLinear(nn.Module):
    """A frozen linear layer that adds, for each row, the slice of the stack that this thread has in use."""

    def __init__(self, name: str, base: nn.Linear, active: ContextVar[AdapterStack | None]) -> None:
        super().__init__()
        self.name, self.base, self._active = name, base, active
        self.behind: list[StackedLinear] = []  # what x passes through next (see `Backbone.join`)

    def forward(self, x: Tensor) -> Tensor:
        stack = self._active.get()
        given, out = (None, x) if stack is None else stack._ready.pop(self.name, (None, x))
        if given is x:  # the layer before gave its output
            return out
        if stack is not None and x.shape[0] % (policies := stack.policies):
            raise ValueError(f"{x.shape[0]} rows do not divide among {policies} policies; give each equally many")
        if stack is None or not self.behind:
            return self.base(x) if stack is None else stack.apply(self.name, self.base, x)
        out, *outs = stack.apply_joined({layer.name: layer.base for layer in (self, *self.behind)}, x)
        stack._ready |= {layer.name: (x, other) for layer, other in zip(self.behind, outs, strict=True)}
        return out


class Backbone:
    """The frozen base model with its wrapped linear layers and its tokenizer.

    layers: module name -> StackedLinear. end_ids: token ids that end a completion; end_id: the usual one.
    context: max positions. micro_batch_tokens: the config's, or what memory left of it. fused: `load.fuse`. lanes: of
    an update, `update.micro_batches`. apart: the model keeps its own attention (`attention.install`), so rows are not packed.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, fused: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.apart = not attention.install(model)
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.tokenizer, self.config, self.fused = tokenizer, config, fused
        self.device, self.dtype = model.device, model.dtype
        self._active: ContextVar[AdapterStack | None] = ContextVar("active", default=None)
        self.layers = self._wrap_linears()
        self.lanes = self.device.type == "cuda" and config.adapter == "lora"  # elsewhere a step would have other bits
        if self.lanes:
            self.join()
        self.micro_batch_tokens, self.recomputing = config.micro_batch_tokens, False
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.end_ids = _end_ids(model, tokenizer, self.vocabulary)
        self.end_id = min(self.end_ids)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
        words = len(tokenizer) - len({*tokenizer.all_special_ids})
        if words < 1 or len(tokenizer) > self.vocabulary:  # transformers makes up an empty one where there is none
            found = f"{len(tokenizer)} tokens in the tokenizer ({words} of text), {self.vocabulary} in the output layer"
            advice = "save the tokenizer that belongs to the model in its folder, or resize the embeddings first"
            raise ConfigError(f"model.path: {found}; {advice}")

    def _wrap_linears(self) -> dict[str, StackedLinear]:
        output_layer, targets = self.model.get_output_embeddings(), self.config.target_modules
        modules = self.model.named_modules()  # a router's forward pass gives more than its product
        linear = {n: m for n, m in modules if isinstance(m, nn.Linear) and "Router" not in type(m).__name__}
        every, ends = targets == ("all-linear",), tuple(f".{target}" for target in targets)
        chosen = {n: m for n, m in linear.items() if m is not output_layer and (every or f".{n}".endswith(ends))}
        if not chosen:
            linears = sorted({name.rsplit(".", 1)[-1] for name, m in linear.items() if m is not output_layer})
            found = f"model.target_modules = {list(targets)} names no linear layer of this model"
            here = f"linear layers here: {', '.join(linears) or 'none'}"
            raise ConfigError(f"{found}, so no adapter would train; {here}")
        wrapped = {name: StackedLinear(name, module, self._active) for name, module in chosen.items()}
        for name, layer in wrapped.items():
            self.model.set_submodule(name, layer)
        return wrapped

    def join(self) -> None:
        """From here on layers of one input learn together: it is read once, its gradients are summed in the products."""
        for first, *others in JOINED:
            for name, layer in self.layers.items():
                behind = [self.layers.get(name.removesuffix(first) + other) for other in others]
                if name.endswith(f".{first}") and all(x and type(x.base) is nn.Linear for x in (layer, *behind)):
                    layer.behind = [x for x in behind if x]

    @property
    def shapes(self) -> list[Any]:
        """The text model's config for each layer; in some models layers differ."""
        config = self.model.config.get_text_config()
        return list(getattr(config, "per_layer_config", [config] * config.num_hidden_layers))

    @contextmanager
    def use(self, stack: AdapterStack | None, view: attention.View | None = None) -> Iterator[None]:
        """Within the block, forward passes go through `stack` (None: the base model), and `view` says what tokens may see."""
        before, seen = self._active.set(stack), attention.current.set(view)
        try:
            yield
        finally:
            self._active.reset(before)
            attention.current.reset(seen)
            if stack is not None:
                stack._merged, stack._ready = {}, {}  # also what an error left

    def recompute(self) -> bool:
        """From here on gradient checkpointing of decoder layers; False when they recompute already, or are no list.

        transformers' own switch wants training mode, which would turn dropout on, and knows nothing of the adapters in use.
        """
        layers = getattr(self.model.get_decoder(), "layers", None)
        if self.recomputing or not isinstance(layers, nn.ModuleList):
            return False
        for layer in layers:
            layer.forward = partial(self._recomputed, layer.forward)
        self.recomputing = True
        return True

    def _recomputed(self, plain: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if self._active.get() is None or not torch.is_grad_enabled():
            return plain(*given, **named)
        here = copy_context()  # on a GPU the second time comes in autograd's own thread, which has nothing in use
        return checkpoint(here.run, plain, *given, use_reentrant=False, preserve_rng_state=False, **named)

    def new_stack(self, seed: int, policies: int = 1) -> AdapterStack:
        """Fresh adapters that change nothing yet: B = 0 (lora, A uniform in +-1/sqrt(in) as PEFT), delta = 0 (full)."""
        tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        rank = self.config.lora_rank
        for name, layer in self.layers.items():
            inputs, outputs = layer.base.in_features, layer.base.out_features
            if self.config.adapter == "full":
                tensors[f"{name}.delta"] = torch.zeros(policies, inputs, outputs, device=self.device)
                continue
            a_I_r = (torch.rand(inputs, rank, generator=generator) * 2 - 1) / math.sqrt(inputs)
            tensors[f"{name}.A"] = a_I_r.to(self.device).repeat(policies, 1, 1)
            tensors[f"{name}.B"] = torch.zeros(policies, rank, outputs, device=self.device)
        return AdapterStack(self.config.adapter, tensors, self.config.lora_alpha / rank)

    def base_digest(self) -> str:
        """sha256 over all base weights (names and bytes)."""
        return AdapterStack("full", {name: x[None] for name, x in self.model.state_dict().items()}).digest()


def _end_ids(model: Any, tokenizer: Any, vocabulary: int) -> frozenset[int]:
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids |= set(value) if isinstance(value, (list, tuple)) else {value} if value is not None else set()
    if not ids:
        raise ConfigError("model.path: neither model nor tokenizer names an end-of-text token (eos_token_id); set one")
    if strange := sorted(i for i in ids if i not in range(vocabulary)):
        found = f"eos_token_id {strange[0]} is none of the {vocabulary} tokens of the model's output layer"
        files = "generation_config.json, config.json and tokenizer_config.json"
        raise ConfigError(f"model.path: {found}; correct it in {files}")
    return frozenset(ids)


def peft_tensors(backbone: Backbone, stack: AdapterStack, policy: int) -> dict[str, Tensor]:
    """One slice under PEFT's names, on the CPU: A [rank, in], B [out, rank].

    A full delta is an exact LoRA of rank min(in, out): one factor is the identity.
    """
    weights: dict[str, Tensor] = {}
    for name in backbone.layers:
        if stack.kind == "lora":
            a_r_I, b_O_r = (stack.tensors[f"{name}.{part}"][policy].detach().T for part in "AB")
        else:
            delta_O_I = stack.tensors[f"{name}.delta"][policy].detach().T
            outputs, inputs = delta_O_I.shape
            square = torch.eye(min(inputs, outputs), device=delta_O_I.device)
            a_r_I, b_O_r = (square, delta_O_I) if inputs <= outputs else (delta_O_I, square)
        for part, tensor in (("A", a_r_I), ("B", b_O_r)):
            weights[f"base_model.model.{name}.lora_{part}.weight"] = tensor.contiguous().cpu()
    return weights


def load_adapter(backbone: Backbone, folder: Path) -> AdapterStack:
    """Read an adapter that `run.setup.save_adapter` wrote as one policy.

    With model.adapter = "lora" a lora of the same rank; with "full" any lora, multiplied out. Raises ConfigError for a folder
    without an adapter or with a damaged one, when a layer is missing or unknown, or a shape does not fit.
    """
    try:
        return _read_adapter(backbone, folder)
    except ConfigError:
        raise
    except DAMAGE as error:
        raise ConfigError(f"{folder}: no adapter that can be loaded ({type(error).__name__}: {error})") from error


def _read_adapter(backbone: Backbone, folder: Path) -> AdapterStack:
    from peft.utils.other import get_pattern_key  # a key may be a name's ending, or a regular expression for it

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if (why := no_file(folder / name)) is not None:  # a pipe would be waited for
            raise FileNotFoundError(f"{name} is {why}")
    weights = {name: tensor.float() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if (key := next((key for key in NOT_PLAIN if settings.get(key)), None)) is not None:
        why = "is no plain LoRA and would be read as one; give one without, or merge it into the base model"
        raise ConfigError(f"{folder}: an adapter with {key} = {settings[key]!r:.40} {why}")
    names = {f"base_model.model.{name}.lora_{part}.weight" for name in backbone.layers for part in "AB"}
    if strange := sorted(set(weights) - names):
        rest = f"{strange[0]} and {len(strange) - 1} more fit no layer that model.target_modules names"
        raise ConfigError(f"{folder}: {rest}; set model.target_modules as it was for this adapter")
    begun = str(settings.get("init_lora_weights")).lower()
    if begun.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        why = f"init_lora_weights = {begun!r:.40} changed the base weights as well, which are not in it"
        raise ConfigError(f"{folder}: {why}; save it anew, with PEFT's path_initial_model_for_weight_conversion")
    fresh = backbone.new_stack(seed=0)
    alpha, rank = float(settings["lora_alpha"]), float(settings["r"])
    alphas, ranks = settings.get("alpha_pattern") or {}, settings.get("rank_pattern") or {}
    for key in {*alphas, *ranks}:  # of a stranger's file, and matched against the name of every layer
        if re.search(r"\)[*+{]", key) or len(re.findall("[*+{]", key)) > 3:
            why = "repeats a group, or more than 3 times; give the layers' names"
            raise ConfigError(f"{folder}: the pattern {key!r:.80} {why}")
    root = math.sqrt if settings.get("use_rslora") else float
    if fresh.kind == "lora":
        fresh.scale = alpha / root(rank)
    for name, layer in backbone.layers.items():
        try:
            a_r_I, b_O_r = (weights[f"base_model.model.{name}.lora_{part}.weight"].to(backbone.device) for part in "AB")
        except KeyError as error:
            raise ConfigError(f"{folder}: no weights for layer {name}; the adapter belongs to another model") from error
        sizes, expected = (a_r_I.shape[1], b_O_r.shape[0]), (layer.base.in_features, layer.base.out_features)
        if sizes != expected:
            raise ConfigError(f"{folder}: layer {name} is {sizes} (in, out), expected {expected}; use its own model")
        own_alpha, own_rank = (of.get(get_pattern_key(of, name), most) for of, most in ((alphas, alpha), (ranks, rank)))
        scale = float(own_alpha) / root(float(own_rank))
        if fresh.kind == "full":
            fresh.tensors[f"{name}.delta"] = ((b_O_r @ a_r_I) * scale).T.contiguous()[None]
        elif len(a_r_I) != (wanted := backbone.config.lora_rank):
            raise ConfigError(f"{folder}: rank {len(a_r_I)}, expected model.lora_rank = {wanted}; set it to the file's")
        else:
            fresh.tensors[f"{name}.A"] = a_r_I.T.contiguous()[None]
            fresh.tensors[f"{name}.B"] = b_O_r.T.contiguous()[None] * (scale / fresh.scale)
    return fresh
