"""The derivative rule of the equation, for the rows that gain by it: order 2, no mask, and small statistics.

The tangent of y is the equation's own. For dx -> dy, with q = eps + gain m, d = q ** power and r = 1 / d:

    dv = dx - E_A[dx]        dm = 2 E_B[v dv]        dq = gain dm + deps        dy = scale r (dv - power v dq / q) + ...

It is a `jax.custom_jvp`, so that every transformation works, and checkpointed, so that what JAX keeps for the backward
pass is x and the small statistics, where plain differentiation keeps several arrays of the size of x. Windows of arrays
that nothing pools, where the statistics are as large as x, have a rule of their own in `windows.py`.

Three forms of one tangent (`tangents.py`), by what is small. Where statistics, scale and bias all vary along few elements
(batch, group and instance norm), dy = alpha dx + gamma v + beta with small alpha, beta and gamma; transposed, these ask for
two sums over x, of g and of g v, from which the gradients of x, scale and bias follow alike. Where the scale varies along
the axes that are averaged (layer norm), the products with it are of the size of x. Where windows follow the pooling
(divisive norm), they slide over small maps.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.jet import JetTrace
from jax.typing import DTypeLike

from normjax._expect.binding import Bound
from normjax._expect.expectation import OverFields
from normjax._expect.sharding import along_one_shard
from normjax._expect.sizes import at_least
from normjax._expect.xla import FOR_Y, ROOTS_FROM, distinct_copy, root_or_nan
from normjax._leaves import nan_if_infinite
from normjax._normalize import tangents
from normjax._normalize.moments import of_field
from normjax._normalize.tangents import Known, Outputs, Parts, Tangents, divisor
from normjax.theory import Normalizer, is_positive, output, scale_and_shift, smoothed

LARGE = 2**20  # elements; 4 MB of float32


def has_rule(n: Normalizer, E: OverFields, x: jax.Array, *beside: jax.Array | None) -> bool:
    """Whether this evaluation of the equation takes the rule, if no statistic is given; eps, scale and bias lie `beside`.

    Not where a field is averaged over an axis of `vmap`: JAX may trace the rule after that axis is gone. Nor in Taylor mode,
    which cannot see through a `jax.custom_jvp` or a `jax.checkpoint`.
    """
    if any(map(in_taylor_mode, (x, *beside))):
        return False
    if n.order != 2 or n.var is None or n.floor is not None or E.weights is not None or jnp.iscomplexobj(x):
        return False
    bounds = [E.plan(field).bound for field in (n.mean, n.var) if field is not None]
    mapped = {span.mapped for bound in bounds for _, span in bound.spans if span.mapped}
    small = all(bound.pooled for bound in bounds) or _shrinks(n, bounds[-1])
    return small and mapped <= set(jax.sharding.get_abstract_mesh().manual_axes)


def in_taylor_mode(operand: object) -> bool:
    """Whether `jet` stands around this value, or around a transformation of it."""
    trace = getattr(operand, "_trace", None)
    while trace is not None and not isinstance(trace, JetTrace):
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def _shrinks(n: Normalizer, bound: Bound) -> bool:
    """Whether A = B has windows, but only after pooling has made the array small."""
    few = math.prod(1 if axis in bound.whole else size for axis, size in enumerate(bound.shape))
    local = not any(span.mapped or span.blocks for _, span in bound.spans)
    return n.mean in (None, n.var) and local and at_least(math.prod(bound.shape), 16 * few, unknown=False)


def in_passes(bound: Bound) -> bool:
    """Whether XLA:CPU cannot have y in one pass with the statistics: these mix blocks, or examples but not channels."""
    return any(span.blocks for _, span in bound.spans) or (0 in bound.whole and len(bound.shape) - 1 not in bound.whole)


def ruled(n: Normalizer, E: OverFields, dtype: DTypeLike, x: jax.Array, *small: jax.Array | None) -> Parts:
    """The equation with its derivative rule, for what `has_rule`, y of this dtype; `small` is eps, scale and bias."""
    y, mean, rest, moment = _ruled(n, E, dtype, in_passes(E.plan(divisor(n)).bound), False, x, *small)
    return y, Known(x.astype(moment.dtype), mean, rest, moment).centred(), mean, moment


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3, 4))
def _ruled(
    n: Normalizer, E: OverFields, dtype: DTypeLike, own_pass: bool, differentiated: bool, x, eps, scale, bias
) -> Outputs:
    """The output and the statistics; with `own_pass`, the output shares nothing big with these."""
    mean, rest, seen = of_field(x, n, E, differentiated)
    moment = nan_if_infinite(seen, n.gain)
    known = Known(x.astype(moment.dtype), mean, rest, moment)
    if own_pass:
        y = output(known.x, known.centred(FOR_Y), distinct_copy(moment, FOR_Y), n, E, eps)
    elif n.power == 0.5 and is_positive(n, eps) and n.eps >= ROOTS_FROM:
        y = (known.x if n.keep_mean else known.centred()) * root_or_nan(smoothed(seen, n, eps))
    else:
        y = output(known.x, known.centred(), moment, n, E, eps)
    return scale_and_shift(y, scale, bias).astype(dtype), mean, rest, moment


@_ruled.defjvp
def _derive(
    n: Normalizer, E: OverFields, dtype: DTypeLike, own_pass: bool, differentiated: bool, primals, moves
) -> tuple[Outputs, Outputs]:
    x, eps, scale, _ = primals
    bound, large = E.plan(divisor(n)).bound, at_least(x.size, LARGE, unknown=False)
    results = _ruled(n, E, dtype, large or in_passes(bound), True, *primals)
    _, mean, rest, moment = results
    if not bound.pooled:
        form = tangents.windowed
    elif _is_small(x, mean, moment, eps, scale):
        form = tangents.pooled
    elif large and _is_bare(n, bound, x, eps):
        form = tangents.rowwise_bare
    else:
        form = functools.partial(tangents.rowwise, large=large)
    keep_x = jax.checkpoint(functools.partial(form, n, E, dtype), prevent_cse=False)
    return results, keep_x(Known(x, mean, rest, moment, eps, scale), Tangents(*moves))


def _is_small(x, *parts) -> bool:
    """Whether these vary together along few elements of x."""
    joint = jnp.broadcast_shapes(*(part.shape for part in parts if part is not None))
    return at_least(x.size, 16 * math.prod(joint), unknown=True)


def _is_bare(n: Normalizer, bound: Bound, x: jax.Array, eps: jax.Array | None) -> bool:
    """Whether the rule may leave the axes of length 1 away: whole axes of one shard alone."""
    alone = 0 < len(bound.whole) == len(bound.spans) and not bound.collectives and n.mean in (None, n.var)
    return alone and (eps is None or not eps.ndim) and along_one_shard(x, bound.whole)
