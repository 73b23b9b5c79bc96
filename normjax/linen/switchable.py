"""Flax linen module of switchable norm; the arithmetic is in `normjax.switchable`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import layer, switchable
from normjax._expect.arrays import require_float
from normjax.linen.norms import _store, _stored
from normjax.running import Running, slots
from normjax.theory import Normalizer, row


class SwitchableNorm(nn.Module):
    """Normalizes with a learned mixture of the statistics of several rows, at first all alike.

    The statistics of the row that mixes examples are stored in the collection `batch_stats`, as those of `Norm`.

    Attributes:
      normalizers: the rows, of which one may store statistics; on `[n, c]` take ("layer", "batch").
      layout: name of each axis of the input.
      use_running_average: whether the row that stores statistics takes the stored ones; here or at the call.
      momentum: weight of the old value in the running average; the authors' code has 0.9, and 0.997 on `[n, c]`.
      averaging: of the running statistics, see `running.py`.
      update_running_average: False leaves the stored ones.
      epsilon: added to the mixed variance. [units of x squared]
      unbiased: whether variances are unbiased, as in the authors' code.
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor; zeros for the last layer of a residual branch.
      bias_init: initializer of the addend.
      weight_init: initializer of the logits, `mean_weight` and `var_weight`, one for each row.

    Source: Luo et al. 2019 (differentiable learning to normalize), equation 3.

    >>> layer, x = SwitchableNorm(use_running_average=False), jnp.ones((2, 4, 4, 3))
    >>> jax.tree.map(jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), x)["batch_stats"])
    {'mean': (3,), 'var': (3,)}
    """

    normalizers: tuple[Normalizer | str, ...] = switchable.ROWS
    layout: str = "n ... c"
    use_running_average: bool | None = None
    momentum: float = 0.9
    averaging: str = "exponential"
    update_running_average: bool = True
    epsilon: float = 1e-5
    unbiased: bool = False
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = initializers.ones
    bias_init: Any = initializers.zeros
    weight_init: Any = initializers.ones

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""
        x, starting = require_float(x, "SwitchableNorm"), self.is_initializing()
        channels = layer.channel_shape(self.layout, x.shape)
        count = (len(self.normalizers),)
        mean_weight = self.param("mean_weight", self.weight_init, count, self.param_dtype)
        var_weight = self.param("var_weight", self.weight_init, count, self.param_dtype)
        scale = self.param("scale", self.scale_init, channels, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, channels, self.param_dtype) if self.use_bias else None
        rows, at = tuple(row(n) for n in self.normalizers), switchable.storing(self.normalizers)
        found = {} if at is None else slots(rows[at], self.layout, x.shape, self.averaging)
        use = bool(found) and nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        counting = starting or (self.update_running_average and not use)
        stored = {
            name: _stored(self, name, slot, None)
            for name, slot in found.items()
            if counting or not name.endswith("_count")
        }
        out = switchable.apply(
            x, tuple(n.local() for n in rows) if starting else rows, mean_weight, var_weight, self.layout,
            Running(**{name: variable.value for name, variable in stored.items()}), use_running=use,
            update_running=self.update_running_average, momentum=self.momentum, averaging=self.averaging, scale=scale,
            bias=bias, mask=mask, eps=self.epsilon, unbiased=self.unbiased, refuse=not starting, dtype=self.dtype,
        )  # fmt: skip
        _store(self, stored, out)
        return out.y
