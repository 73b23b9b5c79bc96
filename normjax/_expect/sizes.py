"""Sizes that may be symbols, as under `jax.export`: what is asked of a size, and the answer where a symbol has none.

A size of an array is an int, or an expression of symbols such as `b` or `8*m`, of which JAX knows that each symbol is at
least 1 and what the caller promised beside. Whatever chooses between two ways to the same numbers asks here.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import max_dim, min_dim
from jax.errors import InconclusiveDimensionOperation
from jax.typing import DTypeLike

Size = Any  # an int, or symbols, for which JAX has no public type

__all__ = ["Size", "as_number", "at_least", "divides", "is_known", "max_dim", "min_dim", "said"]


def is_known(size: Size) -> bool:
    """Whether a size is a number and no symbol."""
    return isinstance(size, int | np.integer)


def at_least(size: Size, bound: Size, unknown: bool) -> bool:
    """Whether size >= bound; `unknown` where the symbols in them may be of either kind."""
    try:
        return bool(size >= bound)
    except InconclusiveDimensionOperation:
        return unknown


def divides(parts: int, size: Size) -> bool:
    """Whether a size splits into equal parts; of symbols only where they say so: 8 divides `8*m`, not `b`."""
    return size % parts == 0


def as_number(sizes: Iterable[Size], dtype: DTypeLike) -> np.floating | jax.Array:
    """The product of sizes in a dtype of floats: of NumPy, or computed by the program where a size is a symbol."""
    size = math.prod(sizes)
    return np.dtype(dtype).type(size) if is_known(size) else jnp.asarray(size, dtype)


def said(size: Size, parts: int) -> str:
    """A size that does not split into equal parts, as an error names it: of a symbol also how to say that it does."""
    return str(size) if is_known(size) else f'{size} (a symbol: write it as a multiple, "{parts}*m")'
