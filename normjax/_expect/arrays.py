"""What is laid beside x: dtypes, masks as weights, and statistics, scale, bias and eps that broadcast against it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.binding import axes
from normjax.field import FieldError


class Weights(NamedTuple):
    """Weights of the elements, of the rank of x; zero where an element is masked. `valid` is `value != 0`."""

    value: jax.Array
    valid: jax.Array


def require_float(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as an array; TypeError for integers and booleans, which would be averaged into something else.

    >>> require_float(jnp.arange(2), "a layer")
    Traceback (most recent call last):
    ...
    TypeError: a layer takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"{caller} takes floating-point arrays, found {x.dtype}; cast first: x.astype(jnp.float32)")
    return x


def require_real(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as an array of real floats; TypeError for integers, booleans and complex numbers.

    >>> require_real(1.5, "selu")
    Array(1.5, dtype=float32, weak_type=True)
    """
    x = require_float(x, caller)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{caller} takes real floating-point arrays, found {x.dtype}")
    return x


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of statistics: float32 or wider.

    >>> statistics_dtype("bfloat16"), statistics_dtype("complex64")
    (dtype('float32'), dtype('complex64'))
    """
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def as_weights(mask: ArrayLike | None, x: jax.Array) -> Weights | None:
    """A mask as weights of the rank of x, in its real dtype.

    Raises:
      FieldError: the mask does not broadcast against x.

    >>> as_weights(jnp.array([True, False]), jnp.ones((3, 2))).value.tolist()
    [[1.0, 0.0]]
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    try:
        fits = np.broadcast_shapes(mask.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise FieldError(f"a mask must broadcast against the array: found shapes {mask.shape} and {x.shape}")
    mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return Weights(mask.astype(jnp.finfo(x.dtype).dtype), mask.astype(bool))


def zero_masked(x: jax.Array, weights: Weights | None) -> jax.Array:
    """The array with zeros at masked positions: a select, so that a NaN there reaches no value and no gradient.

    >>> x = jnp.array([1.0, jnp.nan])
    >>> zero_masked(x, as_weights(jnp.array([1, 0]), x)).tolist()
    [1.0, 0.0]
    """
    return x if weights is None else jnp.where(weights.valid, x, jnp.zeros((), x.dtype))


def align_statistic(given: ArrayLike, x: jax.Array, name: str, dtype: DTypeLike) -> jax.Array:
    """A statistic as an array of this dtype that broadcasts against x: a scalar, or of the rank of x.

    Raises:
      FieldError: it does not fit x.

    >>> align_statistic(2.0, jnp.ones((1, 2)), "mean", "float32").dtype
    dtype('float32')
    """
    given = jnp.asarray(given)
    fits = given.ndim == x.ndim and all(g in (1, s) for g, s in zip(given.shape, x.shape, strict=True))
    if given.ndim and not fits:
        raise FieldError(
            f"a given {name} has the rank of x and broadcasts against it: found shapes {given.shape} and {x.shape}"
        )
    return given.astype(dtype)


def align_eps(eps: ArrayLike, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """An eps given at the call as an array of this dtype that broadcasts against x.

    Raises:
      FieldError: it does not fit x.

    >>> align_eps(0.5, jnp.ones((1, 2)), "float32")
    Array(0.5, dtype=float32)
    """
    eps = jnp.asarray(eps, dtype)
    if eps.ndim and (eps.ndim != x.ndim or any(e not in (1, s) for e, s in zip(eps.shape, x.shape, strict=True))):
        raise FieldError(
            f"eps is a scalar, or has the rank of x and broadcasts against it: found shapes {eps.shape} and {x.shape}"
        )
    return eps


def align_parameter(p: ArrayLike, x: jax.Array, layout: str, name: str, dtype: DTypeLike) -> jax.Array:
    """A scale, a bias or their like as an array of this dtype that broadcasts against x.

    Args:
      p: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      x: the array beside which it is laid.
      layout: name of each axis of x.
      name: of the parameter, for errors.
      dtype: of the result.

    Raises:
      FieldError: it does not fit x.

    >>> align_parameter(jnp.ones(3), jnp.ones((2, 3, 5)), "n c t", "scale", "float32").shape
    (1, 3, 1)
    """
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
