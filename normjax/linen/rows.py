"""Linen layers of `normjax.rows` and `normjax.around`: parameters and state, no arithmetic of their own.

The batch norms here are `Norm` with a row made of a few numbers: they take its attributes, store what it stores, and take
its arguments at the call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import around, layer, rows
from normjax.linen.norms import Norm, _apply_norm
from normjax.moments import as_floating
from normjax.theory import TABLE, Normalizer, normalize

Initializer = Any
Dtype = Any
ONES, ZEROS = initializers.ones, initializers.zeros


def _channels(module: Any, name: str, make: Initializer, use: bool, given: Any, x: jax.Array) -> Any:
    """A learned array `[c]`, or what was given at the call in its place, or None."""
    if not use or given is not None:
        return given
    return module.param(name, make, layer.channel_shape(module.layout, x.shape), module.param_dtype)


class _Row(Norm):
    """A `Norm` whose row is made of other attributes."""

    normalizer: Normalizer | str = dataclasses.field(default="batch", init=False)
    epsilon: float = 1e-5

    @nn.nowrap
    def _row(self) -> Normalizer:
        """The row that the attributes of the subclass make; every subclass has one."""
        raise NotImplementedError

    def __post_init__(self):
        self.normalizer = self._row()
        super().__post_init__()


class L1BatchNorm(_Row):
    """Batch norm by the mean absolute deviation; row "l1_batch" of TABLE.

    Attributes:
      epsilon: added to the spread; 0 in one of the authors' files. [units of x]
      normalized: whether sqrt(pi / 2) makes it a standard deviation of Gaussian data.
      field: what is averaged; with mapped axes "@data n ...".

    All others are those of `Norm`. The authors average with momentum 0.1; first values: see `dialects.start`.

    Source: Hoffer et al. 2018, section 4.

    >>> layer = L1BatchNorm(use_running_average=False, normalized=False, use_scale=False, use_bias=False, epsilon=0.0)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].tolist()
    [[-1.0], [1.0]]
    """

    normalized: bool = True
    field: str = rows.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return rows.l1_batch(self.field, eps=self.epsilon, normalized=self.normalized)


class LpBatchNorm(_Row):
    """Batch norm by the mean of |v| ** p; see `rows.lp_batch`.

    Attributes:
      p: the order, 1 or more.
      epsilon: added to the moment. [units of x ** p]
      calibrated: whether the moment is divided by that of Gaussian data.
      field: what is averaged.

    All others are those of `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> LpBatchNorm(p=3).normalizer
    Normalizer('n ...', 'n ...', power=0.3333333333333333, order=3)
    """

    p: float = 2
    calibrated: bool = False
    field: str = rows.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return rows.lp_batch(self.p, self.field, eps=self.epsilon, calibrated=self.calibrated)


class TopKBatchNorm(_Row):
    """Batch norm by the mean of the k largest |v|; see `rows.top_batch`.

    Attributes:
      k: how many.
      size: elements behind each statistic in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged.

    All others are those of `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> layer = TopKBatchNorm(k=2, size=4)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 3)), True)["batch_stats"])
    {'mean': (3,), 'var': (3,)}
    """

    k: int = 10
    size: int | None = None
    calibrated: bool = False
    field: str = rows.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return rows.top_batch(self.k, self.size, self.field, eps=self.epsilon, calibrated=self.calibrated)


class LinfBatchNorm(TopKBatchNorm):
    """Batch norm by the largest |v|: `TopKBatchNorm` with k = 1.

    Source: Hoffer et al. 2018, section 4.

    >>> LinfBatchNorm(size=1024).normalizer.order
    inf
    """

    k: int = 1


class VarianceNorm(_Row):
    """Batch norm that divides by the spread and keeps the mean; row "variance" of TABLE.

    Attributes:
      epsilon: added to the variance. [units of x squared]

    All others are those of `Norm`. Lubana et al. 2021 average with momentum 0.9.

    Source: Daneshmand et al. 2020.

    >>> layer = VarianceNorm(use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].round(3).tolist()
    [[0.5], [2.5]]
    """

    @nn.nowrap
    def _row(self) -> Normalizer:
        return dataclasses.replace(TABLE["variance"], eps=self.epsilon)


class ExtendedBatchNorm(_Row):
    """Batch norm with a mean for each channel and one spread for all; see `rows.extended_batch`.

    Attributes:
      epsilon: added to the variance. [units of x squared]

    All others are those of `Norm`; the stored `var` is a scalar.

    Source: Luo et al. 2020.

    >>> layer = ExtendedBatchNorm(use_running_average=False)
    >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0, 0.0], [5.0, 0.0]]))
    >>> (100 * y).round().tolist()                                   # the spread of the first channel, and none, together
    [[-141.0, 0.0], [141.0, 0.0]]
    """

    @nn.nowrap
    def _row(self) -> Normalizer:
        return rows.extended_batch(eps=self.epsilon)


class PositionNorm(_Row):
    """Each position over its channels; row "token" of TABLE. Its statistics for a shortcut: `normalize(x, "token").stats`.

    Attributes:
      epsilon: added to the variance. [units of x squared]

    All others are those of `Norm`.

    Source: Li et al. 2019, equation 2.

    >>> PositionNorm(use_scale=False, use_bias=False).apply({}, jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    @nn.nowrap
    def _row(self) -> Normalizer:
        return dataclasses.replace(TABLE["token"], eps=self.epsilon)


class LocalContextNorm(_Row):
    """A window of space by a block of channels; row "local_context" of TABLE.

    Attributes:
      window: width of the window along every axis between examples and channels.
      groups: number of blocks of channels.
      epsilon: added to the variance. [units of x squared]

    All others are those of `Norm`.

    Source: Ortiz et al. 2020, section 3.

    >>> LocalContextNorm(window=3, groups=2, use_scale=False, use_bias=False).apply({}, jnp.ones((1, 4, 4, 4))).shape
    (1, 4, 4, 4)
    """

    window: int = 9
    groups: int = 8

    @nn.nowrap
    def _row(self) -> Normalizer:
        return rows.local_context(self.window, self.groups, eps=self.epsilon)


class GhostBatchNorm(_Row):
    """Batch norm by the statistics of each part of the batch, and of all batches at inference; row "ghost" of TABLE.

    Attributes:
      examples: number of examples of a part; it divides every training batch.
      epsilon: added to the variance. [units of x squared]

    All others are those of `Norm`. Stored are the mean of the parts' means and that of their variances.

    Source: Hoffer et al. 2017, algorithm 1.

    >>> layer = GhostBatchNorm(examples=2, use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [3.0], [0.0], [10.0]]))[0].round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """

    examples: int = 32

    @nn.nowrap
    def _row(self) -> Normalizer:
        return rows.ghost_batch(1, eps=self.epsilon)

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, update_running_average: bool | None = None,
        renorm: tuple[ArrayLike, ArrayLike] | None = None, mask: ArrayLike | None = None,
        scale: ArrayLike | None = None, bias: ArrayLike | None = None,
    ) -> jax.Array:  # fmt: skip
        """Normalizes x; arguments as for `Norm`."""
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        examples = None if average else self.examples
        n = rows.ghost_row(jnp.shape(x), self.layout, examples, self.epsilon, strict=not self.is_initializing())
        return _apply_norm(
            self, n, x, mask=mask, scale=scale, bias=bias, average=average, sigma_init=self.sigma_init,
            stats_names=self.stats_names, momentum=self.momentum, averaging=self.averaging, unbiased=self.unbiased,
            update_running=self.update_running_average if update_running_average is None else update_running_average,
            renorm=self.renorm if renorm is None else renorm,
        )  # fmt: skip


