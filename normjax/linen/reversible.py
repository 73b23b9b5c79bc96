"""Flax linen module of reversible instance normalization; the arithmetic is in `normjax.reversible`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import reversible
from normjax.reversible import Reversible
from normjax.theory import Normalizer, Stats


class RevIN(nn.Module):
    """Normalizes each series by its own statistics, and undoes that on the forecast.

        y, stats = revin(x)
        forecast = revin.denormalize(model(y), stats)

    Attributes:
      features: number of channels (variables of the series).
      centre: "mean", or "last" to subtract the last value instead.
      normalizer: the row, of whole axes.
      layout: name of each axis of the input; `...` is time.
      detach: whether gradients stop at the statistics, as in the authors' code.
      slack: added to the scale in the inverse; the authors' code has eps ** 2.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the outputs, by default those of the inputs.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.

    Source: Kim et al. 2022, equations 1 to 3.

    >>> layer, x = RevIN(1), jnp.array([[[2.0], [4.0]]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, stats = layer.apply(variables, x)
    >>> layer.apply(variables, y, stats, method="denormalize").round(4).tolist()
    [[[2.0], [4.0]]]
    """

    features: int
    centre: str = "mean"
    normalizer: Normalizer | str = reversible.SERIES
    layout: str = "n ... c"
    detach: bool = False
    slack: float = 0.0
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = initializers.ones
    bias_init: Any = initializers.zeros

    def setup(self) -> None:
        """Makes the parameters, which both directions share."""
        shape = (self.features,)
        self.scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        self.bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Reversible:
        """Normalizes x; returns `(y, stats)`."""
        return reversible.revin(
            x, self.layout, normalizer=self.normalizer, centre=self.centre, scale=self.scale, bias=self.bias, mask=mask,
            detach=self.detach, dtype=self.dtype,
        )  # fmt: skip

    def denormalize(self, y: ArrayLike, stats: Stats) -> jax.Array:
        """Undoes it on y, of any length along time."""
        return reversible.denormalize(
            y, stats, self.layout, normalizer=self.normalizer, scale=self.scale, bias=self.bias, slack=self.slack,
            dtype=self.dtype,
        )  # fmt: skip
