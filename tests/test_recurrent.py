"""Recurrent cells against the published steps written out in NumPy float64, against Flax's, and linen against nnx."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import normjax.linen.recurrent as our_linen
import normjax.nnx.recurrent as our_nnx
from normjax import TABLE, FieldError, Normalizer, recurrent
from normjax.nnx import Penalty
from normjax.penalty import total_penalty
from normjax.recurrent import Clock, Places, Weights, ba2016, cooijmans2017, ren2017
from tests import reference
from tests.test_flax import assert_close, assert_equal, lenient

pytestmark = pytest.mark.slow  # together they would take the default tier past its five minutes

N, T, IN, C = 5, 3, 3, 6
SMALL = {"xla_backend_optimization_level": 0}  # small programs: what counts is how soon they run
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
GATES = {"LSTMCell": "ifgo", "GRUCell": "rzn", "SimpleCell": " "}


# --- the cells as their papers write them ---------------------------------------------------------


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def relu(z):
    return np.maximum(z, 0)


def written_out(name, args, params, x, *, carry=None, lengths=None):
    """All steps in float64. Returns outputs [t, n, c], the last states, penalties of the steps [t], and moments seen."""
    args = {"place": "inside", "per_gate": False, "bias_at": "after", "l1": 0.0, "forget_bias": 0.0} | args
    n, place, at = args["normalizer"], args["place"], args["bias_at"]
    n = TABLE[n] if isinstance(n, str) else n
    act = relu if args.get("activation_fn") is jax.nn.relu else np.tanh
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    features = p[{"LSTMCell": "hi", "GRUCell": "hr", "SimpleCell": "h"}[name]]["kernel"].shape[-1]
    states = carry or tuple(np.zeros((x.shape[0], features)) for _ in range(2))
    c, h = (np.asarray(s, np.float64) for s in states)
    outputs, penalties, seen, mask, now = [], [], [], None, {}

    def kernel(key):
        return p[key]["kernel"]

    def bias(key):
        return p[key].get("bias", 0.0) if key in p else 0.0

    def norm(site, z):
        y, v, mean, m = reference.normalize(z, n, "n c", mask)
        alive = np.ones(z.shape) if mask is None else np.broadcast_to(mask, z.shape)
        total.append(args["l1"] * np.abs(v * alive).sum() / max(alive.sum(), 1))
        now[site] = (mean, m)
        q = p.get("norm_" + site, {})
        return np.where(alive, y, 0) * q.get("scale", 1.0) + q.get("bias", 0.0)

    def together(side, parts, groups):
        """Normalizes parts, {gate: z}, group by group of gates."""
        out = {}
        for group in groups:
            z = norm(side + group.replace(" ", "z"), np.concatenate([parts[g] for g in group], -1))
            out |= dict(zip(group, np.split(z, len(group), -1), strict=True))
        return out

    gates = GATES[name]
    groups = (
        list(gates)
        if args["per_gate"] or name == "SimpleCell"
        else {"LSTMCell": ["ifgo"], "GRUCell": ["rz", "n"]}[name]
    )
    for t in range(x.shape[1]):
        total, now = [], {}
        xt, ct, ht = np.asarray(x[:, t], np.float64), c, h
        if lengths is not None:
            mask = (t < np.asarray(lengths))[:, None]
            xt = np.where(mask, xt, 0)
        wx = {g: xt @ kernel(("i" + g).strip()) for g in gates}
        uh = {g: ht @ kernel(("h" + g).strip()) for g in gates}
        bx = {g: bias(("i" + g).strip()) for g in gates}
        bh = {g: bias(("h" + g).strip()) for g in gates}
        if name == "LSTMCell" and "input_bias" in p:
            bx = dict(zip(gates, np.split(p["input_bias"], 4), strict=True))
        if name == "SimpleCell" and "hidden_bias" in p:
            bh = {" ": p["hidden_bias"]}
        if place != "inside":
            first = {g: (bx[g] if at == "before" else bx[g] + bh[g] if at == "both" else 0.0) for g in gates}
            second = {g: (bh[g] if at == "before" else 0.0) for g in gates}
            wx = together("x", {g: wx[g] + first[g] for g in gates}, groups)
            uh = together("h", {g: uh[g] + second[g] for g in gates}, groups)
        if place == "inside" or at != "before":
            wx, uh = {g: wx[g] + bx[g] for g in gates}, {g: uh[g] + bh[g] for g in gates}
        inside = norm if place == "inside" else lambda site, z: z
        if name == "LSTMCell":
            i, f, g, o = (inside(k, wx[k] + uh[k]) for k in gates)
            new = sigmoid(f + args["forget_bias"]) * ct + sigmoid(i) * act(g)
            shown = norm("c", new)
            h, c = sigmoid(o) * act(shown), shown if place == "separate" else new
        elif name == "GRUCell":
            r, z = (sigmoid(inside(k, wx[k] + uh[k])) for k in "rz")
            h = (1 - z) * act(inside("n", wx["n"] + r * uh["n"])) + z * ht
        else:
            h = act(inside("z", wx[" "] + uh[" "]))
        if mask is not None:
            h, c = np.where(mask, h, ht), np.where(mask, c, ct)
        outputs.append(h)
        penalties.append(sum(total))
        seen.append(now)
    return np.stack(outputs), (c, h), np.asarray(penalties), seen


TOKEN, NARROW, SMOOTH = (
    Normalizer("c", "c", eps=1e-5),
    Normalizer("c:4", "c:4", eps=0.25),
    Normalizer("n", "n", eps=0.01),
)
BARE = {"use_scale": False, "use_bias": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm windows inside, code": (
        "LSTMCell",
        {"normalizer": dataclasses.replace(NARROW, border="zero"), "l1": 0.1, **BARE},
    ),
    "lstm ren dn*": ("LSTMCell", ren2017("dn*", "lstm")),
    "lstm ren ln": ("LSTMCell", ren2017("ln", "lstm")),
    "lstm ren bn*": ("LSTMCell", ren2017("bn*", "lstm", max_steps=2)),
    "lstm ba": ("LSTMCell", ba2016() | {"l1": 0.1}),
    "lstm ba, code": ("LSTMCell", ba2016() | {"bias_at": "both"}),
    "lstm cooijmans": ("LSTMCell", cooijmans2017(T)),
    "gru ba": ("GRUCell", ba2016() | {"l1": 0.1}),
    "gru ba, code": ("GRUCell", ba2016() | {"bias_at": "before"}),
    "gru inside": ("GRUCell", {"normalizer": NARROW, "l1": 0.1}),
    "tanh ren dn*": ("SimpleCell", ren2017("dn*", "tanh")),
    "relu ren bn-l1": ("SimpleCell", ren2017("bn-l1", "relu")),
    "tanh separate": ("SimpleCell", {"normalizer": "rms", "place": "separate"}),
    "lstm windows inside": ("LSTMCell", {"normalizer": NARROW, "l1": 0.1, "forget_bias": 1.0}),
    "lstm inside, batch": ("LSTMCell", {"normalizer": SMOOTH}),
    "lstm each gate": ("LSTMCell", {"normalizer": TOKEN, "place": "separate", "per_gate": True, "bias_at": "before"}),
    "lstm ren dn, paper": ("LSTMCell", ren2017("dn", "lstm", "paper")),
    "lstm ren ln*": ("LSTMCell", ren2017("ln*", "lstm")),
    "lstm by groups": ("LSTMCell", {"normalizer": Normalizer("c/2", "c/2"), "place": "separate_raw"}),
    "gru each gate": ("GRUCell", ba2016() | {"per_gate": True, "use_bias": ("xr", "hn")}),
    "gru batch": ("GRUCell", {"normalizer": SMOOTH, "place": "separate", "bias_at": "both", "l1": 0.1}),
    "tanh ren ln": ("SimpleCell", ren2017("ln", "tanh")),
    "relu ren ln, paper": ("SimpleCell", ren2017("ln", "relu", "paper")),
}
WIDE = {"lstm ren dn*": 36, "tanh ren dn*": 70}  # wider than Ren's windows of 30 and 60


def array(*shape, seed=0, std=1.0):
    return np.random.default_rng(seed).normal(0, std, shape).astype(np.float32)


def linen_rnn(name, args, average=False, features=C, **kwargs) -> Any:
    return our_linen.RNN(getattr(our_linen, name)(features, **args, use_running_average=average), **kwargs)


def variables_of(rnn, x):
    """Shapes of a cell's variables, filled with random numbers; statistics as they start."""
    shapes = jax.eval_shape(rnn.init, jax.random.key(0), x)
    paths = jax.tree_util.tree_leaves_with_path(shapes["params"]["cell"])
    leaves = []
    for k, (path, leaf) in enumerate(paths):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        leaves.append(jnp.asarray(centre + array(*leaf.shape, seed=k + 1, std=0.6)))
    params = jax.tree.unflatten(jax.tree.structure(shapes["params"]["cell"]), leaves)
    fill = {"mean": 0.0, "var": 1.0}
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, fill[path[-1].key]), shapes.get("batch_stats", {}).get("cell", {})
    )
    return params, stats


