"""Fused kernels for rows: statistics over the trailing axes of an array, seen as `[rows, length]`. Off by default.

Public measurements on a GPU have XLA's forward pass of layer norm at the speed of memory, and forward plus gradient at
about half of what a fused kernel reaches, since XLA's backward pass reads x several times. Here one kernel reads x and its
cotangent once (`_pallas.py`). Tested is that the numbers are right, interpreted on a CPU, and that the kernels lower for
CUDA and TPU; their speed is not measured.

    import normjax
    from normjax import kernels

    kernels.use("pallas")                  # or NORMJAX_KERNELS=pallas in the environment
    with kernels.use("xla"):               # for a while without, say for a jvp
        ...

Forward mode is refused (`_rule.py`); reverse mode, `vmap` and second derivatives over reverse mode work. Arrays sharded
over devices under `jit` need a `jax.shard_map` around the call, since the compiler cannot partition a kernel (interpreted,
with `check_vma=False`). Rows shorter than a few hundred bytes, and few rows that are long, leave most of a GPU idle.
Nothing is fused with what follows the norm (an activation, a residual), which would save another read and write.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.sizes import is_known
from normjax._leaves import one_of
from normjax.kernels import _block as block
from normjax.kernels import _rule as rule
from normjax.kernels._block import How

MODES = ("xla", "pallas", "interpret")
LONGEST = 16384  # elements of a row: backward, the registers of a GPU's multiprocessor hold about three such rows


def use(mode: str) -> contextlib.ExitStack:
    """Chooses what evaluates the rows that fit: for the whole process, or for a `with` block.

    A change clears JAX's caches of compiled functions, which know nothing of it.

    The change is made at once; the context manager that is returned puts the former mode back at its end.

    Args:
      mode: "xla" (no kernels), "pallas" (those of the platform) or "interpret" (the GPU's, interpreted: slow, for tests).

    >>> use("cuda")
    Traceback (most recent call last):
    ...
    ValueError: the kernels are one of 'xla', 'pallas', 'interpret'; found 'cuda'
    """
    former = _mode
    _set(mode)
    stack = contextlib.ExitStack()
    stack.callback(_set, former)
    return stack


def used() -> str:
    """The mode that `use` chose, or the environment variable NORMJAX_KERNELS.

    >>> used()
    'xla'
    """
    return _mode


def _set(mode: str) -> None:
    global _mode
    if mode not in MODES:
        raise ValueError(f"the kernels are one of {', '.join(map(repr, MODES))}; found {mode!r}")
    if mode != _mode:
        _mode = mode
        jax.clear_caches()


def fits(
    x_shape: tuple[int, ...],
    axes: tuple[int, ...],
    scale_shape: tuple[int, ...] | None,
    bias_shape: tuple[int, ...] | None,
    dtype: DTypeLike,
    eps_shape: tuple[int, ...] = (),
    spec: Iterable[object] = (),
) -> bool:
    """Whether the kernels take this case; order 2 and whole `axes`, without a mask, are the caller's to know.

    Args:
      x_shape: of the array. It fits if every size is a number: the tiles of a kernel are cut for sizes, not for symbols.
      axes: the axes of the statistics, from 0. They fit if they are the last of the array.
      scale_shape: scalar or of the rank of x, or None. It fits if it varies along `axes` alone.
      bias_shape: scalar or of the rank of x, or None. It fits if it varies along `axes` alone.
      dtype: of x: float32, bfloat16 or float16 fits.
      eps_shape: a scalar fits.
      spec: `jax.typeof(x).sharding.spec`. It fits if nothing is sharded: the compiler cannot partition a kernel.

    >>> fits((8, 128, 768), (2,), (1, 1, 768), None, jnp.bfloat16)
    True
    >>> fits((8, 128, 768), (1,), None, None, jnp.bfloat16), fits((8, 768), (1,), (8, 1), None, jnp.float32)
    (False, False)
    """
    first = len(x_shape) - len(axes)
    trailing = bool(axes) and tuple(sorted(axes)) == tuple(range(first, len(x_shape)))
    beside = all(shape is None or math.prod(shape[:first]) == 1 for shape in (scale_shape, bias_shape))
    real = any(dtype == d for d in (jnp.float32, jnp.bfloat16, jnp.float16))
    sized = all(map(is_known, x_shape)) and math.prod(x_shape) > 0 and math.prod(x_shape[first:]) <= LONGEST
    sharded = any(name is not None for name in spec)
    return trailing and beside and real and sized and not sharded and not eps_shape


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
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Normalizes rows by the kernels that `use` chose; a case that `fits`.

    With v = x - E[x] and q = eps + gain E[v ** 2] the output is scale v q ** -power + bias. The variance is that of the
    deviations, in float32; where q is 0, so are y - bias and its gradient. The mode "xla" is the twin.

    Args:
      x: array of float32, bfloat16 or float16. [units u]
      axes: the axes of the statistics: the last of x.
      eps: a scalar. [u ** 2]
      scale: scalar or of the rank of x, of length 1 or that of x along `axes`, of length 1 elsewhere; or None.
      bias: scalar or of the rank of x, of length 1 or that of x along `axes`, of length 1 elsewhere; or None.
      centre: whether the mean is subtracted.
      gain: factor of the variance.
      power: exponent of the denominator.
      dtype: of y, by default that of x.

    Returns:
      `(y, mean, var)`: y has the shape of x; mean (None where not centred) and var are float32, of length 1 along `axes`.

    Raises:
      TypeError: a forward-mode derivative is taken.
      RuntimeError: the mode is "pallas" and the platform has no kernel.

    Source: Ba et al. 2016, equation 3; Zhang & Sennrich 2019, equation 4.

    >>> y, mean, var = normalize(jnp.array([[1.0, 3.0], [5.0, 9.0]]), (1,), 0.0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[-1.0, 1.0], [-1.0, 1.0]], [[2.0], [7.0]], [[1.0], [4.0]])
    """
    x = jnp.asarray(x)
    how = How(centre, float(gain), float(power), jnp.dtype(dtype or x.dtype), bias is not None, _mode)
    return _as_rows(block.forward if _mode == "xla" else rule.normalize, how, x, axes, eps, scale, bias)


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
    x = jnp.asarray(x)
    how = How(centre, float(gain), float(power), jnp.dtype(dtype or x.dtype), bias is not None)
    return _as_rows(block.forward, how, x, axes, eps, scale, bias)


def _as_rows(
    evaluate: Callable[..., tuple],
    how: How,
    x: jax.Array,
    axes: tuple[int, ...],
    eps: ArrayLike,
    *beside: ArrayLike | None,
) -> tuple:
    """Sees x as `[rows, length]`, and what lies beside it, scale and bias, as `[1, length]`."""
    first = x.ndim - len(axes)
    length = math.prod(x.shape[first:])

    def row(p: ArrayLike | None) -> jax.Array | None:
        if p is None:
            return None
        p = jnp.asarray(p).astype(jnp.float32)
        return _like(jnp.broadcast_to(p.reshape(p.shape[first:]), x.shape[first:]).reshape(1, length), x)

    eps = _like(jnp.asarray(eps).astype(jnp.float32).reshape(1, 1), x)
    y, mean, var = evaluate(how, x.reshape(-1, length), eps, *map(row, beside))
    small = x.shape[:first] + (1,) * len(axes)
    return y.reshape(x.shape), None if mean is None else mean.reshape(small), var.reshape(small)


def _like(p: jax.Array, x: jax.Array) -> jax.Array:
    """Inside `shard_map`: p as a value that varies over the mapped axes that x varies over. Its gradient is their sum."""
    missing = _varying(x) - _varying(p)
    return jax.lax.pcast(p, tuple(sorted(missing)), to="varying") if missing else p


def _varying(x: jax.Array) -> frozenset:
    kind: Any = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _from_environment() -> str:
    mode = os.environ.get("NORMJAX_KERNELS") or "xla"  # exported empty is not set
    one_of("NORMJAX_KERNELS", mode, MODES)
    return mode


_mode = _from_environment()
