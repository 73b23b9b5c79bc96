"""Flax nnx modules of conditional normalization: `Norm` with a scale and a bias from a condition.

The arithmetic is in `normjax.conditional`; statistics that a row stores are those of the attribute `norm`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import conditional, spade
from normjax._expect.arrays import require_float
from normjax._expect.binding import axes
from normjax.conditional import Modulation
from normjax.nnx.norms import Norm
from normjax.theory import Normalizer

_ZEROS, _ONES, _KERNEL = initializers.zeros_init(), initializers.ones_init(), initializers.lecun_normal()


def _norm(normalizer: Normalizer | str | None, features: int, **settings: Any) -> Any:
    """The row without parameters of its own; None where nothing is normalized."""
    if normalizer is None:
        return nnx.data(None)
    return Norm(normalizer, features, use_scale=False, use_bias=False, rngs=nnx.Rngs(0), **settings)


def _modulated(module: Any, x: Any, modulation: Modulation, average: bool | None, mask: Any) -> jax.Array:
    """The row of the module, with this scale and bias."""
    if module.norm is None:
        y = conditional.modulate(x, modulation, None, module.layout, mask=mask)
        return y if module.dtype is None else y.astype(module.dtype)
    return module.norm(x, average, mask=mask, scale=modulation.scale, bias=modulation.bias)


class AdaIN(nnx.Module):
    """Adaptive instance norm; arguments and call as for `normjax.linen.AdaIN`. Nothing is learned.

    Source: Huang & Belongie 2017, equation 8.

    >>> AdaIN()(jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0]]])).round().tolist()
    [[[10.0], [30.0]]]
    """

    def __init__(
        self,
        *,
        epsilon: float = 1e-5,
        style_epsilon: float | None = None,
        unbiased: bool = False,
        layout: str = "n ... c",
    ):
        self.epsilon = epsilon
        self.style_epsilon = style_epsilon
        self.unbiased = unbiased
        self.layout = layout

    def __call__(
        self,
        x: ArrayLike,
        style: ArrayLike,
        *,
        strength: ArrayLike = 1.0,
        mask: ArrayLike | None = None,
        style_mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Gives x the style; see `normjax.conditional.adain`."""
        return conditional.adain(
            x, style, self.layout, eps=self.epsilon, style_eps=self.style_epsilon, strength=strength, mask=mask,
            style_mask=style_mask, unbiased=self.unbiased,
        )  # fmt: skip


class ConditionalNorm(nnx.Module):
    """Any normalizer with a scale and a bias for each class; arguments as for `normjax.linen.ConditionalNorm`.

    Args:
      num_classes: number of classes.
      features: number of channels.
      rngs: random keys for the initializers.

    Source: Dumoulin et al. 2017, equation 5; de Vries et al. 2017, section 4.1.

    >>> layer = ConditionalNorm(10, 3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 4, 4, 3)), jnp.array([3, 7])).shape, layer.scale.shape
    ((2, 4, 4, 3), (10, 3))
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        *,
        normalizer: Normalizer | str | None = "batch",
        layout: str = "n ... c",
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale_init: Any = _ONES,
        bias_init: Any = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(scale_init(rngs.params(), (num_classes, features), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (num_classes, features), param_dtype))
        self.norm = _norm(
            normalizer, features, layout=layout, use_running_average=use_running_average, momentum=momentum, dtype=dtype
        )
        self.layout = layout
        self.dtype = dtype

    def __call__(
        self, x: ArrayLike, labels: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x, for integer labels `[n]` or weights of the classes `[n, num_classes]`."""
        modulation = conditional.by_class(labels, self.scale[...], self.bias[...])
        return _modulated(self, require_float(x, "ConditionalNorm"), modulation, use_running_average, mask)


class FiLM(nnx.Module):
    """Feature-wise linear modulation; arguments as for `normjax.linen.FiLM`.

    Args:
      features: number of channels.
      condition_features: length of the condition.
      rngs: random keys for the initializers.

    Source: Perez et al. 2018, equations 1 and 2.

    >>> layer, x = FiLM(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 5, 3))
    >>> bool((layer(x, jnp.ones((2, 4))) == x).all()), layer.kernel.shape
    (True, (4, 6))
    """

    def __init__(
        self,
        features: int,
        condition_features: int,
        *,
        normalizer: Normalizer | str | None = None,
        layout: str = "n ... c",
        order: tuple[str, ...] = ("scale", "bias"),
        around: float = 1.0,
        activation: Any = None,
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _ZEROS,
        bias_init: Any = _ZEROS,
        rngs: nnx.Rngs,
    ):
        width = len(order) * features
        self.kernel = nnx.Param(kernel_init(rngs.params(), (condition_features, width), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (width,), param_dtype))
        self.norm = _norm(
            normalizer, features, layout=layout, use_running_average=use_running_average, momentum=momentum, dtype=dtype
        )
        self.layout = layout
        self.order = tuple(order)
        self.around = around
        self.activation = activation
        self.dtype = dtype

    def _apply(self, x: ArrayLike, condition: ArrayLike, average: bool | None, mask: Any) -> tuple[jax.Array, Any]:
        modulation = conditional.project(
            condition, self.kernel[...], self.bias[...], self.order, around=self.around, activation=self.activation
        )
        return _modulated(self, require_float(x, type(self).__name__), modulation, average, mask), modulation.gate

    def __call__(
        self, x: ArrayLike, condition: ArrayLike, use_running_average: bool | None = None, *,
        mask: ArrayLike | None = None,
    ) -> Any:  # fmt: skip
        """Modulates x by the condition `[n, k]`."""
        return self._apply(x, condition, use_running_average, mask)[0]


