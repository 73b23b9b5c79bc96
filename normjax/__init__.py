"""normjax: a normalizer is two fields and a few numbers.

Start with `theory.py`. Methods stand in rooms by family, as `normjax.weights.weight_norm`. The Flax layers are in
`normjax.linen` and `normjax.nnx`, optax training steps in `normjax.train`; these are imported when they are first asked for.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from normjax import (
    batch,
    batch_extremes,
    conditional,
    diagnostics,
    gain,
    gaussian,
    gdn,
    interop,
    kalman,
    kernels,
    propagate,
    recurrent,
    reparametrize,
    response,
    reversible,
    running,
    selection,
    selu,
    spade,
    spectral,
    switchable,
    tokens,
    unbiased,
    units,
    weights,
)
from normjax._expect.expectation import expect
from normjax._explain import explain
from normjax._normalize.evaluate import Normalized, normalize
from normjax.field import Field, FieldError, Span
from normjax.penalty import l1_penalty
from normjax.theory import TABLE, Normalizer, Stats, top

if TYPE_CHECKING:
    from normjax import capture, flax, linen, nnx, projection, train
else:

    def __getattr__(name: str) -> ModuleType:
        """The rooms that need Flax or optax, imported when they are first asked for."""
        if name in ("capture", "flax", "linen", "nnx", "projection", "train"):
            return importlib.import_module(f"normjax.{name}")
        raise AttributeError(f"module 'normjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


__version__ = "0.1.0"

__all__ = [
    "TABLE",
    "Field",
    "FieldError",
    "Normalized",
    "Normalizer",
    "Span",
    "Stats",
    "batch",
    "batch_extremes",
    "capture",
    "conditional",
    "diagnostics",
    "expect",
    "explain",
    "flax",
    "gain",
    "gaussian",
    "gdn",
    "interop",
    "kalman",
    "kernels",
    "l1_penalty",
    "linen",
    "nnx",
    "normalize",
    "projection",
    "propagate",
    "recurrent",
    "reparametrize",
    "response",
    "reversible",
    "running",
    "selection",
    "selu",
    "spade",
    "spectral",
    "switchable",
    "tokens",
    "top",
    "train",
    "unbiased",
    "units",
    "weights",
]
