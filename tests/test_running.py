"""Running statistics and the penalty: values, updates, merging, shards."""

import re
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from normjax import TABLE, Normalizer, normalize, running
from normjax import linen as nl
from normjax import nnx as nn
from normjax.conditional import denominator
from normjax.kalman import require_kalman_row
from normjax.penalty import l1_penalty, total_penalty
from normjax.recurrent import needs_clock, normalize_site, site_slots, start_sigma
from normjax.running import (
    Running,
    as_stats,
    corrections,
    initial,
    limits_at,
    merge,
    merge_stacked,
    mergeable,
    observe,
    record,
    require_renormalizable,
    require_unbiased,
    slots,
    stores,
    unbiased,
    update,
)
from normjax.theory import Stats
from normjax.unbiased import with_ddof
from tests.rows import ROWS, example

STORED = [name for name, n in ROWS.items() if any(stores(n))]


def test_exactly_the_moments_whose_field_mixes_examples_are_stored():
    stored = {name: tuple(stores(n)) for name, n in TABLE.items() if any(stores(n))}
    both = ("batch", "ghost", "l1_batch", "variance")
    assert stored == {**dict.fromkeys(both, (True, True)), "mean_only": (True, False)}
    assert stores(Normalizer("@data ...", "c")) == (True, False)


@pytest.mark.parametrize("name", STORED)
def test_stored_shapes_are_flax_s(name):
    found = slots(ROWS[name], "n c ...", (8, 3, 4, 4))
    names = [name for name, stored in zip(("mean", "var"), stores(ROWS[name]), strict=True) if stored]
    assert {name: (slot.shape, slot.dtype) for name, slot in found.items()} == dict.fromkeys(names, ((3,), np.float32))


@pytest.mark.parametrize("name", STORED)
def test_an_update_moves_towards_the_batch(name):
    n, x = ROWS[name], example(name)
    before = initial(n, "n ... c", x.shape)
    batch = observe(normalize(x, n).stats, n, "n ... c", x.shape)
    after = cast(Any, update(before, batch, 0.75))
    for old, new, seen in zip(before[:2], after[:2], batch[:2], strict=True):
        if old is not None:
            np.testing.assert_allclose(new, 0.75 * old + 0.25 * seen, rtol=1e-6)
            assert new.dtype == jnp.float32


