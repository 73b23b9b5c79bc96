"""Flax linen modules: parameters and running statistics around the equation of `theory.py`.

`Norm` is any normalizer as a layer. The presets are classes with the names, arguments, defaults, parameters, collections
and shapes of Flax's own, so that changing the import line keeps a model and its checkpoints:

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider
(`use_fast_variance` is accepted and changes nothing), masks broadcast and never leak, and a masked output is the bias.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes, initializers
from jax.typing import ArrayLike

from normjax import layer
from normjax._expect.arrays import require_float
from normjax.layer import Axes
from normjax.running import Running, Slot, slots
from normjax.theory import Normalizer, row

Initializer = Any
Dtype = Any


class Norm(nn.Module):
    """Any normalizer as a layer.

    Statistics that depend on other examples are stored in the collection `batch_stats` (which moments, the fields say:
    see `running.py`); all other rows need no `use_running_average`. The output has the dtype of the input.

    Attributes:
      normalizer: a Normalizer or the name of a row of TABLE.
      layout: name of each axis of the input.
      use_running_average: whether to normalize with the stored statistics; here or at the call.
      momentum: weight of the old value in the running average.
      averaging: of the running statistics, "exponential", "debiased" or "cumulative", see `running.py`.
      unbiased: whether the unbiased variance is stored, as PyTorch does; none is where the weights sum to 1 or less.
      mean_init: first value of a running mean.
      var_init: first value of a running variance, or other moment.
      update_running_average: False normalizes with the batch's statistics and leaves the stored ones; here or at the call.
      renorm: limits (r_max, d_max) of batch renormalization, see `normjax.renorm`; here or at the call, where they
        may be arrays. None is plain.
      stats_names: names of the axes of every stored statistic, as in `nn.with_partitioning`; None attaches no metadata.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      learn_sigma: whether sigma is learned, one scalar a layer; eps = sigma ** 2 (Ren et al. 2017).
      sigma_init: its initial value; by default the square root of the row's eps.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      l1: weight alpha of the L1 penalty alpha * mean |v|, sown as `l1` into the collection `losses` when it is mutable
        and l1 is not 0; never while initializing.
      l1_axis_name: mapped axes that share one mean of |v|; by default those of the fields.

    >>> x = jnp.ones((2, 8, 8, 3))
    >>> layer = Norm("batch")
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'mean': (3,), 'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,)}}
    >>> y, changed = Norm("divisive", l1=0.01).apply({}, x, scale=2.0, bias=0.0, mutable=["losses"])
    >>> y.shape, changed["losses"]["l1"]
    ((2, 8, 8, 3), Array(0., dtype=float32))
    """

    normalizer: Normalizer | str
    layout: str = "n ... c"
    use_running_average: bool | None = None
    momentum: float = 0.99
    averaging: str = "exponential"
    unbiased: bool = False
    mean_init: float = 0.0
    var_init: float = 1.0
    update_running_average: bool = True
    renorm: tuple[float, float] | None = None
    stats_names: tuple[str | None, ...] | None = None
    use_scale: bool = True
    use_bias: bool = True
    learn_sigma: bool = False
    sigma_init: float | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros
    l1: float = 0.0
    l1_axis_name: str | Sequence[str] | None = None

    @nn.compact
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
        """Normalizes x.

        Args:
          x: floating-point array, axes as named by `layout`.
          use_running_average: whether to use the stored statistics, for rows that have any.
          update_running_average: replaces the attribute.
          renorm: replaces the attribute.
          mask: see `normjax.normalize`.
          scale: replaces the learned factor (conditional normalization); shapes as for `normjax.normalize`.
          bias: replaces the learned addend.

        Returns:
          An array of the shape of x.

        Raises:
          FieldError: the normalizer does not fit the input.
          TypeError: integer input.
        """
        kept = self.update_running_average if update_running_average is None else update_running_average
        return _apply_norm(
            self, self.normalizer, x, mask=mask, scale=scale, bias=bias, average=use_running_average,
            default=self.use_running_average, sigma_init=self.sigma_init, stats_names=self.stats_names,
            momentum=self.momentum, averaging=self.averaging, unbiased=self.unbiased, update_running=kept,
            renorm=self.renorm if renorm is None else renorm,
        )  # fmt: skip


def _apply_norm(
    module: Any, normalizer: Normalizer | str, x: ArrayLike, *, mask: Any, scale: Any, bias: Any,
    average: bool | None = None, default: bool | None = None, sigma_init: float | None = None, stats_names: Any = None,
    averaging: str = "exponential", renorm: Any = None, **storing: Any,
) -> jax.Array:  # fmt: skip
    """One application of `Norm`, or of a preset with its attributes; `storing` as for `layer.apply`."""
    x, whole = require_float(x, "Norm"), row(normalizer)
    starting = module.is_initializing()
    n = whole.local() if starting else whole  # while initializing, mapped axes need not exist yet
    channels = layer.channel_shape(module.layout, x.shape)
    if module.use_scale and scale is None:
        scale = module.param("scale", module.scale_init, channels, module.param_dtype)
    if module.use_bias and bias is None:
        bias = module.param("bias", module.bias_init, channels, module.param_dtype)
    eps = None
    if module.learn_sigma:
        start = n.eps**0.5 if sigma_init is None else sigma_init
        eps = jnp.square(module.param("sigma", initializers.constant(start), (), module.param_dtype))
    starts = (getattr(module, "mean_init", 0.0), getattr(module, "var_init", 1.0))
    found = layer.first_values(slots(whole, module.layout, x.shape, averaging), *starts)
    use_running = bool(found) and nn.merge_param("use_running_average", default, average)
    counting = starting or (storing.get("update_running", True) and not use_running)
    stored = {
        name: _stored(module, name, slot, stats_names)
        for name, slot in found.items()
        if counting or not name.endswith("_count")
    }
    out = layer.apply(
        x, n, module.layout, Running(**{name: variable.value for name, variable in stored.items()}), refuse=not starting,
        use_running=use_running, averaging=averaging, renorm=None if starting else renorm, dtype=module.dtype,
        scale=scale, bias=bias, mask=mask, eps=eps, **storing,
    )  # fmt: skip
    _store(module, stored, out)
    if module.l1 and not starting:
        value = layer.layer_penalty(out.centered, module.l1, n, mask, module.l1_axis_name)
        module.sow("losses", "l1", value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros((), value.dtype))
    return out.y


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


class BatchRenorm(Norm):
    """Batch renormalization: in training, y is what the stored statistics would give, within limits; row "batch" of TABLE.

    The paper trains with limits (1, 0), which is batch norm, for 5000 steps, and widens them to (3, 5); a schedule passes
    them at the call: `layer(x, renorm=normjax.running.limits_at(step))`.

    Attributes:
      normalizer: "batch", or another row that stores all its moments.
      r_max: limit of the ratio of the batch's spread to the stored one.
      d_max: limit of the shift, in units of the stored spread.
      epsilon: added to the variance. [units of x squared]

    All others are those of `Norm`.

    Source: Ioffe 2017, algorithm 1.

    >>> layer = BatchRenorm(use_running_average=False, use_scale=False, use_bias=False)
    >>> stored = {"batch_stats": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
    >>> y, _ = layer.apply(stored, jnp.array([[2.0], [4.0]]), mutable=["batch_stats"])
    >>> (10 * y).round().tolist()                                           # (x - 1) / 2
    [[5.0], [15.0]]
    """

    normalizer: Normalizer | str = "batch"
    r_max: float = 3.0
    d_max: float = 5.0
    epsilon: float = 1e-5

    def __post_init__(self):
        self.normalizer = dataclasses.replace(row(self.normalizer), eps=self.epsilon)
        self.renorm = (self.r_max, self.d_max)
        super().__post_init__()


class DivisiveNorm(nn.Module):
    """Divisive normalization: centre and divide over a window of space and all channels; row "divisive" of TABLE.

    Attributes:
      window: width of the window along every axis between examples and channels.
      channels: width of a window along the channels; None takes all of them. In a recurrent network, where there is no
        other axis, the paper takes 30 or 60.
      sigma: smoothing; eps = sigma ** 2. [units of x]
      learn_sigma: whether sigma is learned, from that value on.
      border: "truncate" (the paper) or "zero" (its published code).
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`; the paper has none.
      use_bias: whether an addend is learned, `[c]`; the paper has none.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      l1: weight of the L1 penalty, see `Norm`.
      l1_axis_name: see `Norm`.

    Source: Ren et al. 2017, section 3.3.

    >>> DivisiveNorm(window=3, sigma=0.5).apply({}, jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    window: int = 5
    channels: int | None = None
    sigma: float = 1.0
    learn_sigma: bool = False
    border: str = "truncate"
    layout: str = "n ... c"
    use_scale: bool = False
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros
    l1: float = 0.0
    l1_axis_name: str | Sequence[str] | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        n = layer.divisive(self.window, self.channels, self.sigma, self.border)
        return _apply_norm(self, n, x, mask=mask, scale=scale, bias=bias, sigma_init=self.sigma)


class LocalResponseNorm(nn.Module):
    """Local response normalization along the channels: x / (k + alpha / size * sum x ** 2) ** beta; row "response".

    Arguments and defaults are those of `torch.nn.LocalResponseNorm`; AlexNet's are size 5, alpha 5e-4, beta 0.75, k 2.

    Attributes:
      size: width of the window along the channels; an even one leans before the element, as PyTorch's does.
      alpha: factor of the mean square (zeros past the edge count). [1 / units of x squared]
      beta: exponent.
      k: additive constant.
      layout: name of each axis of the input.
      dtype: of the output, by default that of the input.

    Source: Krizhevsky et al. 2012, section 3.3.

    >>> y = LocalResponseNorm(3, alpha=3.0, beta=1.0, k=0.0).apply({}, jnp.array([[1.0, 2.0, 2.0]]))
    >>> (100 * y).round().tolist()                                          # 1 / 5, 2 / 9, 2 / 8
    [[20.0, 22.0, 25.0]]
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    layout: str = "n ... c"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        n = layer.response(self.size, self.alpha, self.beta, self.k)
        return layer.apply(x, n, self.layout, dtype=self.dtype, refuse=not self.is_initializing(), mask=mask).y


class LocalContrastNorm(nn.Module):
    """Local contrast normalization: subtractive, then divisive, over a window of space and all channels; row "contrast".

    Attributes:
      window: width of the window along every axis between examples and channels.
      shape: "gaussian" (the paper; standard deviation width / 4) or "box".
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.
      dtype: of the output, by default that of the input.

    Source: Jarrett et al. 2009, section 2.1: the denominator is at least its mean over the image.

    >>> LocalContrastNorm(3).apply({}, jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    window: int = 9
    shape: str = "gaussian"
    epsilon: float = 1e-5
    layout: str = "n ... c"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        n = layer.contrast(self.window, self.shape, self.epsilon)
        return layer.apply(x, n, self.layout, dtype=self.dtype, refuse=not self.is_initializing(), mask=mask).y
