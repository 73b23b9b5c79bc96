"""The faces of the layers in Flax nnx: a description of `normjax/_layers` and a host of `host.py` each."""

from dataclasses import InitVar

import jax
from flax import nnx
from jax.typing import ArrayLike

from normjax._expect.arrays import require_real
from normjax._layers import (
    batch,
    conditional,
    evonorm,
    film,
    gdn,
    kalman,
    norm,
    presets,
    response,
    reversible,
    selu,
    spade,
    switchable,
    tokens,
    units,
    virtual,
)
from normjax._layers.describe import Shape, whole_shape
from normjax.nnx.host import Bare, Host, Keeping

__all__ = [
    "GDN",
    "GRN",
    "SPADE",
    "TLU",
    "AdaIN",
    "AdaLN",
    "AdaLNZero",
    "AlphaDropout",
    "BatchRenorm",
    "ConditionalNorm",
    "Derf",
    "DivisiveNorm",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "ExtendedBatchNorm",
    "FiLM",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "GhostTopKBatchNorm",
    "KalmanNorm",
    "L1BatchNorm",
    "LinfBatchNorm",
    "LocalContextNorm",
    "LocalContrastNorm",
    "LocalResponseNorm",
    "LpBatchNorm",
    "Norm",
    "PartialRMSNorm",
    "PositionNorm",
    "QKNorm",
    "RangeBatchNorm",
    "RevIN",
    "ScaleNorm",
    "SwitchableNorm",
    "TopKBatchNorm",
    "VarianceNorm",
    "VirtualBatchNorm",
]


@nnx.dataclass(eq=False)
class Norm(norm.Norm, Keeping): ...


@nnx.dataclass(eq=False)
class BatchRenorm(presets.BatchRenorm, Keeping): ...


@nnx.dataclass(eq=False)
class DivisiveNorm(presets.DivisiveNorm, Keeping): ...


@nnx.dataclass(eq=False)
class L1BatchNorm(batch.L1BatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class LpBatchNorm(batch.LpBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class TopKBatchNorm(batch.TopKBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class LinfBatchNorm(batch.LinfBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class VarianceNorm(presets.VarianceNorm, Keeping): ...


@nnx.dataclass(eq=False)
class ExtendedBatchNorm(presets.ExtendedBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class PositionNorm(presets.PositionNorm, Keeping): ...


@nnx.dataclass(eq=False)
class LocalContextNorm(presets.LocalContextNorm, Keeping): ...


@nnx.dataclass(eq=False)
class GhostBatchNorm(batch.GhostBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class RangeBatchNorm(batch.RangeBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class GhostTopKBatchNorm(batch.GhostTopKBatchNorm, Keeping): ...


@nnx.dataclass(eq=False)
class LocalResponseNorm(presets.LocalResponseNorm, Bare): ...


@nnx.dataclass(eq=False)
class LocalContrastNorm(presets.LocalContrastNorm, Bare): ...


@nnx.dataclass(eq=False)
class TLU(units.TLU, Host): ...


@nnx.dataclass(eq=False)
class DyT(units.DyT, Host): ...


@nnx.dataclass(eq=False)
class Derf(units.Derf, Host): ...


@nnx.dataclass(eq=False)
class EvoNormB0(evonorm.EvoNormB0, Keeping): ...


@nnx.dataclass(eq=False)
class EvoNormS0(evonorm.EvoNormS0, Host): ...


@nnx.dataclass(eq=False)
class GRN(units.GRN, Host): ...


@nnx.dataclass(eq=False)
class GDN(gdn.GDN, Host): ...


@nnx.dataclass(eq=False)
class FilterResponseNorm(response.FilterResponseNorm, Host): ...


@nnx.dataclass(eq=False)
class ScaleNorm(tokens.ScaleNorm, Host): ...


@nnx.dataclass(eq=False)
class PartialRMSNorm(tokens.PartialRMSNorm, Host): ...


@nnx.dataclass(eq=False)
class QKNorm(tokens.QKNorm, Host): ...


@nnx.dataclass(eq=False)
class VirtualBatchNorm(virtual.VirtualBatchNorm, Host): ...


@nnx.dataclass(eq=False)
class RevIN(reversible.RevIN, Host): ...


@nnx.dataclass(eq=False)
class Conditioned(Keeping):
    """A host of layers with a condition `[n, condition_features]`."""

    condition_features: int

    def _shapes(self) -> tuple[Shape, ...]:
        return (*super()._shapes(), (None, self.condition_features))


@nnx.dataclass(eq=False)
class Labelled(Keeping):
    """A host of layers with a map of labels: so many channels, on so many axes of space."""

    label_features: int
    space: int = 2

    def _shapes(self) -> tuple[Shape, ...]:
        layout = self.layout.replace("...", " ".join(["..."] * self.space))
        return whole_shape(self.features, layout), whole_shape(self.label_features, layout)


@nnx.dataclass(eq=False)
class AdaIN(conditional.AdaIN, Bare): ...


@nnx.dataclass(eq=False)
class ConditionalNorm(conditional.ConditionalNorm, Keeping): ...


@nnx.dataclass(eq=False)
class FiLM(film.FiLM, Conditioned): ...


@nnx.dataclass(eq=False)
class AdaLN(film.AdaLN, Conditioned): ...


@nnx.dataclass(eq=False)
class AdaLNZero(film.AdaLNZero, Conditioned): ...


@nnx.dataclass(eq=False)
class SPADE(spade.SPADE, Labelled): ...


@nnx.dataclass(eq=False)
class AlphaDropout(selu.AlphaDropout, Bare):
    # `.train()`, `.eval()` and `nnx.view` set `deterministic`; `rngs` are random keys or a stream, here or at the call.
    deterministic: bool | None = False
    rngs: InitVar[nnx.Rngs | nnx.RngStream | None] = None

    def __post_init__(self, rngs: nnx.Rngs | nnx.RngStream | None):
        super().__post_init__()
        stream = rngs[self.rng_collection] if isinstance(rngs, nnx.Rngs) else rngs
        self.rngs = nnx.data(None) if stream is None else stream.fork()  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self,
        x: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Drops elements of x.

        Args:
          x: floating-point array of any shape.
          deterministic: whether the input passes as it is; here or to the constructor.
          rngs: random keys, a stream of them or one key, that replace those of the constructor.

        Returns:
          An array of the shape of x.

        Raises:
          ValueError: `deterministic` or the random keys were given neither here nor to the constructor.
        """
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
        """Class method used by `nnx.view`.

        Args:
          deterministic: whether the input passes as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic


@nnx.dataclass(eq=False)
class SwitchableNorm(switchable.SwitchableNorm, Keeping): ...


@nnx.dataclass(eq=False)
class KalmanNorm(kalman.KalmanNorm, Keeping): ...
