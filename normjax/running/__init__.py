"""Running statistics as values: what is stored for inference, and pure functions that update it.

How a batch moves what is stored, by `averaging` (t counts the batches seen, one number for each stored element):

    exponential    momentum * old + (1 - momentum) * new                                 as Flax; starts from 0 and 1
    debiased       exponential, divided by the weight that it gives to batches, 1 - momentum ** t: the start does not count
    cumulative     the mean of all batches, old + (new - old) / t

What is stored is always the average itself, ready for use.
"""

from normjax.running.averaging import require_unbiased, unbiased, update
from normjax.running.merging import mean_of_parts, merge, merge_averages, merge_stacked
from normjax.running.published import PUBLISHED_AVERAGING, PublishedAveraging, published_start, published_update
from normjax.running.records import BatchRecord, OwnAverage, merge_into, merge_trees, mergeable, recalibrated, record
from normjax.running.renorm import corrections, limits_at, renormalized, require_renormalizable
from normjax.running.state import AVERAGES, NOTHING, Running, Slot, as_stats, initial, observe, slots, stores

__all__ = ["AVERAGES", "NOTHING", "PUBLISHED_AVERAGING", "BatchRecord", "OwnAverage", "PublishedAveraging", "Running"]
__all__ += ["Slot", "mean_of_parts", "merge_averages"]
__all__ += ["as_stats", "corrections", "initial", "limits_at", "merge", "merge_into", "merge_stacked", "merge_trees"]
__all__ += ["mergeable", "observe", "published_start", "published_update", "recalibrated", "record", "renormalized"]
__all__ += ["require_renormalizable", "require_unbiased", "slots", "stores", "unbiased", "update"]
