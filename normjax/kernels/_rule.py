"""The derivatives of the fused rows, and the choice of the kernel by platform.

Reverse mode is a `jax.custom_vjp` around two kernels; it keeps x, the statistics and the scale. Each kernel is in turn a
`jax.custom_jvp` whose rule differentiates its plain twin, so that second derivatives (any mode over reverse mode) work.
Forward mode is refused: a tangent goes through `_refuse`, which can be transposed and batched but not evaluated.
"""

import functools
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax.kernels import _block as block
from normjax.kernels._block import How

FORWARD_MODE = (
    'the fused kernels have no forward-mode derivative (jvp, jacfwd, linearize); normjax.kernels.use("xla"), or '
    "NORMJAX_KERNELS=xla in the environment, turns them off and has every derivative"
)
NO_KERNEL = (
    'normjax.kernels is set to "pallas", which has kernels for CUDA, ROCm and TPU, and this computation is compiled for '
    'another platform; use("xla") goes without them, use("interpret") runs them slowly, for tests'
)


def normalize(how: How, *operands: jax.Array | None) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """`block.forward` by the kernels, differentiable in reverse mode; the operands are x, eps, scale and bias."""
    return _fused(how, *jax.tree.map(_reverse_only, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(how, x, eps, scale, bias):
    return _forward(how, x, eps, scale, bias)


def _fused_forward(how, *operands):
    x, eps, scale, bias = jax.tree.map(lambda operand: operand.value, operands)
    y, mean, var = _forward(how, x, eps, scale, bias)
    return (y, mean, var), (x, mean, var, eps, scale)


def _fused_backward(how, kept, cotangents):
    # A statistic that nothing differentiates has a symbolic zero, and costs no read.
    g, gmean, gvar = (None if isinstance(c, SymbolicZero) else c for c in cotangents)
    g = jnp.zeros_like(kept[0], how.dtype) if g is None else g
    return _backward(how, *kept, g, gmean, gvar)


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def _twice_differentiable(name: str) -> Callable:
    """The kernel of this name; JAX differentiates the twin in its place."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def run(how, *operands):
        return _run(how, name, *operands)

    @run.defjvp
    def derive(how, primals, tangents):
        return jax.jvp(functools.partial(getattr(block, name), how), primals, tangents)

    return run


_forward = _twice_differentiable("forward")
_backward = _twice_differentiable("backward")


def _run(how: How, name: str, *operands: jax.Array | None) -> tuple:
    from normjax.kernels import _pallas as pallas  # here: Pallas is slow to import, and most programs never need it

    kernel = getattr(pallas, name)
    if how.run != "pallas":
        return kernel("tpu" if how.run == "interpret tpu" else "gpu", True, how, *operands)
    gpu, tpu = (functools.partial(kernel, target, False, how) for target in ("gpu", "tpu"))

    def elsewhere(*operands):
        return jax.tree.map(functools.partial(_refuse.bind, why="platform"), getattr(block, name)(how, *operands))

    return lax.platform_dependent(*operands, cuda=gpu, rocm=gpu, tpu=tpu, default=elsewhere)


# The identity, except that to evaluate it (here, or compiled) is an error.
_refuse = Primitive("refuse")


def _raise(*_: object, why: str) -> NoReturn:
    raise TypeError(FORWARD_MODE) if why == "forward mode" else RuntimeError(NO_KERNEL)


_refuse.def_impl(_raise)
_refuse.def_abstract_eval(lambda aval, why: aval)
mlir.register_lowering(_refuse, _raise)
batching.defvectorized(_refuse)
ad.deflinear2(_refuse, lambda cotangent, _, why: [cotangent])


@jax.custom_jvp
def _reverse_only(operand):
    return operand


@_reverse_only.defjvp
def _reverse_only_tangent(primals, tangents):
    return primals[0], _refuse.bind(tangents[0], why="forward mode")
