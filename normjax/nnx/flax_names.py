"""Flax's own nnx normalizers with our call: changing the import line keeps a model, its arguments and its checkpoints.

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider (`use_fast_variance` is
accepted and changes nothing; running statistics are never rounded to `dtype`), extra leading axes and masks broadcast, and
masked elements never leak: one is normalized by the statistics of the others, as in Flax, but gives the bias where that is
not finite. (`normalize` and the other layers give the bias at every masked element.) Integers become floats; complex arrays
have real variances.
"""

import functools
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike

from normjax import kernels
from normjax._layers import flax_names
from normjax._layers.statistics import stored_dtype
from normjax._leaves import as_python
from normjax.nnx._options import NormOptions
from normjax.nnx._signature import Constructor, with_kernel
from normjax.nnx.host import Moments, _replace
from normjax.running import NOTHING, Running


class BatchNorm(nnx.BatchNorm):
    """Batch norm; all arguments and variables of `flax.nnx.BatchNorm`, which this subclasses; row "batch" of TABLE.

    `axis` names the feature axes, one or several (`num_features` is their product); all others, and `axis_name`, are
    averaged. The running statistics `mean` and `var`, `[num_features]`, are biased, and float32, or float64 where
    `param_dtype` or `dtype` is.

    Source: Ioffe & Szegedy 2015.

    >>> layer = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[0.0], [2.0]])).round(3).tolist(), layer.mean[...].tolist()
    ([[-1.0], [1.0]], [0.5])
    """

    __signature__ = Constructor()

    if not TYPE_CHECKING:  # its arguments are Flax's

        @functools.wraps(nnx.BatchNorm.__init__)
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            wide = stored_dtype(self, None)
            for variable, dtype in ((self.mean, wide), (self.var, jnp.finfo(wide).dtype)):
                if variable.dtype != dtype:
                    variable.set_value(variable[...].astype(dtype))

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x by its or the stored statistics.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        average = self.use_running_average if use_running_average is None else use_running_average
        if average is None:
            raise ValueError(
                "No `use_running_average` argument was provided to BatchNorm. Pass it to the constructor or to the call, "
                "or set it on the whole model: nnx.view(model, use_running_average=True) or False."
            )
        reading = flax_names.read_batch_norm(self, np.shape(x), self.axis)
        flax_names.align_features(self.mean[...], reading, np.shape(x))  # refuses another number of features
        running = Running(self.mean[...].reshape(reading.sizes), self.var[...].reshape(reading.sizes))
        out = _normalized(self, x, reading, mask, running, average, self.momentum)
        if out.record is not None:
            for variable, value in ((self.mean, out.running.mean), (self.var, out.running.var)):
                if value is not None:
                    _replace(variable, value.reshape(variable.shape))
            if hasattr(self, "__captures__"):
                self.sow(Moments, "batch", out.record)
        return out.y


