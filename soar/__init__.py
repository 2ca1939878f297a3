"""SOAR: a language model breaks through a reasoning plateau by teaching itself (arXiv 2601.18778)."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Lesson", "Problem", "evaluate", "screen", "train"]

if TYPE_CHECKING:
    from soar.api import Lesson, evaluate, screen, train
    from soar.types import Problem


def __getattr__(name: str) -> Any:
    """The Python interface, loaded when it is first used: `import soar` alone needs no torch."""
    if name == "Problem":
        from soar.types import Problem

        return Problem
    if name in __all__:
        from soar import api

        return getattr(api, name)
    raise AttributeError(f"module 'soar' has no attribute {name!r}; public names: {', '.join(__all__)}")


class _Package(ModuleType):
    """Keeps `soar.evaluate` the function: importing the file of that name would put the module in its place."""

    @property
    def evaluate(self) -> Any:
        return __getattr__("evaluate")

    @evaluate.setter
    def evaluate(self, module: ModuleType) -> None:
        """`from soar.loop.evaluate import ...` finds the module in sys.modules all the same."""


sys.modules[__name__].__class__ = _Package