def wrapped(params, stats):
    return {"params": {"cell": params}} | ({"batch_stats": {"cell": stats}} if stats else {})


def check_case(name, args, features=C):
    rnn, x, g = linen_rnn(name, args, features=features), array(N, T, IN), array(N, T, features, seed=9)
    params, stats = variables_of(rnn, x)

    def loss(params, x):
        y, changed = rnn.apply(wrapped(params, stats), x, mutable=["losses", "batch_stats"])
        penalty = total_penalty(changed.get("losses", {}))
        return jnp.sum(y * g) + 10 * penalty, (y, penalty, changed.get("batch_stats", {}).get("cell", {}))

    ours = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=SMALL)
    (_, (y, penalty, after)), gradients = ours(params, x)

    def exact(params, x):
        y, _, penalties, _ = written_out(name, args, params, x)
        return np.sum(y.swapaxes(0, 1) * g.astype(np.float64)) + 10 * penalties.mean()

    want, _, penalties, seen = written_out(name, args, params, x)
    np.testing.assert_allclose(y.swapaxes(0, 1), want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    np.testing.assert_allclose(penalty, penalties.mean(), rtol=1e-5)
    assert (float(penalty) > 0) == (args.get("l1", 0) > 0)
    check_statistics(args, stats, after, seen)
    # The gradient along random directions, against central differences of the float64 code.
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x)))
    for seed in range(3):
        ds = [np.random.default_rng((seed, k)).normal(size=leaf.shape) for k, leaf in enumerate(leaves)]
        there, back = (
            exact(*jax.tree.unflatten(structure, [leaf + step * d for leaf, d in zip(leaves, ds, strict=True)]))
            for step in (1e-5, -1e-5)
        )
        terms = [np.vdot(np.asarray(grad), d) for grad, d in zip(jax.tree.leaves(gradients), ds, strict=True)]
        assert abs(sum(terms) - (there - back) / 2e-5) < 1e-5 * np.abs(terms).sum()


