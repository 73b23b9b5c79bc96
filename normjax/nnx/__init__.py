"""Flax nnx modules: parameters and running statistics, no arithmetic of their own.

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

`layers.py` lists the layers that are described in `normjax/_layers`; `host.py` holds their variables.
"""

from normjax.nnx import layers
from normjax.nnx.flax_names import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from normjax.nnx.host import Moments, Penalty
from normjax.nnx.layers import *  # noqa: F403
from normjax.nnx.recurrent import RNN, GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from normjax.nnx.swap import swap_layers
from normjax.nnx.weights import Conv, Linear, SpectralNorm, WeightNorm

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
__all__ += ["RNN", "GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"]
__all__ += ["Conv", "Linear", "Moments", "Penalty", "SpectralNorm", "WeightNorm", "swap_layers"]
__all__ += layers.__all__
