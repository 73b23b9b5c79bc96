"""Kalman normalization as a layer: what is believed of its input travels through the model beside the arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from normjax import kalman
from normjax._expect.arrays import require_float
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Parameter, Shape, Share, description, ones, zeros
from normjax._layers.statistics import Correct, Limits, RunningLayer, Taken
from normjax._leaves import one_of
from normjax.propagate import Belief, Filtered, linear
from normjax.running import renormalized
from normjax.theory import Normalizer, Stats, row

# Where a learned transition starts: the identity, and a noise of 0.01 before its softplus.
FIRST_TRANSITION = {"a": 1.0, "u": 0.0, "r": float(np.log(np.expm1(0.01)))}


@description
class KalmanNorm(RunningLayer):
    """Normalizes with the mixture of a prediction and the batch's statistics; returns y and the beliefs to predict from.

    The beliefs travel through the model by hand: a layer takes the prior of its input, and what it returns goes with the
    next kernel through `normjax.propagate.predict`. At inference the stored statistics normalize, and no prior is used,
    in rows that store any; in the others ("group": group Kalman normalization) it is as in training.

    Attributes:
      normalizer: a row with A = B: "batch", blocks of the batch `Normalizer("n/64 ...", "n/64 ...")`, "group", "layer".
      layout: name of each axis of the input.
      gain: weight q of the batch: 0.1 for micro-batches, 0.95 for large ones; where it starts if it is learned.
      learn_gain: whether the gain is learned, one scalar: the parameter `gain_logit`, whose sigmoid it is.
      learn_transition: whether the prior is corrected by a * mean + u and a ** 2 * var + r (the paper's A, u and R as
        recalled, diagonal): parameters `a`, `u` and `r`, `[c]` each, of which r holds the inverse softplus of the noise.
      guard: where the mean of prior variance / batch variance is not below this number, the batch's statistics alone are
        used; the published code has 100.
      stored: what the running statistics average: "filtered", the statistics that normalized; "batch", the batch's own;
        "first_block", those of the first block of examples alone, as the published code.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      momentum: weight of the old value in the running average.
      unbiased: whether, without a prior, the variance that is believed (and stored) is the unbiased one, while the biased
        one normalizes; the published code has True.

    All other options are those of every layer with running statistics, see `Norm`. Batch renormalization (`renorm`) keeps
    the statistics that normalize, the mixture's, near the stored ones; what is believed of x stays the mixture, and the
    belief of y is that of r * y + d. The L1 penalty is on x less the mean that normalized it.

    Source: Wang et al. 2018.

    >>> from flax import linen
    >>> from normjax.linen import KalmanNorm
    >>> from normjax.propagate import join, predict
    >>> class Stack(linen.Module):
    ...     @linen.compact
    ...     def __call__(self, x, train):
    ...         h, state = KalmanNorm()(x, None, not train)
    ...         conv = linen.Conv(3, (3, 3), use_bias=False)
    ...         x = x + conv(linen.relu(h))
    ...         branch = predict(state, conv.variables["params"]["kernel"], size=x.shape[1:3])
    ...         return KalmanNorm(gain=0.1)(x, join(state.input, branch), not train)[0]
    >>> variables = jax.eval_shape(lambda x: Stack().init(jax.random.key(0), x, train=True), jnp.ones((2, 8, 8, 3)))
    >>> variables["batch_stats"]["KalmanNorm_1"]["var"].shape
    (3,)

    In nnx the number of channels comes first, and the layers keep their statistics themselves:

    >>> from flax import nnx
    >>> from normjax.nnx import KalmanNorm
    >>> rngs = nnx.Rngs(0)
    >>> first, dense, second = KalmanNorm(3, rngs=rngs), nnx.Linear(3, 5, rngs=rngs), KalmanNorm(5, rngs=rngs)
    >>> h, state = first(jax.random.normal(jax.random.key(0), (2, 3)))
    >>> y, state = second(dense(nnx.relu(h)), predict(state, dense.kernel[...], bias=dense.bias[...]))
    >>> y.shape, state.output.var.shape, second.var.shape
    ((2, 5), (1, 5), (5,))
    """

    normalizer: Normalizer | str = "batch"
    layout: str = "n ... c"
    gain: Share = 0.1
    learn_gain: bool = False
    learn_transition: bool = False
    guard: Amount | None = None
    stored: str = "filtered"
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros
    momentum: Share = dataclasses.field(default=0.9, kw_only=True)

    def _check(self) -> None:
        kalman.require_kalman_row(self._row())
        kalman.require_gain(self.gain)
        one_of("stored", self.stored, kalman.STORED)

    def _row(self) -> Normalizer:
        return row(self.normalizer)

    def _stores_unbiased(self) -> bool:
        return False  # here the option is that of what is believed

    def _averages_merge(self) -> bool:
        return False  # a belief of both halves is not that of the whole

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        size = describe.channel_shape(self.layout, shape) if self.learn_transition else ()
        return {
            **describe.scale_and_bias(self, shape),
            "gain_logit": Parameter((), kalman.logit(self.gain)) if self.learn_gain else None,
            **{k: Parameter(size, v) if self.learn_transition else None for k, v in FIRST_TRANSITION.items()},
        }

    def __call__(
        self,
        x: ArrayLike,
        prior: Belief | None = None,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        renorm: Limits | None = None,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> tuple[jax.Array, Filtered]:
        """Normalizes x, and gives what is believed of x and of y.

        Args:
          x: floating-point array, axes as named by `layout`.
          prior: the prediction, from `predict` or `join` of `normjax.propagate`; None for the first layer.
          use_running_average: whether to use the stored statistics, for rows that have any.
          update_running_average: whether a training batch moves the stored statistics; replaces the option.
          renorm: limits of batch renormalization; replaces the option.
          mask: booleans or weights that broadcast against x; where 0, x counts in no statistic and y is the bias.
          scale: replaces the learned factor: a scalar, `[c]`, `[n, c]`, or of the rank of x, constant over space.
          bias: replaces the learned addend; the shapes of `scale`.
        """
        x, dtype = require_float(x, "KalmanNorm"), self.dtype
        work, n = describe.promoted(x, dtype), self._row()
        n = n.local() if self._starting() else n  # while initializing, mapped axes need not exist yet
        learned = self._learned(x.shape, scale=scale, bias=bias)
        given = {"mask": mask, "scale": learned.get("scale"), "bias": learned.get("bias")}

        def taken(out: kalman.Kalman, stats: Stats) -> Taken[tuple[jax.Array, Filtered]]:
            return Taken((out.y.astype(dtype or x.dtype), out.filtered), stats, n, out.centered, mergeable=False)

        def take(stats: Stats | None) -> Taken[tuple[jax.Array, Filtered]]:
            if stats is None:
                out = self._mixed(work, prior, n, learned, **given)
                return taken(out, kalman.statistics_to_store(out, n, self.layout, self.stored))
            out = kalman.normalize_by_belief(work, Belief(stats.mean, stats.var), n, self.layout, **given)
            return taken(out, out.stats)

        def renormed(correct: Correct) -> Taken[tuple[jax.Array, Filtered]]:
            out = self._mixed(work, prior, n, learned, **given)
            used, shown = (kalman.statistics_to_store(out, n, self.layout, name) for name in ("filtered", self.stored))
            moved, belief = renormalized(used, *correct(used, n), n), out.filtered.input
            return taken(kalman.normalize_by_belief(work, belief, n, self.layout, stats=moved, **given), shown)

        call = functools.partial(self._normalized, x, take, use_running_average, renormed=renormed)
        return call(update_running_average=update_running_average, renorm=renorm, mask=mask)

    def _mixed(
        self,
        x: jax.Array,
        prior: Belief | None,
        n: Normalizer,
        learned: dict[str, jax.Array],
        **given: ArrayLike | None,
    ) -> kalman.Kalman:
        """Mixes the prior, corrected by the learned transition, and the batch by the gain."""
        gain = jax.nn.sigmoid(learned["gain_logit"]) if self.learn_gain else self.gain
        if self.learn_transition and prior is not None:
            prior = linear(prior, learned["a"], learned["u"], jax.nn.softplus(learned["r"]), self.layout)
        refuse, unbiased = not self._starting(), self.unbiased
        return kalman.kalman_normalize(
            x, prior, n, self.layout, gain=gain, guard=self.guard, unbiased=unbiased, refuse=refuse, **given
        )
