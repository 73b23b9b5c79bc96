"""Values in bins, and how many pairs of them lie in each cell of a joint histogram."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights
from normjax.diagnostics._shared import UNITS, Mask, axis_number, require_real, sum_over_devices

Bounds = tuple[float, float]


class Samples(NamedTuple):
    """Units in bins: places and weights `[samples, c]`, edges `[c, bins + 1]`; masked or out of bounds is of weight 0."""

    place: jax.Array  # the bin of each value, 0..bins - 1
    weight: jax.Array  # int32 for counts, which float32 loses at 2 ** 24
    edges: jax.Array


def binned(
    x: ArrayLike,
    layout: str,
    bins: int,
    bounds: Sequence[Bounds] | None,
    mask: Mask,
    mapped: tuple[str, ...],
    caller: str,
) -> Samples:
    """The bin of every value; by default the bins of a unit lie between the least and the largest that count."""
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins is an integer of at least 1; found {bins!r}")
    x = lax.stop_gradient(require_real(x, caller))
    number = axis_number(UNITS, layout, x.ndim)
    weights = as_weights(mask, x)
    if weights is None:
        weight = jnp.ones(x.shape, jnp.int32)
    else:
        counted = jnp.asarray(mask).dtype == bool
        weight = jnp.broadcast_to(weights.valid.astype(jnp.int32) if counted else weights.value, x.shape)
    x, weight = (jnp.moveaxis(array, number, -1).reshape(-1, x.shape[number]) for array in (x, weight))
    valid = (weight > 0) & jnp.isfinite(x)
    low, high = _range(x, valid, mapped) if bounds is None else _given_range(x, bounds)
    inside = valid & (x >= low[None]) & (x <= high[None])
    place = jnp.floor(jnp.where(inside, x - low[None], 0) / (high - low)[None] * bins).astype(jnp.int32)
    steps = jnp.linspace(0, 1, bins + 1, dtype=x.dtype)
    edges = low[:, None] + (high - low)[:, None] * steps[None]
    return Samples(jnp.minimum(place, bins - 1), jnp.where(inside, weight, 0), edges)


def _range(x: jax.Array, valid: jax.Array, mapped: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """The least and the largest value of each unit on all devices, `[c]`."""
    low = jnp.min(x, 0, where=valid, initial=jnp.inf)
    high = jnp.max(x, 0, where=valid, initial=-jnp.inf)
    for name in mapped:
        low, high = lax.pmin(low, name), lax.pmax(high, name)
    low, high = (jnp.where(jnp.isfinite(edge), edge, 0) for edge in (low, high))
    flat = low == high  # a constant has a bin around it, as in NumPy
    return jnp.where(flat, low - 0.5, low), jnp.where(flat, high + 0.5, high)


def _given_range(x: jax.Array, bounds: Sequence[Bounds]) -> tuple[jax.Array, jax.Array]:
    """The bounds as arrays, `[c]`; ValueError where they are not one pair in order for each unit."""
    if len(bounds) != x.shape[-1] or any(not low < high for low, high in bounds):
        raise ValueError(f"bounds are a pair (least, largest) for each of the two units; found {bounds!r}")
    return jnp.asarray([low for low, _ in bounds], x.dtype), jnp.asarray([high for _, high in bounds], x.dtype)


def counts_with_all(samples: Samples, unit: jax.Array, bins: int, mapped: tuple[str, ...]) -> jax.Array:
    """The joint histograms of one unit with each, `[c, bins, bins]`."""
    place, weight, _ = samples
    cell = place[:, unit, None] * bins + place
    both = weight[:, unit, None] * weight
    if not jnp.issubdtype(weight.dtype, jnp.integer):
        both = jnp.sqrt(both)  # equal weights of a pair count once
    count = place.shape[1]
    counts = jnp.zeros((count, bins * bins), both.dtype).at[jnp.arange(count)[None], cell].add(both)
    return sum_over_devices(counts, mapped).reshape(count, bins, bins)
