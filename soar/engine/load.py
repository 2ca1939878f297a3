"""From a config to a loaded base model: whether it fits its device, by arithmetic, and how transformers loads it.

The shape comes from config.json, the number of parameters from the headers of safetensors files where they are at hand,
else from the shape. A hub id is looked up in the local cache only. Nothing but `choose_*` and `load_backbone` needs torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soar.config import Config, ConfigError, ModelConfig, builtin_path
from soar.engine.memory import kept_values
from soar.types import UserError

if TYPE_CHECKING:
    import torch

    from soar.engine.policy import Backbone

GIB = 2**30
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5625}
"""Bytes of a weight. 4bit: four bits, and one float32 scale for 64 weights."""
TRAINED_BYTES = 16  # an adapter's weight, gradient and two AdamW moments, float32
LIGER = ("llama", "mistral", "qwen2", "qwen3", "gemma2")  # model types whose tokens were compared (tests/gpu)
TEMPLATE_SECONDS = 5.0
MEND_TEMPLATE = "mend the tokenizer's chat_template, or take a problems.format without turns (question_answer)"
ADAPTER_BESIDE = (
    "an adapter lies beside the base model (adapter_config.json), and every adapter would train on top of it; "
    "merge it (PEFT: merge_and_unload, save_pretrained) or move its files away"
)
SMALLEST_MICRO_BATCH = 1024  # tokens of one pass of the update, at least


class TooLarge(UserError):
    """A base model that does not fit its device; the message holds the arithmetic."""


def choose_device(name: str) -> torch.device:
    """`auto` -> cuda when present, else cpu. Raises ConfigError when a named CUDA device is absent."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}: torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` -> bfloat16 on a GPU that computes in it, else float32, and a GPU without it is told of in a warning."""
    import torch

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    warnings.warn(
        "this GPU does not compute in bfloat16: going on in float32, which takes twice the memory "
        '(model.dtype = "bfloat16" emulates it, slowly)',
        stacklevel=2,
    )
    return torch.float32


def resolve_path(path: str) -> str:
    """`builtin:NAME` -> folder inside the package, `~` -> home; anything else unchanged (a folder or a hub id)."""
    if not path.startswith("builtin:"):
        return os.path.expanduser(path)
    try:
        return str(builtin_path(path.removeprefix("builtin:")))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_backbone(config: ModelConfig) -> Backbone:
    """Load base model and tokenizer by transformers, in 8 or 4 bits where the config says so, freeze, wrap.

    Only safetensors or GGUF weights are read (`use_safetensors=True`), never pickled ones. Raises ConfigError with the
    reason, before the weights are read where that can be told.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from soar.engine.policy import Backbone

    logging.disable_progress_bar()  # loading takes seconds, and the run has its own progress
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    path = resolve_path(config.path)
    common: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    common |= {"gguf_file": config.gguf_file} if config.gguf_file else {"trust_remote_code": config.trust_remote_code}
    how = _quantized(config.quantization, dtype, device) | ({} if config.gguf_file else {"use_safetensors": True})
    _refuse_files(config)
    try:
        _refuse_class(path, common)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **common, **how)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"model.path = {config.path!r} cannot be loaded: {error}") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub id: of a folder it was seen before
        raise ConfigError(f"model.path = {config.path!r}: {ADAPTER_BESIDE}")
    if config.quantization == "none":
        model = model.to(device)
    _bound_template(tokenizer)
    return Backbone(model, tokenizer, config, fuse(model, config.fused_kernels))


def _refuse_files(config: ModelConfig) -> None:
    """Raises ConfigError for a model.path on this machine that is not there, or not a base model alone."""
    folder, given = Path(resolve_path(config.path)), f"model.path = {config.path!r}"
    if not folder.is_dir():
        if folder.is_absolute() or config.path.startswith((".", "~")) or config.gguf_file:
            raise ConfigError(f"{given}: there is no such folder")
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{given}: {ADAPTER_BESIDE}")
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if config.gguf_file is None and names and not (folder / "config.json").is_file():
        raise ConfigError(f"{given} holds {len(names)} GGUF files; set model.gguf_file to one of {', '.join(names)}")
    if config.gguf_file is not None and config.gguf_file not in names:
        there = f"GGUF files there: {', '.join(names) or 'none'}"
        raise ConfigError(f"model.gguf_file = {config.gguf_file!r}: no such file in {folder}; {there}")
    if config.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ConfigError('model.gguf_file: the package gguf is not installed; pip install "soar-rl[train,gguf]"')


def _refuse_class(path: str, common: dict[str, Any]) -> None:
    """Raises ValueError for a kind of model whose forward pass takes no cache or positions, by its config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, **common)
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)  # None: code of its own
    takes = inspect.signature(kind.forward).parameters if hasattr(kind, "forward") else {}
    if missing := [name for name in ("past_key_values", "position_ids") if takes and name not in takes]:
        raise ValueError(
            f"{kind.__name__} (model_type {config.model_type}) takes no {' and no '.join(missing)}, which sampling and "
            "training need; take a model with attention, alone or among layers that keep a state"
        )


