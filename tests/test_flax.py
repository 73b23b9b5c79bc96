"""The presets are Flax's layers: arguments, variables, numbers and habits; and linen's Norm is nnx's on every row.

Flax's own layers run under JAX's lenient promotion settings, which they need; ours under the strict ones of conftest.py.
"""

import contextlib
import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import normjax
import normjax.linen as our_linen
import normjax.nnx as our_nnx
from tests.rows import jit, slow_but

EPS = float(np.finfo(np.float32).eps)
PRESETS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
TWO_PASS = {"use_fast_variance": False}


class Row(dict):
    """The keyword arguments of a layer, with a short name for pytest."""

    def __repr__(self):
        return ",".join(f"{key}={value}".replace(" ", "") for key, value in self.items()) or "defaults"


# layer, shape of the input, arguments. The channels of nnx are the product of the feature axes.
CASES = [
    ("BatchNorm", (6, 5), Row()),
    ("BatchNorm", (4, 3, 5), Row(axis=1, momentum=0.9, epsilon=1e-3)),
    ("BatchNorm", (3, 4, 2, 5), Row(use_bias=False)),
    ("BatchNorm", (3, 2, 2, 3, 4), Row(axis=(-1,), use_scale=False, momentum=0.5)),
    ("BatchNorm", (5, 4, 3), Row(axis=0, use_scale=False, use_bias=False)),
    ("BatchNorm", (4, 3, 2, 5), Row(axis=(3, 1))),
    ("BatchNorm", (4, 3, 2, 5), Row(axis=(-1, -2, 3), momentum=0.0)),
    ("LayerNorm", (7,), Row()),
    ("LayerNorm", (4, 6), Row(epsilon=1e-2)),
    ("LayerNorm", (2, 3, 4, 5), Row(reduction_axes=(1, 2, 3), use_bias=False)),
    ("LayerNorm", (2, 3, 4, 5), Row(reduction_axes=(3, -2, 1), feature_axes=(3, 2))),
    ("LayerNorm", (2, 6, 4), Row(reduction_axes=1, feature_axes=-1)),
    ("LayerNorm", (2, 5, 3, 4), Row(reduction_axes=(-1, -2), feature_axes=(-3,), use_scale=False)),
    ("RMSNorm", (4, 6), Row()),
    ("RMSNorm", (2, 3, 4, 5), Row(reduction_axes=(-1, 1), feature_axes=(-1, 1), epsilon=1e-2)),
    ("RMSNorm", (3, 2, 7), Row(use_scale=False)),
    ("GroupNorm", (3, 64), Row()),
    ("GroupNorm", (2, 3, 8), Row(num_groups=4, use_scale=False)),
    ("GroupNorm", (2, 3, 4, 8), Row(num_groups=None, group_size=4, epsilon=1e-3)),
    ("GroupNorm", (2, 2, 3, 2, 6), Row(num_groups=3, reduction_axes=(4, 3, 1, 2), use_bias=False)),
    ("GroupNorm", (2, 3, 4, 8), Row(num_groups=2, reduction_axes=(-2, -1))),
    ("GroupNorm", (3, 4, 2, 4), Row(num_groups=2, reduction_axes=(0, 1, -1))),
    ("InstanceNorm", (3, 7, 4), Row()),
    ("InstanceNorm", (2, 3, 4, 5), Row(feature_axes=(-1, 1), epsilon=1e-3)),
    ("InstanceNorm", (2, 3, 4, 5), Row(feature_axes=1, use_scale=False)),
    ("InstanceNorm", (2, 5, 3, 2, 3), Row(use_bias=False)),
]
# What Flax's nnx layers do not do: several feature axes with running statistics, and groups beside leading axes.
NOT_IN_FLAX_NNX = [
    (name, shape, row)
    for name, shape, row in CASES
    if (name == "BatchNorm" and len(np.atleast_1d(row.get("axis", -1))) > 1)
    or (name == "GroupNorm" and row.get("reduction_axes") in ((-2, -1), (0, 1, -1)))
]
ONE_OF_EACH = [
    ("BatchNorm", (6, 5), Row()),
    ("LayerNorm", (4, 6), Row()),
    ("RMSNorm", (4, 6), Row()),
    ("GroupNorm", (2, 3, 8), Row(num_groups=4)),
    ("InstanceNorm", (3, 7, 4), Row()),
]


def ids(cases):
    return [f"{name}-{'x'.join(map(str, shape))}-{row}" for name, shape, row in cases]


def each(cases):
    return pytest.mark.parametrize(("name", "shape", "row"), cases, ids=ids(cases))


