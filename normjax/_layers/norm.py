"""Any normalizer as a layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import kernels
from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Layer, Parameter, Shape, description, ones, zeros
from normjax._layers.statistics import Correct, Limits, RunningLayer, Taken
from normjax._leaves import split_eps
from normjax._normalize.evaluate import Normalized, affine, equation, normalize
from normjax.recurrent import start_sigma
from normjax.running import require_unbiased, stores
from normjax.theory import Normalizer, Stats, row, top


@description(kw_only=True)
class Rowed(RunningLayer):
    """A layer that is one row of the equation: the options of `Norm` beside the row and the layout."""

    use_scale: bool = True
    use_bias: bool = True
    learn_sigma: bool = False
    sigma_init: Amount | None = None
    kernel: bool | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _row(self) -> Normalizer:
        raise NotImplementedError

    def _eps(self) -> tuple[float, ArrayLike | None]:
        """The option `epsilon`, of a layer that has it: the number of the row, and what stands for it in a run."""
        return split_eps(getattr(self, "epsilon", None))

    def _check(self) -> None:
        kernels.asked(self.kernel)  # refuses what is no choice
        n = self._row()
        if self.unbiased and any(stores(n)):
            require_unbiased(n)
        start_sigma(n, self.learn_sigma, self.sigma_init)

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        first = self._first_sigma()
        sigma = None if first is None else Parameter((), first)
        return {**describe.scale_and_bias(self, shape), "sigma": sigma}

    def _first_sigma(self) -> ArrayLike | None:
        given, traced = self.sigma_init, self._eps()[1]
        given = traced**0.5 if given is None and traced is not None else given
        return start_sigma(self._row(), self.learn_sigma, given)

    def _measure(self, x: jax.Array, mask: ArrayLike | None, moves: bool) -> tuple[Normalizer, Stats | None]:
        """The row as it fits a batch, and statistics of the batch if the row does not take them itself."""
        return self._here(self._row()), None

    def _here(self, n: Normalizer) -> Normalizer:
        """The row; while initializing, mapped axes need not exist yet, and there may be fewer than k elements."""
        if not self._starting():
            return n
        n = n.local()
        return dataclasses.replace(n, order=math.inf) if isinstance(n.order, top) else n

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        renorm: Limits | None = None,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x; an argument replaces the option of its name.

        Args:
          x: floating-point array, axes as named by `layout`.
          use_running_average: whether to use the stored statistics, for rows that have any.
          update_running_average: whether a training batch moves the stored statistics.
          renorm: limits of batch renormalization.
          mask: boolean mask or weights that broadcast against x; what is masked counts nowhere, and becomes the bias.
          scale: replaces the learned factor (conditional normalization): a scalar, `[c]`, `[n, c]`, or of the rank of x.
          bias: replaces the learned addend; the shapes of `scale`.
        """
        x = require_float(x, "Norm")
        learned = self._learned(x.shape, scale=scale, bias=bias)
        sigma, moves = learned.pop("sigma", None), self._moves(update_running_average)
        eps = self._eps()[1] if sigma is None else jnp.square(sigma)

        def take(stats: Stats | None) -> Taken[jax.Array]:
            n, measured = self._measure(x, mask, moves) if stats is None else (self._here(self._row()), stats)
            out = evaluated(self, x, n, measured, mask=mask, eps=eps, **learned)
            return Taken(out.y, out.stats, n, out.centered)

        def renormed(correct: Correct) -> Taken[jax.Array]:
            n, measured = self._measure(x, mask, moves)
            work = describe.promoted(x, self.dtype)
            work = work.astype(statistics_dtype(work.dtype))
            out = normalize(work, n, self.layout, stats=measured, mask=mask, eps=eps)
            r, d = correct(out.stats, n)
            y = zero_masked(r * out.y + d, as_weights(mask, work))  # zero where masked
            y = affine(y, self.layout, **learned).astype(self.dtype or x.dtype)
            return Taken(y, out.stats, n, out.centered)

        return self._normalized(
            x,
            take,
            use_running_average,
            update_running_average=update_running_average,
            renorm=renorm,
            mask=mask,
            eps=eps,
            renormed=renormed,
        )


