"""What the layers of a model saw of several batches, stored at once: micro-batches, and recalibration over a data set.

A layer leaves a `Seen` of each batch (linen sows it into `moments`, nnx captures it as `Moments`). Statistics that merge
(`running.merge`) are stored as if the layer had seen all the batches as one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from normjax.running import Running, merge_stacked, unbiased, update
from normjax.theory import Stats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """What a layer saw of a batch, for those who store the statistics of several batches at once.

    Attributes:
      stats: from `observe`; biased where they merge.
      momentum: as for `update`.
      averaging: as for `update`.
      unbiased: whether the variance is still to be corrected (`unbias`).
      mergeable: whether the statistics of two batches give those of both.
    """

    stats: Stats
    momentum: Any
    averaging: str = dataclasses.field(metadata={"static": True}, default="exponential")
    unbiased: bool = dataclasses.field(metadata={"static": True}, default=False)
    mergeable: bool = dataclasses.field(metadata={"static": True}, default=True)


def merge_trees(before: Any, after: Any, seen: Any) -> Any:
    """Running statistics after several micro-batches, each of which started from those before.

    A layer that left what it saw of each micro-batch gets that merged, as if it had seen all at once. Anything else is
    averaged where it is a float; counters and random states are those of the last micro-batch.

    Args:
      before: nested dictionaries of running statistics, a layer's by their names in `Running`.
      after: the same, stacked: the result of each micro-batch along a first axis.
      seen: nested dictionaries with `batch: (Seen,)` under a layer's path, stacked the same.

    Returns:
      A tree like `before`.

    >>> before = {"norm": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
    >>> after = {"norm": {"mean": jnp.array([0.5, 1.5]), "var": jnp.array([1.0, 1.0])}}       # momentum 0.5, by itself
    >>> parts = Stats(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> merged = merge_trees(before, after, {"norm": {"batch": (Seen(parts, jnp.array([0.5, 0.5])),)}})
    >>> merged["norm"]["mean"].item(), merged["norm"]["var"].item()                          # of both: mean 2, variance 2
    (1.0, 1.5)
    """
    if not isinstance(before, Mapping):
        after = jnp.asarray(after)
        if jnp.issubdtype(after.dtype, jnp.inexact):
            return jnp.mean(after, 0).astype(after.dtype)
        return after[-1]
    left = seen.get("batch") if isinstance(seen, Mapping) else None
    if left is not None and len(left) == 1:
        mine = {name: value for name, value in before.items() if name in Running._fields}
        new = absorb(Running(**mine), left[0])._asdict()
        return {k: new[k] if k in mine else merge_trees(before[k], after[k], {}) for k in before}
    below = seen if isinstance(seen, Mapping) else {}
    return {k: merge_trees(before[k], after[k], below.get(k, {})) for k in before}


def absorb(running: Running, seen: Seen) -> Running:
    """The stored statistics after one update with what a layer saw of several batches, stacked along a first axis."""
    return update(running, _together(seen.stats, seen), seen.momentum[0], seen.averaging)


def _together(stats: Stats, seen: Seen) -> Stats:
    """The statistics of stacked batches as one, to be stored."""
    merged = merge_stacked(stats, seen.mergeable)
    return unbiased(merged) if seen.unbiased else merged


def recalibrated(before: Any, seen: Any, path: str = "") -> Any:
    """Running statistics replaced by those of several batches together.

    Args:
      before: nested dictionaries of running statistics.
      seen: nested dictionaries with `batch: (Seen, ...)` under a layer's path, one for each of its calls, stacked along a
        first axis of batches.
      path: of `before`, for errors.

    Returns:
      A tree like `before`; counts are the number of batches. Elements without weight keep what was stored.

    Raises:
      ValueError: a layer with running statistics left nothing.

    >>> parts = Stats(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> before = {"norm": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
    >>> recalibrated(before, {"norm": {"batch": (Seen(parts, jnp.array([0.9, 0.9])),)}})["norm"]["var"]
    Array(2., dtype=float32)
    """
    if not isinstance(before, Mapping):
        return before
    seen = seen if isinstance(seen, Mapping) else {}
    stored = {k: v for k, v in before.items() if k in Running._fields and not isinstance(v, Mapping)}
    new: dict[str, Any] = {}
    if stored and not seen.get("batch"):
        raise ValueError(f"layer {path!r} stores {', '.join(stored)} but saw no batch: it is not one of normjax's, or it "
                         "was not called")  # fmt: skip
    if stored:
        calls = seen["batch"]
        stats = Stats(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *(tuple(call.stats) for call in calls)))
        merged = merge_stacked(stats, calls[0].mergeable)
        found = update(
            Running(stored.get("mean"), stored.get("var")), unbiased(merged) if calls[0].unbiased else merged, 0.0
        )
        counts = {k: jnp.full_like(v, len(calls[0].momentum)) for k, v in stored.items() if k.endswith("_count")}
        new = {**{k: v for k, v in found._asdict().items() if k in stored}, **counts}
    return {
        k: new[k] if k in new else recalibrated(v, seen.get(k, {}), f"{path}.{k}" if path else k)
        for k, v in before.items()
    }