def lenient():
    """JAX's default promotion: what Flax's layers are written for."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def settings(library):
    return lenient() if library in (nn, nnx) else contextlib.nullcontext()


def array(shape, seed=0, mean=0.5, std=1.0, dtype=np.float32):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(dtype)


def assert_close(got, want, tolerance=1e-5, what=""):
    """Same tree, shapes and dtypes; no element further than `tolerance` times the largest one."""
    assert jax.tree.structure(got) == jax.tree.structure(want), f"{what}: {got} {want}"
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, g), w in pairs:
        where = what + jax.tree_util.keystr(path)
        assert g.shape == w.shape, f"{where}: shape {g.shape}, not {w.shape}"
        assert g.dtype == w.dtype, f"{where}: {g.dtype}, not {w.dtype}"
        g, w = (np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64) for a in (g, w))
        assert np.all(np.isfinite(w)), f"{where}: the expected value is not finite"
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(np.abs(w).max(initial=0), 1e-3), err_msg=where)


def assert_equal(got, want):
    assert_close(got, want, 0.0)


def plain(tree):
    """A linen FrozenDict, an nnx.State or a dict as a dict of arrays."""
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else serialization.to_state_dict(tree)


def geometry(name, shape, row):
    """The axes that are averaged and those of the features, positive; and the number of groups."""
    ndim, groups = len(shape), None

    def positive(axes):
        return tuple(sorted({axis % ndim for axis in np.atleast_1d(axes).tolist()}))

    if name == "BatchNorm":
        features = positive(row.get("axis", -1))
        reduced = tuple(axis for axis in range(ndim) if axis not in features)
    elif name in ("LayerNorm", "RMSNorm"):
        features, reduced = positive(row.get("feature_axes", -1)), positive(row.get("reduction_axes", -1))
    elif name == "InstanceNorm":
        features = positive(row.get("feature_axes", -1))
        reduced = tuple(axis for axis in range(1, ndim) if axis not in features)
    else:
        features, reduced = (ndim - 1,), positive(row.get("reduction_axes", range(1, ndim)))
        groups = row.get("num_groups", 32) or shape[-1] // row["group_size"]
    return reduced, features, groups


def in_float64(name, shape, row, x, params, stats=None, mask=None):
    """The layer in NumPy float64: output, mean and variance; from the textbook, not from either library."""
    reduced, features, groups = geometry(name, shape, row)
    work = np.complex128 if np.iscomplexobj(x) else np.float64
    x = np.asarray(x, work)
    valid = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    split = (*shape[:-1], groups, shape[-1] // groups) if groups else shape
    axes = tuple(axis + 1 if groups and axis == len(shape) - 1 else axis for axis in reduced)
    z, valid = x.reshape(split), valid.reshape(split)
    if stats is None:
        mean = z.mean(axes, keepdims=True, where=valid) if name != "RMSNorm" else np.zeros(1)
        var = (np.abs(z - mean) ** 2).mean(axes, keepdims=True, where=valid)
    else:
        kept = [n if axis in features else 1 for axis, n in enumerate(shape)]
        mean, var = (np.asarray(stats[key], work).reshape(kept) for key in ("mean", "var"))
    eps = row.get("epsilon", 1e-5 if name == "BatchNorm" else 1e-6)
    y = ((z - mean) / np.sqrt(var + eps)).reshape(shape)
    beside = [n if axis in features else 1 for axis, n in enumerate(shape)]
    if "scale" in params:
        y = y * np.asarray(params["scale"], np.float64).reshape(beside)
    if "bias" in params:
        y = y + np.asarray(params["bias"], np.float64).reshape(beside)
    return y, mean.squeeze(), var.squeeze()


def variables_of(name, shape, row, seed=1):
    """Random parameters and statistics of Flax's shapes."""
    _, features, _ = geometry(name, shape, row)
    sizes = tuple(shape[axis] for axis in features)
    params = {}
    if row.get("use_scale", True):
        params["scale"] = array(sizes, seed, mean=1.0)
    if row.get("use_bias", True) and name != "RMSNorm":
        params["bias"] = array(sizes, seed + 1)
    stats = {}
    if name == "BatchNorm":
        stats = {"mean": array(sizes, seed + 2), "var": np.abs(array(sizes, seed + 3)) + 0.1}
    return params, stats


def flags(name, average):
    return {"use_running_average": average} if name == "BatchNorm" else {}


def linen_function(library, name, shape, row, average=False):
    """f(params, stats, x, mask) -> (y, new statistics)."""
    del shape
    module = getattr(library, name)(**row, **TWO_PASS, **flags(name, average))

    def f(params, stats, x, mask):
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        y, changed = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, dict(changed.get("batch_stats", {}))

    return f


def nnx_module(library, name, shape, row, average=False, **kwargs):
    _, features, _ = geometry(name, shape, row)
    size = math.prod(shape[axis] for axis in features)
    with settings(library):
        return getattr(library, name)(size, **row, **TWO_PASS, **flags(name, average), **kwargs, rngs=nnx.Rngs(0))


def nnx_function(library, name, shape, row, average=False):
    structure, _ = nnx.split(nnx_module(library, name, shape, row, average))

    def f(params, stats, x, mask):
        given = {key: nnx.Param(jnp.ravel(value)) for key, value in params.items()}
        given |= {key: nnx.BatchStat(jnp.ravel(value)) for key, value in stats.items()}
        module = nnx.merge(structure, nnx.State(given))
        y = module(x, mask=mask)
        after = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return y, {key: value.reshape(stats[key].shape) for key, value in after.items()}

    return f


def everything(library, make, name, shape, row, params, stats, x, cotangent, mask=None):
    """Outputs, gradients and statistics, in training and (batch norm) in inference; to be traced."""
    out = {}
    with settings(library):
        for average in (False, True) if name == "BatchNorm" else (False,):
            f = make(library, name, shape, row, average)
            y, pull, after = jax.vjp(lambda p, x, f=f: f(p, stats, x, mask), params, x, has_aux=True)
            key = "infer" if average else "train"
            out[key] = {"y": y, "gradients": pull(cotangent), "statistics": after}
    return out


def mask_of(name, shape, row):
    """A mask with some invalid elements, and at least two valid ones in every field; None where a field has but two."""
    reduced, _, groups = geometry(name, shape, row)
    for seed in range(1000):
        mask = np.random.default_rng(seed).uniform(size=shape) > 0.25
        split = mask.reshape(*shape[:-1], groups, -1) if groups else mask
        axes = tuple(axis + 1 if groups and axis == len(shape) - 1 else axis for axis in reduced)
        counts = split.sum(axes)
        if split.size // counts.size <= 2:
            return None
        if counts.min() >= 2 and not mask.all():
            return mask
    raise AssertionError("no seed gives such a mask")


APIS = {"linen": (our_linen, nn, linen_function), "nnx": (our_nnx, nnx, nnx_function)}
AS_FLAX = [("linen", *case) for case in CASES] + [("nnx", *case) for case in CASES[::3] if case not in NOT_IN_FLAX_NNX]


