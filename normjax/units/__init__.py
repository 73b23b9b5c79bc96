"""Units that normalize as they bend: nonlinearities in place of a normalizer, or with one inside. SELU is in `normjax.selu`.

    scaled_relu    (relu(x) - 1 / sqrt(2 pi)) * sqrt(2 pi / (pi - 1))            of N(0, 1): mean 0, variance 1
    tlu            max(x, tau_c)
    dyt            scale * tanh(alpha * x) + bias
    derf           scale * erf(alpha * x + shift) + bias
    evonorm_b0     x / max(sqrt(var_B + eps), v * x + sqrt(var_I + eps)) * scale + bias       B batch, I instance
    evonorm_s0     x * sigmoid(v * x) / sqrt(var_G + eps) * scale + bias                      G group
    grn            scale * x * g_c / (mean_c g + eps) + bias + x,  g = |x| over space

Statistics are those of `theory.py`: fields say what is averaged, masks and mapped axes included.
"""

from normjax.units.elementwise import RELU_MEAN, derf, dyt, scaled_relu, tlu
from normjax.units.statistical import EvoNormed, evonorm_b0, evonorm_row, evonorm_s0, grn

__all__ = [
    "RELU_MEAN",
    "EvoNormed",
    "derf",
    "dyt",
    "evonorm_b0",
    "evonorm_row",
    "evonorm_s0",
    "grn",
    "scaled_relu",
    "tlu",
]
