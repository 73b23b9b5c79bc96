"""Flax linen module of generalized divisive normalization; the arithmetic is in `normjax.gdn`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import gdn
from normjax._expect.arrays import require_float


class GDN(nn.Module):
    """Divides each channel by a learned pool of all channels of its position, or multiplies by it (`inverse`: IGDN).

    `alpha=1, epsilon=1` is the form of Johnston et al. 2019.

    Attributes:
      alpha: exponent inside the pool; the initial value of a learned one, which stays above 1.
      epsilon: exponent of the pool; the initial value of a learned one.
      inverse: multiply by the pool, as decoders do.
      learn_alpha: whether alpha is learned, one scalar a layer.
      learn_epsilon: whether epsilon is learned, one scalar a layer.
      rectify: whether negative inputs are set to zero first.
      beta_min: smallest beta. [units of x ** alpha]
      offset: see `normjax.gdn.nonnegative`.
      gradient: what comes back to a parameter below its bound, "pass" or "block"; see `normjax.gdn.towards`.
      layout: name of each axis of the input.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      beta_init: initializer of beta itself; what is stored is its reparametrization, `[c]`.
      gamma_init: initializer of gamma itself, stored the same, `[c, c]`.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, and 2017 (end-to-end), section 2.

    >>> layer, x = GDN(), jnp.array([[3.0, -4.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> (1000 * layer.apply(variables, x)).round().tolist()
    [[2176.0, -2481.0]]
    """

    alpha: float = 2.0
    epsilon: float = 0.5
    inverse: bool = False
    learn_alpha: bool = False
    learn_epsilon: bool = False
    rectify: bool = False
    beta_min: float = 1e-6
    offset: float = gdn.OFFSET
    gradient: str = "pass"
    layout: str = "n ... c"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    beta_init: Any = initializers.ones
    gamma_init: Any = gdn.diagonal(0.1)

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.gdn.gdn` for the mask."""
        x = require_float(x, "GDN")
        shapes = gdn.shapes(self.layout, x.shape)

        def learned(name: str, init: Any) -> Any:
            def start(key: Any, shape: Any, dtype: Any) -> jax.Array:
                return gdn.stored(init(key, shape, dtype), self.offset)

            return self.param(f"{name}_raw", start, getattr(shapes, name), self.param_dtype)

        raw = gdn.Raw(
            learned("beta", self.beta_init),
            learned("gamma", self.gamma_init),
            learned("alpha", initializers.constant(self.alpha)) if self.learn_alpha else None,
            learned("epsilon", initializers.constant(self.epsilon)) if self.learn_epsilon else None,
        )
        return gdn.apply(
            x, raw, self.layout, alpha=self.alpha, epsilon=self.epsilon, inverse=self.inverse, rectify=self.rectify,
            beta_min=self.beta_min, offset=self.offset, gradient=self.gradient, mask=mask, dtype=self.dtype,
        )  # fmt: skip
