"""How much one unit tells about another: joint histograms, and the mutual information that they estimate.

    I(a; b) = sum over cells of p_ab log(p_ab / (p_a p_b))                                  [nats]

where p are the fractions of samples in the cells of a histogram of equal bins between the least and the largest value.
This plug-in estimate is never negative and too large by about (cells - rows - columns + 1) / (2 samples), each counted
where anything falls into it; `miller_madow=True` subtracts that. Bins hide what happens within them, which lowers it:
compare estimates of the same number of bins and samples alone. Counts have no derivative: all gradients here are zero,
but for `information` of given counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights
from normjax._leaves import COUNT
from normjax.diagnostics import _shared as shared
from normjax.diagnostics._shared import UNITS, Axes, Mask, require_real
from normjax.field import FieldError

Bounds = tuple[float, float]
Mapped = tuple[str, ...]  # names of axes


class Histogram(NamedTuple):
    """A joint histogram of two units.

    Attributes:
      counts: number of samples (sum of weights) in each cell, float32 or wider, `[bins of a, bins of b]`.
      a_edges: edges of the bins of the first, `[bins + 1]`. [units of a]
      b_edges: edges of the bins of the second, `[bins + 1]`. [units of b]

    Source: Ren et al. 2017, the figure of joint histograms.

    >>> joint_histogram(jnp.array([0.0, 1.0]), jnp.array([0.0, 4.0]), bins=2).b_edges
    Array([0., 2., 4.], dtype=float32)
    """

    counts: jax.Array
    a_edges: jax.Array
    b_edges: jax.Array


def joint_histogram(
    a: ArrayLike,
    b: ArrayLike,
    *,
    bins: int = 32,
    bounds: tuple[Bounds, Bounds] | None = None,
    mask: Mask = None,
    axis_name: Axes = (),
) -> Histogram:
    """Counts in which cells two units lie together, `[bins, bins]` with edges `[bins + 1]`.

    Args:
      a: values of the first unit, of any shape.
      b: values of the second unit, of the shape of a.
      bins: number of equal bins of each.
      bounds: ((least, largest) of a, (least, largest) of b); by default those found. What lies beyond, infinities and NaN
        do not count; the last bin holds its upper edge.
      mask: boolean mask or weights that broadcast against a.
      axis_name: mapped axes over which the samples are spread.

    Source: Ren et al. 2017, the figure of joint histograms.

    >>> found = jax.jit(lambda a, b: joint_histogram(a, b, bins=2))(jnp.array([0.0, 0.1, 1.0]), jnp.array([0.0, 4.0, 4.0]))
    >>> found.counts.tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    bins = COUNT("bins", bins)
    a, b = (require_real(unit, "joint_histogram") for unit in (a, b))
    if a.shape != b.shape:
        raise FieldError(f"a joint histogram takes two arrays of one shape, found shapes {a.shape} and {b.shape}")
    weights = None
    if mask is not None:
        as_weights(mask, a)
        weights = jnp.broadcast_to(jnp.asarray(mask), a.shape)[..., None]
    dtype = jnp.promote_types(a.dtype, b.dtype)
    both = jnp.stack([a.astype(dtype), b.astype(dtype)], -1)
    mapped = shared.mapped_axes(axis_name)
    samples = _binned(both, "... c", bins, bounds, weights, mapped, "joint_histogram")
    counts = _counts_with_all(samples, jnp.asarray(0), bins, mapped)[1]
    return Histogram(counts.astype(samples.edges.dtype), samples.edges[0], samples.edges[1])


def information(counts: ArrayLike, *, miller_madow: bool = False) -> jax.Array:
    """Mutual information of the two units of a joint histogram, `[...]` in nats; 0 for an empty one.

    Args:
      counts: non-negative counts or weights, floating, `[..., bins of a, bins of b]`.
      miller_madow: subtract the first term of the bias, (cells - rows - columns + 1) / (2 total).

    Source: Cover & Thomas 2006, equation 2.28; the correction: Miller 1955.

    >>> jax.jit(information)(jnp.array([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])) / jnp.log(2.0)
    Array([1., 0.], dtype=float32)
    """
    counts = require_real(counts, "information")
    total = jnp.sum(counts, (-2, -1), keepdims=True)
    p = counts / jnp.where(total > 0, total, 1)
    rows, columns = jnp.sum(p, -1, keepdims=True), jnp.sum(p, -2, keepdims=True)

    def log(q: jax.Array) -> jax.Array:
        return jnp.log(jnp.where(q > 0, q, 1))

    found = jnp.sum(p * (log(p) - log(rows) - log(columns)), (-2, -1))
    if not miller_madow:
        return found
    cells, filled_rows, filled_columns = (jnp.sum(q > 0, (-2, -1)) for q in (p, rows, columns))
    excess = (cells - filled_rows - filled_columns + 1).astype(found.dtype)
    total = total[..., 0, 0]
    return jnp.where(total > 0, found - excess / (2 * jnp.where(total > 0, total, 1)), 0)