class LayerNorm(nnx.LayerNorm):
    """Layer norm; all arguments and variables of `flax.nnx.LayerNorm`, which this subclasses; row "token" of TABLE.

    Beyond Flax's arguments:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Ba, Kiros & Hinton 2016.

    >>> LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    kernel: bool | None = None
    __signature__ = Constructor()

    if TYPE_CHECKING:

        def __init__(self, num_features: int, *, kernel: bool | None = None, **flax: Unpack[NormOptions]): ...

    else:
        __init__ = with_kernel(nnx.LayerNorm.__init__)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x over `reduction_axes` and `axis_name`.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        return _normalized(self, x, flax_names.read(self, np.shape(x), self.reduction_axes, self.feature_axes), mask).y


class RMSNorm(nnx.RMSNorm):
    """RMS norm; all arguments and variables of `flax.nnx.RMSNorm`, which this subclasses; row "rms" of TABLE.

    Beyond Flax's arguments:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Zhang & Sennrich 2019.

    >>> (10 * RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 7.0]]))).round().tolist()
    [[2.0, 14.0]]
    """

    kernel: bool | None = None
    __signature__ = Constructor()

    if TYPE_CHECKING:

        def __init__(self, num_features: int, *, kernel: bool | None = None, **flax: Unpack[NormOptions]): ...

    else:
        __init__ = with_kernel(nnx.RMSNorm.__init__)

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Divides x by its root mean square over `reduction_axes`.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        0 if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        reading = flax_names.read(self, np.shape(x), self.reduction_axes, self.feature_axes, centre=False)
        return _normalized(self, x, reading, mask).y


class GroupNorm(nnx.GroupNorm):
    """Group norm; all arguments and variables of `flax.nnx.GroupNorm`, which this subclasses; row "group" of TABLE.

    Beyond Flax's arguments:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Wu & He 2018.

    >>> GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0, 10.0, 20.0]])).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    kernel: bool | None = None
    __signature__ = Constructor()

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes groups of channels of x, `[n ... c]`.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        reading = flax_names.read_group_norm(self, np.shape(x), self.reduction_axes, self.num_groups)
        return _normalized(self, x, reading, mask).y

    if TYPE_CHECKING:

        def __init__(
            self,
            num_features: int,
            num_groups: int | None = 32,
            group_size: int | None = None,
            *,
            kernel: bool | None = None,
            **flax: Unpack[NormOptions],
        ): ...

    else:  # Flax asks whether numbers are integers of Python

        @with_kernel
        @functools.wraps(nnx.GroupNorm.__init__)
        def __init__(self, num_features, num_groups=32, group_size=None, **flax):
            super().__init__(num_features, as_python(num_groups), as_python(group_size), **flax)


class InstanceNorm(nnx.InstanceNorm):
    """Instance norm; all arguments and variables of `flax.nnx.InstanceNorm`, its base class; row "instance" of TABLE.

    Beyond Flax's arguments:
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.

    Source: Ulyanov, Vedaldi & Lempitsky 2016.

    >>> InstanceNorm(1, rngs=nnx.Rngs(0))(jnp.array([[[1.0], [3.0]]])).round(3).tolist()
    [[[-1.0], [1.0]]]
    """

    kernel: bool | None = None
    __signature__ = Constructor()

    if TYPE_CHECKING:

        def __init__(self, num_features: int, *, kernel: bool | None = None, **flax: Unpack[NormOptions]): ...

    else:
        __init__ = with_kernel(nnx.InstanceNorm.__init__)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes each channel of each example of x.

        Where `mask` is False, x counts in no statistic; it is normalized by those of the others, as in Flax, and gives
        the bias if it is not finite or none are left. Numbers from 0 on weight the others.
        """
        return _normalized(self, x, flax_names.read_instance_norm(self, np.shape(x), self.feature_axes), mask).y


def _normalized(
    module: BatchNorm | LayerNorm | RMSNorm | GroupNorm | InstanceNorm,
    x: ArrayLike,
    reading: flax_names.Reading,
    mask: ArrayLike | None,
    running: Running = NOTHING,
    use_running: bool = False,
    momentum: float = 0.0,
) -> flax_names.Applied:
    """Flax's parameters and promotion, our equation."""
    scale = None if module.scale is None else module.scale[...]
    with jax.numpy_dtype_promotion("standard"):  # Flax's promotion, also where the user's is strict
        if isinstance(module, RMSNorm):  # its function of promotion takes two arrays
            (x, scale), bias = module.promote_dtype((x, scale), dtype=module.dtype), None
        else:
            bias = None if module.bias is None else module.bias[...]
            # The promoted running statistics are dropped: in bfloat16 they would lose what they were averaged for.
            between = running[:2] if isinstance(module, BatchNorm) else ()
            x, *_, scale, bias = module.promote_dtype((x, *between, scale, bias), dtype=module.dtype)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype)
    x = flax_names.widened(x, module.dtype)
    with kernels.asked(getattr(module, "kernel", None)):
        return flax_names.normalize_as_read(
            x, reading, running, use_running, momentum, dtype=dtype, scale=scale, bias=bias, mask=mask
        )
