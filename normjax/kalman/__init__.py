"""Kalman normalization: statistics that travel through the layers (Wang et al. 2018).

A small batch tells little about the mean and variance of a layer; the layer before it and the kernel between them tell
more. A `Belief` is a mean and a variance, laid beside an array as `Stats` are. Each layer mixes the prediction (prior) with
what its batch shows (m, v), by a gain q between 0 and 1, and normalizes with the result:

    predict     mean_p, var_p of the next layer, from the state, the activation and the kernel: `normjax.propagate.predict`
    mix         mean = mean_p + q (m - mean_p)                                                          `mix_beliefs`
                var  = var_p + q (v - var_p) + q (1 - q) (m - mean_p) ** 2
    normalize   y = scale * (x - mean) / sqrt(var + eps) + bias                                         `kalman_normalize`

The second line gives the mean and variance of a mixture, 1 - q parts prior and q parts batch. The gain is a number (0.1 for
micro-batches, 0.95 for large ones) or learned. The first layer has no prior: `None` is plain normalization.
"""

from normjax.kalman.mixing import logit, mix_beliefs, require_gain
from normjax.kalman.normalize import (
    STORED,
    Kalman,
    kalman_normalize,
    normalize_by_belief,
    require_kalman_row,
    statistics_to_store,
)

__all__ = ["STORED", "Kalman", "kalman_normalize", "logit", "mix_beliefs", "normalize_by_belief", "require_gain"]
__all__ += ["require_kalman_row", "statistics_to_store"]