class _TooLong(BaseException):
    """Raised inside a chat template that does not end."""


def _bound_template(tokenizer: Any) -> None:
    """Make the tokenizer's chat template end: in TEMPLATE_SECONDS, and with a ConfigError in place of what it raises."""
    plain = tokenizer.apply_chat_template

    def bounded(*given: Any, **named: Any) -> Any:
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.extend((plain(*given, **named), None))
            except (Exception, _TooLong) as error:
                outcome.extend((None, error))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(TEMPLATE_SECONDS)
        if not outcome:  # a template is Python code of loops, so an exception set from outside reaches it
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLong))
            thread.join(TEMPLATE_SECONDS)
            raise ConfigError(f"model.path: the chat template did not end in {TEMPLATE_SECONDS} s; {MEND_TEMPLATE}")
        text, error = outcome
        if error is not None:
            raise ConfigError(f"model.path: the chat template fails: {error!r:.300}; {MEND_TEMPLATE}") from error
        return text

    tokenizer.apply_chat_template = bounded


def fuse(model: Any, wanted: str) -> bool:
    """Put our norm and, where it is installed and knows the type, liger-kernel's rotary and gated product into `model`.

    Nothing for `off` or without a GPU. Returns whether liger's are in it. Logits of a short text are compared before and
    after; raises ConfigError when they differ by more than rounding.
    """
    import torch

    from soar.engine import kernels

    weight = next(model.parameters())
    if wanted == "off" or not weight.is_cuda:
        return False
    # Not the first ids: those are special tokens, on a row of which a bfloat16 model amplifies rounding without end.
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0)).to(weight.device)
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]  # as in Llama: w * (x / rms)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.float()
        liger = _liger(model)
        if kernels.available(weight):
            for module in norms:
                module.forward = partial(_norm, module)
        after = model(input_ids=ids, use_cache=False).logits.float()
    gap, limit = (before - after).abs().max().item(), 0.15 if weight.dtype == torch.bfloat16 else 1e-3
    if not gap <= limit * max(1.0, before.abs().max().item()):
        raise ConfigError(
            f"fused kernels change the logits of this {model.config.model_type} model by {gap:.3g}; "
            'set model.fused_kernels = "off"'
        )
    return liger


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    from soar.engine import kernels

    return kernels.RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _liger(model: Any) -> bool:
    """liger-kernel into this model; False where it is not there or does not know the type."""
    if model.config.model_type not in LIGER or not importlib.util.find_spec("liger_kernel"):
        return False
    try:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    except ImportError as error:
        warnings.warn(f"liger-kernel cannot be used, going on without: {error}; install another version", stacklevel=2)
        return False
    module = sys.modules[type(model).__module__]
    names, rotary = dict(vars(module)), "apply_rotary_pos_emb"
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    plain, fused = names[rotary], getattr(module, rotary)
    # Liger also changes names in the module, which other models share: they are put back, or choose by the device.
    names[rotary] = lambda q, *more, **named: (fused if q.is_cuda else plain)(q, *more, **named)
    vars(module).update(names)
    return True


