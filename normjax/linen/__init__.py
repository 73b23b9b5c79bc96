"""Flax linen modules: parameters and running statistics, no arithmetic of their own.

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

`layers.py` lists the layers that are described in `normjax/_layers`; `host.py` holds their variables.
"""

from normjax.linen import layers
from normjax.linen.flax_names import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from normjax.linen.layers import *  # noqa: F403
from normjax.linen.recurrent import RNN, GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell
from normjax.linen.swap import swap_layers
from normjax.linen.weights import Conv, Dense, SpectralNorm, WeightNorm

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
__all__ += ["RNN", "GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"]
__all__ += ["Conv", "Dense", "SpectralNorm", "WeightNorm", "swap_layers"]
__all__ += layers.__all__
