"""Running statistics as values: what is stored for inference, and pure functions that update it.

A moment is stored if and only if its own field mixes examples (an atom `n` or `@n`): the other is computed afresh, around
the stored mean. Stored arrays lack the axes that are averaged whole and the axis of examples, so batch norm stores `[c]`
as Flax does. Statistics of blocks of examples are merged first. Nothing that is not finite is ever stored, and a field
without a valid element leaves its statistic as it was.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from normjax.field import EXAMPLES, Field, FieldError, axes, bind
from normjax.theory import Normalizer, Stats


class Running(NamedTuple):
    """Stored statistics, None for a moment that is computed afresh. `mean` in u, `var` in u ** order."""

    mean: Any = None
    var: Any = None


def stores(normalizer: Normalizer) -> Running:
    """Which moments are stored: a pair of booleans.

    >>> from normjax import Normalizer, TABLE
    >>> stores(TABLE["batch"]), stores(TABLE["layer"])
    (Running(mean=True, var=True), Running(mean=False, var=False))
    >>> stores(Normalizer("n ...", "c"))
    Running(mean=True, var=False)
    """
    return Running(*(isinstance(f, Field) and f.mixes_examples for f in (normalizer.mean, normalizer.var)))


def _kept(field: Field, layout: str, ndim: int) -> tuple[int, ...]:
    """The axes that a stored statistic keeps: neither averaged whole nor the axis of examples.

    Raises:
      FieldError: a window slides over the examples.
    """
    where = axes(layout, ndim)
    dropped = set(where.get(EXAMPLES, ()))
    for span in field.spans:
        if span.axis == EXAMPLES and span.window:
            raise FieldError(f"field \"{field}\" slides over the examples ('{span}'), which cannot be stored")
        if span.axis is not None and span.whole:
            dropped |= set(where.get(span.axis, ()))
    return tuple(axis for axis in range(ndim) if axis not in dropped)


def shapes(normalizer: Normalizer, layout: str, shape: tuple[Any, ...]) -> Running:
    """Shapes of the stored statistics for arrays of this shape, None where nothing is stored.

    Lengths may be None where they are not known yet.

    Raises:
      FieldError: a window slides over the examples.

    >>> from normjax import TABLE, Normalizer
    >>> shapes(TABLE["batch"], "n ... c", (8, 32, 32, 64))
    Running(mean=(64,), var=(64,))
    >>> shapes(Normalizer("n ...:3", None), "n ... c", (8, 32, 32, 64))
    Running(mean=(32, 32, 64), var=None)
    """
    found = []
    for stored, field in zip(stores(normalizer), (normalizer.mean, normalizer.var), strict=True):
        kept = _kept(field, layout, len(shape)) if stored and isinstance(field, Field) else None
        found.append(None if kept is None else tuple(shape[axis] for axis in kept))
    return Running(*found)


def initial(normalizer: Normalizer, layout: str, shape: tuple[int, ...]) -> Running:
    """Means of zero and moments of one, float32, as Flax starts.

    >>> from normjax import TABLE
    >>> initial(TABLE["mean_only"], "n c", (8, 2))
    Running(mean=Array([0., 0.], dtype=float32), var=None)
    """
    mean, var = shapes(normalizer, layout, shape)
    return Running(
        None if mean is None else jnp.zeros(mean, jnp.float32), None if var is None else jnp.ones(var, jnp.float32)
    )


def observe(stats: Stats, normalizer: Normalizer, layout: str, shape: tuple[int, ...]) -> Stats:
    """The statistics of a batch in the shapes that are stored, with the weight behind each; blocks of examples merged.

    >>> from normjax import normalize, TABLE
    >>> x = jnp.arange(32.0).reshape(16, 2)
    >>> observe(normalize(x, "ghost").stats, TABLE["ghost"], "n ... c", x.shape).mean.tolist()
    [15.0, 16.0]
    """
    merged: list[tuple[Any, Any]] = []
    pairs = ((normalizer.mean, stats.mean, stats.mean_weight), (normalizer.var, stats.var, stats.var_weight))
    for field, value, weight in pairs:
        if field is None or value is None or weight is None:
            merged.append((None, None))
            continue
        assert isinstance(field, Field)
        kept = _kept(field, layout, len(shape))
        weight = jnp.broadcast_to(jnp.asarray(weight), np.broadcast_shapes(jnp.shape(weight), value.shape))
        rest = tuple(axis for axis in range(len(shape)) if axis not in kept)
        blocks = [span.blocks or 1 for axis, span in bind(field, layout, shape).by("blocks") if axis in rest]
        value = jnp.broadcast_to(value, weight.shape)
        # Repeated over each block of examples alike, so that the sum over examples counts every block the same.
        total = jnp.sum(weight, rest)
        summed, by = jnp.sum(value * weight.astype(value.dtype), rest), jnp.where(total > 0, total, 1)
        mean = jnp.where(total > 0, summed / by.astype(value.dtype), 0)
        length = int(np.prod([weight.shape[axis] for axis in rest])) if blocks else 1
        merged.append((mean, total * (blocks[0] / max(length, 1)) if blocks else total))
    return Stats(merged[0][0], merged[1][0], merged[0][1], merged[1][1])


def as_stats(running: Running, normalizer: Normalizer, layout: str, shape: tuple[int, ...]) -> Stats:
    """Stored statistics laid out beside an array of this shape.

    Raises:
      FieldError: the stored shape is another than arrays of this shape need.

    >>> from normjax import TABLE
    >>> as_stats(Running(jnp.zeros(3), jnp.ones(3)), TABLE["batch"], "n c ...", (8, 3, 4, 4)).mean.shape
    (1, 3, 1, 1)
    """
    laid = []
    triples = zip(("mean", "var"), running, (normalizer.mean, normalizer.var), strict=True)
    for name, value, field in triples:
        if value is None or field is None:
            laid.append(None)
            continue
        assert isinstance(field, Field)
        kept = _kept(field, layout, len(shape))
        want = tuple(shape[axis] for axis in kept)
        value = jnp.asarray(value)
        if value.shape != want:
            raise FieldError(f'the stored {name} has shape {value.shape}, but field "{field}" on an array of shape '
                             f'{shape}, layout "{layout}", needs {want}')  # fmt: skip
        laid.append(value.reshape([n if axis in kept else 1 for axis, n in enumerate(shape)]))
    return Stats(*laid)


def update(running: Running, batch: Stats, momentum: ArrayLike = 0.99) -> Running:
    """The exponential average: momentum * old + (1 - momentum) * new.

    Args:
      running: the stored statistics.
      batch: those of a batch, from `observe`.
      momentum: weight of the old value, as in Flax (PyTorch's is that of the new one).

    Returns:
      New statistics, in the dtype of the old ones (complex where the batch is). Elements without weight or not finite
      keep the old value.

    >>> batch = Stats(mean=jnp.array([1.0, 2.0]), mean_weight=jnp.array([4.0, 0.0]))
    >>> update(Running(jnp.zeros(2), None), batch, momentum=0.5).mean
    Array([0.5, 0. ], dtype=float32)
    """

    def step(old, new, weight):
        if old is None or new is None:
            return old
        dtype = np.result_type(old.dtype, new.dtype) if jnp.iscomplexobj(new) else old.dtype
        m = momentum if isinstance(momentum, float | int) else jnp.asarray(momentum).astype(new.dtype)
        mixed = (m * old.astype(new.dtype) + (1 - m) * new).astype(dtype)
        seen = jnp.isfinite(new) & (True if weight is None else weight > 0)
        old = old.astype(dtype)
        return jax.lax.stop_gradient(jnp.where(_beside(seen, old), _beside(mixed, old), old))

    return Running(step(running.mean, batch.mean, batch.mean_weight), step(running.var, batch.var, batch.var_weight))


def _beside(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value sharded as the stored one, which matters on meshes with explicit axes: a scan carries one type."""
    have, want = jax.typeof(new).sharding, jax.typeof(old).sharding
    if have.spec == want.spec:
        return new
    mesh = have.mesh if want.mesh.empty else want.mesh  # statistics made outside a mesh are replicated on any
    return jax.sharding.reshard(new, jax.sharding.NamedSharding(mesh, want.spec))


def merge(a: Stats, b: Stats, order: float = 2) -> Stats:
    """The statistics of two batches together, from those of each.

    Right for rows whose A and B are the same field, and for moments around zero (A = None).

    Args:
      a: statistics with their weights, as `observe` gives them.
      b: the same of the other batch.
      order: of the moment.

    Raises:
      ValueError: another order than 2: only squares around two means combine.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.

    >>> low, high = jnp.array([0.0, 2.0]), jnp.array([10.0, 14.0])
    >>> one = Stats(jnp.array(1.0), jnp.array(1.0), jnp.array(2.0), jnp.array(2.0))
    >>> other = Stats(jnp.array(12.0), jnp.array(4.0), jnp.array(2.0), jnp.array(2.0))
    >>> merge(one, other).var == jnp.var(jnp.concatenate([low, high]))
    Array(True, dtype=bool)
    """
    if order != 2 and a.var is not None:
        raise ValueError(f"moments of order {order!r} cannot be merged, only those of order 2")

    def share(wa, wb):
        total = wa + wb
        return jnp.where(total > 0, wb / jnp.where(total > 0, total, 1), 0), total

    mean = mean_weight = var = var_weight = None
    a, b = (Stats(*(x if x is None else jnp.asarray(x) for x in s)) for s in (a, b))
    shift: Any = 0
    if a.mean is not None:
        part, mean_weight = share(a.mean_weight, b.mean_weight)
        shift = b.mean - a.mean
        mean = a.mean + shift * part.astype(shift.dtype)
    if a.var is not None:
        part, var_weight = share(a.var_weight, b.var_weight)
        var = a.var + (b.var - a.var) * part + jnp.abs(shift) ** 2 * part * (1 - part)
    return Stats(mean, var, mean_weight, var_weight)


def merge_trees(before: Any, after: Any, moments: Any) -> Any:
    """Running statistics after several micro-batches, each of which started from those before.

    A layer that sowed its batch's statistics once a micro-batch gets them merged, as if it had seen all at once. Anything
    else is averaged where it is a float; counters and random states are those of the last micro-batch.

    Args:
      before: nested dictionaries of running statistics, a layer's under `mean` and `var`.
      after: the same, stacked: the result of each micro-batch along a first axis.
      moments: nested dictionaries with `batch: ((Stats, momentum),)` under a layer's path, stacked the same.

    Returns:
      A tree like `before`.

    >>> before = {"norm": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
    >>> after = {"norm": {"mean": jnp.array([0.5, 1.5]), "var": jnp.array([1.0, 1.0])}}       # momentum 0.5, by itself
    >>> parts = Stats(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> merged = merge_trees(before, after, {"norm": {"batch": ((parts, jnp.array([0.5, 0.5])),)}})
    >>> merged["norm"]["mean"].item(), merged["norm"]["var"].item()                          # of both: mean 2, variance 2
    (1.0, 1.5)
    """
    if not isinstance(before, Mapping):
        after = jnp.asarray(after)
        if jnp.issubdtype(after.dtype, jnp.inexact):
            return jnp.mean(after, 0).astype(after.dtype)
        return after[-1]
    sown = moments.get("batch") if isinstance(moments, Mapping) else None
    if sown is not None and len(sown) == 1:
        stacked, momentum = sown[0]
        each = [Stats(*jax.tree.map(lambda a, i=i: a[i], tuple(stacked))) for i in range(momentum.shape[0])]
        new = update(Running(before.get("mean"), before.get("var")), functools.reduce(merge, each), momentum[0])
        others = {k: merge_trees(before[k], after[k], {}) for k in before if k not in ("mean", "var")}
        return others | {k: v for k, v in new._asdict().items() if k in before}
    below = moments if isinstance(moments, Mapping) else {}
    return {k: merge_trees(before[k], after[k], below.get(k, {})) for k in before}
