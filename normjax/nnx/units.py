"""Flax nnx modules of `units.py`: parameters, and the running variance of EvoNorm-B0."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from normjax import layer, selu, units
from normjax._normalize.evaluate import Normalized
from normjax.field import Field, FieldError
from normjax.nnx.norms import _ONES, _ZEROS, Dtype, Initializer, _flag, _parameter, _store, _value
from normjax.running import Running, as_stats, slots


class TLU(nnx.Module):
    """Thresholded linear unit with a learned threshold of each channel; see `normjax.linen.TLU`.

    Args:
      features: number of channels.
      layout: name of each axis of the input.
      param_dtype: of the threshold.
      tau_init: initializer of the threshold.
      rngs: random keys for the initializer.

    Source: Singh & Krishnan 2020, section 3.

    >>> TLU(2, rngs=nnx.Rngs(0))(jnp.array([[-1.0, 2.0]])).tolist()
    [[0.0, 2.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        layout: str = "n ... c",
        param_dtype: Dtype = jnp.float32,
        tau_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.tau = _parameter(tau_init, True, (features,), param_dtype, rngs)
        self.layout = layout

    def __call__(self, x: ArrayLike) -> jax.Array:
        """The larger of x and the threshold."""
        return units.tlu(x, _value(self.tau), self.layout)


class DyT(nnx.Module):
    """Dynamic tanh with a learned scalar alpha; see `normjax.linen.DyT`.

    Args:
      features: number of channels.
      alpha_init: initial value of alpha.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned.
      use_bias: whether an addend is learned.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Source: Zhu et al. 2025, section 4.

    >>> DyT(1, rngs=nnx.Rngs(0))(jnp.array([[1e9]])).tolist()
    [[1.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        alpha_init: float = 0.5,
        layout: str = "n ... c",
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.alpha = nnx.Param(jnp.asarray(alpha_init, param_dtype))
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)
        self.layout = layout
        self.dtype = dtype

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Squashes x."""
        scale, bias = _value(self.scale), _value(self.bias)
        return units.dyt(x, self.alpha[...], self.layout, scale=scale, bias=bias, dtype=self.dtype)


class Derf(nnx.Module):
    """Dynamic erf with learned scalars alpha and shift; see `normjax.linen.Derf`.

    Args:
      features: number of channels.
      alpha_init: initial value of alpha.
      shift_init: initial value of the shift.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned.
      use_bias: whether an addend is learned.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Source: Chen et al. 2025.

    >>> Derf(1, rngs=nnx.Rngs(0))(jnp.array([[1e9]])).tolist()
    [[1.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        alpha_init: float = 0.5,
        shift_init: float = 0.0,
        layout: str = "n ... c",
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.alpha = nnx.Param(jnp.asarray(alpha_init, param_dtype))
        self.shift = nnx.Param(jnp.asarray(shift_init, param_dtype))
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)
        self.layout = layout
        self.dtype = dtype

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Squashes x."""
        scale, bias = _value(self.scale), _value(self.bias)
        return units.derf(x, self.alpha[...], self.shift[...], self.layout, scale=scale, bias=bias, dtype=self.dtype)


class EvoNormB0(nnx.Module):
    """EvoNorm-B0, with a running variance of the batch in `var`; see `normjax.linen.EvoNormB0`.

    Args:
      features: number of channels.
      batch: field of the batch's variance; with mapped axes `"@data n ..."`.
      instance: field of the instance's variance.
      layout: name of each axis of the input.
      use_running_average: whether the stored variance is used; `.train()`, `.eval()` and `nnx.view` set it.
      momentum: weight of the old value in the running average.
      epsilon: added to both variances.
      unbiased: of the instance's variance, the dialect of Lubana et al. 2021.
      nonlinear: False leaves scale and bias alone.
      use_scale: whether a factor is learned.
      use_bias: whether an addend is learned.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      v_init: initializer of v.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Raises:
      FieldError: the batch's variance is stored along other axes than the channels.

    Source: Liu et al. 2020.

    >>> layer = EvoNormB0(3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 4, 4, 3))).shape, layer.var[...]
    ((2, 4, 4, 3), Array([0.9, 0.9, 0.9], dtype=float32))
    """

    def __init__(
        self,
        features: int,
        *,
        batch: Field | str = "n ...",
        instance: Field | str = "...",
        layout: str = "n ... c",
        use_running_average: bool | None = False,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        unbiased: bool = False,
        nonlinear: bool = True,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        v_init: Initializer = _ONES,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.v = _parameter(v_init, nonlinear, (features,), param_dtype, rngs)
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)
        self.row = units.evonorm_row(batch, epsilon)
        self.instance = Field.parse(instance)
        self.layout = layout
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.unbiased = unbiased
        self.nonlinear = nonlinear
        self.dtype = dtype
        slot = slots(self.row, layout, layer.whole_shape(features, layout)) if nonlinear else {}
        if slot and None in slot["var"].shape:
            raise FieldError(f'EvoNormB0 stores one variance a channel, but field "{self.row.var}" keeps other axes of '
                             f'layout "{layout}"')  # fmt: skip
        self.var = nnx.BatchStat(slot["var"].make()) if slot else nnx.data(None)

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes and bends x; see `normjax.normalize` for the mask."""
        x = selu.as_real(x, "EvoNormB0")
        v, running = _value(self.v), Running(var=_value(self.var))
        stores = running.var is not None
        average = stores and _flag(use_running_average, self.use_running_average, "EvoNormB0")
        assert self.row.var is not None
        out = units.evonorm_b0(
            x, 1.0 if v is None else v, self.layout, batch=self.row.var, instance=self.instance, epsilon=self.row.eps,
            unbiased=self.unbiased, nonlinear=self.nonlinear, scale=_value(self.scale), bias=_value(self.bias), mask=mask,
            dtype=self.dtype, stats=as_stats(running, self.row, self.layout, x.shape) if average else None,
        )  # fmt: skip
        if stores and not average:
            trained = Normalized(out.y, out.y, out.stats)
            _store(self, layer.remember(trained, running, self.row, self.layout, self.momentum))
        return out.y

    def set_view(self, use_running_average: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether the stored variance is used.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class EvoNormS0(nnx.Module):
    """EvoNorm-S0; see `normjax.linen.EvoNormS0`.

    Args:
      features: number of channels.
      field: of the variance; `"... c/32"` is 32 groups.
      layout: name of each axis of the input.
      epsilon: added to the variance.
      unbiased: the dialect of Lubana et al. 2021.
      nonlinear: False leaves scale and bias alone.
      use_scale: whether a factor is learned.
      use_bias: whether an addend is learned.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      v_init: initializer of v.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Source: Liu et al. 2020.

    >>> EvoNormS0(6, field="... c/2", rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 6))).shape
    (2, 4, 4, 6)
    """

    def __init__(
        self,
        features: int,
        *,
        field: Field | str = "... c/32",
        layout: str = "n ... c",
        epsilon: float = 1e-5,
        unbiased: bool = False,
        nonlinear: bool = True,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        v_init: Initializer = _ONES,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.v = _parameter(v_init, nonlinear, (features,), param_dtype, rngs)
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)
        self.field = Field.parse(field)
        self.layout = layout
        self.epsilon = epsilon
        self.unbiased = unbiased
        self.nonlinear = nonlinear
        self.dtype = dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes and bends x; see `normjax.normalize` for the mask."""
        v = _value(self.v)
        return units.evonorm_s0(
            x, 1.0 if v is None else v, self.layout, field=self.field, epsilon=self.epsilon, unbiased=self.unbiased,
            nonlinear=self.nonlinear, scale=_value(self.scale), bias=_value(self.bias), mask=mask, dtype=self.dtype,
        )  # fmt: skip


class GRN(nnx.Module):
    """Global response normalization of ConvNeXt V2; see `normjax.linen.GRN`.

    Args:
      features: number of channels.
      space: field over which squares are summed.
      channels: field of the mean response.
      layout: name of each axis of the input.
      epsilon: added to the mean response.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Source: Woo et al. 2023, algorithm 1.

    >>> GRN(1, rngs=nnx.Rngs(0))(jnp.array([[[1.0], [2.0]]])).tolist()
    [[[1.0], [2.0]]]
    """

    def __init__(
        self,
        features: int,
        *,
        space: Field | str = "...",
        channels: Field | str = "c",
        layout: str = "n ... c",
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ZEROS,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.scale = _parameter(scale_init, True, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, True, (features,), param_dtype, rngs)
        self.space = Field.parse(space)
        self.channels = Field.parse(channels)
        self.layout = layout
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Rescales the channels of x; see `normjax.normalize` for the mask."""
        return units.grn(
            x, self.scale[...], self.bias[...], self.layout, space=self.space, channels=self.channels,
            epsilon=self.epsilon, mask=mask, dtype=self.dtype,
        )  # fmt: skip
