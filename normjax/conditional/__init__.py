"""Conditional normalization: any row of the equation, with a scale and a bias that something else decides.

A `Modulation` is that scale and bias, and perhaps a gate. Where it comes from is what the published methods differ in:

    style        deviation and mean of another image            AdaIN (Huang & Belongie 2017)
    by_class     a row of a table, or a mixture of its rows     conditional instance norm (Dumoulin et al. 2017), batch norm
                                                                (de Vries et al. 2017)
    project      a linear map of a vector                       FiLM (Perez et al. 2018), AdaLN (Peebles & Xie 2023)
    from_map     convolutions of a map of labels                SPADE (Park et al. 2019)

and `modulate` normalizes with it. A learned scale is 1 + what the condition gives, so that nothing in is nothing done.
"""

from normjax.conditional.adaptive import adain, denominator, style
from normjax.conditional.modulation import TOKEN, Modulation, by_class, gated, modulate, project, split_modulation

__all__ = ["TOKEN", "Modulation", "adain", "by_class", "denominator", "gated"]
__all__ += ["modulate", "project", "split_modulation", "style"]
