"""What is said to the compiler: every line that changes no number and is there for XLA.

Most of it is for XLA:CPU, which computes a reduction and what follows from it in one pass over x, held in cache, but
writes out every array of the size of x that two such passes share, such as x - mean. So what takes a pass of its own
also takes its own copy of the small statistics (`distinct_copy`), and shares nothing but x itself with the others. The
copies have names, by the pass that they are for:

    FOR_GRADIENT  the gradient of x: v in E[v dx], whose transpose is a term of that gradient
    FOR_SCALE     the gradient of the scale, a sum of g v
    FOR_Y         the output
    FOR_SUMS      the sums of g v that windows then slide over (divisive norm)
    FOR_ROUNDING  the sum of v: what rounding left of the mean
    FOR_MEAN      the gradient that goes through the mean, where windows slide over the sums

Two more notes stand where they act: in `window.py`, and in `inverse_power`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.jet import jet_rules, linear_prop
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax._expect.sharding import along_one_shard
from normjax._expect.sizes import at_least

FOR_GRADIENT, FOR_SCALE, FOR_Y, FOR_SUMS, FOR_ROUNDING, FOR_MEAN = 1, 2, 3, 4, 5, 6
GPUS = ("cuda", "rocm")

_said_p = Primitive("said_to_xla")  # the identity, but for what its lowering for the CPU says
_again_p = Primitive("computed_again")  # of two equal arrays the second; on the CPU the first
_afresh_p = Primitive("afresh")  # the identity, but for what its lowering for GPUs says
_root_p = Primitive("root_or_nan")  # one over the root
ROOTS_FROM = 1e-18  # the smallest argument of `root_or_nan`


def distinct_copy(statistic: jax.Array, use: int) -> jax.Array:
    """An exact copy of a small statistic that XLA:CPU takes for another value: other arithmetic where it is NaN."""
    return _said_p.bind(statistic, use=use)


def barrier(x: jax.Array) -> jax.Array:
    """Keeps XLA:CPU from merging two steps into one."""
    return _said_p.bind(x, use=0)


def computed_again(again: jax.Array, known: jax.Array) -> jax.Array:
    """What is known already; on the CPU the equal array that is computed once more."""
    return _again_p.bind(again, known)


def afresh(x: jax.Array) -> jax.Array:
    """The array itself; what a GPU has computed of it already it computes once more, rather than to keep it in memory."""
    return _afresh_p.bind(x)


def is_for_one_device(context: mlir.LoweringRuleContext) -> bool:
    """Whether the program that is lowered is one of a single device, where no axis is sharded."""
    return getattr(context.module_context.axis_context, "num_devices", None) == 1


def root_or_nan(q: jax.Array) -> jax.Array:
    """The power q ** -0.5 of a q of at least `ROOTS_FROM`; NaN where q is infinite."""
    return _root_p.bind(q)


def _root(q: jax.Array) -> jax.Array:
    return lax.rsqrt(q + (q - q))


def _chained_root(q: jax.Array) -> jax.Array:
    """The root by steps that use each value once, as a kernel over rows of XLA wants them: of infinity, sqrt(-1e-28)."""
    return lax.sqrt(2.0**60 / q - 1e-28) * 2.0**-30 if q.dtype == jnp.float32 else _root(q)


def _say(x: jax.Array, *, use: int) -> jax.Array:
    return jnp.where(x != x, x + x.dtype.type(use), x) if use else lax.optimization_barrier(x)


def _said_tangent(primals: tuple, tangents: tuple, *, use: int) -> tuple:
    """The tangent of a copy is no copy; that of a barrier is one."""
    (x,), (dx,) = primals, tangents
    return _said_p.bind(x, use=use), dx if use or type(dx) is ad.Zero else barrier(dx)


def _transpose_again(ct: jax.Array, *_: object) -> list[jax.Array]:
    zero = jnp.zeros_like(ct)
    return [_again_p.bind(ct, zero), _again_p.bind(zero, ct)]


def _batch_again(args: tuple, dims: tuple) -> tuple[jax.Array, int]:
    (size,) = {x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None}
    return _again_p.bind(*(batching.bdim_at_front(x, dim, size) for x, dim in zip(args, dims, strict=True))), 0


# What serves one compiler is chosen when a program is lowered for its platform, and so in no program for another.
_said_p.def_impl(lambda x, *, use: x)
_said_p.def_abstract_eval(lambda x, *, use: x)
ad.deflinear2(_said_p, lambda ct, _, *, use: [_said_p.bind(ct, use=use)])
ad.primitive_jvps[_said_p] = _said_tangent
batching.defvectorized(_said_p)
mlir.register_lowering(_said_p, lambda _, x, *, use: [x])
mlir.register_lowering(_said_p, mlir.lower_fun(_say, multiple_results=False), platform="cpu")
jet_rules[_said_p] = functools.partial(linear_prop, _said_p)

_again_p.def_impl(lambda again, known: known)
_again_p.def_abstract_eval(lambda again, known: known)
ad.deflinear2(_again_p, _transpose_again)
batching.primitive_batchers[_again_p] = _batch_again
mlir.register_lowering(_again_p, lambda _, again, known: [known])
mlir.register_lowering(_again_p, lambda _, again, known: [again], platform="cpu")
jet_rules[_again_p] = functools.partial(linear_prop, _again_p)

_afresh_p.def_impl(lambda x: x)
_afresh_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_afresh_p, lambda ct, _: [ct])
ad.primitive_jvps[_afresh_p] = lambda primals, tangents: (afresh(*primals), *tangents)
batching.defvectorized(_afresh_p)
mlir.register_lowering(_afresh_p, lambda _, x: [x])
for _gpu in GPUS:
    mlir.register_lowering(_afresh_p, mlir.lower_fun(lax.optimization_barrier, multiple_results=False), platform=_gpu)


def _root_tangent(primals: tuple, tangents: tuple) -> tuple:
    """The root of q has the slope -r ** 3 / 2, for its r."""
    root, (dq,) = _root_p.bind(*primals), tangents
    return root, ad.Zero(root.aval) if type(dq) is ad.Zero else dq * root * root * (-0.5 * root)


_root_p.def_impl(_root)
_root_p.def_abstract_eval(lambda q: q)
ad.primitive_jvps[_root_p] = _root_tangent
batching.defvectorized(_root_p)
mlir.register_lowering(_root_p, mlir.lower_fun(_root, multiple_results=False))
for _where in ("cpu", *GPUS):
    mlir.register_lowering(_root_p, mlir.lower_fun(_chained_root, multiple_results=False), platform=_where)


def reduction_order(axes: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Steps of a sum: XLA:CPU sums axes between others on one thread if the last axis is short; the innermost goes first.

    The steps stand in the program for every platform: without the barrier between them other compilers join them again.
    """
    kept = [i for i in range(len(shape)) if i not in axes]
    between = len(axes) > 1 and kept and kept[0] < min(axes) and kept[-1] > max(axes)
    short = between and not at_least(math.prod(shape[max(axes) + 1 :]), 256, unknown=False)
    if not short or not at_least(shape[kept[0]], 2, unknown=True):
        return [axes]
    return [(max(axes),), tuple(sorted(axes)[:-1])]


def broadcast_in_order(small: jax.Array, x: jax.Array) -> jax.Array:
    """A small array broadcast against x, in the steps in which x is summed: the transpose is such a sum."""
    small = small.reshape((1,) * (x.ndim - small.ndim) + small.shape)
    long = tuple(axis for axis, (n, m) in enumerate(zip(small.shape, x.shape, strict=True)) if n == 1 != m)
    if not along_one_shard(x, long):
        return small
    for axes in reversed(reduction_order(long, x.shape)):
        small = jnp.broadcast_to(barrier(small), [x.shape[i] if i in axes else n for i, n in enumerate(small.shape)])
    return small
