"""Flax's own linen normalizers with our call: changing the import line keeps a model, its arguments and its checkpoints.

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider (`use_fast_variance` and
`force_float32_reductions` are accepted and change nothing), and masks broadcast and never leak: a masked element is
normalized by the statistics of the others, as in Flax, but gives the bias where that is not finite. (`normalize` and the
other layers give the bias at every masked element.) Integers become floats; complex arrays have real variances.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes
from jax.typing import ArrayLike

from normjax import kernels
from normjax._layers import flax_names
from normjax._layers.statistics import as_held, stored_dtype
from normjax.linen.host import _leave_record
from normjax.running import NOTHING, Running


class BatchNorm(nn.BatchNorm):
    """Batch norm; all arguments and variables of `flax.linen.BatchNorm`, which this subclasses; row "batch" of TABLE.

    `axis` names the feature axes, one or several; all others, and `axis_name`, are averaged. The running statistics in
    `batch_stats` have the shape of the feature axes; they are biased, float32 (float64 where the input or the parameters
    are), and not updated while initializing.

    Beyond Flax's attributes:
      stats_names: names of the axes of the running statistics, as in `nn.with_partitioning`; None attaches no metadata.

    Source: Ioffe & Szegedy 2015.

    >>> layer = BatchNorm(use_running_average=False, momentum=0.9)
    >>> x = jnp.array([[0.0], [2.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, changed = layer.apply(variables, x, mutable=["batch_stats"])
    >>> y.round(3).tolist(), changed["batch_stats"]["mean"]
    ([[-1.0], [1.0]], Array([0.1], dtype=float32))
    """

    stats_names: tuple[str | None, ...] | None = None
    _leaves_records: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x by its or the stored statistics.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        reading = flax_names.read_batch_norm(self, np.shape(x), self.axis)
        names = getattr(self, "stats_names", None)  # Flax's own layers have none, under `swap_layers`
        stored = []
        wide = stored_dtype(self, flax_names.widened(x, self.dtype).dtype)
        for name, first, kind in (("mean", jnp.zeros, wide), ("var", jnp.ones, jnp.finfo(wide).dtype)):
            make = functools.partial(first, reading.sizes, kind)
            make = make if names is None else nn.with_partitioning(make, tuple(names))
            stored.append(self.variable("batch_stats", name, make))
        mean, var = stored
        out = _normalized(self, x, reading, mask, Running(mean.value, var.value), average, self.momentum)
        if out.record is not None and not self.is_initializing():
            for variable, value in ((mean, out.running.mean), (var, out.running.var)):
                variable.value = variable.value if value is None else as_held(value, variable.value.dtype)
            _leave_record(self, out.record)
        return out.y


class LayerNorm(nn.LayerNorm):
    """Layer norm; all arguments and variables of `flax.linen.LayerNorm`, which this subclasses; row "token" of TABLE.

    Beyond Flax's attributes:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Ba, Kiros & Hinton 2016.

    >>> LayerNorm(use_scale=False, use_bias=False).apply({}, jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    kernel: bool | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over `reduction_axes` and `axis_name`.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        return _normalized(self, x, flax_names.read(self, np.shape(x), self.reduction_axes, self.feature_axes), mask).y


class RMSNorm(nn.RMSNorm):
    """RMS norm; all arguments and variables of `flax.linen.RMSNorm`, which this subclasses; row "rms" of TABLE.

    Beyond Flax's attributes:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Zhang & Sennrich 2019.

    >>> (10 * RMSNorm(use_scale=False).apply({}, jnp.array([[1.0, 7.0]]))).round().tolist()
    [[2.0, 14.0]]
    """

    kernel: bool | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Divides x by its root mean square over `reduction_axes`.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        0 if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        reading = flax_names.read(self, np.shape(x), self.reduction_axes, self.feature_axes, centre=False)
        return _normalized(self, x, reading, mask).y


class GroupNorm(nn.GroupNorm):
    """Group norm; all arguments and variables of `flax.linen.GroupNorm`, which this subclasses; row "group" of TABLE.

    Beyond Flax's attributes:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Wu & He 2018.

    >>> layer = GroupNorm(num_groups=2, use_scale=False, use_bias=False)
    >>> layer.apply({}, jnp.array([[1.0, 3.0, 10.0, 20.0]])).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    kernel: bool | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes groups of channels of x, `[n ... c]`.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        groups = flax_names.group_count(np.shape(x)[-1], self.num_groups, self.group_size)
        reading = flax_names.read_group_norm(self, np.shape(x), self.reduction_axes, groups)
        return _normalized(self, x, reading, mask).y


class InstanceNorm(nn.InstanceNorm):
    """Instance norm; all arguments and variables of `flax.linen.InstanceNorm`, its base class; row "instance" of TABLE.

    Beyond Flax's attributes:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Ulyanov, Vedaldi & Lempitsky 2016.

    >>> layer = InstanceNorm(use_scale=False, use_bias=False)
    >>> layer.apply({}, jnp.array([[[1.0, 5.0], [3.0, 9.0]]])).round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    kernel: bool | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes each channel of each example of x.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        return _normalized(self, x, flax_names.read_instance_norm(self, np.shape(x), self.feature_axes), mask).y


def _normalized(
    module: nn.BatchNorm | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.InstanceNorm,
    x: ArrayLike,
    reading: flax_names.Reading,
    mask: ArrayLike | None,
    running: Running = NOTHING,
    use_running: bool = False,
    momentum: float = 0.0,
) -> flax_names.Applied:
    """Flax's parameters and promotion, our equation."""
    scale = bias = None
    if module.use_scale:
        scale = module.param("scale", module.scale_init, reading.sizes, module.param_dtype)
    if not isinstance(module, nn.RMSNorm) and module.use_bias:
        bias = module.param("bias", module.bias_init, reading.sizes, module.param_dtype)
    with jax.numpy_dtype_promotion("standard"):  # Flax's promotion, also where the user's is strict
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype)
    if module.is_initializing():  # when mapped axes need not exist yet
        reading = reading._replace(normalizer=reading.normalizer.local())
    x = flax_names.widened(x, module.dtype)
    with kernels.asked(getattr(module, "kernel", None)):  # Flax's own layers have none, under `swap_layers`
        return flax_names.normalize_as_read(
            x, reading, running, use_running, momentum, dtype=dtype, scale=scale, bias=bias, mask=mask
        )
