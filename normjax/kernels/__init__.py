"""Fused kernels for rows of TABLE, with what stands around a norm: a residual add before it, an activation behind it.

    layer = linen.LayerNorm(kernel=True)   # a layer; `kernel=False` keeps one without
    with kernels.using("pallas"):          # all that is traced within
        ...
    kernels.use("pallas")                  # the whole process; or NORMJAX_KERNELS=pallas in the environment

Two kinds. *Rows*: statistics over the trailing axes, an array seen as `[rows, length]` (layer and RMS norm). *Groups*: over
the positions and a block of channels of each example, seen as `[examples, positions, channels]` (group and instance norm).
Forward a kernel reads x (and a residual) once and writes y (and the sum), backward it reads the cotangent and x once and
writes one gradient, which serves x and the residual. XLA fuses nothing into a kernel: a norm between an addition and an
activation pays only with both in the kernel, which is what `add_and_normalize` and the layer `AddNorm` are for.

The choice is part of what JAX keys its compiled functions by, so that no cache is cleared. Kernels are for CUDA, ROCm and
TPU; a program that is lowered for another platform, such as a CPU, has the plain twin in their place. What they do not fit
(`fits`; masks, windows, mapped axes, arrays that are sharded in their type) is evaluated as without them. Forward mode is
that of the twin. Arrays sharded over devices under `jit` need a `jax.shard_map` around the call (interpreted, with
`check_vma=False`): the compiler cannot partition a kernel, and says so. Taylor mode wants "xla".

Tested is that the numbers are right, interpreted on a CPU, and that the kernels compile and move the bytes that are said
here; nothing was timed on a device, so that the default is "xla". By the bytes that a compiled network moves, they pay on a
GPU; a TPU's compiler fuses a norm into the matrix product behind it, and moves less without. Rows shorter than a few hundred
bytes, and few rows that are long, leave most of a GPU idle. Groups on a GPU read an example's share again from its caches.
"""

import contextlib
import os

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._leaves import one_of
from normjax.kernels._block import ACTIVATIONS as ACTIVATIONS
from normjax.kernels._block import How
from normjax.kernels._view import LONGEST as LONGEST
from normjax.kernels._view import evaluate
from normjax.kernels._view import fits as fits

MODES = ("xla", "pallas", "interpret")


def using(mode: str) -> contextlib.AbstractContextManager[None]:
    """Chooses what evaluates what fits, for all that is traced in a `with` block, in this thread.

    Functions that were compiled before stay compiled, each for the mode of its call.

    Args:
      mode: "xla" (no kernels), "pallas" (those of the platform) or "interpret" (the GPU's, interpreted: slow, for tests).

    >>> with using("interpret"):
    ...     used()
    'interpret'
    >>> using("cuda")
    Traceback (most recent call last):
    ...
    ValueError: the kernels are one of 'xla', 'pallas', 'interpret'; found 'cuda'
    """
    return _choice(_known(mode))


def asked(kernel: bool | None) -> contextlib.AbstractContextManager[None]:
    """The mode of a layer with the option `kernel`: True has kernels, False none, None what is used around it.

    >>> with asked(True):
    ...     used()
    'pallas'
    """
    one_of("kernel", kernel, (None, False, True))
    if kernel is None or kernel == (used() != "xla"):
        return contextlib.nullcontext()
    return using("pallas" if kernel else "xla")


def use(mode: str) -> contextlib.ExitStack:
    """Chooses for the whole process what evaluates what fits; a block of `using` goes before it.

    The change is made at once; the context manager that is returned puts the former mode back at its end.

    Args:
      mode: "xla" (no kernels), "pallas" (those of the platform) or "interpret" (the GPU's, interpreted: slow, for tests).

    >>> with use("interpret"):
    ...     used()
    'interpret'
    """
    stack = contextlib.ExitStack()
    stack.callback(_choice.set_global, _choice.get_global())
    _choice.set_global(_known(mode))
    return stack


def used() -> str:
    """The mode that `using` or `use` chose, or the environment variable NORMJAX_KERNELS.

    >>> used()
    'xla'
    """
    return _choice.value


def _known(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"the kernels are one of {', '.join(map(repr, MODES))}; found {mode!r}")
    return mode


