"""Units and examples as vectors of length one, and what their inner products say.

Units are the channels, axis `c` of the layout; every other axis counts as samples of them. Examples are axis `n`; all
that an example holds is one vector. Both are rows of the equation with eps 0: centred and divided over the samples, units
give their correlations; divided over all of an example, examples give their cosines, how alike a layer makes them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import Weights, as_weights, zero_masked
from normjax._expect.binding import axes
from normjax._normalize.evaluate import equation
from normjax.field import EXAMPLES, Field, Span
from normjax.information import UNITS, Names, axis_of, bound_names, mean_where, pairs, real_of
from normjax.theory import Normalizer


class Vectors(NamedTuple):
    """Units or examples as vectors of length one; a vector of zeros (a constant unit, an empty example) stays one.

    Attributes:
      y: standardized activations, of the shape of x.
      mean: means of the units, 0 for examples; as all that follows, it broadcasts against x. [u]
      var: variances of the units, mean squares of the examples; 0 for a vector of zeros. [u ** 2]
      alive: whether there is more than zeros.
      weight: sum of weights behind each.
      weights: those of the elements, None without a mask.
      number: of the axis along which the vectors lie.
    """

    y: jax.Array
    mean: jax.Array
    var: jax.Array
    alive: jax.Array
    weight: jax.Array
    weights: Weights | None
    number: int

    def flat(self) -> jax.Array:
        """One row for each vector, with inner products weighted as the mask says, `[c or n, samples]`."""
        share = 1 / jnp.where(self.weight > 0, self.weight, 1)
        if self.weights is not None:
            share = self.weights.value * share
        rows = jnp.moveaxis(self.y * jnp.sqrt(share), self.number, 0)
        return rows.reshape(rows.shape[0], -1)

    def kept(self, value: jax.Array) -> jax.Array:
        """A statistic as a vector over the kept axis."""
        shape = [self.y.shape[i] if i == self.number else 1 for i in range(self.y.ndim)]
        return jnp.broadcast_to(value, shape).reshape(-1)


def all_but(name: str, what: str, layout: str, ndim: int, mapped: tuple[str, ...] = ()) -> tuple[int, Field]:
    """The number of an axis of the layout, and the field of all others.

    >>> number, field = all_but("c", "units", "n ... c", 4, ("data",))
    >>> number, str(field)
    (3, 'n ... @data')
    """
    number = axis_of(name, what, layout, ndim)
    spans = [Span(other) for other, numbers in axes(layout, ndim).items() if other != name and numbers]
    return number, Field((*spans, *(Span(None, mapped=axis) for axis in mapped)))


def vectors_of(
    x: ArrayLike, layout: str, mask: ArrayLike | None, caller: str, units: bool, names: tuple[str, ...] = ()
) -> Vectors:
    """Units (centred) or examples (not centred) as vectors of length one, with the moments behind them.

    >>> vectors_of(jnp.array([[3.0], [5.0]]), "n c", None, "test", units=True).y.tolist()
    [[-1.0], [1.0]]
    """
    x = real_of(x, caller)
    name, what = (UNITS, "units") if units else (EXAMPLES, "examples")
    number, field = all_but(name, what, layout, x.ndim, names)
    weights = as_weights(mask, x)
    x = zero_masked(x, weights)
    over = tuple(i for i in range(x.ndim) if i != number)
    # Numbers about one, so that no square over- or underflows; around the least, so that a constant unit is exactly zero.
    least = _least(x, weights, over, names) if units else jnp.zeros_like(x, shape=[1] * x.ndim)
    size = peak_of(zero_masked(x - least, weights), over, names)
    out = equation((x - least) / size, Normalizer(field if units else None, field, eps=0.0), layout, mask=mask)
    mean = least + out.stats.mean * size if units else jnp.zeros_like(size)
    weight, var = jnp.asarray(out.stats.var_weight, size.dtype), out.stats.var
    return Vectors(out.y, mean, var * jnp.square(size), var > 0, weight, weights, number)


def _least(x: jax.Array, weights: Weights | None, over: tuple[int, ...], names: tuple[str, ...]) -> jax.Array:
    valid = True if weights is None else jnp.broadcast_to(weights.valid, x.shape)
    least = jnp.min(lax.stop_gradient(x), over, keepdims=True, initial=jnp.inf, where=valid)
    for name in names:
        least = lax.pmin(least, name)
    return jnp.where(jnp.isfinite(least), least, 0)


def peak_of(x: jax.Array, over: tuple[int, ...], names: tuple[str, ...]) -> jax.Array:
    """The largest |x| over some axes, kept at length 1, or one where that is no scale; not differentiated.

    >>> peak_of(jnp.array([[1.0, 0.0], [-3.0, 0.0]]), (0,), ())
    Array([[3., 1.]], dtype=float32)
    """
    peak = jnp.max(lax.stop_gradient(jnp.abs(x)), over, keepdims=True, initial=0)
    for name in names:
        peak = lax.pmax(peak, name)
    return jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)


def over_devices(value: Any, names: tuple[str, ...]) -> Any:
    """The sum over mapped axes, if there are any.

    >>> over_devices(2.0, ())
    2.0
    """
    return lax.psum(value, names) if names else value


def correlation_matrix(
    x: ArrayLike, layout: str = "n ... c", *, mask: ArrayLike | None = None, axis_name: Names = ()
) -> jax.Array:
    """Correlates every pair of units over all samples.

    Args:
      x: activations, axes as named by `layout`. [units u]
      layout: name of each axis; `c` are the units, all other axes samples.
      mask: boolean mask or weights that broadcast against x. Where units have different weights, a sample counts for a
        pair as the geometric mean of the two.
      axis_name: mapped axes (vmap, shard_map, pmap) over which the samples are spread.

    Returns:
      `[c, c]`, float32 or wider: Pearson's coefficients. The row and the column of a unit that never changes are zero,
      its diagonal element too, which is 1 for all others.

    Raises:
      FieldError: the layout names no axis c, or mask or mapped axes do not fit.
      TypeError: x does not hold real floating-point numbers.

    Source: Ren et al. 2017, the analysis of first-layer activations.

    >>> x = jnp.array([[1.0, 2.0, 7.0], [2.0, 1.0, 7.0], [3.0, 0.0, 7.0]])
    >>> jax.jit(correlation_matrix)(x).round(5).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    names = bound_names(axis_name)
    z = vectors_of(x, layout, mask, "correlation_matrix", True, names).flat()
    return over_devices(jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST), names)


