"""The layer of filter response norm; those of local response and local contrast are in `presets.py`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import response
from normjax._expect.arrays import require_float
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Layer, Parameter, Shape, description, ones, zeros


@description
class FilterResponseNorm(Layer):
    """Filter response norm and its thresholded linear unit; see `normjax.response.filter_response`.

    Attributes:
      epsilon: added to the mean square; the initial value of a learned one, `eps`. [units of x squared]
      learn_eps: whether eps is learned, one scalar a layer of which the absolute value counts. Lubana et al. 2021 do so
        from 1e-5; the paper where maps are a single element.
      use_tau: whether the unit max(y, tau) follows, tau learned, `[c]`.
      layout: name of each axis of the input.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init, tau_init: initializers of the factor, of the addend and of the threshold.

    Source: Singh & Krishnan 2020, section 3.

    >>> from normjax.linen import FilterResponseNorm
    >>> layer = FilterResponseNorm(learn_eps=True)
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.array([[[3.0], [-4.0]]]))
    >>> (10 * y).round().tolist(), sorted(variables["params"])
    ([[[8.0], [0.0]]], ['bias', 'eps', 'scale', 'tau'])
    """

    epsilon: Amount = 1e-6
    learn_eps: bool = False
    use_tau: bool = True
    layout: str = "n ... c"
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros
    tau_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return {
            **describe.scale_and_bias(self, shape),
            "tau": Parameter(describe.channel_shape(self.layout, shape), self.tau_init) if self.use_tau else None,
            "eps": Parameter((), self.epsilon) if self.learn_eps else None,
        }

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> jax.Array:
        """Divides x by the root mean square of each map, and cuts it at the threshold.

        What is masked counts nowhere, and becomes the bias, or the threshold above it. `scale` and `bias` replace the
        learned ones: each a scalar, `[c]`, `[n, c]`, or of the rank of x.
        """
        x = describe.promoted(require_float(x, "FilterResponseNorm"), self.dtype)
        learned = {"eps": self.epsilon, **self._learned(x.shape, scale=scale, bias=bias)}
        return response.filter_response(x, self.layout, mask=mask, **learned).y.astype(self.dtype or x.dtype)
