"""The kernels of groups: `_group.py` on parts of examples, in Pallas, for GPUs (Triton) and TPUs (Mosaic).

On a TPU a program has its part in fast memory and goes through it in chunks, twice or three times. On a GPU the part stays
where it is, and what a program reads again comes from the caches: memory is read once as long as the parts of the programs
that run together fit there.
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

from normjax.kernels import _group as group
from normjax.kernels._block import Given, How
from normjax.kernels._group import Cut

# What an operand is: [examples, positions, channels], [examples, 1, channels], [1, channels].
ROWS, COLUMN, SHARED = "rows", "column", "shared"


def forward(target: str, interpret: bool, how: How, x: jax.Array, _: None, *others: Any) -> tuple:
    """`group.forward` as one kernel for a "gpu" or a "tpu": operands and results have its shapes and dtypes."""
    cut = group.cut(target, x.shape, how.groups, x.dtype.itemsize)
    if cut is None:
        return group.forward(how, x, None, *others)

    def evaluate(part: group.Part, eps: jax.Array, scale: Given, bias: Given) -> tuple[Given, ...]:
        _, mean, var = group.normalized(how, part, eps, scale, bias)
        return mean, var

    eps, *beside = others
    operands = [(ROWS, x), ("number", eps), *((SHARED, p) for p in beside)]
    results = [(ROWS, how.dtype), (COLUMN, jnp.float32 if how.centre else None), (COLUMN, jnp.float32)]
    y, mean, var = _call(target, interpret, "normalize_groups", how, cut, evaluate, operands, results)
    return y, None, mean, var


def backward(target: str, interpret: bool, how: How, x: jax.Array, *others: Any) -> tuple:
    """`group.backward` as one kernel, and the sum over the examples."""
    cut = group.cut(target, x.shape, how.groups, x.dtype.itemsize)
    if cut is None:
        return group.backward(how, x, *others)
    mean, var, eps, scale, bias, g, gsum, *statistics = others
    gmean, gvar = group.of_statistics(how, statistics)

    def evaluate(part: group.Part, *others: Any) -> tuple[jax.Array, ...]:
        return group.gradient(how, part, *others)[1:]

    operands = [(ROWS, x), (ROWS, g), (ROWS, gsum), (COLUMN, mean), (COLUMN, var), ("number", eps)]
    operands += [(SHARED, scale), (SHARED, bias), (COLUMN, gmean), (COLUMN, gvar)]
    results = [(ROWS, x.dtype), *[(COLUMN, jnp.float32)] * 3]
    dx, *parts = _call(target, interpret, "normalize_groups_gradient", how, cut, evaluate, operands, results)
    return dx, *group.summed(how, parts, x.shape[2], scale is not None)


@dataclass(frozen=True)
class _InChunks:
    """A part of an example, in the memory that the references are for; what it is mapped to goes to `out`."""

    target: str
    arrays: tuple[Any, ...]
    out: Any
    example: Any  # the index of the example in the references
    channels: tuple[Any, int, Given]  # of the part in the references: the first, how many, and which of them are valid
    positions: int
    chunk: int
    size: int  # channels of a block
    width: int  # of the part

    @property
    def count(self) -> int:
        return self.positions * self.size

    def sums(self, f: Callable[..., tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        count = len(jax.eval_shape(f, *[jax.ShapeDtypeStruct((1, self.channels[1]), jnp.float32)] * len(self.arrays)))

        def add(first: Any, length: int, sums: list, valid: Given) -> list:
            found = f(*(_load(self.target, a, self._at(first, length), self._mask(valid)) for a in self.arrays))
            if (mask := self._mask(valid)) is not None:  # v is no zero where x is
                found = [jnp.where(mask, a, 0.0) for a in found]
            return [s + jnp.sum(a, 0, keepdims=True) for s, a in zip(sums, found, strict=True)]

        return tuple(self._go(add, [jnp.zeros((1, self.channels[1]), jnp.float32) for _ in range(count)]))

    def pooled(self, sums: jax.Array) -> jax.Array:
        if self.size == 1:
            return sums
        if self.size == self.width:
            return jnp.broadcast_to(jnp.sum(sums, 1, keepdims=True), sums.shape)
        row, column = (lax.broadcasted_iota(jnp.int32, (sums.shape[1],) * 2, axis) for axis in (0, 1))
        one, other = (lax.div(a, np.int32(self.size)) for a in (row, column))  # `//` lowers for a TPU on a TPU alone
        own = jnp.sum(jnp.where(one == other, sums, 0.0), 1, keepdims=True)  # of the block of each channel
        return jnp.sum(jnp.where(row == column, own, 0.0), 0, keepdims=True)  # along the lanes again

    def mapped(self, f: Callable[..., jax.Array]) -> None:
        def put(first: Any, length: int, nothing: list, valid: Given) -> list:
            at, mask = self._at(first, length), self._mask(valid)
            value = f(*(_load(self.target, a, at, mask) for a in self.arrays)).astype(self.out.dtype)
            _store(self.target, self.out, at, value, mask)
            return nothing

        self._go(put, [])

    def _go(self, step: Callable[[Any, int, list, Given], list], carried: list) -> list:
        """Steps through the positions; on a GPU the last step is masked, on a TPU it is shorter."""
        whole, rest = divmod(self.positions, self.chunk)
        masked = self.target == "gpu" and rest > 0
        if masked:
            whole, rest = whole + 1, 0

        def body(i: Any, carried: list) -> list:
            first = i * self.chunk
            index = first + lax.broadcasted_iota(jnp.int32, (self.chunk, 1), 0)
            return step(first, self.chunk, carried, index < self.positions if masked else None)

        if whole == 1:
            carried = body(0, carried)
        elif whole:
            carried = lax.fori_loop(np.int32(0), np.int32(whole), body, carried)
        return step(whole * self.chunk, rest, carried, None) if rest else carried

    def _at(self, first: Any, length: int) -> tuple[Any, ...]:
        return self.example, pl.ds(first, length), pl.ds(*self.channels[:2])

    def _mask(self, valid: Given) -> Given:
        inside = self.channels[2]
        return valid if inside is None else inside if valid is None else inside & valid


def _call(
    target: str, interpret: bool, name: str, how: How, cut: Cut, evaluate: Callable[..., tuple],
    operands: Sequence[tuple[str, Given]], results: Sequence[tuple[str, DTypeLike | None]],
) -> tuple:  # fmt: skip
    """Runs `evaluate(part, *others) -> columns` over the parts: the first result is mapped, of the operands of its kind."""
    x = operands[0][1]
    assert x is not None
    examples, positions, channels = x.shape
    made = [(kind, dtype) for kind, dtype in results if dtype is not None]
    taken = [(kind, a) for kind, a in operands if a is not None]
    like = {ROWS: (examples, positions, channels), COLUMN: (examples, 1, channels)}

    def shaped(x: jax.Array) -> list[jax.Array]:  # what is computed from x varies over the same mapped axes
        return [jnp.broadcast_to(x.reshape(-1)[0], like[kind]).astype(dtype) for kind, dtype in made]

    def spec(kind: str) -> pl.BlockSpec:
        if target == "gpu":
            return pl.BlockSpec(None)
        block = {ROWS: (cut.tall, positions, cut.width), COLUMN: (cut.tall, 1, cut.width), SHARED: (1, cut.width)}
        index = {ROWS: lambda n, j: (n, 0, j), COLUMN: lambda n, j: (n, 0, j), SHARED: lambda _, j: (0, j)}
        return pl.BlockSpec(block[kind], index[kind]) if kind in block else pl.BlockSpec((1, 1), lambda *_: (0, 0))

    size = channels // how.groups
    kernel = functools.partial(_kernel, target, cut, size, evaluate, [(k, a is not None) for k, a in operands], x.shape)
    warps = min(max(1, cut.chunk * cut.width // 256), 32)
    mosaic_params = mosaic.CompilerParams(dimension_semantics=("parallel", "parallel"))
    run = pl.pallas_call(
        kernel,
        out_shape=jax.eval_shape(shaped, x),
        grid=(examples // cut.tall, pl.cdiv(channels, cut.width)),
        in_specs=[spec(kind) for kind, _ in taken],
        out_specs=[spec(kind) for kind, _ in made],
        compiler_params=triton.CompilerParams(num_warps=_power_of_2(warps)) if target == "gpu" else mosaic_params,
        interpret=interpret,
        name=name,
    )
    out = iter(run(*(a for _, a in taken)))
    return tuple(None if dtype is None else next(out) for _, dtype in results)


def _kernel(
    target: str, cut: Cut, size: int, evaluate: Callable[..., tuple], operands: Sequence[tuple[str, bool]],
    shape: tuple[int, ...], *refs: Any,
) -> None:  # fmt: skip
    """What one program runs on the references to its parts."""
    count = sum(there for _, there in operands)
    inputs, (out, *columns) = iter(refs[:count]), refs[count:]
    given = [(kind, next(inputs) if there else None) for kind, there in operands]
    rows = tuple(ref for kind, ref in given if kind == ROWS and ref is not None)
    wide, first, inside, example = cut.width, 0, None, 0
    if target == "gpu":
        wide, first = _power_of_2(cut.width), pl.program_id(1) * cut.width
        index = lax.broadcasted_iota(jnp.int32, (1, wide), 1)
        if wide > cut.width or shape[2] % cut.width:
            inside = (index < cut.width) & (first + index < shape[2])
        example = pl.program_id(0)

    def one(n: Any) -> None:
        part = _InChunks(
            target, rows, out, n, (first, wide, inside), shape[1], cut.chunk, size, cut.width
        )  # fmt: skip
        lanes = pl.ds(first, wide)
        places = {COLUMN: (n, slice(None), lanes), SHARED: (slice(None), lanes), "number": (slice(None), slice(None))}
        masks = {COLUMN: inside, SHARED: inside, "number": None}
        others = [
            None if ref is None else _load(target, ref, places[kind], masks[kind])
            for kind, ref in given
            if kind != ROWS
        ]
        found = [f for f in evaluate(part, *others) if f is not None]
        for ref, value in zip(columns, found, strict=True):
            _store(target, ref, places[COLUMN], value, inside)

    if cut.tall == 1:
        one(example)
    else:
        lax.fori_loop(np.int32(0), np.int32(cut.tall), lambda n, _: one(n), None)


def _load(target: str, ref: Any, at: tuple, mask: Given) -> jax.Array:
    value = ref[at] if mask is None else triton.load(ref.at[at], mask=mask, other=0.0)
    return value.astype(jnp.float32)


def _store(target: str, ref: Any, at: tuple, value: jax.Array, mask: Given) -> None:
    if mask is None:
        ref[at] = value
    else:
        triton.store(ref.at[at], value, mask=mask)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
