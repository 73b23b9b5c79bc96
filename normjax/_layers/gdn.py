"""The layer of generalized divisive normalization."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import gdn
from normjax._expect.arrays import require_float
from normjax._layers.describe import Initializer, Layer, Parameter, Shape, StaticAmount, description, ones


@description
class GDN(Layer):
    """Divides each channel by a learned pool of all channels of its position, or multiplies by it (`inverse`: IGDN).

    `alpha=1, epsilon=1` is the form of Johnston et al. 2019. The parameters are `beta_raw`, `[c]`, and `gamma_raw`, `[c, c]`
    (row i weighs what divides channel i), and, where they are learned, the scalars `alpha_raw` and `epsilon_raw`: square
    roots, `sqrt(beta + offset ** 2)`, of which `normjax.gdn.nonnegative` gives back beta and gamma themselves.

    Attributes:
      alpha: exponent inside the pool; the initial value of a learned one, which stays above 1.
      epsilon: exponent of the pool, as in the papers (not a small addend); the initial value of a learned one.
      inverse: multiply by the pool, as decoders do.
      learn_alpha, learn_epsilon: whether alpha, and epsilon, is learned, one scalar a layer.
      rectify: whether negative inputs are set to zero first.
      beta_min: smallest beta. [units of x ** alpha]
      offset: keeps the slope of the stored square root finite at 0; see `normjax.gdn.nonnegative`.
      gradient: what comes back to a parameter below its bound, "pass" or "block"; see `normjax.gdn.towards_bound`.
      layout: name of each axis of the input.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      beta_init, gamma_init: initializers of beta, `[c]`, and gamma, `[c, c]`, themselves; stored are reparametrizations.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, and 2017 (end-to-end), section 2.

    >>> from normjax.linen import GDN
    >>> layer, x = GDN(), jnp.array([[3.0, -4.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> (1000 * layer.apply(variables, x)).round().tolist()
    [[2176.0, -2481.0]]
    """

    alpha: StaticAmount = 2.0
    epsilon: StaticAmount = 0.5
    inverse: bool = False
    learn_alpha: bool = False
    learn_epsilon: bool = False
    rectify: bool = False
    beta_min: StaticAmount = 1e-6
    offset: StaticAmount = gdn.OFFSET
    gradient: str = "pass"
    layout: str = "n ... c"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    beta_init: Initializer = ones
    gamma_init: Initializer = gdn.diagonal(0.1)

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        shapes, offset = gdn.shapes(self.layout, shape), self.offset

        def learned(name: str, init: Initializer | float) -> Parameter:
            def start(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
                return gdn.to_raw(init(key, shape, dtype) if callable(init) else jnp.full(shape, init, dtype), offset)

            return Parameter(getattr(shapes, name), start)

        return {
            "beta_raw": learned("beta", self.beta_init),
            "gamma_raw": learned("gamma", self.gamma_init),
            "alpha_raw": learned("alpha", self.alpha) if self.learn_alpha else None,
            "epsilon_raw": learned("epsilon", self.epsilon) if self.learn_epsilon else None,
        }

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x by the learned pool; what is masked is in no pool, and becomes 0."""
        x = require_float(x, "GDN")
        learned = self._learned(x.shape)
        return gdn.gdn_of_raw(
            x,
            gdn.Raw(**{name.removesuffix("_raw"): value for name, value in learned.items()}),
            self.layout,
            alpha=self.alpha,
            epsilon=self.epsilon,
            inverse=self.inverse,
            rectify=self.rectify,
            beta_min=self.beta_min,
            offset=self.offset,
            gradient=self.gradient,
            mask=mask,
            dtype=self.dtype,
        )
