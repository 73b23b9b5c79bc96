"""Nonlinearities in place of a normalizer: no statistic is taken."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import erf
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import align_parameter, require_real, statistics_dtype
from normjax._normalize.evaluate import affine
from normjax.gain import RELU_GAIN

RELU_MEAN = 1 / math.sqrt(2 * math.pi)  # of relu(z), z ~ N(0, 1)


def scaled_relu(x: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """ReLU, standardized: a Gaussian input of mean 0 and variance 1 leaves with mean 0 and variance 1.

    Args:
      x: real array of any shape, standardized. After the addition of a residual block it scales the skip path by 1.71 too.
      dtype: of the output, by default that of x.

    Source: Arpit et al. 2016; Hoffer et al. 2018 (TReLU); Lubana et al. 2021.

    >>> scaled_relu(jnp.array([-5.0, 1.0]))
    Array([-0.6833317,  1.0295268], dtype=float32)
    """
    x = require_real(x, "scaled_relu")
    work = x.astype(statistics_dtype(x.dtype))
    return (RELU_GAIN * (jnp.where(work <= 0, 0, work) - RELU_MEAN)).astype(dtype or x.dtype)


def tlu(x: ArrayLike, tau: ArrayLike = 0.0, layout: str = "n ... c") -> jax.Array:
    """Thresholded linear unit, max(x, tau): for outputs of a norm that does not centre, whose zero means nothing.

    Where both are equal, each has half the gradient, as in PyTorch.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      tau: learned threshold: a scalar, `[c]`, `[n, c]`, or of the rank of x. [u]

    Source: Singh & Krishnan 2020, section 3.

    >>> tlu(jnp.array([[-1.0, -1.0], [2.0, 2.0]]), jnp.array([-3.0, 0.5])).tolist()
    [[-1.0, 0.5], [2.0, 2.0]]
    """
    x = require_real(x, "tlu")
    return jnp.maximum(x, align_parameter(tau, x, layout, "tau", x.dtype))


def dyt(
    x: ArrayLike,
    alpha: ArrayLike = 0.5,
    layout: str = "n ... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Dynamic tanh, scale * tanh(alpha * x) + bias: in place of layer norm, without statistics.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      alpha: learned scalar. [1 / u]
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      dtype: of the output, by default that of x.

    Source: Zhu et al. 2025, "Transformers without normalization", section 4; alpha starts at 0.5.

    >>> dyt(jnp.array([[-1e9, 0.0, 1e9]]), scale=2.0, bias=1.0).tolist()
    [[-1.0, 1.0, 3.0]]
    """
    x = require_real(x, "dyt")
    work = x.astype(statistics_dtype(x.dtype))
    y = jnp.tanh(align_parameter(alpha, work, layout, "alpha", work.dtype) * work)
    return affine(y, layout, scale, bias).astype(dtype or x.dtype)


def derf(
    x: ArrayLike,
    alpha: ArrayLike = 0.5,
    shift: ArrayLike = 0.0,
    layout: str = "n ... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Dynamic erf, scale * erf(alpha * x + shift) + bias: in place of layer norm, without statistics.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      alpha: learned scalar. [1 / u]
      shift: learned scalar.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      dtype: of the output, by default that of x.

    Source: Chen et al. 2025, "Stronger normalization-free transformers"; alpha starts at 0.5, the shift at 0.

    >>> derf(jnp.array([[-1e9, 0.0, 1e9]]), scale=2.0, bias=1.0).tolist()
    [[-1.0, 1.0, 3.0]]
    """
    x = require_real(x, "derf")
    work = x.astype(statistics_dtype(x.dtype))
    slope = align_parameter(alpha, work, layout, "alpha", work.dtype)
    y = erf(slope * work + align_parameter(shift, work, layout, "shift", work.dtype))
    return affine(y, layout, scale, bias).astype(dtype or x.dtype)
