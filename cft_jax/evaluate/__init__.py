"""Measuring models; the package itself can be called: `cft_jax.evaluate(model, suite)`, as in `cft_jax.api`."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module with the name of a function, which `cft_jax` can therefore have both of."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from cft_jax import api

        return api.evaluate(*args, **settings)


sys.modules[__name__].__class__ = _Callable  # type: ignore[assignment]
