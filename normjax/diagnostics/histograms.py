"""How much one unit tells about another: joint histograms, and the mutual information that they estimate.

    I(a; b) = sum over cells of p_ab log(p_ab / (p_a p_b))                                  [nats]

where p are the fractions of samples in the cells of a histogram of equal bins between the least and the largest value.
This plug-in estimate is never negative and too large by about (cells - rows - columns + 1) / (2 samples), each counted
where anything falls into it; `miller_madow=True` subtracts that. Bins hide what happens within them, which lowers it:
compare estimates of the same number of bins and samples alone. Counts have no derivative: all gradients here are zero,
but for `information` of given counts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights
from normjax.diagnostics._bins import Bounds, binned, counts_with_all
from normjax.diagnostics._shared import Axes, Mask, mapped_axes, mean_where, pairs_of, require_real
from normjax.field import FieldError


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
    a, b = (require_real(unit, "joint_histogram") for unit in (a, b))
    if a.shape != b.shape:
        raise FieldError(f"a joint histogram takes two arrays of one shape, found shapes {a.shape} and {b.shape}")
    weights = None
    if mask is not None:
        as_weights(mask, a)
        weights = jnp.broadcast_to(jnp.asarray(mask), a.shape)[..., None]
    dtype = jnp.promote_types(a.dtype, b.dtype)
    both = jnp.stack([a.astype(dtype), b.astype(dtype)], -1)
    mapped = mapped_axes(axis_name)
    samples = binned(both, "... c", bins, bounds, weights, mapped, "joint_histogram")
    counts = counts_with_all(samples, jnp.asarray(0), bins, mapped)[1]
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

    The memory is that of c histograms.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `c` are the units, all other axes samples.
      bins: number of equal bins of each unit, between its least and its largest value.
      miller_madow: subtract the first term of the estimate's bias.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Source: Ren et al. 2017, the analysis of first-layer activations (a two-dimensional histogram).

    >>> x = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 5.0, 0.0], [1.0, 5.0, 1.0]])
    >>> jax.jit(lambda x: mutual_information_matrix(x, bins=2) / jnp.log(2.0))(x).round(3).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    mapped = mapped_axes(axis_name)
    samples = binned(x, layout, bins, None, mask, mapped, "mutual_information_matrix")

    def of(unit: jax.Array) -> jax.Array:
        counts = counts_with_all(samples, unit, bins, mapped)
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
    # A unit that fills one bin has entropy zero, corrected or not.
    alive = jnp.diagonal(matrix) > 0
    return mean_where(matrix, pairs_of(alive))
