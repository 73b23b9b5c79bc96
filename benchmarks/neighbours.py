"""Norms among their neighbours on a TPU and a GPU: four times x + Dense(gelu(norm(x))), by the compilers' account.

    python -m benchmarks.neighbours --out DIR

With Flax's layer norm, with ours, with ours as a kernel of its own, and with the layer `AddNorm`, which takes the residual
add and the activation along, in plain JAX and as a kernel. Figures are passes of the hidden array, as counted by
`benchmarks.accelerators`: the output and all gradients, where the gradient of the output is known only after it is written.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

import normjax.linen
from benchmarks import chips, results
from benchmarks.chips import Spec
from benchmarks.forms import DTYPES
from benchmarks.harness import Output
from experiments.common import cli, report

SHAPE, SMOKE = (128, 512, 1024), (2, 8, 128)
GELU: Mapping[str, Any] = {"normalizer": "token", "activation": "gelu", "epsilon": 1e-6}
ADDED: Mapping[str, Callable[..., Any]] = {
    "AddNorm": functools.partial(normjax.linen.AddNorm, **GELU),
    "AddNorm, kernel": functools.partial(normjax.linen.AddNorm, **GELU, kernel=True),
}
ALONE: Mapping[str, Callable[..., Any]] = {
    "flax": flax.linen.LayerNorm,
    "normjax": normjax.linen.LayerNorm,
    "normjax, kernel": functools.partial(normjax.linen.LayerNorm, kernel=True),
}
CONTENDERS = (*ALONE, *ADDED)


class Blocks(flax.linen.Module):
    """Four residual blocks.

    Attributes:
      contender: which norm.
      dtype: of what is computed.
    """

    contender: str
    dtype: Any

    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An array like x, [..., c]."""

        def dense(y: jax.Array) -> jax.Array:
            return flax.linen.Dense(x.shape[-1], dtype=self.dtype)(y)

        if self.contender in ALONE:
            for _ in range(4):
                x = x + dense(flax.linen.gelu(ALONE[self.contender](dtype=self.dtype)(x)))
            return x
        norm = ADDED[self.contender]
        y, h = norm(dtype=self.dtype)(x)
        for _ in range(3):
            y, h = norm(dtype=self.dtype)(dense(y), h)
        return h + dense(y)


@dataclass(frozen=True)
class Options(Output):
    """What is compiled.

    Attributes:
      chips: for which chips.
    """

    chips: tuple[str, ...] = ("v5e", "h200")


@dataclass(frozen=True)
class Row:
    """One program, as its compiler has it.

    Attributes:
      contender: which norm.
      chip: what it is compiled for.
      dtype: of the hidden array.
      passes: bytes moved over the bytes of the hidden array.
    """

    contender: str
    chip: str
    dtype: str
    passes: float


def account(contender: str, chip: str, dtype: str, shape: tuple[int, ...]) -> Row:
    """Compiles one program."""
    model, x = Blocks(contender, jnp.dtype(dtype)), Spec(shape, jnp.dtype(dtype))
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def blocks(x: jax.Array, params: Any) -> jax.Array:
        y = model.apply(params, x)
        assert isinstance(y, jax.Array)
        return y

    return Row(contender, chip, dtype, chips.passes(chips.train(blocks), x, x, params, chip=chip, size_of=x).passes)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table; returns what is written as JSON."""
    about = (__doc__ or "").partition("\n")
    options = cli.parse(Options, argv, prog="python -m benchmarks.neighbours", description=about[0])
    for chip in options.chips:
        if why := chips.missing(cli.pick(chip, chips.CHIPS, "chip")):
            cli.fail(why)
    chips.alone()
    columns = [(chip, dtype) for chip in options.chips for dtype in DTYPES]
    shape = SMOKE if options.smoke else SHAPE
    found = [account(name, *column, shape) for name in CONTENDERS for column in columns]
    cells = iter(f"{row.passes:.1f}" for row in found)
    body = [[name, *(next(cells) for _ in columns)] for name in CONTENDERS]
    table = report.table(["norm", *(" ".join(column) for column in columns)], body)
    what = about[2].partition("\n\n")[2].strip()
    return results.finish(results.Result(found, f"{what}\n\n{table}"), options, argv, __file__)


if __name__ == "__main__":
    main()
