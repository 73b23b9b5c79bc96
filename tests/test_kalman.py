"""Kalman normalization against NumPy float64 written from its formulas, and under JAX's transformations."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from normjax import FieldError, Normalizer, normalize
from normjax.kalman import kalman_normalize, logit, mix_beliefs
from normjax.propagate import Belief, Filtered, predict
from tests.beliefs import BATCH, MASK, PRIOR, X, belief_of, blocks_of, close, conv, draw, expected, quick
from tests.refusals import refuses

BEHIND = np.where(MASK, X, np.nan)
ROWS = {"batch": (BATCH, 1, 1), "blocks": (blocks_of(2), 2, 1), "group": (Normalizer("... c/2", "... c/2"), 4, 3),
        "layer": (Normalizer("... c", "... c"), 4, 6)}  # fmt: skip

# --- normalization with a prior -------------------------------------------------------------------


def test_mixture_has_the_moments_of_both_samples_together():
    a, b = draw(0, 30, 3), draw(1, 10, 3, scale=2, shift=1)
    both = np.concatenate([a, b])
    prior, batch = (Belief(*(jnp.asarray(s, jnp.float32) for s in (x.mean(0), x.var(0)))) for x in (a, b))
    close(mix_beliefs(prior, batch, 0.25), Belief(both.mean(0), both.var(0)))
    close(mix_beliefs(prior, batch, 0.0), prior)
    close(mix_beliefs(prior, batch, 1.0), batch)


CASES = [("batch", "n ... c", True), ("blocks", "n c ...", True), ("group", "n c ...", True), ("group", "n ... c", False),
         ("layer", "n ... c", True), ("batch", "n h w c", False)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout", "masked"),
    [case if case[0] == "blocks" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_normalization_with_a_prior_matches_numpy_float64(name, layout, masked):
    n, count, group = ROWS[name]

    def turn(x):
        return np.moveaxis(x, -1, 1) if layout == "n c ..." else x

    if layout == "n h w c":
        n = Normalizer(*[str(n.mean).replace("...", "h w")] * 2)
    mask = turn(MASK) if masked else None
    out = quick(lambda x, prior: kalman_normalize(x, prior, n, layout, gain=0.3, mask=mask))(
        turn(BEHIND if masked else X), belief_of(PRIOR, layout)
    )
    y, (mean, var) = expected(X, PRIOR, 0.3, MASK if masked else None, count, group)
    close(out.y, turn(y), 1e-4, 1e-5)
    for s, wanted in zip(out.filtered.input, (mean, var), strict=True):
        s = np.moveaxis(s, 1, -1) if layout == "n c ..." else s
        close(np.broadcast_to(s, (count, 1, 1, 6)).reshape(count, 6), wanted, 1e-5, 1e-5)


@pytest.mark.slow
def test_without_a_prior_it_is_plain_normalization_and_a_prior_of_full_gain_too():
    for prior in (None, belief_of()):
        out = quick(functools.partial(kalman_normalize, gain=1.0, scale=2.0))(X, prior)
        close(out.y, quick(lambda x: normalize(x, "batch", scale=2.0).y)(X), 1e-5, 1e-5)


@pytest.mark.slow
def test_prior_of_each_example_is_pooled_where_examples_share_statistics():
    each = tuple(draw(20 + i, 4, 6) ** 2 for i in range(2))
    prior = Belief(*(jnp.asarray(s, jnp.float32).reshape(4, 1, 1, 6) for s in each))
    pooled = each[0].mean(0), (each[1] + (each[0] - each[0].mean(0)) ** 2).mean(0)
    close(kalman_normalize(X, prior).filtered.input, kalman_normalize(X, belief_of(pooled)).filtered.input)
    scale = jnp.asarray(draw(22, 4, 6), jnp.float32)  # a factor for each example: beliefs of each
    out = kalman_normalize(X, scale=scale).filtered
    close(out.output.var, scale.reshape(4, 1, 1, 6) ** 2, 1e-3)
    assert out.input.var.shape == (1, 1, 1, 6)


def test_where_all_is_masked_the_prior_stands_and_nothing_is_nan():
    mask = np.ones((1, 1, 1, 6), bool)
    mask[..., 0] = False

    def loss(x, prior):
        out = kalman_normalize(x, prior, mask=mask, guard=1e3, scale=2.0, bias=0.5)
        return jnp.sum(jnp.sin(out.y)), (out.y, out.filtered)

    x = np.where(mask, X, np.nan)
    grads, (y, filtered) = quick(jax.grad(loss, (0, 1), has_aux=True))(x, belief_of())
    close(y[..., 0], np.full((4, 3, 2), 0.5))
    close([s[..., 0].item() for s in filtered.input], [PRIOR[0][0], PRIOR[1][0]])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.any(grads[0][..., 0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["n ... c", "n c ..."])
def test_gain_of_each_channel_lies_along_the_channels(layout):
    gain = np.linspace(0, 1, 6, dtype=np.float32)
    first = layout == "n c ..."
    out = kalman_normalize(np.moveaxis(X, -1, 1) if first else X, belief_of(PRIOR, layout), layout=layout, gain=gain)
    y = np.stack([expected(X, PRIOR, float(q))[0][..., c] for c, q in enumerate(gain)], -1)
    close(out.y, np.moveaxis(y, -1, 1) if first else y, 1e-4, 1e-5)


@pytest.mark.slow
def test_guard_takes_the_batch_alone_where_the_prior_is_a_hundred_times_too_wide():
    var, guarded = np.var(X, (0, 1, 2)), quick(functools.partial(kalman_normalize, guard=100))
    for factor, same in ((99.0, False), (101.0, True)):
        prior = Belief(jnp.zeros((1, 1, 1, 6)), jnp.asarray(factor * var).reshape(1, 1, 1, 6))
        out = guarded(X, prior)
        assert np.allclose(out.filtered.input.var.ravel(), var, rtol=1e-4) == same
        assert not np.allclose(quick(kalman_normalize)(X, prior).filtered.input.var.ravel(), var, rtol=1e-4)
    constant = jnp.ones((4, 2))
    out = guarded(constant, Belief(jnp.zeros((1, 2)), jnp.ones((1, 2))))
    close(out.filtered.input, Belief(np.ones((1, 2)), np.zeros((1, 2))))


@pytest.mark.slow
def test_output_is_believed_to_have_the_moments_of_the_affine_but_a_constant_channel_has_no_spread():
    x = jnp.asarray(draw(0, 6, 5, 2) * [1.0, 0.0], jnp.float32)
    out = quick(functools.partial(kalman_normalize, scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.5, -1.0])))(x)
    close(out.filtered.output, Belief(np.array([[[0.5, -1.0]]]), np.array([[[4.0, 0.0]]])), 1e-4)
    close(out.filtered.output.var[0, 0, 0], np.var(np.asarray(out.y[..., 0])), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch", "group"])
def test_mapped_examples_and_shards_have_the_statistics_of_the_whole(name):
    whole = quick(lambda x, m: kalman_normalize(x, belief_of(), ROWS[name][0], mask=m))(X, MASK)
    field = "@n ..." if name == "batch" else "... c/2"
    example = Belief(*(s[0] for s in belief_of()))

    def one(x, mask):
        return kalman_normalize(x, example, Normalizer(field, field), "... c", mask=mask)

    mapped = quick(jax.vmap(one, axis_name="n"))(X, MASK)
    close(mapped.y, whole.y, 1e-4, 1e-5)
    n = ROWS[name][0] if name == "group" else Normalizer("n@data ...", "n@data ...")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    shard = jax.shard_map(lambda x, m: kalman_normalize(x, belief_of(), n, mask=m).y, mesh=mesh, in_specs=rows,
                          out_specs=rows)  # fmt: skip
    close(quick(shard)(X, MASK), whole.y, 1e-4, 1e-5)


# --- transformations --------------------------------------------------------------------------------


def two_layers(z, mask=None, n=BATCH):
    """A layer, the prediction through a kernel, and the next layer: a function of a dictionary of arrays."""
    first = kalman_normalize(z["x"], None, n, mask=mask, scale=z["scale"], bias=z["bias"])
    w = z["w"].astype(first.y.dtype)
    if w.ndim == 2:
        prior, y = predict(first.filtered, w), jnp.einsum("...i,io->...o", jax.nn.relu(first.y), w)
    else:
        prior, y = predict(first.filtered, w, size=(3, 2)), conv(jax.nn.relu(first.y), w)
    return kalman_normalize(y, prior, n, gain=jax.nn.sigmoid(z["logit"]), mask=mask)


def point(seed=0, dtype: type = np.float32):
    x, w, scale, bias = (
        draw(seed, 4, 3, 2, 3),
        draw(1, 3, 3, 3, 3),
        draw(2, 3, shift=1, scale=0.2),
        draw(3, 3, scale=0.3),
    )
    z = {"x": x, "w": w, "scale": scale, "bias": bias, "logit": np.float64(-1.0)}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), z)


def curved(z, mask=None, n=BATCH):
    out = two_layers(z, mask, n)
    return jnp.sum(jnp.sin(out.y + 1)) + jnp.sum(lax.square(out.filtered.input.var))


def test_derivative_is_that_of_differences():
    with jax.enable_x64(True):
        z, dz = point(0, np.float64), point(7, np.float64)
        z["w"], dz["w"] = z["w"][1, 1], dz["w"][0, 1]
        f = quick(lambda t: curved(jax.tree.map(lambda a, b: a + t * b, z, dz), MASK))
        gradient = quick(jax.value_and_grad(lambda z: curved(z, MASK)))(z)[1]
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), gradient, dz)))
        close(slope, (float(f(1e-5)) - float(f(-1e-5))) / 2e-5, 1e-6)


@pytest.mark.slow
def test_derivatives_of_every_kind_agree_with_differences():
    with jax.enable_x64(True):
        z, dz = point(0, np.float64), point(7, np.float64)
        z["w"], dz["w"] = z["w"][1, 1], dz["w"][0, 1]
        f = functools.partial(curved, mask=MASK, n=blocks_of(2))

        @quick
        def all_of(z, dz):
            slope = jax.jvp(f, (z,), (dz,))[1]
            grad = jax.grad(f)(z)
            again = jax.grad(jax.checkpoint(f))(z)
            forward = jax.jvp(jax.grad(f), (z,), (dz,))[1]
            reverse = jax.grad(lambda z: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(f)(z), dz))))(z)
            return f(z), slope, grad, again, forward, reverse

        def moved(by):
            return all_of(jax.tree.map(lambda a, b: a + by * b, z, dz), dz)

        at, ahead, behind = jax.tree.map(np.asarray, (all_of(z, dz), moved(1e-5), moved(-1e-5)))
    _, slope, grad, again, forward, reverse = at
    close(slope, (ahead[0] - behind[0]) / 2e-5, 1e-6)
    close(sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), grad, dz))), slope, 1e-9)
    close(again, grad, 1e-9, 1e-9)
    close(forward, jax.tree.map(lambda a, b: (a - b) / 2e-5, ahead[2], behind[2]), 1e-4, 1e-4)
    close(reverse, forward, 1e-7, 1e-7)


@pytest.mark.slow
def test_jit_vmap_and_half_precision_give_the_same():
    z, other = point(0), point(5)
    for p in (z, other):
        p["w"] = p["w"][1, 1]
    layers = quick(two_layers)
    wanted = [layers(z), layers(other)]
    both = jax.tree.map(lambda *a: jnp.stack(a), z, other)
    mapped = quick(jax.vmap(two_layers))(both)
    close(mapped.y, jnp.stack([w.y for w in wanted]), 1e-4, 1e-5)
    close(mapped.filtered, jax.tree.map(lambda *a: jnp.stack(a), *(w.filtered for w in wanted)), 1e-4, 1e-5)
    half = layers(jax.tree.map(lambda a: a.astype(jnp.bfloat16), z))
    assert half.y.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(half.filtered))
    close(half.y.astype(jnp.float32), wanted[0].y, 0.1, 0.1)
    assert wanted[0].y.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = layers(jax.tree.map(lambda a: a.astype(np.float64), z))
        assert {s.dtype for s in jax.tree.leaves((wide.y, wide.filtered))} == {np.dtype(np.float64)}
        close(wide.y, wanted[0].y, 1e-4, 1e-5)


@pytest.mark.slow
def test_belief_is_the_carry_of_a_scan_over_layers():
    kernels = jnp.asarray(draw(4, 3, 3, 3, 3, 3), jnp.float32)

    def layer(carry, w):
        x, state = carry
        prior = predict(state, w, size=(3, 2))
        out = kalman_normalize(conv(jax.nn.relu(x), w), prior)
        return (out.y, out.filtered), out.filtered.input.var

    start = quick(kalman_normalize)(point()["x"])
    carry, _ = quick(lambda k: lax.scan(layer, (start.y, start.filtered), k))(kernels)
    looped, one = (start.y, start.filtered), quick(layer)
    for w in kernels:
        looped, _ = one(looped, w)
    close(carry, looped, 1e-4, 1e-4)


# --- refusals -------------------------------------------------------------------------------------

ROW = ("Kalman normalization needs a mean and a variance: A = B, order 2, gain 1, power 1/2, without windows, floor or "
       "keep_mean; found ")  # fmt: skip
SHAPE = 'a prior for shape (4, 3, 2, 6), layout "n ... c", field "n ..." has shape (1 or 4, 1, 1, 1 or 6); found '
REFUSED = [
    (lambda: kalman_normalize(X, cast(Any, Filtered(belief_of(), belief_of()))), TypeError,
     "a prior is a Belief, as `predict` gives it; found Filtered"),
    (lambda: kalman_normalize(np.ones((2, 3), np.int32)), TypeError,
     "kalman_normalize takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)"),
    (lambda: kalman_normalize(jnp.ones((2, 3), jnp.complex64)), TypeError,
     "kalman_normalize takes real arrays, found complex64"),
    (lambda: kalman_normalize(X, gain=1.5), ValueError, "gain lies between 0 and 1; found 1.5"),
    (lambda: kalman_normalize(X, gain=np.float32(-1)), ValueError, "gain lies between 0 and 1; found np.float32(-1.0)"),
    (lambda: kalman_normalize(X, belief_of(), gain=jnp.ones(5)), FieldError,
     'gain of shape (5,) does not broadcast against shape (4, 3, 2, 6), layout "n ... c"'),
    (lambda: logit(1.0), ValueError, "a learned gain starts strictly between 0 and 1; found 1.0"),
    (lambda: kalman_normalize(X, normalizer="rms"), ValueError, ROW + "Normalizer(None, 'c')"),
    (lambda: kalman_normalize(X, normalizer=Normalizer("...:5 c", "...:5 c")), ValueError,
     ROW + "Normalizer('...:5 c', '...:5 c')"),
    (lambda: kalman_normalize(X, Belief(jnp.zeros((1, 6)), jnp.ones((1, 6)))), FieldError,
     SHAPE + "(1, 6)"),
    (lambda: kalman_normalize(X, Belief(jnp.zeros((2, 1, 1, 6)), jnp.ones((1, 1, 1, 6)))), FieldError,
     SHAPE + "(2, 1, 1, 6)"),
]  # fmt: skip


def test_refusal_names_what_was_found_and_what_is_accepted():
    for case in REFUSED:
        refuses(*case)
