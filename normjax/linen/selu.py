"""Flax linen module of `normjax.selu`: dropout and its random keys."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from normjax import selu


class AlphaDropout(nn.Module):
    """Dropout for SELU: drops to its value far below zero, and restores mean and variance.

    Attributes:
      rate: probability of dropping. (Not of keeping.)
      broadcast_dims: axes along which elements are dropped together.
      deterministic: whether the input passes as it is (evaluation); here or at the call.
      rng_collection: collection of the random key.
      mean: of the inputs, restored.
      var: of the inputs, restored.
      low: what elements are dropped to, -scale * alpha of the SELU.

    Source: Klambauer et al. 2017, section 3.

    >>> dropout = AlphaDropout(0.5)
    >>> dropout.apply({}, jnp.zeros(4), deterministic=False, rngs={"dropout": jax.random.key(0)}).shape
    (4,)
    >>> dropout.apply({}, jnp.zeros(2), deterministic=True).tolist()
    [0.0, 0.0]
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    mean: float = 0.0
    var: float = 1.0
    low: float = selu.LOW

    @nn.compact
    def __call__(self, x: ArrayLike, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        """Drops elements of x; a key given here replaces the collection's."""
        x = selu.as_real(x, "AlphaDropout")
        if nn.merge_param("deterministic", self.deterministic, deterministic) or self.rate == 0:
            return x
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return selu.alpha_dropout(
            key, x, self.rate, mean=self.mean, var=self.var, low=self.low, broadcast_dims=self.broadcast_dims
        )
