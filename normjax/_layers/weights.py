"""Layers with normalized kernels, described once, without Flax.

`Dense` (nnx: `Linear`) and `Conv` are Flax's with one more step: the kernel passes through a reparametrization on its way to
the product. `WeightNorm` and `SpectralNorm`, which wrap any layer, are Flax's own classes with another call; what their two
faces share is here as functions of one parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import statistics_dtype
from normjax._expect.ranges import lifting
from normjax._layers.describe import Initializer, ones
from normjax._layers.pickling import Portable
from normjax.reparametrize import Weight, by_number, initial_bound, matching_scale, takes_bound
from normjax.spectral import Spectral, spectral_norm
from normjax.weights import weight_norm

Axes = int | Sequence[int]


@dataclasses.dataclass(init=False, eq=False, repr=False)
class Reparametrized(Portable):
    """What `Dense`, `Linear` and `Conv` add to Flax's: the options that they document."""

    weight: Weight = weight_norm
    use_scale: bool = True
    scale_init: Initializer | None = ones
    bound: str = "rms"

    def _masked(self) -> dict[str, ArrayLike]:
        """Flax's mask of a convolution, as an argument of a reparametrization."""
        mask = getattr(self, "mask", None)
        return {} if mask is None else {"mask": mask}

    def _first_scale(self, key: jax.Array | None, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
        """The factors `[o]` as they start, for the initial kernel `[... i o]`; one from the norms needs no key."""
        if self.scale_init is None:
            return matching_scale(kernel, self.weight, **self._masked()).astype(dtype)
        return self.scale_init(key, kernel.shape[-1:], dtype)

    def _needs_bound(self) -> bool:
        return takes_bound(self.weight)

    def _first_bound(self, kernel: jax.Array) -> jax.Array:
        """The constant rho of the initial kernel `[... i o]`."""
        return initial_bound(kernel, self.weight, self.bound, **self._masked())

    def _entering(self, kernel: jax.Array, scale: jax.Array | None, rho: jax.Array | None) -> jax.Array:
        """The kernel as it enters the product, `[... i o]`."""
        scales, bounds = () if scale is None else (scale,), {} if rho is None else {"rho": rho}
        return self.weight(kernel, *scales, **self._masked(), **bounds)


class Dense(Reparametrized):
    """Flax's dense layer (nnx: `Linear`) whose kernel is a function of a free kernel, by default weight norm.

    All other arguments are Flax's.

    Attributes:
      weight: a function of `normjax.weights` or any other `weight(kernel, scale)`, `weight(kernel)` without `use_scale`;
        `functools.partial` sets its options.
      use_scale: whether a factor of each output is learned, the parameter `scale`, `[o]`.
      scale_init: its initializer; None starts from the norms of the kernel, so that weight norm changes nothing at first.
      bound: how `bounded_weight_norm` finds its constant in the initial kernel, "rms" or "mean" (see `norm_bound`); it
        is stored as `rho` in the collection `batch_stats` (nnx: an `nnx.BatchStat`), and never changes.
      scale_metadata: in nnx, metadata of the scale.

    Source: Salimans & Kingma 2016, equation 2; of other functions, theirs.

    >>> from flax.nnx import Rngs
    >>> from normjax import linen, nnx
    >>> from normjax.weights import bounded_weight_norm
    >>> layer, x = linen.Dense(4, weight=bounded_weight_norm, use_scale=False), jnp.ones((2, 3))
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x))
    {'batch_stats': {'rho': ()}, 'params': {'bias': (4,), 'kernel': (3, 4)}}
    >>> layer = nnx.Linear(3, 4, rngs=Rngs(0))
    >>> layer(x).shape, layer.scale.shape
    ((2, 4), (4,))
    """


class Conv(Reparametrized):
    """Flax's convolution whose kernel is a function of a free kernel, by default weight norm.

    All other arguments are Flax's; its `mask` leaves masked weights out of the statistics too.

    Attributes:
      weight: a function of `normjax.weights` or any other `weight(kernel, scale)`, `weight(kernel)` without `use_scale`;
        `functools.partial` sets its options.
      use_scale: whether a factor of each output is learned, the parameter `scale`, `[o]`.
      scale_init: its initializer; None starts from the norms of the kernel, so that weight norm changes nothing at first.
      bound: how `bounded_weight_norm` finds its constant in the initial kernel, "rms" or "mean" (see `norm_bound`); it
        is stored as `rho` in the collection `batch_stats` (nnx: an `nnx.BatchStat`), and never changes.
      scale_metadata: in nnx, metadata of the scale.

    Source: Salimans & Kingma 2016, equation 2; of other functions, theirs.

    >>> from normjax import linen
    >>> from normjax.weights import scaled_weight_standardization
    >>> layer = linen.Conv(8, (3, 3), weight=scaled_weight_standardization)
    >>> jax.tree.map(jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 5, 5, 3))))
    {'params': {'bias': (8,), 'kernel': (3, 3, 3, 8), 'scale': (8,)}}
    """


def first_scale(value: jax.Array, feature_axes: Axes | None, epsilon: float, dtype: DTypeLike) -> jax.Array:
    """The scale with which `WeightNorm` leaves a parameter as it is: its norms."""
    layout, field, _ = by_number(value.ndim, feature_axes)
    weight = functools.partial(weight_norm, eps=epsilon, layout=layout, field=field)
    return matching_scale(value, weight).astype(dtype).reshape(scale_shape(value.shape, feature_axes))


def scale_shape(shape: Sequence[int], feature_axes: Axes | None) -> tuple[int, ...]:
    """The shape of the scale that `WeightNorm` learns for a parameter of this shape."""
    return tuple(shape[axis] for axis in by_number(len(shape), feature_axes)[2])


def weight_normed(
    value: jax.Array, scale: jax.Array | None, feature_axes: Axes | None, epsilon: ArrayLike, dtype: DTypeLike | None
) -> jax.Array:
    """A parameter as `WeightNorm` has it: at norm `scale` along its feature axes.

    Weights whose largest magnitude is below 1/256 are brought there first, or epsilon would be all that there is.
    """
    layout, field, features = by_number(value.ndim, feature_axes)
    wide = _wide(value)
    others = tuple(axis for axis in range(value.ndim) if axis not in features)
    wide = wide * lifting(jnp.max(jnp.abs(wide), others, keepdims=True, initial=0)).astype(wide.dtype)
    new = weight_norm(wide, scale, eps=epsilon, layout=layout, field=field)
    return _as_flax(new, dtype, value, *(() if scale is None else (scale,)))


def u_shape(shape: Sequence[int], feature_axes: Axes) -> tuple[int, int]:
    """The shape of the u that `SpectralNorm` stores for a parameter of this shape."""
    return 1, math.prod(scale_shape(shape, feature_axes))


def spectral_normed(
    value: jax.Array,
    u: jax.Array,
    sigma: jax.Array,
    n_steps: int,
    epsilon: ArrayLike,
    feature_axes: Axes,
    dtype: DTypeLike | None,
) -> Spectral:
    """A parameter as `SpectralNorm` has it, over its largest singular value, with the new u and sigma."""
    layout, _, columns = by_number(value.ndim, feature_axes)
    outputs = " ".join(f"a{axis}" for axis in columns)
    out = spectral_norm(_wide(value), u, steps=n_steps, eps=epsilon, layout=layout, outputs=outputs)
    return out._replace(kernel=_as_flax(out.kernel, dtype, value, u, sigma), sigma=out.sigma.astype(sigma.dtype))


def _wide(value: jax.Array) -> jax.Array:
    return value.astype(statistics_dtype(value.dtype))


def _as_flax(array: jax.Array, dtype: DTypeLike | None, *arrays: jax.Array) -> jax.Array:
    """The array in the dtype that Flax gives to a parameter normalized by these arrays."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays) if dtype is None else dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"Dtype must be inexact: {dtype}")
    return array.astype(dtype)
