"""The derivative rule of the equation, for the rows that gain by it: order 2, no mask, and small statistics.

The tangent of y is the equation's own. For dx -> dy, with q = eps + gain m, d = q ** power and r = 1 / d:

    dv = dx - E_A[dx]        dm = 2 E_B[v dv]        dq = gain dm + deps        dy = scale r (dv - power v dq / q) + ...

It is a `jax.custom_jvp`, so that every transformation works (JAX transposes it for reverse mode, and differentiates it
again for second derivatives), and it is checkpointed, so that what JAX keeps for the backward pass is x and the small
statistics, where plain differentiation keeps several arrays of the size of x. Windows of arrays that
nothing pools keep plain differentiation, since there the statistics are as large as x.

Three forms of the same tangent, by what is small. Where statistics, scale and bias all vary along few elements (batch,
group and instance norm), dy = alpha dx + gamma v + beta with small alpha, beta and gamma; transposed, these ask
for two sums over x, of g and of g v, from which the gradients of x, scale and bias follow alike. Where the scale varies
along the axes that are averaged (layer norm), the products with it are of the size of x. Where windows follow the pooling
(divisive norm), they slide over small maps.

`fresh` is a matter of one compiler. XLA:CPU computes a reduction and what follows from it in one pass over x, held in cache,
but writes out every array of the size of x that two such passes share, such as x - mean. So y, the gradient of x and the
gradient of the scale each take their own copy of the small statistics, and share nothing but x itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax import moments
from normjax.moments import inverse_power

LARGE = 2**20  # elements; 4 MB of float32


def has_rule(recipe: Any, x: jax.Array, weights: Any) -> bool:
    """Whether this evaluation of the equation takes the rule; `recipe` as in `theory.py`.

    Not where a field is averaged over an axis of `vmap`: JAX may trace the rule after that axis is gone.
    """
    mapped = {span.mapped for plan in (recipe.a, recipe.b) if plan for _, span in plan.bound.spans if span.mapped}
    return (
        recipe.normalizer.order == 2
        and recipe.b is not None
        and recipe.floor is None
        and (all(p is None or p.bound.pooled for p in (recipe.a, recipe.b)) or _shrinks(recipe, x))
        and weights is None
        and not jnp.iscomplexobj(x)
        and mapped <= set(jax.sharding.get_abstract_mesh().manual_axes)
    )


def _shrinks(recipe: Any, x: jax.Array) -> bool:
    """Whether A = B has windows, but only after pooling has made the array small."""
    a, b = recipe.a, recipe.b
    few = math.prod(1 if axis in b.bound.whole else size for axis, size in enumerate(x.shape))
    local = not any(span.mapped or span.blocks for _, span in b.bound.spans)
    return a in (None, b) and local and 16 * few <= x.size


def in_passes(recipe: Any) -> bool:
    """Whether y takes a pass of its own over x, for XLA:CPU cannot have it in one with the statistics.

    It cannot where they mix examples but not channels (batch norm), or blocks.
    """
    bound = recipe.b.bound
    return any(span.blocks for _, span in bound.spans) or (0 in bound.whole and len(bound.shape) - 1 not in bound.whole)


def with_rule(plain: Callable[..., tuple]) -> Callable[..., tuple]:
    """Gives `plain(recipe, x, weights, eps, scale, bias, apart) -> (y, v, mean, var)` the rule; weights are None.

    `apart` asks for a y that shares nothing big with the statistics.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
    def ruled(recipe, apart, x, weights, eps, scale, bias):
        return plain(recipe, x, weights, eps, scale, bias, apart=apart)

    @ruled.defjvp
    def derive(recipe, apart, primals, tangents):
        x, _, eps, scale, bias = primals
        dx, _, deps, dscale, dbias = tangents
        out = ruled(recipe, x.size >= LARGE or in_passes(recipe), *primals)
        _, _, mean, var = out
        form = _pooled if _is_small(x, mean, var, eps, scale, bias) else _rowwise
        form = form if recipe.b.bound.pooled else _windowed
        keep_x = jax.checkpoint(functools.partial(form, recipe), prevent_cse=False)
        return out, keep_x(x, mean, var, eps, scale, dx, deps, dscale, dbias)

    return ruled


