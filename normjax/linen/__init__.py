"""Flax linen modules: parameters and running statistics, no arithmetic of their own.

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

`layers.py` lists the layers that are described in `normjax/_layers`; `host.py` holds their variables.
"""

from normjax.linen import layers
from normjax.linen.around import FilterResponseNorm, PartialRMSNorm, QKNorm, ScaleNorm, VirtualBatchNorm
from normjax.linen.conditional import SPADE, AdaIN, AdaLN, AdaLNZero, ConditionalNorm, FiLM
from normjax.linen.flax_names import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from normjax.linen.gdn import GDN
from normjax.linen.kalman import KalmanNorm
from normjax.linen.layers import *  # noqa: F403
from normjax.linen.recurrent import RNN, GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from normjax.linen.reversible import RevIN
from normjax.linen.selu import AlphaDropout
from normjax.linen.switchable import SwitchableNorm
from normjax.linen.weights import Conv, Dense, SpectralNorm, WeightNorm

__all__ = [
    "GDN",
    "RNN",
    "SPADE",
    "AdaIN",
    "AdaLN",
    "AdaLNZero",
    "AlphaDropout",
    "BatchNorm",
    "ConditionalNorm",
    "Conv",
    "Dense",
    "FiLM",
    "FilterResponseNorm",
    "GRUCell",
    "GroupNorm",
    "InstanceNorm",
    "KalmanNorm",
    "LSTMCell",
    "LayerNorm",
    "OptimizedLSTMCell",
    "PartialRMSNorm",
    "QKNorm",
    "RMSNorm",
    "RevIN",
    "ScaleNorm",
    "SimpleCell",
    "SpectralNorm",
    "SwitchableNorm",
    "VirtualBatchNorm",
    "WeightNorm",
]
__all__ += layers.__all__
