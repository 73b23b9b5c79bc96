"""The layer of `normjax.selu`: dropout that keeps mean and variance."""

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from normjax import selu
from normjax._layers.describe import Layer, StaticAmount, StaticNumber, StaticShare, description


@description
class AlphaDropout(Layer):
    """Dropout for SELU: drops to its value far below zero, and restores mean and variance.

    Attributes:
      rate: probability of dropping. (Not of keeping.)
      broadcast_dims: axes along which elements are dropped together.
      deterministic: whether the input passes as it is (evaluation); here or at the call.
      rng_collection: collection, in nnx name of the stream, of the random keys.
      mean, var: of the inputs, restored.
      low: what elements are dropped to, -scale * alpha of the SELU.

    Source: Klambauer et al. 2017, section 3.

    >>> from normjax.linen import AlphaDropout
    >>> dropout = AlphaDropout(0.5)
    >>> dropout.apply({}, jnp.zeros(4), deterministic=False, rngs={"dropout": jax.random.key(0)}).shape
    (4,)
    >>> dropout.apply({}, jnp.zeros(2), deterministic=True).tolist()
    [0.0, 0.0]
    """

    rate: StaticShare
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    mean: StaticNumber = 0.0
    var: StaticAmount = 1.0
    low: StaticNumber = selu.LOW

    def _passes(self, deterministic: bool) -> bool:
        """Whether the input passes as it is."""
        return deterministic or self.rate == 0

    def _dropped(self, x: ArrayLike, key: jax.Array) -> jax.Array:
        """The input with elements dropped by this random key."""
        dims = tuple(self.broadcast_dims)
        return selu.alpha_dropout(key, x, self.rate, mean=self.mean, var=self.var, low=self.low, broadcast_dims=dims)