def mutual_information_matrix(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    bins: int = 32,
    miller_madow: bool = False,
    mask: Mask = None,
    axis_name: Axes = (),
) -> jax.Array:
    """Mutual information of every pair of units over all samples, `[c, c]` in nats; each unit's entropy on the diagonal.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `c` are the units, all other axes samples.
      bins: number of equal bins of each unit, between its least and its largest value.
      miller_madow: subtract the first term of the estimate's bias.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Source: Ren et al. 2017, the analysis of first-layer activations (a two-dimensional histogram). It takes the memory of c.

    >>> x = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 5.0, 0.0], [1.0, 5.0, 1.0]])
    >>> jax.jit(lambda x: mutual_information_matrix(x, bins=2) / jnp.log(2.0))(x).round(3).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    bins, mapped = COUNT("bins", bins), shared.mapped_axes(axis_name)
    samples = _binned(x, layout, bins, None, mask, mapped, "mutual_information_matrix")

    def of(unit: jax.Array) -> jax.Array:
        counts = _counts_with_all(samples, unit, bins, mapped)
        return information(counts.astype(samples.edges.dtype), miller_madow=miller_madow)

    return lax.map(of, jnp.arange(samples.place.shape[1]))


def mutual_information(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    bins: int = 32,
    miller_madow: bool = False,
    mask: Mask = None,
    axis_name: Axes = (),
) -> jax.Array:
    """Averages the mutual information over all pairs of different units that change, a scalar in nats; NaN without any.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `c` are the units, all other axes samples.
      bins: number of equal bins of each unit, between its least and its largest value.
      miller_madow: subtract the first term of the estimate's bias.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Source: Ren et al. 2017, the analysis of first-layer activations.

    >>> x = jnp.array([[0.0, 3.0], [0.0, 3.0], [1.0, 4.0], [1.0, 4.0]])
    >>> round(float(jax.jit(lambda x: mutual_information(x, bins=2))(x)), 4)   # log 2
    0.6931
    """
    matrix = mutual_information_matrix(x, layout, bins=bins, miller_madow=miller_madow, mask=mask, axis_name=axis_name)
    alive = jnp.diagonal(matrix) > 0  # a unit that fills one bin has entropy zero, corrected or not
    return shared.mean_where(matrix, shared.pairs_of(alive))


class _Samples(NamedTuple):
    """Units in bins: places and weights `[samples, c]`, edges `[c, bins + 1]`; masked or out of bounds is of weight 0."""

    place: jax.Array  # the bin of each value, 0..bins - 1
    weight: jax.Array  # int32 for counts, which float32 loses at 2 ** 24
    edges: jax.Array


def _binned(
    x: ArrayLike, layout: str, bins: int, bounds: Sequence[Bounds] | None, mask: Mask, mapped: Mapped, caller: str
) -> _Samples:
    """The bin of every value; by default the bins of a unit lie between the least and the largest that count."""
    x = lax.stop_gradient(require_real(x, caller))
    number = shared.axis_number(UNITS, layout, x.ndim)
    weights = as_weights(mask, x)
    if weights is None:
        weight = jnp.ones(x.shape, jnp.int32)
    else:
        counted = jnp.asarray(mask).dtype == bool
        weight = jnp.broadcast_to(weights.valid.astype(jnp.int32) if counted else weights.value, x.shape)
    x, weight = (jnp.moveaxis(array, number, -1).reshape(-1, x.shape[number]) for array in (x, weight))
    valid = (weight > 0) & jnp.isfinite(x)
    if bounds is not None and (len(bounds) != x.shape[-1] or any(not low < high for low, high in bounds)):
        raise ValueError(f"bounds are a pair (least, largest) for each of the two units; found {bounds!r}")
    low, high = _range(x, valid, mapped) if bounds is None else map(jnp.asarray, np.asarray(bounds, x.dtype).T)
    inside = valid & (x >= low[None]) & (x <= high[None])
    place = jnp.floor(jnp.where(inside, x - low[None], 0) / (high - low)[None] * bins).astype(jnp.int32)
    edges = low[:, None] + (high - low)[:, None] * jnp.linspace(0, 1, bins + 1, dtype=x.dtype)[None]
    return _Samples(jnp.minimum(place, bins - 1), jnp.where(inside, weight, 0), edges)


def _range(x: jax.Array, valid: jax.Array, mapped: Mapped) -> tuple[jax.Array, jax.Array]:
    """The least and the largest value of each unit on all devices, `[c]`."""
    low = jnp.min(x, 0, where=valid, initial=jnp.inf)
    high = jnp.max(x, 0, where=valid, initial=-jnp.inf)
    for name in mapped:
        low, high = lax.pmin(low, name), lax.pmax(high, name)
    low, high = (jnp.where(jnp.isfinite(edge), edge, 0) for edge in (low, high))
    flat = low == high  # a constant has a bin around it, as in NumPy
    return jnp.where(flat, low - 0.5, low), jnp.where(flat, high + 0.5, high)


def _counts_with_all(samples: _Samples, unit: jax.Array, bins: int, mapped: Mapped) -> jax.Array:
    """The joint histograms of one unit with each, `[c, bins, bins]`."""
    place, weight, _ = samples
    cell = place[:, unit, None] * bins + place
    both = weight[:, unit, None] * weight
    if not jnp.issubdtype(weight.dtype, jnp.integer):
        both = jnp.sqrt(both)  # equal weights of a pair count once
    count = place.shape[1]
    counts = jnp.zeros((count, bins * bins), both.dtype).at[jnp.arange(count)[None], cell].add(both)
    return shared.sum_over_devices(counts, mapped).reshape(count, bins, bins)
