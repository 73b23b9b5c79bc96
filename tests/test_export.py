"""Sizes that are symbols: rows and layers under `jax.export`, forward and backward, called at several sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fx
from jax import export

from normjax import Normalizer, expect, l1_penalty, normalize, top
from normjax.field import FieldError
from tests import reference
from tests.rows import CHANNELS, ROWS, jit
from tests.test_layers import LAYERS, QUICK, TRAINED, inputs, of_linen, started, training, twin_of

SIZES = ((16, 6, 5, 64), (8, 6, 5, 64), (8, 2, 9, 64))


def exported(f, *arguments):
    """The function exported for these symbolic shapes and dtypes; compiled anew for each size it meets."""
    scope = export.SymbolicScope()
    given = [jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype) for shape, dtype in arguments]
    return jit(export.export(jit(f))(*given).call)


def agree(got, want, message, rtol=2e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = float(jnp.max(jnp.abs(other), initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * max(size, 1), err_msg=message)


def with_gradient(f):
    """Outputs of f, and the gradient of a curved function of the first of them with respect to x."""

    def loss(x, *rest):
        out = f(x, *rest)
        return jnp.sum(jnp.sin(jax.tree.leaves(out)[0])), out

    return lambda x, *rest: jax.grad(loss, has_aux=True)(x, *rest)


def each_row(names, masked):
    """Every row of x: outputs, statistics and the gradient."""

    def f(x, mask):
        weights = mask if masked else None
        return {
            name: with_gradient(lambda x, n=ROWS[name]: normalize(x, n, mask=weights))(
                x if name in CHANNELS else x[..., :16]
            )
            for name in names
        }

    return f


@pytest.mark.parametrize(
    ("names", "shape", "masked", "sizes"),
    [
        (("group", "contrast"), "8*m, 6, 5, 64", True, SIZES[:1]),
        pytest.param(tuple(ROWS), "8*m, h, w, 64", False, SIZES[2:], marks=pytest.mark.slow),
        pytest.param(tuple(ROWS), "8*m, h, w, 64", True, SIZES, marks=pytest.mark.slow),
    ],
)
def test_rows_are_exported_with_symbols_for_sizes_and_give_the_numbers_of_each_size(names, shape, masked, sizes):
    f = each_row(names, masked)
    program = exported(f, (shape, np.float32), (shape[:-2] + "1", np.bool_))
    rng = np.random.default_rng(0)
    for size in sizes:
        x, mask = rng.normal(0.3, 1.5, size).astype(np.float32), rng.random((*size[:3], 1)) > 0.3
        got, want = program(x, mask), jit(f)(x, mask)
        for name in names:
            agree(got[name], want[name], name)
            seen = x if name in CHANNELS else x[..., :16]
            y = reference.normalize(seen, ROWS[name], mask=mask if masked else None)[0]
            np.testing.assert_allclose(got[name][1].y, y, atol=2e-4, err_msg=name)


def batch_of(name):
    """The first axis of a layer's inputs: a symbol, or a multiple where the layer splits the batch."""
    return "2*m" if name == "RangeBatchNorm" else "b"


def linen_call(name):
    layer, variables = started(name)
    return lambda *given: layer.apply(variables, *given, mutable=["batch_stats", "losses"])


def linen_inference(name):
    _, variables = started(name)
    stored = {"use_running_average": True} if name in TRAINED else {}
    layer = of_linen(name, **training(name) | stored)
    return lambda *given: layer.apply(variables, *given)


def nnx_call(name):
    graph, state = fx.split(twin_of(name))

    def call(*given):
        layer = fx.merge(graph, state, copy=True)
        return layer(*given), fx.to_pure_dict(fx.state(layer, fx.BatchStat))

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call"),
    [(name, linen_call) for name in LAYERS if name != "GhostBatchNorm"]
    + [(name, nnx_call) for name in (*QUICK, "SPADE", "KalmanNorm", "SwitchableNorm")]
    + [(name, linen_inference) for name in TRAINED],
)
def test_layers_are_exported_with_a_symbol_for_the_batch(name, call):
    given, f = inputs(name), with_gradient(call(name))
    program = exported(f, *((", ".join([batch_of(name), *map(str, a.shape[1:])]), a.dtype) for a in given))
    for parts in (1, 2):
        taken = [jnp.concatenate([a] * parts) for a in given]
        agree(program(*taken), jit(f)(*taken), name, rtol=1e-4)


def test_ghost_batch_norm_takes_a_symbol_in_inference_and_says_in_training_what_it_needs():
    x = ("4*m, 6", np.float32)
    with pytest.raises(
        FieldError, match=r"the batch of 4\*m examples has m parts of 4, and a field cannot split an axis"
    ):
        exported(linen_call("GhostBatchNorm"), x)
    assert exported(linen_inference("GhostBatchNorm"), x)(np.ones((4, 6), np.float32)).shape == (4, 6)


@pytest.mark.slow
def test_windows_extremes_and_penalties_are_exported_with_a_symbol_for_every_axis():
    def f(x):
        largest = normalize(x, Normalizer("t", "t:3", order=float("inf"), power=1.0), "n t c")
        several = normalize(x, Normalizer("t", "t", order=top(5), power=1.0), "n t c")
        blurred = [
            expect(x, "t:4 c", "n t c", window=w, border=b) for w in ("box", "gaussian") for b in ("zero", "truncate")
        ]
        return largest, several, blurred, l1_penalty(x)

    program = exported(with_gradient(f), ("b, t, 3*c", np.float32))
    x = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    agree(program(x), jit(with_gradient(f))(x), "")
    few = x[:, :3]  # fewer than five: the mean of all there are
    want = np.abs(few - few.mean(1, keepdims=True)).mean(1, keepdims=True)
    np.testing.assert_allclose(program(few)[1][1].stats.var, want, rtol=1e-5)


def test_one_program_is_exported_for_several_platforms_and_shapes_alone_need_no_sizes():
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 64"), np.float32)
    rows = ("batch", "layer", "group", "divisive")
    step = jax.jit(lambda x: [jax.grad(lambda x, n=n: jnp.sum(normalize(x, n).y ** 3))(x) for n in rows])
    platforms = ("cpu", "cuda", "tpu")
    assert export.export(step, platforms=platforms)(x).platforms == platforms
    assert all(gradient.shape == x.shape for gradient in jax.eval_shape(step, x))


@pytest.mark.parametrize(
    ("f", "shape", "said"),
    [
        (
            lambda x: normalize(x, "ghost"),
            "b, 6",
            r"axis 'n' of length b \(a symbol: write it as a multiple, \"8\*m\"\)",
        ),
        (
            lambda x: normalize(x, "group"),
            "2, c",
            r"axis 'c' of length c \(a symbol: write it as a multiple, \"32\*m\"\)",
        ),
        (
            jax.vmap(functools.partial(expect, field="t:5@q", layout="t"), axis_name="q"),
            "2, t",
            r'takes 2 elements of its neighbours.* constraints=\["t >= 2"\]',
        ),
        (
            jax.vmap(functools.partial(expect, field="@q", layout="t"), axis_name="q"),
            "b, 3",
            "the size of mapped axis '@q' is a symbol, and JAX has no collectives over such",
        ),
    ],
)
def test_what_a_symbol_cannot_answer_is_said_with_what_to_do(f, shape, said):
    with pytest.raises(FieldError, match=said):
        exported(f, (shape, np.float32))
