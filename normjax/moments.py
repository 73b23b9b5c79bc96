"""How E_F, the average over a field F, is evaluated fast.

A field is a product of spans, so an average is one linear step per axis, and the order is free: whole axes first
(they shrink the array), then collectives over mapped axes, blocks, and windows last. Each average is a weighted sum
over a sum of weights, and the sums are combined across devices before the one division. The obvious form, one
averaging matrix per axis, is what the tests compare with.

Everything here accumulates in the dtype of its argument; callers pass float32 or wider.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax.field import Bound, Field, FieldError, Span, bind
from normjax.window import slide

BORDERS = ("truncate", "zero")
WINDOWS = ("box", "gaussian")
LEANS = ("after", "before")


class Weights(NamedTuple):
    """Weights of the elements, of the rank of x; zero where an element is masked. `valid` is `value != 0`."""

    value: jax.Array
    valid: jax.Array


@dataclass(frozen=True)
class Plan:
    """A bound field and what its windows do: static, so that compiled code depends on it alone."""

    bound: Bound
    border: str = "truncate"
    window: str = "box"
    lean: str = "after"

    def extent(self, span: Span) -> tuple[int, int]:
        """How many elements the window takes before and after its own."""
        short, long = ((span.window or 1) - 1) // 2, (span.window or 1) // 2
        return (short, long) if self.lean == "after" else (long, short)

    def taps(self, span: Span) -> np.ndarray:
        """The weights within the window, by offset: ones, or a Gaussian of standard deviation width / 4."""
        before, after = self.extent(span)
        offsets = np.arange(-before, after + 1)
        if self.window == "box":
            return np.ones(len(offsets))
        return np.exp(-0.5 * (offsets / (len(offsets) / 4)) ** 2)


def axis_size(name: str) -> int:
    """Size of a mapped axis.

    Raises:
      FieldError: no transformation binds the name here.
    """
    try:
        return lax.axis_size(name)
    except NameError:
        raise FieldError(
            f"mapped axis '@{name}' is not bound here; call this inside jax.vmap(..., axis_name=\"{name}\"), or inside "
            f'jax.shard_map or jax.pmap over a mesh axis "{name}"'
        ) from None


def members(span: Span) -> int:
    """How many shards or mapped examples one average of the span combines."""
    if span.mapped is None:
        return 1
    return len(span.groups[0]) if span.groups else axis_size(span.mapped)


def expect(
    x: ArrayLike,
    field: str | Field,
    layout: str = "n ... c",
    *,
    border: str = "truncate",
    window: str = "box",
    lean: str = "after",
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Averages x over a field: E_field[x].

    Spans act on separate axes, so they are applied one by one, and the result keeps the rank of x: axes that are
    averaged whole have length 1, all others keep theirs. float16 and bfloat16 are averaged in float32.

    Args:
      x: array of a real or complex floating dtype, axes as named by `layout`. [units u]
      field: a Field or its string, such as `"...:5 c"`.
      layout: name of each axis of x; `...` matches any number of axes.
      border: what a window averages past the edge: only the elements that exist ("truncate"), or zeros as well
        ("zero": division by the full width).
      window: "box", or "gaussian" with standard deviation width / 4, cut at the width.
      lean: the side on which a window of even width has its extra element, "after" or "before".
      mask: boolean mask or non-negative weights that broadcast against x; where it is zero, x is left out. A field
        without weight averages to 0.

    Returns:
      An array of float32 or wider that broadcasts against x. [units u]

    Raises:
      FieldError: the field names an axis that the layout lacks, groups do not divide it, or a mapped axis is unbound.
      TypeError: x holds integers.

    Source: Ren et al. 2017, section 3 (E_A and E_B); border "zero": Krizhevsky et al. 2012, section 3.3.

    >>> x = jnp.arange(5.0)
    >>> expect(x, "c", "c")
    Array([2.], dtype=float32)
    >>> expect(x, "c:3", "c").tolist()
    [0.5, 1.0, 2.0, 3.0, 3.5]
    >>> expect(x, "c:3", "c", mask=x > 1).tolist()
    [0.0, 2.0, 2.5, 3.0, 3.5]
    >>> expect(jnp.ones((2, 4, 8)), "c", layout="n t c").shape
    (2, 4, 1)
    """
    x = as_floating(x, "expect")
    for name, value, accepted in (("border", border, BORDERS), ("window", window, WINDOWS), ("lean", lean, LEANS)):
        choose(name, value, accepted)
    plan = Plan(bind(Field.parse(field), layout, x.shape), border, window, lean)
    x = x.astype(wide(x.dtype))
    weights = weigh(mask, x)
    return average(silence(x, weights), plan, weights)[0]


