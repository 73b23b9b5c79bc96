"""How alike the units of a layer are over the samples, and how alike the examples: inner products at length one."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax.diagnostics import _shared as shared
from normjax.diagnostics._shared import UNITS, Axes, Mask
from normjax.field import EXAMPLES


def correlation_matrix(x: ArrayLike, layout: str = "n ... c", *, mask: Mask = None, axis_name: Axes = ()) -> jax.Array:
    """Pearson's correlation of every pair of units over all samples, `[c, c]`; zeros for a unit that never changes.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `c` are the units, all other axes samples.
      mask: boolean mask or weights that broadcast against x. Where units have different weights, a sample counts for a
        pair as the geometric mean of the two.
      axis_name: mapped axes (vmap, shard_map, pmap) over which the samples are spread.

    Source: Ren et al. 2017, the analysis of first-layer activations.

    >>> x = jnp.array([[1.0, 2.0, 7.0], [2.0, 1.0, 7.0], [3.0, 0.0, 7.0]])
    >>> jax.jit(correlation_matrix)(x).round(5).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    mapped = shared.mapped_axes(axis_name)
    z = shared.vectors_along(UNITS, x, layout, mask, "correlation_matrix", mapped).as_matrix()
    return shared.sum_over_devices(jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST), mapped)


def correlation(x: ArrayLike, layout: str = "n ... c", *, mask: Mask = None, axis_name: Axes = ()) -> jax.Array:
    """Averages |correlation| over all pairs of different units that change, a scalar in 0..1; NaN without any.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `c` are the units, all other axes samples.
      mask: boolean mask or weights that broadcast against x. Where units have different weights, a sample counts for a
        pair as the geometric mean of the two.
      axis_name: mapped axes (vmap, shard_map, pmap) over which the samples are spread.

    Source: Ren et al. 2017, the analysis of first-layer activations.

    >>> round(float(jax.jit(correlation)(jnp.array([[1.0, -2.0, 3.0], [2.0, -4.0, 3.0], [3.0, -6.0, 3.0]]))), 5)
    1.0
    """
    matrix = jnp.abs(correlation_matrix(x, layout, mask=mask, axis_name=axis_name))
    return shared.mean_where(matrix, shared.pairs_of(jnp.diagonal(matrix) > 0.5))


def cosine_similarity(x: ArrayLike, layout: str = "n ... c", *, mask: Mask = None, axis_name: Axes = ()) -> jax.Array:
    """Averages the cosine between different examples that are not zero, a scalar in -1..1; NaN with fewer than two.

    mean_n (sum_m K_nm - 1) / (N - 1), K of the normalized examples, evaluated as (|sum_n u_n| ** 2 - N) / (N (N - 1)).

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `n` are the examples, all other axes one vector.
      mask: boolean mask or weights that broadcast against x; weights multiply the terms of the inner products.
      axis_name: mapped axes over which the examples are spread.

    Source: Lubana et al. 2021, the activation prober of the published code.

    >>> round(float(jax.jit(cosine_similarity)(jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 0.0]]))), 4)
    0.7071
    """
    mapped = shared.mapped_axes(axis_name)
    u, alive = _examples(x, layout, mask, "cosine_similarity")
    total, number, own = shared.sum_over_devices((jnp.sum(u, 0), jnp.sum(alive), jnp.sum(jnp.square(u))), mapped)
    number, enough = number.astype(own.dtype), number > 1
    between = jnp.sum(jnp.square(total)) - own
    return jnp.where(enough, between / jnp.where(enough, number * (number - 1), 1), jnp.nan)


def stable_rank(x: ArrayLike, layout: str = "n ... c", *, mask: Mask = None, axis_name: Axes = ()) -> jax.Array:
    """Stable rank of the normalized examples: tr K / |K|_2 = N / (largest eigenvalue of K), between 1 and N.

    Examples that are zero throughout do not count; NaN where all are. The eigenvalue is that of K, [N, N], or of the matrix
    of the elements where that is smaller; over mapped axes, each device gathers the examples of all.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider.
      layout: name of each axis; `n` are the examples, all other axes one vector.
      mask: boolean mask or weights that broadcast against x; weights multiply the terms of the inner products.
      axis_name: mapped axes over which the examples are spread.

    Source: Lubana et al. 2021, the activation prober of the published code.

    >>> round(float(jax.jit(stable_rank)(jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]))), 4)
    1.5
    """
    mapped = shared.mapped_axes(axis_name)
    u, alive = _examples(x, layout, mask, "stable_rank")
    number = shared.sum_over_devices(jnp.sum(alive), mapped)
    if u.shape[0] <= u.shape[1]:
        u = lax.all_gather(u, mapped).reshape(-1, u.shape[1]) if mapped else u
        gram = jnp.matmul(u, u.T, precision=lax.Precision.HIGHEST)
    else:
        gram = shared.sum_over_devices(jnp.matmul(u.T, u, precision=lax.Precision.HIGHEST), mapped)
    return jnp.where(number > 0, number.astype(gram.dtype) / _largest_eigenvalue(gram), jnp.nan)


def _examples(x: ArrayLike, layout: str, mask: Mask, caller: str) -> tuple[jax.Array, jax.Array]:
    """Examples at length one, `[n, elements]`, and which of them are not zero."""
    examples = shared.vectors_along(EXAMPLES, x, layout, mask, caller)
    return examples.as_matrix(), examples.for_each(examples.alive)


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
    separate = gap > jnp.finfo(gap.dtype).eps * gap.size * values[-1]
    inverse = jnp.where(separate, 1 / jnp.where(separate, gap, 1), 0)
    moved = (gram - held) @ first
    first = first + vectors @ (inverse * (vectors.T @ moved))
    top = first @ gram @ first
    return jnp.where(top > 0, top, 1) / (first @ first)
