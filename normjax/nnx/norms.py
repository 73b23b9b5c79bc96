"""Flax nnx modules: parameters and running statistics around the equation of `theory.py`.

`Norm` is any normalizer as a layer. The presets have the names, arguments, defaults, attributes and shapes of Flax's own,
so that changing the import line keeps a model and its checkpoints:

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider (`use_fast_variance` is
accepted and changes nothing; running statistics are never rounded to `dtype`), extra leading axes and masks broadcast,
masked elements never leak, and a masked output is the bias.

The L1 penalty is captured: `y, sown = nnx.capture(model, Penalty)(x)`; outside a capture nothing is sown or stored.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax.typing import ArrayLike

from normjax import layer
from normjax.layer import Axes
from normjax.nnx.host import Moments
from normjax.running import Running

Dtype = Any
Initializer = Any
Metadata = Mapping[str, Any]
_NO_METADATA: Metadata = MappingProxyType({})
_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


def _parameter(
    make: Initializer,
    use: bool,
    shape: tuple[int, ...],
    dtype: Dtype,
    rngs: nnx.Rngs,
    metadata: Metadata = _NO_METADATA,
) -> Any:
    return nnx.Param(make(rngs.params(), shape, dtype), **metadata) if use else nnx.data(None)


def _value(variable: Any) -> Any:
    return None if variable is None else variable[...]


def _flag(call: bool | None, constructed: bool | None, name: str) -> bool:
    """use_running_average from the call, or else from the constructor."""
    flag = constructed if call is None else call
    if flag is None:
        raise ValueError(
            f"No `use_running_average` argument was provided to {name}. Pass it to the constructor or to the call, or "
            "set it on the whole model: nnx.view(model, use_running_average=True) or False."
        )
    return flag


def _store(module: Any, out: layer.Applied) -> None:
    """Writes the new running statistics; the batch's own go to a capture that asks for Moments."""
    if out.seen is None:
        return
    for name, value in out.running._asdict().items():
        if value is None:
            continue
        variable = getattr(module, name)
        if value.dtype == variable.dtype:
            variable[...] = value
        else:  # the first complex mean replaces a real one
            variable.set_value(value)
    if hasattr(module, "__captures__"):
        module.sow(Moments, "batch", out.seen)


def _apply_flax(module: Any, x: ArrayLike, reading: Any, mask: Any, stored: Running = layer.NOTHING, average=False):
    """A preset: Flax's promotion and parameters, our equation. `reading` maps a shape to a layer.Reading."""
    scale, bias = _value(module.scale), _value(getattr(module, "bias", None))
    if stored is layer.NOTHING:
        x, scale, bias = module.promote_dtype((x, scale, bias), dtype=module.dtype)
    else:
        # The promoted running statistics are dropped: in bfloat16 they would lose what they were averaged for.
        x, _, _, scale, bias = module.promote_dtype((x, stored.mean, stored.var, scale, bias), dtype=module.dtype)
    with jax.numpy_dtype_promotion("standard"):
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype)
    x = layer.flax_input(x, module.dtype)
    n, layout, features = reading(x.shape)
    return layer.apply(
        x, n, layout, stored, use_running=average, momentum=getattr(module, "momentum", 0.0), refuse=False, dtype=dtype,
        scale=layer.beside(scale, features, x), bias=layer.beside(bias, features, x), mask=mask,
    )  # fmt: skip


def _promote(args: tuple, *, dtype: Any = None, **kwargs: Any) -> tuple:
    """Flax's promotion, also under strict promotion settings."""
    with jax.numpy_dtype_promotion("standard"):
        return dtypes.promote_dtype(args, dtype=dtype, **kwargs)


