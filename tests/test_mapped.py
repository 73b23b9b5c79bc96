"""Mapped axes: what shards compute together is what one device computes of the whole array."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import normjax
from normjax import Field, FieldError, Normalizer, Span, Stats, l1_penalty, linen, nnx, normalize, top
from tests import reference

slow = pytest.mark.slow
SHARDS, EXAMPLES, CHANNELS = 4, 3, 6
WAYS = ("shard_map", "unchecked shard_map", "pmap", "vmap")

X = np.random.default_rng(0).normal(0.3, 1.5, (SHARDS * EXAMPLES, 5, CHANNELS)).astype(np.float32)
MASK = np.random.default_rng(1).uniform(size=X.shape) > np.repeat([0.2, 1.0, 0.5, 0.8], EXAMPLES)[:, None, None]
DY = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
assert not MASK[EXAMPLES : 2 * EXAMPLES].any()  # an empty shard


def jit(f):
    """Compiled without XLA's optimizer, which would be most of the time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def mesh(**sizes):
    devices = jax.devices("cpu")[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), (jax.sharding.AxisType.Auto,) * len(sizes), devices=devices
    )


def over_shards(way, f, axis_name="data"):
    """f(replicated, x, mask) -> (y, replicated), with the examples of x, mask and y spread over a mapped axis."""
    if "shard_map" in way:
        return jax.shard_map(f, mesh=mesh(**{axis_name: SHARDS}), in_specs=(P(), P(axis_name), P(axis_name)),
                             out_specs=(P(axis_name), P()), check_vma=way == "shard_map")  # fmt: skip

    def stacked(replicated, x, mask):
        x, mask = jax.tree.map(lambda a: a.reshape(SHARDS, -1, *a.shape[1:]), (x, mask))
        if way == "vmap":
            y, rest = jax.vmap(f, (None, 0, 0), axis_name=axis_name)(replicated, x, mask)
        else:
            copies = jax.tree.map(lambda a: jnp.stack([a] * SHARDS), replicated)
            y, rest = jax.pmap(f, axis_name, devices=jax.devices("cpu")[:SHARDS])(copies, x, mask)
        return y.reshape(-1, *y.shape[2:]), rest  # what is replicated still lies there once a shard

    return stacked


