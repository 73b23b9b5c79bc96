"""Flax linen modules of `units.py`: parameters, and the running variance of EvoNorm-B0."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import layer, selu, units
from normjax._normalize.evaluate import Normalized
from normjax.field import Field
from normjax.linen.norms import Dtype, Initializer, _store, _stored
from normjax.running import Running, as_stats, slots


def _param(
    module: Any, name: str, x: ArrayLike, use: bool = True, given: Any = None, make: Initializer | None = None
) -> Any:
    """A parameter `[c]`, by the module's initializer of its name or another, or what was given at the call instead."""
    if not use or given is not None:
        return given
    shape = layer.channel_shape(module.layout, jnp.shape(x))
    return module.param(name, getattr(module, f"{name}_init") if make is None else make, shape, module.param_dtype)


def _fields(module: nn.Module, *fields: Field | str) -> tuple[Any, ...]:
    """The fields; while initializing, mapped axes need not exist yet."""
    parsed = (Field.parse(field) for field in fields)
    return tuple((field.local() or Field(())) if module.is_initializing() else field for field in parsed)


class TLU(nn.Module):
    """Thresholded linear unit, max(x, tau), with a learned threshold of each channel, `tau`.

    Attributes:
      layout: name of each axis of the input.
      param_dtype: of the threshold.
      tau_init: initializer of the threshold.

    Source: Singh & Krishnan 2020, section 3.

    >>> x = jnp.array([[-1.0, 2.0]])
    >>> TLU().apply(TLU().init(jax.random.key(0), x), x).tolist()
    [[0.0, 2.0]]
    """

    layout: str = "n ... c"
    param_dtype: Dtype = jnp.float32
    tau_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: ArrayLike) -> jax.Array:
        """The larger of x and the threshold."""
        return units.tlu(x, _param(self, "tau", x), self.layout)


class DyT(nn.Module):
    """Dynamic tanh, scale * tanh(alpha * x) + bias, with a learned scalar `alpha`.

    Attributes:
      alpha_init: initial value of alpha.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.

    Source: Zhu et al. 2025, section 4.

    >>> variables = DyT().init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'alpha': (), 'bias': (3,), 'scale': (3,)}}
    """

    alpha_init: float = 0.5
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: ArrayLike) -> jax.Array:
        """Squashes x."""
        alpha = self.param("alpha", initializers.constant(self.alpha_init), (), self.param_dtype)
        scale, bias = _param(self, "scale", x, self.use_scale), _param(self, "bias", x, self.use_bias)
        return units.dyt(x, alpha, self.layout, scale=scale, bias=bias, dtype=self.dtype)


class Derf(nn.Module):
    """Dynamic erf, scale * erf(alpha * x + shift) + bias, with learned scalars `alpha` and `shift`.

    Attributes:
      alpha_init: initial value of alpha.
      shift_init: initial value of the shift.

    All others are those of `DyT`.

    Source: Chen et al. 2025.

    >>> variables = Derf().init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> variables["params"]["alpha"].item(), variables["params"]["shift"].item()
    (0.5, 0.0)
    """

    alpha_init: float = 0.5
    shift_init: float = 0.0
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: ArrayLike) -> jax.Array:
        """Squashes x."""
        alpha = self.param("alpha", initializers.constant(self.alpha_init), (), self.param_dtype)
        shift = self.param("shift", initializers.constant(self.shift_init), (), self.param_dtype)
        scale, bias = _param(self, "scale", x, self.use_scale), _param(self, "bias", x, self.use_bias)
        return units.derf(x, alpha, shift, self.layout, scale=scale, bias=bias, dtype=self.dtype)


