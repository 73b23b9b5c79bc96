"""Everything of `flax.linen`, where these names are the layers of `normjax.linen`.

    BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm        normalization
    SpectralNorm, WeightNorm                                      normalized kernels
    GRUCell, LSTMCell, OptimizedLSTMCell, SimpleCell              cells, normalized where `normalizer` is given

All have Flax's arguments, parameters and checkpoints, and subclass Flax's. All else is Flax's own: `Dense` and `Conv`,
since ours of these names have normalized kernels; `RNN`, since ours holds the state of a sequence that is over, and
Flax's goes on over the padding. A cell with running statistics or a penalty needs `normjax.linen.RNN`.
"""

import typing as _typing

from flax.linen import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
from flax.linen import activation as activation
from flax.linen import attention as attention
from flax.linen import initializers as initializers
from flax.linen import linear as linear
from flax.linen import module as module
from flax.linen import partitioning as partitioning
from flax.linen import pooling as pooling
from flax.linen import recurrent as recurrent
from flax.linen import spmd as spmd
from flax.linen import stochastic as stochastic
from flax.linen import summary as summary
from flax.linen import transforms as transforms

from normjax.linen import BatchNorm as BatchNorm
from normjax.linen import GroupNorm as GroupNorm
from normjax.linen import GRUCell as GRUCell
from normjax.linen import InstanceNorm as InstanceNorm
from normjax.linen import LayerNorm as LayerNorm
from normjax.linen import LSTMCell as LSTMCell
from normjax.linen import OptimizedLSTMCell as OptimizedLSTMCell
from normjax.linen import RMSNorm as RMSNorm
from normjax.linen import SimpleCell as SimpleCell
from normjax.linen import SpectralNorm as SpectralNorm
from normjax.linen import WeightNorm as WeightNorm

if not _typing.TYPE_CHECKING:  # a checker would take every name for known
    from flax import linen as _flax

    from normjax.flax._late import late as _late

    __getattr__ = _late(_flax)