def both(api, *arguments):
    """Ours and Flax's in one compilation, which need not be a fast program."""
    ours, flax, make = APIS[api]
    name, shape, row, params, stats, x, cotangent, mask = arguments

    @jit
    def run(params, stats, x, cotangent, mask):
        out = []
        for library in (ours, flax):
            of = functools.partial(everything, library, make, name, shape, row, params, stats, x)
            out.append({"whole": of(cotangent)} | ({} if mask is None else {"masked": of(cotangent, mask)}))
        return out

    return run(params, stats, x, cotangent, mask)


@pytest.mark.parametrize(
    ("api", "name", "shape", "row"),
    [
        pytest.param(*case, id=f"{case[0]}-{ids([case[1:]])[0]}", marks=[pytest.mark.slow] * (k % 2))
        for k, case in enumerate(AS_FLAX)
    ],
)
def test_outputs_gradients_and_statistics_equal_flax(api, name, shape, row):
    params, stats = variables_of(name, shape, row)
    x, mask = array(shape, mean=2.0), mask_of(name, shape, row)
    got, want = both(api, name, shape, row, params, stats, x, array(shape, 7), mask)
    valid: Any
    for key, valid in (("whole", np.ones(shape, bool)), ("masked", mask)):
        if key not in got:
            continue
        mine, theirs = got[key], want[key]
        assert_close(mine, theirs, what=key)
        y, mean, var = in_float64(name, shape, row, x, params, mask=valid)
        assert_not_further(mine["train"]["y"], theirs["train"]["y"], y)
        if name == "BatchNorm":
            m = row.get("momentum", 0.99)
            for moment, batch in (("mean", mean), ("var", var)):
                exact = m * stats[moment].astype(np.float64) + (1 - m) * batch
                assert_not_further(mine["train"]["statistics"][moment], theirs["train"]["statistics"][moment], exact)
            assert_equal(mine["infer"]["statistics"], jax.tree.map(jnp.asarray, stats))
            y = in_float64(name, shape, row, x, params, stats)[0]
            assert_not_further(mine["infer"]["y"], theirs["infer"]["y"], y)


@pytest.mark.parametrize("api", slow_but(APIS, "linen"))
@each(ONE_OF_EACH)
def test_what_is_not_finite_behind_a_mask_gives_the_bias_and_reaches_nothing_else(api, name, shape, row):
    """Beside it, other masked elements are normalized; nothing of a wrong one is in any output, statistic or gradient."""
    ours, _, make = APIS[api]
    params, stats = variables_of(name, shape, row)
    mask, x, cotangent = mask_of(name, shape, row), array(shape, mean=2.0), array(shape, 7)
    assert mask is not None
    hidden = np.argwhere(~mask)[:4]
    wrong = np.zeros(shape, bool)
    wrong[tuple(hidden.T)] = True
    poison = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)
    poisoned = x.copy()
    poisoned[tuple(hidden.T)] = poison[: len(hidden)]
    of = functools.partial(everything, ours, make, name, shape, row, params, stats)
    clean, got = jit(lambda x, y, g: [of(a, g, mask) for a in (x, y)])(x, poisoned, np.where(wrong, 0, cotangent))
    at = [size if axis in geometry(name, shape, row)[1] else 1 for axis, size in enumerate(shape)]
    bias = np.broadcast_to(np.reshape(params["bias"], at) if "bias" in params else 0, shape)
    lost = wrong & ~np.isfinite(poisoned)
    for part, want in zip(got.values(), clean.values(), strict=True):
        assert_equal(jnp.where(lost, part["y"], 0), jnp.where(lost, bias, 0).astype(jnp.float32))
        for tree in (part, want):
            tree["y"] = jnp.where(wrong, 0, tree["y"])
        assert_close(part, want, 1e-6)


@each([("LayerNorm", (3, 4), Row()), ("BatchNorm", (3, 4), Row()), ("GroupNorm", (2, 3, 8), Row(num_groups=4))])
def test_what_is_masked_whole_gives_the_bias(name, shape, row):
    params, stats = variables_of(name, shape, row)
    mask = np.ones(shape, bool)
    mask[(slice(None), 1) if name == "BatchNorm" else 0] = False
    x = array(shape)
    y, after = jit(linen_function(our_linen, name, shape, row))(params, stats, x, mask)
    assert_close(jnp.where(mask, 0, y), jnp.where(mask, 0, jnp.broadcast_to(params["bias"], shape)))
    assert all((after[key][1] == stats[key][1]).all() for key in after)


@pytest.mark.parametrize("api", slow_but(APIS, "nnx"))
def test_an_epsilon_and_a_momentum_that_only_a_run_knows_give_flax_s_numbers(api):
    ours, flax, make = APIS[api]
    sweep = np.array([1e-5, 0.3, 2.0], np.float32)
    for name, shape, row in ONE_OF_EACH[:: 4 if api == "linen" else 3]:
        params, stats = variables_of(name, shape, row)
        x, mask = array(shape, mean=1.0), mask_of(name, shape, row) if name == "BatchNorm" else None

        def run(library, value, name=name, shape=shape, row=row, params=params, stats=stats, x=x, mask=mask):
            options = Row(row | {"epsilon": value} | ({"momentum": value / 4} if name == "BatchNorm" else {}))
            with settings(library):
                if api == "linen":
                    return make(library, name, shape, options)(params, stats, x, mask)
                layer = nnx_module(library, name, shape, options)  # whose array of an epsilon is one of its leaves
                for key, known in (params | stats).items():
                    getattr(layer, key)[...] = jnp.asarray(known)
                return layer(x, mask=mask), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

        got, want = (jit(jax.vmap(functools.partial(run, library)))(sweep) for library in (ours, flax))
        assert_close(got, want)
        once = run(ours, sweep[1])  # a scalar of NumPy
        assert_close(once, jax.tree.map(lambda a: a[1], want))
        assert_close(run(ours, jnp.asarray(sweep[1])), once)


