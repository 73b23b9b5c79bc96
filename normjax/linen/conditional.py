"""Flax linen modules of conditional normalization: `Norm` with a scale and a bias from a condition.

The arithmetic is in `normjax.conditional`; statistics that a row stores are those of the `Norm` called `norm`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax import conditional, layer, spade
from normjax._expect.arrays import require_float
from normjax._expect.binding import axes
from normjax.conditional import Modulation
from normjax.linen.norms import Norm
from normjax.theory import Normalizer


def _modulated(module: Any, x: Any, modulation: Modulation, average: bool | None, mask: Any) -> jax.Array:
    """The row of the module, with this scale and bias."""
    if module.normalizer is None:
        y = conditional.modulate(x, modulation, None, module.layout, mask=mask)
        return y if module.dtype is None else y.astype(module.dtype)
    norm = Norm(
        module.normalizer, module.layout, use_running_average=module.use_running_average, momentum=module.momentum,
        use_scale=False, use_bias=False, dtype=module.dtype, name="norm",
    )  # fmt: skip
    return norm(x, average, mask=mask, scale=modulation.scale, bias=modulation.bias)


class AdaIN(nn.Module):
    """Adaptive instance norm: the content with the mean and spread of the style. Nothing is learned.

    Attributes:
      epsilon: added to the variances. [units of x squared]
      style_epsilon: replaces it for the style; the authors' Lua code has 0.
      unbiased: whether the variances are unbiased, as in a well-known PyTorch version.
      layout: name of each axis of both inputs.

    Source: Huang & Belongie 2017, equation 8.

    >>> AdaIN().apply({}, jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0]]])).round().tolist()
    [[[10.0], [30.0]]]
    """

    epsilon: float = 1e-5
    style_epsilon: float | None = None
    unbiased: bool = False
    layout: str = "n ... c"

    @nn.compact
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


class ConditionalNorm(nn.Module):
    """Any normalizer with a scale and a bias for each class: conditional batch norm, conditional instance norm.

    Attributes:
      num_classes: number of classes.
      normalizer: a Normalizer or the name of a row of TABLE.
      layout: name of each axis of the input.
      use_running_average: whether to normalize with the stored statistics; here or at the call.
      momentum: weight of the old value in the running average.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factors, `[num_classes, c]`.
      bias_init: initializer of the addends, `[num_classes, c]`.

    Source: Dumoulin et al. 2017, equation 5; de Vries et al. 2017, section 4.1.

    >>> layer, x, labels = ConditionalNorm(10, use_running_average=False), jnp.ones((2, 4, 4, 3)), jnp.array([3, 7])
    >>> variables = jax.eval_shape(layer.init, jax.random.key(0), x, labels)
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'bias': (10, 3), 'scale': (10, 3)}
    """

    num_classes: int
    normalizer: Normalizer | str | None = "batch"
    layout: str = "n ... c"
    use_running_average: bool | None = None
    momentum: float = 0.99
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = initializers.ones
    bias_init: Any = initializers.zeros

    @nn.compact
    def __call__(
        self, x: ArrayLike, labels: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x, for integer labels `[n]` or weights of the classes `[n, num_classes]`."""
        x = require_float(x, "ConditionalNorm")
        shape = (self.num_classes, *layer.channel_shape(self.layout, x.shape))
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        return _modulated(self, x, conditional.by_class(labels, scale, bias), use_running_average, mask)


