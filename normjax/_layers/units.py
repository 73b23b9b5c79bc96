"""The layers of `normjax.units`: nonlinearities in place of a normalizer, or with one inside."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import units
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Layer, Number, Parameter, Shape, description, ones, zeros
from normjax.field import Field


@description
class TLU(Layer):
    """Thresholded linear unit, max(x, tau), with a learned threshold of each channel, `tau`.

    Attributes:
      layout: name of each axis of the input.
      param_dtype: of the threshold.
      tau_init: initializer of the threshold, `[c]`.

    Source: Singh & Krishnan 2020, section 3.

    >>> from normjax.linen import TLU
    >>> x = jnp.array([[-1.0, 2.0]])
    >>> TLU().apply(TLU().init(jax.random.key(0), x), x).tolist()
    [[0.0, 2.0]]
    """

    layout: str = "n ... c"
    param_dtype: DTypeLike = jnp.float32
    tau_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter]:
        return {"tau": Parameter(describe.channel_shape(self.layout, shape), self.tau_init)}

    def __call__(self, x: ArrayLike) -> jax.Array:
        """The larger of x and the threshold."""
        return units.tlu(x, layout=self.layout, **self._learned(jnp.shape(x)))


@description
class DyT(Layer):
    """Dynamic tanh, scale * tanh(alpha * x) + bias, with a learned scalar `alpha`.

    Attributes:
      alpha_init: initial value of alpha.
      layout: name of each axis of the input.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    Source: Zhu et al. 2025, section 4.

    >>> from normjax.linen import DyT
    >>> variables = DyT().init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'alpha': (), 'bias': (3,), 'scale': (3,)}}
    """

    alpha_init: Number = 0.5
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return {"alpha": Parameter((), self.alpha_init), **describe.scale_and_bias(self, shape)}

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Squashes x."""
        return units.dyt(x, layout=self.layout, dtype=self.dtype, **self._learned(jnp.shape(x)))


@description
class Derf(Layer):
    """Dynamic erf, scale * erf(alpha * x + shift) + bias, with learned scalars `alpha` and `shift`.

    Attributes:
      alpha_init, shift_init: initial values of alpha and of the shift.
      layout: name of each axis of the input.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    Source: Chen et al. 2025.

    >>> from normjax.linen import Derf
    >>> variables = Derf().init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> variables["params"]["alpha"].item(), variables["params"]["shift"].item()
    (0.5, 0.0)
    """

    alpha_init: Number = 0.5
    shift_init: Number = 0.0
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        scalars = {"alpha": Parameter((), self.alpha_init), "shift": Parameter((), self.shift_init)}
        return {**scalars, **describe.scale_and_bias(self, shape)}

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Squashes x."""
        return units.derf(x, layout=self.layout, dtype=self.dtype, **self._learned(jnp.shape(x)))


@description
class GRN(Layer):
    """Global response normalization of ConvNeXt V2, with the input added; starts as the identity.

    Attributes:
      space: field over which squares are summed.
      channels: field of the mean response.
      layout: name of each axis of the input.
      epsilon: added to the mean response. [units of x]
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend, `[c]` each.

    Source: Woo et al. 2023, algorithm 1.

    >>> from normjax.linen import GRN
    >>> x = jnp.ones((2, 4, 4, 3))
    >>> y = GRN().apply(GRN().init(jax.random.key(0), x), x)
    >>> bool((y == x).all())
    True
    """

    space: Field | str = "..."
    channels: Field | str = "c"
    layout: str = "n ... c"
    epsilon: Amount = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = zeros
    bias_init: Initializer = zeros

    def _check(self) -> None:
        Field.parse(self.space)
        Field.parse(self.channels)

    def _learns(self, shape: Shape) -> dict[str, Parameter]:
        size = describe.channel_shape(self.layout, shape)
        return {"scale": Parameter(size, self.scale_init), "bias": Parameter(size, self.bias_init)}

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Rescales the channels of x; see `normjax.normalize` for the mask."""
        return units.grn(
            x,
            layout=self.layout,
            space=describe.field_here(self, self.space),
            channels=describe.field_here(self, self.channels),
            eps=self.epsilon,
            mask=mask,
            dtype=self.dtype,
            **self._learned(jnp.shape(x)),
        )