def _is_small(x, *parts) -> bool:
    """Whether these vary together along few elements of x."""
    joint = np.broadcast_shapes(*(part.shape for part in parts if part is not None))
    return 16 * math.prod(joint) <= x.size


def _pooled(recipe, x, mean, var, eps, scale, dx, deps, dscale, dbias):
    """Tangents of (y, v, mean, var), linear in dx, deps, dscale and dbias: dy = alpha dx + gamma v + beta."""
    n = recipe.normalizer
    x, dx = x.astype(var.dtype), dx.astype(var.dtype)
    v = x if mean is None else x - fresh(mean, 1)
    dmean, dv, dm = _moments_of(recipe, v, dx, x if mean is None else x - fresh(mean, 5))
    q, dq = eps + n.gain * var, n.gain * dm + deps
    r = inverse_power(q, n.power, recipe.positive)
    alpha = r if scale is None else r * scale
    gamma = -n.power * alpha * inverse_power(q, 1.0, recipe.positive) * dq
    beta = None if dmean is None or n.keep_mean else -alpha * dmean
    spread = functools.partial(moments.spread, x=x)
    if n.keep_mean:
        dy = spread(alpha) * dx + spread(gamma) * x
        if dscale is not None:
            dy = dy + spread(r * dscale) * x
    else:
        if dscale is not None:
            gamma = gamma + r * dscale
        dy = spread(alpha) * dx + spread(gamma) * (v if mean is None else x - fresh(mean, 2))
    if dbias is not None:
        beta = dbias if beta is None else beta + dbias
    if beta is not None:
        dy = dy + spread(beta)
    return dy.astype(recipe.dtype), dv, dmean, dm


def _rowwise(recipe, x, mean, var, eps, scale, dx, deps, dscale, dbias):
    """The same tangents, where the products with scale are of the size of x.

    Large arrays: the statistics lose the axes of length 1, since reshapes would break the one pass of XLA:CPU. Small ones
    stay in its caches, where what is shared costs less than what is computed twice.
    """
    large = x.size >= LARGE
    copy = fresh if large else lambda s, _: s
    n, a, b = recipe.normalizer, recipe.a, recipe.b
    power = functools.partial(inverse_power, positive=recipe.positive)
    whole = b.bound.whole
    bare = 0 < len(whole) == len(b.bound.spans) and not b.bound.collectives and a in (None, b)
    bare = bare and large and not eps.ndim and moments.along_one_shard(x, whole)
    kept = tuple(i for i in range(x.ndim) if i not in whole)

    def narrow(s):
        return s.reshape([x.shape[i] for i in kept]) if bare else s

    def wide(s):
        return lax.broadcast_in_dim(s, x.shape, kept) if bare else s

    def average(z):
        return jnp.sum(z, whole) / math.prod(x.shape[i] for i in whole)

    x, dx = x.astype(var.dtype), dx.astype(var.dtype)
    v = x if mean is None else x - wide(copy(narrow(mean), 1))
    if bare:
        v = v if a is None else v - wide(average(v))  # what rounding left of the mean; as below
        dmean = None if a is None else average(dx)
        dv, dm = dx if dmean is None else dx - wide(dmean), 2 * average(v * dx)
    else:
        dmean, dv, dm = _moments_of(recipe, v, dx, v)
    # The moment once more, from v: XLA:CPU then has the whole gradient of x in one pass.
    m = average(v * v) if bare and jax.default_backend() == "cpu" else copy(narrow(var), 1)
    q, dq = eps + n.gain * m, n.gain * dm + deps
    r = power(q, n.power)
    # Signs go with what is small, so that no copy of the cotangent is made for them.
    dy = wide(r) * dx + (x if n.keep_mean else v) * wide(-n.power * r * power(q, 1.0) * dq)
    if dmean is not None and not n.keep_mean:
        dy = dy + wide(-r * dmean)
    if scale is not None:
        dy = dy * copy(scale, 1)
    if dscale is not None:
        r = power(eps + n.gain * copy(narrow(var), 2), n.power)
        dy = dy + (x if mean is None or n.keep_mean else x - wide(copy(narrow(mean), 2))) * wide(r) * dscale
    if dbias is not None:
        dy = dy + dbias
    restore = [1 if i in whole else size for i, size in enumerate(x.shape)]
    dmean, dm = (s if s is None or not bare else s.reshape(restore) for s in (dmean, dm))
    return jnp.broadcast_to(dy, x.shape).astype(recipe.dtype), dv, dmean, dm


