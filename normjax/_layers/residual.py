"""The residual add and the norm of a transformer's block as one layer, and one kernel where it is used."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import kernels
from normjax._expect.arrays import require_float
from normjax._layers import describe
from normjax._layers.describe import Amount, Initializer, Layer, Parameter, Shape, description, ones, zeros
from normjax._leaves import one_of, split_eps
from normjax._normalize.evaluate import add_and_normalize
from normjax.running import stores
from normjax.theory import Normalizer, row


@description
class AddNorm(Layer):
    """Adds a residual, normalizes the sum, and returns both: `(y, sum)`, with y = act(scale * normalized sum + bias).

    Where a fused kernel is used (`kernel=True`), sum, norm and activation are one kernel forward and one backward, for rows
    that normalize trailing axes, such as "token" and "rms". The network goes on with the sum: `h = h + f(norm(h))` is

        y, h = norm(h)                     # the first block
        y, h = norm(f(y), h)               # the next ones

    Attributes:
      normalizer: a Normalizer or the name of a row of TABLE that stores nothing.
      activation: "relu", "gelu" (by tanh, as `jax.nn.gelu`), "exact_gelu", "silu", or None.
      epsilon: added to the moment; None takes that of the row. [units of x squared]
      layout: name of each axis of the input.
      kernel: whether a fused kernel evaluates it where it fits, see `normjax.kernels`; None does as is done around it.
      use_scale, use_bias: whether a factor, and an addend, is learned, `[c]`.
      dtype, param_dtype: of y, by default that of the input; of the parameters.
      scale_init, bias_init: initializers of the factor and of the addend.

    Source: Vaswani et al. 2017, section 3.1; before the layers, as above, Xiong et al. 2020, figure 1 (b).

    >>> from normjax.linen import AddNorm
    >>> layer = AddNorm(activation="relu", use_scale=False, use_bias=False)
    >>> y, total = layer.apply({}, jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0]]))
    >>> y.round(3).tolist(), total.tolist()
    ([[0.0, 1.0]], [[1.0, 3.0]])
    """

    normalizer: Normalizer | str = "token"
    activation: str | None = None
    epsilon: Amount | None = None
    layout: str = "n ... c"
    kernel: bool | None = None
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _check(self) -> None:
        kernels.asked(self.kernel)  # refuses what is no choice
        one_of("activation", self.activation, tuple(kernels.ACTIVATIONS))
        if any(stores(row(self.normalizer))):
            raise ValueError(f"AddNorm takes a row that stores no statistics; found {self.normalizer!r}")

    def _learns(self, shape: Shape, *_: Shape) -> dict[str, Parameter | None]:
        return describe.scale_and_bias(self, shape)

    def __call__(
        self, x: ArrayLike, residual: ArrayLike | None = None, *, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The output y in the dtype of the layer, and the sum x + residual in the wider dtype of the two.

        Args:
          x: floating-point array, axes as named by `layout`.
          residual: array of the shape of x; None adds nothing, and the sum is x.
          mask: boolean mask or weights that broadcast against x; what is masked counts nowhere, and becomes act(bias).
        """
        x = require_float(x, "AddNorm")
        residual = None if residual is None else require_float(residual, "AddNorm")
        n, eps = row(self.normalizer), None
        if self.epsilon is not None:
            number, eps = split_eps(self.epsilon)
            n = dataclasses.replace(n, eps=number)
        n = n.local() if self._starting() else n  # mapped axes need not exist yet
        given = {**self._learned(x.shape), "mask": mask, "eps": eps, "dtype": self.dtype, "activation": self.activation}
        with kernels.asked(self.kernel):
            return add_and_normalize(x, residual, n, self.layout, refused=not self._starting(), **given)
