"""nnx layers of `normjax.rows`: `Norm` with a row made of a few numbers; `**kwargs` are those of `Norm`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from normjax import batch, batch_extremes, response
from normjax._expect.arrays import require_float
from normjax.nnx.norms import Norm, _apply_norm, _keeps_running, _uses_running
from normjax.theory import TABLE


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
        field: str = batch.BATCH,
        **kwargs: Any,
    ):
        super().__init__(batch.l1_batch(field, eps=epsilon, normalized=normalized), features, **kwargs)


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
        field: str = batch.BATCH,
        **kwargs: Any,
    ):
        super().__init__(batch.lp_batch(p, field, eps=epsilon, calibrated=calibrated), features, **kwargs)


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
        field: str = batch.BATCH,
        **kwargs: Any,
    ):
        n = batch_extremes.top_batch(k, size, field, eps=epsilon, calibrated=calibrated)
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
        super().__init__(batch.extended_batch(eps=epsilon), features, **kwargs)


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
        super().__init__(response.local_context(window, groups, eps=epsilon), features, **kwargs)


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
        super().__init__(batch.ghost_batch(1, eps=epsilon), features, **kwargs)
        self.examples = examples

    def __call__(self, x: ArrayLike, use_running_average: bool | None = None, **kwargs: Any) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        average = _uses_running(self, use_running_average)
        n = batch.ghost_row(jnp.shape(x), self.layout, None if average else self.examples, self.normalizer.eps)
        return _apply_norm(self, n, x, average, **kwargs)


class RangeBatchNorm(Norm):
    """Batch norm by the mean range of parts of the batch; see `normjax.linen.RangeBatchNorm`.

    Args:
      features: number of channels.
      parts: number of equal parts of a training batch.
      size: elements of a part in training, examples * positions.
      epsilon: added to the spread.
      calibrated: whether the constant is that of Gaussian data.
      field: what is averaged.
      **kwargs: as for `Norm`.

    Source: Banner et al. 2018, section 3.

    >>> layer = RangeBatchNorm(1, parts=2, size=2, momentum=0.0, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[0.0], [4.0], [1.0], [3.0]])).shape, layer.var[...].tolist()
    ((4, 1), [3.0])
    """

    def __init__(
        self,
        features: int,
        parts: int = 16,
        *,
        size: int,
        epsilon: float = 1e-5,
        calibrated: bool = False,
        field: str = batch.BATCH,
        **kwargs: Any,
    ):
        super().__init__(batch_extremes.range_row(size, field, eps=epsilon, calibrated=calibrated), features, **kwargs)
        self.field = field
        self.parts = parts

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None, **kwargs: Any
    ) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x, average, measured = require_float(x, "Norm"), _uses_running(self, use_running_average), None
        if not average:
            measured = batch_extremes.mean_range(x, self.layout, self.field, parts=self.parts, mask=mask)
        return _apply_norm(self, self.normalizer, x, average, mask=mask, measured=measured, **kwargs)


class GhostTopKBatchNorm(TopKBatchNorm):
    """Batch norm by a moving average of the mean of the k largest |v|; see `normjax.linen.GhostTopKBatchNorm`.

    Args:
      features: number of channels.
      k: how many.
      beta: weight of the average before, stored in `top`, from 0 on.
      **kwargs: as for `TopKBatchNorm`.

    Source: Hoffer et al. 2018, their code.

    >>> layer = GhostTopKBatchNorm(1, 2, size=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[0.0], [4.0], [1.0], [3.0]])).shape, layer.top[...].tolist()
    ((4, 1), [0.5])
    """

    def __init__(self, features: int, k: int = 10, *, beta: float = 0.75, **kwargs: Any):
        super().__init__(features, k, **kwargs)
        self.beta = beta
        self.top = nnx.BatchStat(jnp.zeros_like(self.var[...]), **kwargs.get("stats_metadata", {}))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        mask: ArrayLike | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Normalizes x; arguments as for `Norm`."""
        x, n = require_float(x, "Norm"), self.normalizer
        average, measured = _uses_running(self, use_running_average), None
        update = _keeps_running(self, update_running_average)
        if not average:
            measured, kept = batch_extremes.stored_top(x, self.top[...], n, self.layout, beta=self.beta, mask=mask)
            self.top[...] = kept if update else self.top[...]
        return _apply_norm(self, n, x, average, update_running_average=update, mask=mask, measured=measured, **kwargs)