def assert_not_further(ours, flax, exact, slack=4 * EPS):
    exact = np.asarray(exact)
    bound = slack * np.abs(exact).max()
    mine, theirs = (np.abs(np.asarray(a, exact.dtype) - exact).max() for a in (ours, flax))
    assert mine <= theirs + bound, f"{mine} from float64, Flax {theirs}, slack {bound}"


FAR = [
    ("BatchNorm", (32, 33), Row()),
    ("LayerNorm", (16, 100), Row()),
    ("RMSNorm", (16, 100), Row()),
    ("GroupNorm", (3, 64), Row()),
    ("GroupNorm", (4, 8, 8, 32), Row(num_groups=8)),
    ("InstanceNorm", (2, 9, 9, 4), Row()),
]


@each(FAR)
def test_no_further_from_float64_than_flax_when_the_mean_is_large(name, shape, row):
    params, stats = variables_of(name, shape, row)
    cotangent, (reduced, features, groups) = array(shape, 7), geometry(name, shape, row)
    eps = 1e-5 if name == "BatchNorm" else 1e-6

    @jit
    def run(x):
        return [
            everything(lib, linen_function, name, shape, row, params, stats, x, cotangent) for lib in (our_linen, nn)
        ]

    for mean in (0.0, 1e3, 1e4):
        x = array(shape, int(mean), mean=mean)
        ours, flax = (out["train"] for out in run(x))
        y, batch_mean, batch_var = in_float64(name, shape, row, x, params)
        assert_not_further(ours["y"], flax["y"], y)
        if stats:
            for key, batch in (("mean", batch_mean), ("var", batch_var)):
                exact = 0.99 * stats[key].astype(np.float64) + 0.01 * batch
                assert_not_further(ours["statistics"][key], flax["statistics"][key], exact)
        # The gradient by hand: g less its projections on one and on v, over the standard deviation.
        split = (*shape[:-1], groups, -1) if groups else shape
        axes = tuple(axis + 1 if groups and axis == len(shape) - 1 else axis for axis in reduced)
        beside = [n if axis in features else 1 for axis, n in enumerate(shape)]
        g = (cotangent.astype(np.float64) * params["scale"].reshape(beside)).reshape(split)
        v, centre = x.astype(np.float64).reshape(split), name != "RMSNorm"
        v = v - v.mean(axes, keepdims=True) if centre else v
        q = (v**2).mean(axes, keepdims=True) + eps
        g = g - g.mean(axes, keepdims=True) if centre else g
        exact = ((g - v * (v * g).mean(axes, keepdims=True) / q) / np.sqrt(q)).reshape(shape)
        theirs = np.abs(np.asarray(flax["gradients"][1]) - exact).max()
        assert_not_further(
            ours["gradients"][1], flax["gradients"][1], exact, 4 * EPS + 0.02 * theirs / np.abs(exact).max()
        )


# The arguments of Flax's constructors that have an effect in our layers, and those that are accepted and ignored on purpose:
# statistics are always two-pass, and float32 or wider. The layers subclass Flax's: what Flax adds would be accepted, and
# ignored unseen, were it not for this table.
ARGUMENTS = {
    "linen": {
        "BatchNorm": "use_running_average axis momentum epsilon dtype param_dtype use_bias use_scale bias_init scale_init "
        "axis_name axis_index_groups",
        "LayerNorm": "epsilon dtype param_dtype use_bias use_scale bias_init scale_init reduction_axes feature_axes "
        "axis_name axis_index_groups",
        "RMSNorm": "epsilon dtype param_dtype use_scale scale_init reduction_axes feature_axes axis_name axis_index_groups",
        "GroupNorm": "num_groups group_size epsilon dtype param_dtype use_bias use_scale bias_init scale_init "
        "reduction_axes axis_name axis_index_groups",
        "InstanceNorm": "epsilon dtype param_dtype use_bias use_scale bias_init scale_init feature_axes axis_name "
        "axis_index_groups",
    },
    "nnx": {
        "BatchNorm": "num_features use_running_average axis momentum epsilon dtype param_dtype use_bias use_scale "
        "bias_init scale_init axis_name axis_index_groups promote_dtype rngs bias_metadata scale_metadata",
        "LayerNorm": "num_features epsilon dtype param_dtype use_bias use_scale bias_init scale_init reduction_axes "
        "feature_axes axis_name axis_index_groups promote_dtype rngs bias_metadata scale_metadata",
        "RMSNorm": "num_features epsilon dtype param_dtype use_scale scale_init reduction_axes feature_axes axis_name "
        "axis_index_groups promote_dtype rngs scale_metadata",
        "GroupNorm": "num_features num_groups group_size epsilon dtype param_dtype use_bias use_scale bias_init "
        "scale_init reduction_axes axis_name axis_index_groups promote_dtype rngs bias_metadata scale_metadata",
        "InstanceNorm": "num_features epsilon dtype param_dtype use_bias use_scale bias_init scale_init feature_axes "
        "axis_name axis_index_groups promote_dtype rngs bias_metadata scale_metadata",
    },
}
IGNORED = {"linen": "use_fast_variance force_float32_reductions", "nnx": "use_fast_variance"}
BEYOND_FLAX = {
    ("linen", "BatchNorm"): ["stats_names"],
    **{(api, f"{name}Norm"): ["kernel"] for api in ("linen", "nnx") for name in ("Layer", "RMS", "Group", "Instance")},
}


def parameters(library, name, method):
    found = inspect.signature(getattr(getattr(library, name), method)).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "parent", "name")]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("api", APIS)
