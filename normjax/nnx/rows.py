"""nnx layers of `normjax.rows` and `normjax.around`: parameters and state, no arithmetic of their own.

The batch norms here are `Norm` with a row made of a few numbers; `**kwargs` are those of `Norm`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import around, rows
from normjax.nnx.norms import _ONES, _ZEROS, Dtype, Initializer, Norm, _flag, _value
from normjax.theory import TABLE, Normalizer, normalize


class L1BatchNorm(Norm):
    """Batch norm by the mean absolute deviation; see `normjax.linen.L1BatchNorm`.

    Args:
      features: number of channels.
      epsilon: added to the spread.
      normalized: whether sqrt(pi / 2) makes it a standard deviation of Gaussian data.
      field: what is averaged.
      **kwargs: as for `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> layer = L1BatchNorm(1, normalized=False, epsilon=0.0, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0], [5.0]])).tolist()
    [[-1.0], [1.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        normalized: bool = True,
        field: str = rows.BATCH,
        **kwargs: Any,
    ):
        super().__init__(rows.l1_batch(field, eps=epsilon, normalized=normalized), features, **kwargs)


class LpBatchNorm(Norm):
    """Batch norm by the mean of |v| ** p; see `normjax.linen.LpBatchNorm`.

    Args:
      features: number of channels.
      p: the order.
      epsilon: added to the moment.
      calibrated: whether the moment is divided by that of Gaussian data.
      field: what is averaged.
      **kwargs: as for `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> LpBatchNorm(1, 3, rngs=nnx.Rngs(0)).normalizer.order
    3
    """

    def __init__(
        self,
        features: int,
        p: float = 2,
        *,
        epsilon: float = 1e-5,
        calibrated: bool = False,
        field: str = rows.BATCH,
        **kwargs: Any,
    ):
        super().__init__(rows.lp_batch(p, field, eps=epsilon, calibrated=calibrated), features, **kwargs)


class TopKBatchNorm(Norm):
    """Batch norm by the mean of the k largest |v|; see `normjax.linen.TopKBatchNorm`.

    Args:
      features: number of channels.
      k: how many.
      size: elements behind each statistic in training, examples * positions.
      epsilon: added to the spread.
      calibrated: whether the constant is that of Gaussian data.
      field: what is averaged.
      **kwargs: as for `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> TopKBatchNorm(3, 2, size=4, rngs=nnx.Rngs(0)).var.shape
    (3,)
    """

    def __init__(
        self,
        features: int,
        k: int = 10,
        *,
        size: int,
        epsilon: float = 1e-5,
        calibrated: bool = False,
        field: str = rows.BATCH,
        **kwargs: Any,
    ):
        n = rows.top_batch(k, size, field, eps=epsilon, calibrated=calibrated)
        super().__init__(n, features, **kwargs)


class LinfBatchNorm(TopKBatchNorm):
    """Batch norm by the largest |v|: `TopKBatchNorm` with k = 1.

    Source: Hoffer et al. 2018, section 4.

    >>> LinfBatchNorm(3, size=1024, rngs=nnx.Rngs(0)).normalizer.order
    inf
    """

    def __init__(self, features: int, *, size: int, **kwargs: Any):
        super().__init__(features, 1, size=size, **kwargs)


class VarianceNorm(Norm):
    """Batch norm that divides by the spread and keeps the mean; see `normjax.linen.VarianceNorm`.

    Args:
      features: number of channels.
      epsilon: added to the variance.
      **kwargs: as for `Norm`.

    Source: Daneshmand et al. 2020.

    >>> VarianceNorm(1, rngs=nnx.Rngs(0))(jnp.array([[1.0], [5.0]])).round(3).tolist()
    [[0.5], [2.5]]
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5, **kwargs: Any):
        super().__init__(dataclasses.replace(TABLE["variance"], eps=epsilon), features, **kwargs)


class ExtendedBatchNorm(Norm):
    """Batch norm with a mean for each channel and one spread for all; see `normjax.linen.ExtendedBatchNorm`.

    Args:
      features: number of channels.
      epsilon: added to the variance.
      **kwargs: as for `Norm`.

    Source: Luo et al. 2020.

    >>> ExtendedBatchNorm(3, rngs=nnx.Rngs(0)).var.shape
    ()
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5, **kwargs: Any):
        super().__init__(rows.extended_batch(eps=epsilon), features, **kwargs)


class PositionNorm(Norm):
    """Each position over its channels; see `normjax.linen.PositionNorm`.

    Args:
      features: number of channels.
      epsilon: added to the variance.
      **kwargs: as for `Norm`.

    Source: Li et al. 2019, equation 2.

    >>> PositionNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5, **kwargs: Any):
        super().__init__(dataclasses.replace(TABLE["token"], eps=epsilon), features, **kwargs)


class LocalContextNorm(Norm):
    """A window of space by a block of channels; see `normjax.linen.LocalContextNorm`.

    Args:
      features: number of channels.
      window: width along every axis of space.
      groups: number of blocks of channels.
      epsilon: added to the variance.
      **kwargs: as for `Norm`.

    Source: Ortiz et al. 2020, section 3.

    >>> LocalContextNorm(4, 3, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 4, 4, 4))).shape
    (1, 4, 4, 4)
    """

    def __init__(self, features: int, window: int = 9, groups: int = 8, *, epsilon: float = 1e-5, **kwargs: Any):
        super().__init__(rows.local_context(window, groups, eps=epsilon), features, **kwargs)


class _With:
    """A module with another normalizer for one call: the number of a batch's parts is known at the call."""

    def __init__(self, module: Norm, normalizer: Normalizer):
        self._module, self.normalizer = module, normalizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class GhostBatchNorm(Norm):
    """Batch norm by the statistics of each part of the batch; see `normjax.linen.GhostBatchNorm`.

    Args:
      features: number of channels.
      examples: number of examples of a part.
      epsilon: added to the variance.
      **kwargs: as for `Norm`.

    Source: Hoffer et al. 2017, algorithm 1.

    >>> layer = GhostBatchNorm(1, examples=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0], [3.0], [0.0], [10.0]])).round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """

    def __init__(self, features: int, examples: int = 32, *, epsilon: float = 1e-5, **kwargs: Any):
        super().__init__(rows.ghost_batch(1, eps=epsilon), features, **kwargs)
        self.examples = examples

    def __call__(self, x: ArrayLike, use_running_average: bool | None = None, **kwargs: Any) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        average = _flag(use_running_average, self.use_running_average, "GhostBatchNorm")
        n = rows.ghost_row(jnp.shape(x), self.layout, None if average else self.examples, self.normalizer.eps)
        module: Any = _With(self, n)
        return Norm.__call__(module, x, average, **kwargs)


def _parameter(make: Initializer, use: bool, shape: tuple[int, ...], dtype: Dtype, rngs: nnx.Rngs) -> Any:
    return nnx.Param(make(rngs.params(), shape, dtype)) if use else nnx.data(None)


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
        field: str = rows.BATCH,
        use_scale: bool = True,
        use_bias: bool = True,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.epsilon = epsilon
        self.layout = layout
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
        out, known = around.virtual_batch(
            x, reference, self.layout, field=self.field, scale=_value(self.scale), bias=_value(self.bias),
            eps=self.epsilon, mask=mask, reference_mask=reference_mask,
        )  # fmt: skip
        return out.y, known.y


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
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        tau_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.epsilon = epsilon
        self.layout = layout
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)
        self.tau = _parameter(tau_init, use_tau, (features,), param_dtype, rngs)
        self.eps = nnx.Param(jnp.asarray(epsilon, param_dtype)) if learn_eps else nnx.data(None)

    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        return around.filter_response(
            x, self.layout, scale=_beside(scale, self.scale), bias=_beside(bias, self.bias), tau=_value(self.tau),
            eps=self.epsilon if self.eps is None else self.eps[...], mask=mask,
        ).y  # fmt: skip


class ScaleNorm(nnx.Module):
    """Vectors of channels at one learned length; see `normjax.linen.ScaleNorm`.

    Args:
      features: number of channels.
      epsilon: added to the squared length.
      layout: name of each axis of the input.
      scale_init: initializer of the length, a scalar; None starts at the square root of the number of channels.
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
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.normalizer = rows.l2(features, eps=epsilon)
        self.layout = layout
        make = initializers.constant(features**0.5) if scale_init is None else scale_init
        self.scale = nnx.Param(make(rngs.params(), (), param_dtype))

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        return normalize(x, self.normalizer, self.layout, scale=self.scale[...], mask=mask).y


class PartialRMSNorm(nnx.Module):
    """RMS norm by the first channels; see `normjax.linen.PartialRMSNorm`.

    Args:
      features: number of channels.
      fraction: of the channels, rounded up.
      epsilon: added to the mean square.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`; the paper has none.
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
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.fraction = fraction
        self.epsilon = epsilon
        self.layout = layout
        self.scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
        self.bias = _parameter(bias_init, use_bias, (features,), param_dtype, rngs)

    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        return around.partial_rms(
            x, self.layout, fraction=self.fraction, scale=_beside(scale, self.scale), bias=_beside(bias, self.bias),
            eps=self.epsilon, mask=mask,
        ).y  # fmt: skip


class QKNorm(nnx.Module):
    """Query and key, each normalized over the axis of a head; see `normjax.linen.QKNorm`.

    Args:
      features: length of a head, head_dim.
      kind: "rms", "layer" or "l2".
      epsilon: None takes that of the kind.
      length: for "l2", the length of sequences.
      layout: name of each axis of both; c is the axis of a head.
      use_scale: whether factors are learned: `query_scale` and `key_scale`, or for "l2" a scalar `query_scale`.
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
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        rngs: nnx.Rngs,
    ):
        self.kind = kind
        self.epsilon = epsilon
        self.layout = layout
        if kind == "l2":
            start = jnp.asarray(around.qk_scale(length), param_dtype) if use_scale else None
            self.query_scale = nnx.Param(start) if use_scale else nnx.data(None)
            self.key_scale = nnx.data(None)
        else:
            self.query_scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)
            self.key_scale = _parameter(scale_init, use_scale, (features,), param_dtype, rngs)

    def __call__(self, query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns both, normalized."""
        return around.qk(
            query, key, self.layout, kind=self.kind, query_scale=_value(self.query_scale),
            key_scale=_value(self.key_scale), eps=self.epsilon,
        )  # fmt: skip
