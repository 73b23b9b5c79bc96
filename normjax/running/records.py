"""What the layers of a model measured on several batches, stored at once: micro-batches, and recalibration over a data set.

A layer leaves a `BatchRecord` of each batch (linen sows it into `moments`, nnx captures it as `Moments`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax.field import EXAMPLES
from normjax.running import averaging as averages
from normjax.running.averaging import require_unbiased, update
from normjax.running.merging import mean_of_parts, merge_averages, merge_stacked
from normjax.running.state import Running, observe
from normjax.theory import Normalizer, Stats, row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchRecord:
    """What a layer saw of a batch, for those who store the statistics of several batches at once.

    Attributes:
      stats: statistics of the batch in the shapes that are stored, from `observe`; biased where they merge.
      momentum: weight of the old value, a scalar.
      averaging: "exponential", "debiased" or "cumulative", see `normjax.running`.
      unbiased: whether the variance is still to be corrected (`normjax.running.unbiased`).
      mergeable: whether the statistics of two batches give those of both.

    >>> BatchRecord(Stats(jnp.array(1.0)), jnp.array(0.9)).averaging
    'exponential'
    """

    stats: Stats
    momentum: jax.Array
    averaging: str = dataclasses.field(metadata={"static": True}, default="exponential")
    unbiased: bool = dataclasses.field(metadata={"static": True}, default=False)
    mergeable: bool = dataclasses.field(metadata={"static": True}, default=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnAverage:
    """What is known of a layer of another library that averages by itself, in the place of a `BatchRecord`.

    Attributes:
      momentum: weight of the old mean and variance in its exponential average.

    Source: Ioffe & Szegedy 2015, section 3.1 (moving averages).

    >>> jax.tree.leaves(OwnAverage(0.9))
    []
    """

    momentum: float = dataclasses.field(metadata={"static": True})


def merge_trees(before: Any, after: Any, seen: Any) -> Any:
    """Running statistics, a tree like `before`, after several micro-batches, each of which started from those before.

    A layer that left what it saw of each micro-batch gets that merged, as if it had seen all at once; so do the mean and
    the variance under an `OwnAverage`. Anything else is averaged where it is a float; counters are those of the last.

    Args:
      before: nested dictionaries of running statistics, a layer's by their names in `Running`.
      after: nested dictionaries like `before`, stacked: the result of each micro-batch along a first axis.
      seen: nested dictionaries with `batch: (BatchRecord, ...)`, one a call, under a layer's path, micro-batches along a
        first axis.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.

    >>> before = {"norm": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
    >>> after = {"norm": {"mean": jnp.array([0.5, 1.5]), "var": jnp.array([1.0, 1.0])}}       # momentum 0.5, by itself
    >>> parts = Stats(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> merged = merge_trees(before, after, {"norm": {"batch": (BatchRecord(parts, jnp.array([0.5, 0.5])),)}})
    >>> merged["norm"]["mean"].item(), merged["norm"]["var"].item()                          # of both: mean 2, variance 2
    (1.0, 1.5)
    """
    if not isinstance(before, Mapping):
        after = jnp.asarray(after)
        return mean_of_parts(after) if jnp.issubdtype(after.dtype, jnp.inexact) else after[-1]
    left = seen.get("batch") if isinstance(seen, Mapping) else None
    if isinstance(left, OwnAverage) and {"mean", "var"} <= set(before):
        mean, var = merge_averages(after["mean"], after["var"], left.momentum)
        return {**{k: merge_trees(before[k], after[k], {}) for k in before}, "mean": mean, "var": var}
    if isinstance(left, tuple):  # a record a call, in turn; a layer may be called "batch" too
        mine = {name: value for name, value in before.items() if name in Running._fields}
        new = functools.reduce(merge_into, left, Running(**mine))._asdict()
        return {k: _as_stored(new[k], mine[k]) if k in mine else merge_trees(before[k], after[k], {}) for k in before}
    below = seen if isinstance(seen, Mapping) else {}
    return {k: merge_trees(before[k], after[k], below.get(k, {})) for k in before}


def merge_into(running: Running, seen: BatchRecord) -> Running:
    """The stored statistics after one update with what a layer saw of several batches, stacked along a first axis.

    Layers side by side (`vmap`, `scan`) have axes of their own: in front of what is stored, behind the batches of `seen`.

    >>> parts = Stats(jnp.array([1.0, 3.0]), None, jnp.array([2.0, 2.0]), None)
    >>> merge_into(Running(jnp.array(0.0)), BatchRecord(parts, jnp.array([0.5, 0.5]))).mean
    Array(1., dtype=float32)
    """

    def one(running: Running, seen: BatchRecord) -> Running:
        merged = merge_stacked(seen.stats, seen.mergeable)
        merged = averages.unbiased(merged) if seen.unbiased else merged
        return update(running, merged, seen.momentum[0], seen.averaging)

    for _ in range(seen.momentum.ndim - 1):
        one = jax.vmap(one, in_axes=(0, 1))
    return one(running, seen)


def recalibrated(before: Any, seen: Any, path: str = "") -> Any:
    """Running statistics, a tree like `before`, replaced by those of several batches together; so are their counts.

    Elements without weight keep what was stored; a layer with running statistics that left nothing is an error.

    Args:
      before: nested dictionaries of running statistics.
      seen: nested dictionaries with `batch: (BatchRecord, ...)`, one a call, at a layer's path, batches along a first axis.
      path: where `before` lies in the model, for errors.

    Source: Ioffe & Szegedy 2015, algorithm 2, lines 8 to 10.

    >>> parts = Stats(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> before = {"norm": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
    >>> recalibrated(before, {"norm": {"batch": (BatchRecord(parts, jnp.array([0.9, 0.9])),)}})["norm"]["var"]
    Array(2., dtype=float32)
    """
    if not isinstance(before, Mapping):
        return before
    seen = seen if isinstance(seen, Mapping) else {}
    stored = {k: v for k, v in before.items() if k in Running._fields and not isinstance(v, Mapping)}
    new = {}
    if stored:
        calls = seen.get("batch")
        if not isinstance(calls, tuple):
            raise ValueError(
                f"layer {path!r} stores {', '.join(stored)} but saw no batch: it is not one of normjax's; or it was not "
                "called, or only in a branch or a loop such as `cond`; or it has update_running_average=False; or it is "
                'lifted by `nn.scan` or `nn.vmap` of linen without variable_axes={"moments": 0}'
            )
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *calls)
        whole = dataclasses.replace(whole, momentum=jnp.zeros_like(whole.momentum), averaging="exponential")
        new = merge_into(Running(stored.get("mean"), stored.get("var")), whole)._asdict()
        new = {name: value if value is None else _as_stored(value, stored[name]) for name, value in new.items()}
        for name in ("mean", "var"):
            if (old := stored.get(f"{name}_count")) is not None:
                batches = jnp.sum(getattr(whole.stats, f"{name}_weight") > 0, 0).astype(old.dtype)
                new[f"{name}_count"] = jnp.where(batches > 0, batches, old)
    below = {k: (v, seen.get(k, {}), f"{path}.{k}" if path else k) for k, v in before.items() if k not in stored}
    return {k: new[k] if k in stored else recalibrated(*below[k]) for k in before}


def _as_stored(new: jax.Array, old: ArrayLike) -> jax.Array:
    """A statistic in the dtype that is stored; a complex mean replaces a real one as it is."""
    dtype = jnp.asarray(old).dtype
    return new if jnp.iscomplexobj(new) and not jnp.issubdtype(dtype, jnp.complexfloating) else new.astype(dtype)


def mergeable(normalizer: Normalizer | str, layout: str) -> bool:
    """Whether the statistics of two batches give those of both, by `normjax.running.merge`.

    A moment around a mean needs order 2 and A = B; no windows, since elements of one window have different means; and no
    examples that stand beside each other with statistics of their own (blocks of n, or n unnamed beside `@n`).

    >>> from normjax import TABLE
    >>> mergeable(TABLE["batch"], "n ... c"), mergeable(TABLE["ghost"], "n ... c")
    (True, False)
    """
    normalizer = row(normalizer)
    a, b = normalizer.mean, normalizer.var
    if b is None:
        return True
    if a is None or normalizer.order != 2:
        return normalizer.order == 2
    named = EXAMPLES not in layout.split() or any(span.axis == EXAMPLES for span in b.spans)
    return a == b and named and not any(span.window or (span.blocks and span.axis == EXAMPLES) for span in b.spans)


def record(
    running: Running,
    stats: Stats,
    normalizer: Normalizer | str,
    layout: str,
    shape: tuple[int, ...],
    *,
    momentum: ArrayLike,
    averaging: str = "exponential",
    unbiased: bool = False,
    exact: bool = True,
) -> tuple[Running, BatchRecord]:
    """What a training batch leaves: the statistics to store from now on, and what the layer saw of the batch.

    Args:
      running: what is stored.
      stats: moments with their weights, each broadcasting against the array.
      normalizer: the row that stores them, or its name in TABLE.
      layout: name of each axis of the array.
      shape: of the array, axes as named by `layout`.
      momentum: weight of the old value.
      averaging: of the running statistics, "exponential", "debiased" or "cumulative".
      unbiased: whether the unbiased variance is stored.
      exact: whether the statistics of two batches give those of both, see `mergeable`.

    >>> from normjax import TABLE, normalize
    >>> x, running = jnp.array([[1.0], [3.0]]), Running(jnp.zeros(1), jnp.ones(1))
    >>> running, seen = record(running, normalize(x, "batch").stats, TABLE["batch"], "n c", x.shape, momentum=0.5)
    >>> running.mean, seen.stats.mean
    (Array([1.], dtype=float32), Array([2.], dtype=float32))
    """
    batch = corrected = observe(stats, normalizer, layout, shape)
    if unbiased:
        require_unbiased(normalizer)
        corrected = observe(averages.unbiased(stats), normalizer, layout, shape)
    running = update(running, corrected, momentum, averaging)
    # As wide as the statistics: rounded to float32, a momentum moves float64 statistics by 1e-8 of themselves.
    width = jnp.result_type(*(jnp.finfo(s.dtype).dtype for s in batch[:2] if s is not None))
    weight = jnp.asarray(momentum).astype(width)
    return running, BatchRecord(batch if exact else corrected, weight, averaging, unbiased and exact, exact)
