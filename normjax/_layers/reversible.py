"""The layer of reversible instance normalization."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import reversible
from normjax._layers.describe import (
    Amount,
    Initializer,
    Layer,
    Parameter,
    Shape,
    description,
    ones,
    scale_and_bias,
    zeros,
)
from normjax.reversible import Reversible
from normjax.theory import Normalizer, Stats


@description
class RevIN(Layer):
    """Normalizes each series by its own statistics, and undoes that on the forecast.

        y, stats = revin(x)
        forecast = revin.denormalize(model(y), stats)

    Attributes:
      centre: "mean", or "last" to subtract the last value that is not masked instead.
      normalizer: a Normalizer or the name of a row of TABLE; its fields are whole axes, and it has no floor.
      layout: name of each axis of the input; `...` is time.
      detach: whether gradients stop at the statistics, as in the authors' code.
      slack: added to the scale in the inverse; the authors' code has eps ** 2.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of the outputs, by default those of the inputs; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    In both faces `features`, the number of channels (variables of the series), comes first.

    Source: Kim et al. 2022, equations 1 to 3.

    >>> from normjax.linen import RevIN
    >>> layer, x = RevIN(1), jnp.array([[[2.0], [4.0]]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, stats = layer.apply(variables, x)
    >>> layer.apply(variables, y, stats, method="denormalize").round(4).tolist()
    [[[2.0], [4.0]]]
    """

    centre: str = "mean"
    normalizer: Normalizer | str = reversible.SERIES
    layout: str = "n ... c"
    detach: bool = False
    slack: Amount = 0.0
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return scale_and_bias(self, shape)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Reversible:
        """`(y, stats)`: the normalized series, where what is masked is the bias, and what `denormalize` needs."""
        options = {"centre": self.centre, "detach": self.detach, "dtype": self.dtype, **self._learned(jnp.shape(x))}
        return reversible.revin(x, self.layout, normalizer=self.normalizer, mask=mask, **options)

    def denormalize(self, y: ArrayLike, stats: Stats) -> jax.Array:
        """Brings a forecast, of any length along time, back to the level and the spread of its series.

        `stats` is what the call returned beside the normalized series.
        """
        options = {"slack": self.slack, "dtype": self.dtype, **self._learned(jnp.shape(y))}
        return reversible.denormalize(y, stats, self.layout, normalizer=self.normalizer, **options)
