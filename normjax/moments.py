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
        x = jnp.sum(x, bound.whole, keepdims=True)
    for name, groups in bound.collectives:
        axis_size(name)
        x = lax.psum(x, name, axis_index_groups=groups and [list(g) for g in groups])
    for axis, span in bound.by("blocks"):
        x = by_blocks(jnp.sum, x, axis, local_blocks(bound, axis, span))
    for axis, span in bound.by("window"):
        x = _window_total(x, axis, span, plan)
    return x


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


def partitioned(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, along: tuple[int, ...], reduced: tuple[int, ...] = ()
) -> jax.Array:
    """f(x), where f works along axes over which x may be sharded, and gives the shape of x but 1 along `reduced`.

    On a mesh with explicit axes a sharding is part of the type, and JAX has no rule for the split of a sharded axis, nor
    for the transpose of a window over one: the compiler partitions these, and the result is sharded as x is.
    """
    sharding = jax.typeof(x).sharding
    if all(sharding.spec[axis] is None for axis in along):
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
    if plan.window == "gaussian":
        parts = [functools.partial(_weighted_window, taps=taps, padding=(left, right))]
    elif left and right and 3 * len(taps) > 2 * length:
        # In two parts, up to the element and behind it: where the axis is sharded, the compiler would gather it for so
        # wide a window; for the parts it asks the neighbours.
        parts = [functools.partial(_box, width=left + 1, padding=(left, 0))]
        parts += [functools.partial(_box, width=right, padding=(-1, right))]
    else:
        parts = [functools.partial(_box, width=len(taps), padding=(left, right))]
    return functools.reduce(jnp.add, [partitioned(functools.partial(f, axis=axis), x, (axis,)) for f in parts])


def _box(x: jax.Array, axis: int, width: int, padding: tuple[int, int]) -> jax.Array:
    """The sum over each window of `width` elements."""
    dims = [width if i == axis else 1 for i in range(x.ndim)]
    pads = [padding if i == axis else (0, 0) for i in range(x.ndim)]
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, dims, [1] * x.ndim, pads)


def _weighted_window(x: jax.Array, axis: int, taps: np.ndarray, padding: tuple[int, int]) -> jax.Array:
    """The sum of shifted copies of x, each times its tap."""
    length = x.shape[axis] + sum(padding) - len(taps) + 1
    x = jnp.pad(x, [padding if i == axis else (0, 0) for i in range(x.ndim)])
    shifted = [x.dtype.type(tap) * lax.slice_in_dim(x, i, i + length, axis=axis) for i, tap in enumerate(taps)]
    return functools.reduce(jnp.add, shifted)


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


def inverse_power(q: jax.Array, power: float) -> jax.Array:
    """The power q ** -power, zero where q is zero; square roots where they do, since a general power is slow."""
    positive = q > 0
    q = jnp.where(positive | jnp.isnan(q), q, 1)
    if power == 0.5:
        r = lax.rsqrt(q)
    elif power == 0.75:
        root = lax.rsqrt(q)
        r = root * lax.sqrt(root)
    elif power == 1:
        r = 1 / q
    else:
        r = q**-power
    return jnp.where(positive | jnp.isnan(q), r, 0)
