"""Generalized divisive normalization: the suppression field has learned weights, and the transformation has an inverse.

    q_i = beta_i + sum_j gamma_ij |x_j| ** alpha          the pool, over the channels of one position
    y_i = x_i / q_i ** epsilon                            GDN
    x_i = y_i * q_i(y) ** epsilon                         IGDN, with beta and gamma of its own

Weights that are equal, or equal within a window, make it a row of the equation (`theory.py`): "rms", "response".

alpha and epsilon are exponents here, as in the papers: *epsilon is not the small number `eps`* that other families add to a
moment; in GDN beta takes its place. What a layer learns in their place is in `learned.py`.
"""

from normjax.gdn.learned import (
    GRADIENTS,
    MINIMA,
    OFFSET,
    Raw,
    diagonal,
    gdn_of_raw,
    nonnegative,
    shapes,
    to_raw,
    towards_bound,
)
from normjax.gdn.pool import gdn, igdn, inverse

__all__ = ["GRADIENTS", "MINIMA", "OFFSET", "Raw", "diagonal", "gdn", "gdn_of_raw"]
__all__ += ["igdn", "inverse", "nonnegative", "shapes", "to_raw", "towards_bound"]
