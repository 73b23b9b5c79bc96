"""How much one unit tells about another: joint histograms, and the mutual information that they estimate.

    I(a; b) = sum over cells of p_ab log(p_ab / (p_a p_b))                                  [nats]

where p are the fractions of samples in the cells of a histogram of equal bins between the smallest and the largest value.
This plug-in estimate is never negative and too large by about (cells - rows - columns + 1) / (2 samples), each counted
where anything falls into it; `miller_madow=True` subtracts that. Bins hide what happens within them, which lowers it. So
compare estimates of the same number of bins and samples alone.

Counts have no derivative: gradients of everything here are zero, but for `information` of given counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype
from normjax._expect.binding import axes
from normjax._expect.sharding import axis_size
from normjax.field import FieldError

UNITS = "c"
Names = str | Sequence[str]
Bounds = tuple[float, float]


class Histogram(NamedTuple):
    """A joint histogram of two units.

    Attributes:
      counts: number of samples (sum of weights) in each cell, float32 or wider, `[bins of a, bins of b]`.
      a_edges: edges of the bins of the first, `[bins + 1]`. [units of a]
      b_edges: the same of the second. [units of b]
    """

    counts: jax.Array
    a_edges: jax.Array
    b_edges: jax.Array


def bound_names(axis_name: Names) -> tuple[str, ...]:
    """The mapped axes as a tuple; FieldError where one is not bound.

    >>> bound_names(())
    ()
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        axis_size(name)
    return names


