"""The faces of the layers in Flax linen: a description of `normjax/_layers` and a host of `host.py` each."""

from normjax._layers import batch, evonorm, norm, presets, units
from normjax.linen.host import Host, Keeping

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


class Norm(norm.Norm, Keeping): ...


class BatchRenorm(presets.BatchRenorm, Keeping): ...


class DivisiveNorm(presets.DivisiveNorm, Keeping): ...


class L1BatchNorm(batch.L1BatchNorm, Keeping): ...


class LpBatchNorm(batch.LpBatchNorm, Keeping): ...


class TopKBatchNorm(batch.TopKBatchNorm, Keeping): ...


class LinfBatchNorm(batch.LinfBatchNorm, Keeping): ...


class VarianceNorm(presets.VarianceNorm, Keeping): ...


class ExtendedBatchNorm(presets.ExtendedBatchNorm, Keeping): ...


class PositionNorm(presets.PositionNorm, Keeping): ...


class LocalContextNorm(presets.LocalContextNorm, Keeping): ...


class GhostBatchNorm(batch.GhostBatchNorm, Keeping): ...


class RangeBatchNorm(batch.RangeBatchNorm, Keeping): ...


class GhostTopKBatchNorm(batch.GhostTopKBatchNorm, Keeping): ...


class LocalResponseNorm(presets.LocalResponseNorm, Host): ...


class LocalContrastNorm(presets.LocalContrastNorm, Host): ...


class TLU(units.TLU, Host): ...


class DyT(units.DyT, Host): ...


class Derf(units.Derf, Host): ...


class EvoNormB0(evonorm.EvoNormB0, Keeping): ...


class EvoNormS0(evonorm.EvoNormS0, Host): ...


class GRN(units.GRN, Host): ...
