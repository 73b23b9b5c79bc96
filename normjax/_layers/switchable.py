"""Switchable norm as a layer: the weights of the rows are learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import switchable
from normjax._expect.arrays import require_float
from normjax._layers.describe import (
    Amount,
    Initializer,
    Parameter,
    Shape,
    Share,
    description,
    ones,
    scale_and_bias,
    zeros,
)
from normjax._layers.statistics import Limits, RunningLayer, Taken
from normjax._leaves import split_eps
from normjax.theory import Normalizer, Stats, row


@description
class SwitchableNorm(RunningLayer):
    """Normalizes with a learned mixture of the statistics of several rows, at first all alike.

    The weights are a softmax of the learned `mean_weight` and `var_weight`, one for each row. The statistics of the row
    that mixes examples are stored; at inference they take the place of the batch's, and the other rows are computed from x.
    The authors' code starts the running variance from 0; here it is 1, as in Flax, or `var_init`.

    Attributes:
      normalizers: the rows, of which one may store statistics; on `[n, c]` take ("layer", "batch").
      layout: name of each axis of the input.
      epsilon: added to the mixed variance. [units of x squared]
      use_scale: whether a factor is learned, `[c]`.
      use_bias: whether an addend is learned, `[c]`.
      dtype: of the output, by default that of the input.
      param_dtype: of the parameters.
      scale_init: initializer of the factor; zeros for the last layer of a residual branch.
      bias_init: initializer of the addend.
      weight_init: initializer of the logits, `mean_weight` and `var_weight`, `[rows]`.
      momentum: weight of the old value in the running average; the authors' code has 0.9, and 0.997 on `[n, c]`.
      unbiased: whether variances divide by one less than the number of elements before they are pooled and mixed, and so
        stored, as in the authors' code.

    All other options are those of every layer with running statistics, see `Norm`. Batch renormalization (`renorm`) keeps
    the statistics of the storing row near the stored ones before they are mixed; the L1 penalty is on x less the mixed mean.

    Source: Luo et al. 2019 (differentiable learning to normalize), equation 3.

    >>> from flax.nnx import Rngs
    >>> from normjax import linen, nnx
    >>> layer, x = linen.SwitchableNorm(use_running_average=False), jnp.ones((2, 4, 4, 3))
    >>> jax.tree.map(jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), x)["batch_stats"])
    {'mean': (3,), 'var': (3,)}
    >>> layer = nnx.SwitchableNorm(3, rngs=Rngs(0))
    >>> layer(x).shape, layer.mean[...].round(1).tolist()
    ((2, 4, 4, 3), [0.10000000149011612, 0.10000000149011612, 0.10000000149011612])
    """

    normalizers: tuple[Normalizer | str, ...] = switchable.ROWS
    layout: str = "n ... c"
    epsilon: Amount = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros
    weight_init: Initializer = ones
    momentum: Share = dataclasses.field(default=0.9, kw_only=True)

    def _check(self) -> None:
        switchable.require_mixable(self.normalizers)
        switchable.storing(self.normalizers)

    def _row(self) -> Normalizer | None:
        at = switchable.storing(self.normalizers)
        return None if at is None else self._batch_row(row(self.normalizers[at]))

    def _batch_row(self, n: Normalizer) -> Normalizer:
        """The row with the numbers of the mixture, as batch renormalization has it: its own are not used."""
        return dataclasses.replace(n, eps=split_eps(self.epsilon)[0], gain=1.0, power=0.5)

    def _stores_unbiased(self) -> bool:
        return False  # here the option is that of every variance that is mixed

    def _learns(self, shape: Shape) -> dict[str, Parameter | None]:
        logits = Parameter((len(self.normalizers),), self.weight_init)
        return {"mean_weight": logits, "var_weight": logits, **scale_and_bias(self, shape)}

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        renorm: Limits | None = None,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating-point array, axes as named by `layout`.
          use_running_average: whether the row that stores statistics takes the stored ones.
          update_running_average: whether a training batch moves the stored statistics; replaces the option.
          renorm: limits of batch renormalization; replaces the option.
          mask: booleans or weights that broadcast against x; where 0, x counts in no statistic and y is the bias.
        """
        x, starting = require_float(x, "SwitchableNorm"), self._starting()
        rows = [row(n).local() if starting else row(n) for n in self.normalizers]  # mapped axes may not exist yet
        at = switchable.storing(rows)
        learned = self._learned(x.shape)
        w, v = (switchable.weights_of(learned.pop(name)) for name in ("mean_weight", "var_weight"))
        mix = functools.partial(switchable.mix, eps=self.epsilon, unbiased=self.unbiased, refuse=not starting)

        def take(stats: Stats | None) -> Taken[jax.Array]:
            given = [stats if k == at else None for k in range(len(rows))]
            out = mix(x, rows, w, v, self.layout, stats=given, mask=mask, dtype=self.dtype, **learned)
            # Variances that were unbiased before they were pooled do not merge into that of two batches.
            stored, mergeable = 0 if at is None else at, not self.unbiased
            return Taken(out.y, out.parts[stored], self._batch_row(rows[stored]), out.centered, mergeable)

        asked = {"update_running_average": update_running_average, "renorm": renorm, "mask": mask}
        return self._normalized(x, take, use_running_average, eps=split_eps(self.epsilon)[1], **asked)