def _windowed(recipe, x, mean, var, eps, scale, dx, deps, dscale, dbias):
    """The same tangents, where the array is pooled first and the windows are windows of small maps.

    The windows stand between the sums over x and the gradient of x, so that each sum has its own copies.
    """
    n, b = recipe.normalizer, recipe.b
    pool, slide = (functools.partial(moments.total, plan=plan) for plan in moments.split(b))
    count = moments.counts(b, var.dtype).astype(var.dtype)
    x, dx = x.astype(var.dtype), dx.astype(var.dtype)

    def centred(copy):
        return x if mean is None else x - fresh(mean, copy)

    def divided(copy):
        return x if n.keep_mean else centred(copy)

    def scaled(term, copy):
        return term if scale is None else term * fresh(scale, copy)

    # Copy 3 is that of y. What is small is multiplied before it meets a sum, and copied, so that no sum is written out in
    # one pass with constants of its size.
    q = eps + n.gain * var
    r = inverse_power(q, n.power, recipe.positive)
    slope = -n.power * r * inverse_power(q, 1.0, recipe.positive)
    seen = pool(centred(1) * dx)
    around = None if recipe.a is None else slide(pool(dx))
    dmean = None if around is None else around / count
    if around is not None:
        # The sum of v from that of x, which the mean has taken already: as exact as the mean.
        v = pool(x) - math.prod(x.shape[i] for i in b.bound.whole) * mean
        seen = seen - around * fresh(v / count, 1)
    within = slide(seen)
    dm = 2 * within / count
    dy = scaled(dx, 1) * r
    dy = dy + scaled(divided(4), 4) * (fresh(2 * n.gain * slope / count, 1) * within + slope * deps)
    if around is not None and not n.keep_mean:
        dy = dy + _outer(fresh(-r / count, 6) * around, None if scale is None else fresh(scale, 6), x, b.bound.whole)
    if dscale is not None:
        dy = dy + divided(5) * fresh(r, 5) * dscale
    if dbias is not None:
        dy = dy + dbias
    return dy.astype(recipe.dtype), dx if dmean is None else dx - dmean, dmean, dm


def _outer(small, scale, x, whole):
    """The product small * scale, in the shape of x.

    By rows and columns where that can be: its transpose, a sum over the last axes, takes XLA:CPU twice as long on an array
    of more axes.
    """
    kept = x.ndim - len(whole)
    rows = math.prod(x.shape[:kept])
    flat = (
        whole == tuple(range(kept, x.ndim)) and small.size == rows and moments.along_one_shard(x, tuple(range(x.ndim)))
    )
    if scale is None or not flat or math.prod(scale.shape[:kept]) != 1:
        return jnp.broadcast_to(small if scale is None else small * scale, x.shape)
    row = jnp.broadcast_to(scale, (1,) * kept + x.shape[kept:]).reshape(1, -1)
    return (lax.broadcast_in_dim(small.reshape(-1), (rows, row.size), (0,)) * row).reshape(x.shape)


def _moments_of(recipe, v, dx, same):
    """Tangents of the mean, of v and of the moment; `same` is another copy of v."""
    a, b = recipe.a, recipe.b
    if a is None:
        return None, dx, 2 * moments.average(v * dx, b)[0]
    dmean = moments.average(dx, a)[0]
    dv = dx - dmean
    if a != b:
        return dmean, dv, 2 * moments.average(v * dv, b)[0]
    # E[v dv] without a chained reduction. E[v] is what rounding left of the mean: not small beside the v of a small field,
    # or where the mean is large.
    return dmean, dv, 2 * (moments.average(v * dx, b)[0] - moments.average(same, b)[0] * dmean)


def fresh(v: jax.Array, copy: int) -> jax.Array:
    """An exact copy of a small statistic that XLA:CPU takes for another value: other arithmetic where it is NaN.

    >>> fresh(jnp.array([1.0, jnp.inf]), 3).tolist()
    [1.0, inf]
    """
    if jax.default_backend() != "cpu":
        return v
    return jnp.where(v != v, v + v.dtype.type(copy), v)
