"""Flax nnx module of switchable norm; the arithmetic is in `normjax.switchable`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import layer, switchable
from normjax._expect.arrays import require_float
from normjax.nnx.norms import _flag, _store
from normjax.running import Running, slots
from normjax.theory import Normalizer, row

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class SwitchableNorm(nnx.Module):
    """Normalizes with a learned mixture of the statistics of several rows; arguments as for `normjax.linen.SwitchableNorm`.

    Args:
      features: number of channels.
      rngs: random keys for the initializers.

    Source: Luo et al. 2019 (differentiable learning to normalize), equation 3.

    >>> layer = SwitchableNorm(3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 4, 4, 3))).shape, layer.mean[...].round(1).tolist()
    ((2, 4, 4, 3), [0.10000000149011612, 0.10000000149011612, 0.10000000149011612])
    """

    def __init__(
        self,
        features: int,
        *,
        normalizers: tuple[Normalizer | str, ...] = switchable.ROWS,
        layout: str = "n ... c",
        use_running_average: bool | None = False,
        momentum: float = 0.9,
        averaging: str = "exponential",
        update_running_average: bool = True,
        epsilon: float = 1e-5,
        unbiased: bool = False,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale_init: Any = _ONES,
        bias_init: Any = _ZEROS,
        weight_init: Any = _ONES,
        rngs: nnx.Rngs,
    ):
        count, channels = (len(normalizers),), (features,)
        self.mean_weight = nnx.Param(weight_init(rngs.params(), count, param_dtype))
        self.var_weight = nnx.Param(weight_init(rngs.params(), count, param_dtype))
        self.scale = nnx.Param(scale_init(rngs.params(), channels, param_dtype)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(bias_init(rngs.params(), channels, param_dtype)) if use_bias else nnx.data(None)
        self.normalizers = tuple(row(n) for n in normalizers)
        at = switchable.storing(normalizers)
        shape = layer.whole_shape(features, layout)
        found = {} if at is None else slots(self.normalizers[at], layout, shape, averaging)
        for name in Running._fields:
            setattr(self, name, nnx.BatchStat(found[name].make()) if name in found else nnx.data(None))
        self.layout = layout
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.averaging = averaging
        self.update_running_average = update_running_average
        self.epsilon = epsilon
        self.unbiased = unbiased
        self.dtype = dtype

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x; see `normjax.normalize` for the mask."""

        def value(name: str) -> Any:
            variable = getattr(self, name)
            return None if variable is None else variable[...]

        stored = Running(*(value(name) for name in Running._fields))
        stores = any(v is not None for v in stored)
        use = stores and _flag(use_running_average, self.use_running_average, "SwitchableNorm")
        out = switchable.apply(
            require_float(x, "SwitchableNorm"), self.normalizers, value("mean_weight"), value("var_weight"), self.layout,
            stored, use_running=use, update_running=self.update_running_average, momentum=self.momentum,
            averaging=self.averaging, scale=value("scale"), bias=value("bias"), mask=mask, eps=self.epsilon,
            unbiased=self.unbiased, dtype=self.dtype,
        )  # fmt: skip
        _store(self, out)
        return out.y

    def set_view(self, use_running_average: bool | None = None, update_running_average: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether to normalize with the stored statistics.
          update_running_average: whether the batch's statistics, where they are used, update the stored ones.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average
