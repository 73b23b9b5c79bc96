"""Flax linen modules: parameters and running statistics, no arithmetic of their own.

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

One file for each room of pure functions; `norms.py` holds `Norm`, which is any row of the table, and Flax's own layers.
"""

from normjax.linen.around import FilterResponseNorm, PartialRMSNorm, QKNorm, ScaleNorm, VirtualBatchNorm
from normjax.linen.conditional import SPADE, AdaIN, AdaLN, AdaLNZero, ConditionalNorm, FiLM
from normjax.linen.gdn import GDN
from normjax.linen.layers import KalmanNorm, SwitchableNorm
from normjax.linen.norms import (
    BatchNorm,
    BatchRenorm,
    DivisiveNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    LocalContrastNorm,
    LocalResponseNorm,
    Norm,
    RMSNorm,
)
from normjax.linen.recurrent import RNN, GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from normjax.linen.reversible import RevIN
from normjax.linen.rows import (
    ExtendedBatchNorm,
    GhostBatchNorm,
    GhostTopKBatchNorm,
    L1BatchNorm,
    LinfBatchNorm,
    LocalContextNorm,
    LpBatchNorm,
    PositionNorm,
    RangeBatchNorm,
    TopKBatchNorm,
    VarianceNorm,
)
from normjax.linen.selu import AlphaDropout
from normjax.linen.units import GRN, TLU, Derf, DyT, EvoNormB0, EvoNormS0
from normjax.linen.weights import Conv, Dense, SpectralNorm, WeightNorm

__all__ = [
    "GDN",
    "GRN",
    "RNN",
    "SPADE",
    "TLU",
    "AdaIN",
    "AdaLN",
    "AdaLNZero",
    "AlphaDropout",
    "BatchNorm",
    "BatchRenorm",
    "ConditionalNorm",
    "Conv",
    "Dense",
    "Derf",
    "DivisiveNorm",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "ExtendedBatchNorm",
    "FiLM",
    "FilterResponseNorm",
    "GRUCell",
    "GhostBatchNorm",
    "GhostTopKBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "KalmanNorm",
    "L1BatchNorm",
    "LSTMCell",
    "LayerNorm",
    "LinfBatchNorm",
    "LocalContextNorm",
    "LocalContrastNorm",
    "LocalResponseNorm",
    "LpBatchNorm",
    "Norm",
    "OptimizedLSTMCell",
    "PartialRMSNorm",
    "PositionNorm",
    "QKNorm",
    "RMSNorm",
    "RangeBatchNorm",
    "RevIN",
    "ScaleNorm",
    "SimpleCell",
    "SpectralNorm",
    "SwitchableNorm",
    "TopKBatchNorm",
    "VarianceNorm",
    "VirtualBatchNorm",
    "WeightNorm",
]
