"""Flax nnx module of generalized divisive normalization; the arithmetic is in `normjax.gdn`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import gdn

_ONES, _DIAGONAL = initializers.ones_init(), gdn.diagonal(0.1)


class GDN(nnx.Module):
    """Divides each channel by a learned pool of all channels of its position, or multiplies by it (`inverse`: IGDN).

    Args:
      features: number of channels.
      rngs: random keys for the initializers.

    All others mean what they mean in `normjax.linen.GDN`.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, and 2017 (end-to-end), section 2.

    >>> (1000 * GDN(2, rngs=nnx.Rngs(0))(jnp.array([[3.0, -4.0]]))).round().tolist()
    [[2176.0, -2481.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        alpha: float = 2.0,
        epsilon: float = 0.5,
        inverse: bool = False,
        learn_alpha: bool = False,
        learn_epsilon: bool = False,
        rectify: bool = False,
        beta_min: float = 1e-6,
        offset: float = gdn.OFFSET,
        gradient: str = "pass",
        layout: str = "n ... c",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        beta_init: Any = _ONES,
        gamma_init: Any = _DIAGONAL,
        rngs: nnx.Rngs,
    ):
        def learned(init: Any, shape: tuple[int, ...]) -> Any:
            return nnx.Param(gdn.stored(init(rngs.params(), shape, param_dtype), offset))

        self.beta_raw = learned(beta_init, (features,))
        self.gamma_raw = learned(gamma_init, (features, features))
        self.alpha_raw = learned(initializers.constant(alpha), ()) if learn_alpha else nnx.data(None)
        self.epsilon_raw = learned(initializers.constant(epsilon), ()) if learn_epsilon else nnx.data(None)
        self.alpha = alpha
        self.epsilon = epsilon
        self.inverse = inverse
        self.rectify = rectify
        self.beta_min = beta_min
        self.offset = offset
        self.gradient = gradient
        self.layout = layout
        self.dtype = dtype

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.gdn.gdn` for the mask."""
        names = ("beta_raw", "gamma_raw", "alpha_raw", "epsilon_raw")
        raw = gdn.Raw(*(None if (v := getattr(self, name)) is None else v[...] for name in names))
        return gdn.apply(
            x, raw, self.layout, alpha=self.alpha, epsilon=self.epsilon, inverse=self.inverse, rectify=self.rectify,
            beta_min=self.beta_min, offset=self.offset, gradient=self.gradient, mask=mask, dtype=self.dtype,
        )  # fmt: skip
