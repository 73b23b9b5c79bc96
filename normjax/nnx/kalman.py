"""Kalman normalization as a Flax nnx module: parameters and running statistics around `normjax.kalman`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import kalman, layer
from normjax.field import FieldError
from normjax.nnx.host import Moments
from normjax.propagate import Belief, Filtered
from normjax.running import BatchRecord, Running, slots
from normjax.theory import Normalizer, row

Dtype = Any
Initializer = Any
Metadata = Mapping[str, Any]
_NO_METADATA: Metadata = MappingProxyType({})
_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class KalmanNorm(nnx.Module):
    """Normalizes with the mixture of a prediction and the batch's statistics; returns y and the beliefs to predict from.

    The attributes mean what they mean in `normjax.linen.KalmanNorm`.

    Args:
      normalizer: a row with A = B: "batch", blocks of the batch `Normalizer("n/64 ...", "n/64 ...")`, "group", "layer".
      features: number of channels; or the whole shape of an input, for a row that stores statistics along other axes.
      layout: name of each axis of the input.
      gain: weight q of the batch; where it starts if it is learned.
      learn_gain: whether the gain is learned: the parameter `gain_logit`, whose sigmoid it is.
      learn_transition: whether the prior is corrected by the learned `a`, `u` and `r`.
      guard: see `normjax.kalman.kalman_normalize`.
      unbiased: see there.
      stored: "filtered", "batch" or "first_block", see `normjax.kalman.apply`.
      use_running_average: whether to normalize with stored statistics; `.train()`, `.eval()` and `nnx.view` set it.
      momentum: weight of the old value in the running average.
      update_running_average: False leaves the stored statistics as they are; `nnx.view` sets it.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor.
      bias_init: initializer of the addend.
      scale_metadata: metadata of the factor, such as sharding names.
      bias_metadata: metadata of the addend.
      stats_metadata: metadata of the stored statistics.
      rngs: random keys for the initializers.

    Raises:
      FieldError: the row stores statistics whose shape `features` does not tell.
      ValueError: the row has no variance, or a gain or `stored` that is none of those accepted.

    Source: Wang et al. 2018.

    >>> from normjax.propagate import predict
    >>> rngs = nnx.Rngs(0)
    >>> first, second = (KalmanNorm("batch", channels, rngs=rngs) for channels in (3, 5))
    >>> dense = nnx.Linear(3, 5, rngs=rngs)
    >>> y, state = first(jax.random.normal(jax.random.key(0), (2, 3)))
    >>> y, state = second(dense(nnx.relu(y)), predict(state, dense.kernel[...], bias=dense.bias[...]))
    >>> y.shape, second.var.shape
    ((2, 5), (5,))
    """

    def __init__(
        self,
        normalizer: Normalizer | str,
        features: int | Sequence[int],
        *,
        layout: str = "n ... c",
        gain: float = 0.1,
        learn_gain: bool = False,
        learn_transition: bool = False,
        guard: float | None = None,
        unbiased: bool = False,
        stored: str = "filtered",
        use_running_average: bool | None = False,
        momentum: float = 0.9,
        update_running_average: bool = True,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = _ONES,
        bias_init: Initializer = _ZEROS,
        scale_metadata: Metadata = _NO_METADATA,
        bias_metadata: Metadata = _NO_METADATA,
        stats_metadata: Metadata = _NO_METADATA,
        rngs: nnx.Rngs,
    ):
        self.normalizer = row(normalizer)
        kalman.check(self.normalizer, gain, stored)
        self.features = features if isinstance(features, int) else tuple(features)
        self.layout = layout
        self.gain = gain
        self.guard = guard
        self.unbiased = unbiased
        self.stored = stored
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.update_running_average = update_running_average
        self.dtype = dtype
        self.param_dtype = param_dtype
        shape = layer.whole_shape(features, layout)
        size = layer.channel_shape(layout, shape) if use_scale or use_bias or learn_transition else ()

        def parameter(make: Initializer, use: bool, metadata: Metadata) -> Any:
            return nnx.Param(make(rngs.params(), size, param_dtype), **metadata) if use else nnx.data(None)

        def constant(value: float, shape: tuple[int, ...], use: bool) -> Any:
            return nnx.Param(jnp.full(shape, value, param_dtype)) if use else nnx.data(None)

        self.scale = parameter(scale_init, use_scale, scale_metadata)
        self.bias = parameter(bias_init, use_bias, bias_metadata)
        self.gain_logit = constant(kalman.logit(gain) if learn_gain else 0, (), learn_gain)
        self.a, self.u, self.r = (constant(v, size, learn_transition) for v in kalman.FIRST_TRANSITION.values())
        found = slots(self.normalizer, layout, shape)
        if any(None in slot.shape for slot in found.values()):
            raise FieldError(
                f"{self.normalizer} stores statistics along other axes than the channels: give the whole shape of an "
                f"input as `features`, found {features!r}"
            )

        def stored_as(name: str) -> Any:
            return nnx.BatchStat(found[name].make(), **stats_metadata) if name in found else nnx.data(None)

        self.mean, self.var = stored_as("mean"), stored_as("var")

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
        """Normalizes x; arguments, result and errors as for `normjax.linen.KalmanNorm`."""

        def value(variable: Any) -> Any:
            return None if variable is None else variable[...]

        stored = Running(value(self.mean), value(self.var))
        average = self.use_running_average if use_running_average is None else use_running_average
        if stored.mean is not None and average is None:
            raise ValueError(
                "No `use_running_average` argument was provided to KalmanNorm. Pass it to the constructor or to the call, "
                "or set it on the whole model: nnx.view(model, use_running_average=True) or False."
            )
        learned = None if self.a is None else (value(self.a), value(self.u), value(self.r))
        out = kalman.apply(
            x, prior, self.normalizer, self.layout, stored, use_running=bool(average),
            update_running=self.update_running_average, momentum=self.momentum, source=self.stored, gain=self.gain,
            gain_logit=value(self.gain_logit), transition=learned, dtype=self.dtype, mask=mask, guard=self.guard,
            unbiased=self.unbiased, scale=value(self.scale) if scale is None else scale,
            bias=value(self.bias) if bias is None else bias,
        )  # fmt: skip
        if out.batch is not None:
            self.mean[...], self.var[...] = out.running.mean, out.running.var
            if hasattr(self, "__captures__"):
                self.sow(Moments, "batch", BatchRecord(out.batch, jnp.float32(self.momentum), mergeable=False))
        return out.y, out.filtered

    def set_view(self, use_running_average: bool | None = None, update_running_average: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether to normalize with the stored statistics.
          update_running_average: whether the statistics of training update the stored ones.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average
