"""The kernels: `_block.py` on blocks of rows, in Pallas, for GPUs (Triton) and TPUs (Mosaic).

A program takes whole rows. Forward it reads x (and the residual) once and writes y (and the sum); backward it reads x and
the cotangents once, writes dx once, and adds up what its rows give to the gradients of scale, bias and eps: one partial sum
a program, which XLA adds.

Triton wants powers of two, so rows are widened and the tail is masked at each load and store, and a backward program goes
through several blocks, one after the other, with its partial sums in registers. Mosaic pads and cuts by itself, and what it
reads past the last row may be NaN. The sizes follow from how many bytes must be under way and what registers hold.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from normjax.kernels import _block as block
from normjax.kernels._block import Given, How

PROGRAMS = 256  # backward, on a GPU: about two for each multiprocessor, and few partial sums
SMALL, LARGE = (
    1024,
    4096,
)  # elements of a GPU's block: forward, where programs are many, and backward, where they are few
TPU_BLOCK = 131072  # elements of a TPU's block; backward holds about a dozen of them in fast memory


@dataclass(frozen=True)
class Tiling:
    """How an array `[rows, length]` is cut: a program takes `steps` blocks, each `[height, width]`."""

    rows: int
    length: int
    height: int
    width: int  # at least the length
    steps: int  # one after the other
    warps: int | None  # of a Triton program; None for Mosaic

    @property
    def tall(self) -> int:
        """Rows of a program."""
        return self.height * self.steps

    @property
    def programs(self) -> int:
        """Number of programs."""
        return pl.cdiv(self.rows, self.tall)


def tiling(target: str, rows: int, length: int, backward: bool) -> Tiling:
    """The cut for a "gpu" or a "tpu"."""
    if target == "tpu":
        # The last two sizes of a block are multiples of 16 (for bfloat16) and 128, or those of the array.
        height = 16 * max(1, TPU_BLOCK // (16 * 128 * pl.cdiv(length, 128)))
        return Tiling(rows, length, min(rows, height), length, 1, None)
    width = pl.next_power_of_2(length)
    share = pl.cdiv(rows, PROGRAMS) if backward else rows
    height = min(max(1, (LARGE if backward else SMALL) // width), pl.next_power_of_2(share))
    steps = pl.cdiv(share, height) if backward else 1
    return Tiling(rows, length, height, width, steps, min(max(1, height * width // 512), 32))


def forward(target: str, interpret: bool, how: How, x: jax.Array, *others: Given) -> tuple:
    """`block.forward` as one kernel for a "gpu" or a "tpu": operands and results have its shapes and dtypes."""
    cut = tiling(target, *x.shape, backward=False)
    operands = [*zip(("rows", "rows", "number", "row", "row"), (x, *others), strict=True)]
    results = [("rows", how.dtype), ("rows", how.added)]
    y, added = _call(target, interpret, "normalize_rows", cut, functools.partial(block.forward, how), operands, results)
    return y, added, None, None


def backward(target: str, interpret: bool, how: How, x: jax.Array, *others: Given) -> tuple:
    """`block.backward` as one kernel, and the sum of its partial sums."""
    cut = tiling(target, *x.shape, backward=True)
    kinds = ("rows", "row", "row", "number", "row", "row", "rows", "rows")  # no rows have statistics
    operands = [*zip(kinds, (x, *others), strict=True)]
    scaled = others[3] is not None
    summed = [("row", jnp.float32 if scaled else None), ("row", jnp.float32 if how.biased else None)]
    results = [("rows", x.dtype), ("number", jnp.float32), *summed]
    evaluate = functools.partial(block.backward, how)
    dx, *partial = _call(target, interpret, "normalize_rows_gradient", cut, evaluate, operands, results)
    return dx, *(None if p is None else jnp.sum(p, 0) for p in partial)


def _program(
    target: str, cut: Tiling, evaluate: Callable[..., tuple], operands: Sequence[str | None], made: Sequence[str]
) -> Callable[..., None]:
    """What one program runs on the references to its blocks; kinds as for `_call`, None for an operand that is not there."""
    ragged = cut.rows % cut.tall != 0
    taken = [kind for kind in operands if kind is not None]

    def kernel(*refs):
        inputs, outputs = refs[: len(taken)], refs[len(taken) :]
        inside = lax.broadcasted_iota(jnp.int32, (1, cut.width), 1) < cut.length if cut.width > cut.length else None
        first = pl.program_id(0) * cut.tall

        def step(i: int | jax.Array, sums: list) -> list:
            rows = pl.ds(i * cut.height, cut.height) if cut.steps > 1 else slice(None)
            index = first + i * cut.height + lax.broadcasted_iota(jnp.int32, (cut.height, 1), 0)
            exists = index < cut.rows if ragged else None
            places = {"rows": (rows, exists, inside)}
            places |= {"row": (slice(None), None, inside), "number": (slice(None), None, None)}
            loaded = iter([_load(target, ref, *places[kind]) for ref, kind in zip(inputs, taken, strict=True)])
            given = [None if kind is None else next(loaded) for kind in operands]
            found = [f for f in evaluate(*given, length=cut.length, valid=inside) if f is not None]
            for ref, kind, value in zip(outputs, made, found, strict=True):
                if kind == "rows":
                    _store(target, ref, value, *places[kind])
            parts = [value for kind, value in zip(made, found, strict=True) if kind != "rows"]
            return [total + part for total, part in zip(sums, parts, strict=True)]

        summed = [(ref, kind) for ref, kind in zip(outputs, made, strict=True) if kind != "rows"]
        sums = [jnp.zeros((1, _breadth(kind, cut.width)), jnp.float32) for _, kind in summed]
        sums = lax.fori_loop(np.int32(0), np.int32(cut.steps), step, sums) if cut.steps > 1 else step(0, sums)
        for (ref, kind), total in zip(summed, sums, strict=True):
            _store(target, ref, total, slice(None), None, inside if kind == "row" else None)

    return kernel


def _call(
    target: str, interpret: bool, name: str, cut: Tiling, evaluate: Callable[..., tuple],
    operands: Sequence[tuple[str, jax.Array | None]], results: Sequence[tuple[str, DTypeLike | None]],
) -> tuple:  # fmt: skip
    """Runs `evaluate(*operands) -> results` over the array; an operand or a dtype that is None is not there.

    The kinds: "rows" `[rows, length]` are cut; "row" `[1, length]` and "number" `[1, 1]` are given
    to each program whole, and as results they are partial sums, `[programs, 1, ...]`.
    """
    made = [(kind, dtype) for kind, dtype in results if dtype is not None]

    def spec(kind: str, result: bool) -> pl.BlockSpec:
        breadth = _breadth(kind, cut.width)
        if kind == "rows":
            return pl.BlockSpec((cut.tall, breadth), lambda i: (i, 0))
        if result:
            return pl.BlockSpec((None, 1, breadth), lambda i: (i, 0, 0))
        return pl.BlockSpec((1, breadth), lambda _: (0, 0))

    def like(x):  # what is computed from x varies, inside shard_map, over the same mapped axes as x
        shapes = [(cut.rows,) if kind == "rows" else (cut.programs, 1) for kind, _ in made]
        whole = [(*shape, _breadth(kind, cut.length)) for shape, (kind, _) in zip(shapes, made, strict=True)]
        return [jnp.broadcast_to(x.reshape(-1)[0], s).astype(dtype) for s, (_, dtype) in zip(whole, made, strict=True)]

    mosaic_params = mosaic.CompilerParams(dimension_semantics=("parallel",))
    run = pl.pallas_call(
        _program(target, cut, evaluate, [None if a is None else kind for kind, a in operands], [k for k, _ in made]),
        out_shape=jax.eval_shape(like, operands[0][1]),
        grid=(cut.programs,),
        in_specs=[spec(kind, result=False) for kind, a in operands if a is not None],
        out_specs=[spec(kind, result=True) for kind, _ in made],
        compiler_params=triton.CompilerParams(num_warps=cut.warps) if target == "gpu" else mosaic_params,
        interpret=interpret,
        name=name,
    )
    out = iter(run(*(a for _, a in operands if a is not None)))
    return tuple(None if dtype is None else next(out) for _, dtype in results)


def _breadth(kind: str, width: int) -> int:
    return width if kind in ("rows", "row") else 1


def _load(target: str, ref: Any, rows: Any, exists: Given, inside: Given) -> jax.Array:
    """A block, with zeros where it reaches past the array."""
    mask = _both(exists, inside)
    if mask is None:
        return ref[rows, :]
    if target == "gpu":
        return triton.load(ref.at[rows, :], mask=mask, other=0.0)
    value = ref[rows, :]
    return jnp.where(mask, value, jnp.zeros((), value.dtype))


def _store(target: str, ref: Any, value: jax.Array, rows: Any, exists: Given, inside: Given) -> None:
    mask = _both(exists, inside)
    if mask is None or target == "tpu":
        ref[rows, :] = value
    else:
        triton.store(ref.at[rows, :], value, mask=mask)


def _both(a: Given, b: Given) -> Given:
    return a if b is None else b if a is None else a & b
