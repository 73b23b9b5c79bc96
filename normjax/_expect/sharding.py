"""Arrays in pieces: mapped axes, neighbours beyond the edge of a shard, and what the compiler partitions by itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.errors import InconclusiveDimensionOperation

from normjax._expect.binding import Bound
from normjax._expect.sizes import at_least, is_known, max_dim, min_dim
from normjax.field import FieldError, Span


def axis_size(name: str) -> int:
    """Size of a mapped axis."""
    try:
        return lax.axis_size(name)
    except NameError:
        raise FieldError(
            f"mapped axis '@{name}' is not bound here; call this inside jax.vmap(..., axis_name=\"{name}\"), or inside "
            f'jax.shard_map or jax.pmap over a mesh axis "{name}"'
        ) from None
    except InconclusiveDimensionOperation:
        raise FieldError(
            f"the size of mapped axis '@{name}' is a symbol, and JAX has no collectives over such: give it a size, or make "
            "it an axis of the array, with a name in the layout"
        ) from None


def shards_of(span: Span) -> int:
    """How many shards or mapped examples one average of the span combines."""
    if span.mapped is None:
        return 1
    return len(span.groups[0]) if span.groups else axis_size(span.mapped)


def shards_behind(bound: Bound) -> int:
    """How many shards or mapped examples the spans that are averaged whole combine."""
    return math.prod(shards_of(Span(None, mapped=name, groups=groups)) for name, groups in bound.collectives)


def local_blocks(bound: Bound, axis: int, span: Span) -> int:
    """How many of the span's blocks this array holds."""
    blocks, length = span.blocks or 1, bound.shape[axis]
    if span.mapped is None:
        return blocks
    shards = shards_of(span)
    if blocks % shards or length % (blocks // shards):
        raise FieldError(
            f"blocks '{span}' do not align with {shards} shards of length {length}: the number of blocks must "
            "be a multiple of the number of shards, and each shard must split evenly"
        )
    return blocks // shards


def with_halo(x: jax.Array, axis: int, before: int, after: int, span: Span) -> jax.Array:
    """The array with the neighbouring shards' elements around it, zeros past the ends of the whole array."""
    assert span.mapped is not None
    if span.groups:
        raise FieldError(f"window '{span}' takes its neighbours' elements and cannot use index groups")
    shards, length = axis_size(span.mapped), x.shape[axis]
    if not is_known(length) and not at_least(length, max(before, after), unknown=False):
        raise FieldError(
            f"window '{span}' takes {max(before, after)} elements of its neighbours, and shards of length {length} may have "
            f'fewer: promise more to jax.export.symbolic_shape, constraints=["{length} >= {max(before, after)}"]'
        )

    def from_shard(distance: int, start: int, stop: int) -> jax.Array:
        piece = lax.slice_in_dim(x, start, stop, axis=axis)
        # A whole cycle, since vmap takes no other permutation; what came round the ends is past the edge, so zero.
        received = lax.ppermute(piece, span.mapped, [(i, (i + distance) % shards) for i in range(shards)])
        sender = lax.axis_index(span.mapped) - distance
        return jnp.where((sender >= 0) & (sender < shards), received, jnp.zeros((), x.dtype))

    def reached(elements: int) -> range:
        return range(1, (math.ceil(elements / length) if is_known(length) else min(1, elements)) + 1)

    left = [from_shard(hop, max_dim(0, length * hop - before), length) for hop in reached(before)]
    right = [from_shard(-hop, 0, min_dim(length, after - length * (hop - 1))) for hop in reached(after)]
    return jnp.concatenate([*left[::-1], x, *right], axis)


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