def agree(got, want, bound=1e-6):
    """The same trees, to within a fraction of the largest number of each leaf."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        b = np.broadcast_to(b, a.shape)  # one for each shard
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(initial=1e-3), err_msg=str(path))


# Layers: outputs, gradients, running statistics.

PARAMS = {
    "scale": np.linspace(0.5, 2, CHANNELS, dtype=np.float32),
    "bias": np.linspace(-1, 1, CHANNELS, dtype=np.float32),
}
SPREAD = Normalizer("n ... @data", "n ... @data")


def linen_layer(make):
    def f(params, x, mask):
        stats = {"mean": jnp.zeros(CHANNELS), "var": jnp.ones(CHANNELS)}
        variables = {"params": params, "batch_stats": stats}
        y, changed = make().apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
        return y, changed["batch_stats"]

    return f


def nnx_layer(make):
    def f(params, x, mask):
        layer = make(rngs=flax_nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = params["scale"], params["bias"]
        y = layer(x, use_running_average=False, mask=mask)
        return y, {"mean": layer.mean[...], "var": layer.var[...]}

    return f


LAYERS = {
    "linen.BatchNorm": lambda name: linen_layer(lambda: linen.BatchNorm(axis_name=name)),
    "linen.Norm": lambda name: linen_layer(lambda: linen.Norm(SPREAD if name else "batch")),
    "nnx.BatchNorm": lambda name: nnx_layer(functools.partial(nnx.BatchNorm, CHANNELS, axis_name=name)),
    "nnx.Norm": lambda name: nnx_layer(functools.partial(nnx.Norm, CHANNELS, SPREAD if name else "batch")),
}


def value_and_gradients(f, masked):
    def loss(params, x):
        y, running = f(params, x, MASK if masked else None)
        return jnp.vdot(y, DY), (y, running)

    def run(x):
        (_, (y, running)), (by_params, by_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(PARAMS, x)
        return {"y": y, "running": running, "by params": by_params, "by x": by_x}

    return run(np.where(MASK, X, np.nan) if masked else X)


@pytest.mark.parametrize(
    ("layer", "way", "masked"),
    [
        pytest.param(layer, way, masked, marks=() if fast else slow)
        for masked in (True, False)
        for i, layer in enumerate(LAYERS)
        for j, way in enumerate(WAYS)
        for fast in [(layer, way, masked) in (("linen.Norm", "shard_map", True), ("nnx.BatchNorm", "pmap", False))]
    ],
)
def test_layers_over_shards_are_layers_of_the_whole_batch(layer, way, masked):
    got = value_and_gradients(jax.jit(over_shards(way, LAYERS[layer]("data"))), masked)
    want = value_and_gradients(jax.jit(LAYERS[layer](None)), masked)
    agree(got, want)
    assert not masked or (got["by x"][~MASK] == 0).all()


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("way", ["vmap", *(pytest.param(k, marks=slow) for k in WAYS if k != "vmap")])
def test_the_gradient_of_a_jitted_scanned_or_rematerialized_mapping_is_that_of_the_mapping(way, masked):
    """JAX then differentiates code that was traced before, outside of the mapping, where its axis has no name."""
    f = over_shards(way, lambda _, x, mask: (normalize(x, SPREAD, mask=mask).y, {}))
    mask = MASK if masked else None

    def loss(x):
        return jnp.vdot(f({}, x, mask)[0], DY)

    wrapped = {
        "itself": loss,
        "jit": jax.jit(loss),
        "remat": jax.checkpoint(loss),
        "scan": lambda x: lax.scan(lambda total, _: (total + loss(x), None), 0.0, None, length=1)[0],
    }
    got = jit(lambda x: {k: jax.grad(g)(x) for k, g in wrapped.items()})(X)
    want = jit(jax.grad(lambda x: jnp.vdot(normalize(x, "batch", mask=mask).y, DY)))(X)
    agree(got, dict.fromkeys(got, want), 2e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_over_two_mapped_axes_a_layer_takes_the_mean_of_both(layer):
    x = X[:8]
    names: Any = ("data", "sp")  # Flax's annotation knows one name
    field = "n ... @data @sp"
    make = {
        "linen.BatchNorm": linen_layer(lambda: linen.BatchNorm(axis_name=names)),
        "linen.Norm": linen_layer(lambda: linen.Norm(Normalizer(field, field))),
        "nnx.BatchNorm": nnx_layer(functools.partial(nnx.BatchNorm, CHANNELS, axis_name=names)),
        "nnx.Norm": nnx_layer(functools.partial(nnx.Norm, CHANNELS, Normalizer(field, field))),
    }[layer]
    f = jax.shard_map(
        lambda x: make(PARAMS, x, None), mesh=mesh(data=2, sp=2), in_specs=P(names), out_specs=(P(names), P())
    )
    agree(jit(f)(x), LAYERS[layer](None)(PARAMS, x, None))


GROUPS = [[0, 2], [1, 3]]
BARE: dict[str, dict[str, Any]] = {
    "LayerNorm": {"use_scale": False, "use_bias": False},
    "RMSNorm": {"use_scale": False},
    "GroupNorm": {"use_scale": False, "use_bias": False, "num_groups": 2},
    "InstanceNorm": {"use_scale": False, "use_bias": False},
}


def preset(name, **kwargs):
    """f(params, x, mask) -> (y, running statistics) of a layer of linen or nnx."""
    module, layer = name.split(".")
    if layer == "BatchNorm" and module == "linen":
        return linen_layer(lambda: linen.BatchNorm(**kwargs))
    if layer == "BatchNorm":
        return nnx_layer(functools.partial(nnx.BatchNorm, CHANNELS, **kwargs))
    if module == "linen":
        return lambda _, x, mask: (getattr(linen, layer)(**BARE[layer], **kwargs).apply({}, x, mask=mask), {})
    make = functools.partial(getattr(nnx, layer), CHANNELS, **BARE[layer], **kwargs)
    return lambda _, x, mask: (make(rngs=flax_nnx.Rngs(0))(x, mask=mask), {})


PRESETS = [f"{module}.{layer}" for module in ("linen", "nnx") for layer in ("BatchNorm", *BARE)]


@pytest.mark.parametrize("way", ["unchecked shard_map", "pmap"])
@pytest.mark.parametrize("layer", [k if k == "linen.BatchNorm" else pytest.param(k, marks=slow) for k in PRESETS])
def test_index_groups_average_within_each_group_of_shards(layer, way):
    """Beside a whole array: the examples of a group's shards side by side in space, which these layers average."""
    spread = preset(layer, axis_name="data", axis_index_groups=GROUPS)

    def with_own_statistics(params, x, mask):
        y, running = spread(params, x, mask)
        return (y, jax.tree.map(lambda a: a[None], running)), {}

    if way == "pmap":
        f = jax.pmap(with_own_statistics, "data", in_axes=(None, 0, 0), devices=jax.devices("cpu")[:SHARDS])
        (y, running), _ = f(PARAMS, *(a.reshape(SHARDS, EXAMPLES, *a.shape[1:]) for a in (X, MASK)))
        running = jax.tree.map(lambda a: a[:, 0], running)
    else:
        (y, running), _ = jit(over_shards(way, with_own_statistics))(PARAMS, X, MASK)
    y = np.reshape(y, (SHARDS, EXAMPLES, *X.shape[1:]))
    x, mask = (a.reshape(SHARDS, EXAMPLES, *a.shape[1:]) for a in (X, MASK))
    whole = preset(layer)
    axis = 2 if layer.split(".")[1] in ("LayerNorm", "RMSNorm") else 1
    for group in GROUPS:
        together = [np.concatenate([a[i] for i in group], axis) for a in (x, mask)]
        want, stored = whole(PARAMS, *together)
        agree(np.concatenate([y[i] for i in group], axis), want)
        for i in group:
            agree(jax.tree.map(lambda a, i=i: a[i], running), stored)


