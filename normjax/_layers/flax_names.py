"""The arguments of Flax's normalization layers, read as a normalizer and a layout, once for linen and nnx.

Axes go by number there, so the layout names them by number: "a0 a1 a2". `use_fast_variance` and `force_float32_reductions`
are not read: statistics are always two-pass, and float32 or wider.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import as_weights, statistics_dtype
from normjax._leaves import AMOUNT, INTEGER, integers, split_eps
from normjax._normalize.evaluate import Normalized, equation
from normjax.field import Field, FieldError, Span
from normjax.running import NOTHING, BatchRecord, Running, as_stats, mergeable, record
from normjax.theory import Normalizer, Stats

Axes = int | Sequence[int]
Shape = tuple[int, ...]


class Averaging(Protocol):
    """What every preset says about its statistics."""

    epsilon: float  # or an array, which Flax takes too
    axis_name: str | None
    axis_index_groups: Sequence[Sequence[int]] | None


class Reading(NamedTuple):
    """Flax's arguments, read for arrays of one shape."""

    normalizer: Normalizer  # the fields that are averaged over, by the names of the layout
    layout: str  # the axes by number, "a0 a1 a2"
    features: tuple[int, ...]  # the axes along which scale, bias and running statistics differ, ascending
    sizes: Shape  # the lengths of those axes: the shape that linen's variables have
    eps: ArrayLike | None  # epsilon where only a run knows it, which stands for the number of the normalizer


def read(
    module: Averaging, shape: Shape, reduced: Axes, features: Axes, *, centre: bool = True, blocks: int | None = None
) -> Reading:
    """Flax's axes as a normalizer: the average over `reduced` (the last one in blocks, if asked) and over `axis_name`."""
    ndim, name, groups = len(shape), module.axis_name, module.axis_index_groups
    reduced, features = positive_axes(ndim, reduced), positive_axes(ndim, features)
    spans = [Span(f"a{axis}") for axis in reduced]
    if blocks is not None:
        spans[-1] = Span(f"a{reduced[-1]}", blocks=blocks)
    names = () if name is None else (name,) if isinstance(name, str) else tuple(name)
    index_groups = tuple(tuple(int(i) for i in group) for group in groups) if groups is not None and names else None
    field = Field((*spans, *(Span(None, mapped=name, groups=index_groups) for name in names)))
    number, eps = split_eps(AMOUNT("epsilon", module.epsilon))
    normalizer = Normalizer(field if centre else None, field, eps=number)
    layout = " ".join(f"a{i}" for i in range(ndim))
    return Reading(normalizer, layout, features, tuple(shape[a] for a in features), eps)


def read_batch_norm(module: Averaging, shape: Shape, axis: Axes) -> Reading:
    """Batch norm averages over all axes but the features, one or several."""
    features = positive_axes(len(shape), axis)
    return read(module, shape, [i for i in range(len(shape)) if i not in features], features)


def read_group_norm(module: Averaging, shape: Shape, reduced: Axes | None, groups: int) -> Reading:
    """Group norm averages over `reduced` (by default all but the first), the last in so many groups."""
    ndim = len(shape)
    reduced = positive_axes(ndim, [*range(1, ndim - 1), -1] if reduced is None else reduced)
    if not reduced or reduced[-1] != ndim - 1:
        raise ValueError(
            "The reduction axes must include the final dimension as this is assumed to be the feature axis."
        )
    return read(module, shape, reduced, -1, blocks=groups)


def read_instance_norm(module: Averaging, shape: Shape, features: Axes) -> Reading:
    """Instance norm averages over all axes but the first and the features."""
    features = positive_axes(len(shape), features)
    if 0 in features:
        raise ValueError(
            "The channel axes cannot include the leading dimension as this is assumed to be the batch axis."
        )
    return read(module, shape, [axis for axis in range(1, len(shape)) if axis not in features], features)


def positive_axes(ndim: int, numbers: Axes) -> tuple[int, ...]:
    """Axes as positive numbers, each once, ascending."""
    listed = integers("axis", numbers)
    for axis in listed:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} is out of bounds for an array of {ndim} axes")
    return tuple(sorted({axis % ndim for axis in listed}))


