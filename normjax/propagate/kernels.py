"""What a dense or a convolution kernel does to means and variances that travel beside the arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import require_float
from normjax._expect.binding import axes
from normjax._leaves import COUNT, as_integer, integers, one_of
from normjax._normalize.evaluate import equation
from normjax.field import EXAMPLES, FieldError
from normjax.propagate.beliefs import Activation, Belief, Filtered, activate, as_wide, standard_deviation
from normjax.theory import Normalizer

Size = Sequence[int] | None
Padding = str | int | Sequence[int | tuple[int, int]]
TRANSITIONS = ("analytic", "monte_carlo", "released")


def _rows(belief: Belief, layout: str) -> Belief:
    """The belief as a matrix, blocks by channels."""

    def flat(s: ArrayLike) -> jax.Array:
        s = as_wide(s)
        where = axes(layout, s.ndim)
        n = s.shape[where[EXAMPLES][0]] if EXAMPLES in where else 1
        if "c" not in where or s.size != n * s.shape[where["c"][0]]:
            raise FieldError(f'a belief varies along n and c alone; found shape {s.shape}, layout "{layout}"')
        if EXAMPLES in where and where["c"] < where[EXAMPLES]:
            return s.reshape(-1, n).T
        return s.reshape(n, -1)

    mean, var = jnp.broadcast_arrays(*map(flat, belief))
    return Belief(mean, var)


def _from_rows(rows: Belief, layout: str, ndim: int) -> Belief:
    """The belief of such a matrix beside an array of this layout and rank."""
    where = axes(layout, ndim)
    sizes = dict(zip((where.get(EXAMPLES, (None,))[0], where["c"][0]), rows.mean.shape, strict=True))
    turned = EXAMPLES in where and where["c"] < where[EXAMPLES]
    return Belief(*((s.T if turned else s).reshape([sizes.get(i, 1) for i in range(ndim)]) for s in rows))


class _Geometry(NamedTuple):
    """How a kernel meets an array: all static. `size` is None far from the borders."""

    size: tuple[int, ...] | None
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    groups: int


def _geometry(
    kernel: jax.Array, channels: int, size: Size, strides: int | Sequence[int], padding: Padding, groups: int
) -> _Geometry:
    """The numbers of a convolution, checked against its kernel and the channels of a belief."""
    window, groups = kernel.shape[:-2], COUNT("groups", groups)
    if kernel.ndim < 2 or kernel.shape[-2] * groups != channels or kernel.shape[-1] % groups:
        raise FieldError(
            f"a kernel has the axes (*space, inputs / groups, outputs); found shape {kernel.shape}, groups {groups}, for "
            f"a belief of {channels} channels"
        )
    strides = integers("strides", strides, len(window))
    if size is None and window:
        return _Geometry(None, strides, None, groups)
    size = () if size is None else integers("size", size)
    if len(size) != len(window) or len(strides) != len(window):
        raise FieldError(
            f"size and strides have one number for each of the kernel's {len(window)} axes of space; found {size} and "
            f"{strides}"
        )
    if not window:
        return _Geometry(size, strides, (), groups)
    if isinstance(padding, str):
        one_of("padding", padding, ("SAME", "VALID"))
        padding = lax.padtype_to_pads(size, window, strides, padding)
    each: Any = (padding,) * len(window) if as_integer(padding) is not None else padding
    pads: Any = tuple(integers("padding", low_high, 2) for low_high in each)
    if len(pads) != len(window) or any(len(pair) != 2 for pair in pads):
        each = f"one number or pair for each of the kernel's {len(window)} axes of space"
        raise FieldError(f"padding has {each}; found {padding}")
    if any(n + low + high < k for n, k, (low, high) in zip(size, window, pads, strict=True)):
        raise FieldError(f"a kernel of window {window} does not fit into size {size} with padding {pads}")
    return _Geometry(size, strides, pads, groups)


def _borders(window: tuple[int, ...], how: _Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Which taps lie inside the array, for each kind of output position, `[kinds, taps]`, and each kind's share."""
    taps, shares = np.ones((1, 1)), np.ones(1)
    if how.size is None or how.pads is None:
        return np.ones((1, int(np.prod(window)))), shares
    for n, k, stride, (low, high) in zip(how.size, window, how.strides, how.pads, strict=True):
        place = np.arange((n + low + high - k) // stride + 1)[:, None] * stride - low + np.arange(k)
        inside, count = np.unique((place >= 0) & (place < n), axis=0, return_counts=True)
        taps = np.einsum("pt,qu->pqtu", taps, inside).reshape(len(taps) * len(inside), -1)
        shares = np.outer(shares, count / count.sum()).ravel()
    return taps, shares


def _push(rows: Belief, kernel: jax.Array, how: _Geometry) -> Belief:
    """Independent inputs through a kernel: per-output sums of w * mean and w ** 2 * var, then moments over space."""
    blocks, window, outputs = len(rows.mean), kernel.shape[:-2], kernel.shape[-1]
    w = kernel.astype(rows.mean.dtype).reshape(int(np.prod(window)), -1, how.groups, outputs // how.groups)

    def through(s: jax.Array | np.ndarray, f: jax.Array) -> jax.Array:
        summed = jnp.einsum("bgi,tigo->btgo", s.reshape(blocks, how.groups, -1), f, precision="highest")
        return summed.reshape(blocks, -1, outputs)

    sums = through(rows.mean, w), through(rows.var, lax.square(w))
    taps, shares = (a.astype(w.dtype) for a in _borders(window, how))
    mean, var = (jnp.einsum("pt,bto->bpo", taps, s, precision="highest") for s in sums)  # at each kind of position
    shares = shares[None, :, None]
    middle = jnp.sum(shares * mean, 1, keepdims=True)
    return Belief(middle[:, 0], jnp.sum(shares * (var + lax.square(mean - middle)), 1))


def _sampled(
    rows: Belief, kernel: jax.Array, how: _Geometry, activation: Activation, key: jax.Array, samples: int
) -> Belief:
    """Gaussian noise with these moments through activation and kernel, then moments over samples and space."""
    samples, (blocks, channels) = COUNT("samples", samples), rows.mean.shape
    if how.size is None or how.pads is None:
        raise ValueError("a sample needs the size of the array in space: size=(height, width)")
    space = (1,) * len(how.size)
    moments = (rows.mean, standard_deviation(rows.var))
    mean, deviation = (jnp.repeat(s, samples, 0).reshape(-1, *space, channels) for s in moments)
    x = mean + deviation * jax.random.normal(key, (blocks * samples, *how.size, channels), mean.dtype)
    if activation is not None and not callable(activation):
        one_of("activation", activation, ("relu", None))
    x = jax.nn.relu(x) if isinstance(activation, str) else x if activation is None else activation(x)
    w, last = kernel.astype(x.dtype), x.ndim - 1
    if space:
        inner = tuple(range(len(space)))
        beside = (0, last, *range(1, last))
        numbers = lax.ConvDimensionNumbers(beside, (last, last - 1, *inner), beside)
        y = lax.conv_general_dilated(
            x, w, how.strides, how.pads, dimension_numbers=numbers, feature_group_count=how.groups, precision="highest"
        )
    else:
        x, w = x.reshape(len(x), how.groups, -1), w.reshape(-1, how.groups, w.shape[1] // how.groups)
        y = jnp.einsum("bgi,igo->bgo", x, w, precision="highest").reshape(len(x), -1)
    if samples * int(np.prod(y.shape[1:-1])) == 1:
        raise ValueError("the variance of a single number is 0: give samples of at least 2")
    block = f"n/{blocks} ..."
    stats = equation(y, Normalizer(block, block)).stats
    return Belief(*(s[::samples].reshape(blocks, -1) for s in stats[:2]))


def predict(
    state: Filtered,
    kernel: ArrayLike,
    transition: str = "analytic",
    layout: str = "n ... c",
    *,
    activation: Activation = "relu",
    bias: ArrayLike | None = None,
    size: Size = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    key: jax.Array | None = None,
    samples: int = 1,
) -> Belief:
    """Predicts the statistics of the next layer, float32 or wider: the state through an activation and a kernel.

    `analytic` takes y as Gaussian and its elements as independent, and is then exact: rectified-Gaussian moments, the
    kernel's sums of w and w ** 2 for each output, and, where `size` tells the borders, the zeros past them.
    `monte_carlo` draws y and pushes it through the kernel: the same in expectation. `released` is the published code: it
    draws x, which has not been normalized, and pushes that through the activation; with it go guard=100 and unbiased=True
    of `kalman_normalize`, and a skip connection that carries the prior on.

    Args:
      state: what `kalman_normalize` believes of the layer before; Filtered(b, b) for a belief b of what else enters.
      kernel: of a convolution or a dense layer, `(*space, inputs / groups, outputs)`, as Flax stores it.
      transition: "analytic", "monte_carlo" or "released".
      layout: name of each axis of the beliefs.
      activation: between y and the kernel: "relu", None, or an elementwise function (see `activate`).
      bias: that the layer adds, `[outputs]`.
      size: of the layer's input in space, such as (height, width). None is far from the borders; a sample needs it.
      strides: of the convolution.
      padding: "SAME", "VALID", a number, or one number or pair for each axis of space.
      groups: feature groups.
      key: random key of a sample, which has the shape `(blocks * samples, *size, inputs)`.
      samples: for each block of examples; the published code has 1.

    Source: Wang et al. 2018 and its published code; moments of a rectified Gaussian and of a sum of independent terms.

    >>> state = Filtered(Belief(jnp.zeros((1, 2)), jnp.ones((1, 2))), Belief(jnp.zeros((1, 2)), jnp.ones((1, 2))))
    >>> predict(state, jnp.array([[1.0], [-1.0]]), activation=None)
    Belief(mean=Array([[0.]], dtype=float32), var=Array([[2.]], dtype=float32))
    """
    one_of("transition", transition, TRANSITIONS)
    if not isinstance(state, Filtered):
        raise TypeError(f"predict takes the Filtered that a layer returned, found {type(state).__name__}")
    belief = state.output
    if transition == "released":  # a row over all channels believes one number of them: give it to each
        shape = np.broadcast_shapes(state.input.mean.shape, belief.mean.shape)
        belief = Belief(*(jnp.broadcast_to(s, shape) for s in state.input))
    kernel, rows = require_float(kernel, "predict"), _rows(belief, layout)
    how = _geometry(kernel, rows.mean.shape[1], size, strides, padding, groups)
    if transition == "analytic":
        out = _push(activate(rows, activation), kernel, how)
    elif key is None:
        raise ValueError(f"transition={transition!r} draws a sample and needs a key")
    else:
        out = _sampled(rows, kernel, how, activation, key, samples)
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.shape != kernel.shape[-1:]:
            raise FieldError(f"a layer's bias has shape {kernel.shape[-1:]}, that of its outputs; found {bias.shape}")
        out = Belief(out.mean + bias.astype(out.mean.dtype)[None], out.var)
    return _from_rows(out, layout, jnp.ndim(belief.mean))
