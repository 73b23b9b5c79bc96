"""The layer of `normjax.spade`: scale and bias that vary over space, from a map of labels."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import spade
from normjax._expect.arrays import require_float
from normjax._expect.binding import axes
from normjax._layers.conditional import Modulated
from normjax._layers.describe import Count, Initializer, Parameter, Shape, channel_shape, description, zeros
from normjax.theory import Normalizer


@description
class SPADE(Modulated):
    """Spatially adaptive normalization: convolutions of a map of labels give a scale and a bias for every position.

    Attributes:
      normalizer: a Normalizer or the name of a row of TABLE.
      hidden: channels between the two convolutions.
      kernel_size: width of the convolutions' windows, odd.
      kernel_init, bias_init: initializers of the three kernels and of their biases.

    All other options are those of `Norm`; what is stored lies under `norm`. In nnx `label_features`, the
    number of channels of the map of labels, and `space`, the number of axes of space, follow `features`.
    Source: Park et al. 2019, equation 1 and appendix A.

    >>> from normjax.linen import SPADE
    >>> layer, x, labels = SPADE(hidden=8, use_running_average=False), jnp.ones((1, 4, 4, 3)), jnp.ones((1, 8, 8, 5))
    >>> sorted(jax.eval_shape(layer.init, jax.random.key(0), x, labels)["params"])
    ['bias_bias', 'bias_kernel', 'hidden_bias', 'hidden_kernel', 'scale_bias', 'scale_kernel']
    """

    normalizer: Normalizer | str | None = "batch"
    hidden: Count = 128
    kernel_size: Count = 3
    layout: str = "n ... c"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = jax.nn.initializers.lecun_normal()
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape, labels: Shape) -> dict[str, Parameter]:
        (features,), (labelled,) = (channel_shape(self.layout, s) for s in (shape, labels))
        shapes = spade.kernel_shapes(features, labelled, len(shape) - 2, self.hidden, self.kernel_size)
        inits = {name: self.bias_init if name.endswith("_bias") else self.kernel_init for name in shapes._fields}
        return {name: Parameter(getattr(shapes, name), init) for name, init in inits.items()}

    def __call__(
        self, x: ArrayLike, labels: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes x, with a scale and a bias for each position; what is masked becomes the bias.

        `labels` is a floating-point map of labels, axes as named by `layout`, resized to x by the nearest element.
        """
        x, labels = require_float(x, "SPADE"), require_float(labels, "SPADE")
        learned = spade.Convolutions(**self._learned(x.shape, labels.shape))
        size = tuple(x.shape[axis] for axis in axes(self.layout, x.ndim).get("...", ()))
        return self._modulated(x, spade.from_map(labels, learned, self.layout, size), use_running_average, mask)
