"""The faces of the layers in Flax nnx: a description of `normjax/_layers` and a host of `host.py` each."""

from flax import nnx

from normjax._layers import batch, evonorm, norm, presets, units
from normjax.nnx.host import Bare, Host, Keeping

__all__ = [
    "GRN",
    "TLU",
    "BatchRenorm",
    "Derf",
    "DivisiveNorm",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "ExtendedBatchNorm",
    "GhostBatchNorm",
    "GhostTopKBatchNorm",
    "L1BatchNorm",
    "LinfBatchNorm",
    "LocalContextNorm",
    "LocalContrastNorm",
    "LocalResponseNorm",
    "LpBatchNorm",
    "Norm",
    "PositionNorm",
    "RangeBatchNorm",
    "TopKBatchNorm",
    "VarianceNorm",
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
