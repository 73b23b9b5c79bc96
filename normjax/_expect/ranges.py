"""Exact scaling by powers of two, so that no square of what is very large or very small is lost."""

import jax
import jax.numpy as jnp
from jax import lax

from normjax._expect import extremes
from normjax._expect.arrays import statistics_dtype
from normjax._expect.expectation import OverFields
from normjax.field import Field


def towards_one(size: jax.Array, step: int = 1) -> jax.Array:
    """The power of two that brings a magnitude into [1, 2), or near it; 1 for 0, infinity and NaN. Not differentiated.

    With a `step`, the power of 2 ** step that brings it into [1, 2 ** step).

    >>> towards_one(jnp.array([6.0, 1e-30, 0.0, jnp.inf])).tolist()
    [0.25, 1.2676506002282294e+30, 1.0, 1.0]
    """
    size = lax.stop_gradient(size)
    known = jnp.where((size > 0) & (size < jnp.inf), size, 1)
    furthest = -jnp.finfo(size.dtype).minexp  # its inverse is a normal number too
    exponent = jnp.clip((jnp.frexp(known)[1] - 1) // step * step, -furthest // step * step, furthest // step * step)
    return jnp.ldexp(jnp.ones((), size.dtype), -exponent)


def lifting(size: jax.Array) -> jax.Array:
    """A power of two that brings a magnitude to 1/256 or more: 1 for one that is there already, and for 0.

    It is for numbers beside which a published constant is added, 1e-12 to a square: small beside them as they are usually,
    and to stay so.

    >>> lifting(jnp.array([2.0**-20, 1.0, 0.0])).tolist()
    [4096.0, 1.0, 1.0]
    """
    return jnp.maximum(towards_one(size) / 256, 1)


def scale_of(x: jax.Array, field: Field, E: OverFields) -> jax.Array:
    """A power of two for each field of whole axes and blocks, real, float32 or wider: x times it is near one at most."""
    size = lax.stop_gradient(jnp.abs(E.only(x)))
    return towards_one(extremes.pooled_maximum(size, E.plan(field)).astype(statistics_dtype(size.dtype)))


LARGE, SMALL = 2.0**30, 2.0**-30  # root mean squares beyond which squares are taken of v / DOWN, of v * UP
DOWN, UP = 2.0**80, 2.0**64


def mean_square(v: jax.Array, field: Field, E: OverFields) -> tuple[jax.Array, jax.Array, jax.Array]:
    """E_field[|s v| ** 2], and conditions `large` and `small`; s is 1 / DOWN where `large`, UP where `small`, else 1.

    For every field, windows too, of up to 2 ** 30 elements. What is left out of a sum is nothing beside the sum that is
    taken, or the sum is not taken; so nothing overflows, where a select would leave the gradient NaN.
    """
    size = lax.stop_gradient(jnp.abs(v))
    # Selected factors, since compilers multiply constants, and the square of either is out of range.
    factors = ((2.0**45, 1.0, 0.0), (jnp.inf, 1 / DOWN, 1.0), (2.0**-15, UP, 0.0))
    each = (jnp.where(size < bound, *(jnp.asarray(f, size.dtype) for f in kinds)) for bound, *kinds in factors)
    middle, down, up = (E(v * factor.astype(v.dtype), field, 2) for factor in each)
    large, small = ~(down <= (LARGE / DOWN) ** 2), middle < SMALL**2  # `large` takes a NaN, which `middle` has not seen
    return jnp.where(large, down, jnp.where(small, up, middle)), large, small & ~large