def real_of(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as a real array of float32 or wider; TypeError for anything else.

    >>> real_of(jnp.ones(2, jnp.bfloat16), "test").dtype
    dtype('float32')
    """
    x = require_float(x, caller)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{caller} takes real numbers, found {x.dtype}; take the real part or the absolute value first")
    return x.astype(statistics_dtype(x.dtype))


def axis_of(name: str, what: str, layout: str, ndim: int) -> int:
    """The number of a named axis.

    >>> axis_of("c", "units", "n c ...", 4)
    1
    """
    where = axes(layout, ndim)
    if name not in where:
        raise FieldError(f"{what} lie along the axis '{name}', which layout \"{layout}\" does not name")
    return where[name][0]


def _over_devices(value: jax.Array, names: tuple[str, ...], reduce: Any) -> jax.Array:
    for name in names:
        value = reduce(value, name)
    return value


class _Samples(NamedTuple):
    """Units in bins.

    Attributes:
      place: bin of each value, 0..bins - 1, `[samples, c]`.
      weight: int32 for counts, which float32 loses at 2 ** 24; zero where masked or out of bounds, `[samples, c]`.
      edges: `[c, bins + 1]`.
    """

    place: jax.Array
    weight: jax.Array
    edges: jax.Array


def _binned(
    x: ArrayLike, layout: str, bins: int, bounds: Any, mask: ArrayLike | None, names: tuple[str, ...], caller: str
) -> _Samples:
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins is an integer of at least 1; found {bins!r}")
    x = lax.stop_gradient(real_of(x, caller))
    number = axis_of(UNITS, "units", layout, x.ndim)
    weights = as_weights(mask, x)
    if weights is None:
        weight = jnp.ones(x.shape, jnp.int32)
    else:
        counted = jnp.asarray(mask).dtype == bool
        weight = jnp.broadcast_to(weights.valid.astype(jnp.int32) if counted else weights.value, x.shape)
    x, weight = (jnp.moveaxis(array, number, -1).reshape(-1, x.shape[number]) for array in (x, weight))
    valid = (weight > 0) & jnp.isfinite(x)
    if bounds is None:
        low = _over_devices(jnp.min(x, 0, where=valid, initial=jnp.inf), names, lax.pmin)
        high = _over_devices(jnp.max(x, 0, where=valid, initial=-jnp.inf), names, lax.pmax)
        low, high = (jnp.where(jnp.isfinite(edge), edge, 0) for edge in (low, high))
        flat = low == high  # a constant has a bin around it, as in NumPy
        low, high = jnp.where(flat, low - 0.5, low), jnp.where(flat, high + 0.5, high)
    else:
        if len(bounds) != x.shape[-1] or any(not low < high for low, high in bounds):
            raise ValueError(f"bounds are a pair (least, largest) for each of the two units; found {bounds!r}")
        low, high = (jnp.asarray([bound[end] for bound in bounds], x.dtype) for end in (0, 1))
    inside = valid & (x >= low[None]) & (x <= high[None])
    place = jnp.floor(jnp.where(inside, x - low[None], 0) / (high - low)[None] * bins).astype(jnp.int32)
    steps = jnp.linspace(0, 1, bins + 1, dtype=x.dtype)
    edges = low[:, None] + (high - low)[:, None] * steps[None]
    return _Samples(jnp.minimum(place, bins - 1), jnp.where(inside, weight, 0), edges)


def _joint_with_all(samples: _Samples, unit: jax.Array, bins: int, names: tuple[str, ...]) -> jax.Array:
    """The joint histograms of one unit with each, `[c, bins, bins]`."""
    place, weight, _ = samples
    cell = place[:, unit, None] * bins + place
    both = weight[:, unit, None] * weight
    if not jnp.issubdtype(weight.dtype, jnp.integer):
        both = jnp.sqrt(both)  # equal weights of a pair count once
    count = place.shape[1]
    counts = jnp.zeros((count, bins * bins), both.dtype).at[jnp.arange(count)[None], cell].add(both)
    return (lax.psum(counts, names) if names else counts).reshape(count, bins, bins)


def joint_histogram(
    a: ArrayLike,
    b: ArrayLike,
    *,
    bins: int = 32,
    bounds: tuple[Bounds, Bounds] | None = None,
    mask: ArrayLike | None = None,
    axis_name: Names = (),
) -> Histogram:
    """Counts in which cells two units lie together.

    Args:
      a: values of the first unit, of any shape.
      b: those of the second, of the same shape.
      bins: number of equal bins of each.
      bounds: ((least, largest) of a, the same of b); by default those found. Values beyond, infinities and NaN do
        not count; the last bin holds its upper edge.
      mask: boolean mask or weights that broadcast against a.
      axis_name: mapped axes over which the samples are spread.

    Returns:
      A Histogram.

    Raises:
      FieldError: the shapes differ, or mask or mapped axes do not fit.
      ValueError: bins is no positive integer, or bounds are not two pairs of numbers in order.
      TypeError: a or b does not hold real floating-point numbers.

    Source: Ren et al. 2017, the figure of joint histograms.

    >>> found = jax.jit(lambda a, b: joint_histogram(a, b, bins=2))(jnp.array([0.0, 0.1, 1.0]), jnp.array([0.0, 4.0, 4.0]))
    >>> found.counts.tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    a, b = (real_of(unit, "joint_histogram") for unit in (a, b))
    if a.shape != b.shape:
        raise FieldError(f"a joint histogram takes two arrays of one shape, found shapes {a.shape} and {b.shape}")
    weights = None
    if mask is not None:
        as_weights(mask, a)
        weights = jnp.broadcast_to(jnp.asarray(mask), a.shape)[..., None]
    dtype = jnp.promote_types(a.dtype, b.dtype)
    both = jnp.stack([a.astype(dtype), b.astype(dtype)], -1)
    names = bound_names(axis_name)
    samples = _binned(both, "... c", bins, bounds, weights, names, "joint_histogram")
    counts = _joint_with_all(samples, jnp.asarray(0), bins, names)[1]
    return Histogram(counts.astype(samples.edges.dtype), samples.edges[0], samples.edges[1])


def information(counts: ArrayLike, *, miller_madow: bool = False) -> jax.Array:
    """Mutual information of the two units of a joint histogram.

    Args:
      counts: non-negative counts or weights, `[..., bins of a, bins of b]`.
      miller_madow: subtract the first term of the bias, (cells - rows - columns + 1) / (2 total).

    Returns:
      float32 or wider, `[...]`; 0 for an empty histogram. [nats]

    Source: Cover & Thomas 2006, equation 2.28; the correction: Miller 1955.

    >>> jax.jit(information)(jnp.array([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])) / jnp.log(2.0)
    Array([1., 0.], dtype=float32)
    """
    counts = real_of(counts, "information")
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
    mask: ArrayLike | None = None,
    axis_name: Names = (),
) -> jax.Array:
    """Mutual information of every pair of units over all samples.

    Args:
      x: activations, axes as named by `layout`.
      layout: name of each axis; `c` are the units, all other axes samples.
      bins: number of equal bins of each unit, between its least and its largest value.
      miller_madow: subtract the first term of the estimate's bias.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Returns:
      `[c, c]`, float32 or wider [nats]; the diagonal holds each unit's own entropy. The memory is that of c histograms.

    Raises:
      FieldError: the layout names no axis c, or mask or mapped axes do not fit.
      ValueError: bins is no positive integer.
      TypeError: x does not hold real floating-point numbers.

    Source: Ren et al. 2017, the analysis of first-layer activations (a two-dimensional histogram).

    >>> x = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 5.0, 0.0], [1.0, 5.0, 1.0]])
    >>> jax.jit(lambda x: mutual_information_matrix(x, bins=2) / jnp.log(2.0))(x).round(3).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    names = bound_names(axis_name)
    samples = _binned(x, layout, bins, None, mask, names, "mutual_information_matrix")

    def of(unit: jax.Array) -> jax.Array:
        counts = _joint_with_all(samples, unit, bins, names)
        return information(counts.astype(samples.edges.dtype), miller_madow=miller_madow)

    return lax.map(of, jnp.arange(samples.place.shape[1]))


def mutual_information(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    bins: int = 32,
    miller_madow: bool = False,
    mask: ArrayLike | None = None,
    axis_name: Names = (),
) -> jax.Array:
    """Averages the mutual information over all pairs of different units, those that never change left out.

    Args as for `mutual_information_matrix`.

    Returns:
      A float32 (or wider) scalar [nats]; NaN without any pair.

    Source: Ren et al. 2017, the analysis of first-layer activations.

    >>> x = jnp.array([[0.0, 3.0], [0.0, 3.0], [1.0, 4.0], [1.0, 4.0]])
    >>> round(float(jax.jit(lambda x: mutual_information(x, bins=2))(x)), 4)   # log 2
    0.6931
    """
    matrix = mutual_information_matrix(x, layout, bins=bins, miller_madow=miller_madow, mask=mask, axis_name=axis_name)
    # A unit that fills one bin has entropy zero, corrected or not.
    alive = jnp.diagonal(matrix) > 0
    return mean_where(matrix, pairs(alive))


def pairs(alive: jax.Array) -> jax.Array:
    """Which pairs of two different units count, `[c, c]`.

    >>> pairs(jnp.array([True, False, True])).astype(int).tolist()
    [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    """
    return alive[:, None] & alive[None, :] & ~jnp.eye(alive.size, dtype=bool)


def mean_where(value: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of the elements that count; NaN, with gradient 0, where none does.

    >>> mean_where(jnp.array([1.0, 3.0, 7.0]), jnp.array([True, True, False]))
    Array(2., dtype=float32)
    """
    count = jnp.sum(where)
    mean = jnp.sum(jnp.where(where, value, 0)) / jnp.maximum(count, 1).astype(value.dtype)
    return jnp.where(count > 0, mean, jnp.nan)
