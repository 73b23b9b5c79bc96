"""The faces of the layers in Flax nnx: a description of `normjax/_layers` and a host of `host.py` each."""

import dataclasses
from dataclasses import InitVar
from typing import Annotated

import jax
from flax import nnx
from jax.typing import ArrayLike

from normjax import _layers as described
from normjax._expect.arrays import require_real
from normjax._layers.describe import Count, Shape, whole_shape
from normjax._leaves import Whole
from normjax.nnx.host import Bare, Host, Keeping

Keys = nnx.Rngs | nnx.RngStream

__all__ = ["BatchRenorm", "DivisiveNorm", "ExtendedBatchNorm", "LocalContextNorm", "Norm", "VarianceNorm"]
__all__ += ["GhostBatchNorm", "GhostTopKBatchNorm", "L1BatchNorm", "LinfBatchNorm", "LpBatchNorm"]
__all__ += ["LocalContrastNorm", "LocalResponseNorm", "PositionNorm", "RangeBatchNorm", "TopKBatchNorm"]
__all__ += ["GDN", "GRN", "TLU", "AlphaDropout", "Derf", "DyT", "EvoNormB0", "EvoNormS0", "FilterResponseNorm"]
__all__ += ["KalmanNorm", "PartialRMSNorm", "QKNorm", "RevIN", "ScaleNorm", "SwitchableNorm", "VirtualBatchNorm"]
__all__ += ["SPADE", "AdaIN", "AdaLN", "AdaLNZero", "AddNorm", "ConditionalNorm", "FiLM"]


class Norm(described.norm.Norm, Keeping): ...


class BatchRenorm(described.presets.BatchRenorm, Keeping): ...


class DivisiveNorm(described.presets.DivisiveNorm, Keeping): ...


class L1BatchNorm(described.batch.L1BatchNorm, Keeping): ...


class LpBatchNorm(described.batch.LpBatchNorm, Keeping): ...


class TopKBatchNorm(described.batch.TopKBatchNorm, Keeping): ...


class LinfBatchNorm(described.batch.LinfBatchNorm, Keeping): ...


class VarianceNorm(described.presets.VarianceNorm, Keeping): ...


class ExtendedBatchNorm(described.presets.ExtendedBatchNorm, Keeping): ...


class PositionNorm(described.presets.PositionNorm, Keeping): ...


class LocalContextNorm(described.presets.LocalContextNorm, Keeping): ...


class GhostBatchNorm(described.batch.GhostBatchNorm, Keeping): ...


class RangeBatchNorm(described.batch.RangeBatchNorm, Keeping): ...


class GhostTopKBatchNorm(described.batch.GhostTopKBatchNorm, Keeping): ...


class LocalResponseNorm(described.presets.LocalResponseNorm, Bare): ...


class LocalContrastNorm(described.presets.LocalContrastNorm, Bare): ...


class TLU(described.units.TLU, Host): ...


class DyT(described.units.DyT, Host): ...


class Derf(described.units.Derf, Host): ...


class EvoNormB0(described.evonorm.EvoNormB0, Keeping): ...


class EvoNormS0(described.evonorm.EvoNormS0, Host): ...


class GRN(described.units.GRN, Host): ...


class GDN(described.gdn.GDN, Host): ...


class FilterResponseNorm(described.response.FilterResponseNorm, Host): ...


class ScaleNorm(described.tokens.ScaleNorm, Host): ...


class PartialRMSNorm(described.tokens.PartialRMSNorm, Host): ...


class QKNorm(described.tokens.QKNorm, Host): ...


class AddNorm(described.residual.AddNorm, Host): ...


class VirtualBatchNorm(described.virtual.VirtualBatchNorm, Host): ...


class RevIN(described.reversible.RevIN, Host): ...


@dataclasses.dataclass(eq=False, repr=False)
class Conditioned(Keeping):
    """A host of layers with a condition `[n, condition_features]`."""

    condition_features: Count

    def _shapes(self) -> tuple[Shape, ...]:
        return (*super()._shapes(), (None, self.condition_features))


@dataclasses.dataclass(eq=False, repr=False)
class Labelled(Keeping):
    """A host of layers with a map of labels: so many channels, on so many axes of space."""

    label_features: Count
    space: Annotated[int, Whole(0)] = 2

    def _shapes(self) -> tuple[Shape, ...]:
        layout = self.layout.replace("...", " ".join(["..."] * self.space))
        return whole_shape(self.features, layout), whole_shape(self.label_features, layout)


class AdaIN(described.conditional.AdaIN, Bare): ...


class ConditionalNorm(described.conditional.ConditionalNorm, Keeping): ...


class FiLM(described.film.FiLM, Conditioned): ...


class AdaLN(described.film.AdaLN, Conditioned): ...


class AdaLNZero(described.film.AdaLNZero, Conditioned): ...


class SPADE(described.spade.SPADE, Labelled): ...


class AlphaDropout(described.selu.AlphaDropout, Bare):
    # `.train()`, `.eval()` and `nnx.view` set `deterministic`; `rngs` are random keys or a stream, here or at the call.
    deterministic: bool | None = False
    rngs: InitVar[Keys | None] = None

    def __post_init__(self, rngs: Keys | None):
        super().__post_init__()
        stream = rngs[self.rng_collection] if isinstance(rngs, nnx.Rngs) else rngs
        self.rngs = nnx.data(None) if stream is None else stream.fork()  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self, x: ArrayLike, *, deterministic: bool | None = None, rngs: Keys | jax.Array | None = None
    ) -> jax.Array:
        """Drops elements of x, unless `deterministic`, by `rngs`: random keys, a stream of them or one key."""
        x = require_real(x, "AlphaDropout")
        flag = self.deterministic if deterministic is None else deterministic
        if flag is None:
            raise ValueError(
                "No `deterministic` argument was provided to AlphaDropout: pass it to the constructor or to the call, or "
                "set it on the whole model with .train(), .eval() or nnx.view"
            )
        if self._passes(flag):
            return x
        keys = self.rngs if rngs is None else rngs  # pyright: ignore[reportAttributeAccessIssue]
        if keys is None:
            raise ValueError(
                "AlphaDropout is not deterministic but has no `rngs`: pass them to the constructor or the call"
            )
        if isinstance(keys, nnx.Rngs):
            keys = keys[self.rng_collection]
        return self._dropped(x, keys if isinstance(keys, jax.Array) else keys())

    def set_view(self, deterministic: bool | None = None):
        """Called by `nnx.view`; `nnx.view_info` reads this docstring.

        Args:
          deterministic: whether the input passes as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic


class SwitchableNorm(described.switchable.SwitchableNorm, Keeping): ...


class KalmanNorm(described.kalman.KalmanNorm, Keeping): ...