def correlation(
    x: ArrayLike, layout: str = "n ... c", *, mask: ArrayLike | None = None, axis_name: Names = ()
) -> jax.Array:
    """Averages |correlation| over all pairs of different units, those that never change left out.

    Args as for `correlation_matrix`.

    Returns:
      A float32 (or wider) scalar in 0..1; NaN without any pair.

    Source: Ren et al. 2017, the analysis of first-layer activations.

    >>> round(float(jax.jit(correlation)(jnp.array([[1.0, -2.0, 3.0], [2.0, -4.0, 3.0], [3.0, -6.0, 3.0]]))), 5)
    1.0
    """
    matrix = jnp.abs(correlation_matrix(x, layout, mask=mask, axis_name=axis_name))
    return mean_where(matrix, pairs(jnp.diagonal(matrix) > 0.5))


def cosine_similarity(
    x: ArrayLike, layout: str = "n ... c", *, mask: ArrayLike | None = None, axis_name: Names = ()
) -> jax.Array:
    """Averages the cosine between different examples: mean_n (sum_m K_nm - 1) / (N - 1), K of the normalized examples.

    Evaluated as (|sum_n u_n| ** 2 - N) / (N (N - 1)), without the N x N matrix K.

    Args:
      x: activations.
      layout: name of each axis; `n` are the examples, all other axes one vector.
      mask: boolean mask or weights that broadcast against x; weights multiply the terms of the inner products.
      axis_name: mapped axes over which the examples are spread.

    Returns:
      A float32 (or wider) scalar in -1..1, over the examples that are not zero throughout; NaN with fewer than two.

    Raises:
      FieldError: the layout names no axis n, or mask or mapped axes do not fit.
      TypeError: x does not hold real floating-point numbers.

    Source: Lubana et al. 2021, the activation prober of the published code.

    >>> round(float(jax.jit(cosine_similarity)(jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 0.0]]))), 4)
    0.7071
    """
    names = bound_names(axis_name)
    u, alive = _examples(x, layout, mask, "cosine_similarity")
    total, number, own = over_devices((jnp.sum(u, 0), jnp.sum(alive), jnp.sum(jnp.square(u))), names)
    number, enough = number.astype(own.dtype), number > 1
    between = jnp.sum(jnp.square(total)) - own
    return jnp.where(enough, between / jnp.where(enough, number * (number - 1), 1), jnp.nan)


def stable_rank(
    x: ArrayLike, layout: str = "n ... c", *, mask: ArrayLike | None = None, axis_name: Names = ()
) -> jax.Array:
    """Stable rank of the normalized examples: tr K / |K|_2 = N / (largest eigenvalue of K), between 1 and N.

    Args as for `cosine_similarity`. The eigenvalue is that of K, [N, N], or of the matrix of the elements where that is
    smaller; over mapped axes, each device gathers the examples of all.

    Returns:
      A float32 (or wider) scalar; NaN where every example is zero.

    Source: Lubana et al. 2021, the activation prober of the published code.

    >>> round(float(jax.jit(stable_rank)(jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]))), 4)
    1.5
    """
    names = bound_names(axis_name)
    u, alive = _examples(x, layout, mask, "stable_rank")
    number = over_devices(jnp.sum(alive), names)
    few = u.shape[0] <= u.shape[1]
    if names and few:
        u = lax.all_gather(u, names).reshape(-1, u.shape[1])
    gram = jnp.matmul(u, u.T, precision=lax.Precision.HIGHEST) if few else over_devices(
        jnp.matmul(u.T, u, precision=lax.Precision.HIGHEST), names)  # fmt: skip
    return jnp.where(number > 0, number.astype(gram.dtype) / _largest_eigenvalue(gram), jnp.nan)


def _examples(x: ArrayLike, layout: str, mask: ArrayLike | None, caller: str) -> tuple[jax.Array, jax.Array]:
    """Examples at length one, `[n, elements]`, and which of them are not zero."""
    vectors = vectors_of(x, layout, mask, caller, False)
    return vectors.flat(), vectors.kept(vectors.alive)


def _largest_eigenvalue(gram: jax.Array) -> jax.Array:
    """The largest eigenvalue of a positive matrix that is not zero.

    JAX's derivative of `eigh` divides by differences of eigenvalues and so is NaN in second derivatives where two
    coincide, which the zeros of a matrix of low rank do. So the eigenvectors are held fixed, the first is moved to first
    order by perturbation theory, and its Rayleigh quotient taken: right in value, first and second derivative.
    """
    held = lax.stop_gradient(gram)
    values, vectors = jnp.linalg.eigh(held)
    first = vectors[:, -1]
    gap = values[-1] - values
    apart = gap > jnp.finfo(gap.dtype).eps * gap.size * values[-1]
    inverse = jnp.where(apart, 1 / jnp.where(apart, gap, 1), 0)
    moved = (gram - held) @ first
    first = first + vectors @ (inverse * (vectors.T @ moved))
    top = first @ gram @ first
    return jnp.where(top > 0, top, 1) / (first @ first)