class VirtualBatchNorm(nn.Module):
    """Each example by the statistics of a reference batch that it is added to; see `around.virtual_batch`.

    The layer takes both and returns both: the reference batch goes through the network beside the examples.

    Attributes:
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of both.
      field: of the reference's statistics.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
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
    field: str = rows.BATCH
    use_scale: bool = True
    use_bias: bool = True
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
        x = as_floating(x, "VirtualBatchNorm")
        scale = _channels(self, "scale", self.scale_init, self.use_scale, None, x)
        bias = _channels(self, "bias", self.bias_init, self.use_bias, None, x)
        n = Normalizer(self.field, None)  # while initializing, mapped axes need not exist yet
        field = (n.local() if self.is_initializing() else n).fields[0]
        out, known = around.virtual_batch(
            x, reference, self.layout, field=field, scale=scale, bias=bias, eps=self.epsilon, mask=mask,
            reference_mask=reference_mask,
        )  # fmt: skip
        return out.y, known.y


class FilterResponseNorm(nn.Module):
    """Filter response norm and its thresholded linear unit; see `around.filter_response`.

    Attributes:
      epsilon: added to the mean square, and where `eps` starts if it is learned. [units of x squared]
      learn_eps: whether eps is learned, one scalar a layer of which the absolute value counts. Lubana et al. 2021 do so
        from 1e-5; the paper where maps are a single element.
      use_tau: whether the unit max(y, tau) follows, tau learned, `[c]`.
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
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
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES
    bias_init: Initializer = ZEROS
    tau_init: Initializer = ZEROS

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x = as_floating(x, "FilterResponseNorm")
        scale = _channels(self, "scale", self.scale_init, self.use_scale, scale, x)
        bias = _channels(self, "bias", self.bias_init, self.use_bias, bias, x)
        tau = _channels(self, "tau", self.tau_init, self.use_tau, None, x)
        eps: Any = self.epsilon
        if self.learn_eps:
            eps = self.param("eps", initializers.constant(self.epsilon), (), self.param_dtype)
        return around.filter_response(x, self.layout, scale=scale, bias=bias, tau=tau, eps=eps, mask=mask).y


