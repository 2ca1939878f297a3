"""From a config to a loaded base model: its device, and how transformers loads it."""

import importlib.util
import inspect
import math
import os
import re
import resource
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from soar.config import ConfigError, ModelConfig, resolve_path
from soar.engine import kernels
from soar.engine.memory import GIB, is_out_of_memory
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import next_logits
from soar.files import asset

T = TypeVar("T")
LIGER = ("llama", "mistral", "qwen2", "qwen3", "gemma2")  # model types whose tokens were compared (tests/gpu)
TEMPLATE_SECONDS, TEMPLATE_BYTES = 5.0, GIB
MEND_TEMPLATE = "mend the tokenizer's chat_template, or take a problems.format without turns (question_answer)"
ADAPTER_BESIDE = (
    "an adapter lies beside the base model (adapter_config.json), and every adapter would train on top of it; "
    "merge it (PEFT: merge_and_unload, save_pretrained) or move its files away"
)


def choose_device(name: str) -> torch.device:
    """`auto` -> cuda when present, else cpu. Raises ConfigError for no device's name, or when a CUDA device is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]{1,2})?", name):
        raise ConfigError(f"model.device = {name!r}: expected auto, cpu, cuda or cuda:N")
    device, seen = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        few = f" of that number, only {seen}" if seen else ""
        raise ConfigError(f"model.device = {name!r}: torch sees no CUDA device{few}; use auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` -> bfloat16 on a GPU that computes in it, else float32, and a GPU without it is told of in a warning."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        how = 'going on in float32, which takes twice the memory (model.dtype = "bfloat16" emulates it, slowly)'
        warnings.warn(f"this GPU does not compute in bfloat16: {how}", stacklevel=2)
    return torch.float32


def load_backbone(config: ModelConfig, hollow: bool = False) -> Backbone:
    """Load base model and tokenizer by transformers, freeze, wrap.

    hollow: tokenizer and shape alone, on the meta device; the weights are elsewhere.
    Only safetensors or GGUF weights are read (`use_safetensors=True`), never pickled ones. Raises ConfigError with the
    reason, before the weights are read where that can be told.
    """
    logging.disable_progress_bar()  # loading takes seconds, and the run has its own progress
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    path = resolve_path(config.path)
    common: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    common |= {"gguf_file": config.gguf_file} if config.gguf_file else {"trust_remote_code": config.trust_remote_code}
    _refuse_files(config)
    try:
        shape = _shape(path, common)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
        if hollow:
            with torch.device("meta"):
                model, device = AutoModelForCausalLM.from_config(shape, dtype=dtype), torch.device("meta")
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **common)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged or hostile folder makes transformers raise anything
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        taken = "" if Path(path).is_dir() else " (no such folder here, so taken for a hub id)"
        raise ConfigError(f"model.path = {config.path!r} cannot be loaded{taken}: {kind}{error}") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub id: of a folder it was seen before
        raise ConfigError(f"model.path = {config.path!r}: {ADAPTER_BESIDE}")
    _bound_template(tokenizer, config.template_options)
    backbone = Backbone(model.to(device), tokenizer, config, fuse(model))
    if not hollow:
        _try(backbone)
    return backbone


def _try(backbone: Backbone) -> None:
    """One token as in sampling (as in training, where vLLM samples), with adapters of zeros that take no room. Raises
    ConfigError for a model whose code wants a cache of its own, or reaches past a layer for its weight.
    """
    config, one = backbone.config, torch.ones(1, 1, dtype=torch.long, device=backbone.device)
    zero, tensors = torch.zeros(1, device=backbone.device), dict[str, torch.Tensor]()
    for name, layer in backbone.layers.items():
        delta = zero.expand(1, layer.base.in_features, layer.base.out_features)
        tensors |= {f"{name}.delta": delta, f"{name}.A": delta[..., :1], f"{name}.B": delta[:, :1]}
    try:
        # where gradients could be taken, a layer's full weight is not kept until the end
        with torch.set_grad_enabled(config.adapter == "full"), backbone.use(AdapterStack(config.adapter, tensors)):
            if config.sampler == "vllm":
                backbone.model(input_ids=one * backbone.end_id, use_cache=False)
            else:
                cache = DynamicCache(config=backbone.model.config)
                next_logits(backbone, one * backbone.end_id, one, one - 1, cache)
    except Exception as error:
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        found = f"{type(backbone.model).__name__} does not take adapters or cache ({type(error).__name__}: {error})"
        advice = "leave layers out (model.target_modules), or take a model of another type"
        raise ConfigError(f"model.path = {config.path!r}: {found}; {advice}") from error


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


def _shape(path: str, common: dict[str, Any]) -> Any:
    """The model's own config. Raises ValueError for a kind whose forward pass takes no cache or positions."""
    config = AutoConfig.from_pretrained(path, **common)
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)  # None: code of its own
    takes = set(inspect.signature(kind.forward).parameters) if hasattr(kind, "forward") else set()
    takes |= {"past_key_values"} if "cache" in takes else set()  # its name from transformers 5.24 on
    if missing := [name for name in ("past_key_values", "position_ids") if takes and name not in takes]:
        lacks = f"takes no {' and no '.join(missing)}, which sampling and training need"
        advice = "take a model with attention, alone or among layers that keep a state"
        raise ValueError(f"{kind.__name__} (model_type {config.model_type}) {lacks}; {advice}")
    return config


