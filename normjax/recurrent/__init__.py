"""Normalized recurrent cells as pure steps: the published places of a normalizer in an RNN, an LSTM and a GRU.

    inside         act(norm(W x + U h + b)) at every gate and candidate, and at the LSTM's cell state before its output
                   activation; the cell state is carried raw        Ren et al. 2017: DN, DN*, LN-s, LN-l1, LN*
    separate       norm(W x) + norm(U h) + b, and norm at the LSTM's cell state, which is carried normalized
                                                                    Ren et al. 2017: their BN rows and plain LN
    separate_raw   the same, but the cell state is carried raw      Ba et al. 2016, equations 20 to 22;
                                                                    Cooijmans et al. 2017, equations 6 to 8

Each array that is normalized is a *site* with a scale, a bias and statistics of its own: "i f g o c" of an LSTM inside,
"xifgo hifgo c" where W x and U h are normalized as they are published: all gates at once. The layout is "n c".

`cells.py` has the steps, `site.py` the normalization of one site, `clock.py` what travels beside the states, and
`published.py` the published cells as arguments.
"""

from normjax.recurrent.cells import (
    BIASES,
    GATES,
    PLACES,
    Activation,
    Norm,
    Places,
    Weights,
    gru_step,
    lstm_step,
    simple_step,
    sites,
)
from normjax.recurrent.clock import (
    Carry,
    Clock,
    advance,
    hand_over,
    mean_over_time,
    pack,
    restart,
    start_clock,
    unpack,
    valid,
    with_lengths,
)
from normjax.recurrent.published import REN2017, REN2017_DIALECTS, ba2016, cooijmans2017, ren2017, symmetric_uniform
from normjax.recurrent.site import (
    LAYOUT,
    Site,
    choose_sites,
    needs_clock,
    normalize_site,
    penalty_axes,
    site_slots,
    start_sigma,
)

__all__ = ["BIASES", "GATES", "LAYOUT", "PLACES", "REN2017", "REN2017_DIALECTS"]
__all__ += ["Activation", "Carry", "Clock", "Norm", "Places", "Site", "Weights"]
__all__ += ["gru_step", "lstm_step", "simple_step", "sites"]
__all__ += ["advance", "hand_over", "mean_over_time", "pack", "restart", "start_clock", "unpack", "valid"]
__all__ += ["ba2016", "cooijmans2017", "ren2017", "symmetric_uniform", "with_lengths"]
__all__ += ["choose_sites", "needs_clock", "normalize_site", "penalty_axes", "site_slots", "start_sigma"]