# Sharded axes: windows, channels, blocks.


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(o, marks=slow)
            for o in ({"border": "zero"}, {"window": "gaussian"}, {"lean": "before"},
                      {"window": "gaussian", "border": "zero", "lean": "before"})
        ),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=slow)])
def test_windows_reach_over_the_shards_they_need(options, masked):
    x = np.random.default_rng(3).normal(size=(2, 12, 3)).astype(np.float32)
    mask = np.random.default_rng(4).uniform(size=x.shape) > 0.4
    mask[:, 3:6] = False  # an empty shard
    widths = (2, 3, 4, 8, 11, 30)  # shards are 3 long

    def sharded(x, m):
        return jnp.stack([normjax.expect(x, f"h:{w}@rows", "n h c", mask=m, **options) for w in widths], -1)

    spec = P(None, "rows")
    f = jax.shard_map(sharded, mesh=mesh(rows=4), in_specs=(spec, spec), out_specs=spec)
    dy = np.random.default_rng(5).normal(size=(*x.shape, len(widths))).astype(np.float32)
    m = mask if masked else None
    hidden = np.where(mask, x, np.nan) if masked else x

    @jit
    def forward_and_back(x):
        y, back = jax.vjp(lambda x: f(x, m), x)
        return y, back(dy)[0]

    y, gradient = forward_and_back(hidden)
    for i, width in enumerate(widths):
        want = reference.expect(np.where(mask, x, 0) if masked else x, f"h:{width}", "n h c", mask=m, **options)
        agree(y[..., i], want)
    # Averages are linear: <dy, E x'> = <E* dy, x'> for any x', here by the averaging matrices.
    for seed in range(3):
        other = np.random.default_rng(10 + seed).normal(size=x.shape)
        forward = [reference.expect(other, f"h:{w}", "n h c", mask=m, **options) for w in widths]
        np.testing.assert_allclose(np.vdot(gradient, other), np.vdot(dy, np.stack(forward, -1)), rtol=1e-5, atol=1e-4)


CHANNEL_FIELDS = {
    "token": ("c@model", "c@model"),
    "rms": (None, "c@model"),
    "layer": ("... c@model", "... c@model"),
    "two blocks a shard": ("... c/8@model", "... c/8@model"),
    "window": (None, "c:5@model"),
}


