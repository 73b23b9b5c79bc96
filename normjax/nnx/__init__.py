"""Flax nnx modules: parameters and running statistics, no arithmetic of their own.

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

`layers.py` lists the layers that are described in `normjax/_layers`; `host.py` holds their variables.
"""

from normjax.nnx import layers
from normjax.nnx.around import FilterResponseNorm, PartialRMSNorm, QKNorm, ScaleNorm, VirtualBatchNorm
from normjax.nnx.conditional import SPADE, AdaIN, AdaLN, AdaLNZero, ConditionalNorm, FiLM
from normjax.nnx.flax_names import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from normjax.nnx.gdn import GDN
from normjax.nnx.host import Moments, Penalty
from normjax.nnx.kalman import KalmanNorm
from normjax.nnx.layers import *  # noqa: F403
from normjax.nnx.recurrent import RNN, GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from normjax.nnx.reversible import RevIN
from normjax.nnx.selu import AlphaDropout
from normjax.nnx.switchable import SwitchableNorm
from normjax.nnx.weights import Conv, Linear, SpectralNorm, WeightNorm

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
    "FiLM",
    "FilterResponseNorm",
    "GRUCell",
    "GroupNorm",
    "InstanceNorm",
    "KalmanNorm",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "Moments",
    "OptimizedLSTMCell",
    "PartialRMSNorm",
    "Penalty",
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
