"""What normalization does to a network: numbers of a layer's activations and of the loss's gradient there.

Units are the channels, axis `c` of the layout; every other axis counts as samples of them. Examples are axis `n`; all
that an example holds is one vector. Most numbers here are inner products of such vectors at length one, so they are the
equation's own rows: centred and divided over the samples, units give their correlations; divided over all of an example,
examples give their cosines.

    z = activations of one layer, after the nonlinearity or before
    correlation(z), mutual_information(z), joint_histogram(z[..., 0], z[..., 1])    Ren et al. 2017
    activation_size(z), cosine_similarity(z), stable_rank(z), gradient_norm(dz)     Lubana et al. 2021
    dead_units(z), effective_learning_rate(eta, norms)                              Lyle et al. 2024
    report({"conv1": z, ...}, {"conv1": dz, ...})                                   all of them, by layer

Everything is a pure function of arrays that jit compiles, in float32 or wider. `normjax.capture` takes the arrays from a
model. Where a statistic is of samples or examples, `axis_name` names the mapped axes over which they are spread.
"""

from normjax.diagnostics.histograms import (
    Histogram,
    information,
    joint_histogram,
    mutual_information,
    mutual_information_matrix,
)
from normjax.diagnostics.layers import report
from normjax.diagnostics.norms import effective_learning_rate, gradient_norm, weight_norms
from normjax.diagnostics.similarity import correlation, correlation_matrix, cosine_similarity, stable_rank
from normjax.diagnostics.units import UnitMoments, activation_size, dead_units, unit_moments

__all__ = ["Histogram", "UnitMoments", "activation_size", "correlation", "correlation_matrix", "cosine_similarity"]
__all__ += ["dead_units", "effective_learning_rate", "gradient_norm", "information", "joint_histogram"]
__all__ += ["mutual_information", "mutual_information_matrix", "report", "stable_rank", "unit_moments", "weight_norms"]