@pytest.mark.parametrize("name", [k if k == "token" else pytest.param(k, marks=slow) for k in CHANNEL_FIELDS])
def test_a_layer_with_sharded_channels_has_its_share_of_the_parameters(name):
    n = Normalizer(*CHANNEL_FIELDS[name])
    whole = Normalizer(*(f and f.replace("@model", "") for f in CHANNEL_FIELDS[name]))
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    params = {"scale": np.linspace(0.5, 2, 16, dtype=np.float32), "bias": np.linspace(-1, 1, 16, dtype=np.float32)}

    def gradients(f):
        def loss(params, x):
            y = f(params, x)
            return jnp.vdot(jnp.sin(y), dy), y

        return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    def one(params, x):
        return linen.Norm(n).apply({"params": params}, x)

    spec = P(None, None, "model")
    got = gradients(jax.shard_map(one, mesh=mesh(model=4), in_specs=(P("model"), spec), out_specs=spec))
    want = gradients(lambda params, x: linen.Norm(whole).apply({"params": params}, x))
    agree(got, want, 2e-6)


@pytest.mark.parametrize(("blocks", "channels"), [(6, 24), (2, 16), (8, 12)])
def test_blocks_that_would_lie_on_two_shards_are_refused(blocks, channels):
    n = Normalizer(f"c/{blocks}@model", f"c/{blocks}@model")
    text = f"blocks 'c/{blocks}@model' do not align with 4 shards of length {channels // 4}"
    with pytest.raises(FieldError, match=re.escape(text)):
        jax.vmap(lambda x: normalize(x, n, "n c").y, 1, axis_name="model")(jnp.ones((3, 4, channels // 4)))


# Moments that are not means of squares, the penalty, and given statistics.

ORDERS = {
    "order 1": {"order": 1, "power": 1.0},
    "maximum": {"order": math.inf, "power": 1.0},
    "mean of the 7 largest": {"order": top(7), "power": 1.0},
}


@pytest.mark.parametrize(
    "way", ["shard_map", pytest.param("unchecked shard_map", marks=slow), pytest.param("vmap", marks=slow)]
)
@pytest.mark.parametrize("order", ["maximum", *(pytest.param(k, marks=slow) for k in ORDERS if k != "maximum")])
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=slow)])
def test_other_moments_over_shards_are_those_of_the_whole(order, way, masked):
    spread, whole = (Normalizer(f, f, **ORDERS[order]) for f in ("n ... @data", "n ..."))

    def f(n):
        def one(replicated, x, mask):
            out = normalize(x, n, mask=mask)
            return out.y, tuple(out.stats)

        return one

    def everything(f):
        def loss(x):
            out = f({}, x, MASK if masked else None)
            return jnp.vdot(out[0], DY), out

        return jit(jax.value_and_grad(loss, has_aux=True))(np.where(MASK, X, np.nan) if masked else X)

    (_, (y, stats)), gradient = everything(over_shards(way, f(spread)))
    (_, want), want_gradient = everything(f(whole))
    if way == "vmap":
        stats = jax.tree.map(lambda a: a if jnp.ndim(a) == X.ndim else a[0], stats)
    agree({"y": y, "gradient": gradient}, {"y": want[0], "gradient": want_gradient}, 2e-6)
    agree(stats, want[1], 2e-6)


def test_a_maximum_that_lies_on_two_shards_shares_its_gradient():
    x = jnp.array([[1.0, -3.0], [3.0, 0.5]])
    n = Normalizer(None, "c @data", order=math.inf, power=1.0, eps=0.0)
    moment = jax.vmap(lambda x: normalize(x, n, "c").stats.var[0], axis_name="data")
    gradient = jit(jax.grad(lambda x: moment(x)[0]))(x)
    assert gradient.tolist() == [[0.0, -0.5], [0.5, 0.0]]


