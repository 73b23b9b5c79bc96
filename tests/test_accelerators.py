"""What the compilers of TPUs and GPUs, which need neither, say about every row: passes, temporaries, that it compiles.

Skipped without them; `make aot` installs them beside nothing else. passes.py has the cases, passes.md the counts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

import normjax
from benchmarks import chips, forms
from benchmarks.chips import Spec, passes
from tests.passes import CHIPS, Case, accounts, cases, misses, stored

HERE = {chip for chip in chips.CHIPS if not chips.missing(chip)}
if not HERE:
    pytest.skip(chips.missing("v5e"), allow_module_level=True)
chips.alone()

F32 = jnp.float32
X = Spec((32768, 4096), F32)  # beyond every fast memory
PART = Spec((128, 4096), F32)
FIELDS = ("layer", "rms", "batch", "group", "instance")  # need no array of the size of x
NORMS = dict(zip(forms.NETWORKS, (4, 2), strict=True))  # how many a network has


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def on(chip, *values, **marks):
    """A case of a chip, skipped where its compiler is missing."""
    skip = pytest.mark.skipif(chip not in HERE, reason=chips.missing(chip))
    return pytest.param(*values, **{**marks, "marks": (skip, *marks.get("marks", ()))})


def slow(case: Case) -> bool:
    """Cases that say little beside the others, or take long to compile."""
    small = case.shape == forms.SHAPES[case.row][0]
    if case.row in forms.NETWORKS:
        return small == (case.row == "network of layer norms") or case.dtype == "float32"
    if case.chip == "h200":
        return False
    return case.row in forms.WINDOWS or (small and case.dtype == "bfloat16")


CASES = [on(c.chip, c, id=c.name, marks=(pytest.mark.slow,) if slow(c) else ()) for c in cases()]


# --- the count ------------------------------------------------------------------------------------


def scan(x):
    return jax.lax.scan(lambda total, row: (total + row, total), jnp.zeros(x.shape[1:]), x)


def guarded(x):
    """Twice x, or where the first element is positive a softmax; XLA would compute both and select without the barrier."""
    return jax.lax.cond(
        x[0, 0] > 0, lambda x: jax.nn.softmax(x, 0) * jax.lax.optimization_barrier(x[0]), lambda x: 2 * x, x
    )


part = PART.shape[0] / X.shape[0]
# Function, its arguments, passes by hand on a TPU and on a GPU.
BY_HAND = {
    "copy": (jnp.copy, (X,), 2, 2),
    "add": (jnp.add, (X, X), 3, 3),
    "add a row": (jnp.add, (X, Spec((4096,), F32)), 2, 2),
    "sum": (jnp.sum, (X,), 1, 1),
    "sum of columns": (lambda x: x.sum(0), (X,), 1, 1 + 2 * part),  # the GPU's partial sums
    "softmax": (functools.partial(jax.nn.softmax, axis=-1), (X,), 4, 2),  # maximum, sum, quotient; one kernel
    "slice": (lambda x: 2 * x[:128], (X,), 2 * part, 2 * part),
    "every 16th row": (lambda x: x[::16] + 1, (X,), 1 / 2 + 1 / 16, 2 / 16),  # 8 rows are a tile
    "every 16th column": (lambda x: x[:, ::16] + 1, (X,), 1 + 1 / 16, 1 / 2 + 1 / 16),  # 8 columns are a sector
    "gather": (lambda x, i: x[i], (X, Spec((128,), jnp.int32)), 2 * part, 2 * part),
    "update in place": (lambda x, u: jax.lax.dynamic_update_slice(x, u, (8, 0)), (X, PART), 2 + 2 * part, 2 + 2 * part),
    # A row is read for the sum and for what is put out, which starts as zeros on a GPU; the sum stays in fast memory.
    "scan": (scan, (Spec((100, 256, 4096), F32),), 2.01, 6.01),
    "product": (jnp.matmul, (X, Spec((4096, 4096), F32)), 2 + 1 / 8, 2 + 1 / 8),
    "barrier": (lambda x: jax.lax.optimization_barrier(x + 1) + 1, (X,), 4, 4),
    "conditional": (guarded, (X,), 2, 2),
}


@pytest.mark.parametrize(
    ("chip", "f", "specs", "count"),
    [
        on(chip, chip, f, specs, count, id=f"{chip} {name}")
        for name, (f, specs, *counts) in BY_HAND.items()
        for chip, count in zip(CHIPS, counts, strict=True)
    ],
)
def test_count_is_that_by_hand(chip, f, specs, count):
    assert passes(f, *specs, chip=chip).passes == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize("chip", [on(chip, chip) for chip in CHIPS])
def test_both_branches_of_a_conditional_are_counted(chip):
    found = passes(guarded, X, chip=chip)
    assert found.worst > found.passes + 0.9


# --- normjax and its peers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_row_moves_no_more_than_its_peer_and_what_is_stored(case):
    """Both are compiled here, so that the comparison holds through other versions; a starred count is a known miss."""
    ours, peer = accounts(case)
    count, starred = stored()[*case.line, case.column]
    assert ours.passes == pytest.approx(count, rel=0.02)
    assert misses(ours.passes, peer.passes) == starred, (ours.passes, peer.passes)
    if not starred:
        alone = case.row in FIELDS and case.shape == forms.SHAPES[case.row][1]
        assert ours.temporary <= (0.02 if alone else 1.06 * peer.temporary + 0.06)
    # Where the guard of the moments is taken, they read x once more, for the output and the gradients alike.
    assert ours.worst <= ours.passes + 1.01 * NORMS.get(case.row, 1)


def test_every_count_that_is_stored_is_asked_for():
    assert {(*case.line, case.column) for case in cases()} == stored().keys()


# --- every row, every chip ------------------------------------------------------------------------

SMALL = Spec((16, 8, 8, 64), jnp.bfloat16)


def everything(g, x):
    """All rows of the table with their gradients, in one program: most of a compiler's time is spent once."""
    return [chips.train(lambda x, n=n: normjax.normalize(x, n).y)(g, x) for n in normjax.TABLE.values()]


