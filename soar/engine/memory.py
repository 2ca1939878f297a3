"""How much memory there is, and what to do when it runs out: what can be retried smaller is. Torch-free."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
GIB = 2**30
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device. Knows torch's errors without torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in MEMORY_WORDS)


def free_bytes(device: Any) -> int:
    """Bytes that a run could take: a CUDA device's free ones and torch's unused; else the machine's or control group's."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text(encoding="ascii").strip() if group.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def until_it_fits(work: Callable[[int], T], size: Callable[[], int], shrink: Callable[[int], bool]) -> T:
    """work(size()), anew while memory runs out and shrink(size) finds a smaller one; work leaves nothing of a failed call."""
    while True:
        tried = size()
        try:
            return work(tried)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not shrink(tried):
                raise
        gc.collect()  # out here: while an error is being handled, its frames hold their tensors
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()