class ScaleNorm(nn.Module):
    """Vectors of channels at one learned length; see `rows.l2`.

    Attributes:
      epsilon: added to the squared length. [units of x squared]
      layout: name of each axis of the input.
      scale_init: initializer of the length, a scalar; None starts at the square root of the number of channels.
      param_dtype: of the parameter.

    Source: Nguyen & Salazar 2019, equation 7.

    >>> y, _ = ScaleNorm().init_with_output(jax.random.key(0), jnp.array([[0.0, 6.0, 8.0, 0.0]]))
    >>> (10 * y).round().tolist()
    [[0.0, 12.0, 16.0, 0.0]]
    """

    epsilon: float = 1e-10
    layout: str = "n ... c"
    scale_init: Initializer | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        x = as_floating(x, "ScaleNorm")
        (channels,) = layer.channel_shape(self.layout, x.shape)
        make = initializers.constant(channels**0.5) if self.scale_init is None else self.scale_init
        scale = self.param("scale", make, (), self.param_dtype)
        return normalize(x, rows.l2(channels, eps=self.epsilon), self.layout, scale=scale, mask=mask).y


class PartialRMSNorm(nn.Module):
    """RMS norm by the first channels; see `around.partial_rms`.

    Attributes:
      fraction: of the channels, rounded up.
      epsilon: added to the mean square. [units of x squared]
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`; the paper has none.
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
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES
    bias_init: Initializer = ZEROS

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask=None, scale=None, bias=None) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x = as_floating(x, "PartialRMSNorm")
        scale = _channels(self, "scale", self.scale_init, self.use_scale, scale, x)
        bias = _channels(self, "bias", self.bias_init, self.use_bias, bias, x)
        return around.partial_rms(
            x, self.layout, fraction=self.fraction, scale=scale, bias=bias, eps=self.epsilon, mask=mask
        ).y


class QKNorm(nn.Module):
    """Query and key, each normalized over the axis of a head; see `around.qk`.

    Attributes:
      kind: "rms", "layer" or "l2".
      epsilon: None takes that of the kind.
      length: for "l2", the length of sequences, which tells where the factor starts (`around.qk_scale`).
      layout: name of each axis of both; c is the axis of a head.
      use_scale: whether factors are learned: `query_scale` and `key_scale`, `[head_dim]`; for "l2" `query_scale` alone, a
        scalar in place of the division by sqrt(head_dim).
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
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ONES

    @nn.compact
    def __call__(self, query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns both, normalized."""
        query = as_floating(query, "QKNorm")
        query_scale = key_scale = None
        if self.use_scale and self.kind == "l2":
            make = initializers.constant(around.qk_scale(self.length))
            query_scale = self.param("query_scale", make, (), self.param_dtype)
        elif self.use_scale:
            query_scale = _channels(self, "query_scale", self.scale_init, True, None, query)
            key_scale = _channels(self, "key_scale", self.scale_init, True, None, query)
        return around.qk(
            query, key, self.layout, kind=self.kind, query_scale=query_scale, key_scale=key_scale, eps=self.epsilon
        )