def within(seconds: float, call: Callable[[], T]) -> T:
    """call(), in a thread that is left to itself after so long. Raises TimeoutError then, else what the call raises."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result(seconds)


def _bound_template(tokenizer: Any, options: dict[str, Any]) -> None:
    """Make the tokenizer's chat template end: in TEMPLATE_SECONDS, and with a ConfigError in place of what it raises.

    First in a process of its own: what a template computes in one step (`9**9**9`, `'x' * 10**10`) cannot be taken from it.
    options: what it is always given.
    """
    own = options.get("chat_template")
    takes = inspect.signature(tokenizer.apply_chat_template).parameters if tokenizer.chat_template else ()
    if unknown := [name for name in options if name not in takes and name not in f"{tokenizer.chat_template}{own}"]:
        raise ConfigError(f"model.template_options: the chat template nowhere reads {', '.join(unknown)}; leave it out")
    told = dict(options)
    with suppress(ValueError, NotImplementedError):  # none, or several without a default: named where it is used
        if "strftime_now" in str(text := tokenizer.get_chat_template(own)):
            told["chat_template"] = asset("prompts")["one_day"] + text
    plain = partial(tokenizer.apply_chat_template, **told)
    child = os.fork() if tokenizer.chat_template and sys.platform == "linux" else None
    if child == 0:
        try:
            room = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0]) + TEMPLATE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(TEMPLATE_SECONDS),) * 2)
            plain([{"role": "user", "content": "1"}], tokenize=False, add_generation_prompt=True)
        except MemoryError:
            os._exit(1)
        finally:  # what else it raises is raised again, and named, where the template is used
            os._exit(0)
    if child and os.waitpid(child, 0)[1]:
        much = f"takes more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES / GIB:g} GiB for one word"
        raise ConfigError(f"model.path: the chat template {much}; {MEND_TEMPLATE}")

    def bounded(*given: Any, **named: Any) -> Any:
        try:
            return within(TEMPLATE_SECONDS, lambda: plain(*given, **named))
        except Exception as error:
            late = isinstance(error, TimeoutError)
            said = f"did not end in {TEMPLATE_SECONDS} s" if late else f"fails: {error!r:.300}"
            raise ConfigError(f"model.path: the chat template {said}; {MEND_TEMPLATE}") from error

    tokenizer.apply_chat_template = bounded


def fuse(model: Any) -> bool:
    """On a GPU, torch's fused norm and, where it is installed, liger-kernel's rotary embedding and gated product.

    Returns whether liger's are in it: the update keeps half as much then. The norm is taken back where it changes the logits
    of a short text by more than rounding; raises ConfigError where liger's do.
    """
    weight, words = next(model.parameters()), model.config.get_text_config().vocab_size
    if not kernels.available(weight):
        return False
    # Not the first ids: those are special tokens, on a row of which a bfloat16 model amplifies rounding without end.
    ids = torch.randint(words, (1, 32), generator=torch.Generator().manual_seed(0)).to(weight.device)
    limit = 0.15 if weight.dtype == torch.bfloat16 else 1e-3
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.float()

        def changed() -> float:
            gap = (plain - model(input_ids=ids, use_cache=False).logits.float()).abs().max().item()
            return 0.0 if gap <= limit * max(1.0, plain.abs().max().item()) else gap

        liger = _liger(model)
        if liger and (gap := changed()):
            found = f"liger-kernel changes the logits of this {model.config.model_type} model by {gap:.3g}"
            raise ConfigError(f"{found}: install another version, or uninstall it")
        norms = [  # as in Llama: weight * (x / rms), and no gate beside x
            module
            for module in model.modules()
            if hasattr(module, "variance_epsilon") and len(inspect.signature(module.forward).parameters) == 1
        ]
        for module in norms:
            weight, eps = module.weight, module.variance_epsilon
            module.forward = partial(functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
        if changed():
            for module in norms:
                del module.forward
    return liger


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