def test_every_argument_of_flax_is_read_or_ignored_on_purpose(api, name):
    ours, flax, _ = APIS[api]
    assert issubclass(getattr(ours, name), getattr(flax, name))
    known = f"{ARGUMENTS[api][name]} {IGNORED[api]}".split()
    assert {argument for argument, *_ in parameters(flax, name, "__init__")} == set(known)
    constructor = parameters(ours, name, "__init__")
    beyond = BEYOND_FLAX.get((api, name), [])
    assert [argument for argument, *_ in constructor if argument in beyond] == beyond
    assert [p for p in constructor if p[0] not in beyond] == parameters(flax, name, "__init__")
    assert parameters(ours, name, "__call__") == parameters(flax, name, "__call__")


@each(CASES)
def test_variables_are_flax_s(name, shape, row):
    x = jnp.zeros(shape)
    for extra in ({}, {"param_dtype": jnp.bfloat16}, {"dtype": jnp.float16}, {"force_float32_reductions": False}):
        trees = []
        for library in (our_linen, nn):
            with settings(library):
                module = getattr(library, name)(**{**row, **extra}, **flags(name, False))
                trees.append(jax.eval_shape(module.init, jax.random.key(0), x))
        assert trees[0] == trees[1]


def everywhere(library):
    """A model with every preset, under the names that linen gives them."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.Dense(8)(x)
            x = library.BatchNorm(scale_init=nn.initializers.normal())(x, use_running_average=not train)
            x = library.LayerNorm(bias_init=nn.initializers.normal(), reduction_axes=(1, 2), **TWO_PASS)(x)
            x = library.RMSNorm(scale_init=nn.initializers.normal())(x)
            x = library.GroupNorm(num_groups=2, bias_init=nn.initializers.normal(), **TWO_PASS)(x)
            x = library.InstanceNorm(scale_init=nn.initializers.normal(), **TWO_PASS)(x)
            return library.BatchNorm(use_running_average=not train, momentum=0.9, **TWO_PASS)(x)

    return Model()


def initialized(library, x):
    with settings(library):
        return jit(everywhere(library).init)(jax.random.key(3), x)


def applied(library, variables, x):
    with settings(library):
        return jit(functools.partial(everywhere(library).apply, train=False))(variables, x)


@pytest.fixture(scope="module")
def trained():
    """An input, the variables of a linen model of Flax's layers after one update, and its output."""
    x = array((4, 3, 8))
    first = initialized(nn, x)
    assert_equal(initialized(our_linen, x), first)  # same names, same random numbers
    with lenient():
        _, changed = jit(functools.partial(everywhere(nn).apply, mutable=["batch_stats"]))(first, x)
    variables = {"params": first["params"], **changed}
    return x, variables, applied(nn, variables, x)


def orbax_round_trip(path, tree):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)
        saver.wait_until_finished()
        return saver.restore(path, jax.tree.map(jnp.zeros_like, tree))


def test_linen_checkpoints_load_both_ways(trained, tmp_path):
    x, variables, y = trained
    template = initialized(our_linen, x)
    assert jax.tree.structure(template) == jax.tree.structure(variables)
    loaded = {
        "plain dict": jax.tree.map(np.asarray, variables),
        "msgpack": serialization.from_bytes(template, serialization.to_bytes(variables)),
        "orbax": orbax_round_trip(tmp_path / "linen", variables),
    }
    for kind, tree in loaded.items():
        assert_equal(jax.tree.map(jnp.asarray, tree), variables)
        for library in (our_linen, nn):
            assert_close(applied(library, tree, x), y, what=kind)


def nnx_everywhere(library, seed=0):
    rngs = nnx.Rngs(seed)
    random = {"scale_init": nnx.initializers.normal(), "rngs": rngs}
    with settings(library):
        return nnx.List(
            [
                library.BatchNorm(8, momentum=0.9, **TWO_PASS, **random),
                library.LayerNorm(8, **TWO_PASS, **random),
                library.RMSNorm(8, **random),
                library.GroupNorm(8, 2, bias_init=nnx.initializers.normal(), **TWO_PASS, **random),
                library.InstanceNorm(8, **TWO_PASS, **random),
            ]
        )


def nnx_applied(library, layers, x, average):
    @jit
    def run(structure, state, x):
        layers = nnx.merge(structure, state)
        for layer in layers:
            x = layer(x, use_running_average=average) if isinstance(layer, library.BatchNorm) else layer(x)
        return x, nnx.state(layers)

    with settings(library):
        return run(*nnx.split(layers), x)


def test_nnx_checkpoints_load_both_ways(tmp_path):
    x = array((4, 3, 8))
    ours, flax = nnx_everywhere(our_nnx), nnx_everywhere(nnx)
    assert_equal(plain(nnx.state(ours)), plain(nnx.state(flax)))  # same names, same random numbers
    nnx.update(flax, nnx_applied(nnx, flax, x, False)[1])
    y, state = nnx_applied(nnx, flax, x, True)
    for i, (source, saved) in enumerate((("state", state), ("pure dict", nnx.to_pure_dict(state)))):
        loaded = orbax_round_trip(tmp_path / str(i), saved)
        for library in (our_nnx, nnx):
            fresh = nnx_everywhere(library, seed=9)
            target = nnx.state(fresh)
            if source == "state":
                target = loaded
            else:
                nnx.replace_by_pure_dict(target, loaded)
            nnx.update(fresh, target)
            assert_equal(plain(nnx.state(fresh)), plain(state))
            assert_close(nnx_applied(library, fresh, x, True)[0], y, what=source)


def test_nnx_layers_load_linen_variables():
    x = array((6, 5))
    params, stats = variables_of("BatchNorm", (6, 5), {})
    layer = our_nnx.BatchNorm(5, use_running_average=True, rngs=nnx.Rngs(0))
    nnx.update(layer, {**params, **stats})
    with lenient():
        want = nn.BatchNorm(use_running_average=True).apply({"params": params, "batch_stats": stats}, x)
    assert_close(layer(x), want)


