"""Denominators far from one: exact powers of two, that neither squares nor derivatives of powers leave the range of floats.

Two causes, two cures. Where eps is 0 nothing but v is in the denominator, however small or large v is: the array is scaled
before its moment is taken (`scaled_to_one`, or where windows forbid it `mean_square` of `_expect/ranges.py`). And the
derivative of q ** -power is q ** (-power - 1), which underflows for a q that is far from the largest number: the
denominator is scaled where JAX differentiates it (`balanced`; the derivative rule multiplies in another order).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normjax._expect.expectation import OverFields
from normjax._expect.ranges import DOWN, UP, mean_square, scale_of, towards_one
from normjax._leaves import inverse_power, nan_if_infinite
from normjax.theory import Normalizer, is_positive, output, smoothed, top

STEP = 12  # powers of two that have exact roots for the usual exponents


def exponent(n: Normalizer) -> float:
    """The power of the units of x that the moment has: its order, and 1 for a maximum or a mean of the largest."""
    return 1.0 if isinstance(n.order, top) or n.order == math.inf else float(n.order)


def scales_alike(n: Normalizer, E: OverFields) -> bool:
    """Whether mean, moment and output of x times a factor for each field B follow from those of x."""
    assert n.var is not None
    return E.plan(n.var).bound.pooled and n.mean in (None, n.var) and n.floor is None


def scaled_to_one(x: jax.Array, n: Normalizer, E: OverFields) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The factor s of x, the eps that belongs to s * x (None for 0), and the factor of its output (None for 1)."""
    assert n.var is not None
    p = exponent(n)
    s = scale_of(x, n.var, E)
    if n.eps:
        s = jnp.minimum(s, 2.0 ** math.floor(-math.log2(n.eps) / p))  # the eps of s * x stays at most 1
    degree = p * n.power - 1
    return s, n.eps * s**p if n.eps else None, None if abs(degree) < 1e-9 else s**degree


def unscaled(moment: jax.Array, n: Normalizer, s: jax.Array) -> jax.Array:
    """The moment of x, of that of s * x; NaN where it is too large for a float."""
    p = exponent(n)
    return nan_if_infinite(moment / s / s if p == 2 else moment / s if p == 1 else moment * (1 / s) ** p)


def output_of_squares(x: jax.Array, v: jax.Array, n: Normalizer, E: OverFields) -> tuple[jax.Array, jax.Array]:
    """The output and the moment of a row of order 2 whose eps is 0, or next to it, for any fields."""
    assert n.var is not None
    m, large, small = mean_square(v, n.var, E)
    m = nan_if_infinite(m, n.gain)

    def chosen(of_large: float, of_small: float, otherwise: float) -> jax.Array:
        kinds = (jnp.asarray(number, m.dtype) for number in (of_large, of_small, otherwise))
        of_large_, of_small_, otherwise_ = kinds
        return jnp.where(large, of_large_, jnp.where(small, of_small_, otherwise_))

    s, eps = chosen(1 / DOWN, UP, 1.0), chosen(n.eps / DOWN**2, n.eps * UP**2, n.eps)
    moment, y = nan_if_infinite(m / s / s), x if n.keep_mean else v
    if n.floor is not None:  # compared are denominators of v itself
        d = inverse_power(n.gain * m + eps, -n.power) / s ** (2 * n.power)
        d = jnp.maximum(d, E(E.only(d), n.floor))
        s = towards_one(d)
        return y * s.astype(y.dtype) * inverse_power(d * s, 1.0).astype(y.dtype), moment
    row, m, eps, back = balanced(n, m, eps, None, y.dtype)
    assert back is not None
    back = back if n.power == 0.5 else back * s.astype(y.dtype) ** (2 * n.power - 1)
    s = s.astype(y.dtype)
    return output(x * s, v * s, m, row, E, eps) * back, moment


def unknown_where_lost(y: jax.Array, v: jax.Array, moment: jax.Array) -> jax.Array:
    """The output; NaN where powers of a v that is not 0 have underflowed to a moment of 0."""
    return y * jnp.where((moment == 0) & (v != 0), jnp.nan, 1).astype(y.dtype)


def balanced(
    n: Normalizer, moment: jax.Array, eps: jax.Array | None, scale: jax.Array | None, dtype: DTypeLike
) -> tuple[Normalizer, jax.Array, jax.Array | None, jax.Array | None]:
    """Row, moment, eps and scale of the same output, to the last bit, with a denominator whose derivative is in range."""
    factor: jax.Array | float
    if n.floor is not None:  # whose denominators are compared, and are roots by then
        return n, moment, eps, scale
    if is_positive(n, eps) and n.power in (0.5, 0.75):  # a general power of what is far from one is less exact
        k = 2.0 ** (-STEP * math.floor((120 / (n.power + 1) + math.log2(n.eps)) / STEP))
        n, factor = dataclasses.replace(n, eps=n.eps * k, gain=n.gain * k), k**n.power
    else:
        s = towards_one(smoothed(moment, n, eps), STEP)
        eps, moment, factor = s * (n.eps if eps is None else eps), s * moment, 1 / inverse_power(s, n.power)
    factor = jnp.asarray(factor, dtype)
    return n, moment, eps, factor if scale is None else scale * factor