def group_count(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups, from Flax's two arguments."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "Either `num_groups` or `group_size` should be specified. If `group_size` is to be specified, pass "
            "`num_groups=None` as argument to override the default `num_groups` value of 32."
        )
    if group_size is not None:
        size = INTEGER("group_size", group_size)
        if size <= 0 or channels % size:
            raise ValueError(f"Number of channels ({channels}) is not multiple of the group size ({group_size}).")
        return channels // size
    groups = INTEGER("num_groups", num_groups)
    if groups <= 0 or channels % groups:
        raise ValueError(f"Number of groups ({num_groups}) does not divide the number of channels ({channels}).")
    return groups


def align_features(p: jax.Array | None, reading: Reading, shape: Shape) -> jax.Array | None:
    """A parameter of Flax's shape, laid along the feature axes of an array of this shape."""
    if p is not None and p.size != math.prod(reading.sizes):
        raise FieldError(f"a layer made for {p.size} features cannot take an input of shape {shape}")
    return None if p is None else p.reshape([n if axis in reading.features else 1 for axis, n in enumerate(shape)])


def widened(x: ArrayLike, dtype: DTypeLike | None) -> jax.Array:
    """The array x as Flax's layers take it: integers become floats, and a wider `dtype` widens the work."""
    x = jnp.asarray(x)
    with jax.numpy_dtype_promotion("standard"):
        work = jnp.promote_types(x.dtype if dtype is None else dtype, jnp.float32)
    if jnp.issubdtype(x.dtype, jnp.inexact) and statistics_dtype(x.dtype) == work:
        return x
    return x.astype(work)


class Applied(NamedTuple):
    """The output of a preset, the statistics to store, and the record of the batch; None where nothing is to be stored."""

    y: jax.Array
    running: Running
    record: BatchRecord | None


def normalize_as_read(
    x: jax.Array,
    reading: Reading,
    running: Running = NOTHING,
    use_running: bool = False,
    momentum: float = 0.0,
    *,
    dtype: DTypeLike,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: ArrayLike | None = None,
) -> Applied:
    """One application of a preset, with the statistics of x or with `running`, of shape `reading.sizes`.

    Flax accepts what `normalize` refuses (a field over one element), so nothing is refused here.
    """
    n, layout = reading.normalizer, reading.layout
    stats = as_stats(running, n, layout, x.shape) if use_running else None
    affine = {k: align_features(p, reading, x.shape) for k, p in (("scale", scale), ("bias", bias))}
    if mask is None:
        out = equation(x, n, layout, stats=stats, eps=reading.eps, dtype=dtype, **affine)
    else:
        out = _masked(x, reading, mask, stats, dtype, affine)
    if use_running or running.var is None:
        return Applied(out.y, running, None)
    return Applied(
        out.y, *record(running, out.stats, n, layout, x.shape, momentum=momentum, exact=mergeable(n, layout))
    )


def _masked(
    x: jax.Array,
    reading: Reading,
    mask: ArrayLike,
    stats: Stats | None,
    dtype: DTypeLike,
    affine: dict[str, jax.Array | None],
) -> Normalized:
    """Flax's reading of a mask: statistics of what it leaves, by which masked elements are normalized too.

    A masked element that would not stay finite, or whose statistics have no element behind them, gives the bias. It is
    selected away before any arithmetic that is differentiated, so that zero cotangents stay zero.
    """
    n, layout, eps, weights = reading.normalizer, reading.layout, reading.eps, as_weights(mask, x)
    assert weights is not None
    if stats is None:
        stats = equation(x, n, layout, mask=mask).stats
    there = True if stats.var_weight is None else stats.var_weight > 0  # of stored statistics no weight is known
    seen = weights.valid | (jnp.isfinite(x) & there)
    tried = equation(jax.lax.stop_gradient(x), n, layout, stats=jax.lax.stop_gradient(stats), mask=seen, eps=eps)
    overflows = jnp.isinf(tried.centered) | jnp.isinf(tried.y)
    seen = weights.valid | (seen & ~overflows)
    out = equation(x, n, layout, stats=stats, mask=seen, eps=eps, dtype=dtype, **affine)
    return out._replace(stats=stats)
