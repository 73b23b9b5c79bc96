"""Means and variances that travel beside the arrays: what an activation and a sum do to them."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erfc
from jax.typing import ArrayLike

from normjax._expect.arrays import require_float, statistics_dtype
from normjax._leaves import COUNT, one_of, safe_root
from normjax._normalize.evaluate import affine


class Belief(NamedTuple):
    """Mean and variance of an array, of its rank: one number for each channel, and for each block of examples.

    Attributes:
      mean: length 1 along space; along n the number of blocks (1 for a whole batch, n for statistics of each example). [u]
      var: of the shape of `mean`, or one that broadcasts against it, at least 0. [u ** 2]

    >>> Belief(mean=jnp.zeros((1, 1, 1, 3)), var=jnp.ones((1, 1, 1, 3))).var.shape      # of a batch of images, "n ... c"
    (1, 1, 1, 3)
    """

    mean: jax.Array | np.ndarray
    var: jax.Array | np.ndarray


class Filtered(NamedTuple):
    """What is believed of a layer after its batch: `input` of x, which a skip connection carries on, and `output` of y.

    >>> belief = Belief(jnp.zeros((1, 3)), jnp.ones((1, 3)))
    >>> Filtered(belief, belief).output.mean.shape                                      # of something not normalized
    (1, 3)
    """

    input: Belief
    output: Belief


Activation = str | None | Callable[[jax.Array], jax.Array]


def join(*beliefs: Belief) -> Belief:
    """The belief of a sum of independent arrays, such as a skip connection and its branch: means and variances add.

    Source: the published code of Wang et al. 2018.

    >>> join(Belief(jnp.zeros(1), jnp.ones(1)), Belief(jnp.ones(1), jnp.ones(1)))
    Belief(mean=Array([1.], dtype=float32), var=Array([2.], dtype=float32))
    """
    for b in beliefs:
        if not isinstance(b, Belief):
            raise TypeError(f"join takes beliefs, such as the `input` of a layer's Filtered; found {type(b).__name__}")
    return Belief(*(functools.reduce(operator.add, moment) for moment in zip(*beliefs, strict=True)))


def linear(belief: Belief, a: ArrayLike, u: ArrayLike, r: ArrayLike, layout: str = "n ... c") -> Belief:
    """A diagonal linear transition: mean a * mean + u, variance a ** 2 * var + r.

    The paper has such a transition with learned A, u and R, recalled here and reduced to a diagonal; its code has none.

    Args:
      belief: of the layer before, or a prediction that is to be corrected.
      a: factor, a scalar or `[c]`.
      u: shift, a scalar or `[c]`. [u]
      r: variance of the transition's noise, at least 0, a scalar or `[c]`. [u ** 2]
      layout: name of each axis of the belief.

    Source: Wang et al. 2018, the prediction step (as recalled).

    >>> linear(Belief(jnp.ones((1, 1)), jnp.ones((1, 1))), 2.0, 1.0, 0.5, "n c").var
    Array([[4.5]], dtype=float32)
    """
    mean, var = map(jnp.asarray, belief)
    return Belief(affine(mean, layout, a, u), affine(affine(var, layout, a, None), layout, a, r))


def activate(belief: Belief, activation: Activation = "relu", nodes: int = 64) -> Belief:
    """Mean and variance, float32 or wider, of activation(z) for a Gaussian z with the belief's; 0 where the variance is 0.

    Args:
      belief: of the input.
      activation: "relu" (closed form), None (identity), or an elementwise function, by Gauss-Hermite quadrature: exact for
        polynomials up to degree nodes - 1, about 1 / nodes of the standard deviation off where it has a kink.
      nodes: of the quadrature.

    >>> relu = activate(Belief(jnp.zeros(()), jnp.ones(())))                 # 1 / sqrt(2 pi), 1/2 - 1 / (2 pi)
    >>> [round(float(moment), 4) for moment in relu]
    [0.3989, 0.3408]
    """
    mean, var = jnp.broadcast_arrays(*map(as_wide, belief))
    if activation is None:
        return Belief(mean, var)
    if not callable(activation):
        one_of("activation", activation, ("relu", None))
        return _rectify(mean, var)
    z, weight = np.polynomial.hermite_e.hermegauss(COUNT("nodes", nodes))
    column = (-1,) + (1,) * mean.ndim
    z, weight = (a.reshape(column).astype(mean.dtype) for a in (z, weight / weight.sum()))
    values = activation(mean[None] + standard_deviation(var)[None] * z)
    first = jnp.sum(weight * values, 0)
    return Belief(first, jnp.sum(weight * lax.square(values - first[None]), 0))


def as_wide(s: ArrayLike) -> jax.Array:
    """A mean or variance of a belief in float32 or wider.

    >>> as_wide(jnp.ones(1, jnp.bfloat16)).dtype
    dtype('float32')
    """
    s = require_float(s, "a belief")
    return s.astype(statistics_dtype(s.dtype))


def standard_deviation(var: ArrayLike) -> jax.Array:
    """The square root of a variance, with slope 0 at 0.

    >>> jax.grad(standard_deviation)(0.0)
    Array(0., dtype=float32, weak_type=True)
    """
    return safe_root(jnp.asarray(var))


def _rectify(mean: jax.Array, var: jax.Array) -> Belief:
    """Moments of max(z, 0), z Gaussian; 30 standard deviations from the kink z lies on one side of it."""
    near = lax.square(mean) < 900 * var
    s = jnp.sqrt(jnp.where(near, var, 1))
    a = jnp.where(near, mean, 0) / s
    density = jnp.exp(-0.5 * lax.square(a)) / np.sqrt(2 * np.pi).astype(a.dtype)
    above, below = (0.5 * erfc(sign * a * np.sqrt(0.5).astype(a.dtype)) for sign in (-1, 1))
    # E[z+ ** 2] - E[z+] ** 2 in units of var, written so that nothing cancels where a is large.
    share = above + lax.square(a) * above * below + a * density * (below - above) - lax.square(density)
    first = jnp.where(near, mean * above + s * density, jnp.maximum(mean, 0))
    return Belief(first, jnp.where(near, var * jnp.maximum(share, 0), jnp.where(mean > 0, var, 0)))
