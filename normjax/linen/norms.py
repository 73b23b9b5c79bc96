"""Flax linen modules: parameters and running statistics around the equation of `theory.py`.

`Norm` is any normalizer as a layer. The presets are classes with the names, arguments, defaults, parameters, collections
and shapes of Flax's own, so that changing the import line keeps a model and its checkpoints:

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider
(`use_fast_variance` is accepted and changes nothing), masks broadcast and never leak, and a masked output is the bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes, initializers
from jax.typing import ArrayLike

from normjax import layer
from normjax.layer import Axes
from normjax.running import Running, Slot

Initializer = Any
Dtype = Any


def _stored(module: nn.Module, name: str, slot: Slot, names: Sequence[str | None] | None) -> Any:
    """A variable of `batch_stats`, with sharding metadata if `names` are given."""
    make = slot.make if names is None else nn.with_partitioning(slot.make, tuple(names))
    return module.variable("batch_stats", name, make)


def _store(module: nn.Module, stored: Mapping[str, Any], out: layer.Applied) -> None:
    """Writes the new running statistics, and sows what the layer saw where `moments` is mutable; never at init."""
    if out.seen is None or module.is_initializing():
        return
    for name, variable in stored.items():
        variable.value = getattr(out.running, name)
    module.sow("moments", "batch", out.seen)


def _apply_flax(module: Any, x: ArrayLike, read: Any, mask: Any) -> jax.Array:
    """A preset without running statistics: Flax's promotion and parameters, our equation. `read` makes the Reading."""
    wide = layer.flax_input(x, module.dtype)
    reading = read(wide.ndim, wide.shape)
    n = reading.normalizer.local() if module.is_initializing() else reading.normalizer
    scale, bias = _parameters(module, reading.features, wide.shape)
    dtype = _output_dtype(x, scale, bias, module.dtype)
    out = layer.apply(
        wide, n, reading.layout, Running(), use_running=False, momentum=0.0, refuse=False, dtype=dtype, mask=mask,
        scale=layer.beside(scale, reading.features, wide), bias=layer.beside(bias, reading.features, wide),
    )  # fmt: skip
    return out.y


def _parameters(module: Any, features: tuple[int, ...], shape: tuple[int, ...]):
    sizes = tuple(shape[axis] for axis in features)
    scale = bias = None
    if module.use_scale:
        scale = module.param("scale", module.scale_init, sizes, module.param_dtype)
    if getattr(module, "use_bias", False):
        bias = module.param("bias", module.bias_init, sizes, module.param_dtype)
    return scale, bias