def in_dtype(dtype, shape):
    x = array(shape, mean=2.0, std=3.0)
    return (x + 1j * array(shape, 5)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


# dtype of the input, `dtype`, other arguments
PROMOTIONS = [
    *((x, dtype, {}) for x in ("bfloat16", "float16", "float32", "int8", "int32") for dtype in (None, "bfloat16")),
    ("float16", "float32", {}),
    ("bfloat16", None, {"param_dtype": "bfloat16"}),
    ("bfloat16", None, {"use_scale": False, "use_bias": False}),
    ("float16", None, {"use_scale": False, "param_dtype": "float16"}),
    ("int32", None, {"use_scale": False, "use_bias": False}),
    ("uint8", "float16", {"param_dtype": "bfloat16"}),
    ("complex64", None, {}),
    ("complex64", None, {"use_scale": False, "use_bias": False, "param_dtype": "bfloat16"}),
    ("float32", "complex64", {}),
]


@each(ONE_OF_EACH)
def test_output_and_statistics_have_flax_s_dtypes(name, shape, row):
    for x_dtype, dtype, extra in PROMOTIONS:
        asked = Row(row | {k: v for k, v in extra.items() if name != "RMSNorm" or k != "use_bias"} | {"dtype": dtype})
        params, stats = variables_of(name, shape, asked)
        params = {key: value.astype(extra.get("param_dtype", "float32")) for key, value in params.items()}
        x = jax.ShapeDtypeStruct(shape, x_dtype)
        for api, (ours, flax, make) in APIS.items():
            if api == "nnx" and stats and "complex64" in (x_dtype, dtype):
                continue  # Flax stores the real part of a complex mean there, with a warning
            for average in (False, True) if stats else (False,):
                got = []
                for library in (ours, flax):
                    with settings(library):
                        f = make(library, name, shape, asked, average)
                        got.append(jax.eval_shape(lambda x, f=f, p=params, s=stats: f(p, s, x, None), x))
                assert got[0] == got[1], f"{api} x {x_dtype} dtype {dtype} {extra} average {average}"


@each(ONE_OF_EACH)
def test_integer_half_and_complex_inputs_give_flax_s_numbers(name, shape, row):
    params, stats = variables_of(name, shape, row)
    inputs = {dtype: in_dtype(dtype, shape) for dtype in ("int32", "bfloat16", "float16", "complex64")}

    @jit
    def run(inputs):
        out = []
        for library in (our_linen, nn):
            with settings(library):
                f = linen_function(library, name, shape, row)
                out.append({dtype: f(params, stats, x, None) for dtype, x in inputs.items()})
        return out

    ours, flax = run(inputs)
    assert_close(ours, flax)
    eager = linen_function(our_linen, name, shape, row)(params, stats, inputs["int32"], None)  # a NumPy array
    assert_close(eager, ours["int32"])


def test_running_statistics_of_complex_input_are_complex_means_and_real_variances():
    x = in_dtype("complex64", (6, 5))
    layer = our_linen.BatchNorm(use_running_average=False, momentum=0.0)
    _, changed = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    want = {"mean": x.mean(0), "var": (np.abs(x - x.mean(0)) ** 2).mean(0)}
    assert_close(dict(changed["batch_stats"]), jax.tree.map(jnp.asarray, want))
    layer = our_nnx.BatchNorm(5, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x)
    assert_close(plain(nnx.state(layer, nnx.BatchStat)), jax.tree.map(jnp.asarray, want))


@each(ONE_OF_EACH)
def test_initialization_needs_neither_several_examples_nor_mapped_axes_and_keeps_the_statistics(name, shape, row):
    for one in (shape, (1, *shape[1:])):
        layer = getattr(our_linen, name)(**row, axis_name="unbound", **flags(name, False))
        y, variables = layer.init_with_output(jax.random.key(0), array(one))
        assert y.shape == one
        if name == "BatchNorm":
            assert_equal(variables["batch_stats"], {"mean": jnp.zeros(shape[-1]), "var": jnp.ones(shape[-1])})
    with pytest.raises(Exception, match="unbound"):
        layer.apply(variables, array(shape), mutable=["batch_stats"])


def test_norm_initializes_on_one_example_and_without_its_mapped_axes():
    layer = our_linen.Norm(normjax.Normalizer("n @unbound", "n @unbound"), use_running_average=False)
    variables = layer.init(jax.random.key(0), array((1, 5)))
    assert_equal(variables["batch_stats"], {"mean": jnp.zeros(5), "var": jnp.ones(5)})
    with pytest.raises(normjax.FieldError, match="unbound"):
        layer.apply(variables, array((4, 5)), mutable=["batch_stats"])


@pytest.mark.parametrize("make", [our_linen.BatchNorm, functools.partial(our_linen.Norm, "batch"), nn.BatchNorm])
def test_the_linen_flag_is_given_once(make):
    x, key = array((4, 3)), jax.random.key(0)
    for constructed, called in ((None, None), (True, True), (False, True)):
        with pytest.raises(ValueError, match="use_running_average"):
            make(use_running_average=constructed).init(key, x, use_running_average=called)
    with lenient():
        make(use_running_average=None).init(key, x, use_running_average=True)
        make(use_running_average=True).init(key, x)


NNX_BATCH = {
    "BatchNorm": our_nnx.BatchNorm,
    "Norm": functools.partial(our_nnx.Norm, normalizer="batch"),
    "Flax": functools.partial(nnx.BatchNorm, **TWO_PASS),
}


@pytest.mark.parametrize("make", NNX_BATCH.values(), ids=NNX_BATCH)
def test_the_nnx_flag_comes_from_the_call_the_view_or_the_constructor(make):
    layer = make(3, use_running_average=None, rngs=nnx.Rngs(0))
    x, first = array((4, 3), mean=5.0), plain(nnx.state(layer))
    with pytest.raises(ValueError, match="No `use_running_average` argument was provided"):
        layer(x)
    with lenient():
        for stored in (
            lambda x: layer(x, use_running_average=True),
            nnx.view(layer, use_running_average=True),
            nnx.view(nnx.List([layer]), use_running_average=True)[0],
        ):
            np.testing.assert_allclose(stored(x), x / np.sqrt(1 + 1e-5), rtol=1e-5)
        assert layer.use_running_average is None
        layer.eval()
        np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), rtol=1e-5)
        assert_equal(plain(nnx.state(layer)), first)
        layer.train()
        assert abs(layer(x)).max() < 3
        np.testing.assert_allclose(layer.mean[...], 0.01 * x.mean(0), rtol=1e-4)
        nnx.view(layer, use_running_average=False)(x)  # a view shares the statistics
        np.testing.assert_allclose(layer.mean[...], (0.01 + 0.0099) * x.mean(0), rtol=1e-4)
    assert "use_running_average" in nnx.view_info(layer)