class EvoNormB0(nn.Module):
    """EvoNorm-B0: norm and nonlinearity in one, with the variance of the batch and that of each instance.

    The batch's variance is stored in the collection `batch_stats` as `var`, biased, never while initializing.

    Attributes:
      batch: field of the batch's variance; with mapped axes `"@data n ..."`.
      instance: field of the instance's variance.
      layout: name of each axis of the input.
      use_running_average: whether the stored variance is used; here or at the call.
      momentum: weight of the old value in the running average.
      epsilon: added to both variances. [units of x squared]
      unbiased: of the instance's variance, the dialect of Lubana et al. 2021; see `normjax.units.evonorm_b0`.
      nonlinear: False leaves scale and bias alone.
      stats_names: names of the axes of the stored variance, as in `Norm`.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      v_init: initializer of v, `[c]`.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.

    Source: Liu et al. 2020.

    >>> x = jnp.ones((2, 4, 4, 3))
    >>> variables = EvoNormB0().init(jax.random.key(0), x, use_running_average=False)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,), 'v': (3,)}}
    """

    batch: Field | str = "n ..."
    instance: Field | str = "..."
    layout: str = "n ... c"
    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    nonlinear: bool = True
    stats_names: tuple[str | None, ...] | None = None
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    v_init: Initializer = initializers.ones
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes and bends x; see `normjax.normalize` for the mask."""
        x = selu.as_real(x, "EvoNormB0")
        v, scale = _param(self, "v", x, self.nonlinear), _param(self, "scale", x, self.use_scale)
        bias = _param(self, "bias", x, self.use_bias)
        batch, instance = _fields(self, self.batch, self.instance)
        row = units.evonorm_row(batch, self.epsilon)
        slot = slots(units.evonorm_row(self.batch), self.layout, x.shape)
        stored = {"var": _stored(self, "var", slot["var"], self.stats_names)} if self.nonlinear and slot else {}
        average = bool(stored) and nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        running = Running(**{name: variable.value for name, variable in stored.items()})
        out = units.evonorm_b0(
            x, 1.0 if v is None else v, self.layout, batch=batch, instance=instance, epsilon=self.epsilon,
            unbiased=self.unbiased, nonlinear=self.nonlinear, scale=scale, bias=bias, mask=mask, dtype=self.dtype,
            stats=as_stats(running, row, self.layout, x.shape) if average else None,
        )  # fmt: skip
        if stored and not average:
            trained = Normalized(out.y, out.y, out.stats)
            _store(self, stored, layer.remember(trained, running, row, self.layout, self.momentum))
        return out.y


class EvoNormS0(nn.Module):
    """EvoNorm-S0: norm and nonlinearity in one, with the variance of each group of channels.

    Attributes:
      field: of the variance; `"... c/32"` is 32 groups.
      epsilon: added to the variance. [units of x squared]
      unbiased: the dialect of Lubana et al. 2021; see `normjax.units.evonorm_s0`.

    All others are those of `EvoNormB0`.

    Source: Liu et al. 2020.

    >>> layer = EvoNormS0("... c/2")
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((2, 4, 4, 6))))
    {'params': {'bias': (6,), 'scale': (6,), 'v': (6,)}}
    """

    field: Field | str = "... c/32"
    layout: str = "n ... c"
    epsilon: float = 1e-5
    unbiased: bool = False
    nonlinear: bool = True
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    v_init: Initializer = initializers.ones
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes and bends x; see `normjax.normalize` for the mask."""
        v, scale = _param(self, "v", x, self.nonlinear), _param(self, "scale", x, self.use_scale)
        bias = _param(self, "bias", x, self.use_bias)
        (field,) = _fields(self, self.field)
        return units.evonorm_s0(
            x, 1.0 if v is None else v, self.layout, field=field, epsilon=self.epsilon, unbiased=self.unbiased,
            nonlinear=self.nonlinear, scale=scale, bias=bias, mask=mask, dtype=self.dtype,
        )  # fmt: skip


class GRN(nn.Module):
    """Global response normalization of ConvNeXt V2, with the input added; starts as the identity.

    Attributes:
      space: field over which squares are summed.
      channels: field of the mean response.
      layout: name of each axis of the input.
      epsilon: added to the mean response. [units of x]
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor, `[c]`.
      bias_init: initializer of the addend, `[c]`.

    Source: Woo et al. 2023, algorithm 1.

    >>> x = jnp.ones((2, 4, 4, 3))
    >>> y = GRN().apply(GRN().init(jax.random.key(0), x), x)
    >>> bool((y == x).all())
    True
    """

    space: Field | str = "..."
    channels: Field | str = "c"
    layout: str = "n ... c"
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = initializers.zeros
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Rescales the channels of x; see `normjax.normalize` for the mask."""
        scale, bias = _param(self, "scale", x), _param(self, "bias", x)
        space, channels = _fields(self, self.space, self.channels)
        return units.grn(
            x,
            scale,
            bias,
            self.layout,
            space=space,
            channels=channels,
            epsilon=self.epsilon,
            mask=mask,
            dtype=self.dtype,
        )
