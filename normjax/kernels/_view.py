"""Arrays of any rank, seen as the kernels see them: what fits, and the reshaping to rows or to groups and back."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.sizes import is_known
from normjax._leaves import one_of
from normjax.kernels import _block as block
from normjax.kernels import _group as group
from normjax.kernels import _rule as rule
from normjax.kernels._block import ACTIVATIONS, Given, How

LONGEST = 16384  # elements of a row: backward, the registers of a GPU's multiprocessor hold about three such rows


def fits(
    x_shape: tuple[int, ...],
    axes: tuple[int, ...],
    scale_shape: tuple[int, ...] | None,
    bias_shape: tuple[int, ...] | None,
    dtype: DTypeLike,
    eps_shape: tuple[int, ...] = (),
    spec: Iterable[object] = (),
    groups: int = 0,
) -> bool:
    """Whether the kernels take this case; order 2 and whole `axes`, without a mask, are the caller's to know.

    Args:
      x_shape: of the array. It fits if every size is a number: the tiles of a kernel are cut for sizes, not for symbols.
      axes: the axes of the statistics, from 0. They fit if they are the last of the array, of at most LONGEST elements;
        with `groups` if they are the last before the channels, and an example's share fits the fast memory of a platform.
      scale_shape: scalar or of the rank of x, or None. It fits if it varies along `axes` alone; with `groups` if it varies
        along the channels alone.
      bias_shape: scalar or of the rank of x, or None. It fits where a scale of this shape would.
      dtype: of x: float32, bfloat16 or float16 fits.
      eps_shape: a scalar fits.
      spec: `jax.typeof(x).sharding.spec`. It fits if nothing is sharded: the compiler cannot partition a kernel.
      groups: number of equal blocks of the last axis with statistics of their own; 0 for rows.

    >>> fits((8, 128, 768), (2,), (1, 1, 768), None, jnp.bfloat16)
    True
    >>> fits((8, 128, 768), (1,), None, None, jnp.bfloat16), fits((8, 768), (1,), (8, 1), None, jnp.float32)
    (False, False)
    >>> fits((8, 56, 56, 256), (1, 2), (1, 1, 1, 256), None, jnp.bfloat16, groups=32)
    True
    """
    last = len(x_shape) - bool(groups)
    first = last - len(axes)
    kept = last if groups else first
    trailing = bool(axes) and tuple(sorted(axes)) == tuple(range(first, last))
    beside = all(shape is None or math.prod(shape[:kept]) == 1 for shape in (scale_shape, bias_shape))
    real = any(dtype == d for d in (jnp.float32, jnp.bfloat16, jnp.float16))
    if not trailing or not beside or not real or eps_shape or any(name is not None for name in spec):
        return False
    if not all(map(is_known, x_shape)) or math.prod(x_shape) == 0:
        return False
    if not groups:
        return math.prod(x_shape[first:]) <= LONGEST
    shape = (math.prod(x_shape[:first]), math.prod(x_shape[first:last]), x_shape[-1])
    size = jnp.dtype(dtype).itemsize
    return x_shape[-1] % groups == 0 and any(group.cut(target, shape, groups, size) for target in ("gpu", "tpu"))


def evaluate(
    how: How,
    x: jax.Array,
    residual: Given,
    axes: tuple[int, ...],
    eps: ArrayLike,
    *beside: ArrayLike | None,
) -> tuple[jax.Array, jax.Array, Given, jax.Array]:
    """Sees x as `[rows, length]` or `[examples, positions, channels]`, and scale and bias as `[1, length]` of the last."""
    one_of("activation", how.activation, tuple(ACTIVATIONS))
    first = x.ndim - len(axes) - bool(how.groups)
    kept = x.ndim - 1 if how.groups else first  # scale and bias lie along the axes from here on
    length = math.prod(x.shape[kept:])

    def row(p: ArrayLike | None) -> Given:
        if p is None:
            return None
        p = jnp.asarray(p).astype(jnp.float32)
        return _like(jnp.broadcast_to(p.reshape(p.shape[kept:]), x.shape[kept:]).reshape(1, length), x)

    seen = (-1, math.prod(x.shape[first:kept]), length) if how.groups else (-1, length)
    eps = _like(jnp.asarray(eps).astype(jnp.float32).reshape(1, 1), x)
    flat = None if residual is None else residual.reshape(seen)
    evaluate = _plain if how.run == "xla" else rule.normalize
    y, added, mean, var = evaluate(how, x.reshape(seen), flat, eps, *map(row, beside))
    if var is None:  # rows: nobody else's business, and not computed where nobody asks
        _, mean, var = block.statistics(how, added)
    small = x.shape[:first] + (1,) * len(axes) + x.shape[x.ndim - bool(how.groups) :]
    return y.reshape(x.shape), added.reshape(x.shape), None if mean is None else mean.reshape(small), var.reshape(small)


def _plain(how: How, x: jax.Array, *others: Any) -> tuple:
    y, added, mean, var = (group if how.groups else block).forward(how, x, *others)
    return y, x if added is None else added, mean, var


def _like(p: jax.Array, x: jax.Array) -> jax.Array:
    """Inside `shard_map`: p as a value that varies over the mapped axes that x varies over. Its gradient is their sum."""
    missing = _varying(x) - _varying(p)
    return jax.lax.pcast(p, tuple(sorted(missing)), to="varying") if missing else p


def _varying(x: jax.Array) -> frozenset:
    kind: Any = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
