"""Kalman normalization as a Flax linen module: parameters and running statistics around `normjax.kalman`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import kalman, layer
from normjax._expect.arrays import require_float
from normjax.propagate import Belief, Filtered
from normjax.running import BatchRecord, Running, slots
from normjax.theory import Normalizer, row

Initializer = Any
Dtype = Any


class KalmanNorm(nn.Module):
    """Normalizes with the mixture of a prediction and the batch's statistics; returns y and the beliefs to predict from.

    The beliefs travel through the model by hand: a layer takes the prior of its input, and what it returns goes with the
    next kernel through `normjax.propagate.predict`. At inference the stored statistics normalize, and no prior is used,
    in rows that store any; in the others ("group": group Kalman normalization) it is as in training.

    Attributes:
      normalizer: a row with A = B: "batch", blocks of the batch `Normalizer("n/64 ...", "n/64 ...")`, "group", "layer".
      layout: name of each axis of the input.
      gain: weight q of the batch: 0.1 for micro-batches, 0.95 for large ones; where it starts if it is learned.
      learn_gain: whether the gain is learned, one scalar: the parameter `gain_logit`, whose sigmoid it is.
      learn_transition: whether the prior is corrected by a * mean + u and a ** 2 * var + r, learned `[c]` each (the paper's
        A, u and R as recalled, diagonal): parameters `a`, `u` and `r`, of which r holds the inverse softplus of the noise.
      guard: see `normjax.kalman.kalman_normalize`; the published code has 100.
      unbiased: see there; the published code has True.
      stored: what the running statistics average: "filtered", "batch" or "first_block", see `normjax.kalman.apply`.
      use_running_average: whether to normalize with the stored statistics; here or at the call.
      momentum: weight of the old value in the running average.
      update_running_average: False leaves the stored statistics as they are.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.

    Source: Wang et al. 2018.

    >>> from normjax.propagate import join, predict
    >>> class Stack(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         h, state = KalmanNorm()(x, None, not train)
    ...         conv = nn.Conv(3, (3, 3), use_bias=False)
    ...         x = x + conv(nn.relu(h))
    ...         branch = predict(state, conv.variables["params"]["kernel"], size=x.shape[1:3])
    ...         h, state = KalmanNorm(gain=0.1)(x, join(state.input, branch), not train)
    ...         return h
    >>> x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    >>> y, variables = Stack().init_with_output(jax.random.key(0), x, train=True)
    >>> y.shape, variables["batch_stats"]["KalmanNorm_1"]["var"].shape
    ((2, 8, 8, 3), (3,))
    """

    normalizer: Normalizer | str = "batch"
    layout: str = "n ... c"
    gain: float = 0.1
    learn_gain: bool = False
    learn_transition: bool = False
    guard: float | None = None
    unbiased: bool = False
    stored: str = "filtered"
    use_running_average: bool | None = None
    momentum: float = 0.9
    update_running_average: bool = True
    use_scale: bool = True
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        prior: Belief | None = None,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> tuple[jax.Array, Filtered]:
        """Normalizes x.

        Args:
          x: floating-point array, axes as named by `layout`.
          prior: the prediction, from `predict` or `join`; None for the first layer.
          use_running_average: whether to use the stored statistics, for rows that have any.
          mask: see `normjax.normalize`.
          scale: replaces the learned factor; shapes as for `normjax.normalize`.
          bias: replaces the learned addend.

        Returns:
          An array of the shape of x, and what is believed of x and of it.

        Raises:
          FieldError: normalizer or prior do not fit the input.
          TypeError: integer input.
          ValueError: the row has no variance, or a gain or `stored` that is none of those accepted.
        """
        x, whole = require_float(x, "KalmanNorm"), row(self.normalizer)
        starting = self.is_initializing()
        n = whole.local() if starting else whole  # while initializing, mapped axes need not exist yet
        size = (
            layer.channel_shape(self.layout, x.shape)
            if self.use_scale or self.use_bias or self.learn_transition
            else ()
        )
        if self.use_scale and scale is None:
            scale = self.param("scale", self.scale_init, size, self.param_dtype)
        if self.use_bias and bias is None:
            bias = self.param("bias", self.bias_init, size, self.param_dtype)
        logit = transition = None
        if self.learn_gain:
            logit = self.param("gain_logit", initializers.constant(kalman.logit(self.gain)), (), self.param_dtype)
        if self.learn_transition:
            starts = kalman.FIRST_TRANSITION.items()
            a, u, r = (self.param(k, initializers.constant(v), size, self.param_dtype) for k, v in starts)
            transition = a, u, r
        found = slots(whole, self.layout, x.shape)
        average = bool(found) and nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        stored = {name: self.variable("batch_stats", name, slot.make) for name, slot in found.items()}
        out = kalman.apply(
            x, prior, n, self.layout, Running(**{name: variable.value for name, variable in stored.items()}),
            use_running=average, update_running=self.update_running_average and not starting, momentum=self.momentum,
            source=self.stored, gain=self.gain, gain_logit=logit, transition=transition, dtype=self.dtype,
            scale=scale, bias=bias, mask=mask, guard=self.guard, unbiased=self.unbiased, refuse=not starting,
        )  # fmt: skip
        if out.batch is not None:
            for name, variable in stored.items():
                variable.value = getattr(out.running, name)
            self.sow("moments", "batch", BatchRecord(out.batch, jnp.float32(self.momentum), mergeable=False))
        return out.y, out.filtered