def test_nnx_statistics_persist_through_jit_grad_remat_and_split():
    x, results = array((6, 5)), []
    for make in NNX_BATCH.values():

        @nnx.jit
        def step(layer, x):
            def loss(layer):
                return jnp.sum(nnx.remat(lambda layer, x: layer(x))(layer, x) ** 3)

            return nnx.value_and_grad(loss)(layer)

        with lenient():
            layer = make(5, momentum=0.9, rngs=nnx.Rngs(0))
            _, grads = step(layer, x)
            step(layer, x)
            layer = nnx.merge(*nnx.split(layer))
        results.append((plain(grads), plain(nnx.state(layer))))
    assert float(jnp.abs(results[0][1]["mean"]).max()) > 0.01
    for result in results[:2]:
        assert_close(result, results[2])


@pytest.mark.parametrize("name", [*PRESETS, "Norm"])
def test_nnx_metadata_reach_the_parameters(name):
    kwargs: Any = {"scale_metadata": {"out_sharding": ("model",)}}
    if name != "RMSNorm":
        kwargs["bias_metadata"] = {"mine": 3}
    make: Any = functools.partial(our_nnx.Norm, normalizer="layer") if name == "Norm" else getattr(our_nnx, name)
    with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        layer = make(32, **kwargs, rngs=nnx.Rngs(0))
    assert layer.scale.get_metadata("out_sharding") == ("model",)
    if name != "RMSNorm":
        assert layer.bias.get_metadata("mine") == 3


@pytest.mark.parametrize("name", [*PRESETS, "Norm"])
def test_linen_partitioning_metadata_survive(name):
    init = nn.with_partitioning(nn.initializers.normal(), ("model",))
    make: Any = functools.partial(our_linen.Norm, "batch") if name == "Norm" else getattr(our_linen, name)
    layer = make(scale_init=init, **({"use_running_average": False} if name in ("BatchNorm", "Norm") else {}))
    x = array((4, 3, 32))
    variables = layer.init(jax.random.key(0), x)
    assert nn.get_partition_spec(variables)["params"]["scale"] == jax.sharding.PartitionSpec("model")
    y = layer.apply(variables, x, mutable=["batch_stats"])[0]
    assert_close(layer.apply(nn.meta.unbox(variables), x, mutable=["batch_stats"])[0], y)


