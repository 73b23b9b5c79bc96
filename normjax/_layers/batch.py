"""Batch norms by other moments than the variance of the batch, or by parts of it: rows of `normjax.batch` as layers."""

import jax
from jax.typing import ArrayLike, DTypeLike

from normjax import batch, batch_extremes
from normjax._layers.describe import Amount, Count, Shape, StaticAmount, StaticShare, description
from normjax._layers.presets import Preset
from normjax.running import Slot
from normjax.theory import Normalizer, Stats


@description
class L1BatchNorm(Preset):
    """Batch norm by the mean absolute deviation; row "l1_batch" of TABLE.

    Attributes:
      normalized: whether sqrt(pi / 2) makes it a standard deviation of Gaussian data.
      epsilon: added to the spread; 0 in one of the authors' files. [units of x]
      field: what is averaged; with mapped axes "@data n ...".

    All other options are those of `Norm`. The authors average with momentum 0.1, from the first values of
    `normjax.running.published_start`.
    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import L1BatchNorm
    >>> layer = L1BatchNorm(use_running_average=False, normalized=False, use_scale=False, use_bias=False, epsilon=0.0)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].tolist()
    [[-1.0], [1.0]]
    """

    normalized: bool = True
    epsilon: Amount = 1e-5
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.l1_batch(self.field, eps=self._eps()[0], normalized=self.normalized)


@description
class LpBatchNorm(Preset):
    """Batch norm by the mean of |v| ** p; see `batch.lp_batch`.

    Attributes:
      p: the order, 1 or more.
      epsilon: added to the moment. [units of x ** p]
      calibrated: whether the moment is divided by that of Gaussian data.
      field: what is averaged; with mapped axes "@data n ...".

    All other options are those of `Norm`.
    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import LpBatchNorm
    >>> LpBatchNorm(p=3).normalizer
    Normalizer('n ...', 'n ...', power=0.3333333333333333, order=3)
    """

    p: StaticAmount = 2
    epsilon: Amount = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.lp_batch(self.p, self.field, eps=self._eps()[0], calibrated=self.calibrated)


@description
class TopKBatchNorm(Preset):
    """Batch norm by the mean of the k largest |v|; see `batch_extremes.top_batch`.

    Attributes:
      k: how many.
      size: elements behind each statistic in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".

    All other options are those of `Norm`.
    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import TopKBatchNorm
    >>> layer = TopKBatchNorm(k=2, size=4)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 3)), True)["batch_stats"])
    {'mean': (3,), 'var': (3,)}
    """

    k: Count = 10
    size: Count | None = None
    epsilon: Amount = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch_extremes.top_batch(self.k, self.size, self.field, eps=self._eps()[0], calibrated=self.calibrated)


@description
class LinfBatchNorm(Preset):
    """Batch norm by the largest |v|; see `batch_extremes.top_batch` for k = 1.

    Attributes:
      size: elements behind each statistic in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".

    All other options are those of `Norm`.
    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import LinfBatchNorm
    >>> LinfBatchNorm(size=1024).normalizer.order
    inf
    """

    size: Count | None = None
    epsilon: Amount = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch_extremes.top_batch(1, self.size, self.field, eps=self._eps()[0], calibrated=self.calibrated)


@description
class GhostBatchNorm(Preset):
    """Batch norm by the statistics of each part of the batch, and of all batches at inference; row "ghost" of TABLE.

    Attributes:
      examples: number of examples of a part; it divides every training batch.
      epsilon: added to the variance. [units of x squared]

    All other options are those of `Norm`. Stored are the mean of the parts' means and that of their variances.
    Source: Hoffer et al. 2017, algorithm 1.

    >>> from normjax.linen import GhostBatchNorm
    >>> layer = GhostBatchNorm(examples=2, use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [3.0], [0.0], [10.0]]))[0].round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """

    examples: Count = 32
    epsilon: Amount = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.ghost_batch(1, eps=self._eps()[0])

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        strict = not self._starting()
        return batch.ghost_row(x.shape, self.layout, self.examples, self._eps()[0], strict=strict), None


@description
class RangeBatchNorm(Preset):
    """Batch norm by the mean range of parts of the batch; see `batch_extremes.range_batch`.

    Attributes:
      parts: number of equal parts of a training batch.
      size: elements of a part in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".

    All other options are those of `Norm`; the stored `var` is the mean range.
    Source: Banner et al. 2018, section 3.

    >>> from normjax.linen import RangeBatchNorm
    >>> layer = RangeBatchNorm(size=2, parts=2, calibrated=True, use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[0.0], [4.0], [1.0], [3.0]]))[0].shape
    (4, 1)
    """

    parts: Count = 16
    size: Count | None = None
    epsilon: Amount = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch_extremes.range_row(self.size, self.field, eps=self._eps()[0], calibrated=self.calibrated)

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        n = self._here(self._row())
        parts = 1 if self._starting() else self.parts
        return n, batch_extremes.mean_range(x, self.layout, n.fields[0], parts=parts, mask=mask)


@description
class GhostTopKBatchNorm(TopKBatchNorm):
    """Batch norm by a moving average of the mean of the k largest |v|, in training too; see `batch_extremes.ghost_top`.

    Attributes:
      beta: weight of the average before, stored as `top`, from 0 on.

    The options before `beta` are those of `TopKBatchNorm`, all others those of `Norm`. The stored `var` averages the moving
    average.
    Source: Hoffer et al. 2018, their code.

    >>> from normjax.linen import GhostTopKBatchNorm
    >>> layer = GhostTopKBatchNorm(k=2, size=4)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 3)), True)["batch_stats"])
    {'mean': (3,), 'top': (3,), 'var': (3,)}
    """

    beta: StaticShare = 0.75

    def _keeps(self, shape: Shape, dtype: DTypeLike | None = None) -> dict[str, Slot]:
        found = super()._keeps(shape, dtype)
        return {**found, "top": found["var"]._replace(fill=0.0)}

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        n = self._here(self._row())
        if self._starting():
            return n, None
        top = self._stored("top", self._keeps(x.shape, x.dtype)["top"])
        stats, kept = batch_extremes.stored_top(x, top, n, self.layout, beta=self.beta, mask=mask)
        if moves:
            self._store("top", kept)
        return n, stats
