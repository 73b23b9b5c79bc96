"""Everything of `flax`, with our layers where Flax's have their arguments and checkpoints: one changed line of a program.

    from normjax.flax import linen as nn        # for: from flax import linen as nn
    import normjax.flax.linen as nn             # for: import flax.linen as nn
    from normjax.flax import nnx                # for: from flax import nnx
    from normjax import flax                    # for: import flax

What the program writes as `nn.LayerNorm` is then `normjax.linen.LayerNorm`; `nn.Module`, `nn.Dense`, `nn.initializers`
and all the rest are Flax's own objects. `linen.py` and `nnx.py` list what is ours.
"""

import typing as _typing

from flax import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
from flax import core as core
from flax import jax_utils as jax_utils
from flax import serialization as serialization
from flax import struct as struct
from flax import training as training
from flax import traverse_util as traverse_util

import normjax.flax.linen as linen  # noqa: F401 (by `from`, these would be those that the star has brought)
import normjax.flax.nnx as nnx  # noqa: F401

if not _typing.TYPE_CHECKING:  # a checker would take every name for known
    import flax as _flax

    from normjax.flax._late import late as _late

    __getattr__ = _late(_flax)
