"""What is laid beside x: dtypes, masks as weights, and statistics, scale, bias and eps that broadcast against it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.binding import axes
from normjax._leaves import refuse_unless
from normjax.field import FieldError
from normjax.theory import Stats


class Weights(NamedTuple):
    """Weights of the elements, of the rank of x; zero where an element is masked. `valid` is `value != 0`."""

    value: jax.Array
    valid: jax.Array


def require_float(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as an array; TypeError for integers and booleans, which would be averaged into something else."""
    if parts := getattr(x, "_fields", ()):  # what `normalize` returned, and its like
        raise TypeError(f"{caller} takes an array, found {type(x).__name__}; give one of its parts: {', '.join(parts)}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"{caller} takes floating-point arrays, found {x.dtype}; cast first: x.astype(jnp.float32)")
    return x


def require_real(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as an array of real floats; TypeError for integers, booleans and complex numbers."""
    x = require_float(x, caller)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{caller} takes real floating-point arrays, found {x.dtype}")
    return x


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of statistics: float32 or wider."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def as_weights(mask: ArrayLike | None, x: jax.Array) -> Weights | None:
    """A mask as weights of the rank of x, in its real dtype."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.ndim > x.ndim or any(m not in (1, s) for m, s in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        raise FieldError(f"a mask must broadcast against the array: found shapes {mask.shape} and {x.shape}")
    if not jnp.issubdtype(mask.dtype, np.bool_):
        refuse_unless("a mask", "is made of booleans, or of weights that are finite and at least 0", mask, _is_weight)
    mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return Weights(mask.astype(jnp.finfo(x.dtype).dtype), mask.astype(bool))


def _is_weight(numbers: np.ndarray) -> np.ndarray:
    return (numbers >= 0) & (numbers < np.inf)


def zero_masked(x: jax.Array, weights: Weights | None) -> jax.Array:
    """The array with zeros at masked positions: a select, so that a NaN there reaches no value and no gradient."""
    return x if weights is None else jnp.where(weights.valid, x, jnp.zeros((), x.dtype))


def require_stats(stats: object) -> None:
    """Raises TypeError for statistics that are given as anything but a Stats, which has the weights behind them too."""
    if stats is not None and not isinstance(stats, Stats):
        raise TypeError(
            f"stats are a normjax.Stats(mean, var), each of the rank of x and broadcasting against it; found "
            f"{type(stats).__name__} (stored statistics become one by normjax.running.as_stats)"
        )


def align_statistic(given: ArrayLike, x: jax.Array, name: str, dtype: DTypeLike) -> jax.Array:
    """A statistic or an eps that was given, as an array of this dtype: a scalar, or of the rank of x and broadcasting."""
    given = jnp.asarray(given)
    if given.ndim and (given.ndim != x.ndim or any(g not in (1, s) for g, s in zip(given.shape, x.shape, strict=True))):
        said = "eps is a scalar, or has" if name == "eps" else f"a given {name} has"
        raise FieldError(f"{said} the rank of x and broadcasts against it: found shapes {given.shape} and {x.shape}")
    return given.astype(dtype)


def align_parameter(p: ArrayLike, x: jax.Array, layout: str, name: str, dtype: DTypeLike) -> jax.Array:
    """A scale, a bias or their like (a scalar, `[c]`, `[n, c]`, or of the rank of x), broadcasting against x."""
    p = jnp.asarray(p)
    if jnp.iscomplexobj(p) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise FieldError(f"a complex {name} does not fit a real array of dtype {x.dtype}")
    p, given = p.astype(dtype), p.shape
    if p.ndim in (0, x.ndim):
        shape = p.shape
    else:
        where = axes(layout, x.ndim)
        along = {1: ("c",), 2: ("n", "c")}.get(p.ndim, ())
        if not along or not all(axis in where for axis in along):
            raise FieldError(
                f"{name} of shape {p.shape} is not a scalar, [c], [n, c] or of the rank of x, for layout "
                f'"{layout}" and shape {x.shape}'
            )
        sizes = {where[axis][0]: size for axis, size in zip(along, p.shape, strict=True)}
        shape = tuple(sizes.get(i, 1) for i in range(x.ndim))
        p = p.reshape(shape) if list(sizes) == sorted(sizes) else p.T.reshape(shape)
    if any(s not in (1, t) for s, t in zip(shape, x.shape, strict=False)):
        raise FieldError(f'{name} of shape {given} does not broadcast against shape {x.shape}, layout "{layout}"')
    return p
