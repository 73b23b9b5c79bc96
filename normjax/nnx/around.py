"""nnx layers of `normjax.around` and of rows that are more than a `Norm`: parameters, no arithmetic of their own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import batch, layer, response, tokens
from normjax._expect.arrays import require_float
from normjax._normalize.evaluate import normalize
from normjax.nnx.norms import _ONES, _ZEROS, Dtype, Initializer, _parameter, _value


def _beside(given: Any, learned: Any) -> Any:
    return _value(learned) if given is None else given


class VirtualBatchNorm(nnx.Module):
    """Each example by the statistics of a reference batch that it is added to; see `normjax.linen.VirtualBatchNorm`.

    Args:
      features: number of channels.
      epsilon: added to the variance.
      layout: name of each axis of both.
      field: of the reference's statistics.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Source: Salimans et al. 2016, section 3.5.

    >>> layer = VirtualBatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))
    >>> [(4 * y).round().tolist() for y in layer(jnp.array([[3.0]]), jnp.array([[-3.0], [0.0]]))]
    [[[5.0]], [[-4.0], [4.0]]]
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        layout: str = "n ... c",
        field: str = batch.BATCH,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.epsilon = epsilon
        self.layout = layout
        self.dtype = dtype
        self.field = field
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)

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
        out, known = batch.virtual_batch(
            x, reference, self.layout, field=self.field, scale=_value(self.scale), bias=_value(self.bias),
            eps=self.epsilon, mask=mask, reference_mask=reference_mask,
        )  # fmt: skip
        return out.y.astype(self.dtype or x.dtype), known.y.astype(self.dtype or x.dtype)


class FilterResponseNorm(nnx.Module):
    """Filter response norm and its thresholded linear unit; see `normjax.linen.FilterResponseNorm`.

    Args:
      features: number of channels.
      epsilon: added to the mean square, and where `eps` starts if it is learned.
      learn_eps: whether eps is learned, one scalar of which the absolute value counts.
      use_tau: whether the unit max(y, tau) follows, tau learned, `[c]`.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      tau_init: initializer of the threshold.
      rngs: random keys for the initializers.

    Source: Singh & Krishnan 2020, section 3.

    >>> (10 * FilterResponseNorm(1, learn_eps=True, rngs=nnx.Rngs(0))(jnp.array([[[3.0], [-4.0]]]))).round().tolist()
    [[[8.0], [0.0]]]
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        learn_eps: bool = False,
        use_tau: bool = True,
        layout: str = "n ... c",
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        tau_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.epsilon = epsilon
        self.layout = layout
        self.dtype = dtype
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)
        self.tau = _parameter(tau_init, use_tau, (features,), param_dtype, rngs)
        self.eps = nnx.Param(jnp.asarray(epsilon, param_dtype)) if learn_eps else nnx.data(None)

    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x = layer.promoted(require_float(x, "FilterResponseNorm"), self.dtype)
        out = response.filter_response(
            x, self.layout, scale=_beside(scale, self.scale), bias=_beside(bias, self.bias), tau=_value(self.tau),
            eps=self.epsilon if self.eps is None else self.eps[...], mask=mask,
        )  # fmt: skip
        return out.y.astype(self.dtype or x.dtype)


class ScaleNorm(nnx.Module):
    """Vectors of channels at one learned length; see `normjax.linen.ScaleNorm`.

    Args:
      features: number of channels.
      epsilon: added to the squared length.
      layout: name of each axis of the input.
      scale_init: initializer of the length, a scalar; None starts at the square root of the number of channels.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameter.
      rngs: random keys for the initializer.

    Source: Nguyen & Salazar 2019, equation 7.

    >>> (10 * ScaleNorm(4, rngs=nnx.Rngs(0))(jnp.array([[0.0, 6.0, 8.0, 0.0]]))).round().tolist()
    [[0.0, 12.0, 16.0, 0.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-10,
        layout: str = "n ... c",
        scale_init: Initializer | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features = features
        self.normalizer = tokens.l2(features, eps=epsilon)
        self.layout = layout
        self.dtype = dtype
        make = initializers.constant(features**0.5) if scale_init is None else scale_init
        self.scale = nnx.Param(make(rngs.params(), (), param_dtype))

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        x = layer.promoted(require_float(x, "ScaleNorm"), self.dtype)
        layer.same_channels(self.features, self.layout, x.shape)
        out = normalize(x, self.normalizer, self.layout, scale=self.scale[...], mask=mask)
        return out.y.astype(self.dtype or x.dtype)


class PartialRMSNorm(nnx.Module):
    """RMS norm by the first channels; see `normjax.linen.PartialRMSNorm`.

    Args:
      features: number of channels.
      fraction: of the channels, rounded up.
      epsilon: added to the mean square.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`; the paper has none.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      rngs: random keys for the initializers.

    Source: Zhang & Sennrich 2019, section 3.2.

    >>> (10 * PartialRMSNorm(2, 0.5, rngs=nnx.Rngs(0))(jnp.array([[2.0, 6.0]]))).round().tolist()
    [[10.0, 30.0]]
    """

    def __init__(
        self,
        features: int,
        fraction: float = 0.0625,
        *,
        epsilon: float = 1e-6,
        layout: str = "n ... c",
        use_scale: bool = True,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.fraction = fraction
        self.epsilon = epsilon
        self.layout = layout
        self.dtype = dtype
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)

    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x = layer.promoted(require_float(x, "PartialRMSNorm"), self.dtype)
        out = tokens.partial_rms(
            x, self.layout, fraction=self.fraction, scale=_beside(scale, self.scale), bias=_beside(bias, self.bias),
            eps=self.epsilon, mask=mask,
        )  # fmt: skip
        return out.y.astype(self.dtype or x.dtype)


class QKNorm(nnx.Module):
    """Query and key, each normalized over the axis of a head; see `normjax.linen.QKNorm`.

    Args:
      features: length of a head, head_dim.
      kind: "rms", "layer" or "l2".
      epsilon: None takes that of the kind.
      length: for "l2", the length of sequences.
      layout: name of each axis of both; c is the axis of a head.
      use_scale: whether factors are learned: `query_scale` and `key_scale`, or for "l2" a scalar `query_scale`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factors, but for "l2".
      rngs: random keys for the initializers.

    Source: Henry et al. 2020; Dehghani et al. 2023.

    >>> q, k = QKNorm(2, "l2", use_scale=False, rngs=nnx.Rngs(0))(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, -2.0]]))
    >>> round(float(jnp.vdot(q, k)), 4)
    -0.8
    """

    def __init__(
        self,
        features: int,
        kind: str = "rms",
        *,
        epsilon: float | None = None,
        length: int | None = None,
        layout: str = "... c",
        use_scale: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        rngs: nnx.Rngs,
    ):
        self.kind = kind
        self.epsilon = epsilon
        self.layout = layout
        self.dtype = dtype
        if kind == "l2":
            start = jnp.asarray(tokens.qk_scale(length), param_dtype) if use_scale else None
            self.query_scale = nnx.Param(start) if use_scale else nnx.data(None)
            self.key_scale = nnx.data(None)
        else:
            self.query_scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
            self.key_scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)

    def __call__(self, query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns both, normalized."""
        query, key = (layer.promoted(require_float(a, "QKNorm"), self.dtype) for a in (query, key))
        q, k = tokens.qk(
            query, key, self.layout, kind=self.kind, query_scale=_value(self.query_scale),
            key_scale=_value(self.key_scale), eps=self.epsilon,
        )  # fmt: skip
        return q.astype(self.dtype or q.dtype), k.astype(self.dtype or k.dtype)
