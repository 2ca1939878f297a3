"""Whether a base model fits its device; memory that runs out, and a device that is gone. Torch-free.

Sizes are read from files on this machine alone. What can be retried smaller is; the rest gets a name.
"""

import gc
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

from soar.config import Config, ModelConfig, resolve_path
from soar.types import UserError

T = TypeVar("T")
GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "not enough memory")
LOST_WORDS = ("cuda error", "nccl", "cublas", "cudnn", "device-side assert", "hip error", "unspecified launch failure")


class TooLarge(UserError):
    """A base model that does not fit its device; the message holds the arithmetic."""


class MemoryShortage(UserError):
    """The smallest piece of work does not fit in memory."""


class DeviceLost(UserError):
    """The accelerator failed; nothing that was saved is touched by it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device. Knows torch's errors without torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in MEMORY_WORDS)


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that the accelerator or its communication failed."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST_WORDS)


def release_memory() -> None:
    """Give back what a failed attempt still holds: its frames' tensors, and the caching allocator's blocks."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def free_bytes(device: Any) -> int:
    """Bytes that a run could take: of a CUDA device free ones, and those that torch holds unused; else all memory of this
    machine, or of the control group that this process is limited to."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text(encoding="ascii").strip() if group.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


@contextmanager
def saved_run(resume: str) -> Iterator[None]:
    """Raises MemoryShortage and DeviceLost in place of what torch raises; the state is kept, `resume` goes on from it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        again = f"Everything up to the last step is saved; continue with: {resume}"
        if is_out_of_memory(error):
            lower = "lower model.chunk and model.micro_batch_tokens, which may change on --resume"
            raise MemoryShortage(f"out of memory: {error}. Free memory or {lower}. {again}") from error
        if is_device_lost(error):
            raise DeviceLost(f"the accelerator failed: {error}. {again}") from error
        raise


def until_it_fits(work: Callable[[], T], shrink: Callable[[], bool]) -> T:
    """work(), when memory runs out again and again, as long as shrink() makes it smaller; else the shortage as it came.

    work leaves nothing of a failed call behind.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not shrink():
                raise
        release_memory()  # out here: while an error is being handled, its frames hold their tensors


@dataclass(frozen=True)
class ModelSize:
    """What memory and speed depend on. token_values: that the cache keeps of one token; 0 for a size by name alone."""

    parameters: float
    token_values: int
    source: str


def size_of(config: ModelConfig) -> ModelSize | None:
    """By config.json and the headers of the weight files in a folder, `builtin:NAME` or the cache of a hub id.

    Where they are missing, damaged or tell too little, by the name (`Llama-3.2-3B`: 3e9), else None.
    """
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


def memory_of(config: Config, size: ModelSize, prompt_tokens: int, device: str = "") -> tuple[float, list[str]]:
    """Bytes of the frozen base and one row's cache, and the arithmetic as text. device: model.device, if it is open.

    Adapters, their moments and activations, which are made to fit by smaller batches, come on top.
    """
    model, student = config.model, config.student
    on_cpu = "cpu" in (model.device, device)
    kind = model.dtype if model.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    weights, rows = size.parameters * BYTES[kind], config.teacher.datasets * student.repeats
    rows *= student.prompts_per_step * student.attempts
    tokens = prompt_tokens + max(student.sampling.max_tokens, config.teacher.sampling.max_tokens)
    row = tokens * size.token_values * BYTES[kind]
    lines = [
        f"  weights      {weights / GIB:8.2f} GiB   {size.parameters:,.0f} parameters x {BYTES[kind]} bytes ({size.source})",
        f"  KV cache     {row * rows / GIB:8.2f} GiB   {rows:,} rows x {tokens:,} tokens x {size.token_values:,} values; "
        f"less in smaller batches, {row / GIB:.4f} a row",
    ]
    return weights + row, lines if size.token_values else lines[:1]


def check_fits(config: Config, available: int, device: str) -> None:
    """Raises TooLarge for a base model that, by its files, does not fit in so many bytes beside one row's cache."""
    size = size_of(config.model)
    needed, lines = memory_of(config, size, 1, device) if size and size.token_values else (0.0, [])
    if needed > available:
        raise TooLarge(
            f"model.path = {config.model.path!r} does not fit {device}, which has {available / GIB:.1f} GiB free:\n"
            + "\n".join((*lines, "One process trains on one device: take a larger one or a smaller model."))
        )