class AdaLN(FiLM):
    """Adaptive layer norm: each token is normalized, and a condition gives scale and bias. Arguments as for `FiLM`.

    Source: Peebles & Xie 2023 (DiT), section 3.2.

    >>> AdaLN(2, 4, rngs=nnx.Rngs(0))(jnp.array([[[1.0, 3.0]]]), jnp.ones((1, 4))).round(3).tolist()
    [[[-1.0, 1.0]]]
    """

    def __init__(
        self, features: int, condition_features: int, *, normalizer: Normalizer | str | None = conditional.TOKEN,
        order: tuple[str, ...] = ("bias", "scale"), activation: Any = jax.nn.silu, rngs: nnx.Rngs, **others: Any,
    ):  # fmt: skip
        super().__init__(
            features, condition_features, normalizer=normalizer, order=order, activation=activation, rngs=rngs, **others
        )


class AdaLNZero(AdaLN):
    """Adaptive layer norm with a gate for the residual branch that follows; the gate starts at zero.

    The call returns `(y, gate)`, for `normjax.conditional.gated(x, branch(y), gate)`.

    Source: Peebles & Xie 2023 (DiT), section 3.2, adaLN-Zero.

    >>> x = jnp.array([[[1.0, 3.0]]])
    >>> y, gate = AdaLNZero(2, 4, rngs=nnx.Rngs(0))(x, jnp.ones((1, 4)))
    >>> conditional.gated(x, jnp.sin(y), gate).tolist()
    [[[1.0, 3.0]]]
    """

    def __init__(
        self, features: int, condition_features: int, *, order: tuple[str, ...] = ("bias", "scale", "gate"),
        rngs: nnx.Rngs, **others: Any,
    ):  # fmt: skip
        super().__init__(features, condition_features, order=order, rngs=rngs, **others)

    def __call__(
        self, x: ArrayLike, condition: ArrayLike, use_running_average: bool | None = None, *,
        mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Modulates x by the condition `[n, k]`; the gate is `[n, c]`."""
        return self._apply(x, condition, use_running_average, mask)


class SPADE(nnx.Module):
    """Spatially adaptive normalization; arguments as for `normjax.linen.SPADE`.

    Args:
      features: number of channels.
      label_features: number of channels of the map of labels.
      space: number of axes of space.
      rngs: random keys for the initializers.

    Source: Park et al. 2019, equation 1 and appendix A.

    >>> SPADE(3, 5, hidden=8, rngs=nnx.Rngs(0))(jnp.ones((1, 4, 4, 3)), jnp.ones((1, 8, 8, 5))).shape
    (1, 4, 4, 3)
    """

    def __init__(
        self,
        features: int,
        label_features: int,
        space: int = 2,
        *,
        normalizer: Normalizer | str | None = "batch",
        hidden: int = 128,
        kernel_size: int = 3,
        layout: str = "n ... c",
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _KERNEL,
        bias_init: Any = _ZEROS,
        rngs: nnx.Rngs,
    ):
        shapes = spade.kernel_shapes(features, label_features, space, hidden, kernel_size)
        for name in spade.Convolutions._fields:
            init = bias_init if name.endswith("_bias") else kernel_init
            setattr(self, name, nnx.Param(init(rngs.params(), getattr(shapes, name), param_dtype)))
        self.norm = _norm(
            normalizer, features, layout=layout, use_running_average=use_running_average, momentum=momentum, dtype=dtype
        )
        self.layout = layout
        self.dtype = dtype

    def __call__(
        self, x: ArrayLike, labels: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x; the map of labels is resized to it by the nearest element."""
        x = require_float(x, "SPADE")
        learned = spade.Convolutions(*(getattr(self, name)[...] for name in spade.Convolutions._fields))
        size = tuple(x.shape[axis] for axis in axes(self.layout, x.ndim).get("...", ()))
        return _modulated(self, x, spade.from_map(labels, learned, self.layout, size), use_running_average, mask)
