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
from normjax.weights import _kernel
from normjax.weights._kernel import INPUTS, KERNEL, AnyField


def weight_standardization(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    eps: ArrayLike = 1e-10,
    eps_rule: str = "moment",
    unbiased: bool = False,
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Gives the weights of each output mean 0 and variance 1: w = g * (v - E[v]) / sqrt(Var[v] + eps).

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      scale: learned factor g: a scalar, `[o]` (the axes not in the field), or of the rank of the kernel; None is 1.
      eps: added to the variance [u ** 2], which is about 1 / fan-in, or to its root [u] with "root", the code's 1e-5.
      eps_rule: where eps enters: "moment", inside of the root; "root", after it; "floor", the least value inside (NFNets).
      unbiased: divide the squares by fan-in - 1, as the code, and not by fan-in, as the paper. Not with a mask.
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Source: Qiao et al. 2019, "Micro-batch training with batch-channel normalization and weight standardization".

    >>> weight_standardization(jnp.array([[1.0], [3.0]])).tolist()
    [[-1.0], [1.0]]
    """
    kernel, gain = _kernel.floating_kernel(kernel), 1.0
    if unbiased:
        if mask is not None:
            raise ValueError("unbiased=True divides by fan-in - 1, which a mask makes another number for each output")
        count = _kernel.fan_in(kernel, layout, field)
        gain = count / (count - 1) if count > 1 else 1.0  # one weight is refused below
    return _kernel.evaluate(kernel, Normalizer(field, field, gain=gain), layout, scale, mask, eps_rule, eps)


def scaled_weight_standardization(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    gain: float | Callable[[jax.Array], jax.Array] = RELU_GAIN,
    eps: ArrayLike = 1e-10,
    eps_rule: str = "moment",
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Standardizes weights so that activations keep variance 1: w = g * gain / sqrt(fan-in) * (v - E[v]) / std[v].

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      scale: learned factor g: a scalar, `[o]` (the axes not in the field), or of the rank of the kernel; None is 1.
      gain: of the activation that made the input, as a number or as the function itself (see `activation_gain`); 1 for a
        first layer, whose input is none (the published code gives it relu's too).
      eps: added to the variance [u ** 2], or to its root [u] with "root". `ScaledStdConv2d` of Lubana et al. 2021 has
        `eps=1e-5, eps_rule="root"`, the code of NFNets `eps=1e-4 / fan_in, eps_rule="floor"`.
      eps_rule: where eps enters: "moment", inside of the root; "root", after it; "floor", the least value inside (NFNets).
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic, nor in fan-in.

    Source: Brock et al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets".

    >>> scaled_weight_standardization(jnp.array([[1.0], [3.0], [1.0], [3.0]]), gain=1.0).ravel().tolist()
    [-0.5, 0.5, -0.5, 0.5]
    """
    if isinstance(gain, str):
        raise TypeError(f"gain is a number or the activation itself, as in gain=jax.nn.relu; found {gain!r}")
    kernel = _kernel.floating_kernel(kernel)
    work = statistics_dtype(kernel.dtype)
    count = jnp.asarray(_kernel.fan_in(kernel, layout, field), jnp.finfo(work).dtype)
    if mask is not None:
        count = count * expect(_kernel.valid_weights(kernel, mask).astype(count.dtype), field, layout)
    g = (activation_gain(gain) if callable(gain) else gain) * inverse_power(count, 0.5)
    if scale is not None:
        g = g * _kernel.align_kernel_scale(scale, kernel, layout, field, work)
    return _kernel.evaluate(kernel, Normalizer(field, field), layout, g, mask, eps_rule, eps)
