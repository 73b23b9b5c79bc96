"""The layers of `normjax.conditional.project`: scale and bias by a linear map of a condition."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import conditional
from normjax._expect.arrays import require_float
from normjax._layers.conditional import Modulated
from normjax._layers.describe import Initializer, Parameter, Shape, StaticNumber, channel_shape, description, zeros
from normjax.theory import Normalizer


def silu(x: jax.Array) -> jax.Array:
    """X * sigmoid(x); unlike JAX's own function, it pickles."""
    return jax.nn.silu(x)


@description
class FiLM(Modulated):
    """Feature-wise linear modulation: a linear map of a condition gives the scale and the bias.

    Attributes:
      normalizer: what is done before, a Normalizer or the name of a row; None does nothing.
      order: the parts of the map's output ("scale", "bias", "gate"), in the order of the checkpoint.
      around: added to the scale.
      activation: applied to the condition first.
      kernel_init, bias_init: initializers of the map, `[k, parts * c]` and `[parts * c]`; zeros start as no modulation.

    All other options are those of `Norm`; what is stored lies under `norm`. In nnx `condition_features`, the
    length k of the condition, follows `features`.
    Source: Perez et al. 2018, equations 1 and 2.

    >>> from normjax.linen import FiLM
    >>> x, condition = jnp.ones((2, 5, 5, 3)), jnp.ones((2, 4))
    >>> variables = FiLM().init(jax.random.key(0), x, condition)
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'bias': (6,), 'kernel': (4, 6)}
    >>> bool((FiLM().apply(variables, x, condition) == x).all())
    True
    """

    normalizer: Normalizer | str | None = None
    layout: str = "n ... c"
    order: tuple[str, ...] = ("scale", "bias")
    around: StaticNumber = 1.0
    activation: Callable[[jax.Array], jax.Array] | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = zeros
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape, condition: Shape) -> dict[str, Parameter]:
        (channels,) = channel_shape(self.layout, shape)
        width = len(self.order) * channels
        return {
            "kernel": Parameter((condition[-1], width), self.kernel_init),
            "bias": Parameter((width,), self.bias_init),
        }

    def _with_gate(
        self, x: ArrayLike, condition: ArrayLike, use_running_average: bool | None, mask: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array]:
        """The modulated array, and the gate if the map gives one."""
        x, condition = require_float(x, type(self).__name__), require_float(condition, type(self).__name__)
        learned = self._learned(x.shape, condition.shape)
        modulation = conditional.project(
            condition, order=self.order, around=self.around, activation=self.activation, **learned
        )
        return self._modulated(x, modulation, use_running_average, mask), modulation.gate

    def __call__(
        self,
        x: ArrayLike,
        condition: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Modulates x by the condition `[n, k]`; what is masked counts nowhere, and becomes the bias."""
        return self._with_gate(x, condition, use_running_average, mask)[0]


@description
class AdaLN(FiLM):
    """Adaptive layer norm: each token is normalized, and a linear map of a condition gives the scale and the bias.

    Attributes:
      normalizer: what is done before, a Normalizer or the name of a row; None does nothing.
      order: the parts of the map's output, in the order of the checkpoint: bias, scale in DiT's.
      activation: applied to the condition first; DiT's is `jax.nn.silu`.

    All other options are those of `FiLM`, in its order; in nnx `condition_features` follows `features`.
    Source: Peebles & Xie 2023 (DiT), section 3.2.

    >>> from normjax.linen import AdaLN
    >>> layer, x = AdaLN(), jnp.array([[[1.0, 3.0]]])
    >>> layer.apply(layer.init(jax.random.key(0), x, jnp.ones((1, 4))), x, jnp.ones((1, 4))).round(3).tolist()
    [[[-1.0, 1.0]]]
    """

    normalizer: Normalizer | str | None = conditional.TOKEN
    order: tuple[str, ...] = ("bias", "scale")
    activation: Callable[[jax.Array], jax.Array] | None = silu


@description
class AdaLNZero(AdaLN):
    """Adaptive layer norm with a gate for the residual branch that follows; the gate starts at zero.

    The call returns `(y, gate)`, for `normjax.conditional.gated(x, branch(y), gate)`.

    Attributes:
      normalizer: what is done before, a Normalizer or the name of a row; None does nothing.
      order: the parts of the map's output, in the order of the checkpoint: bias, scale, gate in DiT's.
      activation: applied to the condition first; DiT's is `jax.nn.silu`.

    All other options are those of `FiLM`, in its order; in nnx `condition_features` follows `features`.
    Source: Peebles & Xie 2023 (DiT), section 3.2, adaLN-Zero.

    >>> from normjax import conditional
    >>> from normjax.linen import AdaLNZero
    >>> layer, x, condition = AdaLNZero(), jnp.array([[[1.0, 3.0]]]), jnp.ones((1, 4))
    >>> y, gate = layer.apply(layer.init(jax.random.key(0), x, condition), x, condition)
    >>> conditional.gated(x, jnp.sin(y), gate).tolist()
    [[[1.0, 3.0]]]
    """

    order: tuple[str, ...] = ("bias", "scale", "gate")

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: ArrayLike,
        condition: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Both x modulated by the condition `[n, k]`, where what is masked is the bias, and the gate `[n, c]`."""
        return self._with_gate(x, condition, use_running_average, mask)