def check_statistics(args, stats, after, seen):
    """Each step's batch moved the statistics of its step, and steps past the last moved the last."""
    steps, momentum = args.get("max_steps"), args.get("momentum", 0.99)
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    for site, stored in stats.items():
        for which, key in enumerate(("mean", "var")):
            want = np.asarray(stored[key], np.float64)
            for t, now in enumerate(seen):
                at = ... if steps is None else min(t, steps - 1)
                want[at] = momentum * want[at] + (1 - momentum) * now[site.removeprefix("norm_")][which][0]
            np.testing.assert_allclose(after[site][key], want, rtol=0, atol=2e-5)


QUICK = ("lstm ren bn*", "gru ba", "tanh ren dn*")
EVERY = [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", EVERY)
def test_outputs_penalties_statistics_and_gradients_are_those_of_the_written_out_steps(case):
    check_case(*CASES[case], features=WIDE.get(case, C))


# --- linen, nnx and Flax --------------------------------------------------------------------------


def nnx_cell(name, args, params, stats, average=False) -> Any:
    """An nnx cell with the parameters of a linen one; its GRU has no bias of U h."""
    cell = getattr(our_nnx, name)(IN, C, rngs=nnx.Rngs(0), use_running_average=average, **args)
    given = {key: dict(value) if hasattr(value, "keys") else value for key, value in params.items()}
    if name == "LSTMCell":
        given["if_"] = given.pop("if")
    elif name == "OptimizedLSTMCell":
        stack = {side: [given.pop(side + g) for g in "ifgo"] for side in "ih"}
        given["dense_i"] = {"kernel": jnp.concatenate([p["kernel"] for p in stack["i"]], -1)}
        given["dense_h"] = {k: jnp.concatenate([p[k] for p in stack["h"]], -1) for k in ("kernel", "bias")}
    elif name == "GRUCell":
        stack = {side: [given.pop(side + g) for g in "rzn"] for side in "ih"}
        given["dense_i"] = {k: jnp.concatenate([p[k] for p in stack["i"]], -1) for k in ("kernel", "bias")}
        given["dense_h"] = {"kernel": jnp.concatenate([p["kernel"] for p in stack["h"]], -1)}
    else:
        given["dense_i"], given["dense_h"] = given.pop("i"), given.pop("h")
    for site, values in stats.items():
        given[site] = given.get(site, {}) | dict(values)
    state = nnx.state(cell, (nnx.Param, nnx.BatchStat))
    nnx.replace_by_pure_dict(state, given)
    nnx.update(cell, state)
    return cell


@pytest.mark.parametrize(
    ("name", "args"),
    [
        SLOW("LSTMCell", ren2017("bn*", "lstm", max_steps=2)),
        SLOW("OptimizedLSTMCell", ba2016() | {"l1": 0.2, "forget_bias": 1.0}),
        SLOW("GRUCell", {"normalizer": SMOOTH, "place": "separate", "max_steps": 2, "l1": 0.1}),
        ("SimpleCell", ren2017("bn-l1", "relu", max_steps=4)),
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
def test_without_max_steps_all_steps_share_one_running_statistic():
    rnn, x = linen_rnn("SimpleCell", {"normalizer": SMOOTH, "momentum": 0.5}), array(N, T, IN)
    params, stats = variables_of(rnn, x)
    _, changed = rnn.apply(wrapped(params, stats), x, mutable=["batch_stats"])
    _, _, _, seen = written_out("SimpleCell", {"normalizer": SMOOTH}, params, x)
    want = 0.0
    for now in seen:
        want = 0.5 * want + 0.5 * now["z"][0][0]
    np.testing.assert_allclose(changed["batch_stats"]["cell"]["norm_z"]["mean"], want, atol=1e-5)


@pytest.mark.slow
def test_a_second_segment_counts_on_where_the_first_stopped():
    rnn, x = linen_rnn("LSTMCell", cooijmans2017(2 * T), return_carry=True), array(N, 2 * T, IN)
    variables = wrapped(*variables_of(rnn, x))
    whole, changed = rnn.apply(variables, x, mutable=["batch_stats"])
    carry, after = None, variables
    for part in (x[:, :T], x[:, T:]):
        (carry, y), new = rnn.apply(after, part, initial_carry=carry, mutable=["batch_stats"])
        after = after | new
    assert_close(y, whole[1][:, T:], 1e-6)
    assert_close(after["batch_stats"], changed["batch_stats"], 1e-6)
    assert_equal(carry[-1].step, jnp.full(N, 2 * T, jnp.int32))


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("LSTMCell", ren2017("bn*", "lstm", max_steps=2)),
        SLOW("GRUCell", ba2016() | {"l1": 0.1}),
    ],
    ids=["batch", "layer"],
)
def test_padding_reaches_no_output_statistic_penalty_or_gradient(name, args):
    lengths = np.array([3, 1, 2, 3, 2])
    padded = np.arange(T)[None, :, None] >= lengths[:, None, None]
    rnn, x = linen_rnn(name, args, return_carry=True), array(N, T, IN)
    params, stats = variables_of(rnn, x)

    @functools.partial(jax.jit, compiler_options=SMALL)
    def run(params, x):
        def loss(params, x):
            (carry, y), changed = rnn.apply(
                wrapped(params, stats), x, seq_lengths=lengths, mutable=["losses", "batch_stats"]
            )
            penalty = total_penalty(changed["losses"])
            return jnp.sum(y) + penalty, (carry, y, penalty, changed.get("batch_stats", {}).get("cell", {}))

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    gradients, (carry, y, penalty, after) = run(params, jnp.where(padded, jnp.nan, x))
    assert_equal(run(params, x), (gradients, (carry, y, penalty, after)))
    assert not np.any(np.asarray(gradients[1])[np.broadcast_to(padded, x.shape)])
    want, states, penalties, seen = written_out(name, args, params, x, lengths=lengths)
    np.testing.assert_allclose(np.swapaxes(y, 0, 1), want, atol=2e-5)
    weight = np.array([np.sum(t < lengths) for t in range(T)])
    np.testing.assert_allclose(penalty, np.sum(penalties * weight) / weight.sum(), rtol=1e-5)
    check_statistics(args, stats, after, seen)
    h = carry[1] if name == "LSTMCell" else carry
    np.testing.assert_allclose(h, states[1], atol=2e-5)
    assert_equal(h, y[np.arange(N), lengths - 1])
    # Row by row, the same as the sequence alone, where examples do not meet.
    if name == "GRUCell":
        alone = rnn.apply(wrapped(params, stats), x[1:2, :1])[1]
        np.testing.assert_allclose(y[1, 0], alone[0, 0], atol=1e-6)


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
@pytest.mark.parametrize("n", [NARROW, SMOOTH], ids=["window", "batch"])
def test_derivatives_of_every_kind_agree(n):
    loss, weights, x = pure(n, "separate"), some_weights(), array(T, N, IN)
    again = pure(n, "separate", unroll=True)
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
    ((c, h, _), y), changed = rnn.apply(variables, x, mutable=["batch_stats"])
    with lenient():
        flax = nn.RNN(nn.LSTMCell(C, dtype=jnp.bfloat16), return_carry=True)
        (c2, h2), y2 = flax.init_with_output(jax.random.key(0), x)[0]
    assert (c.dtype, h.dtype, y.dtype) == (c2.dtype, h2.dtype, y2.dtype)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(changed))


@pytest.mark.slow
def test_one_example_under_vmap_with_a_mapped_axis_is_the_batch():
    x = array(N, T, IN)
    args = {"place": "separate", "max_steps": 2, "l1": 0.1}
    fields = ("n", "@n")
    whole, one = (linen_rnn("GRUCell", args | {"normalizer": Normalizer(f, f, eps=0.01)}) for f in fields)
    variables = wrapped(*variables_of(whole, x))
    want, changed = whole.apply(variables, x, mutable=["losses", "batch_stats"])
    got, after = jax.vmap(lambda x: one.apply(variables, x, mutable=["losses", "batch_stats"]), axis_name="n")(x)
    assert_close(got, want, 1e-6)
    first = jax.tree.map(lambda leaf: leaf[0], after)
    assert_close(first, jax.tree.map(jnp.asarray, changed), 2e-6)


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
    (lambda: recurrent.sites("lstm", C, Places(bias_at="never")), ValueError, "bias_at.*'never'"),
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


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_refusals_name_the_thing(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