class FiLM(nn.Module):
    """Feature-wise linear modulation: a linear map of a condition gives the scale and the bias.

    Attributes:
      normalizer: what is done before, a Normalizer or the name of a row; None does nothing.
      layout: name of each axis of the input.
      order: the parts of the map's output, in the order of the checkpoint, see `normjax.conditional.split_modulation`.
      around: added to the scale.
      activation: applied to the condition first.
      use_running_average: whether to normalize with the stored statistics, for rows that have any.
      momentum: weight of the old value in the running average.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      kernel_init: initializer of the map, `[k, parts * c]`; zeros start as no modulation.
      bias_init: initializer of its bias, `[parts * c]`.

    Source: Perez et al. 2018, equations 1 and 2.

    >>> x, condition = jnp.ones((2, 5, 5, 3)), jnp.ones((2, 4))
    >>> variables = FiLM().init(jax.random.key(0), x, condition)
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'bias': (6,), 'kernel': (4, 6)}
    >>> bool((FiLM().apply(variables, x, condition) == x).all())
    True
    """

    normalizer: Normalizer | str | None = None
    layout: str = "n ... c"
    order: tuple[str, ...] = ("scale", "bias")
    around: float = 1.0
    activation: Any = None
    use_running_average: bool | None = None
    momentum: float = 0.99
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = initializers.zeros
    bias_init: Any = initializers.zeros

    def _apply(self, x: ArrayLike, condition: ArrayLike, average: bool | None, mask: Any) -> tuple[jax.Array, Any]:
        x, condition = require_float(x, type(self).__name__), require_float(condition, type(self).__name__)
        (channels,) = layer.channel_shape(self.layout, x.shape)
        width = len(self.order) * channels
        kernel = self.param("kernel", self.kernel_init, (condition.shape[-1], width), self.param_dtype)
        bias = self.param("bias", self.bias_init, (width,), self.param_dtype)
        modulation = conditional.project(
            condition, kernel, bias, self.order, around=self.around, activation=self.activation
        )
        return _modulated(self, x, modulation, average, mask), modulation.gate

    @nn.compact
    def __call__(
        self, x: ArrayLike, condition: ArrayLike, use_running_average: bool | None = None, *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:  # fmt: skip
        """Modulates x by the condition `[n, k]`."""
        return self._apply(x, condition, use_running_average, mask)[0]


class AdaLN(FiLM):
    """Adaptive layer norm: each token is normalized, and a condition gives scale and bias. Attributes as for `FiLM`.

    Source: Peebles & Xie 2023 (DiT), section 3.2.

    >>> layer, x = AdaLN(), jnp.array([[[1.0, 3.0]]])
    >>> layer.apply(layer.init(jax.random.key(0), x, jnp.ones((1, 4))), x, jnp.ones((1, 4))).round(3).tolist()
    [[[-1.0, 1.0]]]
    """

    normalizer: Normalizer | str | None = conditional.TOKEN
    order: tuple[str, ...] = ("bias", "scale")
    activation: Any = jax.nn.silu


class AdaLNZero(AdaLN):
    """Adaptive layer norm with a gate for the residual branch that follows; the gate starts at zero.

    The call returns `(y, gate)`, for `normjax.conditional.gated(x, branch(y), gate)`.

    Source: Peebles & Xie 2023 (DiT), section 3.2, adaLN-Zero.

    >>> layer, x, condition = AdaLNZero(), jnp.array([[[1.0, 3.0]]]), jnp.ones((1, 4))
    >>> y, gate = layer.apply(layer.init(jax.random.key(0), x, condition), x, condition)
    >>> conditional.gated(x, jnp.sin(y), gate).tolist()
    [[[1.0, 3.0]]]
    """

    order: tuple[str, ...] = ("bias", "scale", "gate")

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: ArrayLike, condition: ArrayLike, use_running_average: bool | None = None, *,
        mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Modulates x by the condition `[n, k]`; the gate is `[n, c]`."""
        return self._apply(x, condition, use_running_average, mask)


class SPADE(nn.Module):
    """Spatially adaptive normalization: convolutions of a map of labels give a scale and a bias for every position.

    Attributes:
      normalizer: a Normalizer or the name of a row of TABLE.
      hidden: channels between the two convolutions.
      kernel_size: width of the convolutions' windows, odd.
      layout: name of each axis of the input and of the map.
      use_running_average: whether to normalize with the stored statistics, for rows that have any.
      momentum: weight of the old value in the running average.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      kernel_init: initializer of the three kernels.
      bias_init: initializer of their biases.

    Source: Park et al. 2019, equation 1 and appendix A.

    >>> layer, x, labels = SPADE(hidden=8, use_running_average=False), jnp.ones((1, 4, 4, 3)), jnp.ones((1, 8, 8, 5))
    >>> sorted(jax.eval_shape(layer.init, jax.random.key(0), x, labels)["params"])
    ['bias_bias', 'bias_kernel', 'hidden_bias', 'hidden_kernel', 'scale_bias', 'scale_kernel']
    """

    normalizer: Normalizer | str | None = "batch"
    hidden: int = 128
    kernel_size: int = 3
    layout: str = "n ... c"
    use_running_average: bool | None = None
    momentum: float = 0.99
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = initializers.lecun_normal()
    bias_init: Any = initializers.zeros

    @nn.compact
    def __call__(
        self, x: ArrayLike, labels: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x; the map of labels is resized to it by the nearest element."""
        x, labels = require_float(x, "SPADE"), require_float(labels, "SPADE")
        (features,), (labelled,) = (layer.channel_shape(self.layout, a.shape) for a in (x, labels))
        shapes = spade.kernel_shapes(features, labelled, x.ndim - 2, self.hidden, self.kernel_size)

        def learned(name: str) -> Any:
            init = self.bias_init if name.endswith("_bias") else self.kernel_init
            return self.param(name, init, getattr(shapes, name), self.param_dtype)

        learnt = spade.Convolutions(*(learned(name) for name in spade.Convolutions._fields))
        size = tuple(x.shape[axis] for axis in axes(self.layout, x.ndim).get("...", ()))
        return _modulated(self, x, spade.from_map(labels, learnt, self.layout, size), use_running_average, mask)
