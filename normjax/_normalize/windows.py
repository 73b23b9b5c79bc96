"""The derivative rule where windows slide over single elements, so that the statistics are as large as x.

Plain differentiation keeps several arrays of that size, in float32, and a GPU would rather compute than read them. So the
rule keeps v = x - E_A[x] alone. Its tangent is that of the plain form, for q = eps + gain m and r = q ** -power:

    dy = r(v') dv + v dr(v'', dv)

in which v' and v'' are v, but nothing that is computed of one is taken for what is computed of another: the two terms are
sums over different windows, in different passes. Other compilers, to whom a window is dear, keep what they have computed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normjax._expect.arrays import statistics_dtype
from normjax._expect.expectation import OverFields
from normjax._expect.window import at_once
from normjax._expect.xla import afresh
from normjax._normalize import balance
from normjax._normalize.derivative import in_taylor_mode
from normjax._normalize.tangents import Parts
from normjax.theory import Normalizer, output, scale_and_shift, statistics


def has_rule(n: Normalizer, E: OverFields, x: jax.Array, moment: jax.Array | None, *beside: jax.Array | None) -> bool:
    """Whether this evaluation of the equation takes the rule; a mean that is given, eps, scale and bias lie `beside`.

    Not where a GPU sums a window in two steps: what lies between them had better be kept.
    """
    if moment is not None or n.order != 2 or n.var is None or n.floor is not None or n.keep_mean:
        return False
    bound = E.plan(n.var).bound
    widths = [span.window or 1 for _, span in bound.by("window")]
    if not widths or not at_once(widths) or any(span.mapped for _, span in bound.spans):
        return False
    return E.weights is None and not jnp.iscomplexobj(x) and not any(map(in_taylor_mode, (x, *beside)))


def ruled(
    n: Normalizer, E: OverFields, dtype: DTypeLike, x: jax.Array, mean: jax.Array | None, *beside: jax.Array | None
) -> Parts:
    """The equation with the rule, around this mean or that of x; `beside` is eps, scale and bias."""
    wide = x.astype(statistics_dtype(x.dtype))
    mean = E(wide, n.mean) if mean is None and n.mean is not None else mean
    v = wide if mean is None else wide - mean
    y, moment = _divided(n, E, dtype, x if mean is None else v, *beside)  # to keep x, which may be shorter
    return y, v, mean, moment


def _over_spread(
    n: Normalizer, E: OverFields, u: jax.Array, v: jax.Array, eps, scale, bias
) -> tuple[jax.Array, jax.Array]:
    """The moment of v, and u divided by what it gives."""
    u, v = (z.astype(statistics_dtype(z.dtype)) for z in (u, v))
    _, _, moment = statistics(v, dataclasses.replace(n, mean=None), E)
    assert moment is not None
    n, m, eps, scale = balance.balanced(n, moment, eps, scale, v.dtype)
    return scale_and_shift(output(u, u, m, n, E, eps), scale, bias), moment


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _divided(n: Normalizer, E: OverFields, dtype: DTypeLike, v, eps, scale, bias) -> tuple[jax.Array, jax.Array]:
    y, moment = _over_spread(n, E, v, v, eps, scale, bias)
    return y.astype(dtype), moment


@_divided.defjvp
def _derive(n: Normalizer, E: OverFields, dtype: DTypeLike, primals, moves):
    def tangent(v, eps, scale, dv, deps, dscale, dbias):
        dv = dv.astype(statistics_dtype(v.dtype))  # once: transposed, the terms are added before they are rounded
        direct, _ = _over_spread(n, E, dv, afresh(v), eps, scale, dbias)
        divided = functools.partial(_over_spread, n, E, v, bias=None)
        known = afresh(afresh(v)).astype(dv.dtype), eps, scale  # twice, or it were the one above
        through, dm = jax.jvp(divided, known, (dv, deps, dscale))[1]
        return (direct + through).astype(dtype), dm

    keep_v = jax.checkpoint(tangent, prevent_cse=False)
    return _divided(n, E, dtype, *primals), keep_v(*primals[:3], *moves)
