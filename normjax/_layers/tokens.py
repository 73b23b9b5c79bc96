"""The layers of `normjax.tokens`: vectors of channels by their length, or by that of a part of them."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import tokens
from normjax._expect.arrays import require_float
from normjax._layers import describe
from normjax._layers.describe import (
    Amount,
    Count,
    Initializer,
    Layer,
    Parameter,
    Shape,
    StaticAmount,
    description,
    ones,
    zeros,
)
from normjax._leaves import split_eps
from normjax._normalize.evaluate import normalize


@description
class ScaleNorm(Layer):
    """Vectors of channels at one learned length, `scale * x / ||x||`; see `normjax.tokens.l2`.

    Attributes:
      epsilon: added to the squared length. [units of x squared]
      layout: name of each axis of the input.
      scale_init: initializer of the length, a scalar; None starts at the square root of the number of channels.
      dtype, param_dtype: of the output, by default that of the input; of the parameter.

    Source: Nguyen & Salazar 2019, equation 7.

    >>> from normjax.linen import ScaleNorm
    >>> y, _ = ScaleNorm().init_with_output(jax.random.key(0), jnp.array([[0.0, 6.0, 8.0, 0.0]]))
    >>> (10 * y).round().tolist()
    [[0.0, 12.0, 16.0, 0.0]]
    """

    epsilon: Amount = 1e-10
    layout: str = "n ... c"
    scale_init: Initializer | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def _learns(self, shape: Shape) -> dict[str, Parameter]:
        (channels,) = describe.channel_shape(self.layout, shape)
        return {"scale": Parameter((), channels**0.5 if self.scale_init is None else self.scale_init)}

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Brings the vectors of channels to the learned length; what is masked counts nowhere and becomes 0."""
        x = describe.promoted(require_float(x, "ScaleNorm"), self.dtype)
        (channels,) = describe.channel_shape(self.layout, x.shape)
        number, eps = split_eps(self.epsilon)
        out = normalize(x, tokens.l2(channels, eps=number), self.layout, mask=mask, eps=eps, **self._learned(x.shape))
        return out.y.astype(self.dtype or x.dtype)


@description
class PartialRMSNorm(Layer):
    """RMS norm by the first channels; see `normjax.tokens.partial_rms`.

    Attributes:
      fraction: of the channels, rounded up.
      epsilon: added to the mean square. [units of x squared]
      layout: name of each axis of the input.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`; the paper has no addend.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    Source: Zhang & Sennrich 2019, section 3.2.

    >>> from normjax.linen import PartialRMSNorm
    >>> (10 * PartialRMSNorm(0.5, use_scale=False).apply({}, jnp.array([[2.0, 6.0]]))).round().tolist()
    [[10.0, 30.0]]
    """

    fraction: StaticAmount = 0.0625
    epsilon: Amount = 1e-6
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return describe.scale_and_bias(self, shape)

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> jax.Array:
        """Divides x by the root mean square of its first channels; what is masked counts nowhere, and becomes the bias.

        `scale` and `bias` replace the learned ones: each a scalar, `[c]`, `[n, c]`, or of the rank of x.
        """
        x = describe.promoted(require_float(x, "PartialRMSNorm"), self.dtype)
        learned = self._learned(x.shape, scale=scale, bias=bias)
        out = tokens.partial_rms(x, self.layout, fraction=self.fraction, eps=self.epsilon, mask=mask, **learned)
        return out.y.astype(self.dtype or x.dtype)


@description
class QKNorm(Layer):
    """Query and key, each normalized over the axis of a head; see `normjax.tokens.qk`.

    Attributes:
      kind: "rms", "layer" or "l2".
      epsilon: added to the moment; None takes that of the kind. [units of x squared]
      length: for "l2", the length of sequences, which tells where the factor starts (`normjax.tokens.qk_scale`).
      layout: name of each axis of both; c is the axis of a head.
      use_scale: whether factors are learned: `query_scale` and `key_scale`, `[head_dim]`; for "l2" `query_scale` alone, a
        scalar in place of the division by sqrt(head_dim).
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init: initializer of the factors, but for "l2".

    Source: Henry et al. 2020; Dehghani et al. 2023.

    >>> from normjax.linen import QKNorm
    >>> layer = QKNorm("l2", length=64)
    >>> (q, k), variables = layer.init_with_output(jax.random.key(0), jnp.ones((5, 2, 4)), jnp.ones((7, 1, 4)))
    >>> q.shape, k[0, 0].tolist(), variables["params"]["query_scale"].round(2)
    ((5, 2, 4), [0.5, 0.5, 0.5, 0.5], Array(11.98, dtype=float32))
    """

    kind: str = "rms"
    epsilon: Amount | None = None
    length: Count | None = None
    layout: str = "... c"
    use_scale: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        if not self.use_scale:
            return {"query_scale": None, "key_scale": None}
        if self.kind == "l2":
            return {"query_scale": Parameter((), tokens.qk_scale(self.length)), "key_scale": None}
        factor = Parameter(describe.channel_shape(self.layout, shape), self.scale_init)
        return {"query_scale": factor, "key_scale": factor}

    def __call__(self, query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Both, normalized, in their shapes; the key has the last axes of the query."""
        query, key = (describe.promoted(require_float(a, "QKNorm"), self.dtype) for a in (query, key))
        q, k = tokens.qk(query, key, self.layout, kind=self.kind, eps=self.epsilon, **self._learned(query.shape))
        return q.astype(self.dtype or q.dtype), k.astype(self.dtype or k.dtype)