def _quantized(bits: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers loads a base in fewer bits: LLM.int8, or NF4 as in QLoRA. Raises ConfigError."""
    if bits == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'model.quantization = "{bits}": bitsandbytes is not installed; pip install bitsandbytes, or set "none"'
        )
    from transformers import BitsAndBytesConfig

    small = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": small, "device_map": {"": device}}


@dataclass(frozen=True)
class ModelShape:
    """What memory and speed depend on. source: where it was read. parameters: of the whole model; 0: counted as Llama's."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    source: str
    parameters: int = 0

    def __post_init__(self) -> None:
        if not self.parameters:  # embeddings, linear layers, norms
            ends = self.vocabulary * self.hidden * (1 if self.tied else 2)
            norms = (2 * self.layers + 1) * self.hidden
            object.__setattr__(self, "parameters", self.linear_parameters + norms + ends)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the decoder layers: a full adapter, and what quantization makes smaller."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * q + 2 * kv + 3 * self.inner)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of one adapter of that rank on every linear layer but the output."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return rank * self.layers * (4 * self.hidden + 2 * q + 2 * kv + 3 * (self.hidden + self.inner))

    def cache_bytes(self, tokens: float, bytes_each: float) -> float:
        """Keys and values of one row with so many tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * bytes_each


LLAMA = {
    "3B": ModelShape(28, 3072, 8192, 24, 8, 128, 128256, True, "Llama-3.2-3B"),
    "8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False, "Llama-3.1-8B"),
    "70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, False, "Llama-3.1-70B"),
}


def named_size(path: str) -> float | None:
    """Parameters by the size in a model's name: `Llama-3.2-3B-Instruct` -> 3e9; None where there is none."""
    name = path.rstrip("/").rpartition("/")[2]
    match = re.search(r"(?<![\w.])(\d{1,4}(?:\.\d{1,3})?)([bBmM])(?![a-zA-Z0-9])", name)
    return None if match is None else float(match[1]) * {"b": 1e9, "m": 1e6}[match[2].lower()]


def guessed(parameters: float) -> ModelShape:
    """A shape for a size alone: Llama-3.2-3B with depth and widths scaled by the cube root of the size."""
    like, source = LLAMA["3B"], "guessed from the size in the model's name"
    factor = (parameters / like.parameters) ** (1 / 3)
    scaled = ("layers", "hidden", "inner", "heads", "kv_heads")
    sizes = {name: max(1, round(getattr(like, name) * factor)) for name in scaled}
    return replace(like, **sizes, parameters=int(parameters), source=source)


def model_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder with a model's config.json: a folder, `builtin:NAME`, or a hub id in the local cache; else None."""
    try:
        folder = Path(resolve_path(path))
        if (folder / "config.json").is_file():
            return folder
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except (ImportError, ValueError):
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def read_shape(folder: Path) -> ModelShape | None:
    """The shape that a folder's config.json gives, parameters as exactly as its files tell; None when it tells too little."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        shape = ModelShape(
            int(config["num_hidden_layers"]),
            hidden,
            int(config.get("intermediate_size") or 4 * hidden),
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or hidden // heads),
            int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings", True)),
            "config.json",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    stored = _stored_parameters(folder)
    if stored is None:
        return shape
    return replace(shape, parameters=stored, source="config.json and the headers of the weight files")


def _stored_parameters(folder: Path) -> int | None:
    """Parameters in the folder's safetensors files, by their headers; None when files are missing or damaged."""
    from safetensors import SafetensorError, safe_open

    names = {path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter")}
    index = folder / "model.safetensors.index.json"
    total = 0
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            with safe_open(folder / name, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    return total or None


def shape_of(config: Config) -> ModelShape | None:
    """The shape of a config's model: its own files, else guessed from the size in its name, else None."""
    folder, named = model_folder(config.model.path, config.model.revision), named_size(config.model.path)
    shape = read_shape(folder) if folder is not None else None
    return shape or (None if named is None else guessed(named))


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs on its device.

    weights: of the frozen base. adapters: of `policies` adapters with gradients and moments. cache_row: keys and values of
    one row with `row_tokens` tokens. activations: of the smallest pass of the update, `pass_tokens`. rows: of one
    sampling call of all students.
    """

    shape: ModelShape
    kind: str
    weights: float
    policies: int
    adapters: float
    row_tokens: int
    cache_row: float
    rows: int
    pass_tokens: int
    activations: float

    @property
    def least(self) -> float:
        """With one row sampled at a time and the smallest pass of the update."""
        return self.weights + self.adapters + max(self.cache_row, self.activations)

    def lines(self) -> list[str]:
        """The arithmetic as text."""
        shape, each = self.shape, self.weights / self.shape.parameters
        one = self.adapters / self.policies
        return [
            f"  weights      {self.weights / GIB:8.2f} GiB   {shape.parameters:,} parameters x {each:.3g} bytes "
            f"({self.kind}; {shape.source})",
            f"  adapters     {self.adapters / GIB:8.2f} GiB   {self.policies} policies x {one / TRAINED_BYTES:,.0f} "
            f"parameters x {TRAINED_BYTES} bytes (weight, gradient, two moments in float32)",
            f"  KV cache     {self.cache_row * self.rows / GIB:8.2f} GiB   {self.rows:,} rows x {self.row_tokens:,} tokens x "
            f"{self.cache_row / self.row_tokens:,.0f} bytes; less in smaller batches, {self.cache_row / GIB:.4f} a row",
            f"  activations  {self.activations / GIB:8.2f} GiB   at least: {self.pass_tokens:,} tokens of one pass x "
            f"{self.activations / self.pass_tokens:,.0f} bytes",
            f"  least        {self.least / GIB:8.2f} GiB   weights, adapters, and one row or one smallest pass",
        ]


def memory_of(config: Config, shape: ModelShape, prompt_tokens: int, kind: str = "") -> Memory:
    """What a run needs. kind: type of the weights as loaded; "": by model.dtype and model.device.

    Policies: the students trained at once (model.chunk, or all), teacher and baseline. Quantization covers the linear
    layers of the decoder; embeddings, norms and the output layer keep their type.
    """
    model, student = config.model, config.student
    kind = kind or (model.dtype if model.dtype != "auto" else "float32" if model.device == "cpu" else "bfloat16")
    plain = BYTES[kind]
    weights = shape.parameters * plain
    if model.quantization != "none":
        weights -= shape.linear_parameters * (plain - BYTES[model.quantization])
        kind = f"{model.quantization} in the layers, {kind} elsewhere"
    students = config.teacher.datasets * student.repeats
    policies = (min(students, model.chunk) if model.chunk else students) + 2
    one = shape.linear_parameters if model.adapter == "full" else shape.adapter_parameters(model.lora_rank)
    tokens = prompt_tokens + max(student.sampling.max_tokens, config.teacher.sampling.max_tokens)
    pass_tokens = model.micro_batch_tokens or SMALLEST_MICRO_BATCH
    recompute = model.gradient_checkpointing == "on"
    return Memory(
        shape,
        kind,
        weights,
        policies,
        policies * one * TRAINED_BYTES,
        tokens,
        shape.cache_bytes(tokens, plain),
        students * student.prompts_per_step * student.attempts,
        pass_tokens,
        pass_tokens * kept_values(shape.layers, shape.hidden, shape.inner, recompute) * plain,
    )


def check_fits(config: Config, available: int | None, device: str) -> None:
    """Refuse a base model that cannot work in so many bytes: with one student trained and one row sampled at a time.

    A shape that the files do not tell, or memory that the system does not tell, is no reason to refuse. Raises TooLarge.
    """
    folder = model_folder(config.model.path, config.model.revision)
    shape = read_shape(folder) if folder is not None else None
    if shape is None or available is None:
        return
    # What the update comes to when memory runs out: one student, gradient checkpointing unless it is off.
    way = "off" if config.model.gradient_checkpointing == "off" else "on"
    least = config.model.model_copy(update={"chunk": 1, "gradient_checkpointing": way})
    alone = config.model_copy(update={"model": least})
    kind = "float32" if device == "cpu" and config.model.dtype == "auto" else ""
    needed = memory_of(alone, shape, 1, kind)
    if needed.least <= available:
        return
    smaller = []
    for name in ("8bit", "4bit"):
        if config.model.quantization == "none" and config.model.adapter == "lora":
            model = alone.model.model_copy(update={"quantization": name})
            needs = memory_of(alone.model_copy(update={"model": model}), shape, 1, kind).least
            smaller.append(f'model.quantization = "{name}" needs {needs / GIB:.1f} GiB')
    raise TooLarge(
        f"model.path = {config.model.path!r} does not fit {device}, which has {available / GIB:.1f} GiB free, even with one "
        f"student trained and one row sampled at a time:\n"
        + "\n".join(needed.lines())
        + "\n".join(["\nTake a larger device, a smaller model or a smaller model.micro_batch_tokens", *smaller])
        + "\nOne process trains on one device: model.vllm_devices divides sampling alone."
    )


def machine_bytes() -> int | None:
    """Memory of this machine, or of the control group that this process is limited to; None where it is not told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