def evaluated(
    layer: Layer, x: jax.Array, n: Normalizer, stats: Stats | None = None, **given: ArrayLike | None
) -> Normalized:
    """The equation, in the dtype of the layer; with the refusals of `normalize` unless the layer is being initialized."""
    dtype = jnp.dtype(layer.dtype or x.dtype)
    with kernels.asked(getattr(layer, "kernel", None)):
        if layer._starting():
            return equation(x, n, layer.layout, stats=stats, dtype=dtype, **given)
        out = normalize(describe.promoted(x, layer.dtype), n, layer.layout, stats=stats, **given)
    return out._replace(y=out.y.astype(dtype))


@description
class Norm(Rowed):
    """Any normalizer as a layer.

    Statistics that depend on other examples are stored (which moments, the fields say: see `normjax.running`); all other
    rows need no `use_running_average`. The output has the dtype of the input. A field that holds a single element, such as a
    training batch of one, is refused as by `normalize` and by PyTorch: its output would be the bias, whatever x is. Layers
    under Flax's names take it as Flax's do.

    Attributes:
      normalizer: a Normalizer or the name of a row of TABLE.
      layout: name of each axis of the input.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      learn_sigma: whether sigma is learned, one scalar a layer; eps = sigma ** 2 (Ren et al. 2017).
      sigma_init: its initial value; by default the square root of the row's eps.
      kernel: whether a fused kernel evaluates the row where it fits, see `normjax.kernels`; None does as is done around it.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    The options of every layer with running statistics:

    Attributes:
      use_running_average: whether to normalize with the stored statistics; here or at the call. In nnx False, and
        `.train()`, `.eval()` and `nnx.view` set it.
      momentum: weight of the old value in the running average.
      averaging: of the running statistics, "exponential", "debiased" or "cumulative", see `normjax.running`.
      unbiased: whether the unbiased variance is stored, as PyTorch does; none is where the weights sum to 1 or less.
      mean_init, var_init: first values of a running mean, and of a running variance or other moment.
      update_running_average: False normalizes with the batch's statistics and leaves the stored ones; here or at the call.
      renorm: limits (r_max, d_max) of batch renormalization, see `normjax.running.corrections`; here or at the call,
        where they may be arrays. None is plain.
      l1: weight alpha of the L1 penalty alpha * mean |v|, which linen sows as `l1` into the collection `losses` when it is
        mutable, never while initializing, and nnx captures as `Penalty`. Calls add up: who feeds a returned state back
        takes `losses` out of it. 0 leaves none.
      l1_axis_name: mapped axes that share one mean of |v|; by default those of the fields.
      stats_names: in linen, names of the axes of every stored statistic, as in `nn.with_partitioning`.

    In nnx `features` comes first: the number of channels, or the whole shape of an input for a row that stores
    statistics along other axes; and there are `rngs`, `scale_metadata`, `bias_metadata` and `stats_metadata`.

    >>> from normjax import linen, nnx
    >>> x = jnp.ones((2, 8, 8, 3))
    >>> layer = linen.Norm("batch")
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'mean': (3,), 'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,)}}
    >>> y, changed = linen.Norm("divisive", l1=0.01).apply({}, x, scale=2.0, bias=0.0, mutable=["losses"])
    >>> y.shape, changed["losses"]["l1"]
    ((2, 8, 8, 3), Array(0., dtype=float32))
    >>> from flax.nnx import Rngs
    >>> nnx.Norm(3, "batch", rngs=Rngs(0))(x).shape
    (2, 8, 8, 3)
    """

    normalizer: Normalizer | str
    layout: str = "n ... c"

    def _row(self) -> Normalizer:
        return row(self.normalizer)
