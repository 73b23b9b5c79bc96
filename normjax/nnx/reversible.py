"""Flax nnx module of reversible instance normalization; the arithmetic is in `normjax.reversible`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import reversible
from normjax.reversible import Reversible
from normjax.theory import Normalizer, Stats

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class RevIN(nnx.Module):
    """Normalizes each series by its own statistics, and undoes that on the forecast; arguments as for `normjax.linen.RevIN`.

    Args:
      features: number of channels (variables of the series).
      rngs: random keys for the initializers.

    Source: Kim et al. 2022, equations 1 to 3.

    >>> revin, x = RevIN(1, rngs=nnx.Rngs(0)), jnp.array([[[2.0], [4.0]]])
    >>> y, stats = revin(x)
    >>> revin.denormalize(y, stats).round(4).tolist()
    [[[2.0], [4.0]]]
    """

    def __init__(
        self,
        features: int,
        *,
        centre: str = "mean",
        normalizer: Normalizer | str = reversible.SERIES,
        layout: str = "n ... c",
        detach: bool = False,
        slack: float = 0.0,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale_init: Any = _ONES,
        bias_init: Any = _ZEROS,
        rngs: nnx.Rngs,
    ):
        shape = (features,)
        self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype)) if use_bias else nnx.data(None)
        self.centre = centre
        self.normalizer = normalizer
        self.layout = layout
        self.detach = detach
        self.slack = slack
        self.dtype = dtype

    def _affine(self) -> dict[str, Any]:
        pair = {"scale": self.scale, "bias": self.bias}
        return {name: None if value is None else value[...] for name, value in pair.items()}

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Reversible:
        """Normalizes x; returns `(y, stats)`."""
        return reversible.revin(
            x, self.layout, normalizer=self.normalizer, centre=self.centre, mask=mask, detach=self.detach,
            dtype=self.dtype, **self._affine(),
        )  # fmt: skip

    def denormalize(self, y: ArrayLike, stats: Stats) -> jax.Array:
        """Undoes it on y, of any length along time."""
        return reversible.denormalize(
            y, stats, self.layout, normalizer=self.normalizer, slack=self.slack, dtype=self.dtype, **self._affine()
        )
