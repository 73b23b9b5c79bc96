"""Weight standardization: the weights of each output at mean 0 and a variance that is asked for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax._expect.expectation import expect
from normjax._leaves import inverse_power
from normjax.gain import RELU_GAIN, activation_gain
from normjax.theory import Normalizer
from normjax.weights._evaluate import (
    INPUTS,
    KERNEL,
    AnyField,
    align_kernel_scale,
    evaluate,
    fan_in,
    floating_kernel,
    valid_weights,
)


def weight_standardization(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    eps: float = 1e-10,
    eps_rule: str = "moment",
    unbiased: bool = False,
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Gives the weights of each output mean 0 and variance 1: w = g * (v - E[v]) / sqrt(Var[v] + eps).

    Args:
      kernel: array of a floating dtype, its axes named by the layout, `[... i o]`. [units u]
      scale: the learned factor g of each output: a scalar, the axes that the field does not name, `[o]`, or any array of the
        rank of the kernel that broadcasts against it; None is 1, as in the paper.
      eps: added to the variance [u ** 2], or to its root [u] with "root". The variance of a kernel is about 1 / fan-in,
        so the 1e-5 of activations would shrink it; this is the square of the 1e-5 that the code adds to the root.
      eps_rule: where eps enters: "moment", inside of the root, "root", added after it, or "floor", the least value of what
        the root is taken of (NFNets).
      unbiased: divide the squares by fan-in - 1, as the published code does (`eps=1e-5, eps_rule="root",
        unbiased=True`), and not by fan-in, as the paper does. Not with a mask.
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: what is averaged, all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" inputs
        spread over a mapped axis.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Returns:
      The kernel that enters the product, in the shape and dtype of `kernel`.

    Raises:
      FieldError: layout, field and shapes do not fit, or centring would leave nothing of a field of one weight.
      TypeError: the kernel holds integers.
      ValueError: an eps or eps_rule is not accepted, or a mask given with `unbiased`.

    Source: Qiao et al. 2019, "Micro-batch training with batch-channel normalization and weight standardization".

    >>> weight_standardization(jnp.array([[1.0], [3.0]])).tolist()
    [[-1.0], [1.0]]
    """
    kernel, gain = floating_kernel(kernel), 1.0
    if unbiased:
        if mask is not None:
            raise ValueError("unbiased=True divides by fan-in - 1, which a mask makes another number for each output")
        count = fan_in(kernel, layout, field)
        gain = count / (count - 1) if count > 1 else 1.0  # one weight is refused below
    return evaluate(kernel, Normalizer(field, field, eps=eps, gain=gain), layout, scale, mask, eps_rule)


def scaled_weight_standardization(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    gain: float | Callable[[jax.Array], jax.Array] = RELU_GAIN,
    eps: float = 1e-10,
    eps_rule: str = "moment",
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Standardizes weights so that activations keep variance 1: w = g * gain / sqrt(fan-in) * (v - E[v]) / std[v].

    Args:
      kernel: array of a floating dtype, its axes named by the layout, `[... i o]`. [units u]
      scale: the learned factor g of each output: a scalar, the axes that the field does not name, `[o]`, or any array of the
        rank of the kernel that broadcasts against it; starts at 1, which None is.
      gain: of the activation that made the input, as a number or as the function itself (see `activation_gain`). A
        first layer, whose input is no activation, takes 1; the published code gives it relu's too. The code of NFNets
        has 1.7139588594 for relu, which was measured on samples.
      eps: added to the variance [u ** 2], or to its root [u] with "root". `ScaledStdConv2d` of Lubana et al. 2021 has
        `eps=1e-5, eps_rule="root"`, the code of NFNets `eps=1e-4 / fan_in, eps_rule="floor"`.
      eps_rule: where eps enters: "moment", inside of the root, "root", added after it, or "floor", the least value of what
        the root is taken of (NFNets).
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: what is averaged, all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" inputs
        spread over a mapped axis.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic, nor in fan-in.

    Returns:
      The kernel that enters the product, in the shape and dtype of `kernel`.

    Raises:
      FieldError: layout, field and shapes do not fit, or centring would leave nothing of a field of one weight.
      TypeError: the kernel holds integers, or the gain is a name.
      ValueError: an eps or eps_rule is not accepted.

    Source: Brock et al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets".

    >>> scaled_weight_standardization(jnp.array([[1.0], [3.0], [1.0], [3.0]]), gain=1.0).ravel().tolist()
    [-0.5, 0.5, -0.5, 0.5]
    """
    if isinstance(gain, str):
        raise TypeError(f"gain is a number or the activation itself, as in gain=jax.nn.relu; found {gain!r}")
    kernel = floating_kernel(kernel)
    work = statistics_dtype(kernel.dtype)
    count = jnp.asarray(fan_in(kernel, layout, field), jnp.finfo(work).dtype)
    if mask is not None:
        count = count * expect(valid_weights(kernel, mask).astype(count.dtype), field, layout)
    g = (activation_gain(gain) if callable(gain) else gain) * inverse_power(count, 0.5)
    if scale is not None:
        g = g * align_kernel_scale(scale, kernel, layout, field, work)
    return evaluate(kernel, Normalizer(field, field, eps=eps), layout, g, mask, eps_rule)