def test_ghost_statistics_are_the_means_over_the_blocks():
    x = example("ghost")
    n = Normalizer("n/4 ...", "n/4 ...")
    batch = observe(normalize(x, n).stats, n, "n ... c", x.shape)
    blocks = x.reshape(4, -1, 16).astype(np.float64)
    np.testing.assert_allclose(batch.mean, blocks.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.var, blocks.var(1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(batch.mean_weight, x.size / 16)


def test_inference_takes_another_batch_size_and_space():
    n = TABLE["batch"]
    running = Running(jnp.arange(3.0), jnp.ones(3) * 4)
    x = np.random.default_rng(0).normal(size=(5, 7, 2, 3)).astype(np.float32)
    y = normalize(x, n, stats=as_stats(running, n, "n ... c", x.shape)).y
    np.testing.assert_allclose(y, (x - np.arange(3)) / np.sqrt(4 + 1e-5), rtol=1e-5, atol=1e-6)


def test_nothing_that_is_not_finite_or_without_weight_is_stored():
    old = Running(jnp.ones(3), jnp.ones(3))
    batch = Stats(
        jnp.array([jnp.nan, 5.0, jnp.inf]), jnp.array([2.0, 2.0, 2.0]), jnp.array([1.0, 0.0, 1.0]), jnp.ones(3)
    )
    after = cast(Any, update(old, batch, 0.5))
    assert after.mean.tolist() == [1.0, 1.0, 1.0]
    assert after.var.tolist() == [1.0, 1.5, 1.0]  # no variance without its mean


def test_a_masked_batch_leaves_running_statistics_as_they_were():
    layer, x = nl.BatchNorm(use_running_average=False), jnp.asarray(example("batch"))
    variables = layer.init(jax.random.key(0), x)
    _, changed = layer.apply(variables, x, mask=jnp.zeros(x.shape, bool), mutable=["batch_stats"])
    assert jax.tree.map(jnp.array_equal, changed["batch_stats"], variables["batch_stats"]) == {
        "mean": True,
        "var": True,
    }


@pytest.mark.parametrize("name", ["batch", "variance", "rms_batch"])
def test_merged_statistics_are_those_of_the_whole(name):
    n = Normalizer(None, "n ...") if name == "rms_batch" else TABLE[name]
    x = example("batch")

    def seen(x):
        return observe(normalize(x, n).stats, n, "n ... c", x.shape)

    merged = merge(merge(seen(x[:3]), seen(x[3:4])), seen(x[4:]))
    for got, want in zip(merged, seen(x), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_penalty_counts_valid_elements_of_all_shards():
    v = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    mask = np.random.default_rng(1).uniform(size=(4, 6)) > 0.5
    mask[2] = False  # an empty shard
    got = jax.vmap(lambda v, m: l1_penalty(v, 0.1, mask=m, axis_name="d"), axis_name="d")(v, mask)
    np.testing.assert_allclose(got, 0.1 * np.abs(v[mask]).mean(), rtol=1e-6)


def test_penalty_is_float32_and_its_gradient_is_the_sign():
    v = jnp.asarray(example("token"), jnp.bfloat16)
    assert l1_penalty(v).dtype == jnp.float32
    gradient = jax.grad(lambda v: l1_penalty(v, 2.0))(v.astype(jnp.float32))
    np.testing.assert_allclose(gradient, 2 * np.sign(v.astype(jnp.float32)) / v.size, rtol=1e-6)


def test_penalties_are_weighted_by_layer():
    losses = {"a": {"norm": {"l1": jnp.array(1.0)}}, "b": {"norm": {"l1": jnp.array(2.0)}}}
    assert total_penalty(losses) == 3
    assert total_penalty(losses, {"a": 10.0}, default=0.0) == 10
    assert total_penalty({}) == 0


# How a batch moves what is stored.


def batches(steps=5, seed=0):
    return np.random.default_rng(seed).normal(2, 3, (steps, 8, 4)).astype(np.float32)


@pytest.mark.parametrize("averaging", ["exponential", "debiased", "cumulative"])
def test_averages_equal_their_formula_in_float64(averaging):
    n, momentum, seen = TABLE["batch"], 0.9, batches()
    running = cast(Any, initial(n, "n c", seen.shape[1:], averaging))
    for t, x in enumerate(seen, 1):
        running = cast(Any, update(running, observe(normalize(x, n).stats, n, "n c", x.shape), momentum, averaging))
        weights = momentum ** np.arange(t - 1, -1, -1) * (1 - momentum)
        exact = seen[:t].astype(np.float64)
        for got, each, start in ((running.mean, exact.mean(1), 0), (running.var, exact.var(1), 1)):
            want = {
                "exponential": weights @ each + momentum**t * start,
                "debiased": weights @ each / weights.sum(),
                "cumulative": each.mean(0),
            }[averaging]
            np.testing.assert_allclose(got, want, rtol=2e-6)
    if averaging != "exponential":
        assert running.mean_count.tolist() == running.var_count.tolist() == [5] * 4
        assert running.mean_count.dtype == jnp.int32


@pytest.mark.parametrize("averaging", ["debiased", "cumulative"])
def test_an_element_that_was_never_seen_does_not_count(averaging):
    n, seen = TABLE["batch"], batches()
    mask = np.ones((8, 4), bool)
    mask[:, 1] = False
    running = cast(Any, initial(n, "n c", mask.shape, averaging))
    for x, m in ((seen[0], mask), (seen[1], None)):
        batch = observe(normalize(x, n, mask=m).stats, n, "n c", x.shape)
        running = cast(Any, update(running, batch, 0.9, averaging))
    assert running.mean_count.tolist() == [2, 1, 2, 2]
    np.testing.assert_allclose(running.mean[1], seen[1, :, 1].mean(), rtol=1e-5)  # the start, 0, has no weight in it


def test_a_debiased_average_with_momentum_one_is_the_cumulative_one():
    batch = Stats(jnp.array([4.0]), None, jnp.array([1.0]), None)
    running = Running(jnp.array([2.0]), mean_count=jnp.array([1]))
    assert update(running, batch, 1.0, "debiased") == update(running, batch, 1.0, "cumulative")
    assert update(running, batch, jnp.asarray(0.5), "debiased") == update(running, batch, 0.5, "debiased")


def test_statistics_stay_float32_whatever_they_met():
    batch = Stats(jnp.array([4.0]), jnp.array([1.0]), jnp.array([1.0]), jnp.array([1.0]))
    after = cast(Any, update(Running(jnp.zeros(1, jnp.bfloat16), jnp.ones(1, jnp.float16)), batch, 0.5))
    assert (after.mean.dtype, after.var.dtype) == (jnp.float32, jnp.float32)


def test_unbiased_variance_counts_the_elements_of_each_block():
    x = batches(1)[0]
    for field, blocks in (("n", 1), ("n/2", 2)):
        n = Normalizer(field, field)
        got = observe(unbiased(normalize(x, n).stats), n, "n c", x.shape)
        want = x.astype(np.float64).reshape(blocks, -1, 4).var(1, ddof=1).mean(0)
        np.testing.assert_allclose(got.var, want, rtol=2e-6)
    lone = unbiased(normalize(x, "batch", mask=np.arange(8)[:, None] == 0).stats)
    assert (np.asarray(lone.var_weight) == 0).all()  # no unbiased variance of one element: nothing is stored


def renormalized(x, mean, var, r_max, d_max, momentum):
    """Algorithm 1 of Ioffe 2017 in NumPy float64: y, and the statistics afterwards."""
    m, s, stored = x.mean(0), np.sqrt(x.var(0) + 1e-5), np.sqrt(var + 1e-5)
    r, d = np.clip(s / stored, 1 / r_max, r_max), np.clip((m - mean) / stored, -d_max, d_max)
    return (x - m) / s * r + d, momentum * mean + (1 - momentum) * m, momentum * var + (1 - momentum) * x.var(0)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0)])
