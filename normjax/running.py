"""Running statistics as values: what is stored for inference, and pure functions that update it.

A moment is stored if and only if its own field mixes examples (an atom `n` or `@n`): the other is computed afresh, around
the stored mean. Stored arrays lack the axes that are averaged whole and the axis of examples, so batch norm stores `[c]`
as Flax does. Statistics of blocks of examples are merged first. Nothing that is not finite is ever stored, and a field
without a valid element leaves its statistic as it was.

How a batch moves what is stored, by `averaging` (t counts the batches seen, one number for each stored element):

    exponential    momentum * old + (1 - momentum) * new                                 as Flax; starts from 0 and 1
    debiased       the same, divided by the weight that it gives to batches, 1 - momentum ** t: the start does not count
    cumulative     the mean of all batches, old + (new - old) / t

What is stored is always the average itself, ready for use.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from normjax import moments
from normjax.field import EXAMPLES, Field, FieldError, axes, bind
from normjax.theory import Normalizer, Stats

AVERAGES = ("exponential", "debiased", "cumulative")


class Running(NamedTuple):
    """Stored statistics, None for a moment that is computed afresh.

    Attributes:
      mean: float32 or wider, complex for complex data. [u]
      var: float32 or wider. [u ** order]
      mean_count: int32, of the shape of `mean`: batches that went into each element; None for exponential averages.
      var_count: the same for `var`.
    """

    mean: Any = None
    var: Any = None
    mean_count: Any = None
    var_count: Any = None


def stores(normalizer: Normalizer) -> tuple[bool, bool]:
    """Which moments are stored: a pair of booleans.

    >>> from normjax import Normalizer, TABLE
    >>> stores(TABLE["batch"]), stores(TABLE["layer"])
    ((True, True), (False, False))
    >>> stores(Normalizer("n ...", "c"))
    (True, False)
    """
    mean, var = (isinstance(f, Field) and f.mixes_examples for f in (normalizer.mean, normalizer.var))
    return mean, var


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


class Slot(NamedTuple):
    """One stored array: its first value, shape and dtype."""

    fill: float
    shape: tuple[Any, ...]
    dtype: Any

    def make(self) -> jax.Array:
        """The array as it starts."""
        return jnp.full(self.shape, self.fill, self.dtype)


def slots(
    normalizer: Normalizer, layout: str, shape: tuple[Any, ...], averaging: str = "exponential"
) -> dict[str, Slot]:
    """What is stored for arrays of this shape, by its name in `Running`: means of zero and moments of one, as in Flax.

    Lengths may be None where they are not known yet.

    Raises:
      FieldError: a window slides over the examples.
      ValueError: no averaging has this name.

    >>> from normjax import TABLE, Normalizer
    >>> [(name, slot.shape) for name, slot in slots(TABLE["batch"], "n ... c", (8, 32, 32, 64)).items()]
    [('mean', (64,)), ('var', (64,))]
    >>> slots(Normalizer("n ...:3", None), "n ... c", (8, 32, 32, 64))["mean"].shape
    (32, 32, 64)
    >>> list(slots(TABLE["batch"], "n c", (8, 2), "debiased"))
    ['mean', 'var', 'mean_count', 'var_count']
    """
    moments.choose("averaging", averaging, AVERAGES)
    found = {}
    stored = zip(("mean", "var"), (0.0, 1.0), stores(normalizer), (normalizer.mean, normalizer.var), strict=True)
    for name, fill, kept, field in stored:
        if kept and isinstance(field, Field):
            found[name] = Slot(fill, tuple(shape[axis] for axis in _kept(field, layout, len(shape))), np.float32)
    if averaging != "exponential":
        found |= {f"{name}_count": Slot(0, slot.shape, np.int32) for name, slot in found.items()}
    return found


def initial(normalizer: Normalizer, layout: str, shape: tuple[int, ...], averaging: str = "exponential") -> Running:
    """The statistics before the first batch.

    >>> from normjax import TABLE
    >>> initial(TABLE["mean_only"], "n c", (8, 2)).mean
    Array([0., 0.], dtype=float32)
    """
    return Running(**{name: slot.make() for name, slot in slots(normalizer, layout, shape, averaging).items()})


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
    triples = zip(("mean", "var"), running[:2], (normalizer.mean, normalizer.var), strict=True)
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


def update(running: Running, batch: Stats, momentum: ArrayLike = 0.99, averaging: str = "exponential") -> Running:
    """Moves the stored statistics towards those of a batch.

    Args:
      running: the stored statistics, with counts unless the averaging is exponential.
      batch: those of a batch, from `observe`.
      momentum: weight of the old value, as in Flax (PyTorch's is that of the new one); not used by "cumulative".
      averaging: "exponential", "debiased" or "cumulative", see above.

    Returns:
      New statistics, float32 or wider (complex where the batch is). Elements without weight or not finite keep the old
      value, and their count.

    Raises:
      ValueError: no averaging has this name, or `running` lacks the counts that it needs.

    Source: debiased: Kingma & Ba 2015, section 3.

    >>> batch = Stats(mean=jnp.array([1.0, 2.0]), mean_weight=jnp.array([4.0, 0.0]))
    >>> update(Running(jnp.zeros(2)), batch, momentum=0.5).mean
    Array([0.5, 0. ], dtype=float32)
    >>> update(Running(jnp.zeros(2), mean_count=jnp.zeros(2, jnp.int32)), batch, 0.5, "debiased").mean
    Array([1., 0.], dtype=float32)
    """
    moments.choose("averaging", averaging, AVERAGES)

    def step(old, new, weight, count):
        if old is None or new is None:
            return old, count
        if averaging == "exponential":
            keep = momentum if isinstance(momentum, float | int) else jnp.asarray(momentum).astype(new.dtype)
        elif count is None:
            raise ValueError(f"averaging={averaging!r} needs the counts of batches beside the statistics; `initial` "
                             "with the same averaging makes them")  # fmt: skip
        else:
            keep = (1 - _share(count + 1, momentum, averaging)).astype(new.dtype)
        old = old.astype(np.result_type(moments.wide(old.dtype), new.dtype if jnp.iscomplexobj(new) else np.float32))
        mixed = (keep * old.astype(new.dtype) + (1 - keep) * new).astype(old.dtype)
        seen = jnp.isfinite(new) & jnp.isfinite(mixed) & (True if weight is None else weight > 0)
        mixed = jax.lax.stop_gradient(jnp.where(_lying_as(seen, old), _lying_as(mixed, old), old))
        return mixed, None if count is None else count + _lying_as(seen, old).astype(count.dtype)

    mean, mean_count = step(running.mean, batch.mean, batch.mean_weight, running.mean_count)
    var, var_count = step(running.var, batch.var, batch.var_weight, running.var_count)
    return Running(mean, var, mean_count, var_count)


def _share(t: jax.Array, momentum: ArrayLike, averaging: str) -> jax.Array:
    """The weight of batch t in the average of t batches."""
    t = t.astype(np.float32)
    if averaging == "cumulative":
        return 1 / t
    decay = jnp.log(jnp.asarray(momentum, np.float32)) if not isinstance(momentum, float | int) else np.float32(
        math.log(momentum) if momentum > 0 else -math.inf)  # fmt: skip
    # (1 - momentum) / (1 - momentum ** t); for a momentum of one, its limit: the mean of all batches.
    return jnp.where(decay < 0, jnp.expm1(decay) / jnp.expm1(jnp.where(decay < 0, decay, -1) * t), 1 / t)


def _lying_as(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value sharded as the stored one, which matters on meshes with explicit axes: a scan carries one type."""
    have, want = jax.typeof(new).sharding, jax.typeof(old).sharding
    if have.spec == want.spec:
        return new
    mesh = have.mesh if want.mesh.empty else want.mesh  # statistics made outside a mesh are replicated on any
    return jax.sharding.reshard(new, jax.sharding.NamedSharding(mesh, want.spec))


def unbias(stats: Stats, normalizer: Normalizer) -> Stats:
    """The same statistics with the unbiased variance, var * w / (w - 1) for the weight w behind it, as PyTorch stores it.

    Weights count elements here: w is their sum. Where it is one or less, no unbiased variance exists, and the weight
    becomes 0, so that nothing is stored.

    Raises:
      ValueError: the row's moment is not a variance (order 2, A = B, no windows).

    >>> from normjax import TABLE
    >>> stats = Stats(jnp.zeros(1), jnp.array([1.5]), jnp.array([3.0]), jnp.array([3.0]))
    >>> unbias(stats, TABLE["batch"]).var
    Array([2.25], dtype=float32)
    """
    windows = any(span.window for field in normalizer.fields for span in field.spans)
    if normalizer.order != 2 or normalizer.mean is None or normalizer.mean != normalizer.var or windows:
        raise ValueError(f"unbiased=True needs a variance: order 2 and A = B, without windows; found {normalizer}")
    return unbiased(stats)


def unbiased(stats: Stats) -> Stats:
    """`unbias` for statistics that are known to be of a variance.

    >>> unbiased(Stats(None, jnp.array([1.0, 1.0]), None, jnp.array([2.0, 1.0])))[1::2]
    (Array([2., 1.], dtype=float32), Array([2., 0.], dtype=float32))
    """
    if stats.var is None:
        return stats
    w = jnp.asarray(stats.var_weight)
    enough = w > 1
    factor = jnp.where(enough, w / jnp.where(enough, w - 1, 1), 1)
    return stats._replace(var=stats.var * factor.astype(stats.var.dtype), var_weight=jnp.where(enough, w, 0))


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
    pairs = zip(a, b, strict=True)
    return merge_stacked(Stats(*(None if p is None else jnp.stack([jnp.asarray(p), jnp.asarray(q)]) for p, q in pairs)))


def merge_stacked(stats: Stats, mergeable: bool = True) -> Stats:
    """The statistics of many batches together, from those of each, stacked along a first axis.

    Args:
      stats: statistics with their weights, as `observe` gives them.
      mergeable: False takes the weighted mean of the moments, for rows whose statistics do not merge exactly.

    >>> parts = Stats(jnp.array([1.0, 12.0]), jnp.array([1.0, 4.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> merge_stacked(parts)[:2]
    (Array(6.5, dtype=float32), Array(32.75, dtype=float32))
    """

    def mean_of(values, weights):  # around the first value: a mean large beside its spread keeps its digits
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
        total = jnp.sum(weights, 0, keepdims=True)
        share = (weights / jnp.where(total > 0, total, 1)).astype(values.dtype)
        first = jnp.where(jnp.isfinite(values[:1]), values[:1], 0)
        shifted = jnp.where(weights > 0, values - first, jnp.zeros((), values.dtype))
        return jnp.where(total > 0, first + jnp.sum(share * shifted, 0, keepdims=True), 0), total

    mean = mean_weight = var = var_weight = None
    spread: Any = 0
    if stats.mean is not None:
        mean, mean_weight = mean_of(stats.mean, stats.mean_weight)
        spread = jnp.abs(stats.mean - mean) ** 2 if mergeable else 0
    if stats.var is not None:
        var, var_weight = mean_of(stats.var + spread, stats.var_weight)
    return Stats(*(None if s is None else s[0] for s in (mean, var, mean_weight, var_weight)))