@pytest.mark.parametrize("chip", [on(c, c, marks=() if c in CHIPS else (pytest.mark.slow,)) for c in chips.CHIPS])
def test_every_row_of_the_table_compiles(chip):
    chips.compiled(everything, SMALL, SMALL, chip=chip)


@pytest.mark.parametrize("chip", [on(chip, chip) for chip in chips.CHIPS])
def test_every_kernel_compiles(chip):
    row = Spec((1, 1024), F32)

    def both(g, x, scale, bias):
        """Layer and RMS norm."""
        of = functools.partial(normjax.kernels.normalize, axes=(1,), eps=1e-5)
        layer = chips.train(lambda x, scale, bias: of(x, scale=scale, bias=bias)[0])(g, x, scale, bias)
        return layer, chips.train(lambda x, scale: of(x, scale=scale, centre=False)[0])(g, x, scale)

    with normjax.kernels.use("pallas"):
        for dtype in (F32, jnp.bfloat16):
            x = Spec((8192, 1024), dtype)
            chips.compiled(both, x, x, row, row, chip=chip)


# --- where a program is traced --------------------------------------------------------------------


@pytest.mark.parametrize("chip", [on(chip, chip) for chip in CHIPS])
@pytest.mark.parametrize("row", ["layer", "batch"])
def test_program_exported_from_a_cpu_is_the_one_compiled_for_the_chip(row, chip):
    program = forms.programs(row, forms.SHAPES[row][1], "bfloat16", "train")[forms.OURS]
    sent: Any = export.export(jax.jit(program.call), platforms=[chips.platform(chip)])(*program.specs)
    there = passes(sent.call, *program.specs, chip=chip, size_of=program.x)
    here = program.on(chip)
    assert (there.passes, there.kernels) == (pytest.approx(here.passes, rel=1e-3), here.kernels)