def test_nnx_running_statistics_are_not_rounded_to_dtype():
    x = array((64, 3), mean=300.0)
    layer = our_nnx.BatchNorm(3, momentum=0.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer(x)
    np.testing.assert_allclose(layer.mean[...], x.astype(jnp.bfloat16).astype(np.float32).mean(0), rtol=1e-6)
    assert layer.mean[...].dtype == jnp.float32
    y = layer(x, use_running_average=True)
    assert y.dtype == jnp.bfloat16
    exact = (x - np.asarray(layer.mean[...])) / np.sqrt(np.asarray(layer.var[...]) + 1e-5)
    rounding = 300 * 2.0**-8  # of x itself, which Flax's dtype asks for
    assert np.abs(np.asarray(y, np.float32) - exact).max() < 1.1 * rounding


LINEN_BATCH = {
    "BatchNorm": functools.partial(our_linen.BatchNorm, momentum=0.9),
    "Norm": functools.partial(our_linen.Norm, normalizer="batch", momentum=0.9),
    "Flax": functools.partial(nn.BatchNorm, momentum=0.9, use_fast_variance=False),
}


def lifted_scan(make, share):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return make(name="norm", use_running_average=False)(jnp.tanh(x)), None

    axes: Any = {"variable_broadcast": "params", "variable_carry": "batch_stats"} if share else {
        "variable_axes": {"params": 0, "batch_stats": 0}
    }  # fmt: skip
    lifted = nn.scan(Layer, split_rngs={"params": not share}, length=3, **axes)()
    return lifted, Layer() if share else lifted  # what is carried exists before the scan


def lifted_vmap(make, share):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            norm = make(name="norm", use_running_average=False, **(named(make) if share else {}))
            return norm(x), None

    variables = dict.fromkeys(("params", "batch_stats"), None if share else 0)
    axes: Any = {"in_axes": (0, None), "variable_axes": variables}
    lifted = nn.vmap(Layer, split_rngs={"params": not share}, axis_name="several", **axes)()
    return lifted, lifted


def lifted_remat(make, share):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return make(name="norm", use_running_average=share)(x), None

    return nn.remat(Layer)(), Layer()


def named(make):
    """Statistics over the mapped axis as well."""
    if make.func is our_linen.Norm:
        return {"normalizer": normjax.Normalizer("n ... @several", "n ... @several")}
    return {"axis_name": "several"}


@pytest.mark.parametrize("share", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["each", "shared"])
@pytest.mark.parametrize("lift", [lifted_scan, lifted_vmap, lifted_remat])
def test_lifted_running_statistics_equal_flax(lift, share):
    x, results = array((3, 4, 5), mean=1.0), {}
    for key, make in LINEN_BATCH.items():
        with lenient() if key == "Flax" else contextlib.nullcontext():
            model, first = lift(make, share)
            variables = jit(first.init)(jax.random.key(0), x, None)

            def loss(params, variables=variables, model=model):
                (y, _), changed = model.apply({**variables, "params": params}, x, None, mutable=["batch_stats"])
                return jnp.sum(jnp.sin(y)), (y, changed)

            results[key] = variables, jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    for key in ("BatchNorm", "Norm"):
        assert_close(results[key], results["Flax"], what=key)


@pytest.mark.parametrize("row", slow_but(normjax.TABLE, "batch", "group", "divisive", "contrast"))
def test_linen_equals_nnx_on_every_row(row):
    shape, alpha = (8, 5, 4, 64), 0.5
    x, y = array(shape, mean=1.0), array(shape, 1, std=2.0)
    learned = {"sigma": np.float32(0.7)} if normjax.TABLE[row].var is not None else {}
    arrays = {"scale": array(64, 2), "bias": array(64, 3), **learned}
    given = {"scale": array((8, 64), 4), "bias": array((8, 64), 5)}  # one a channel and example
    options: Any = {"momentum": 0.6, "learn_sigma": bool(learned), "l1": alpha}
    linen = our_linen.Norm(row, **options)
    layer = our_nnx.Norm(64, row, **options, rngs=nnx.Rngs(0))
    variables = jax.eval_shape(functools.partial(linen.init, use_running_average=False), jax.random.key(0), x)
    nnx.update(layer, arrays)
    structure, state = nnx.split(layer)
    flat = {**variables["params"], **variables.get("batch_stats", {})}
    assert {key: v.shape for key, v in flat.items()} == {key: v.shape for key, v in plain(state).items()}
    assert "losses" not in variables

    @jit
    def by_linen(x, y):
        stats, out = initial_statistics(flat), {}
        for key, z in (("first", x), ("second", y)):
            variables = {"params": arrays, "batch_stats": stats}
            out[key], changed = linen.apply(variables, z, use_running_average=False, mutable=["batch_stats", "losses"])
            stats, out[key + "-penalty"] = changed.get("batch_stats", {}), changed["losses"]["l1"]
        variables = {"params": arrays, "batch_stats": stats}
        out["inference"] = linen.apply(variables, x, use_running_average=True)
        return out | {"conditional": linen.apply(variables, x, True, **given), "statistics": stats}

    @jit
    def by_nnx(state, x, y):
        layer, out = nnx.merge(structure, state), {}
        for key, z in (("first", x), ("second", y)):
            out[key], sown = nnx.capture(layer, our_nnx.Penalty)(z)
            out[key + "-penalty"] = sown["l1"][...]
        view = nnx.view(layer, use_running_average=True) if nnx.state(layer, nnx.BatchStat) else layer
        out["inference"] = view(x)
        out["conditional"] = view(x, **given)
        return out | {"statistics": plain(nnx.state(layer, nnx.BatchStat))}

    ours = by_linen(x, y)
    assert_close(by_nnx(state, x, y), ours, 1e-6)
    want = normjax.normalize(x, row, eps=0.49 if learned else None)
    np.testing.assert_allclose(ours["first-penalty"], alpha * np.abs(want.centered).mean(), rtol=1e-5)
    assert_close(ours["first"], want.y * arrays["scale"].reshape(1, 1, 1, -1) + arrays["bias"].reshape(1, 1, 1, -1))
    mixes = any(field.mixes_examples for field in normjax.TABLE[row].fields)
    assert bool(ours["statistics"]) == mixes
    if not mixes:
        assert_equal(ours["inference"], ours["first"])


def initial_statistics(variables):
    kinds = {"mean": jnp.zeros, "var": jnp.ones}
    return {key: kinds[key](variables[key].shape) for key in kinds if key in variables}


def test_the_penalty_is_sown_only_when_asked_for():
    x = array((4, 3))
    for alpha, expected in ((0.0, {}), (0.5, {"l1": 0.5 * np.abs(x - x.mean(1, keepdims=True)).mean()})):
        linen = our_linen.Norm("token", l1=alpha)
        variables = linen.init(jax.random.key(0), x)
        assert set(variables) == {"params"}
        assert isinstance(linen.apply(variables, x), jax.Array)
        changed: Any = linen.apply(variables, x, mutable=["losses"])[1]
        assert_close(dict(changed.get("losses", {})), {k: jnp.float32(v) for k, v in expected.items()})
        layer = our_nnx.Norm(3, "token", l1=alpha, rngs=nnx.Rngs(0))
        before = plain(nnx.state(layer))
        layer(x)
        assert_equal(plain(nnx.state(layer)), before)
        sown = plain(nnx.capture(layer, our_nnx.Penalty)(x)[1])
        assert_close(sown, {k: jnp.float32(v) for k, v in expected.items()})
        assert_equal(plain(nnx.state(layer)), before)


def test_nnx_vmap_and_scan_over_layers_equal_flax():
    x, results = array((3, 4, 5)), []
    for make in NNX_BATCH.values():
        with lenient():
            layers = nnx.vmap(functools.partial(lambda make, rngs: make(5, rngs=rngs), make))(nnx.Rngs(0).split(3))
            y = nnx.jit(nnx.vmap(lambda layer, x: layer(x)))(layers, x)
            z = nnx.jit(nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry))(x[0], layers)
        results.append((y, z, plain(nnx.state(layers))))
    for result in results[:2]:
        assert_close(result, results[2])