def normalize(
    x: ArrayLike,
    axes: tuple[int, ...],
    eps: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    centre: bool = True,
    gain: float = 1.0,
    power: float = 0.5,
    dtype: DTypeLike | None = None,
    activation: str | None = None,
    groups: int = 0,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Normalizes by the kernels that are used; a case that `fits`.

    With v = x - E[x] and q = eps + gain E[v ** 2] the output is act(scale v q ** -power + bias). The variance is that of the
    deviations, in float32; where q is 0, so are y - bias and its gradient. The mode "xla" is the twin.

    Args:
      x: array of float32, bfloat16 or float16. [units u]
      axes: the axes of the statistics: the last of x; with `groups` those before the last.
      eps: a scalar. [u ** 2]
      scale: scalar or of the rank of x, of length 1 or that of x along `axes` (with `groups`: along the last axis), of
        length 1 elsewhere; or None.
      bias: scalar or of the rank of x, with the lengths that a scale may have; or None.
      centre: whether the mean is subtracted.
      gain: factor of the variance.
      power: exponent of the denominator.
      dtype: of y, by default that of x.
      activation: "relu", "gelu" (by tanh, as `jax.nn.gelu`), "exact_gelu", "silu", or None.
      groups: number of equal blocks of the last axis, of which each has its own statistics: group norm, and instance norm
        where it is the number of channels. 0 is for rows.

    Returns:
      `(y, mean, var)`: y has the shape of x; mean (None where not centred) and var are float32, of length 1 along `axes`;
      with `groups` each channel has those of its block.

    Raises:
      ValueError: no activation has this name.

    Source: Ba et al. 2016, equation 3; Zhang & Sennrich 2019, equation 4; Wu & He 2018, equations 1, 2 and 7.

    >>> y, mean, var = normalize(jnp.array([[1.0, 3.0], [5.0, 9.0]]), (1,), 0.0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[-1.0, 1.0], [-1.0, 1.0]], [[2.0], [7.0]], [[1.0], [4.0]])
    >>> normalize(jnp.array([[[1.0, 3.0, 5.0, 9.0]]]), (1,), 0.0, groups=2)[0].tolist()
    [[[-1.0, 1.0, -1.0, 1.0]]]
    """
    y, _, mean, var = add_and_normalize(
        x, None, axes, eps, scale, bias,
        centre=centre, gain=gain, power=power, dtype=dtype, activation=activation, groups=groups,
    )  # fmt: skip
    return y, mean, var


def add_and_normalize(
    x: ArrayLike,
    residual: ArrayLike | None,
    axes: tuple[int, ...],
    eps: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    centre: bool = True,
    gain: float = 1.0,
    power: float = 0.5,
    dtype: DTypeLike | None = None,
    activation: str | None = None,
    groups: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Adds a residual and normalizes the sum, in one kernel, which returns both: `(y, sum, mean, var)`.

    y, the mean and var are those of `normalize` for the sum, whose other arguments these are. Backward, the kernel adds the
    cotangent of the sum to the gradient that comes through y: one array, which is the gradient of x and of the residual. A
    residual of None leaves the sum x itself, and its cotangent is added in the kernel all the same.

    Args:
      x: array of float32, bfloat16 or float16. [units u]
      residual: array of the shape of x, of one of these dtypes; the sum has the wider dtype of the two. Or None.
      axes: the axes of the statistics: the last of x.
      eps: a scalar. [u ** 2]
      scale: scalar or of the rank of x, of length 1 or that of x along `axes`, of length 1 elsewhere; or None.
      bias: scalar or of the rank of x, with the lengths that a scale may have; or None.
      centre: whether the mean is subtracted.
      gain: factor of the variance.
      power: exponent of the denominator.
      dtype: of y, by default that of x.
      activation: "relu", "gelu" (by tanh, as `jax.nn.gelu`), "exact_gelu", "silu", or None.
      groups: number of equal blocks of the last axis, which take no residual; 0 is for rows.

    Raises:
      ValueError: the shapes of x and the residual differ, groups have a residual, or no activation has this name.

    Source: Vaswani et al. 2017, section 3.1.

    >>> y, total, *_ = add_and_normalize(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0]]), (1,), 0.0, activation="relu")
    >>> y.tolist(), total.tolist()
    ([[0.0, 1.0]], [[1.0, 3.0]])
    """
    x, residual = jnp.asarray(x), None if residual is None else jnp.asarray(residual)
    added = None if residual is None else _wider(x, residual)
    if groups and residual is not None:
        raise ValueError("groups take no residual: their kernel has no memory for it; add it before")
    out_dtype = jnp.dtype(dtype or x.dtype)
    how = How(centre, float(gain), float(power), out_dtype, bias is not None, added, used(), activation, groups)
    return evaluate(how, x, residual, axes, eps, scale, bias)


def sum_of(x: jax.Array, residual: jax.Array | None) -> jax.Array:
    """The sum that is normalized, in the wider dtype of the two; without a residual x itself.

    >>> sum_of(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).tolist()
    [2.0, 2.0]
    >>> sum_of(jnp.ones(2), jnp.ones(1))
    Traceback (most recent call last):
    ...
    ValueError: a residual has the shape of x, (2,); found (1,)
    """
    if residual is None:
        return x
    dtype = _wider(x, residual)
    return x.astype(dtype) + residual.astype(dtype)


def _wider(x: jax.Array, residual: jax.Array) -> jnp.dtype:
    if residual.shape != x.shape:
        raise ValueError(f"a residual has the shape of x, {x.shape}; found {residual.shape}")
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, residual.dtype)


def twin(
    x: ArrayLike,
    axes: tuple[int, ...],
    eps: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    centre: bool = True,
    gain: float = 1.0,
    power: float = 0.5,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The arithmetic of `normalize`, whose arguments and results it has, in plain JAX, which differentiates it.

    >>> twin(jnp.array([[3.0, 5.0]]), (1,), 0.0, 17.0, centre=False, power=1.0)[0].tolist()
    [[3.0, 5.0]]
    """
    with using("xla"):
        return normalize(x, axes, eps, scale, bias, centre=centre, gain=gain, power=power, dtype=dtype)


def _from_environment() -> str:
    mode = os.environ.get("NORMJAX_KERNELS") or "xla"  # exported empty is not set
    one_of("NORMJAX_KERNELS", mode, MODES)
    return mode


_choice = jax.make_user_context(_from_environment())  # part of the key of JAX's caches