def _output_dtype(x: ArrayLike, scale: Any, bias: Any, dtype: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return dtypes.canonicalize_dtype(x, scale, bias, dtype=dtype)


class BatchNorm(nn.Module):
    """Batch norm with the arguments, variables and shapes of `flax.linen.BatchNorm`; row "batch" of TABLE.

    `axis` names the feature axes; all others, and `axis_name`, are averaged. Running statistics are float32, biased, and
    not updated while initializing. Beyond Flax's, `stats_names` attaches sharding names to them, see `Norm`.

    Source: Ioffe & Szegedy 2015.

    >>> layer = BatchNorm(use_running_average=False, momentum=0.9)
    >>> x = jnp.array([[0.0], [2.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, changed = layer.apply(variables, x, mutable=["batch_stats"])
    >>> y.round(3).tolist(), changed["batch_stats"]["mean"]
    ([[-1.0], [1.0]], Array([0.1], dtype=float32))
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    stats_names: tuple[str | None, ...] | None = None

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x with the batch's statistics, or with the stored ones; see `flax.linen.BatchNorm`."""
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        wide = layer.flax_input(x, self.dtype)
        features = layer.positive(wide.ndim, self.axis)
        reduced = [axis for axis in range(wide.ndim) if axis not in features]
        reading = layer.read(
            wide.ndim, reduced, features, self.epsilon, axis_name=self.axis_name, groups=self.axis_index_groups
        )
        starting = self.is_initializing()
        n = reading.normalizer.local() if starting else reading.normalizer
        sizes = tuple(wide.shape[axis] for axis in features)
        mean = _stored(self, "mean", Slot(0, sizes, jnp.float32), self.stats_names)
        var = _stored(self, "var", Slot(1, sizes, jnp.float32), self.stats_names)
        scale, bias = _parameters(self, features, wide.shape)
        out = layer.apply(
            wide, n, reading.layout, Running(mean.value, var.value), use_running=average, momentum=self.momentum,
            refuse=False, dtype=_output_dtype(x, scale, bias, self.dtype), mask=mask,
            scale=layer.beside(scale, features, wide), bias=layer.beside(bias, features, wide),
        )  # fmt: skip
        _store(self, {"mean": mean, "var": var}, out)
        return out.y


class LayerNorm(nn.Module):
    """Layer norm with the arguments, variables and shapes of `flax.linen.LayerNorm`; row "token" of TABLE.

    Source: Ba, Kiros & Hinton 2016.

    >>> LayerNorm(use_scale=False, use_bias=False).apply({}, jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over `reduction_axes`; see `flax.linen.LayerNorm`."""
        return _apply_flax(self, x, lambda ndim, _: layer.read(
            ndim, self.reduction_axes, self.feature_axes, self.epsilon, axis_name=self.axis_name,
            groups=self.axis_index_groups), mask)  # fmt: skip


class RMSNorm(nn.Module):
    """RMS norm with the arguments, variables and shapes of `flax.linen.RMSNorm`; row "rms" of TABLE.

    Source: Zhang & Sennrich 2019.

    >>> (10 * RMSNorm(use_scale=False).apply({}, jnp.array([[1.0, 7.0]]))).round().tolist()
    [[2.0, 14.0]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Divides x by its root mean square over `reduction_axes`; see `flax.linen.RMSNorm`."""
        return _apply_flax(self, x, lambda ndim, _: layer.read(
            ndim, self.reduction_axes, self.feature_axes, self.epsilon, axis_name=self.axis_name,
            groups=self.axis_index_groups, centre=False), mask)  # fmt: skip


class GroupNorm(nn.Module):
    """Group norm with the arguments, variables and shapes of `flax.linen.GroupNorm`; row "group" of TABLE.

    Any number of leading axes, with `reduction_axes` given; masks broadcast.

    Source: Wu & He 2018.

    >>> layer = GroupNorm(num_groups=2, use_scale=False, use_bias=False)
    >>> layer.apply({}, jnp.array([[1.0, 3.0, 10.0, 20.0]])).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes | None = None
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over each group of channels; see `flax.linen.GroupNorm`."""

        def read(ndim: int, shape: tuple[int, ...]) -> layer.Reading:
            axes = layer.group_axes(ndim, self.reduction_axes)
            groups = layer.group_count(shape[-1], self.num_groups, self.group_size)
            return layer.read(ndim, axes, -1, self.epsilon, axis_name=self.axis_name,
                              groups=self.axis_index_groups, blocks=groups)  # fmt: skip

        return _apply_flax(self, x, read, mask)


class InstanceNorm(nn.Module):
    """Instance norm with the arguments, variables and shapes of `flax.linen.InstanceNorm`; row "instance" of TABLE.

    Source: Ulyanov, Vedaldi & Lempitsky 2016.

    >>> layer = InstanceNorm(use_scale=False, use_bias=False)
    >>> layer.apply({}, jnp.array([[[1.0, 5.0], [3.0, 9.0]]])).round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: Axes = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over all axes but the first and the features; see `flax.linen.InstanceNorm`."""
        return _apply_flax(self, x, lambda ndim, _: layer.read(
            ndim, layer.instance_axes(ndim, self.feature_axes), self.feature_axes, self.epsilon,
            axis_name=self.axis_name, groups=self.axis_index_groups), mask)  # fmt: skip
