"""What the measurements share: refusals, mapped axes, means of what counts, and units or examples as vectors."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import Weights, as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.binding import axes
from normjax._expect.sharding import axis_size
from normjax._normalize.evaluate import equation
from normjax.field import EXAMPLES, Field, FieldError, Span
from normjax.theory import Normalizer

UNITS = "c"
Axes = str | Sequence[str]
Mask = ArrayLike | None
Arrays = TypeVar("Arrays", jax.Array, tuple[jax.Array, ...])
_NOUNS = {UNITS: "units", EXAMPLES: "examples"}


def mapped_axes(axis_name: Axes) -> tuple[str, ...]:
    """The names of mapped axes as a tuple; FieldError where one is not bound."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        axis_size(name)
    return names


def require_real(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as a real array of float32 or wider; TypeError for anything else."""
    x = require_float(x, caller)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{caller} takes real numbers, found {x.dtype}; take the real part or the absolute value first")
    return x.astype(statistics_dtype(x.dtype))


def axis_number(name: str, layout: str, ndim: int) -> int:
    """The number of the axis of units or of examples; FieldError where the layout does not name it."""
    where = axes(layout, ndim)
    if name not in where:
        raise FieldError(f"{_NOUNS[name]} lie along the axis '{name}', which layout \"{layout}\" does not name")
    return where[name][0]


def field_of_others(name: str, layout: str, ndim: int, mapped: tuple[str, ...] = ()) -> Field:
    """The field of all axes but one, with the mapped axes."""
    spans = [Span(other) for other, numbers in axes(layout, ndim).items() if other != name and numbers]
    return Field((*spans, *(Span(None, mapped=axis) for axis in mapped)))


def sum_over_devices(value: Arrays, mapped: tuple[str, ...]) -> Arrays:
    """The sum over mapped axes, if there are any, of an array or of several at once."""
    return lax.psum(value, mapped) if mapped else value


def largest_magnitude(x: jax.Array, over: tuple[int, ...], mapped: tuple[str, ...]) -> jax.Array:
    """The largest |x| over some axes, kept at length 1, or one where that is no scale; not differentiated."""
    peak = jnp.max(lax.stop_gradient(jnp.abs(x)), over, keepdims=True, initial=0)
    for name in mapped:
        peak = lax.pmax(peak, name)
    return jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)


def mean_where(value: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of the elements that count; NaN, with gradient 0, where none does."""
    count = jnp.sum(where)
    mean = jnp.sum(jnp.where(where, value, 0)) / jnp.maximum(count, 1).astype(value.dtype)
    return jnp.where(count > 0, mean, jnp.nan)


def pairs_of(alive: jax.Array) -> jax.Array:
    """Which pairs of two different units count, `[c, c]`."""
    return alive[:, None] & alive[None, :] & ~jnp.eye(alive.size, dtype=bool)


class Vectors(NamedTuple):
    """Units or examples as vectors of length one; a vector of zeros (a constant unit, an empty example) stays one."""

    y: jax.Array  # standardized activations, of the shape of x
    mean: jax.Array  # of the units, 0 for examples; as all that follows, it broadcasts against x
    var: jax.Array  # of the units, mean square of the examples; 0 for a vector of zeros
    alive: jax.Array  # whether there is more than zeros
    weight: jax.Array  # the sum of weights behind each
    weights: Weights | None  # those of the elements
    number: int  # of the axis along which the vectors lie

    def as_matrix(self) -> jax.Array:
        """One row for each vector, with inner products weighted as the mask says, `[c or n, samples]`."""
        share = 1 / jnp.where(self.weight > 0, self.weight, 1)
        if self.weights is not None:
            share = self.weights.value * share
        rows = jnp.moveaxis(self.y * jnp.sqrt(share), self.number, 0)
        return rows.reshape(rows.shape[0], -1)

    def for_each(self, value: jax.Array) -> jax.Array:
        """A statistic as one number for each vector, `[c or n]`."""
        shape = [self.y.shape[i] if i == self.number else 1 for i in range(self.y.ndim)]
        return jnp.broadcast_to(value, shape).reshape(-1)


def vectors_along(
    name: str, x: ArrayLike, layout: str, mask: Mask, caller: str, mapped: tuple[str, ...] = ()
) -> Vectors:
    """Units (centred) or examples (not centred) as vectors of length one, with the moments behind them."""
    x, centred = require_real(x, caller), name == UNITS
    number, field = axis_number(name, layout, x.ndim), field_of_others(name, layout, x.ndim, mapped)
    weights = as_weights(mask, x)
    x = zero_masked(x, weights)
    over = tuple(i for i in range(x.ndim) if i != number)
    # Numbers about one, so that no square over- or underflows; around the least, so that a constant unit is exactly zero.
    least = _least(x, weights, over, mapped) if centred else jnp.zeros_like(x, shape=[1] * x.ndim)
    size = largest_magnitude(zero_masked(x - least, weights), over, mapped)
    out = equation((x - least) / size, Normalizer(field if centred else None, field, eps=0.0), layout, mask=mask)
    mean = least + out.stats.mean * size if centred else jnp.zeros_like(size)
    weight, var = jnp.asarray(out.stats.var_weight, size.dtype), out.stats.var
    return Vectors(out.y, mean, var * jnp.square(size), var > 0, weight, weights, number)


def _least(x: jax.Array, weights: Weights | None, over: tuple[int, ...], mapped: tuple[str, ...]) -> jax.Array:
    """The least x over some axes, kept at length 1, or zero where nothing is finite; not differentiated."""
    valid = True if weights is None else jnp.broadcast_to(weights.valid, x.shape)
    least = jnp.min(lax.stop_gradient(x), over, keepdims=True, initial=jnp.inf, where=valid)
    for name in mapped:
        least = lax.pmin(least, name)
    return jnp.where(jnp.isfinite(least), least, 0)
