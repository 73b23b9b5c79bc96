"""Flax nnx modules: parameters and running statistics, no arithmetic of their own.

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

One file for each room of pure functions; `norms.py` holds `Norm`, which is any row of the table, and Flax's own layers.
"""

from normjax.nnx.around import FilterResponseNorm, PartialRMSNorm, QKNorm, ScaleNorm, VirtualBatchNorm
from normjax.nnx.conditional import SPADE, AdaIN, AdaLN, AdaLNZero, ConditionalNorm, FiLM
from normjax.nnx.gdn import GDN
from normjax.nnx.layers import KalmanNorm, SwitchableNorm
from normjax.nnx.norms import (
    BatchNorm,
    BatchRenorm,
    DivisiveNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    LocalContrastNorm,
    LocalResponseNorm,
    Moments,
    Norm,
    Penalty,
    RMSNorm,
)
from normjax.nnx.recurrent import RNN, GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from normjax.nnx.reversible import RevIN
from normjax.nnx.rows import (
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
from normjax.nnx.selu import AlphaDropout
from normjax.nnx.units import GRN, TLU, Derf, DyT, EvoNormB0, EvoNormS0
from normjax.nnx.weights import Conv, Linear, SpectralNorm, WeightNorm

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
    "Linear",
    "LinfBatchNorm",
    "LocalContextNorm",
    "LocalContrastNorm",
    "LocalResponseNorm",
    "LpBatchNorm",
    "Moments",
    "Norm",
    "OptimizedLSTMCell",
    "PartialRMSNorm",
    "Penalty",
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
