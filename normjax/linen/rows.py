"""Linen layers of `normjax.rows`: `Norm` with a row made of a few numbers.

They take the attributes of `Norm`, store what it stores, and take its arguments at the call.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from normjax import batch, batch_extremes, response
from normjax._expect.arrays import require_float
from normjax.linen.norms import Norm, _apply_norm, _stored
from normjax.running import slots
from normjax.theory import TABLE, Normalizer, Stats


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

    All others are those of `Norm`. The authors average with momentum 0.1; first values: see `running.published_start`.

    Source: Hoffer et al. 2018, section 4.

    >>> layer = L1BatchNorm(use_running_average=False, normalized=False, use_scale=False, use_bias=False, epsilon=0.0)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].tolist()
    [[-1.0], [1.0]]
    """

    normalized: bool = True
    field: str = batch.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return batch.l1_batch(self.field, eps=self.epsilon, normalized=self.normalized)


class LpBatchNorm(_Row):
    """Batch norm by the mean of |v| ** p; see `batch.lp_batch`.

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
    field: str = batch.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return batch.lp_batch(self.p, self.field, eps=self.epsilon, calibrated=self.calibrated)


class TopKBatchNorm(_Row):
    """Batch norm by the mean of the k largest |v|; see `batch_extremes.top_batch`.

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
    field: str = batch.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return batch_extremes.top_batch(self.k, self.size, self.field, eps=self.epsilon, calibrated=self.calibrated)


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
    """Batch norm with a mean for each channel and one spread for all; see `batch.extended_batch`.

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
        return batch.extended_batch(eps=self.epsilon)


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
        return response.local_context(self.window, self.groups, eps=self.epsilon)


class _Measured(_Row):
    """A `_Row` of which a training batch has a row, or statistics, made at the call."""

    @nn.nowrap
    def _measure(self, x: jax.Array, mask: Any, update: bool) -> tuple[Normalizer, Stats | None]:
        """The row for a batch, and statistics if they are other than the row's own; mapped axes need not exist at init."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, update_running_average: bool | None = None,
        renorm: tuple[ArrayLike, ArrayLike] | None = None, mask: ArrayLike | None = None,
        scale: ArrayLike | None = None, bias: ArrayLike | None = None,
    ) -> jax.Array:  # fmt: skip
        """Normalizes x; arguments as for `Norm`."""
        x = require_float(x, "Norm")
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = self.update_running_average if update_running_average is None else update_running_average
        n, measured = self.normalizer, None
        if not average or self.is_initializing():
            n, measured = self._measure(x, mask, update)
        return _apply_norm(
            self, n, x, mask=mask, scale=scale, bias=bias, average=average, sigma_init=self.sigma_init,
            stats_names=self.stats_names, momentum=self.momentum, averaging=self.averaging, unbiased=self.unbiased,
            update_running=update, renorm=self.renorm if renorm is None else renorm, measured=measured,
        )  # fmt: skip


class GhostBatchNorm(_Measured):
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
        return batch.ghost_batch(1, eps=self.epsilon)

    @nn.nowrap
    def _measure(self, x: jax.Array, mask: Any, update: bool) -> tuple[Normalizer, Stats | None]:
        strict = not self.is_initializing()
        return batch.ghost_row(x.shape, self.layout, self.examples, self.epsilon, strict=strict), None


class RangeBatchNorm(_Measured):
    """Batch norm by the mean range of parts of the batch; see `batch_extremes.range_batch`.

    Attributes:
      size: elements of a part in training, examples * positions, on which the constant depends. Required.
      parts: number of equal parts of a training batch.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged.

    All others are those of `Norm`; the stored `var` is the mean range.

    Source: Banner et al. 2018, section 3.

    >>> layer = RangeBatchNorm(size=2, parts=2, calibrated=True, use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[0.0], [4.0], [1.0], [3.0]]))[0].shape
    (4, 1)
    """

    size: int | None = None
    parts: int = 16
    calibrated: bool = False
    field: str = batch.BATCH

    @nn.nowrap
    def _row(self) -> Normalizer:
        return batch_extremes.range_row(self.size, self.field, eps=self.epsilon, calibrated=self.calibrated)

    @nn.nowrap
    def _measure(self, x: jax.Array, mask: Any, update: bool) -> tuple[Normalizer, Stats | None]:
        n, starting = self._row(), self.is_initializing()
        field = (n.local() if starting else n).fields[0]
        return n, batch_extremes.mean_range(x, self.layout, field, parts=1 if starting else self.parts, mask=mask)


class GhostTopKBatchNorm(TopKBatchNorm, _Measured):
    """Batch norm by a moving average of the mean of the k largest |v|, in training too; see `batch_extremes.ghost_top`.

    Attributes:
      beta: weight of the average before, stored in `batch_stats` as `top`, from 0 on.

    All others are those of `TopKBatchNorm`. The stored `var` averages the moving average.

    Source: Hoffer et al. 2018, their code.

    >>> layer = GhostTopKBatchNorm(k=2, size=4)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 3)), True)["batch_stats"])
    {'mean': (3,), 'top': (3,), 'var': (3,)}
    """

    beta: float = 0.75

    @nn.nowrap
    def _measure(self, x: jax.Array, mask: Any, update: bool) -> tuple[Normalizer, Stats | None]:
        n = self._row()
        top = _stored(self, "top", slots(n, self.layout, x.shape)["var"]._replace(fill=0.0), self.stats_names)
        if self.is_initializing():
            return n, None
        stats, kept = batch_extremes.stored_top(x, top.value, n, self.layout, beta=self.beta, mask=mask)
        if update:
            top.value = kept
        return n, stats
