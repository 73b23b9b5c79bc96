"""The published cells written out in NumPy float64, and what their tests have in common."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.linen.recurrent as our_linen
import normjax.nnx.recurrent as our_nnx
from normjax import TABLE, Normalizer
from normjax.penalty import total_penalty
from normjax.recurrent import ba2016, cooijmans2017, ren2017
from tests import reference

N, T, IN, C = 5, 3, 3, 6
SMALL = {"xla_backend_optimization_level": 0}  # small programs: what counts is how soon they run
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
GATES = {"LSTMCell": "ifgo", "GRUCell": "rzn", "SimpleCell": " "}


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
        q = p.get("norm_" + site, {})
        y, v, mean, m = reference.normalize(z, n, "n c", mask, eps=q["sigma"] ** 2 if "sigma" in q else None)
        alive = np.ones(z.shape) if mask is None else np.broadcast_to(mask, z.shape)
        total.append(args["l1"] * np.abs(v * alive).sum() / max(alive.sum(), 1))
        now[site] = (mean, m)
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
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm ren dn*": ("LSTMCell", ren2017("dn*", "lstm")),
    "lstm ren ln": ("LSTMCell", ren2017("ln", "lstm")),
    "lstm ren bn*": ("LSTMCell", ren2017("bn*", "lstm", max_steps=2)),
    "lstm ba": ("LSTMCell", ba2016() | {"l1": 0.1}),
    "lstm ba, code": ("LSTMCell", ba2016() | {"bias_at": "both"}),
    "lstm cooijmans": ("LSTMCell", cooijmans2017(T)),
    "gru ba": ("GRUCell", ba2016() | {"l1": 0.1}),
    "gru ba, code": ("GRUCell", ba2016() | {"bias_at": "before"}),
    "gru inside, learned sigma": ("GRUCell", {"normalizer": NARROW, "l1": 0.1, "learn_sigma": True}),
    "tanh ren dn*": ("SimpleCell", ren2017("dn*", "tanh")),
    "relu ren bn-l1": ("SimpleCell", ren2017("bn-l1", "relu")),
    "tanh separate": ("SimpleCell", {"normalizer": "rms", "place": "separate"}),
    "lstm windows inside": ("LSTMCell", {"normalizer": NARROW, "l1": 0.1, "forget_bias": 1.0}),
    "lstm inside, batch": ("LSTMCell", {"normalizer": SMOOTH}),
    "lstm each gate": ("LSTMCell", {"normalizer": TOKEN, "place": "separate", "per_gate": True, "bias_at": "before"}),
    "gru each gate": ("GRUCell", ba2016() | {"per_gate": True, "use_bias": ("xr", "hn")}),
    "gru batch": ("GRUCell", {"normalizer": SMOOTH, "place": "separate", "bias_at": "both", "l1": 0.1}),
    "tanh ren ln": ("SimpleCell", ren2017("ln", "tanh")),
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
        centre = 1.0 if path[-1].key in ("scale", "sigma") else 0.0
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
