"""The derivative rule of the equation, for the rows that gain by it: whole axes and blocks, order 2, no mask.

The tangent of y is the equation's own. For dx -> dy, with q = eps + gain m and d = q ** power:

    dv = dx - E_A[dx]        dm = 2 E_B[v dv]        dq = gain dm + deps        dy = dv / d - power y dq / q

It is a `jax.custom_jvp`, so that every transformation works (JAX transposes it for reverse mode, and differentiates it
again for second derivatives), and it is checkpointed, so that what JAX keeps for the backward pass is x and the small
statistics, where plain differentiation keeps several arrays of the size of x. Rows with windows keep plain
differentiation, which is faster there.

`fresh` is a matter of one compiler. XLA:CPU writes out every array of the size of x that two reductions share, such as
x - mean. If each term uses its own copy of the small statistics, the reductions share nothing but x itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from normjax import moments
from normjax.moments import inverse_power


def has_rule(recipe: Any, x: jax.Array, weights: Any) -> bool:
    """Whether this evaluation of the equation takes the rule; `recipe` as in `theory.py`.

    Not where a field is averaged over an axis of `vmap`: JAX may trace the rule after that axis is gone.
    """
    mapped = {span.mapped for plan in (recipe.a, recipe.b) if plan for _, span in plan.bound.spans if span.mapped}
    return (
        recipe.normalizer.order == 2
        and recipe.b is not None
        and recipe.floor is None
        and recipe.b.bound.pooled
        and (recipe.a is None or recipe.a.bound.pooled)
        and weights is None
        and not jnp.iscomplexobj(x)
        and mapped <= set(jax.sharding.get_abstract_mesh().manual_axes)
    )


def with_rule(plain: Callable[..., tuple]) -> Callable[..., tuple]:
    """Gives `plain(recipe, x, weights, eps, scale, bias) -> (y, v, mean, var)` the rule; weights are None."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def ruled(recipe, x, weights, eps, scale, bias):
        return plain(recipe, x, weights, eps, scale, bias)

    @ruled.defjvp
    def derive(recipe, primals, tangents):
        x, _, eps, scale, _ = primals
        dx, _, deps, dscale, dbias = tangents
        out = ruled(recipe, *primals)
        _, _, mean, var = out
        keep_x = jax.checkpoint(functools.partial(_tangent, recipe), prevent_cse=False)
        return out, keep_x(x, mean, var, eps, scale, dx, deps, dscale, dbias)

    return ruled


def _tangent(recipe, x, mean, var, eps, scale, dx, deps, dscale, dbias):
    """Tangents of (y, v, mean, var), linear in dx, deps, dscale and dbias."""
    n, a, b = recipe.normalizer, recipe.a, recipe.b

    def centred(copy):
        return x.astype(var.dtype) if mean is None else x.astype(var.dtype) - fresh(mean, copy)

    def divided(copy):  # what is divided by d: v, or x itself
        return x.astype(var.dtype) if n.keep_mean else centred(copy)

    def scaled(term, copy):
        return term if scale is None else term * fresh(scale, copy)

    dx = dx.astype(var.dtype)
    dmean = None if a is None else moments.average(dx, a)[0]
    if dmean is not None and a == b:
        # E[v dv] without a chained reduction. E[v] is what rounding left of the mean: not small beside the v of a small
        # field, or where the mean is large.
        dm = 2 * (moments.average(centred(1) * dx, b)[0] - moments.average(centred(2), b)[0] * dmean)
    else:
        dm = 2 * moments.average(centred(1) * (dx if a is None else dx - dmean), b)[0]
    q, dq = eps + n.gain * var, n.gain * dm + deps
    r = inverse_power(q, n.power)
    dy = scaled(dx * fresh(r, 1), 1)
    if dmean is not None and not n.keep_mean:
        dy = dy - scaled(dmean * fresh(r, 2), 2)
    dy = dy - scaled(divided(3) * (n.power * fresh(r, 3) * inverse_power(q, 1.0) * dq), 3)
    if dscale is not None:
        dy = dy + divided(4) * fresh(r, 4) * dscale
    if dbias is not None:
        dy = dy + dbias
    dv = dx if dmean is None else dx - dmean
    return jnp.broadcast_to(dy, x.shape).astype(recipe.dtype), dv, dmean, dm


def fresh(v: jax.Array, copy: int) -> jax.Array:
    """An exact copy of a small statistic that XLA:CPU takes for another value: other arithmetic where it is NaN.

    >>> fresh(jnp.array([1.0, jnp.inf]), 3).tolist()
    [1.0, inf]
    """
    if jax.default_backend() != "cpu":
        return v
    return jnp.where(v != v, v + v.dtype.type(copy), v)
