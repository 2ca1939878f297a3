"""SOAR: a teacher model writes practice questions and is paid by what its students improve (arXiv 2601.18778)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from soar.types import VERSION as __version__
from soar.types import Problem

__all__ = ["Problem", "__version__", "arms", "check", "evaluate", "screen", "train"]

if TYPE_CHECKING:
    from soar.api import arms, check, evaluate, screen, train


def __getattr__(name: str) -> Any:
    """The Python interface, loaded when it is first used: `import soar` alone needs no torch."""
    if name in __all__:
        return getattr(import_module("soar.api"), name)
    raise AttributeError(f"module 'soar' has no attribute {name!r}; public names: {', '.join(__all__)}")