def choose(name: str, value: Any, accepted: tuple) -> None:
    """Raises ValueError unless the value is one of those accepted."""
    if value not in accepted:
        raise ValueError(f"{name} is one of {', '.join(map(repr, accepted))}; found {value!r}")


def as_floating(x: ArrayLike, caller: str) -> jax.Array:
    """The argument as an array; TypeError for integers and booleans, which would be averaged into something else."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"{caller} takes floating-point arrays, found {x.dtype}; cast first: x.astype(jnp.float32)")
    return x


def wide(dtype: Any) -> Any:
    """The dtype of statistics: float32 or wider."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def weigh(mask: ArrayLike | None, x: jax.Array) -> Weights | None:
    """A mask as weights of the rank of x, in its real dtype.

    Raises:
      FieldError: the mask does not broadcast against x.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    try:
        fits = np.broadcast_shapes(mask.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise FieldError(f"a mask must broadcast against the array: found shapes {mask.shape} and {x.shape}")
    mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return Weights(mask.astype(jnp.finfo(x.dtype).dtype), mask.astype(bool))


def silence(x: jax.Array, weights: Weights | None) -> jax.Array:
    """The array with zeros at masked positions: a select, so that a NaN there reaches no value and no gradient."""
    return x if weights is None else jnp.where(weights.valid, x, jnp.zeros((), x.dtype))


def average(x: jax.Array, plan: Plan, weights: Weights | None = None) -> tuple[jax.Array, ArrayLike]:
    """E_F[x] and the sum of weights behind it, both broadcasting against x. Zero where there is no weight.

    x is zero at masked positions already (`silence`) and of the bound shape; it may be shorter (length 1) on axes
    that the field does not name.
    """
    if weights is None:
        count = counts(plan, x.dtype)
        safe = (np if isinstance(count, np.ndarray) else jnp).where(count > 0, count, 1)
        return total(x, plan) / safe.astype(x.dtype), count
    named = {axis for axis, _ in plan.bound.spans}
    w = weights.value
    w = jnp.broadcast_to(w, [x.shape[i] if i in named else n for i, n in enumerate(w.shape)])
    pooled, windows = split(plan)
    top_sum, weight = total(x * w.astype(x.dtype), pooled), total(w, pooled)
    if plan.border == "zero" and not plan.bound.pooled:
        # A masked element counts as a zero, like one past the edge: average what is pooled, then box it.
        filled = weight > 0
        pooled_mean = jnp.where(filled, top_sum / jnp.where(filled, weight, 1).astype(x.dtype), 0)
        return total(pooled_mean, windows) / counts(windows, x.dtype).astype(x.dtype), total(weight, windows)
    top_sum, weight = total(top_sum, windows), total(weight, windows)
    filled = weight > 0
    return jnp.where(filled, top_sum / jnp.where(filled, weight, 1).astype(x.dtype), 0), weight


def split(plan: Plan) -> tuple[Plan, Plan]:
    """The plan as its pooled part (whole axes, collectives, blocks) and its windows."""

    def part(windows: bool) -> Plan:
        spans = tuple((axis, s) for axis, s in plan.bound.spans if bool(s.window) == windows)
        return Plan(Bound(plan.bound.field, plan.bound.shape, spans), plan.border, plan.window, plan.lean)

    return part(False), part(True)


def counts(plan: Plan, dtype: Any) -> np.ndarray:
    """What `total` of an array of ones is (under border "zero": as if ones stood past the edge too)."""
    bound = plan.bound
    count = np.ones((1,) * len(bound.shape))
    seen = set()
    for axis, span in bound.spans:
        if span.mapped and span.whole and span.mapped not in seen:
            count = count * members(span)
            seen.add(span.mapped)
        if axis is None:
            continue
        length = bound.shape[axis]
        if span.window:
            taps = plan.taps(span)
            if plan.border == "zero":
                count = count * taps.sum()
            elif span.mapped is None:
                before, after = plan.extent(span)
                padded = np.pad(np.ones(length), (before, after))
                sums = [(padded[i : i + len(taps)] * taps).sum() for i in range(length)]
                count = count * np.reshape(sums, [-1 if i == axis else 1 for i in range(len(bound.shape))])
            else:
                return counts_across(plan, dtype)
        elif span.blocks:
            count = count * (length // local_blocks(bound, axis, span))
        else:
            count = count * length
    return count.astype(np.finfo(dtype).dtype)


def counts_across(plan: Plan, dtype: Any) -> Any:
    """Counts where a truncated window crosses shards: known only to the collective."""
    return total(jnp.ones(plan.bound.shape, jnp.finfo(dtype).dtype), plan)


def total(x: jax.Array, plan: Plan) -> jax.Array:
    """The sum of x over the field around each element; axes summed whole keep length 1."""
    bound = plan.bound
    if bound.whole:
        for axes in steps(bound.whole, x.shape):
            x = apart(jnp.sum(x, axes, keepdims=True))
    for name, groups in bound.collectives:
        axis_size(name)
        x = lax.psum(x, name, axis_index_groups=groups and [list(g) for g in groups])
    for axis, span in bound.by("blocks"):
        x = by_blocks(jnp.sum, x, axis, local_blocks(bound, axis, span))
    for axis, span in bound.by("window"):
        x = _window_total(x, axis, span, plan)
    return x


def steps(axes: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Which of the axes to sum first, and which then.

    XLA:CPU sums axes between others on one thread if the last axis is short: the innermost of them goes first.
    """
    kept = [i for i in range(len(shape)) if i not in axes]
    narrow = len(axes) > 1 and kept and kept[0] < min(axes) and kept[-1] > max(axes) and shape[kept[0]] > 1
    if jax.default_backend() != "cpu" or not narrow or math.prod(shape[max(axes) + 1 :]) >= 256:
        return [axes]
    return [(max(axes),), tuple(sorted(axes)[:-1])]


