"""The layers of `normjax.conditional`: any row, with a scale and a bias that a condition decides."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import conditional
from normjax._expect.arrays import require_float
from normjax._layers import norm
from normjax._layers.describe import (
    Amount,
    Count,
    Initializer,
    Layer,
    Parameter,
    Shape,
    channel_shape,
    description,
    ones,
    zeros,
)
from normjax._layers.statistics import RunningLayer
from normjax.conditional import Modulation
from normjax.theory import Normalizer


@description
class AdaIN(Layer):
    """Adaptive instance norm: the content with the mean and spread of the style. Nothing is learned.

    Attributes:
      epsilon: added to the variances. [units of x squared]
      style_epsilon: added to the variance of the style instead; the authors' Lua code has 0. [units of x squared]
      unbiased: whether the variances are unbiased, as in a well-known PyTorch version.
      layout: name of each axis of both inputs.

    Source: Huang & Belongie 2017, equation 8.

    >>> from normjax.linen import AdaIN
    >>> AdaIN().apply({}, jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0]]])).round().tolist()
    [[[10.0], [30.0]]]
    """

    epsilon: Amount = 1e-5
    style_epsilon: Amount | None = None
    unbiased: bool = False
    layout: str = "n ... c"

    def __call__(
        self,
        x: ArrayLike,
        style: ArrayLike,
        *,
        strength: ArrayLike = 1.0,
        mask: ArrayLike | None = None,
        style_mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Gives x the mean and the spread of the style, which has its channels; its other lengths may differ.

        `strength` is how much of the style, from 0 (the content) to 1; what is masked counts nowhere.
        """
        return conditional.adain(
            x,
            style,
            self.layout,
            eps=self.epsilon,
            style_eps=self.style_epsilon,
            strength=strength,
            mask=mask,
            style_mask=style_mask,
            unbiased=self.unbiased,
        )


class Modulated(RunningLayer):
    """A layer with a `Norm` called `norm` inside, which normalizes before a condition gives scale and bias."""

    normalizer: Normalizer | str | None  # no options here: each layer has them in an order of its own

    def _check(self) -> None:
        for name in ("l1", "renorm"):
            if self.normalizer is None and getattr(self, name):
                raise ValueError(f"{name} has no meaning without a normalizer; found {name}={getattr(self, name)!r}")

    def _row(self) -> None:
        return None  # what is stored is the inner layer's

    def _parts(self) -> dict[str, Layer | None]:
        if self.normalizer is None:
            return {"norm": None}
        running = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunningLayer)}
        inside = norm.Norm(self.normalizer, self.layout, use_scale=False, use_bias=False, dtype=self.dtype, **running)
        return {"norm": inside}

    def _modulated(
        self, x: jax.Array, modulation: Modulation, use_running_average: bool | None, mask: ArrayLike | None
    ) -> jax.Array:
        """The row, with this scale and bias."""
        inside = self._part("norm")
        if inside is None:
            y = conditional.modulate(x, modulation, None, self.layout, mask=mask)
            return y if self.dtype is None else y.astype(self.dtype)
        return inside(x, use_running_average, mask=mask, scale=modulation.scale, bias=modulation.bias)


@description
class ConditionalNorm(Modulated):
    """Any normalizer with a scale and a bias for each class: conditional batch norm, conditional instance norm.

    Attributes:
      num_classes: number of classes.
      normalizer: a Normalizer or the name of a row of TABLE.
      scale_init, bias_init: initializers of the factors and of the addends, `[num_classes, c]` each.

    All other options are those of `Norm`; what is stored lies under `norm`.
    Source: Dumoulin et al. 2017, equation 5; de Vries et al. 2017, section 4.1.

    >>> from normjax.linen import ConditionalNorm
    >>> layer, x, labels = ConditionalNorm(10, use_running_average=False), jnp.ones((2, 4, 4, 3)), jnp.array([3, 7])
    >>> variables = jax.eval_shape(layer.init, jax.random.key(0), x, labels)
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'bias': (10, 3), 'scale': (10, 3)}
    """

    num_classes: Count
    normalizer: Normalizer | str | None = "batch"
    layout: str = "n ... c"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter]:
        table = (self.num_classes, *channel_shape(self.layout, shape))
        return {"scale": Parameter(table, self.scale_init), "bias": Parameter(table, self.bias_init)}

    def __call__(
        self, x: ArrayLike, labels: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x, with the scale and the bias of each example's class; what is masked becomes the bias.

        `labels` are integers `[n]`, or weights of the classes `[n, num_classes]`.
        """
        x = require_float(x, "ConditionalNorm")
        modulation = conditional.by_class(labels, **self._learned(x.shape))
        return self._modulated(x, modulation, use_running_average, mask)
