"""Linen layers of `normjax.around` and of rows that are more than a `Norm`: parameters, no arithmetic of their own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import batch, layer, response, tokens
from normjax._expect.arrays import require_float
from normjax._normalize.evaluate import normalize
from normjax.linen.norms import Dtype, Initializer
from normjax.linen.units import _param
from normjax.theory import Normalizer

ONES, ZEROS = initializers.ones, initializers.zeros


class VirtualBatchNorm(nn.Module):
    """Each example by the statistics of a reference batch that it is added to; see `batch.virtual_batch`.

    The layer takes both and returns both: the reference batch goes through the network beside the examples.

    Attributes:
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of both.
      field: of the reference's statistics.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.

    Source: Salimans et al. 2016, section 3.5.

    >>> layer = VirtualBatchNorm(epsilon=0.0, use_scale=False, use_bias=False)
    >>> [(4 * y).round().tolist() for y in layer.apply({}, jnp.array([[3.0]]), jnp.array([[-3.0], [0.0]]))]
    [[[5.0]], [[-4.0], [4.0]]]
    """

    epsilon: float = 1e-5
    layout: str = "n ... c"
    field: str = batch.BATCH
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES
    bias_init: Initializer = ZEROS

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        reference: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        reference_mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the normalized x and the normalized reference; masks as for `normjax.normalize`."""
        x, reference = (layer.promoted(require_float(a, "VirtualBatchNorm"), self.dtype) for a in (x, reference))
        scale = _param(self, "scale", x, self.use_scale)
        bias = _param(self, "bias", x, self.use_bias)
        n = Normalizer(self.field, None)  # while initializing, mapped axes need not exist yet
        field = (n.local() if self.is_initializing() else n).fields[0]
        out, known = batch.virtual_batch(
            x, reference, self.layout, field=field, scale=scale, bias=bias, eps=self.epsilon, mask=mask,
            reference_mask=reference_mask,
        )  # fmt: skip
        return out.y.astype(self.dtype or x.dtype), known.y.astype(self.dtype or x.dtype)


class FilterResponseNorm(nn.Module):
    """Filter response norm and its thresholded linear unit; see `response.filter_response`.

    Attributes:
      epsilon: added to the mean square, and where `eps` starts if it is learned. [units of x squared]
      learn_eps: whether eps is learned, one scalar a layer of which the absolute value counts. Lubana et al. 2021 do so
        from 1e-5; the paper where maps are a single element.
      use_tau: whether the unit max(y, tau) follows, tau learned, `[c]`.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      tau_init: initializer of the threshold.

    Source: Singh & Krishnan 2020, section 3.

    >>> layer = FilterResponseNorm(learn_eps=True)
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.array([[[3.0], [-4.0]]]))
    >>> (10 * y).round().tolist(), sorted(variables["params"])
    ([[[8.0], [0.0]]], ['bias', 'eps', 'scale', 'tau'])
    """

    epsilon: float = 1e-6
    learn_eps: bool = False
    use_tau: bool = True
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES
    bias_init: Initializer = ZEROS
    tau_init: Initializer = ZEROS

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x = layer.promoted(require_float(x, "FilterResponseNorm"), self.dtype)
        scale = _param(self, "scale", x, self.use_scale, scale)
        bias = _param(self, "bias", x, self.use_bias, bias)
        tau = _param(self, "tau", x, self.use_tau)
        eps: Any = self.epsilon
        if self.learn_eps:
            eps = self.param("eps", initializers.constant(self.epsilon), (), self.param_dtype)
        out = response.filter_response(x, self.layout, scale=scale, bias=bias, tau=tau, eps=eps, mask=mask)
        return out.y.astype(self.dtype or x.dtype)