def spread(small: jax.Array, x: jax.Array) -> jax.Array:
    """A small array broadcast against x, in the steps in which x is summed: the transpose is such a sum."""
    small = small.reshape((1,) * (x.ndim - small.ndim) + small.shape)
    long = tuple(axis for axis, (n, m) in enumerate(zip(small.shape, x.shape, strict=True)) if n == 1 < m)
    if not along_one_shard(x, long):
        return small
    for axes in reversed(steps(long, x.shape)):
        small = jnp.broadcast_to(apart(small), [x.shape[i] if i in axes else n for i, n in enumerate(small.shape)])
    return small


def apart(x: jax.Array) -> jax.Array:
    """Keeps XLA:CPU from merging two steps into one."""
    return lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def local_blocks(bound: Bound, axis: int, span: Span) -> int:
    """How many of the span's blocks this array holds.

    Raises:
      FieldError: the axis is sharded and a block would lie on several shards.
    """
    blocks, length = span.blocks or 1, bound.shape[axis]
    if span.mapped is None:
        return blocks
    shards = members(span)
    if blocks % shards or length % (blocks // shards):
        raise FieldError(
            f"blocks '{span}' do not align with {shards} shards of length {length}: the number of blocks must be a "
            "multiple of the number of shards, and each shard must split evenly"
        )
    return blocks // shards


def by_blocks(reduce, x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """Reduces each block of an axis, and repeats the result over the block."""
    if x.shape[axis] == 0:
        return x

    def apply(x):
        split = x.reshape(*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :])
        reduced = reduce(split, axis=axis + 1, keepdims=True)
        return jnp.broadcast_to(reduced, split.shape).reshape(x.shape)

    return partitioned(apply, x, (axis,))


def along_one_shard(x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether the type of x says of none of these axes that it is sharded."""
    return all(jax.typeof(x).sharding.spec[axis] is None for axis in axes)


def partitioned(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, along: tuple[int, ...], reduced: tuple[int, ...] = ()
) -> jax.Array:
    """f(x), where f works along axes over which x may be sharded, and gives the shape of x but 1 along `reduced`.

    On a mesh with explicit axes a sharding is part of the type, and JAX has no rule for the split of a sharded axis, nor
    for the transpose of a window over one: the compiler partitions these, and the result is sharded as x is.
    """
    sharding = jax.typeof(x).sharding
    if along_one_shard(x, along):
        return f(x)
    spec = [None if axis in reduced else name for axis, name in enumerate(sharding.spec)]
    out = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    free: Any = jax.sharding.auto_axes(f, out_sharding=out)
    return free(x)


def _window_total(x: jax.Array, axis: int, span: Span, plan: Plan) -> jax.Array:
    """The (weighted) sum over a window along one axis, with zeros past the edge."""
    (before, after), taps, length = plan.extent(span), plan.taps(span), x.shape[axis]
    if length == 0:
        return x
    if span.mapped is not None:
        x, left, right = with_halo(x, axis, before, after, span), 0, 0
    else:
        # A window is never wider than the axis on either side: what lies further is zero.
        left, right = min(before, length - 1), min(after, length - 1)
        taps = taps[before - left : len(taps) - (after - right)]
    weights = tuple(taps.tolist()) if plan.window == "gaussian" else len(taps)
    return partitioned(functools.partial(slide, axis=axis, taps=weights, padding=(left, right)), x, (axis,))


def with_halo(x: jax.Array, axis: int, before: int, after: int, span: Span) -> jax.Array:
    """The array with the neighbouring shards' elements around it, zeros past the ends of the whole array.

    Raises:
      FieldError: the mapped axis is unbound, or carries index groups.
    """
    assert span.mapped is not None
    if span.groups:
        raise FieldError(f"window '{span}' takes its neighbours' elements and cannot use index groups")
    shards, length = axis_size(span.mapped), x.shape[axis]

    def from_shard(distance: int, start: int, stop: int) -> jax.Array:
        piece = lax.slice_in_dim(x, start, stop, axis=axis)
        # A whole cycle, since vmap takes no other permutation; what came round the ends is past the edge, so zero.
        received = lax.ppermute(piece, span.mapped, [(i, (i + distance) % shards) for i in range(shards)])
        sender = lax.axis_index(span.mapped) - distance
        return jnp.where((sender >= 0) & (sender < shards), received, jnp.zeros((), x.dtype))

    pieces = [x]
    for hop in range(1, math.ceil(before / length) + 1):
        pieces.insert(0, from_shard(hop, max(0, length * hop - before), length))
    for hop in range(1, math.ceil(after / length) + 1):
        pieces.append(from_shard(-hop, 0, min(length, after - length * (hop - 1))))
    return jnp.concatenate(pieces, axis)


def inverse_power(q: jax.Array, power: float, positive: bool = False) -> jax.Array:
    """The power q ** -power, zero where q is zero; square roots where they do, since a general power is slow.

    `positive` promises that q is positive: a select would break a chain that XLA:CPU computes in one pass.
    """
    if not positive:
        found = (q > 0) | jnp.isnan(q)
        return jnp.where(found, inverse_power(jnp.where(found, q, 1), power, True), 0)
    if power == 0.5:
        return lax.rsqrt(q)
    if power == 0.75:
        root = lax.rsqrt(q)
        return root * lax.sqrt(root)
    return 1 / q if power == 1 else q**-power