class BatchNorm(nnx.Module):
    """Batch norm with the arguments, variables and shapes of `flax.nnx.BatchNorm`; row "batch" of TABLE.

    Beyond Flax's, `stats_metadata` attaches metadata (sharding names) to the running statistics.

    Source: Ioffe & Szegedy 2015.

    >>> layer = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[0.0], [2.0]])).round(3).tolist(), layer.mean[...].tolist()
    ([[-1.0], [1.0]], [0.5])
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = _NO_METADATA,
        scale_metadata: Metadata = _NO_METADATA,
        stats_metadata: Metadata = _NO_METADATA,
    ):
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32), **stats_metadata)
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32), **stats_metadata)
        self.scale = _parameter(scale_init, use_scale, (num_features,), param_dtype, rngs, scale_metadata)
        self.bias = _parameter(bias_init, use_bias, (num_features,), param_dtype, rngs, bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x with the batch's statistics, or with the stored ones; see `flax.nnx.BatchNorm`."""
        average = _flag(use_running_average, self.use_running_average, "BatchNorm")

        def reading(shape: tuple[int, ...]) -> layer.Reading:
            features = layer.positive(len(shape), self.axis)
            reduced = [axis for axis in range(len(shape)) if axis not in features]
            return layer.read(
                len(shape), reduced, features, self.epsilon, axis_name=self.axis_name, groups=self.axis_index_groups
            )

        features = layer.positive(jnp.ndim(x), self.axis)
        kept = tuple(jnp.shape(x)[axis] for axis in features)
        layer.beside(self.mean[...], features, jnp.asarray(x))
        stored = Running(self.mean[...].reshape(kept), self.var[...].reshape(kept))
        out = _apply_flax(self, x, reading, mask, stored, average)
        if not average:
            flat = (value.reshape(self.mean.shape) for value in out.running[:2])
            _store(self, out._replace(running=Running(*flat)))
        return out.y

    def set_view(self, use_running_average: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether to normalize with the stored statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class LayerNorm(nnx.Module):
    """Layer norm with the arguments, variables and shapes of `flax.nnx.LayerNorm`; row "token" of TABLE.

    Source: Ba, Kiros & Hinton 2016.

    >>> LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = _NO_METADATA,
        scale_metadata: Metadata = _NO_METADATA,
    ):
        self.scale = _parameter(scale_init, use_scale, (num_features,), param_dtype, rngs, scale_metadata)
        self.bias = _parameter(bias_init, use_bias, (num_features,), param_dtype, rngs, bias_metadata)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over `reduction_axes`; see `flax.nnx.LayerNorm`."""
        return _apply_flax(self, x, lambda shape: layer.read(
            len(shape), self.reduction_axes, self.feature_axes, self.epsilon, axis_name=self.axis_name,
            groups=self.axis_index_groups), mask).y  # fmt: skip


class RMSNorm(nnx.Module):
    """RMS norm with the arguments, variables and shapes of `flax.nnx.RMSNorm`; row "rms" of TABLE.

    Source: Zhang & Sennrich 2019.

    >>> (10 * RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 7.0]]))).round().tolist()
    [[2.0, 14.0]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = _ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = _promote,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = _NO_METADATA,
    ):
        self.scale = _parameter(scale_init, use_scale, (num_features,), param_dtype, rngs, scale_metadata)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = (
            promote_dtype if promote_dtype is _promote else lambda args, **kw: (*promote_dtype(args[:2], **kw), None)
        )

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Divides x by its root mean square over `reduction_axes`; see `flax.nnx.RMSNorm`."""
        return _apply_flax(self, x, lambda shape: layer.read(
            len(shape), self.reduction_axes, self.feature_axes, self.epsilon, axis_name=self.axis_name,
            groups=self.axis_index_groups, centre=False), mask).y  # fmt: skip


class GroupNorm(nnx.Module):
    """Group norm with the arguments, variables and shapes of `flax.nnx.GroupNorm`; row "group" of TABLE.

    Any number of leading axes, with `reduction_axes` given; masks broadcast.

    Source: Wu & He 2018.

    >>> GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0, 10.0, 20.0]])).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        reduction_axes: Axes | None = None,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = _NO_METADATA,
        scale_metadata: Metadata = _NO_METADATA,
    ):
        self.feature_axis = -1
        self.num_groups = layer.group_count(num_features, num_groups, group_size, "features")
        self.group_size = num_features // self.num_groups
        self.scale = _parameter(scale_init, use_scale, (num_features,), param_dtype, rngs, scale_metadata)
        self.bias = _parameter(bias_init, use_bias, (num_features,), param_dtype, rngs, bias_metadata)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over each group of channels; see `flax.nnx.GroupNorm`."""
        return _apply_flax(self, x, lambda shape: layer.read(
            len(shape), layer.group_axes(len(shape), self.reduction_axes), -1, self.epsilon, axis_name=self.axis_name,
            groups=self.axis_index_groups, blocks=self.num_groups), mask).y  # fmt: skip


class InstanceNorm(nnx.Module):
    """Instance norm with the arguments, variables and shapes of `flax.nnx.InstanceNorm`; row "instance" of TABLE.

    Source: Ulyanov, Vedaldi & Lempitsky 2016.

    >>> InstanceNorm(1, rngs=nnx.Rngs(0))(jnp.array([[[1.0], [3.0]]])).round(3).tolist()
    [[[-1.0], [1.0]]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        feature_axes: Axes = -1,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = _NO_METADATA,
        scale_metadata: Metadata = _NO_METADATA,
    ):
        self.scale = _parameter(scale_init, use_scale, (num_features,), param_dtype, rngs, scale_metadata)
        self.bias = _parameter(bias_init, use_bias, (num_features,), param_dtype, rngs, bias_metadata)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over all axes but the first and the features; see `flax.nnx.InstanceNorm`."""
        return _apply_flax(self, x, lambda shape: layer.read(
            len(shape), layer.instance_axes(len(shape), self.feature_axes), self.feature_axes, self.epsilon,
            axis_name=self.axis_name, groups=self.axis_index_groups), mask).y  # fmt: skip
