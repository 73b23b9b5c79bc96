"""Everything of `flax.nnx`, where these names are the layers of `normjax.nnx`.

    BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm        normalization
    SpectralNorm, WeightNorm                                      normalized kernels
    GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell              cells, normalized where `normalizer` is given

All have Flax's arguments, variables and checkpoints, and subclass Flax's. All else is Flax's own: `Linear` and `Conv`,
since ours of these names have normalized kernels; `RNN`, since ours holds the state of a sequence that is over, and
Flax's goes on over the padding. A cell with a penalty needs `normjax.nnx.RNN`.
"""

import typing as _typing

from flax.nnx import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
from flax.nnx import bridge as bridge
from flax.nnx import compat as compat
from flax.nnx import graph as graph
from flax.nnx import graphlib as graphlib
from flax.nnx import initializers as initializers
from flax.nnx import metrics as metrics
from flax.nnx import nn as nn
from flax.nnx import spmd as spmd
from flax.nnx import traversals as traversals

from normjax.nnx import BatchNorm as BatchNorm
from normjax.nnx import GroupNorm as GroupNorm
from normjax.nnx import GRUCell as GRUCell
from normjax.nnx import InstanceNorm as InstanceNorm
from normjax.nnx import LayerNorm as LayerNorm
from normjax.nnx import LSTMCell as LSTMCell
from normjax.nnx import OptimizedLSTMCell as OptimizedLSTMCell
from normjax.nnx import RMSNorm as RMSNorm
from normjax.nnx import SimpleCell as SimpleCell
from normjax.nnx import SpectralNorm as SpectralNorm
from normjax.nnx import WeightNorm as WeightNorm

if not _typing.TYPE_CHECKING:  # a checker would take every name for known
    from flax import nnx as _flax

    from normjax.flax._late import late as _late

    __getattr__ = _late(_flax)
