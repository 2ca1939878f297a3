"""Whether a base model fits its device, by files on this machine alone, before it is loaded. Torch-free."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from soar.config import Config, ConfigError, ModelConfig, resolve_path
from soar.engine.memory import GIB

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """What memory and speed depend on. token_values: that the cache keeps of one token; 0 for a size by name alone."""

    parameters: float
    token_values: int
    source: str


def size_of(config: ModelConfig) -> ModelSize | None:
    """By config.json and headers of weights in a folder, `builtin:NAME` or the hub's cache; else by its name (3B: 3e9)."""
    parameters = 0
    with suppress(ImportError, ValueError):
        folder = Path(resolve_path(config.path))
        if not (folder / "config.json").is_file():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
            folder = Path(cached).parent if isinstance(cached, str) else folder
        with suppress(Exception):  # a damaged file makes json and safetensors raise anything
            shape: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            shape = shape.get("text_config") or shape
            heads = int(shape["num_attention_heads"])
            head_dim = int(shape.get("head_dim") or int(shape["hidden_size"]) // heads)
            layers, kv_heads = int(shape["num_hidden_layers"]), int(shape.get("num_key_value_heads") or heads)
            for path in folder.glob("model*.safetensors"):
                with safe_open(path, framework="numpy") as file:
                    parameters += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
            if parameters:
                return ModelSize(parameters, 2 * layers * kv_heads * head_dim, "headers of the weight files")
    name = config.path.rstrip("/").rpartition("/")[2]
    named = re.search(r"(?<![\w.])(\d{1,4}(?:\.\d{1,3})?)([bBmM])(?![a-zA-Z0-9])", name)
    if named is None:
        return None
    return ModelSize(float(named[1]) * {"b": 1e9, "m": 1e6}[named[2].lower()], 0, "the size in the model's name")


def memory_of(config: Config, size: ModelSize, prompt_tokens: int, device: str = "auto") -> tuple[float, list[str]]:
    """Bytes of the frozen base and one row's cache, with the arithmetic as text. device: where it is open (auto: nowhere)."""
    model, student = config.model, config.student
    on_cpu = "cpu" in (model.device, device)
    kind = model.dtype if model.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    each = f"{BYTES[kind]} bytes" + " (4 on a CPU)" * (model.dtype == model.device == device == "auto")
    weights, rows = size.parameters * BYTES[kind], config.teacher.datasets * student.repeats
    rows *= student.prompts_per_step * student.attempts
    tokens = prompt_tokens + max(student.sampling.max_tokens, config.teacher.sampling.max_tokens)
    row = tokens * size.token_values * BYTES[kind]
    lines = [
        f"  weights      {weights / GIB:8.2f} GiB   {size.parameters:,.0f} parameters x {each} ({size.source})",
        f"  KV cache     {row * rows / GIB:8.2f} GiB   {rows:,} rows x {tokens:,} tokens x {size.token_values:,} values; "
        f"less in smaller batches, {row / GIB:.4f} a row",
    ]
    return weights + row, lines if size.token_values else lines[:1]


def check_fits(config: Config, available: int, device: str) -> None:
    """Raises ConfigError for a base model that, by its files, does not fit in so many bytes beside one row's cache."""
    size = size_of(config.model)
    needed, lines = memory_of(config, size, 1, device) if size and size.token_values else (0.0, [])
    if needed > available:
        found = f"model.path = {config.model.path!r} does not fit {device}, which has {available / GIB:.1f} GiB free:"
        advice = "One process trains on one device: take a larger one or a smaller model."
        raise ConfigError("\n".join((found, *lines, advice)))
