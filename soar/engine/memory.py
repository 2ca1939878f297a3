"""Memory that runs out, and a device that is gone. What can be retried smaller is; the rest gets a name. Torch-free."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from soar.types import UserError

T = TypeVar("T")
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "not enough memory")
DEVICE_WORDS = (
    "cuda error", "nccl", "cublas", "cudnn", "device-side assert", "hip error", "unspecified launch failure"
)  # fmt: skip


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
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in DEVICE_WORDS)


def release_memory() -> None:
    """Give back what a failed attempt still holds: its frames' tensors, and the caching allocator's blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: Any) -> int:
    """Bytes of a CUDA device that a new tensor could take: free ones, and those that torch holds unused."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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


def halving(work: Callable[[int], T], size: int, smaller: Callable[[int], None], smallest: int = 1) -> tuple[T, int]:
    """(work(size), size); when memory runs out, with half the size again and again.

    work leaves nothing of a failed call behind; smaller(size) is told of every size before it is tried. The shortage of a
    `smallest` piece is raised as it came.
    """
    while True:
        try:
            return work(size), size
        except (MemoryError, RuntimeError) as error:
            if size <= smallest or not is_out_of_memory(error):
                raise
        size = max(smallest, size // 2)
        smaller(size)
        release_memory()  # out here: while an error is being handled, its frames hold their tensors