@pytest.mark.parametrize("way", ["shard_map", *(pytest.param(k, marks=slow) for k in WAYS[1:])])
def test_the_penalty_over_shards_counts_their_valid_elements_alike(way):
    def f(replicated, x, mask):
        y, sown = linen.Norm(SPREAD, l1=0.1, use_scale=False, use_bias=False).apply(
            {"batch_stats": {"mean": jnp.zeros(CHANNELS), "var": jnp.ones(CHANNELS)}},
            x, use_running_average=False, mask=mask, mutable=["losses", "batch_stats"],
        )  # fmt: skip
        layer = nnx.Norm(CHANNELS, SPREAD, l1=0.1, use_scale=False, use_bias=False, rngs=flax_nnx.Rngs(0))
        _, captured = flax_nnx.capture(layer, nnx.Penalty)(x, use_running_average=False, mask=mask)
        alone = l1_penalty(x, 0.1, mask=mask, axis_name="data")
        return y, {"linen": sown["losses"]["l1"], "nnx": captured["l1"][...], "itself": alone}

    _, got = jit(over_shards(way, f))({}, np.where(MASK, X, np.nan), MASK)
    centred = reference.normalize(X, normjax.TABLE["batch"], mask=MASK)[1]
    of_layer = 0.1 * np.abs(centred[MASK]).mean()
    agree(got, {"linen": of_layer, "nnx": of_layer, "itself": 0.1 * np.abs(X[MASK]).mean()})


@pytest.mark.parametrize("way", ["shard_map", pytest.param("unchecked shard_map", marks=slow)])
def test_the_gradient_of_the_penalty_over_shards_is_that_of_the_whole(way):
    def penalty(f):
        return jit(jax.grad(lambda x: jnp.mean(f({}, x, MASK)[1])))(np.where(MASK, X, np.nan))

    def one(n, names):
        return lambda _, x, mask: (x, l1_penalty(normalize(x, n, mask=mask).centered, mask=mask, axis_name=names))

    agree(penalty(over_shards(way, one(SPREAD, "data"))), penalty(one("batch", ())))


def test_given_statistics_need_no_mapped_axis_and_a_given_mean_needs_one_for_the_variance():
    whole = normalize(X, "batch").stats
    given = Stats(whole.mean, whole.var)
    want = normalize(X, "batch").y
    agree(normalize(X[:2], SPREAD, stats=given).y, want[:2], 2e-6)
    with pytest.raises(FieldError, match="'@data' is not bound here"):
        normalize(X, SPREAD, stats=Stats(whole.mean))
    mean = whole.mean + 1  # another than that of x: the variance is taken around it
    f = over_shards("shard_map", lambda mean, x, _: (lambda out: (out.y, out.stats.var))(
        normalize(x, SPREAD, stats=Stats(mean))))  # fmt: skip
    y, var = jit(f)(mean, X, None)
    moment = ((X - np.asarray(mean)) ** 2).mean((0, 1), keepdims=True)
    agree((y, var), ((X - np.asarray(mean)) / np.sqrt(moment + 1e-5), moment))


@pytest.mark.parametrize("way", ["linen.BatchNorm", "linen.Norm", "nnx.BatchNorm", "nnx.Norm"])
def test_stored_statistics_need_no_mapped_axis_and_neither_does_init(way):
    layer: Any = {
        "linen.BatchNorm": lambda: linen.BatchNorm(axis_name="data"),
        "linen.Norm": lambda: linen.Norm(SPREAD),
        "nnx.BatchNorm": lambda: nnx.BatchNorm(CHANNELS, axis_name="data", rngs=flax_nnx.Rngs(0)),
        "nnx.Norm": lambda: nnx.Norm(CHANNELS, SPREAD, rngs=flax_nnx.Rngs(0)),
    }[way]()
    if way.startswith("linen"):
        layer = layer.bind(layer.init(jax.random.key(0), X, use_running_average=False), mutable=["batch_stats"])
    np.testing.assert_allclose(layer(X, use_running_average=True), X / np.sqrt(1 + 1e-5), rtol=1e-6)
    with pytest.raises(FieldError, match="mapped axis '@data' is not bound here"):
        layer(X, use_running_average=False)


