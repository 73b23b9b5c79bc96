"""The derivatives of the fused kernels, and the choice of the kernel by platform.

Forward, one kernel; its `jax.custom_jvp` has as tangent the linear map `_tangent_p`, whose arithmetic is that of the plain
twin, and whose transpose is the kernel of the gradient. So reverse mode runs two kernels and keeps the sum, the scale, and
the statistics of groups; forward mode runs plain JAX; and each can be differentiated again, since JAX differentiates the
twin where it meets the kernel of the gradient. A platform without kernels runs the twin.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax.kernels import _block as block
from normjax.kernels import _group as group
from normjax.kernels._block import Given, How

Results = tuple[jax.Array, jax.Array, Given, Given]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(how: How, x: jax.Array, residual: Given, eps: jax.Array, scale: Given, bias: Given) -> Results:
    """`forward` of the twin by a kernel; without a residual the sum is x, whose cotangent comes in all the same."""
    y, added, mean, var = _run(how, "forward", x, residual, eps, scale, bias)
    return y, x if added is None else added, mean, var


@normalize.defjvp
def _tangent(how: How, primals: tuple, tangents: tuple) -> tuple[Results, Results]:
    out = _, added, mean, var = normalize(how, *primals)
    _, residual, *parameters = primals
    dx, dresidual, *moved = tangents
    dsum = dx if residual is None else dx.astype(added.dtype) + dresidual.astype(added.dtype)
    known, known_tree = jax.tree.flatten((added, mean, var, *parameters))
    moving, moving_tree = jax.tree.flatten((dsum, *moved))
    flat = _tangent_p.bind(*known, *moving, how=how, known=known_tree, moving=moving_tree, mapped=())
    return out, jax.tree.unflatten(jax.tree.structure(out), flat)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradient(how: How, *operands: Given) -> tuple:
    """`backward` of the twin by a kernel."""
    return _run(how, "backward", *operands)


@_gradient.defjvp
def _gradient_tangent(how: How, primals: tuple, tangents: tuple) -> tuple:
    return jax.jvp(functools.partial(_twin(how).backward, how), primals, tangents)


def _twin(how: How) -> ModuleType:
    return group if how.groups else block


def _run(how: How, name: str, *operands: Given) -> tuple:
    # Here: Pallas is slow to import, and most programs never need it.
    from normjax.kernels import _pallas, _pallas_group

    kernel = getattr(_pallas_group if how.groups else _pallas, name)
    if how.run != "pallas":
        return kernel("tpu" if how.run == "interpret tpu" else "gpu", True, how, *operands)
    gpu, tpu = (functools.partial(kernel, target, False, how) for target in ("gpu", "tpu"))
    plain = functools.partial(getattr(_twin(how), name), how)
    return lax.platform_dependent(*operands, cuda=gpu, rocm=gpu, tpu=tpu, default=plain)


# The tangent of `normalize` as a linear map: of what is known, and of the tangents that move it, all flat. `mapped` has an
# entry for each `vmap` around it, which says of each known array whether it is mapped; all tangents are.
_tangent_p = Primitive("normalized_tangent")
_tangent_p.multiple_results = True


def _vmapped(f: Callable, mapped: Sequence[tuple[bool, ...]], others: int) -> Callable:
    for axes in mapped:
        f = jax.vmap(f, in_axes=(*(0 if m else None for m in axes), *(0,) * others))
    return f


def _plain(*flat: jax.Array, how: How, known: Any, moving: Any, mapped: tuple) -> list[jax.Array]:
    def tangent(*flat: jax.Array) -> list[jax.Array]:
        added, _, _, *parameters = jax.tree.unflatten(known, flat[: known.num_leaves])
        dsum, *moved = jax.tree.unflatten(moving, flat[known.num_leaves :])
        forward = functools.partial(_twin(how).forward, how)
        _, (dy, _, *rest) = jax.jvp(forward, (added, None, *parameters), (dsum, None, *moved))
        return jax.tree.leaves((dy, dsum, *rest))

    return _vmapped(tangent, mapped, moving.num_leaves)(*flat)


def _transpose(cotangents: Sequence, *flat: Any, how: How, known: Any, moving: Any, mapped: tuple) -> list:
    there = [type(ct) is not ad.Zero for ct in cotangents]  # of an output that nothing uses no cotangent is read
    linear = flat[known.num_leaves :]
    if not any(there):
        return [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in flat]

    def pull(*flat: jax.Array) -> list[jax.Array]:
        added, mean, var, eps, scale, bias = jax.tree.unflatten(known, flat[: known.num_leaves])
        given = iter(flat[known.num_leaves :])
        found = iter([next(given) if t else None for t in there])
        g, *others = found  # of the sum, and of the statistics that are kept
        g = jnp.zeros_like(added, how.dtype) if g is None else g
        bias = None if how.activation is None else bias
        return jax.tree.leaves(_gradient(how, added, mean, var, eps, scale, bias, g, *others))

    present = [ct for ct, t in zip(cotangents, there, strict=True) if t]
    found = _vmapped(pull, mapped, len(present))(*flat[: known.num_leaves], *present)
    pulled = [ct if ad.is_undefined_primal(a) else None for a, ct in zip(linear, found, strict=True)]
    return [None] * known.num_leaves + pulled


def _batch(
    axis_data: Any, flat: Sequence, dims: Sequence, *, how: How, known: Any, moving: Any, mapped: tuple
) -> tuple:
    is_mapped = [dim is not None for dim in dims]
    flat = [
        batching.bdim_at_front(a, dim, axis_data.size) if m or i >= known.num_leaves else a
        for i, (a, dim, m) in enumerate(zip(flat, dims, is_mapped, strict=True))
    ]
    mapped = (*mapped, tuple(is_mapped[: known.num_leaves]))
    out = _tangent_p.bind(*flat, how=how, known=known, moving=moving, mapped=mapped)
    return out, [0] * len(out)


def _types(*flat: Any, **static: Any) -> list:
    return jax.make_jaxpr(functools.partial(_plain, **static))(*flat).out_avals


def _tangent_again(primals: Sequence, tangents: Sequence, **static: Any) -> tuple:
    f = functools.partial(_plain, **static)
    return jax.jvp(f, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


_tangent_p.def_impl(_plain)
_tangent_p.def_abstract_eval(_types)
ad.primitive_jvps[_tangent_p] = _tangent_again
ad.primitive_transposes[_tangent_p] = _transpose
batching.fancy_primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_plain, multiple_results=True))
