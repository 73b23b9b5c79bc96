"""Running statistics and the penalty: values, updates, merging, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import TABLE, Normalizer, normalize
from normjax import linen as nl
from normjax.penalty import l1_penalty, total_penalty
from normjax.running import Running, as_stats, initial, merge, observe, shapes, stores, update
from normjax.theory import Stats
from tests.rows import ROWS, example

STORED = [name for name, n in ROWS.items() if any(stores(n))]


def test_exactly_the_moments_whose_field_mixes_examples_are_stored():
    stored = {name: tuple(stores(n)) for name, n in TABLE.items() if any(stores(n))}
    both = ("batch", "ghost", "l1_batch", "variance")
    assert stored == {**dict.fromkeys(both, (True, True)), "mean_only": (True, False)}
    assert stores(Normalizer("@data ...", "c")) == (True, False)


@pytest.mark.parametrize("name", STORED)
def test_stored_shapes_are_flax_s(name):
    assert shapes(ROWS[name], "n c ...", (8, 3, 4, 4)) == tuple((3,) if s else None for s in stores(ROWS[name]))


@pytest.mark.parametrize("name", STORED)
def test_an_update_moves_towards_the_batch(name):
    n, x = ROWS[name], example(name)
    before = initial(n, "n ... c", x.shape)
    batch = observe(normalize(x, n).stats, n, "n ... c", x.shape)
    after = update(before, batch, 0.75)
    for old, new, seen in zip(before, after, batch[:2], strict=True):
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
    after = update(old, batch, 0.5)
    assert after.mean.tolist() == [1.0, 1.0, 1.0]
    assert after.var.tolist() == [1.5, 1.5, 1.5]


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
