"""Flax nnx module of `normjax.selu`: dropout and its random keys."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from normjax import selu


class AlphaDropout(nnx.Module):
    """Dropout for SELU; see `normjax.linen.AlphaDropout`.

    Args:
      rate: probability of dropping.
      broadcast_dims: axes along which elements are dropped together.
      deterministic: whether the input passes as it is; `.train()`, `.eval()` and `nnx.view` set it.
      rng_collection: name of the stream of random keys.
      mean: of the inputs, restored.
      var: of the inputs, restored.
      low: what elements are dropped to.
      rngs: random keys, or a stream of them; here or at the call.

    Source: Klambauer et al. 2017, section 3.

    >>> dropout = AlphaDropout(0.5, rngs=nnx.Rngs(0))
    >>> dropout(jnp.zeros(4)).shape, dropout(jnp.zeros(2), deterministic=True).tolist()
    ((4,), [0.0, 0.0])
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        mean: float = 0.0,
        var: float = 1.0,
        low: float = selu.LOW,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.mean = mean
        self.var = var
        self.low = low
        stream = rngs[rng_collection] if isinstance(rngs, nnx.Rngs) else rngs
        self.rngs = nnx.data(None) if stream is None else stream.fork()

    def __call__(
        self,
        x: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Drops elements of x; keys given here replace those of the constructor.

        Raises:
          ValueError: `deterministic` or the random keys were given neither here nor to the constructor.
        """
        x = selu.as_real(x, "AlphaDropout")
        flag = self.deterministic if deterministic is None else deterministic
        if flag is None:
            raise ValueError("No `deterministic` argument was provided to AlphaDropout: pass it to the constructor or to "
                             "the call, or set it on the whole model with .train(), .eval() or nnx.view")  # fmt: skip
        if flag or self.rate == 0:
            return x
        keys: Any = self.rngs if rngs is None else rngs
        if keys is None:
            raise ValueError(
                "AlphaDropout is not deterministic but has no `rngs`: pass them to the constructor or the call"
            )
        if isinstance(keys, nnx.Rngs):
            keys = keys[self.rng_collection]
        key = keys if isinstance(keys, jax.Array) else keys()
        return selu.alpha_dropout(
            key, x, self.rate, mean=self.mean, var=self.var, low=self.low, broadcast_dims=self.broadcast_dims
        )

    def set_view(self, deterministic: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          deterministic: whether the input passes as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic
