"""EvoNorm: norm and nonlinearity in one, as layers of `normjax.units`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import units
from normjax._expect.arrays import require_real
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Layer, Parameter, Shape, Share, description, ones, zeros
from normjax._layers.statistics import Limits, RunningLayer, Taken
from normjax._leaves import split_eps
from normjax._normalize.evaluate import equation
from normjax.field import Field, FieldError
from normjax.running import Slot
from normjax.theory import Normalizer, Stats


@description
class EvoNormB0(RunningLayer):
    """EvoNorm-B0: norm and nonlinearity in one, with the variance of the batch and that of each instance.

    The batch's variance is stored as `var`, biased, never while initializing.

    Attributes:
      batch: field of the batch's variance; with mapped axes `"@data n ..."`.
      instance: field of the instance's variance.
      epsilon: added to both variances. [units of x squared]
      nonlinear: False leaves scale and bias alone, and stores nothing.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      v_init, scale_init, bias_init: initializers of v, `[c]`, of the factor and of the addend.
      momentum: weight of the old value in the running average.
      unbiased: of the instance's variance, the dialect of Lubana et al. 2021; see `normjax.units.evonorm_b0`.

    All other options are those of `Norm`. Batch renormalization (`renorm`)
    keeps the batch's deviation near the stored one; the L1 penalty is on x less the batch's mean.
    Source: Liu et al. 2020.

    >>> from normjax.linen import EvoNormB0
    >>> x = jnp.ones((2, 4, 4, 3))
    >>> variables = EvoNormB0().init(jax.random.key(0), x, use_running_average=False)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,), 'v': (3,)}}
    """

    batch: Field | str = "n ..."
    instance: Field | str = "..."
    layout: str = "n ... c"
    epsilon: Amount = 1e-5
    nonlinear: bool = True
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    v_init: Initializer = ones
    scale_init: Initializer = ones
    bias_init: Initializer = zeros
    momentum: Share = dataclasses.field(default=0.9, kw_only=True)

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return _learned(self, shape)

    def _row(self) -> Normalizer | None:
        return units.evonorm_row(self.batch, split_eps(self.epsilon)[0]) if self.nonlinear else None

    def _keeps(self, shape: Shape, dtype: DTypeLike | None = None) -> dict[str, Slot]:
        found = {name: slot for name, slot in super()._keeps(shape, dtype).items() if name.startswith("var")}
        if any(None in slot.shape for slot in found.values()):
            raise FieldError(
                f'EvoNormB0 stores one variance a channel, but field "{self.batch}" keeps other axes of '
                f'layout "{self.layout}"'
            )
        return found

    def _stores_unbiased(self) -> bool:
        return False  # here the option is the instance's

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        renorm: Limits | None = None,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes and bends x; see `normjax.normalize` for the mask."""
        x = require_real(x, "EvoNormB0")
        batch, instance = describe.field_here(self, self.batch), describe.field_here(self, self.instance)
        (number, eps), given = split_eps(self.epsilon), _given(self, x.shape)
        row = units.evonorm_row(batch, number)

        def take(stats: Stats | None) -> Taken[jax.Array]:
            out = units.evonorm_b0(x, batch=batch, instance=instance, mask=mask, stats=stats, **given)
            v = equation(x, row, self.layout, mask=mask).centered if self.l1 else None
            return Taken(out.y, out.stats, row, v)

        asked = {"update_running_average": update_running_average, "renorm": renorm, "mask": mask}
        return self._normalized(x, take, use_running_average, eps=eps, **asked)


@description
class EvoNormS0(Layer):
    """EvoNorm-S0: norm and nonlinearity in one, with the variance of each group of channels.

    Attributes:
      field: of the variance; `"... c/32"` is 32 groups.
      layout: name of each axis of the input.
      epsilon: added to the variance. [units of x squared]
      unbiased: the dialect of Lubana et al. 2021; see `normjax.units.evonorm_s0`.
      nonlinear: False leaves scale and bias alone.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      v_init, scale_init, bias_init: initializers of v, `[c]`, of the factor and of the addend.

    Source: Liu et al. 2020.

    >>> from normjax.linen import EvoNormS0
    >>> layer = EvoNormS0("... c/2")
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((2, 4, 4, 6))))
    {'params': {'bias': (6,), 'scale': (6,), 'v': (6,)}}
    """

    field: Field | str = "... c/32"
    layout: str = "n ... c"
    epsilon: Amount = 1e-5
    unbiased: bool = False
    nonlinear: bool = True
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    v_init: Initializer = ones
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _check(self) -> None:
        Field.parse(self.field)

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return _learned(self, shape)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes and bends x; see `normjax.normalize` for the mask."""
        return units.evonorm_s0(x, field=describe.field_here(self, self.field), mask=mask, **_given(self, jnp.shape(x)))


def _learned(layer: EvoNormB0 | EvoNormS0, shape: Shape) -> dict[str, Parameter | None]:
    slope = Parameter(describe.channel_shape(layer.layout, shape), layer.v_init) if layer.nonlinear else None
    return {"v": slope, **describe.scale_and_bias(layer, shape)}


def _given(layer: EvoNormB0 | EvoNormS0, shape: tuple[int, ...]) -> dict[str, Any]:
    """What both functions take."""
    options = {"layout": layer.layout, "eps": layer.epsilon, "unbiased": layer.unbiased, "nonlinear": layer.nonlinear}
    return {**options, "dtype": layer.dtype, **layer._learned(shape)}
