"""The layer of virtual batch norm: examples by the statistics of a reference batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import batch
from normjax._expect.arrays import require_float
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Layer, Parameter, Shape, description, ones, zeros


@description
class VirtualBatchNorm(Layer):
    """Each example by the statistics of a reference batch that it is added to; see `normjax.batch.virtual_batch`.

    The layer takes both and returns both: the reference batch goes through the network beside the examples.

    Attributes:
      epsilon: added to the variance. [units of x squared]
      layout: name of each axis of both.
      field: field of the reference's statistics: the batch as a whole, without windows.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    Source: Salimans et al. 2016, section 3.5.

    >>> from normjax.linen import VirtualBatchNorm
    >>> layer = VirtualBatchNorm(epsilon=0.0, use_scale=False, use_bias=False)
    >>> [(4 * y).round().tolist() for y in layer.apply({}, jnp.array([[3.0]]), jnp.array([[-3.0], [0.0]]))]
    [[[5.0]], [[-4.0], [4.0]]]
    """

    epsilon: Amount = 1e-5
    layout: str = "n ... c"
    field: str = batch.BATCH
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        return describe.scale_and_bias(self, shape)

    def __call__(
        self,
        x: ArrayLike,
        reference: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        reference_mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The examples and the reference batch, both normalized; what is masked counts nowhere, and becomes the bias."""
        x, reference = (describe.promoted(require_float(a, "VirtualBatchNorm"), self.dtype) for a in (x, reference))
        out, known = batch.virtual_batch(
            x,
            reference,
            self.layout,
            field=describe.field_here(self, self.field),
            eps=self.epsilon,
            mask=mask,
            reference_mask=reference_mask,
            **self._learned(x.shape),
        )
        return out.y.astype(self.dtype or x.dtype), known.y.astype(self.dtype or x.dtype)
