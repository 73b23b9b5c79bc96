"""`Norm` with a row made of a few numbers: rows of TABLE, divisive, response and contrast norms, batch renormalization."""

import dataclasses

import jax
from jax.typing import ArrayLike, DTypeLike

from normjax import batch, response
from normjax._expect.arrays import require_float
from normjax._layers.describe import Amount, Count, Layer, StaticAmount, description
from normjax._layers.norm import Rowed, evaluated
from normjax._layers.statistics import Limits
from normjax._leaves import split_eps
from normjax.field import Field, Span
from normjax.recurrent import start_sigma
from normjax.running import require_renormalizable
from normjax.theory import TABLE, Normalizer, row


@description(kw_only=True)
class Preset(Rowed):
    """A `Norm` whose row is made of other options."""

    @property
    def normalizer(self) -> Normalizer:
        """The row."""
        return self._row()


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
    epsilon: Amount = 1e-5
    normalizer: Normalizer | str = "batch"
    layout: str = "n ... c"

    def _check(self) -> None:
        if self.renorm is not None:
            raise ValueError(f"the limits of BatchRenorm are r_max and d_max; found renorm={self.renorm!r}")
        for name, limit in (("r_max", self.r_max), ("d_max", self.d_max)):
            if isinstance(limit, str | Normalizer):
                raise TypeError(f"{name} of BatchRenorm is a number; found {limit!r}")
        require_renormalizable(self._row(), self._limits())
        super()._check()

    def _row(self) -> Normalizer:
        return dataclasses.replace(row(self.normalizer), eps=self._eps()[0])

    def _limits(self) -> Limits:
        return (self.r_max, self.d_max) if self.renorm is None else self.renorm


@description
class DivisiveNorm(Preset):
    """Divisive normalization: centre and divide over a window of space and all channels; row "divisive" of TABLE.

    Attributes:
      window: width of the window along every axis between examples and channels.
      channels: width of a window along the channels; None takes all of them. In a recurrent network, where there is no
        other axis, the paper takes 30 or 60.
      sigma: smoothing; eps = sigma ** 2. With `learn_sigma` it is learned, from this value on. [units of x]
      border: "truncate" (the paper) or "zero" (its published code).
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`; the paper has neither.

    All other options are those of `Norm`; nothing is stored.
    Source: Ren et al. 2017, section 3.3.

    >>> from normjax.linen import DivisiveNorm
    >>> DivisiveNorm(window=3, sigma=0.5).apply({}, jnp.eye(4).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 1)
    """

    window: Count = 5
    channels: Count | None = None
    sigma: Amount = 1.0
    border: str = "truncate"
    layout: str = "n ... c"
    use_scale: bool = dataclasses.field(default=False, kw_only=True)
    use_bias: bool = dataclasses.field(default=False, kw_only=True)

    def _check(self) -> None:
        self._start = self.sigma  # in nnx a learned sigma takes the name
        super()._check()

    def _row(self) -> Normalizer:
        field = Field((Span("...", window=self.window), Span("c", window=self.channels)))
        return Normalizer(field, field, eps=self._eps()[0], border=self.border)

    def _eps(self) -> tuple[float, ArrayLike | None]:
        return split_eps(self._start**2)

    def _first_sigma(self) -> ArrayLike | None:
        return start_sigma(self._row(), self.learn_sigma, self._start if self.sigma_init is None else self.sigma_init)


class Unlearned(Layer):
    """A layer that is one row of the equation, and neither learns nor stores anything."""

    def _row(self) -> Normalizer:
        raise NotImplementedError

    def _eps(self) -> tuple[float, ArrayLike | None]:
        """What is added to the moment: the number of the row, and what stands for it where only a run knows it."""
        raise NotImplementedError

    @property
    def normalizer(self) -> Normalizer:
        """The row."""
        return self._row()

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        return evaluated(self, require_float(x, "a layer"), self.normalizer, mask=mask, eps=self._eps()[1]).y


@description
class LocalResponseNorm(Unlearned):
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

    size: Count = 5
    alpha: StaticAmount = 1e-4
    beta: StaticAmount = 0.75
    k: Amount = 1.0
    layout: str = "n ... c"
    dtype: DTypeLike | None = None

    def _row(self) -> Normalizer:
        return response.lrn_torch(self.size, self.alpha, self.beta, self._eps()[0])

    def _eps(self) -> tuple[float, ArrayLike | None]:
        return split_eps(self.k)


@description
class LocalContrastNorm(Unlearned):
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

    window: Count = 9
    shape: str = "gaussian"
    epsilon: Amount = 1e-5
    layout: str = "n ... c"
    dtype: DTypeLike | None = None

    def _row(self) -> Normalizer:
        return response.local_contrast(self.window, self.shape, eps=self._eps()[0])

    def _eps(self) -> tuple[float, ArrayLike | None]:
        return split_eps(self.epsilon)


@description
class VarianceNorm(Preset):
    """Batch norm that divides by the spread and keeps the mean; row "variance" of TABLE.

    Attributes:
      epsilon: added to the variance. [units of x squared]

    All other options are those of `Norm`. Lubana et al. 2021 average with momentum 0.9.
    Source: Daneshmand et al. 2020.

    >>> from normjax.linen import VarianceNorm
    >>> layer = VarianceNorm(use_running_average=False)
    >>> layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [5.0]]))[0].round(3).tolist()
    [[0.5], [2.5]]
    """

    epsilon: Amount = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return dataclasses.replace(TABLE["variance"], eps=self._eps()[0])


@description
class ExtendedBatchNorm(Preset):
    """Batch norm with a mean for each channel and one spread for all; see `batch.extended_batch`.

    Attributes:
      epsilon: added to the variance. [units of x squared]

    All other options are those of `Norm`; the stored `var` is a scalar.
    Source: Luo et al. 2020.

    >>> from normjax.linen import ExtendedBatchNorm
    >>> layer = ExtendedBatchNorm(use_running_average=False)
    >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0, 0.0], [5.0, 0.0]]))
    >>> (100 * y).round().tolist()                                   # the spread of the first channel, and none, together
    [[-141.0, 0.0], [141.0, 0.0]]
    """

    epsilon: Amount = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return batch.extended_batch(eps=self._eps()[0])


@description
class PositionNorm(Preset):
    """Each position over its channels; row "token" of TABLE. Its statistics for a shortcut: `normalize(x, "token").stats`.

    Attributes:
      epsilon: added to the variance. [units of x squared]

    All other options are those of `Norm`.
    Source: Li et al. 2019, equation 2.

    >>> from normjax.linen import PositionNorm
    >>> PositionNorm(use_scale=False, use_bias=False).apply({}, jnp.array([[1.0, 3.0]])).round(3).tolist()
    [[-1.0, 1.0]]
    """

    epsilon: Amount = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return dataclasses.replace(TABLE["token"], eps=self._eps()[0])


@description
class LocalContextNorm(Preset):
    """A window of space by a block of channels; row "local_context" of TABLE.

    Attributes:
      window: width of the window along every axis between examples and channels.
      groups: number of blocks of channels.
      epsilon: added to the variance. [units of x squared]

    All other options are those of `Norm`.
    Source: Ortiz et al. 2020, section 3.

    >>> from normjax.linen import LocalContextNorm
    >>> LocalContextNorm(window=3, groups=2, use_scale=False, use_bias=False).apply({}, jnp.ones((1, 4, 4, 4))).shape
    (1, 4, 4, 4)
    """

    window: Count = 9
    groups: Count = 8
    epsilon: Amount = 1e-5
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return response.local_context(self.window, self.groups, eps=self._eps()[0])
