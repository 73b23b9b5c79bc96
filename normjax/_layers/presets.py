"""`Norm` with a row made of a few numbers: the families of `normjax.rows`, and rows of TABLE with names of their own."""

import dataclasses

import jax
from jax.typing import ArrayLike, DTypeLike

from normjax import batch, batch_extremes, response
from normjax._expect.arrays import require_float
from normjax._layers.describe import Layer, Shape, description
from normjax._layers.norm import Rowed, evaluated
from normjax._layers.statistics import Limits
from normjax.field import Field, Span
from normjax.running import Slot
from normjax.theory import TABLE, Normalizer, Stats, row


@description(kw_only=True)
class Preset(Rowed):
    """A `Norm` whose row is made of other options."""

    @property
    def normalizer(self) -> Normalizer:
        """The row."""
        return self._row()

    def _check(self) -> None:
        self._row()


@description
class BatchRenorm(Rowed):
    """Batch renormalization: in training, y is what the stored statistics would give, within limits; row "batch" of TABLE.

    The paper trains with limits (1, 0), which is batch norm, for 5000 steps, and widens them to (3, 5); a schedule passes
    them at the call: `layer(x, renorm=normjax.running.limits_at(step))`.

    Attributes:
      r_max: limit of the ratio of the batch's spread to the stored one.
      d_max: limit of the shift, in units of the stored spread.
      epsilon: added to the variance. [units of x squared]
      normalizer: "batch", or another row that stores all its moments; its eps is replaced.
      layout: name of each axis of the input.

    All other options are those of `Norm`, but for `renorm`, which is (r_max, d_max).

    Source: Ioffe 2017, algorithm 1.

    >>> from normjax.linen import BatchRenorm
    >>> layer = BatchRenorm(use_running_average=False, use_scale=False, use_bias=False)
    >>> stored = {"batch_stats": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
    >>> y, _ = layer.apply(stored, jnp.array([[2.0], [4.0]]), mutable=["batch_stats"])
    >>> (10 * y).round().tolist()                                           # (x - 1) / 2
    [[5.0], [15.0]]
    """

    r_max: float = 3.0
    d_max: float = 5.0
    epsilon: float = 1e-5
    normalizer: Normalizer | str = "batch"
    layout: str = "n ... c"

    def _check(self) -> None:
        if self.renorm is not None:
            raise ValueError(f"the limits of BatchRenorm are r_max and d_max; found renorm={self.renorm!r}")
        self._row()

    def _row(self) -> Normalizer:
        return dataclasses.replace(row(self.normalizer), eps=self.epsilon)

    def _limits(self) -> Limits:
        return self.r_max, self.d_max


@description
class DivisiveNorm(Preset):
    """Divisive normalization: centre and divide over a window of space and all channels; row "divisive" of TABLE.

    Attributes:
      window: width of the window along every axis between examples and channels.
      channels: width of a window along the channels; None takes all of them. In a recurrent network, where there is no
        other axis, the paper takes 30 or 60.
      sigma: smoothing; eps = sigma ** 2. With `learn_sigma` it is learned, from this value on. [units of x]
      border: "truncate" (the paper) or "zero" (its published code).
      layout: name of each axis of the input.
      use_scale: whether a factor is learned, `[c]`; the paper has none.
      use_bias: whether an addend is learned, `[c]`; the paper has none.

    All other options are those of `Norm`; nothing is stored.

    Source: Ren et al. 2017, section 3.3.

    >>> from normjax.linen import DivisiveNorm
    >>> DivisiveNorm(window=3, sigma=0.5).apply({}, jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    window: int = 5
    channels: int | None = None
    sigma: float = 1.0
    border: str = "truncate"
    layout: str = "n ... c"
    use_scale: bool = dataclasses.field(default=False, kw_only=True)
    use_bias: bool = dataclasses.field(default=False, kw_only=True)

    def _check(self) -> None:
        self._start = self.sigma  # in nnx a learned sigma takes the name
        super()._check()

    def _row(self) -> Normalizer:
        field = Field((Span("...", window=self.window), Span("c", window=self.channels)))
        return Normalizer(field, field, eps=self._start**2, border=self.border)

    def _first_sigma(self) -> float:
        return self._start if self.sigma_init is None else self.sigma_init


@description
class LocalResponseNorm(Layer):
    """Local response normalization along the channels: x / (k + alpha / size * sum x ** 2) ** beta; row "response".

    Arguments and defaults are those of `torch.nn.LocalResponseNorm`; AlexNet's are size 5, alpha 5e-4, beta 0.75, k 2.

    Attributes:
      size: width of the window along the channels; an even one leans before the element, as PyTorch's does.
      alpha: factor of the mean square (zeros past the edge count). [1 / units of x squared]
      beta: exponent.
      k: additive constant.
      layout: name of each axis of the input.
      dtype: of the output, by default that of the input.

    Source: Krizhevsky et al. 2012, section 3.3.

    >>> from normjax.linen import LocalResponseNorm
    >>> y = LocalResponseNorm(3, alpha=3.0, beta=1.0, k=0.0).apply({}, jnp.array([[1.0, 2.0, 2.0]]))
    >>> (100 * y).round().tolist()                                          # 1 / 5, 2 / 9, 2 / 8
    [[20.0, 22.0, 25.0]]
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    layout: str = "n ... c"
    dtype: DTypeLike | None = None

    @property
    def normalizer(self) -> Normalizer:
        """The row."""
        return response.lrn_torch(self.size, self.alpha, self.beta, self.k)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        return evaluated(self, require_float(x, "a layer"), self.normalizer, mask=mask).y


