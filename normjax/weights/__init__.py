"""Normalized kernels: the equation of `theory.py` on weights, with averages over the inputs of each output.

A kernel is laid out as Flax does, `"... i o"`: space, inputs, outputs. The field of every function here is `"... i"`: all
that one output sums. A norm is a sum and a field an average, so a norm is the moment with gain = fan-in, the size of
the field. No statistic mixes examples, so nothing is stored and inference is the same function. Each function gives the
kernel that enters the product, in the shape and dtype of the one that it is given; statistics are float32 or wider.
"""

from normjax.weights._kernel import EPS_RULES, INPUTS, KERNEL, OUTPUTS
from normjax.weights.norm import (
    BOUNDS,
    bounded_weight_norm,
    centred_weight_norm,
    norm_bound,
    weight_centring,
    weight_norm,
)
from normjax.weights.standardization import scaled_weight_standardization, weight_standardization

__all__ = ["BOUNDS", "EPS_RULES", "INPUTS", "KERNEL", "OUTPUTS"]
__all__ += ["bounded_weight_norm", "centred_weight_norm", "norm_bound", "weight_centring", "weight_norm"]
__all__ += ["scaled_weight_standardization", "weight_standardization"]
