"""Spectral norm: a kernel over its largest singular value, by power iteration. Not a row of the equation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import require_float, statistics_dtype
from normjax._expect.binding import axes
from normjax._expect.ranges import lifting, towards_one
from normjax._leaves import INTEGER, inverse_power
from normjax.field import FieldError


class Spectral(NamedTuple):
    """The kernel over sigma; u to start from the next time; sigma, a scalar, float32 or wider [units of the kernel].

    Kernel and u have the shape and dtype of those that were given.

    >>> spectral_norm(jnp.diag(jnp.array([4.0, 1.0])), jnp.array([1.0, 0.0])).sigma.item()
    4.0
    """

    kernel: jax.Array
    u: jax.Array
    sigma: jax.Array


def spectral_norm(
    kernel: ArrayLike,
    u: ArrayLike,
    *,
    steps: int = 1,
    eps: ArrayLike = 1e-12,
    layout: str = "... i o",
    outputs: str = "o",
) -> Spectral:
    """Divides a kernel by an estimate of its largest singular value.

    A kernel of a convolution is the matrix [space and inputs, outputs], as in the paper: not the convolution's own
    operator norm. u and v are constants to the gradient, which flows through sigma = v W u and through W. Training stores
    the new u; inference stores nothing, with as many steps (as Flax does) or with `steps=0`, which takes the stored u for
    the singular vector (as PyTorch does). Where sigma is 0 the kernel stays as it is.

    PyTorch stores both vectors, and one iteration of its training is the other half first: u from the stored v, then v from
    that u; here it is v from the stored u, as in the paper, and then u. So its sigma is |W u| of the new u, half an
    iteration beyond ours, which is |v W| of the v that the stored u gives. Its training weight is that of two calls, the
    second without a step: `out = spectral_norm(kernel, u)`, then `spectral_norm(kernel, out.u, steps=0).kernel`, exactly
    where its v belongs to the same kernel and u. With `steps=0`, u is only brought to length 1, v = W u / |W u| follows
    from it, and u returns as it was but for its length; the wrappers `SpectralNorm` normalize nothing with `n_steps=0`, as
    Flax's.

    Args:
      kernel: array of a real floating dtype, `[... i o]` or as the layout says.
      u: array of as many elements as the outputs, `[o]` or `[1, o]`, not all 0; random at the start. [no units]
      steps: power iterations, each v = W u / |W u| and then u = v W / |v W|.
      eps: added to the squared norms of the iteration; for a kernel (or u) whose largest magnitude is below 1/256, to the
        squared norms of the kernel brought there, so that a small kernel is normalized as any other.
      layout: name of each axis of the kernel.
      outputs: names of the axes that are the columns of the matrix; the others are its rows.

    Source: Miyato et al. 2018, algorithm 1 and equation 12 (the gradient).

    >>> kernel = jnp.diag(jnp.array([3.0, 1.0]))
    >>> out = spectral_norm(kernel, jnp.ones(2), steps=20)
    >>> out.sigma.round(4).item(), out.kernel.round(4).tolist()
    (3.0, [[1.0, 0.0], [0.0, 0.33329999446868896]])
    """
    kernel, given = require_float(kernel, "spectral_norm"), jnp.asarray(u)
    if jnp.iscomplexobj(kernel):
        raise TypeError(f"spectral_norm takes real arrays, found {kernel.dtype}")
    steps = INTEGER("steps", steps)
    if steps < 0:
        raise ValueError(f"steps is a number of power iterations, at least 0; found {steps}")
    matrix = _as_matrix(kernel, layout, outputs)
    if given.size != matrix.shape[1]:
        raise FieldError(
            f"u of shape {given.shape} does not fit {matrix.shape[1]} outputs: kernel of shape "
            f'{kernel.shape}, layout "{layout}", outputs "{outputs}"'
        )
    work = matrix.dtype
    # The iteration is that of the kernel times a power of two, which over- and underflows nowhere.
    u = lax.stop_gradient(given.reshape(-1).astype(work))
    (s, of_kernel), (s_of_u, of_u) = _near_one(matrix), _near_one(u)
    matrix, u = matrix * s, u * s_of_u
    still = lax.stop_gradient(matrix)
    u = u if steps else _unit(u, eps * of_u)
    v = _unit(_times(still, u), eps * of_kernel * (of_u if steps else 1))
    for step in range(steps):
        u = _unit(_times(still.T, v), eps * of_kernel)
        v = _unit(_times(still, u), eps * of_kernel) if step + 1 < steps else v
    sigma = _times(_times(matrix, u), v)
    normed = kernel.astype(work) * s / jnp.where(sigma != 0, sigma, 1)
    normed = jnp.where(sigma != 0, normed, kernel.astype(work))
    return Spectral(normed.astype(kernel.dtype), u.reshape(given.shape).astype(given.dtype), sigma / s)


def _as_matrix(kernel: jax.Array, layout: str, outputs: str) -> jax.Array:
    """The kernel as a matrix [all other axes, outputs], float32 or wider."""
    where = axes(layout, kernel.ndim)
    missing = [name for name in outputs.split() if name not in where]
    if missing or not outputs.split():
        raise FieldError(f'outputs are names of axes of layout "{layout}"; found "{outputs}"')
    columns = [axis for name in outputs.split() for axis in where[name]]
    order = [axis for axis in range(kernel.ndim) if axis not in columns] + columns
    matrix = jnp.transpose(kernel, order).astype(statistics_dtype(kernel.dtype))
    return matrix.reshape(-1, math.prod(kernel.shape[axis] for axis in columns))


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product that no accelerator rounds to fewer bits: the iteration is a statistic."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _near_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings the largest |x| near one, and the factor of the eps that belongs to its squares.

    The eps stays what it is for an x of the usual size, as in Flax; for one below 1/256 it shrinks with the squares of x.
    """
    largest = jnp.max(jnp.abs(x), initial=0)
    s = towards_one(largest)
    return s, lax.square(s / lifting(largest))


def _unit(x: jax.Array, eps: ArrayLike) -> jax.Array:
    """The vector at length 1; one of zeros stays, with eps = 0 too."""
    return x * inverse_power(jnp.sum(lax.square(x)) + eps, 0.5)