@description
class LocalContrastNorm(Layer):
    """Local contrast normalization: subtractive, then divisive, over a window of space and all channels; row "contrast".

    Attributes:
      window: width of the window along every axis between examples and channels.
      shape: "gaussian" (the paper; standard deviation width / 4) or "box".
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.
      dtype: of the output, by default that of the input.

    Source: Jarrett et al. 2009, section 2.1: the denominator is at least its mean over the image.

    >>> from normjax.linen import LocalContrastNorm
    >>> LocalContrastNorm(3).apply({}, jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    window: int = 9
    shape: str = "gaussian"
    epsilon: float = 1e-5
    layout: str = "n ... c"
    dtype: DTypeLike | None = None

    @property
    def normalizer(self) -> Normalizer:
        """The row."""
        return response.local_contrast(self.window, self.shape, eps=self.epsilon)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        return evaluated(self, require_float(x, "a layer"), self.normalizer, mask=mask).y


@description
class L1BatchNorm(Preset):
    """Batch norm by the mean absolute deviation; row "l1_batch" of TABLE.

    Attributes:
      normalized: whether sqrt(pi / 2) makes it a standard deviation of Gaussian data.
      epsilon: added to the spread; 0 in one of the authors' files. [units of x]
      field: what is averaged; with mapped axes "@data n ...".
      layout: name of each axis of the input.

    All other options are those of `Norm`. The authors average with momentum 0.1, from the first values of
    `normjax.running.published_start`.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import L1BatchNorm
    >>> layer = L1BatchNorm(use_running_average=False, normalized=False, use_scale=False, use_bias=False, epsilon=0.0)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].tolist()
    [[-1.0], [1.0]]
    """

    normalized: bool = True
    epsilon: float = 1e-5
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.l1_batch(self.field, eps=self.epsilon, normalized=self.normalized)


@description
class LpBatchNorm(Preset):
    """Batch norm by the mean of |v| ** p; see `batch.lp_batch`.

    Attributes:
      p: the order, 1 or more.
      epsilon: added to the moment. [units of x ** p]
      calibrated: whether the moment is divided by that of Gaussian data.
      field: what is averaged; with mapped axes "@data n ...".
      layout: name of each axis of the input.

    All other options are those of `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import LpBatchNorm
    >>> LpBatchNorm(p=3).normalizer
    Normalizer('n ...', 'n ...', power=0.3333333333333333, order=3)
    """

    p: float = 2
    epsilon: float = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.lp_batch(self.p, self.field, eps=self.epsilon, calibrated=self.calibrated)


@description
class TopKBatchNorm(Preset):
    """Batch norm by the mean of the k largest |v|; see `batch_extremes.top_batch`.

    Attributes:
      k: how many.
      size: elements behind each statistic in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".
      layout: name of each axis of the input.

    All other options are those of `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import TopKBatchNorm
    >>> layer = TopKBatchNorm(k=2, size=4)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 3)), True)["batch_stats"])
    {'mean': (3,), 'var': (3,)}
    """

    k: int = 10
    size: int | None = None
    epsilon: float = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch_extremes.top_batch(self.k, self.size, self.field, eps=self.epsilon, calibrated=self.calibrated)


@description
class LinfBatchNorm(Preset):
    """Batch norm by the largest |v|; see `batch_extremes.top_batch` for k = 1.

    Attributes:
      size: elements behind each statistic in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".
      layout: name of each axis of the input.

    All other options are those of `Norm`.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax.linen import LinfBatchNorm
    >>> LinfBatchNorm(size=1024).normalizer.order
    inf
    """

    size: int | None = None
    epsilon: float = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch_extremes.top_batch(1, self.size, self.field, eps=self.epsilon, calibrated=self.calibrated)


@description
class VarianceNorm(Preset):
    """Batch norm that divides by the spread and keeps the mean; row "variance" of TABLE.

    Attributes:
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.

    All other options are those of `Norm`. Lubana et al. 2021 average with momentum 0.9.

    Source: Daneshmand et al. 2020.

    >>> from normjax.linen import VarianceNorm
    >>> layer = VarianceNorm(use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].round(3).tolist()
    [[0.5], [2.5]]
    """

    epsilon: float = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return dataclasses.replace(TABLE["variance"], eps=self.epsilon)


@description
class ExtendedBatchNorm(Preset):
    """Batch norm with a mean for each channel and one spread for all; see `batch.extended_batch`.

    Attributes:
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.

    All other options are those of `Norm`; the stored `var` is a scalar.

    Source: Luo et al. 2020.

    >>> from normjax.linen import ExtendedBatchNorm
    >>> layer = ExtendedBatchNorm(use_running_average=False)
    >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0, 0.0], [5.0, 0.0]]))
    >>> (100 * y).round().tolist()                                   # the spread of the first channel, and none, together
    [[-141.0, 0.0], [141.0, 0.0]]
    """

    epsilon: float = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.extended_batch(eps=self.epsilon)


@description
class PositionNorm(Preset):
    """Each position over its channels; row "token" of TABLE. Its statistics for a shortcut: `normalize(x, "token").stats`.

    Attributes:
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.

    All other options are those of `Norm`.

    Source: Li et al. 2019, equation 2.

    >>> from normjax.linen import PositionNorm
    >>> PositionNorm(use_scale=False, use_bias=False).apply({}, jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    epsilon: float = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return dataclasses.replace(TABLE["token"], eps=self.epsilon)


@description
class LocalContextNorm(Preset):
    """A window of space by a block of channels; row "local_context" of TABLE.

    Attributes:
      window: width of the window along every axis between examples and channels.
      groups: number of blocks of channels.
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.

    All other options are those of `Norm`.

    Source: Ortiz et al. 2020, section 3.

    >>> from normjax.linen import LocalContextNorm
    >>> LocalContextNorm(window=3, groups=2, use_scale=False, use_bias=False).apply({}, jnp.ones((1, 4, 4, 4))).shape
    (1, 4, 4, 4)
    """

    window: int = 9
    groups: int = 8
    epsilon: float = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return response.local_context(self.window, self.groups, eps=self.epsilon)


@description
class GhostBatchNorm(Preset):
    """Batch norm by the statistics of each part of the batch, and of all batches at inference; row "ghost" of TABLE.

    Attributes:
      examples: number of examples of a part; it divides every training batch.
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of the input.

    All other options are those of `Norm`. Stored are the mean of the parts' means and that of their variances.

    Source: Hoffer et al. 2017, algorithm 1.

    >>> from normjax.linen import GhostBatchNorm
    >>> layer = GhostBatchNorm(examples=2, use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [3.0], [0.0], [10.0]]))[0].round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """

    examples: int = 32
    epsilon: float = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.ghost_batch(1, eps=self.epsilon)

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        strict = not self._starting()
        return batch.ghost_row(x.shape, self.layout, self.examples, self.epsilon, strict=strict), None


@description
class RangeBatchNorm(Preset):
    """Batch norm by the mean range of parts of the batch; see `batch_extremes.range_batch`.

    Attributes:
      parts: number of equal parts of a training batch.
      size: elements of a part in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".
      layout: name of each axis of the input.

    All other options are those of `Norm`; the stored `var` is the mean range.

    Source: Banner et al. 2018, section 3.

    >>> from normjax.linen import RangeBatchNorm
    >>> layer = RangeBatchNorm(size=2, parts=2, calibrated=True, use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[0.0], [4.0], [1.0], [3.0]]))[0].shape
    (4, 1)
    """

    parts: int = 16
    size: int | None = None
    epsilon: float = 1e-5
    calibrated: bool = False
    field: str = batch.BATCH
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch_extremes.range_row(self.size, self.field, eps=self.epsilon, calibrated=self.calibrated)

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        n = self._here(self._row())
        parts = 1 if self._starting() else self.parts
        return n, batch_extremes.mean_range(x, self.layout, n.fields[0], parts=parts, mask=mask)


@description
class GhostTopKBatchNorm(TopKBatchNorm):
    """Batch norm by a moving average of the mean of the k largest |v|, in training too; see `batch_extremes.ghost_top`.

    Attributes:
      k: how many.
      size: elements behind each statistic in training, examples * positions, on which the constant depends. Required.
      epsilon: added to the spread. [units of x]
      calibrated: whether the constant is that of Gaussian data, rather than the published one.
      field: what is averaged; with mapped axes "@data n ...".
      layout: name of each axis of the input.
      beta: weight of the average before, stored as `top`, from 0 on.

    All other options are those of `Norm`. The stored `var` averages the moving average.

    Source: Hoffer et al. 2018, their code.

    >>> from normjax.linen import GhostTopKBatchNorm
    >>> layer = GhostTopKBatchNorm(k=2, size=4)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 3)), True)["batch_stats"])
    {'mean': (3,), 'top': (3,), 'var': (3,)}
    """

    beta: float = 0.75

    def _keeps(self, shape: Shape) -> dict[str, Slot]:
        found = super()._keeps(shape)
        return {**found, "top": found["var"]._replace(fill=0.0)}

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        n = self._here(self._row())
        if self._starting():
            return n, None
        top = self._stored("top", self._keeps(x.shape)["top"])
        stats, kept = batch_extremes.stored_top(x, top, n, self.layout, beta=self.beta, mask=mask)
        if moves:
            self._store("top", kept)
        return n, stats
