"""Layers by `Norm` and layers of families: linen against nnx, published numbers, what is stored, refusals."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fx

import normjax.linen as linen
import normjax.nnx as nnx
from normjax import TABLE, FieldError, Normalizer, batch, batch_extremes, normalize, response
from normjax.batch import virtual_batch
from tests.refusals import refuses
from tests.test_rows import BIAS, FIRST, IMAGE, OTHER, POINT, PUBLISHED, SCALE, SMALL, X2, X, f32, fast, near

STILL = {  # layers that are `Norm` with this row
    "L1BatchNorm": ({"normalized": False, "field": "@data n ..."}, batch.l1_batch("@data n ...", normalized=False)),
    "LpBatchNorm": ({"p": 3, "calibrated": True}, batch.lp_batch(3, calibrated=True)),
    "TopKBatchNorm": ({"k": 3, "size": 16, "epsilon": 0.5}, batch_extremes.top_batch(3, 16, eps=0.5)),
    "LinfBatchNorm": ({"size": 16, "calibrated": True}, batch_extremes.top_batch(1, 16, calibrated=True)),
    "GhostTopKBatchNorm": ({"k": 3, "size": 16, "calibrated": True}, batch_extremes.top_batch(3, 16, calibrated=True)),
    "RangeBatchNorm": ({"size": 16, "field": "@data n ..."}, batch_extremes.range_row(16, "@data n ...")),
    "VarianceNorm": ({"epsilon": 0.5}, dataclasses.replace(TABLE["variance"], eps=0.5)),
    "ExtendedBatchNorm": ({"epsilon": 0.5}, batch.extended_batch(eps=0.5)),
    "PositionNorm": ({"epsilon": 0.5}, dataclasses.replace(TABLE["token"], eps=0.5)),
    "LocalContextNorm": ({"window": 3, "groups": 2}, response.local_context(3, 2)),
    "GhostBatchNorm": ({"epsilon": 0.5}, batch.ghost_batch(1, eps=0.5)),
}


@pytest.mark.parametrize("name", STILL)
def test_a_layer_has_the_row_of_its_numbers(name):
    kwargs, row = STILL[name]
    assert getattr(linen, name)(**kwargs).normalizer == row
    assert getattr(nnx, name)(4, **kwargs, rngs=fx.Rngs(0)).normalizer == row


LAYERS: dict[str, dict[str, Any]] = {  # one by `Norm` as it is, and those with a call of their own
    "L1BatchNorm": {"epsilon": 0.1},
    "ExtendedBatchNorm": {},
    "GhostBatchNorm": {"examples": 2},
    "RangeBatchNorm": {"size": 8, "parts": 2},
    "GhostTopKBatchNorm": {"k": 3, "size": 16},
    "VirtualBatchNorm": {},
    "FilterResponseNorm": {"learn_eps": True},
    "ScaleNorm": {},
    "PartialRMSNorm": {"fraction": 0.5, "use_bias": True},
    "QKNorm": {"kind": "layer"},
    "AddNorm": {"activation": "gelu"},
}
QUICK = ("ScaleNorm",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS])
def test_linen_and_nnx_give_the_same_outputs_gradients_and_statistics(name):
    kwargs, kind = LAYERS[name], getattr(linen, name)
    args = (f32(POINT), f32(OTHER)) if name in ("VirtualBatchNorm", "QKNorm", "AddNorm") else (f32(POINT),)
    training = {"use_running_average": False} if "use_running_average" in kind.__dataclass_fields__ else {}
    module = kind(**kwargs, **training)
    variables = module.init(jax.random.key(0), *args)
    rng = np.random.default_rng(8)
    params = jax.tree.map(lambda a: a + f32(rng.uniform(0.1, 1, a.shape)), variables["params"])
    stored = jax.tree.map(lambda a: a + 0.5, variables.get("batch_stats", {}))
    other = getattr(nnx, name)(4, **kwargs, rngs=fx.Rngs(0))
    graph, theirs, rest = fx.split(other, fx.Param, ...)
    assert {key[0] for key, _ in fx.to_flat_state(theirs)} == set(params)

    def by_linen(params, args):
        y, changed = module.apply({"params": params, "batch_stats": stored}, *args, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y)), (y, dict(changed.get("batch_stats", {})))

    def by_nnx(params, args):
        layer = fx.merge(graph, *jax.tree.map(jnp.array, (theirs, rest)))  # variables of this trace
        for key, value in (params | stored).items():
            getattr(layer, key)[...] = value
        y = layer(*args)
        kept = {key: getattr(layer, key)[...] for key in stored}
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y)), (y, kept)

    got, want = (fast(jax.value_and_grad(f, (0, 1), has_aux=True))(params, args) for f in (by_nnx, by_linen))
    jax.tree.map(lambda a, b: near(a, b, 1e-6), got, want)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(want[1]))
    for key, before in stored.items():
        assert (want[0][1][1][key] != before).all(), key


def test_a_layer_that_starts_as_published_ends_as_published():
    fields = {"momentum": 0.1, "epsilon": 0.0, "layout": FIRST, "mean_init": 0.0, "var_init": 0.0}
    module: Any = linen.L1BatchNorm(**fields)
    params = {"scale": f32(SCALE), "bias": f32(BIAS)}
    variables: Any = {"params": params}
    for x in (X, X2):
        _, changed = module.apply(variables, f32(x), False, mutable=["batch_stats"])
        variables = variables | changed
    near(module.apply(variables, f32(X), True).ravel(), PUBLISHED["l1_mean_bn"][2])
    of_nnx: dict[str, Any] = {
        "l1_mean_bn": nnx.L1BatchNorm(2, **fields, rngs=fx.Rngs(0)),
        "variance": nnx.VarianceNorm(2, momentum=0.9, layout=FIRST, rngs=fx.Rngs(0)),
        "batch": nnx.Norm(2, "batch", momentum=0.9, layout=FIRST, mean_init=1.0, rngs=fx.Rngs(0)),
    }
    for name, layer in of_nnx.items():
        layer.scale[...], layer.bias[...] = params["scale"], params["bias"]
        for x in (X, X2):
            layer(f32(x))
        near(layer(f32(X), use_running_average=True).ravel(), PUBLISHED[name][2])


def test_range_and_moving_top_k_layers_train_as_published():
    params = {"scale": f32(SCALE), "bias": f32(BIAS)}
    cases: dict[str, Any] = {
        "range": linen.RangeBatchNorm(size=3, parts=2, layout=FIRST),
        "ghost_top2": linen.GhostTopKBatchNorm(k=2, size=6, layout=FIRST),
    }
    for name, module in cases.items():

        def run(x, module=module):
            v: Any = {"params": params}
            y, changed = module.apply(v, x, False, mutable=["batch_stats"])
            return y, changed, module.apply(v, x, False, update_running_average=False, mutable=["batch_stats"])[1]

        y, changed, left = fast(run)(f32(X))
        near(y.ravel(), PUBLISHED[name][0])
        for key, first in (("mean", 0), ("var", 1), *([("top", 0)] if "top" in left["batch_stats"] else [])):
            assert (left["batch_stats"][key] == first).all(), key
            assert (changed["batch_stats"][key] != first).all(), key


def test_range_layers_store_the_mean_range_and_infer_with_it_on_any_batch():
    x, first = f32(IMAGE), np.arange(4).reshape(4, 1, 1, 1) < 2
    module = linen.RangeBatchNorm(size=24, parts=2, momentum=0.0)
    variables: Any = {"params": {"scale": jnp.ones(6), "bias": jnp.zeros(6)}}
    infer = fast(lambda v, x: module.apply(v, x, True))
    run = fast(lambda v, x, mask: module.apply(v, x, False, mask=mask, mutable=["batch_stats"])[1])
    halves = IMAGE.reshape(2, -1, 6)
    spread = halves.max(1) - halves.min(1)
    for mask, want in ((np.ones_like(first), spread.mean(0)), (first, spread[0])):
        changed = run(variables, x, mask)
        near(changed["batch_stats"]["var"], want, 1e-6)
        mean = IMAGE[mask[:, 0, 0, 0]].mean((0, 1, 2))
        near(
            infer(variables | changed, x[:3]),
            (IMAGE[:3] - mean) / (1e-5 + batch_extremes.range_row(24).gain * want),
            1e-5,
        )
    nothing = run(variables, x, np.zeros_like(first))["batch_stats"]
    assert (nothing["mean"] == 0).all()
    assert (nothing["var"] == 1).all()


def test_moving_top_k_layers_keep_the_average_of_the_moments_and_leave_it_when_told():
    x = f32(POINT)
    row = batch_extremes.top_batch(3, 16)
    layer: Any = nnx.GhostTopKBatchNorm(4, 3, size=16, beta=0.5, momentum=0.0, rngs=fx.Rngs(0))
    m = [np.asarray(normalize(a, row).stats.var) for a in (x, 2 * x)]
    layer(x, update_running_average=False)
    assert (layer.top[...] == 0).all()
    layer(x)
    y = layer(2 * x)
    top = 0.25 * m[0] + 0.5 * m[1]
    near(layer.top[...], top.ravel(), 1e-6)
    near(layer.var[...], top.ravel(), 1e-6)
    near(y, normalize(2 * x, row).centered / (1e-5 + row.gain * top), 1e-6)
    layer(x, mask=jnp.zeros((4, 1, 1, 1), bool))
    near(layer.top[...], top.ravel(), 1e-6)
    near(layer(x, use_running_average=True), (x - 2 * x.mean((0, 1, 2), keepdims=True)) / (1e-5 + row.gain * top), 1e-5)


def test_layers_for_batches_start_on_a_single_example():
    one = jnp.ones((1, 3))
    for module in (
        linen.TopKBatchNorm(k=10, size=64),
        linen.GhostTopKBatchNorm(k=10, size=64),
        linen.RangeBatchNorm(size=8, field="@data n ..."),
        linen.GhostBatchNorm(examples=2),
    ):
        for average in (False, True):
            made = jax.eval_shape(lambda key, m=module, a=average: m.init(key, one, a), jax.random.key(0))
            shapes = jax.tree.map(jnp.shape, made)
            assert shapes["batch_stats"] == {k: (3,) for k in shapes["batch_stats"]}
            assert ("top" in shapes["batch_stats"]) == isinstance(module, linen.GhostTopKBatchNorm)


@pytest.mark.slow
def test_ghost_layers_normalize_parts_and_infer_on_any_batch():
    x = f32(IMAGE)
    module = linen.GhostBatchNorm(examples=2, momentum=0.0)
    variables = fast(lambda x: module.init(jax.random.key(0), x, False))(x[:3])  # a batch that does not divide
    y, changed = fast(lambda v, x: module.apply(v, x, False, mutable=["batch_stats"]))(variables, x)
    halves = IMAGE.reshape(2, -1, 6)
    v = halves - halves.mean(1, keepdims=True)
    near(y, (v / np.sqrt(halves.var(1, keepdims=True) + 1e-5)).reshape(IMAGE.shape), 1e-6)
    near(changed["batch_stats"]["var"], halves.var(1).mean(0), 1e-6)
    want = (IMAGE - IMAGE.mean((0, 1, 2))) / np.sqrt(halves.var(1).mean(0) + 1e-5)
    near(fast(lambda v, x: module.apply(v, x, True))(variables | changed, x[:3]), want[:3], 1e-5)
    layer = nnx.GhostBatchNorm(6, 2, momentum=0.0, rngs=fx.Rngs(0))
    near(layer(x), y, 1e-6)
    near(layer(x[:3], use_running_average=True), want[:3], 1e-5)


@pytest.mark.slow
def test_qk_layers_of_length_one_start_where_the_paper_says():
    args = f32(IMAGE), f32(IMAGE)
    layer = nnx.QKNorm(6, "l2", length=64, rngs=fx.Rngs(0))
    (q, k), variables = linen.QKNorm("l2", length=64).init_with_output(jax.random.key(0), *args)
    near(jnp.linalg.norm(q, axis=-1), np.full(q.shape[:-1], math.log2(64 * 63)), 1e-5)
    near(jnp.linalg.norm(k, axis=-1), np.ones(q.shape[:-1]), 1e-5)
    near(layer(*args)[0], q, 1e-6)
    assert list(variables["params"]) == ["query_scale"]


@pytest.mark.slow
def test_scale_norm_starts_at_the_root_of_the_channels_and_filters_without_their_unit_keep_signs():
    y, variables = linen.ScaleNorm().init_with_output(jax.random.key(0), f32(IMAGE))
    near(variables["params"]["scale"], math.sqrt(6), 1e-6)
    near(y, normalize(f32(IMAGE), Normalizer(None, "c", eps=0.0)).y, 1e-5)
    plain = linen.FilterResponseNorm(use_tau=False, use_bias=False, use_scale=False).apply({}, f32(IMAGE))
    near(plain, normalize(f32(IMAGE), Normalizer(None, "...", eps=1e-6)).y, 1e-6)


@pytest.mark.slow
def test_layers_over_a_mapped_axis_start_where_it_is_not_bound_yet():
    field, halves = "@data n ...", [f32(a).reshape(2, 2, *SMALL[1:]) for a in (POINT, OTHER)]
    virtual = linen.VirtualBatchNorm(field=field)
    variables = virtual.init(jax.random.key(0), f32(POINT), f32(OTHER))
    f = fast(jax.vmap(lambda x, r: virtual.apply(variables, x, r)[0], axis_name="data"))
    near(f(*halves).reshape(SMALL), virtual_batch(f32(POINT), f32(OTHER))[0].y, 1e-6)
    makes: list[tuple[Any, dict[str, int], dict[str, int]]] = [
        (linen.RangeBatchNorm, {"parts": 1}, {"parts": 2}),
        (linen.GhostTopKBatchNorm, {"k": 3}, {"k": 3}),
    ]
    for make, here, there in makes:
        mapped = make(size=16, use_running_average=False, field=field, **here)
        whole = make(size=16, use_running_average=False, **there)
        variables = mapped.init(jax.random.key(0), f32(POINT))
        run = jax.vmap(lambda x, m=mapped, v=variables: m.apply(v, x, mutable=["batch_stats"]), axis_name="data")
        got, want = fast(run)(halves[0]), whole.apply(variables, f32(POINT), mutable=["batch_stats"])
        near(got[0].reshape(SMALL), want[0], 1e-6)
        jax.tree.map(lambda a, b: near(a[0], b, 1e-6), got[1], want[1])


def test_parameters_and_outputs_have_the_dtypes_of_flax():
    x = jnp.asarray(IMAGE, jnp.float16)
    layers = {
        "FilterResponseNorm": (x,),
        "ScaleNorm": (x,),
        "PartialRMSNorm": (x,),
        "VirtualBatchNorm": (x, x),
        "QKNorm": (x, x),
    }

    def dtypes(tree):
        return {str(a.dtype) for a in jax.tree.leaves(tree)}

    for name, args in layers.items():
        of_linen, of_nnx = getattr(linen, name), getattr(nnx, name)
        for dtype, want in ((None, "float16"), (jnp.float32, "float32"), (jnp.bfloat16, "bfloat16")):
            module = of_linen(dtype=dtype, param_dtype=jnp.bfloat16)
            y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *args)
            assert (dtypes(y), dtypes(variables)) == ({want}, {"bfloat16"}), name
            layer = of_nnx(6, dtype=dtype, param_dtype=jnp.bfloat16, rngs=fx.Rngs(0))
            assert dtypes(jax.eval_shape(layer, *args)) == {want}, name
    # In float32 before the layer, not after its rounding.
    y = nnx.ScaleNorm(6, dtype=jnp.float32, rngs=fx.Rngs(0))(x)
    near(y, nnx.ScaleNorm(6, rngs=fx.Rngs(0))(x.astype(jnp.float32)), 1e-7)


ERRORS = {
    "range batch norm needs size, the number of elements of a part in training, at least 2; found 1": (
        lambda: linen.RangeBatchNorm(size=1, calibrated=True),
        ValueError,
    ),
    "top-k batch norm needs size, the number of elements behind each statistic in training": (
        lambda: linen.TopKBatchNorm(),
        ValueError,
    ),
    'kind "l2" starts from the length of sequences, at least 2; found length=None': (
        lambda: nnx.QKNorm(2, "l2", rngs=fx.Rngs(0)),
        ValueError,
    ),
    "a layer made for 5 features cannot take an input of shape (2, 6)": (
        lambda: nnx.ScaleNorm(5, rngs=fx.Rngs(0))(jnp.ones((2, 6))),
        FieldError,
    ),
    'the stored var has shape (5,), but field "n ..." on an array of shape (8, 6), layout "n ... c", needs (6,)': (
        lambda: linen.GhostTopKBatchNorm(2, 8, use_scale=False, use_bias=False).apply(
            {"batch_stats": dict.fromkeys(("mean", "var", "top"), jnp.ones(5))},
            jnp.ones((8, 6)),
            False,
            mutable=["batch_stats"],
        ),
        FieldError,
    ),
    "a layer made for 5 features cannot take an input of shape (8, 6); features comes first, then k: "
    "GhostTopKBatchNorm(6, k=...)": (
        lambda: nnx.GhostTopKBatchNorm(5, 2, size=8, rngs=fx.Rngs(0))(jnp.ones((8, 6))),
        FieldError,
    ),
    "cannot split the batch into parts of 3 examples; found 4 examples": (
        lambda: nnx.GhostBatchNorm(2, 3, rngs=fx.Rngs(0))(jnp.ones((4, 2))),
        FieldError,
    ),
    "cannot split axis 'n' of length 4 into 16 equal groups": (
        lambda: nnx.RangeBatchNorm(2, size=8, rngs=fx.Rngs(0))(jnp.ones((4, 2))),
        FieldError,
    ),
    "No `use_running_average` argument was provided to RangeBatchNorm. Pass it to the constructor or to the call, or "
    "set it on the whole model: nnx.view(model, use_running_average=True) or False.": (
        lambda: nnx.RangeBatchNorm(2, size=8, use_running_average=None, rngs=fx.Rngs(0))(jnp.ones((4, 2))),
        ValueError,
    ),
    "unbiased=True needs a variance: order 2 and A = B, without windows; found Normalizer('n ...', 'n ...', power=1.0, "
    "order=1)": (
        lambda: nnx.L1BatchNorm(2, normalized=False, unbiased=True, rngs=fx.Rngs(0))(jnp.ones((4, 2))),
        ValueError,
    ),
}


@pytest.mark.parametrize("message", ERRORS, ids=[message[:40] for message in ERRORS])
def test_errors_name_the_thing_what_was_found_and_what_is_accepted(message):
    call, kind = ERRORS[message]
    refuses(call, kind, message)