class ScaleNorm(nn.Module):
    """Vectors of channels at one learned length; see `tokens.l2`.

    Attributes:
      epsilon: added to the squared length. [units of x squared]
      layout: name of each axis of the input.
      scale_init: initializer of the length, a scalar; None starts at the square root of the number of channels.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameter.

    Source: Nguyen & Salazar 2019, equation 7.

    >>> y, _ = ScaleNorm().init_with_output(jax.random.key(0), jnp.array([[0.0, 6.0, 8.0, 0.0]]))
    >>> (10 * y).round().tolist()
    [[0.0, 12.0, 16.0, 0.0]]
    """

    epsilon: float = 1e-10
    layout: str = "n ... c"
    scale_init: Initializer | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        x = layer.promoted(require_float(x, "ScaleNorm"), self.dtype)
        (channels,) = layer.channel_shape(self.layout, x.shape)
        make = initializers.constant(channels**0.5) if self.scale_init is None else self.scale_init
        scale = self.param("scale", make, (), self.param_dtype)
        out = normalize(x, tokens.l2(channels, eps=self.epsilon), self.layout, scale=scale, mask=mask)
        return out.y.astype(self.dtype or x.dtype)


class PartialRMSNorm(nn.Module):
    """RMS norm by the first channels; see `tokens.partial_rms`.

    Attributes:
      fraction: of the channels, rounded up.
      epsilon: added to the mean square. [units of x squared]
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`; the paper has none.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.

    Source: Zhang & Sennrich 2019, section 3.2.

    >>> (10 * PartialRMSNorm(0.5, use_scale=False).apply({}, jnp.array([[2.0, 6.0]]))).round().tolist()
    [[10.0, 30.0]]
    """

    fraction: float = 0.0625
    epsilon: float = 1e-6
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES
    bias_init: Initializer = ZEROS

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x = layer.promoted(require_float(x, "PartialRMSNorm"), self.dtype)
        scale = _param(self, "scale", x, self.use_scale, scale)
        bias = _param(self, "bias", x, self.use_bias, bias)
        out = tokens.partial_rms(
            x, self.layout, fraction=self.fraction, scale=scale, bias=bias, eps=self.epsilon, mask=mask
        )
        return out.y.astype(self.dtype or x.dtype)


class QKNorm(nn.Module):
    """Query and key, each normalized over the axis of a head; see `tokens.qk`.

    Attributes:
      kind: "rms", "layer" or "l2".
      epsilon: None takes that of the kind.
      length: for "l2", the length of sequences, which tells where the factor starts (`tokens.qk_scale`).
      layout: name of each axis of both; c is the axis of a head.
      use_scale: whether factors are learned: `query_scale` and `key_scale`, `[head_dim]`; for "l2" `query_scale` alone, a
        scalar in place of the division by sqrt(head_dim).
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factors, but for "l2".

    Source: Henry et al. 2020; Dehghani et al. 2023.

    >>> layer = QKNorm("l2", length=64)
    >>> (q, k), variables = layer.init_with_output(jax.random.key(0), jnp.ones((5, 2, 4)), jnp.ones((7, 1, 4)))
    >>> q.shape, k[0, 0].tolist(), variables["params"]["query_scale"].round(2)
    ((5, 2, 4), [0.5, 0.5, 0.5, 0.5], Array(11.98, dtype=float32))
    """

    kind: str = "rms"
    epsilon: float | None = None
    length: int | None = None
    layout: str = "... c"
    use_scale: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES

    @nn.compact
    def __call__(self, query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns both, normalized."""
        query, key = (layer.promoted(require_float(a, "QKNorm"), self.dtype) for a in (query, key))
        query_scale = key_scale = None
        if self.use_scale and self.kind == "l2":
            make = initializers.constant(tokens.qk_scale(self.length))
            query_scale = self.param("query_scale", make, (), self.param_dtype)
        elif self.use_scale:
            query_scale = _param(self, "query_scale", query, make=self.scale_init)
            key_scale = _param(self, "key_scale", query, make=self.scale_init)
        q, k = tokens.qk(
            query, key, self.layout, kind=self.kind, query_scale=query_scale, key_scale=key_scale, eps=self.epsilon
        )
        return q.astype(self.dtype or q.dtype), k.astype(self.dtype or k.dtype)
