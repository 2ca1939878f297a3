"""Which device and which number type the base model takes, and how much memory a GPU has left."""

from __future__ import annotations

import warnings

import torch

from soar.config import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` -> cuda when present, else cpu. Raises ConfigError when a named CUDA device is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}: torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` -> bfloat16 on a GPU that computes in it, else float32, and a GPU without it is told of in a warning."""
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


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that a new tensor could take: free ones, and those that torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