UNBOUND = {
    "window": lambda: normjax.expect(X, "h:3@rows", "n h c"),
    "whole": lambda: normjax.expect(X, "h@rows", "n h c"),
    "blocks": lambda: normjax.expect(X, "c/2@rows", "n h c"),
    "maximum": lambda: normalize(X, Normalizer(None, "c @rows", order=math.inf)),
    "top": lambda: normalize(X, Normalizer(None, "c @rows", order=top(2))),
    "penalty": lambda: l1_penalty(X, axis_name="rows"),
    "linen.LayerNorm": lambda: linen.LayerNorm(axis_name="rows", use_scale=False, use_bias=False).apply({}, X),
}


@pytest.mark.parametrize("name", UNBOUND)
def test_an_unbound_name_raises_the_error_that_says_what_to_wrap(name):
    text = re.escape(
        "mapped axis '@rows' is not bound here; call this inside jax.vmap(..., axis_name=\"rows\"), or inside "
        'jax.shard_map or jax.pmap over a mesh axis "rows"'
    )
    with pytest.raises(FieldError, match=text):
        UNBOUND[name]()


# What is replicated, and whose gradient is whose.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("field", "numbers", "varies"),
    [
        ("n ... @data", {}, False),
        ("n ... @data", {"order": 1}, False),
        ("n ... @data", {"order": math.inf}, False),
        ("n ... @data", {"order": top(2)}, False),
        ("n@data ...", {}, False),
        ("n@data c:3", {}, False),
        ("n:3@data ...", {}, True),
        ("n/4@data ...", {}, True),
        ("...", {}, True),
    ],
    ids=str,
)
def test_statistics_vary_over_a_mapped_axis_exactly_if_their_field_does_not_cover_it(field, numbers, varies, masked):
    n = Normalizer(field, field, **numbers)

    def statistics(x, mask):
        out = normalize(x, n, mask=mask)
        return out.y, [out.stats.mean, out.stats.var]

    def spread(spec):
        f = jax.shard_map(statistics, mesh=mesh(data=SHARDS), in_specs=P("data"), out_specs=(P("data"), spec))
        return jax.eval_shape(f, X, MASK if masked else None)

    if not varies:
        spread(P())
        return
    for spec in ([P(), P("data")], [P("data"), P()]):
        with pytest.raises(ValueError, match="out_specs"):
            spread(spec)
    spread(P("data"))


@pytest.mark.parametrize("layer", ["linen.Norm", *(pytest.param(k, marks=slow) for k in LAYERS if k != "linen.Norm")])
@pytest.mark.parametrize("checked", [True, False])
def test_the_mean_belongs_on_the_loss_if_shard_map_checks_and_on_the_gradient_if_not_and_both_is_right_in_both(
    layer, checked
):
    spread, whole = LAYERS[layer]("data"), LAYERS[layer](None)

    def loss(f, params, x, dy):
        return jnp.mean(jnp.sin(f(params, x, None)[0]) * dy)

    def local(params, x, dy):
        def averaged(params):
            return lax.pmean(loss(spread, params, x, dy), "data")

        alone, together = jax.grad(lambda p: loss(spread, p, x, dy))(params), jax.grad(averaged)(params)
        found = {
            "on the gradient": lax.pmean(alone, "data"),
            "on the loss": together,
            "on both": lax.pmean(together, "data"),
        }
        return jax.tree.map(lambda a: a[None], found)

    f = jax.shard_map(
        local, mesh=mesh(data=SHARDS), in_specs=(P(), P("data"), P("data")), out_specs=P("data"), check_vma=checked
    )
    got = jit(f)(PARAMS, X, DY)
    want = jax.grad(lambda p: loss(whole, p, X, DY))(PARAMS)
    agree(got["on both"], want, 1e-5)
    if checked:
        agree(got["on the loss"], want, 1e-5)
        agree(got["on the gradient"], jax.tree.map(lambda a: SHARDS * a, want), 1e-5)
    else:
        agree(got["on the gradient"], want, 1e-5)
        with pytest.raises(AssertionError):
            agree(got["on the loss"], want, 0.1)


def test_index_groups_have_no_string_and_no_window():
    span = Span("h", window=3, mapped="rows", groups=((0, 1), (2, 3)))
    with pytest.raises(FieldError, match="cannot use index groups"):
        jax.vmap(lambda x: normjax.expect(x, Field((span,)), "h"), axis_name="rows")(jnp.ones((4, 3)))
