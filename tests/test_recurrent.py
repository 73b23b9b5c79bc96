"""Recurrent cells against the published steps written out in NumPy float64, against Flax's, and linen against nnx."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import normjax.linen.recurrent as our_linen
import normjax.nnx.recurrent as our_nnx
from normjax import TABLE, FieldError, Normalizer, recurrent, train
from normjax.nnx import Penalty
from normjax.penalty import total_penalty
from normjax.recurrent import Clock, Places, Weights, ba2016, cooijmans2017, ren2017
from tests.cells import (
    CASES,
    IN,
    NARROW,
    SLOW,
    SMALL,
    SMOOTH,
    WIDE,
    C,
    N,
    T,
    array,
    check_case,
    check_statistics,
    linen_rnn,
    nnx_cell,
    sigmoid,
    variables_of,
    wrapped,
    written_out,
)
from tests.test_flax import assert_close, assert_equal, lenient

QUICK = ("lstm ren bn*", "tanh ren dn*")
EVERY = [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", EVERY)
def test_outputs_penalties_statistics_and_gradients_are_those_of_the_written_out_steps(case):
    check_case(*CASES[case], features=WIDE.get(case, C))


# --- linen, nnx and Flax --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        SLOW("OptimizedLSTMCell", ba2016() | {"l1": 0.2, "forget_bias": 1.0}),
        SLOW("GRUCell", {"normalizer": SMOOTH, "place": "separate", "max_steps": 2, "l1": 0.1}),
        ("SimpleCell", ren2017("bn-l1", "relu", max_steps=4) | {"learn_sigma": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_linen_is_nnx_on_the_same_parameters(name, args):
    rnn, x, lengths = linen_rnn(name, args), array(N, T, IN), jnp.array([3, 1, 2, 3, 3])
    params, stats = variables_of(rnn, x)
    if name == "GRUCell":
        params["hn"]["bias"] = jnp.zeros(C)
    cell = nnx_cell(name, args, params, stats)
    graph, given, rest = nnx.split(our_nnx.RNN(cell), nnx.Param, ...)

    @functools.partial(jax.jit, compiler_options=SMALL)
    def both(params, given, rest, x):
        def linen(params, x):
            y, changed = rnn.apply(wrapped(params, stats), x, seq_lengths=lengths, mutable=["losses", "batch_stats"])
            changed = dict(changed)
            return jnp.sum(y**2) + total_penalty(changed.pop("losses")), (y, changed)

        def ours(given, x):
            model = nnx.merge(graph, given, jax.tree.map(lambda leaf: leaf, rest))
            captured: Any = nnx.capture(model, Penalty)
            y, sown = captured(x, seq_lengths=lengths)
            return jnp.sum(y**2) + sown["cell"]["l1"][...], (y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        one = jax.value_and_grad(linen, (0, 1), has_aux=True)(params, x)
        return one, jax.value_and_grad(ours, (0, 1), has_aux=True)(given, x)

    ((value, (y, changed)), (dp, dx)), ((value2, (y2, after)), (dp2, dx2)) = both(params, given, rest, x)
    assert_close([value2, y2, dx2], [value, y, dx], 2e-6)
    dp2 = nnx.to_pure_dict(dp2)["cell"]
    sites = [key for key in dp if key.startswith("norm_")]
    assert sites
    assert_close({key: dp2[key] for key in sites}, {key: dp[key] for key in sites}, 1e-5)
    if stats:
        assert_close(after["cell"], jax.tree.map(jnp.asarray, dict(changed["batch_stats"]["cell"])), 2e-6)
        assert not np.array_equal(jax.tree.leaves(after)[0], jax.tree.leaves(stats)[0])


@pytest.mark.parametrize(
    "cells",
    [
        [("OptimizedLSTMCell", {})],
        SLOW([("LSTMCell", {}), ("GRUCell", {}), ("SimpleCell", {"residual": True}), ("SimpleCell", {})]),
    ],
    ids=["lstm", "others"],
)
def test_without_a_normalizer_the_linen_cells_are_flax(cells):
    x, g = array(N, T, IN), array(N, T, C, seed=9)

    @functools.partial(jax.jit, compiler_options=SMALL)
    def run(x):
        out = []
        for library, rnn in ((our_linen, our_linen.RNN), (nn, nn.RNN)):
            for name, args in cells:
                with lenient():
                    model = rnn(
                        getattr(library, name)(C, bias_init=nn.initializers.normal(1.0), **args), return_carry=True
                    )
                    variables = model.init(jax.random.key(1), x)

                    def f(v, x, model: Any = model):
                        carry, y = model.apply(v, x)
                        return jnp.sum(y * g), (carry, y)

                    out.append((variables, jax.grad(f, (0, 1), has_aux=True)(variables, x)))
        return out[: len(cells)], out[len(cells) :]

    ours, flax = run(x)
    assert_equal([v for v, _ in ours], [v for v, _ in flax])
    assert_close([rest for _, rest in ours], [rest for _, rest in flax], 2e-6)


@pytest.mark.slow
def test_without_a_normalizer_the_nnx_cells_are_flax():
    x = array(N, T, IN)
    for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"):
        out = []
        for library, rnn in ((our_nnx, our_nnx.RNN), (nnx, nnx.RNN)):
            with lenient():
                model = rnn(getattr(library, name)(IN, C, rngs=nnx.Rngs(3)), return_carry=True)
                out.append((nnx.to_pure_dict(nnx.state(model, nnx.Param)), model(jnp.asarray(x))))
        assert_equal(out[0][0], out[1][0])
        assert_close(out[0][1], out[1][1], 2e-6)


@pytest.mark.slow
def test_our_rnn_runs_flaxs_own_cells_as_flax_does():
    x, lengths = jnp.asarray(array(N, T, IN)), jnp.array([3, 1, 2, 3, 2])
    with lenient():
        both = [rnn(nn.SimpleCell(C), return_carry=True) for rnn in (our_linen.RNN, nn.RNN)]
        variables = both[0].init(jax.random.key(0), x, seq_lengths=lengths)
        ours, flax = (model.apply(variables, x, seq_lengths=lengths) for model in both)
        assert_equal(ours, flax)
        both = [rnn(nnx.SimpleCell(IN, C, rngs=nnx.Rngs(0)), return_carry=True) for rnn in (our_nnx.RNN, nnx.RNN)]
        captured: Any = nnx.capture(both[0], Penalty)
        assert_equal(captured(x, seq_lengths=lengths)[0], both[1](x, seq_lengths=lengths))


@pytest.mark.slow
def test_flaxs_own_rnn_runs_the_cells_and_leaves_the_penalties_along_time():
    args = ren2017("bn*", "lstm", max_steps=2)
    x = array(N, T, IN)
    ours = linen_rnn("LSTMCell", args)
    params, stats = variables_of(ours, x)
    flax = nn.RNN(ours.cell, variable_axes={"losses": 0}, variable_carry="batch_stats")
    run = {}
    for key, model in (("ours", ours), ("flax", flax)):
        y, changed = model.apply(wrapped(params, stats), x, mutable=["losses", "batch_stats"])
        run[key] = (y, changed["batch_stats"], changed["losses"]["cell"]["l1"])
    assert_equal(run["flax"][:2], run["ours"][:2])
    assert run["flax"][2].shape == (T,)
    np.testing.assert_allclose(run["flax"][2].mean(), run["ours"][2], rtol=1e-6)
    cell = nnx_cell("LSTMCell", args, params, stats)
    assert_close(nnx.RNN(cell)(jnp.asarray(x)), run["ours"][0], 2e-6)
    assert_close(cell.norm_c.mean[...], run["ours"][1]["cell"]["norm_c"]["mean"], 2e-6)


@pytest.mark.slow
def test_a_layer_applied_twice_adds_its_penalties():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            rnn = our_linen.RNN(our_linen.SimpleCell(IN, normalizer="token", l1=1.0))
            return rnn(rnn(x))

    x = array(2, T, IN)
    variables = Twice().init(jax.random.key(0), x)
    once = our_linen.RNN(our_linen.SimpleCell(IN, normalizer="token", l1=1.0))
    found = variables["params"]
    while "norm_z" not in found:
        (found,) = found.values()
    inner = {"params": {"cell": found}}
    y, first = once.apply(inner, x, mutable=["losses"])
    _, second = once.apply(inner, y, mutable=["losses"])
    _, both = Twice().apply(variables, x, mutable=["losses"])
    np.testing.assert_allclose(total_penalty(both), total_penalty(first) + total_penalty(second), rtol=1e-6)


# --- statistics of each step ----------------------------------------------------------------------


def test_a_whole_sequence_in_inference_is_that_of_the_stored_statistics_in_linen_and_nnx():
    args, x, lengths = ren2017("bn", "tanh", max_steps=2), array(N, T, IN), jnp.array([3, 1, 2, 3, 0])
    rnn: Any = our_linen.RNN(our_linen.SimpleCell(C, **args), return_carry=True)
    params, stats = variables_of(linen_rnn("SimpleCell", args), x)
    stats = {
        site: {"mean": array(2, C, seed=k), "var": 1 + array(2, C, seed=k + 5) ** 2} for k, site in enumerate(stats)
    }
    model = our_nnx.RNN(nnx_cell("SimpleCell", args, params, stats, average=True), return_carry=True)
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=SMALL)
    def both(variables, state, x):
        ours = rnn.apply(variables, x, seq_lengths=lengths, use_running_average=True)
        return ours, nnx.merge(graph, state)(x, seq_lengths=lengths)

    ((h, clock), y), theirs = both(wrapped(params, stats), state, x)
    assert_close(theirs, ((h, clock), y), 2e-6)
    p = jax.tree.map(np.asarray, params)
    want = np.zeros((N, C))
    for t in range(T):
        z = [x[:, t] @ p["i"]["kernel"] + p["i"]["bias"], want @ p["h"]["kernel"] + p["hidden_bias"]]
        for k, site in enumerate(("norm_xz", "norm_hz")):
            q, at = stats[site], min(t, 1)
            z[k] = (z[k] - q["mean"][at]) / np.sqrt(q["var"][at] + 1e-4) * p[site]["scale"] + p[site]["bias"]
        want = np.where((t < np.asarray(lengths))[:, None], np.tanh(z[0] + z[1]), want)
    np.testing.assert_allclose(h, want, atol=1e-5)
    assert_equal(clock, Clock(lengths, None))  # it stopped where each was over, and the lengths end with the call


@pytest.mark.slow
def test_a_model_of_cells_trains_by_steps_and_its_micro_batches_average_what_they_store():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            cell = our_linen.SimpleCell(C, use_running_average=not train, **ren2017("bn*", "tanh", max_steps=T))
            return our_linen.RNN(cell)(x)

    def loss(call, batch, train):
        return jnp.mean(jnp.square(call(batch, train=train))), {}

    model, tx, x = Model(), optax.sgd(0.1), jnp.asarray(array(4, T, IN))
    start = train.linen_init(model, tx, jax.random.key(0), x, train=False)
    whole, parts = (
        jax.jit(train.linen_step(model, loss, tx, micro_batches=k), compiler_options=SMALL)(start, x)[0] for k in (1, 2)
    )
    ours, theirs = (nnx.to_pure_dict(s.stats) if isinstance(s.stats, nnx.State) else s.stats for s in (parts, whole))
    first = [jax.tree.leaves_with_path(tree) for tree in (ours, theirs)]
    for (path, got), (_, want) in zip(*first, strict=True):
        if "xz" in jax.tree_util.keystr(path):  # W x, which does not depend on how the batch was cut
            if path[-1].key == "mean":
                np.testing.assert_allclose(got, want, atol=1e-6)
            else:
                assert np.all(got <= want + 1e-6)
                assert np.any(got < want - 1e-4)


@pytest.mark.slow
def test_in_inference_each_example_takes_the_statistics_of_its_own_step_and_late_ones_the_last():
    args, features = cooijmans2017(3), 2
    cell: Any = our_nnx.LSTMCell(IN, features, rngs=nnx.Rngs(0), use_running_average=True, **args)
    for site in (cell.norm_xifgo, cell.norm_hifgo, cell.norm_c):
        site.mean[...] = array(*site.mean.shape, seed=1)
        site.var[...] = 1 + array(*site.var.shape, seed=2) ** 2
    x, (c, h) = array(4, IN), (array(4, features, seed=3), array(4, features, seed=4))
    steps = np.array([0, 2, 1, 7])
    before = nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat))
    (c2, h2, clock), y = cell((c, h, Clock(jnp.asarray(steps))), x)

    def norm(site, z):
        site, at = getattr(cell, "norm_" + site), np.minimum(steps, 2)
        z = (z - np.asarray(site.mean[...])[at]) / np.sqrt(np.asarray(site.var[...])[at] + 1e-5)
        return z * np.asarray(site.scale[...]) + (0 if site.bias is None else np.asarray(site.bias[...]))

    w, u, b = (np.concatenate([np.asarray(v) for v in p], -1) for p in (
        [cell.ii.kernel[...], cell.if_.kernel[...], cell.ig.kernel[...], cell.io.kernel[...]],
        [cell.hi.kernel[...], cell.hf.kernel[...], cell.hg.kernel[...], cell.ho.kernel[...]],
        [cell.hi.bias[...], cell.hf.bias[...], cell.hg.bias[...], cell.ho.bias[...]],
    ))  # fmt: skip
    i, f, g, o = np.split(norm("xifgo", x @ w) + norm("hifgo", h @ u) + b, 4, -1)
    want_c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
    want_h = sigmoid(o) * np.tanh(norm("c", want_c))
    np.testing.assert_allclose(c2, want_c, atol=1e-5)
    np.testing.assert_allclose(h2, want_h, atol=1e-5)
    assert_equal([y, clock.step], [h2, jnp.asarray(steps + 1, jnp.int32)])
    assert_equal(nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat)), before)
    assert np.allclose(cell.norm_c.scale[...], 0.1)
    assert cell.norm_xifgo.bias is None


@pytest.mark.slow
def test_a_second_segment_counts_on_where_the_first_stopped_or_anew_after_restart():
    x = array(N, 2 * T, IN)
    rnn, short = (
        linen_rnn("SimpleCell", ren2017("bn", "tanh", max_steps=steps), return_carry=True) for steps in (2 * T, T)
    )
    params, stats = variables_of(rnn, x)
    whole, changed = rnn.apply(wrapped(params, stats), x, mutable=["batch_stats"])
    halved = jax.tree.map(lambda p: p[:T], stats)
    for model, start, restart in ((rnn, stats, lambda carry: carry), (short, halved, recurrent.restart)):
        carry, after = None, wrapped(params, start)
        for part in (x[:, :T], x[:, T:]):
            given = None if carry is None else restart(carry)
            (carry, y), new = model.apply(after, part, initial_carry=given, mutable=["batch_stats"])
            after = after | new
        assert_close(y, whole[1][:, T:], 1e-6)
        assert_equal(carry[-1].step, jnp.full(N, 2 * T if model is rnn else T, jnp.int32))
        once = changed["batch_stats"]["cell"]
        if model is short:  # each row moved twice, by both of its steps
            once = jax.tree.map(lambda new, old: new[T:] + 0.9 * (new[:T] - old[:T]), dict(once), stats)
        assert_close(after["batch_stats"]["cell"], once, 1e-6)


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_padding_reaches_no_output_statistic_penalty_or_gradient():
    args = ren2017("bn*", "lstm", max_steps=2)
    lengths = np.array([3, 1, 2, 3, 2])
    padded = np.arange(T)[None, :, None] >= lengths[:, None, None]
    rnn, x = linen_rnn("LSTMCell", args, return_carry=True), array(N, T, IN)
    params, stats = variables_of(rnn, x)

    @functools.partial(jax.jit, compiler_options=SMALL)
    def run(params, x):
        def loss(params, x):
            (carry, y), changed = rnn.apply(
                wrapped(params, stats), x, seq_lengths=lengths, mutable=["losses", "batch_stats"]
            )
            penalty = total_penalty(changed["losses"])
            return jnp.sum(y) + penalty, (carry, y, penalty, changed["batch_stats"]["cell"])

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    gradients, (carry, y, penalty, after) = run(params, jnp.where(padded, jnp.nan, x))
    assert_equal(run(params, x), (gradients, (carry, y, penalty, after)))
    assert not np.any(np.asarray(gradients[1])[np.broadcast_to(padded, x.shape)])
    want, states, penalties, seen = written_out("LSTMCell", args, params, x, lengths=lengths)
    np.testing.assert_allclose(np.swapaxes(y, 0, 1), want, atol=2e-5)
    weight = np.array([np.sum(t < lengths) for t in range(T)])
    np.testing.assert_allclose(penalty, np.sum(penalties * weight) / weight.sum(), rtol=1e-5)
    check_statistics(args, stats, after, seen)
    np.testing.assert_allclose(carry[1], states[1], atol=2e-5)
    assert_equal(carry[1], y[np.arange(N), lengths - 1])


@pytest.mark.slow
def test_reversed_sequences_keep_their_padding_at_the_end():
    lengths = np.array([3, 1, 2, 3, 2])
    args = ren2017("bn", "tanh", max_steps=2)
    x = array(N, T, IN)
    forward, backward = (linen_rnn("SimpleCell", args, reverse=r, keep_order=r) for r in (False, True))
    variables = wrapped(*variables_of(forward, x))
    flipped = np.stack([np.concatenate([row[:k][::-1], row[k:]]) for row, k in zip(x, lengths, strict=True)])
    want, stats = forward.apply(variables, flipped, seq_lengths=lengths, mutable=["batch_stats"])
    got, stats2 = backward.apply(variables, x, seq_lengths=lengths, mutable=["batch_stats"])
    assert_equal(stats2, stats)
    for row, other, k in zip(got, want, lengths, strict=True):
        assert_equal(row[:k], other[:k][::-1])


# --- transformations, dtypes, mapped axes ---------------------------------------------------------


def pure(normalizer, place="inside", unroll=None):
    """loss(weights, x): an LSTM of pure functions under lax.scan."""
    n = TABLE[normalizer] if isinstance(normalizer, str) else normalizer

    def norm(site, z):
        return recurrent.normalize_site(z, n).y

    def loss(weights, x):
        start = (jnp.zeros((*x.shape[1:-1], C), x.dtype),) * 2

        def one(states, xt):
            return recurrent.advance(
                lambda c, h, xt: recurrent.lstm_step(norm, Places(place), weights, c, h, xt), states, None, xt
            )

        one = jax.checkpoint(one) if unroll else one
        return jnp.sum(lax.scan(one, start, x)[1] ** 2)

    return loss


def some_weights(seed=0, dtype: Any = np.float32):
    return Weights(*(jnp.asarray(array(*shape, seed=seed + k, std=0.5), dtype)
                     for k, shape in enumerate([(IN, 4 * C), (C, 4 * C), (4 * C,), (4 * C,)])))  # fmt: skip


@pytest.mark.slow
def test_derivatives_of_every_kind_agree():
    loss, weights, x = pure(SMOOTH, "separate"), some_weights(), array(T, N, IN)
    again = pure(SMOOTH, "separate", unroll=True)
    d = jax.tree.map(lambda p: jnp.asarray(array(*p.shape, seed=7)), weights)

    def along(w):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.grad(loss)(w, x), d, strict=True))

    @functools.partial(jax.jit, compiler_options=SMALL)
    def run(weights):
        seeds = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights, some_weights(5))
        return {
            "grad": jax.grad(loss)(weights, x), "remat": jax.grad(again)(weights, x),
            "jvp": jax.jvp(lambda w: loss(w, x), (weights,), (d,))[1], "along": along(weights),
            "rev-rev": jax.grad(along)(weights),
            "fwd-rev": jax.jvp(lambda w: jax.grad(loss)(w, x), (weights,), (d,))[1],
            "vmap": jax.vmap(loss, (0, None))(seeds, x), "apart": jnp.stack([loss(weights, x), loss(some_weights(5), x)]),
        }  # fmt: skip

    out = run(weights)
    assert_close(out["remat"], out["grad"], 1e-6)
    assert_close(out["along"], out["jvp"], 1e-5)
    assert_close(out["rev-rev"], out["fwd-rev"], 1e-4)
    assert_close(out["vmap"], out["apart"], 1e-6)
    assert all(np.any(np.asarray(leaf)) for leaf in out["rev-rev"][:2])


@pytest.mark.slow
def test_float64_is_float64_and_bfloat16_stays_near():
    x = array(T, N, IN)
    with jax.enable_x64(True):
        wide = pure(NARROW)(some_weights(dtype=np.float64), jnp.asarray(x, np.float64))
        assert wide.dtype == np.float64
    single = pure(NARROW)(some_weights(), jnp.asarray(x))
    half = pure(NARROW)(some_weights(dtype=jnp.bfloat16), jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert abs(float(single) - float(wide)) < 1e-5 * abs(float(wide))
    assert 0 < abs(float(half) - float(wide)) < 0.03 * abs(float(wide))


@pytest.mark.slow
def test_a_cell_of_dtype_bfloat16_has_flaxs_dtypes_and_wide_statistics():
    x = jnp.asarray(array(N, T, IN), jnp.bfloat16)
    rnn = linen_rnn("LSTMCell", {"normalizer": SMOOTH, "max_steps": 2, "dtype": jnp.bfloat16}, return_carry=True)
    variables = wrapped(*variables_of(rnn, x))
    apply = functools.partial(rnn.apply, mutable=["batch_stats"])
    ((c, h, _), y), changed = jax.eval_shape(apply, variables, x)
    with lenient():
        flax = nn.RNN(nn.LSTMCell(C, dtype=jnp.bfloat16), return_carry=True)
        (c2, h2), y2 = jax.eval_shape(flax.init_with_output, jax.random.key(0), x)[0]
    assert (c.dtype, h.dtype, y.dtype) == (c2.dtype, h2.dtype, y2.dtype)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(changed))


@pytest.mark.slow
def test_one_example_under_vmap_with_a_mapped_axis_is_the_batch():
    x, lengths = array(N, T, IN), jnp.array([3, 1, 2, 3, 2])
    args = {"place": "separate", "max_steps": 2, "l1": 0.1}
    fields = ("n", "@n")
    whole, one = (linen_rnn("SimpleCell", args | {"normalizer": Normalizer(f, f, eps=0.01)}) for f in fields)
    variables = wrapped(*variables_of(whole, x))

    def run(rnn, x, lengths):
        return rnn.apply(variables, x, seq_lengths=lengths, mutable=["losses", "batch_stats"])

    @functools.partial(jax.jit, compiler_options=SMALL)
    def both(x):
        def loss(run, x):
            y, changed = run(x, lengths)
            return jnp.sum(y**2) + jnp.mean(jax.tree.leaves(changed["losses"])[0]), (y, changed)

        mapped = jax.vmap(functools.partial(run, one), axis_name="n")
        runs = functools.partial(run, whole), mapped
        return [jax.grad(functools.partial(loss, f), has_aux=True)(x) for f in runs]

    (gradient, (want, changed)), (same, (got, after)) = both(x)
    assert_close(same, gradient, 1e-5)
    assert_close(got, want, 1e-6)
    for k in (0, 1):  # the second example is over first
        each = jax.tree.map(lambda leaf, k=k: leaf[k], after)
        assert_close(each, changed, 2e-6)


# --- what the papers say, and what is refused -----------------------------------------------------

# row, sigma, alpha for LSTM, tanh and ReLU, whether scale and bias; Ren et al. 2017, experiment 2.
PUBLISHED = [
    ("bn", 1e-2, (0, 0, 0), True),
    ("bn-s", 1.0, (0, 0, 0), True),
    ("bn-l1", 1e-2, (1e-2, 1e-1, 1e-4), True),
    ("bn*", 1.0, (1e-1, 1e-4, 1e-1), True),
    ("ln", 1e-2, (0, 0, 0), True),
    ("ln-s", 1.0, (0, 0, 0), False),
    ("ln-l1", 1e-2, (1e-2, 1e-2, 1e-2), False),
    ("ln*", 1.0, (1e-3, 1e-2, 1e-2), False),
    ("dn", 1e-2, (0, 0, 0), False),
    ("dn-s", 1.0, (0, 0, 0), False),
    ("dn*", 1.0, (1e-4, 1e-2, 1e-2), False),
]


@pytest.mark.parametrize(("row", "sigma", "alphas", "affine"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_the_rows_of_ren_have_the_published_numbers(row, sigma, alphas, affine):
    for cell, alpha in zip(("lstm", "tanh", "relu"), alphas, strict=True):
        paper, code = (ren2017(row, cell, dialect) for dialect in ("paper", "code"))
        n = paper["normalizer"]
        assert n.eps == pytest.approx(sigma**2)
        assert paper["l1"] == alpha
        assert paper.get("use_scale", True) == paper.get("use_bias", True) == affine
        field = {"b": "n", "l": "c", "d": "c:30" if cell == "lstm" else "c:60"}[row[0]]
        assert str(n.mean) == str(n.var) == field
        assert n.border == "truncate"
        assert code["normalizer"].border == ("zero" if row[0] == "d" else "truncate")
        assert paper["place"] == ("separate" if row == "ln" or row[0] == "b" else "inside")
        # The published code keeps plain ln of the plain RNNs inside, and penalizes it and ln-s as ln-l1.
        quirk = cell != "lstm" and row in ("ln", "ln-s")
        assert code["l1"] == (1e-2 if quirk else alpha)
        assert (code["place"] != paper["place"]) == (quirk and row == "ln")
        uniform = np.asarray(paper["kernel_init"](jax.random.key(0), (200, 200), jnp.float32))
        assert 0.0999 < uniform.max() <= 0.1
        assert -0.1 <= uniform.min() < -0.0999
        assert paper.get("forget_bias", 0) == 0
        assert paper.get("max_steps") == (20 if row[0] == "b" else None)


def test_even_windows_of_ren_reach_14_before_and_15_after():
    z = jnp.zeros((1, 64)).at[0, 32].set(30.0)
    centred = recurrent.normalize_site(z, dataclasses.replace(ren2017("dn*", "lstm")["normalizer"], var=None)).y
    reached = np.flatnonzero(np.asarray(z - centred)[0] > 0.5)
    assert (reached.min(), reached.max()) == (32 - 15, 32 + 14)


def gru(**args):
    return our_nnx.GRUCell(IN, C, recurrent_kernel_init=nn.initializers.zeros, rngs=nnx.Rngs(0), **args)


def stepped(**args):
    return gru(**args)(jnp.ones((2, C)), jnp.ones((2, IN)))


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: gru(normalizer="token", place="within"), ValueError, "place.*'within'"),
    (lambda: Places(bias_at="never"), ValueError, "bias_at.*'never'"),
    (lambda: recurrent.sites("LSTM", C, Places()), ValueError, "cell is one of 'simple', 'lstm', 'gru'; found 'LSTM'"),
    (lambda: gru(normalizer="tokn"), ValueError, "did you mean 'token'"),
    (lambda: gru(normalizer="token", use_bias=("c",)), ValueError, r"use_bias.*r, z, n; found \('c',\)"),
    (lambda: gru(normalizer="batch", max_steps=0), ValueError, "max_steps is at least 1.*found 0"),
    (lambda: stepped(normalizer="batch", max_steps=2), FieldError, "ends with a Clock"),
    (lambda: stepped(normalizer="batch", use_running_average=None), ValueError, "use_running_average"),
    (lambda: stepped(normalizer="group"), FieldError, "length 6 into 32"),
    (lambda: stepped(normalizer="instance"), FieldError, "holds a single element"),
    (lambda: recurrent.start_clock((2,), jnp.ones(3)), FieldError, r"shape \(2,\); found \(3,\)"),
    (lambda: ren2017("dn**", "lstm"), ValueError, r"row.*'dn\*\*'"),
    (lambda: ren2017("dn*", "gru"), ValueError, "cell.*'gru'"),
]


def test_nnx_constructors_name_every_option_that_the_cells_have():
    ours = {field.name for field in dataclasses.fields(our_linen.cells.LSTMCell)}
    assert ours <= our_nnx.CellOptions.__optional_keys__
    flax = set()
    for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"):
        flax |= set(inspect.signature(getattr(nnx, name).__init__).parameters)
    assert our_nnx.CellOptions.__optional_keys__ - ours == flax - {"self", "in_features", "hidden_features", "rngs"}


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_refusals_name_the_thing(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
