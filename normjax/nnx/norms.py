"""Flax nnx modules: parameters and running statistics around the equation of `theory.py`.

`Norm` is any normalizer as a layer. The presets have the names, arguments, defaults, attributes and shapes of Flax's own,
so that changing the import line keeps a model and its checkpoints:

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider (`use_fast_variance` is
accepted and changes nothing; running statistics are never rounded to `dtype`), extra leading axes and masks broadcast,
masked elements never leak, and a masked output is the bias.

The L1 penalty is captured: `y, sown = nnx.capture(model, Penalty)(x)`; outside a capture nothing is sown or stored.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax.typing import ArrayLike

from normjax import layer
from normjax._expect.arrays import require_float
from normjax.field import FieldError
from normjax.layer import Axes
from normjax.running import Running, slots
from normjax.theory import Normalizer, Stats, row

Dtype = Any
Initializer = Any
Metadata = Mapping[str, Any]
_NO_METADATA: Metadata = MappingProxyType({})
_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class Penalty(nnx.Intermediate):
    """The L1 term of a layer, alpha * mean |v|, as `nnx.capture(model, Penalty)` finds it."""


class Moments(nnx.Intermediate):
    """What a layer saw of the batch (`normjax.running.BatchRecord`), as `nnx.capture(model, Moments)` finds it."""


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


class Norm(nnx.Module):
    """Any normalizer as a layer; the attributes mean what they mean in `normjax.linen.Norm`.

    Args:
      normalizer: a Normalizer or the name of a row of TABLE.
      features: number of channels; or the whole shape of an input, for a row that stores statistics along other axes.
      layout: name of each axis of the input.
      use_running_average: whether to normalize with stored statistics; `.train()`, `.eval()` and `nnx.view` set it.
      momentum: weight of the old value in the running average.
      averaging: of the running statistics, "exponential", "debiased" or "cumulative", see `running.py`.
      unbiased: whether the unbiased variance is stored, as PyTorch does.
      mean_init: first value of a running mean.
      var_init: first value of a running variance, or other moment.
      update_running_average: False normalizes with the batch's statistics and leaves the stored ones; `nnx.view` sets it.
      renorm: limits (r_max, d_max) of batch renormalization, see `normjax.renorm`; None is plain.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      learn_sigma: whether sigma is learned, one scalar; eps = sigma ** 2.
      sigma_init: its initial value; by default the square root of the row's eps.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      l1: weight alpha of the L1 penalty, captured as `Penalty` when it is not 0.
      l1_axis_name: mapped axes that share one mean of |v|; by default those of the fields.
      scale_metadata: metadata of the factor, such as sharding names.
      bias_metadata: metadata of the addend.
      stats_metadata: metadata of the stored statistics.
      rngs: random keys for the initializers.

    Raises:
      FieldError: the row stores statistics whose shape `features` does not tell.

    >>> layer = Norm("batch", 3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 8, 8, 3))).shape, layer.mean.shape
    ((2, 8, 8, 3), (3,))
    >>> penalized = Norm(Normalizer("c", None), 2, l1=0.5, rngs=nnx.Rngs(0))
    >>> y, sown = nnx.capture(penalized, Penalty)(jnp.array([[1.0, 5.0]]))
    >>> float(sown["l1"][...])                                      # half the mean of |-2| and |2|
    1.0
    """

    def __init__(
        self,
        normalizer: Normalizer | str,
        features: int | Sequence[int],
        *,
        layout: str = "n ... c",
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        averaging: str = "exponential",
        unbiased: bool = False,
        mean_init: float = 0.0,
        var_init: float = 1.0,
        update_running_average: bool = True,
        renorm: tuple[float, float] | None = None,
        use_scale: bool = True,
        use_bias: bool = True,
        learn_sigma: bool = False,
        sigma_init: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        l1: float = 0.0,
        l1_axis_name: str | Sequence[str] | None = None,
        scale_metadata: Metadata = _NO_METADATA,
        bias_metadata: Metadata = _NO_METADATA,
        stats_metadata: Metadata = _NO_METADATA,
        rngs: nnx.Rngs,
    ):
        self.normalizer = row(normalizer)
        self.features = features if isinstance(features, int) else tuple(features)
        self.layout = layout
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.averaging = averaging
        self.unbiased = unbiased
        self.update_running_average = update_running_average
        self.renorm = renorm
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.l1 = l1
        self.l1_axis_name = l1_axis_name
        shape = layer.whole_shape(features, layout)
        channels = layer.channel_shape(layout, shape) if use_scale or use_bias else ()
        self.scale = _parameter(scale_init, use_scale, channels, param_dtype, rngs, scale_metadata)
        self.bias = _parameter(bias_init, use_bias, channels, param_dtype, rngs, bias_metadata)
        start = self.normalizer.eps**0.5 if sigma_init is None else sigma_init
        self.sigma = nnx.Param(jnp.asarray(start, param_dtype)) if learn_sigma else nnx.data(None)
        found = layer.first_values(slots(self.normalizer, layout, shape, averaging), mean_init, var_init)
        if any(None in slot.shape for slot in found.values()):
            raise FieldError(
                f"{self.normalizer} stores statistics along other axes than the channels: give the whole shape of an "
                f"input as `features`, found {features!r}"
            )

        def stored(name: str) -> Any:
            return nnx.BatchStat(found[name].make(), **stats_metadata) if name in found else nnx.data(None)

        self.mean, self.var = stored("mean"), stored("var")
        self.mean_count, self.var_count = stored("mean_count"), stored("var_count")

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        renorm: tuple[ArrayLike, ArrayLike] | None = None,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x; arguments as for `normjax.linen.Norm`. A scale or bias given here replaces the learned one."""
        return _apply_norm(
            self, self.normalizer, x, use_running_average, update_running_average=update_running_average, renorm=renorm,
            mask=mask, scale=scale, bias=bias,
        )  # fmt: skip

    def set_view(self, use_running_average: bool | None = None, update_running_average: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether to normalize with the stored statistics.
          update_running_average: whether the batch's statistics, where they are used, update the stored ones.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average


def _uses_running(module: Norm, call: bool | None) -> bool:
    """Whether a call takes the stored statistics; a row that stores none needs no flag."""
    stores = any(getattr(module, name) is not None for name in Running._fields)
    return stores and _flag(call, module.use_running_average, type(module).__name__)


def _keeps_running(module: Norm, call: bool | None) -> bool:
    """Whether a training batch moves the stored statistics."""
    return module.update_running_average if call is None else call


def _apply_norm(
    module: Norm, normalizer: Normalizer, x: ArrayLike, use_running_average: bool | None = None, *,
    update_running_average: bool | None = None, renorm: Any = None, mask: Any = None, scale: Any = None,
    bias: Any = None, measured: Stats | None = None,
) -> jax.Array:  # fmt: skip
    """One application of `Norm`, by a row and measured statistics of the batch that may be those of the call."""
    sigma, running = module.sigma, Running(*(_value(getattr(module, name)) for name in Running._fields))
    out = layer.apply(
        require_float(x, "Norm"), normalizer, module.layout, running, refuse=True, dtype=module.dtype,
        use_running=_uses_running(module, use_running_average), measured=measured, momentum=module.momentum,
        update_running=_keeps_running(module, update_running_average), averaging=module.averaging,
        unbiased=module.unbiased, renorm=module.renorm if renorm is None else renorm, mask=mask,
        scale=_value(module.scale) if scale is None else scale, bias=_value(module.bias) if bias is None else bias,
        eps=None if sigma is None else jnp.square(sigma[...]),
    )  # fmt: skip
    _store(module, out)
    if module.l1 and hasattr(module, "__captures__"):
        value = layer.layer_penalty(out.centered, module.l1, normalizer, mask, module.l1_axis_name)
        module.sow(Penalty, "l1", value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros((), value.dtype))
    return out.y


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


class BatchRenorm(Norm):
    """Batch renormalization; see `normjax.linen.BatchRenorm`.

    Args:
      features: number of channels.
      r_max: limit of the ratio of the batch's spread to the stored one.
      d_max: limit of the shift, in units of the stored spread.
      epsilon: added to the variance.
      normalizer: another row that stores both moments.
      **kwargs: as for `Norm`.

    Source: Ioffe 2017, algorithm 1.

    >>> layer = BatchRenorm(1, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    >>> layer.mean[...], layer.var[...] = jnp.array([1.0]), jnp.array([4.0])
    >>> (10 * layer(jnp.array([[2.0], [4.0]]))).round().tolist()
    [[5.0], [15.0]]
    """

    def __init__(
        self,
        features: int | Sequence[int],
        r_max: float = 3.0,
        d_max: float = 5.0,
        *,
        epsilon: float = 1e-5,
        normalizer: Normalizer | str = "batch",
        **kwargs: Any,
    ):
        n = dataclasses.replace(row(normalizer), eps=epsilon)
        super().__init__(n, features, renorm=(r_max, d_max), **kwargs)


class DivisiveNorm(Norm):
    """Divisive normalization over a window of space and all channels; see `normjax.linen.DivisiveNorm`.

    Args:
      features: number of channels.
      window: width of the window along every axis between examples and channels.
      channels: width of a window along the channels; None takes all of them.
      sigma: smoothing; eps = sigma ** 2.
      border: "truncate" (the paper) or "zero" (its published code).
      use_scale: whether a factor is learned; the paper has none.
      use_bias: whether an addend is learned; the paper has none.
      **kwargs: as for `Norm`.

    Source: Ren et al. 2017, section 3.3.

    >>> DivisiveNorm(1, window=3, sigma=0.5, rngs=nnx.Rngs(0))(jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    def __init__(
        self,
        features: int,
        window: int = 5,
        channels: int | None = None,
        *,
        sigma: float = 1.0,
        border: str = "truncate",
        use_scale: bool = False,
        use_bias: bool = False,
        **kwargs: Any,
    ):
        kwargs.setdefault("sigma_init", sigma)
        n = layer.divisive(window, channels, sigma, border)
        super().__init__(n, features, use_scale=use_scale, use_bias=use_bias, **kwargs)


class LocalResponseNorm(nnx.Module):
    """Local response normalization along the channels; see `normjax.linen.LocalResponseNorm`.

    Source: Krizhevsky et al. 2012, section 3.3.

    >>> (100 * LocalResponseNorm(3, alpha=3.0, beta=1.0, k=0.0)(jnp.array([[1.0, 2.0, 2.0]]))).round().tolist()
    [[20.0, 22.0, 25.0]]
    """

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        layout: str = "n ... c",
        dtype: Dtype | None = None,
    ):
        self.normalizer = layer.response(size, alpha, beta, k)
        self.layout = layout
        self.dtype = dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        return layer.apply(x, self.normalizer, self.layout, dtype=self.dtype, refuse=True, mask=mask).y


class LocalContrastNorm(nnx.Module):
    """Local contrast normalization; see `normjax.linen.LocalContrastNorm`.

    Source: Jarrett et al. 2009, section 2.1.

    >>> LocalContrastNorm(3)(jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    def __init__(
        self,
        window: int = 9,
        shape: str = "gaussian",
        epsilon: float = 1e-5,
        *,
        layout: str = "n ... c",
        dtype: Dtype | None = None,
    ):
        self.normalizer = layer.contrast(window, shape, epsilon)
        self.layout = layout
        self.dtype = dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        return layer.apply(x, self.normalizer, self.layout, dtype=self.dtype, refuse=True, mask=mask).y
