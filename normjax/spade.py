"""SPADE: scale and bias that vary over space, from convolutions of a map of labels (Park et al. 2019)."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import require_float, statistics_dtype
from normjax._expect.binding import axes
from normjax._expect.sizes import is_known
from normjax._leaves import COUNT, Whole
from normjax._normalize.evaluate import affine
from normjax.conditional import Modulation
from normjax.field import EXAMPLES, FieldError

T = TypeVar("T")


class Convolutions(NamedTuple, Generic[T]):
    """What SPADE learns, arrays or their shapes: kernels `[..., i, o]` with odd windows, as in Flax, and biases `[o]`.

    The first leads from the channels of the labels to hidden channels, which a ReLU follows; from there one to the scale
    less 1, one to the bias.

    Source: Park et al. 2019, appendix A.
    """

    hidden_kernel: T
    hidden_bias: T
    scale_kernel: T
    scale_bias: T
    bias_kernel: T
    bias_bias: T


def kernel_shapes(
    features: int, labels: int, space: int, hidden: int = 128, width: int = 3
) -> Convolutions[tuple[int, ...]]:
    """The shapes of what SPADE learns, to modulate so many features by so many channels of labels.

    `space` is the number of axes of space, `hidden` that of channels between the convolutions, `width` that of windows, odd.

    Source: Park et al. 2019, appendix A.

    >>> kernel_shapes(64, 10, 2)[:3]
    ((3, 3, 10, 128), (128,), (3, 3, 128, 64))
    """
    named = {"features": features, "labels": labels, "hidden": hidden, "width": width}
    features, labels, hidden, width = (COUNT(name, value) for name, value in named.items())
    if width % 2 == 0:
        raise ValueError(f"the windows of the convolutions are odd; found {width}")
    window = (width,) * Whole(0)("space", space)
    after = ((*window, hidden, features), (features,))
    return Convolutions((*window, labels, hidden), (hidden,), *after, *after)


def from_map(
    labels: ArrayLike, learned: Convolutions[ArrayLike], layout: str = "n ... c", size: Sequence[int] = ()
) -> Modulation:
    """A scale and a bias for every position, from a map of labels by two layers of convolutions; 1 is added to the scale.

    Args:
      labels: one-hot or other floating-point maps, axes as named by `layout`; `...` is space.
      learned: kernels and biases.
      layout: name of each axis of the maps, which has n, c and space alone.
      size: lengths of space to which the maps are resized first; by default those that they have.

    Source: Park et al. 2019, equation 1 and appendix A; the 1 is their code's.

    >>> kernel, zero = jnp.ones((1, 1, 1)), jnp.zeros(1)
    >>> from_map(jnp.array([[[1.0], [2.0]]]), Convolutions(kernel, zero, kernel, zero, kernel, zero)).scale.tolist()
    [[[2.0], [3.0]]]
    """
    if sorted(layout.split()) != ["...", "c", EXAMPLES]:
        raise FieldError(f'SPADE takes layouts of n, c and "..." for space; found "{layout}"')
    maps = require_float(labels, "from_map")
    maps = maps.astype(statistics_dtype(maps.dtype))
    maps = nearest(maps, size, layout) if len(size) else maps

    def convolve(x: jax.Array, kernel: ArrayLike, bias: ArrayLike) -> jax.Array:
        kernel, bias, where = jnp.asarray(kernel), jnp.asarray(bias), axes(layout, x.ndim)
        channel = where["c"][0]
        if kernel.ndim != x.ndim or kernel.shape[-2] != x.shape[channel] or bias.shape != kernel.shape[-1:]:
            found = f"a kernel of shape {kernel.shape} with a bias of shape {bias.shape}"
            raise FieldError(f'{found} does not fit maps of shape {x.shape}, layout "{layout}"')
        lhs = (where[EXAMPLES][0], channel, *where.get("...", ()))
        numbers = lax.ConvDimensionNumbers(lhs, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)), lhs)
        ones = (1,) * (x.ndim - 2)
        out = lax.conv_general_dilated(x, kernel.astype(x.dtype), ones, "SAME", dimension_numbers=numbers)
        return affine(out, layout, None, bias)

    hidden = jnp.maximum(convolve(maps, learned.hidden_kernel, learned.hidden_bias), 0)
    scale = convolve(hidden, learned.scale_kernel, learned.scale_bias)
    return Modulation(1 + scale, convolve(hidden, learned.bias_kernel, learned.bias_bias))


def nearest(x: ArrayLike, size: Sequence[int], layout: str = "n ... c") -> jax.Array:
    """Resizes the unnamed axes to `size`: index i takes floor(i * old / new), as PyTorch's "nearest" does.

    `jax.image.resize` counts from the centres of the elements, and would take others.

    Args:
      x: array of any dtype.
      size: the new lengths, one for each unnamed axis.
      layout: name of each axis of x; `...` is space.

    Source: PyTorch's `interpolate`, which SPADE's code calls.

    >>> nearest(jnp.arange(4.0), (2,), "...").tolist(), jax.image.resize(jnp.arange(4.0), (2,), "nearest").tolist()
    ([0.0, 2.0], [1.0, 3.0])
    """
    x = jnp.asarray(x)
    space = axes(layout, x.ndim).get("...", ())
    if len(space) != len(size):
        unfit = f'the {len(space)} axes of "..." of shape {x.shape}, layout "{layout}"'
        raise FieldError(f"{len(size)} lengths do not fit {unfit}")
    for axis, length in zip(space, size, strict=True):
        if x.shape[axis] != length:
            known = is_known(length) and is_known(x.shape[axis])
            places = np.arange(length) if known else jnp.arange(length)
            x = jnp.take(x, places * x.shape[axis] // length, axis)
    return x
