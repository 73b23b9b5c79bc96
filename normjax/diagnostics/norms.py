"""Norms of gradients and of weights, and the learning rate that a norm of weights amounts to."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, zero_masked
from normjax._leaves import safe_root
from normjax._paths import arrays_by_path
from normjax.diagnostics._shared import Axes, Mask, largest_magnitude, mapped_axes, require_real, sum_over_devices


def gradient_norm(gradient: ArrayLike, *, mask: Mask = None, axis_name: Axes = ()) -> jax.Array:
    """The Frobenius norm of the loss's gradient in a layer's pre-activation, over the whole batch; slope 0 at 0.

    Args:
      gradient: dL/dz of one layer, of any shape, as `normjax.capture` takes it from a model. The norm depends on whether
        L sums or averages over the batch; the published code averages. [units v, and so is the norm]
      mask: boolean mask or weights that broadcast against it; weights multiply the squares.
      axis_name: mapped axes over which the batch is spread.

    Source: Lubana et al. 2021, the convolution prober of the published code.

    >>> round(float(jax.jit(gradient_norm)(jnp.array([[3e-30, 0.0], [0.0, 4e-30]])) / 1e-30), 4)
    5.0
    """
    g, mapped = require_real(gradient, "gradient_norm"), mapped_axes(axis_name)
    weights = as_weights(mask, g)
    g = zero_masked(g, weights)
    peak = largest_magnitude(g, tuple(range(g.ndim)), mapped)
    squares = jnp.square(g / peak)
    squares = squares if weights is None else squares * weights.value
    return jnp.squeeze(peak) * safe_root(sum_over_devices(jnp.sum(squares), mapped))


def weight_norms(params: object) -> dict[str, jax.Array]:
    """The Frobenius norm of every floating array of a tree of parameters, {path, joined by "/": scalar}.

    `normjax.projection.norms` chooses kernels and what one norm is taken over; here every array has one norm.

    Args:
      params: a tree of parameters.

    Source: Lyle et al. 2024, whose curves show them growing.

    >>> weight_norms({"dense": {"kernel": jnp.array([[3.0, 4.0]])}})
    {'dense/kernel': Array(5., dtype=float32)}
    """
    floating = {name: a for name, a in arrays_by_path(params).items() if jnp.issubdtype(a.dtype, jnp.inexact)}
    return {name: gradient_norm(jnp.abs(a)) for name, a in floating.items()}


def effective_learning_rate(
    eta: ArrayLike, norm: ArrayLike, reference: ArrayLike = 1.0, *, order: float = 2
) -> jax.Array:
    """The learning rate at the reference norm that is eta at this norm: eta * (reference / norm) ** order, infinite at 0.

    A normalizer makes a layer blind to the scale of its weights: f(c w) = f(w), so the gradient at c w is 1 / c of that at
    w, and a step eta there turns w as eta / c ** 2 would at norm one. This is the formula, of numbers that broadcast;
    `normjax.projection.effective_learning_rates` is of a model's kernels, by path.

    Args:
      eta: the learning rate, a scalar or one for each time.
      norm: the norm of the weights. [units w]
      reference: the norm that is compared with, such as the initial one. [w]
      order: 2 for steps that are proportional to the gradient; 1 for steps of a fixed size, as Adam's or of the sign.

    Source: Lyle et al. 2024, section on effective learning rates; Hoffer et al. 2018, section 3 (order 2, reference 1).

    >>> effective_learning_rate(0.1, jnp.array([1.0, 2.0])), effective_learning_rate(0.1, 2.0, order=1)
    (Array([0.1  , 0.025], dtype=float32), Array(0.05, dtype=float32))
    """
    numbers = (eta, norm, reference)
    eta, norm, reference = (jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)) for a in numbers)
    dtype = jnp.promote_types(jnp.promote_types(eta.dtype, norm.dtype), reference.dtype)
    shape = jnp.broadcast_shapes(eta.shape, norm.shape, reference.shape)
    eta, norm, reference = (jnp.broadcast_to(a.astype(dtype), shape) for a in (eta, norm, reference))
    some = norm > 0
    return jnp.where(some, eta * (reference / jnp.where(some, norm, 1)) ** order, jnp.inf)
