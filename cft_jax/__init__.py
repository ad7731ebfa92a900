"""Calibration Fine-Tuning: language models that sample from the distribution they are asked for (arXiv 2605.11845).

    import cft_jax

    model = cft_jax.load("runs/demo")
    model.sample("Roll a die.", 10)
    model.distribution("Roll a die.", ["1", "2", "3", "4", "5", "6"])

docs/python.md has more. Nothing heavy is imported before it is used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Before transformers is imported anywhere: its advice to install PyTorch helps nobody here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.2.0"

if TYPE_CHECKING:
    from cft_jax.api import Model, Run, Task, calibrate, evaluate, load
    from cft_jax.common.errors import UserError

__all__ = ["Model", "Run", "Task", "UserError", "calibrate", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    """The face's names, imported when they are first used; `evaluate` is the package, which can be called."""
    if name not in __all__:
        raise AttributeError(f"module 'cft_jax' has no attribute {name!r}")
    if name == "evaluate":
        return importlib.import_module("cft_jax.evaluate")
    value = getattr(importlib.import_module("cft_jax.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
