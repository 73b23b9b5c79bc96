"""What is stored for inference: which moments, in which shapes, and how they lie beside an array.

A moment is stored if and only if its own field mixes examples (an atom `n` or `@n`): the other is computed afresh, around
the stored mean. Stored arrays lack the axes that are averaged whole and the axis of examples: batch norm stores `[c]`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from normjax._expect.arrays import statistics_dtype
from normjax._expect.binding import axes, bind
from normjax._leaves import one_of
from normjax.field import EXAMPLES, Field, FieldError
from normjax.theory import Normalizer, Stats, row

AVERAGES = ("exponential", "debiased", "cumulative")


class Running(NamedTuple):
    """Stored statistics, None for a moment that is computed afresh.

    Attributes:
      mean: float32 or wider, complex for complex data. [u]
      var: float32 or wider. [u ** order]
      mean_count, var_count: int32, batches that went into each element; None for exponential averages.

    Source: Ioffe & Szegedy 2015, algorithm 2; the shapes are Flax's.

    >>> Running(jnp.zeros(3)).var is None
    True
    """

    mean: jax.Array | None = None
    var: jax.Array | None = None
    mean_count: jax.Array | None = None
    var_count: jax.Array | None = None


NOTHING = Running()  # no stored statistics


def _require_kinds(running: object = NOTHING, batch: object = Stats(), shape: object = ()) -> None:
    """Raises TypeError for what is taken for stored statistics, for those of a batch, or for a shape, and is none.

    Args:
      running: what must be a Running.
      batch: what must be a Stats.
      shape: what must be a tuple of lengths, or a list.

    >>> _require_kinds((jnp.zeros(3), jnp.ones(3)))
    Traceback (most recent call last):
    ...
    TypeError: stored statistics are a normjax.running.Running(mean, var); found tuple
    """
    if not isinstance(running, Running):
        raise TypeError(f"stored statistics are a normjax.running.Running(mean, var); found {type(running).__name__}")
    if not isinstance(batch, Stats):
        found = type(batch).__name__
        raise TypeError(
            f"statistics of a batch are a normjax.Stats, `normalize(...).stats` or of `observe`; found {found}"
        )
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"a shape is a tuple of lengths, such as x.shape; found {type(shape).__name__}")


def stores(normalizer: Normalizer | str) -> tuple[bool, bool]:
    """Whether the mean is stored, and whether the moment is: each where its own field mixes examples.

    Args:
      normalizer: the row, or its name in TABLE.

    >>> from normjax import Normalizer, TABLE
    >>> stores(TABLE["batch"]), stores(TABLE["layer"])
    ((True, True), (False, False))
    >>> stores(Normalizer("n ...", "c"))
    (True, False)
    """
    normalizer = row(normalizer)
    mean, var = (f is not None and f.mixes_examples for f in (normalizer.mean, normalizer.var))
    return mean, var


def _stored_axes(field: Field, layout: str, ndim: int) -> tuple[int, ...]:
    """The axes that a stored statistic has: neither averaged whole nor the axis of examples."""
    where = axes(layout, ndim)
    dropped = set(where.get(EXAMPLES, ()))
    for span in field.spans:
        if span.axis == EXAMPLES and span.window:
            raise FieldError(f"field \"{field}\" slides over the examples ('{span}'), which cannot be stored")
        if span.axis is not None and span.whole:
            dropped |= set(where.get(span.axis, ()))
    return tuple(axis for axis in range(ndim) if axis not in dropped)


class Slot(NamedTuple):
    """One stored array before there is one: its first value, its shape (None for lengths not known yet) and its dtype.

    >>> Slot(1.0, (2,), np.float32).make()
    Array([1., 1.], dtype=float32)
    """

    fill: float
    shape: tuple[int | None, ...]
    dtype: DTypeLike

    def make(self) -> jax.Array:
        """The array as it starts."""
        return jnp.full(self.shape, self.fill, self.dtype)  # pyright: ignore[reportArgumentType]  (refuses None itself)


def slots(
    normalizer: Normalizer | str,
    layout: str,
    shape: tuple[int | None, ...],
    averaging: str = "exponential",
    dtype: DTypeLike = np.float32,
) -> dict[str, Slot]:
    """What is stored for arrays of this shape, by its name in `Running`: means of zero and moments of one, as in Flax.

    Lengths of the shape may be None where they are not known yet; averages other than "exponential" store counts too.

    Args:
      normalizer: the row that stores them, or its name in TABLE.
      layout: name of each axis of the array.
      shape: of the array, axes as named by `layout`.
      averaging: of the running statistics, "exponential", "debiased" or "cumulative".
      dtype: of the array; the statistics are float32 or wider, the mean of complex numbers complex.

    >>> from normjax import TABLE, Normalizer
    >>> [(name, slot.shape) for name, slot in slots(TABLE["batch"], "n ... c", (8, 32, 32, 64)).items()]
    [('mean', (64,)), ('var', (64,))]
    >>> slots(Normalizer("n ...:3", None), "n ... c", (8, 32, 32, 64))["mean"].shape
    (32, 32, 64)
    >>> list(slots(TABLE["batch"], "n c", (8, 2), "debiased"))
    ['mean', 'var', 'mean_count', 'var_count']
    """
    one_of("averaging", averaging, AVERAGES)
    _require_kinds(shape=shape)
    normalizer, by_name = row(normalizer), {}
    wide = statistics_dtype(dtype)
    real = jnp.finfo(wide).dtype
    for name, fill, field, kind in (("mean", 0.0, normalizer.mean, wide), ("var", 1.0, normalizer.var, real)):
        if field is not None and field.mixes_examples:
            along = _stored_axes(field, layout, len(shape))
            by_name[name] = Slot(fill, tuple(shape[axis] for axis in along), kind)
    if averaging != "exponential":
        by_name |= {f"{name}_count": Slot(0, slot.shape, np.int32) for name, slot in by_name.items()}
    return by_name


def initial(
    normalizer: Normalizer | str,
    layout: str,
    shape: tuple[int, ...],
    averaging: str = "exponential",
    dtype: DTypeLike = np.float32,
) -> Running:
    """The statistics before the first batch, of this shape: means of zero and moments of one, as `slots` has them.

    Args:
      normalizer: the row that stores them, or its name in TABLE.
      layout: name of each axis of the array.
      shape: of the array, axes as named by `layout`.
      averaging: of the running statistics, "exponential", "debiased" or "cumulative".
      dtype: of the array; the statistics are float32 or wider, the mean of complex numbers complex.

    >>> from normjax import TABLE
    >>> initial(TABLE["mean_only"], "n c", (8, 2)).mean
    Array([0., 0.], dtype=float32)
    """
    return Running(**{name: slot.make() for name, slot in slots(normalizer, layout, shape, averaging, dtype).items()})


def as_stats(running: Running, normalizer: Normalizer | str, layout: str, shape: tuple[int, ...]) -> Stats:
    """Stored statistics laid out beside an array of this shape, against which they broadcast, as `normalize` takes them.

    Args:
      running: what is stored.
      normalizer: the row that stores them, or its name in TABLE.
      layout: name of each axis of the array.
      shape: of the array, axes as named by `layout`.

    >>> from normjax import TABLE
    >>> as_stats(Running(jnp.zeros(3), jnp.ones(3)), TABLE["batch"], "n c ...", (8, 3, 4, 4)).mean.shape
    (1, 3, 1, 1)
    """
    _require_kinds(running, shape=shape)
    normalizer, laid = row(normalizer), []
    for name, value, field in (("mean", running.mean, normalizer.mean), ("var", running.var, normalizer.var)):
        if value is None or field is None:
            laid.append(None)
            continue
        along = _stored_axes(field, layout, len(shape))
        want = tuple(shape[axis] for axis in along)
        value = jnp.asarray(value)
        if value.shape != want:
            raise FieldError(
                f'the stored {name} has shape {value.shape}, but field "{field}" on an array of shape {shape}, layout '
                f'"{layout}", needs {want}'
            )
        laid.append(value.reshape([n if axis in along else 1 for axis, n in enumerate(shape)]))
    return Stats(*laid)


def observe(stats: Stats, normalizer: Normalizer | str, layout: str, shape: tuple[int, ...]) -> Stats:
    """The statistics of a batch of this shape in the shapes of `slots`, with the weight behind each; blocks of n merged.

    They are those that `normalize` returned for the row, with their weights, each broadcasting against the batch.

    Args:
      stats: moments with their weights, each broadcasting against the array.
      normalizer: the row that stores them, or its name in TABLE.
      layout: name of each axis of the array.
      shape: of the array, axes as named by `layout`.

    Source: Ioffe & Szegedy 2015, algorithm 2; Chan, Golub & LeVeque 1983 for the weights.

    >>> from normjax import normalize, TABLE
    >>> x = jnp.arange(32.0).reshape(16, 2)
    >>> observe(normalize(x, "ghost").stats, TABLE["ghost"], "n ... c", x.shape).mean.tolist()
    [15.0, 16.0]
    """
    _require_kinds(batch=stats, shape=shape)
    normalizer = row(normalizer)
    merged: list[tuple[jax.Array | None, jax.Array | None]] = []
    triples = ((normalizer.mean, stats.mean, stats.mean_weight), (normalizer.var, stats.var, stats.var_weight))
    for field, value, weight in triples:
        if field is None or value is None or weight is None:
            merged.append((None, None))
            continue
        if value.ndim != len(shape) or any(g not in (1, s) for g, s in zip(value.shape, shape, strict=True)):
            raise FieldError(f"statistics of shape {value.shape} are not those of an array of shape {tuple(shape)}")
        along = _stored_axes(field, layout, len(shape))
        weight = jnp.broadcast_to(jnp.asarray(weight), jnp.broadcast_shapes(jnp.shape(weight), value.shape))
        rest = tuple(axis for axis in range(len(shape)) if axis not in along)
        blocks = [span.blocks or 1 for axis, span in bind(field, layout, shape).by("blocks") if axis in rest]
        value = jnp.broadcast_to(value, weight.shape)
        # Repeated over each block of examples alike, so that the sum over examples counts every block the same.
        total = jnp.sum(weight, rest)
        summed, by = jnp.sum(value * weight.astype(value.dtype), rest), jnp.where(total > 0, total, 1)
        mean = jnp.where(total > 0, summed / by.astype(value.dtype), 0)
        length = int(np.prod([weight.shape[axis] for axis in rest])) if blocks else 1
        merged.append((mean, total * (blocks[0] / max(length, 1)) if blocks else total))
    return Stats(merged[0][0], merged[1][0], merged[0][1], merged[1][1])