def test_batch_renorm_equals_the_algorithm_in_linen_and_nnx(limits):
    x = batches()[0].astype(np.float64)
    mean, var = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0, 30.0])
    y, *after = renormalized(x, mean, var, limits[0], limits[1], 0.9)
    stored = {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32)}
    given, scale = jnp.asarray(x, jnp.float32), jnp.array([1.0, 2.0, 3.0, 4.0])
    one: Any = nl.BatchRenorm(r_max=limits[0], d_max=limits[1], momentum=0.9)
    got, changed = one.apply(
        {"params": {"scale": scale, "bias": -scale}, "batch_stats": stored}, given, False, mutable=["batch_stats"]
    )
    two: Any = nn.BatchRenorm(4, limits[0], limits[1], momentum=0.9, rngs=nnx.Rngs(0))
    nnx.update(two, {**stored, "scale": scale, "bias": -scale})
    for mine, stats in ((got, changed["batch_stats"]), (two(given), {"mean": two.mean[...], "var": two.var[...]})):
        np.testing.assert_allclose(mine, y * np.asarray(scale) - np.asarray(scale), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose([stats["mean"], stats["var"]], after, rtol=1e-5)
    # With limits that never bind, training and inference agree on the statistics from before.
    inference = one.apply({"params": {"scale": scale, "bias": -scale}, "batch_stats": stored}, given, True)
    assert (limits == (3.0, 5.0)) == bool(np.allclose(inference, got, atol=1e-4))


def test_limits_at_the_call_replace_those_of_the_layer_and_may_be_traced():
    x, layer = jnp.asarray(batches()[0]), nl.BatchRenorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def at(step):
        return layer.apply(variables, x, renorm=limits_at(step), mutable=["batch_stats"])[0]

    np.testing.assert_allclose(at(0), normalize(x, "batch").y, atol=1e-6)
    assert jnp.abs(at(100_000) - at(0)).max() > 0.1


@pytest.mark.slow
def test_batch_renorm_sends_no_gradient_through_its_corrections_and_masks_to_the_bias():
    x, mask = jnp.asarray(batches()[0]), np.random.default_rng(1).uniform(size=(8, 4)) > 0.4
    mask[:, 3] = False
    stored = {"mean": jnp.ones(4), "var": jnp.full(4, 4.0)}
    layer = nl.BatchRenorm(use_running_average=False, use_scale=False)
    poisoned = jnp.where(mask, x, jnp.nan)

    def value(x):
        variables = {"batch_stats": stored, "params": {"bias": jnp.full(4, 7.0)}}
        y, changed = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return jnp.sum(jnp.cos(y)), (y, changed["batch_stats"])

    gradient, (y, after) = jax.grad(value, has_aux=True)(poisoned)
    assert (y[~mask] == 7).all()
    assert jnp.isfinite(gradient).all()
    assert after["mean"][3] == 1  # a channel without valid elements keeps its statistics
    batch = normalize(poisoned, "batch", mask=mask)
    r = jnp.sqrt(batch.stats.var + 1e-5) / jnp.sqrt(4 + 1e-5)
    d = (batch.stats.mean - 1) / jnp.sqrt(4 + 1e-5)
    fixed = jax.grad(lambda x: jnp.sum(jnp.cos(jnp.where(mask, normalize(x, "batch", mask=mask).y * r + d, 0) + 7)))
    np.testing.assert_allclose(gradient, fixed(poisoned), atol=1e-6)


@pytest.mark.parametrize("averaging", ["debiased", "cumulative"])
def test_modules_store_counts_only_where_they_need_them(averaging):
    x = jnp.asarray(batches()[0])
    layer: Any = nl.Norm("batch", "n c", use_running_average=False, averaging=averaging, unbiased=True)
    variables = layer.init(jax.random.key(0), x)
    assert variables["batch_stats"]["mean_count"].tolist() == [0] * 4  # never updated at init
    _, changed = layer.apply(variables, x, mutable=["batch_stats"])
    twin = nn.Norm(4, "batch", layout="n c", averaging=averaging, unbiased=True, rngs=nnx.Rngs(0))
    twin(x)
    assert {k: v.tolist() for k, v in changed["batch_stats"].items()} == {
        k: v[...].tolist() for k, v in nnx.state(twin, nnx.BatchStat).items()
    }
    np.testing.assert_allclose(changed["batch_stats"]["var"], np.var(x, 0, ddof=1), rtol=1e-6)  # the first batch itself
    assert "mean_count" not in nl.Norm("batch", "n c").init(jax.random.key(0), x, False)["batch_stats"]


def test_a_layer_may_normalize_with_the_batch_and_store_nothing():
    x = jnp.asarray(batches()[0])
    layer: Any = nl.Norm("batch", "n c", use_running_average=False, update_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x)  # nothing is mutable, and nothing has to be
    np.testing.assert_allclose(y, normalize(x, "batch").y, atol=1e-6)
    model: Any = nnx.Sequential(nn.Norm(4, "batch", layout="n c", rngs=nnx.Rngs(0)))
    kept: Any = nnx.view(model, update_running_average=False)
    np.testing.assert_allclose(kept(x), y, atol=1e-6)
    assert (kept.layers[0].mean[...] == 0).all()
    model(x)
    assert (model.layers[0].mean[...] != 0).all()


def test_stored_statistics_carry_sharding_names():
    x = jnp.asarray(batches()[0])
    for layer in (
        nl.Norm("batch", "n c", use_running_average=False, averaging="debiased", stats_names=("model",)),
        nl.BatchNorm(use_running_average=False, stats_names=("model",)),
    ):
        variables = layer.init(jax.random.key(0), x)
        specs = linen.get_partition_spec(variables)["batch_stats"]
        assert set(specs.values()) == {jax.sharding.PartitionSpec("model")}
        y, changed = layer.apply(variables, x, mutable=["batch_stats"])
        boxed = changed["batch_stats"]["mean"]
        assert isinstance(boxed, linen.Partitioned)
        assert boxed.names == ("model",)
        rate = 1.0 if isinstance(layer, nl.Norm) else 0.01
        np.testing.assert_allclose(boxed.value, rate * np.asarray(x).mean(0), rtol=1e-4)
        np.testing.assert_allclose(y, normalize(x, "batch").y, atol=1e-6)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        twin = nn.Norm(4, "batch", layout="n c", stats_metadata={"out_sharding": ("model",)}, rngs=nnx.Rngs(0))
        specs = jax.tree.leaves(nnx.get_partition_spec(nnx.state(twin, nnx.BatchStat)))
        assert specs == [jax.sharding.PartitionSpec("model")] * 2
        assert cast(Any, twin.mean[...].sharding).spec == specs[0]


def test_inference_needs_no_counts():
    x = jnp.asarray(batches()[0])
    layer: Any = nl.Norm("batch", "n c", averaging="debiased", use_scale=False, use_bias=False)
    plain = {"batch_stats": {"mean": jnp.ones(4), "var": jnp.full(4, 4.0)}}  # a checkpoint of Flax
    np.testing.assert_allclose(layer.apply(plain, x, True), (x - 1) / np.sqrt(4 + 1e-5), rtol=1e-5, atol=1e-6)


def test_a_value_that_float32_cannot_hold_is_not_stored():
    with jax.enable_x64(True):
        batch = Stats(jnp.array([1.0]), jnp.array([1e50]), jnp.array([2.0]), jnp.array([2.0]))
        after = cast(Any, update(Running(jnp.zeros(1, jnp.float32), jnp.ones(1, jnp.float32)), batch, 0.5))
    assert (after.mean.item(), after.var.item()) == (0.0, 1.0)


@pytest.mark.slow
def test_batch_renorm_takes_any_dtypes_and_a_stored_spread_of_zero():
    n = Normalizer("n", "n", eps=0.0)
    with jax.enable_x64(True):
        x = jnp.asarray(batches()[0], jnp.float64)
        stored = Running(jnp.zeros(4, jnp.float32), jnp.array([0.0, 1.0, 4.0, 9.0], jnp.float32))
        limits = (jnp.asarray(3.0, jnp.bfloat16), 5.0)
        r, d = corrections(normalize(x, n, "n c").stats, stored, n, "n c", x.shape, limits)
        assert r.dtype == d.dtype == jnp.float64
        want = np.clip(np.std(x, 0)[1:] / np.array([1.0, 2.0, 3.0]), 1 / 3, 3)
        np.testing.assert_allclose(r[0], [3.0, *want], rtol=1e-6)  # against nothing, everything is large
    with pytest.raises(TypeError, match="which complex numbers have not"):
        nn.BatchRenorm(4, rngs=nnx.Rngs(0))(jnp.ones((8, 4), jnp.complex64))


def test_stored_statistics_of_blocks_normalize_any_number_of_examples():
    x = np.random.default_rng(0).normal(2, 3, (16, 4)).astype(np.float32)
    layer = nl.Norm("ghost", use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    _, stored = layer.apply(variables, x, mutable=["batch_stats"])
    y = nl.Norm("ghost", use_running_average=True).apply({**variables, **stored}, x[:3])
    parts = np.asarray(x, np.float64).reshape(8, 2, 4)
    expected = (x[:3] - parts.mean((0, 1))) / np.sqrt(parts.var(1).mean(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y), expected, atol=1e-5)


def test_moments_without_a_mean_merge_in_their_own_dtype_under_x64():
    with jax.enable_x64(True):
        parts = Stats(None, jnp.ones(2, jnp.float32), None, jnp.ones(2, jnp.float32))
        assert merge_stacked(parts).var.dtype == jnp.float32


ALONG = "n c", (4, 2)
BATCH = normalize(jnp.arange(8.0).reshape(4, 2), "batch").stats
SEEN = Running(jnp.zeros(2), jnp.ones(2))
OF_A_ROW = {
    "initial": lambda n: initial(n, *ALONG),
    "slots": lambda n: slots(n, *ALONG),
    "as_stats": lambda n: as_stats(SEEN, n, *ALONG),
    "observe": lambda n: observe(BATCH, n, *ALONG),
    "record": lambda n: record(SEEN, BATCH, n, *ALONG, momentum=0.5, unbiased=True)[0],
    "corrections": lambda n: corrections(BATCH, SEEN, n, *ALONG),
    "renormalized": lambda n: running.renormalized(BATCH, jnp.ones((1, 2)), jnp.ones((1, 2)), n),
    "require_renormalizable": lambda n: require_renormalizable(n, (3.0, 5.0)),
    "require_unbiased": require_unbiased,
    "mergeable": lambda n: mergeable(n, "n c"),
    "require_kalman_row": require_kalman_row,
    "denominator": lambda n: denominator(jnp.ones((1, 2)), n),
    "with_ddof": lambda n: with_ddof(n, 4).gain,
    "site_slots": lambda n: site_slots(n, 2, 3),
    "needs_clock": lambda n: needs_clock(n, 3),
    "start_sigma": lambda n: start_sigma(n, True, None),
    "normalize_site": lambda n: normalize_site(jnp.arange(8.0).reshape(4, 2), n, SEEN),
}


@pytest.mark.parametrize("name", OF_A_ROW)
def test_what_takes_a_row_takes_its_name_in_the_table(name):
    chex.assert_trees_all_equal(OF_A_ROW[name]("batch"), OF_A_ROW[name](TABLE["batch"]))
    with pytest.raises(ValueError, match="no normalizer is called 'bach'; did you mean 'batch'"):
        OF_A_ROW[name]("bach")


PAIR: Any = (jnp.zeros(2), jnp.ones(2))
WHOLE: Any = normalize(jnp.ones((4, 2)), "batch")
STORED_ONES: Any = SEEN
MISTAKEN = {
    "a pair is stored": (
        lambda: update(PAIR, BATCH),
        TypeError,
        "are a normjax.running.Running(mean, var); found tuple",
    ),
    "stored, as a batch": (lambda: update(SEEN, STORED_ONES), TypeError, "of a batch are a normjax.Stats"),
    "a pair beside x": (lambda: as_stats(PAIR, "batch", *ALONG), TypeError, "found tuple"),
    "all that normalize gives": (
        lambda: observe(WHOLE, "batch", *ALONG),
        TypeError,
        "(...).stats` or of `observe`; found N",
    ),
    "x for its shape": (lambda: observe(BATCH, "batch", "n c", PAIR[0]), TypeError, "such as x.shape; found ArrayImpl"),
    "another shape": (lambda: observe(BATCH, "batch", "n c", (4, 3)), ValueError, "(1, 2) are not those of an array"),
    "no weights": (lambda: merge(Stats(jnp.ones(2)), Stats(jnp.ones(2))), ValueError, "these lack mean_weight"),
    "momentum": (
        lambda: running.merge_averages(jnp.ones((2, 1)), jnp.ones((2, 1)), 2.0),
        ValueError,
        "momentum is a num",
    ),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_what_is_mistaken_for_statistics_is_refused(name):
    call, kind, text = MISTAKEN[name]
    with pytest.raises(kind, match=re.escape(text)):
        call()
