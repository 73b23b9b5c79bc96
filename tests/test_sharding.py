"""Sharded arrays under jit: on eight devices every row gives what one device gives, and asks no more than its neighbours."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normjax import Normalizer, expect, linen, normalize, top
from normjax import nnx as our_nnx
from tests.rows import CHANNELS, FAST, ROWS, jit

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
CASES = {
    **ROWS,
    "groups_across_shards": Normalizer("... c/2", "... c/2"),
    "top_k": Normalizer("n ...", "n ... c/2", order=top(3), power=1.0),
    "max_window": Normalizer(None, "...:5", order=float("inf"), power=1.0),
}
# The axes over which x (n h w c) is sharded, on a mesh of 4 x 2 devices.
SPECS = {
    "examples": P("data"),
    "rows": P(None, "data"),
    "rows and columns": P(None, "data", "model"),
    "channels": P(None, None, None, "data"),
    "examples and channels": P("data", None, None, "model"),
}
QUICK = {"batch", "token", "groups_across_shards", "divisive"}
cases = pytest.mark.parametrize("name", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in CASES])
kinds = pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=str
)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def array(name, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1.5, (8, 16, 12, CHANNELS.get(name, 16))).astype(np.float32)


def collectives(compiled):
    found = re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())
    return set(found)


def pull(f, x, g):
    y, back = jax.vjp(f, x)
    return y, back(g)[0]


def close(got, want, name=""):
    bound = 2e-6 * max(1, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=name)


@cases
@kinds
def test_sharded_arrays_give_the_numbers_of_one_device_without_gathering(name, kind):
    x, g = array(name), array(name, 1)
    mask = np.random.default_rng(2).uniform(size=x.shape) > 0.3
    masked = name in ("batch", "divisive")  # the mask of the others is that of these
    f = functools.partial(pull, lambda x: normalize(x, CASES[name], mask=mask if masked else None).y)
    want = jit(f)(x, g)
    mesh = mesh_of(kind)
    specs = SPECS if name not in QUICK else {k: SPECS[k] for k in ("rows and columns", "examples and channels")}
    for where, spec in specs.items():
        sharding = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            args = jax.device_put((x, g), sharding)
            outs = (sharding, sharding) if kind == AxisType.Auto else None
            compiled = jax.jit(f, out_shardings=outs).lower(*args).compile(compiler_options=FAST)
            got = compiled(*args)
        for mine, theirs in zip(got, want, strict=True):
            close(mine, theirs, where)
            assert mine.sharding.is_equivalent_to(sharding, 4), where
        used = collectives(compiled)
        # The k largest of a field need its elements side by side; everything else is sums and neighbours.
        assert name == "top_k" or not used & {"all-gather", "all-to-all"}, (where, used)
        slides = [s for s in CASES[name].fields for s in s.spans if s.window and s.axis == "..."]
        if slides and where.startswith("rows"):
            assert "collective-permute" in used


@kinds
@pytest.mark.parametrize("width", [2, 16, *(pytest.param(k, marks=pytest.mark.slow) for k in (3, 4, 5, 7, 12, 13, 15))])
def test_windows_up_to_the_whole_axis_ask_their_neighbours(kind, width):
    x, g = np.random.default_rng(0).normal(size=(2, 2, 16, 3)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P(None, "data"))
    for window in ("box", "gaussian"):
        f = functools.partial(pull, lambda x, window=window: expect(x, f"h:{width}", "n h c", window=window))
        with jax.set_mesh(mesh):
            args = jax.device_put((x, g), sharding)
            compiled = jax.jit(f, out_shardings=(sharding, sharding)).lower(*args).compile(compiler_options=FAST)
        for mine, theirs in zip(compiled(*args), f(x, g), strict=True):
            close(mine, theirs, window)
        assert collectives(compiled) == {"collective-permute"}


@pytest.mark.parametrize("window", ["box", "gaussian"])
def test_windows_over_an_axis_with_one_element_a_device_are_right(window):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",))
    for width in (3, 4, 8):
        f = functools.partial(expect, field=f"c:{width}", layout="n c", window=window)
        with jax.set_mesh(mesh):
            got = jit(f)(jax.device_put(x, NamedSharding(mesh, P(None, "data"))))
        close(got, f(x))


@pytest.mark.parametrize("field", ["...:5 c", "... c/2"])
def test_second_derivatives_and_vmap_work_on_explicit_meshes(field):
    n, x = Normalizer(field, field), array("batch")[:2, :8, :4]
    mesh, spec = mesh_of(AxisType.Explicit), P(None, "data", None, "model")

    def twice(x):
        def f(x):
            return jnp.sum(normalize(x, n).y ** 3)

        return jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1], jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x)

    both = jax.vmap(twice)
    want = jit(both)(np.stack([x, x[::-1]]))
    with jax.set_mesh(mesh):
        stacked = jax.device_put(np.stack([x, x[::-1]]), NamedSharding(mesh, P(None, *spec)))
        got = jit(both)(stacked)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("spec", [P("data"), P("data", None, None, "model"), P(None, "data")], ids=str)
def test_running_statistics_of_sharded_batches_are_global_and_keep_their_type(spec):
    layer, x = linen.Norm("batch", use_running_average=False, l1=0.1, momentum=0.5), array("batch")
    variables = layer.init(jax.random.key(0), x)

    def two_steps(stats, x):
        def step(stats, _):
            y, changed = layer.apply(
                {"params": variables["params"], "batch_stats": stats}, x, mutable=["batch_stats", "losses"]
            )
            return changed["batch_stats"], (jnp.sum(y**2), changed["losses"]["l1"])

        return jax.lax.scan(step, stats, None, length=2)

    want = jit(two_steps)(variables["batch_stats"], x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            got = jit(two_steps)(variables["batch_stats"], jax.device_put(x, NamedSharding(mesh, spec)))
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [P(None, None, None, "data"), P("data", None, None, "model")], ids=str)
def test_flax_s_group_norm_over_sharded_channels_traces_on_explicit_meshes(spec):
    x, g = array("batch"), array("batch", 1)
    module = our_nnx.GroupNorm(16, num_groups=2, rngs=nnx.Rngs(0))
    twin = linen.GroupNorm(num_groups=2)
    structure, state = nnx.split(module)
    layers = (lambda x: nnx.merge(structure, state)(x), lambda x: twin.apply({"params": nnx.to_pure_dict(state)}, x))
    mesh = mesh_of(AxisType.Explicit)
    for f in layers:
        f = jax.jit(functools.partial(pull, f))
        want = f(x, g)
        with jax.set_mesh(mesh):
            got = f(*jax.device_put((x, g), NamedSharding(mesh, spec)))
        for mine, theirs in zip(got, want, strict=True):
            close(mine, theirs)
