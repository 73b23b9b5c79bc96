"""Each layer described once, without Flax: options, documentation, what it keeps, and its call.

`linen` and `nnx` add variables: a face is the description and a host, `class DyT(units.DyT, Host)`. Read `describe.py`
first, then one host (`normjax/linen/host.py` or `normjax/nnx/host.py`).
"""

from normjax._layers import (  # noqa: F401
    batch,
    conditional,
    evonorm,
    film,
    gdn,
    kalman,
    norm,
    presets,
    residual,
    response,
    reversible,
    selu,
    spade,
    switchable,
    tokens,
    units,
    virtual,
)
