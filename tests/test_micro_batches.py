"""Micro-batches: gradients, metrics and everything that a model stores come back as of the whole batch, in linen and nnx."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from normjax import linen as nl
from normjax import nnx as nx
from normjax import train
from tests.rows import jit

SGD = optax.sgd(1.0)
X = np.random.default_rng(0).normal(1, 2, (16, 6)).astype(np.float32)


class Ema(nnx.Variable):
    """A variable of a type that no library knows."""


class Remembering(nn.Module):
    """A model that keeps an average of its input, a counter, and running statistics of Flax's and of ours."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, shift=0.0):
        ema, count = (
            self.variable("ema", "e", jnp.zeros, 6, self.dtype),
            self.variable("other", "n", jnp.zeros, (), int),
        )
        ema.value, count.value = 0.5 * ema.value.astype(jnp.float32) + 0.5 * x.mean(0), count.value + 1
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, name="flax")(x)
        return nn.Dense(1)(nl.BatchNorm(use_running_average=False, momentum=0.9, name="ours")(x)) + shift


class NNXRemembering(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        self.e, self.n = Ema(jnp.zeros(6, dtype)), nnx.Variable(jnp.zeros((), int))
        self.flax = nnx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0))
        self.ours = nx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0))
        self.dropout, self.last = nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.Linear(6, 1, rngs=nnx.Rngs(0))

    def __call__(self, x, shift=0.0):
        self.e[...] = (0.5 * self.e[...].astype(jnp.float32) + 0.5 * x.mean(0)).astype(self.e[...].dtype)
        self.n[...] += 1
        return self.last(self.dropout(self.ours(self.flax(x)))) + shift


def mean_loss(call, batch, train):
    return jnp.mean(call(batch["x"], batch.get("shift", 0.0))), {}


def make(model, loss=mean_loss, tx=SGD, x: Any = X, **options):
    """The first state of a model of either library, and its step."""
    if isinstance(model, nn.Module):
        state = jit(lambda key: train.linen_init(model, tx, key, x))(jax.random.key(0))
        return state, train.linen_step(model, loss, tx, **options)
    structure, state = train.nnx_init(model, tx)
    return state, train.nnx_step(structure, loss, tx, **options)


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def stored(stats):
    """What `Remembering` stores, by name."""
    if isinstance(stats, nnx.State):
        stats = nnx.to_pure_dict(stats)
        return stats["e"], stats["n"], stats["flax"], stats["ours"]
    return stats["ema"]["e"], stats["other"]["n"], stats["batch_stats"]["flax"], stats["batch_stats"]["ours"]


def alike(before, after):
    """Equal structure, shapes and dtypes."""
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert jax.tree.map(lambda a: a.dtype, before) == jax.tree.map(lambda a: a.dtype, after)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (Remembering, jnp.float32),
        slow(NNXRemembering, jnp.bfloat16),
        slow(NNXRemembering, jnp.float32),
        slow(Remembering, jnp.bfloat16),
    ],
)
def test_what_is_no_running_statistic_is_updated_part_by_part_and_statistics_are_merged(model, dtype):
    with jax.numpy_rank_promotion("allow"):
        start, step = make(model(dtype), micro_batches=4)
        state, step, key = start, jit(step), jax.random.key(2)
        want, calls = np.asarray(stored(start.stats)[0], np.float64), stored(start.stats)[1]
        for _ in range(2):
            state, _ = step(state, {"x": X}, key)
            for k in range(4):
                want = 0.5 * want + 0.5 * X[k::4].mean(0, np.float64)
    alike(start, state)
    ema, count, flax, ours = stored(state.stats)
    np.testing.assert_allclose(ema.astype(jnp.float32), want, rtol=1e-5 if dtype == jnp.float32 else 0.02)
    assert count == calls + 8
    for name, batch, old in (("mean", X.mean(0, np.float64), 0.0), ("var", X.var(0, dtype=np.float64), 1.0)):
        np.testing.assert_allclose(flax[name], 0.81 * old + 0.19 * batch, rtol=1e-4, err_msg=name)
        assert ours[name].shape == (6,)
    if model is NNXRemembering:
        before, after = start.stats["dropout"]["rngs"]["count"], state.stats["dropout"]["rngs"]["count"]
        assert (before[...], after[...]) == (0, 8)


class Scanned(nn.Module):
    """Flax's batch norm side by side, in a lifted layer."""

    @nn.compact
    def __call__(self, x, shift=0.0):
        axes: Any = {"params": 0, "batch_stats": 0}
        each = nn.vmap(nn.BatchNorm, in_axes=0, variable_axes=axes, split_rngs={"params": True}, axis_size=2)
        return each(use_running_average=False, momentum=0.9)(jnp.stack([x, 3 * x]))


@pytest.mark.slow
def test_flax_batch_norms_side_by_side_merge_too():
    found = []
    with jax.numpy_rank_promotion("allow"):
        for parts in (1, 4):
            state, step = make(Scanned(), micro_batches=parts)
            found.append(jit(step)(state, {"x": X})[0].stats)
    close(*found)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_gradients_and_metrics_of_many_parts_keep_their_digits_in_bfloat16(api):
    ones = {"kernel_init": nn.initializers.ones, "param_dtype": jnp.bfloat16, "use_bias": False}
    model = nn.Dense(1, **ones) if api == "linen" else nnx.Linear(1, 1, **ones, rngs=nnx.Rngs(0))

    def loss(call, x, train_mode):
        y = jnp.mean(call(x))
        return y, {"one": y, "n": train.Sum(y), "mean": train.Mean(y, y)}

    x = jnp.ones((512, 1), jnp.bfloat16)
    state, step = make(model, loss, x=x, micro_batches=512)
    after, metrics = jit(step)(state, x)
    assert jax.tree.leaves(after.params)[0].dtype == jnp.bfloat16
    assert jax.tree.leaves(after.params)[0].item() == 0  # one step of size 1 along a gradient of 1
    assert {name: float(m) for name, m in metrics.items()} == {"loss": 1, "penalty": 0, "one": 1, "n": 512, "mean": 1}


def uneven(call, batch, train_mode):
    """A mean over tokens under a mask, and metrics of every kind; a part may have no token at all."""
    error, mask = (call(batch["x"], batch["mask"][..., None])[..., 0] - batch["y"]) ** 2, batch["mask"]
    count = jnp.sum(mask)
    metrics = {
        "error": train.Mean(jnp.sum(jnp.abs(error) * mask), count),
        "plain": jnp.sum(error * mask) / count,  # 0/0 where a part is empty
        "tokens": train.Sum(count),
        "hits": {"by position": train.Sum(jnp.sum((error < 4) & (mask > 0), 0))},
    }
    return train.Mean(jnp.sum(error * mask), count), metrics


def tokens():
    """8 examples of 5 tokens of 3 features; unequally many count, none in the fourth part of four."""
    rng = np.random.default_rng(3)
    mask = (rng.random((8, 5)) < np.linspace(0.2, 1, 8)[:, None]).astype(np.float32)
    mask[3::4] = 0
    x, y = rng.normal(size=(8, 5, 3)).astype(np.float32), rng.normal(size=(8, 5)).astype(np.float32)
    return {"x": x, "y": y, "mask": mask}


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return nn.Dense(1)(nl.Norm("token", l1=0.1)(nn.Dense(4)(x), mask=mask))


class NNXMasked(nnx.Module):
    def __init__(self):
        self.first, self.last = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))
        self.norm = nx.Norm(4, "token", l1=0.1, rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.last(self.norm(self.first(x), mask=mask))


@pytest.mark.parametrize("api", ["linen", slow("nnx")])
def test_a_mean_over_tokens_is_that_of_the_whole_batch_and_counts_are_sums(api):
    batch, found = tokens(), []
    for parts in (1, 4):
        if api == "linen":
            model = Masked()
            state = jit(lambda key: train.linen_init(Masked(), SGD, key, batch["x"], batch["mask"][..., None]))(
                jax.random.key(0)
            )
            step = train.linen_step(model, uneven, SGD, micro_batches=parts)
            evaluate = train.linen_eval(model, uneven)
        else:
            structure, state = train.nnx_init(NNXMasked(), SGD)
            step = train.nnx_step(structure, uneven, SGD, micro_batches=parts)
            evaluate = train.nnx_eval(structure, uneven)
        after, metrics = jit(step)(state, batch)
        found.append((after.params, metrics))
    for params, metrics in found[1:]:
        close(found[0], (params, metrics), rtol=1e-4)
        alike(found[0], (params, metrics))
    assert metrics["tokens"] == batch["mask"].sum()
    assert metrics["hits"]["by position"].dtype == jnp.int32
    np.testing.assert_allclose(metrics["loss"], metrics["plain"], rtol=1e-5)
    evaluated = jit(evaluate)(state, batch)
    close({k: v for k, v in found[0][1].items() if k != "penalty"}, evaluated)

    names = ("Dense_1", "Norm_0", "Dense_0") if api == "linen" else ("first", "norm", "last")
    params = state.params if api == "linen" else nnx.to_pure_dict(state.params)
    first, norm, last = (jax.tree.map(lambda a: np.asarray(a, np.float64), params[name]) for name in names)
    h = batch["x"] @ first["kernel"] + first["bias"]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    error = ((h @ last["kernel"] + last["bias"])[..., 0] - batch["y"]) ** 2
    np.testing.assert_allclose(metrics["loss"], np.sum(error * batch["mask"]) / batch["mask"].sum(), rtol=1e-5)


def test_a_loss_that_is_a_sum_is_summed_over_the_parts():
    def loss(call, x, train_mode):
        return train.Sum(jnp.sum(call(x))), {}

    found = []
    for parts in (1, 4):
        state, step = make(nn.Dense(1), loss, x=X, micro_batches=parts)
        found.append(jit(step)(state, X))
    close(*found, rtol=1e-4)
    np.testing.assert_allclose(found[0][0].params["bias"], -16, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Remembering, NNXRemembering])
def test_leaves_without_examples_are_given_to_every_part(model):
    def loss(call, batch, train_mode):
        assert batch["w"].shape == (5,)
        return jnp.mean(call(batch["x"], batch["shift"])) * batch["w"].sum() * batch["n"], {"w": batch["w"]}

    state, step = make(model(), loss, micro_batches=2)
    batch = {"x": X, "shift": 0.5, "w": train.Shared(jnp.full(5, 0.2)), "n": jnp.array(1.0), "none": None}
    with jax.numpy_rank_promotion("allow"):
        after, metrics = jit(step)(state, batch)
        last, steps = train.epoch(step)(state, batch, np.arange(16).reshape(1, 16))  # not compiled, on NumPy's data
    close((after.params, metrics), (last.params, jax.tree.map(lambda a: a[0], steps)))
    assert metrics["w"].shape == (5,)


def test_leaves_that_fit_no_part_are_named():
    state, step = make(Remembering(), micro_batches=2)
    with pytest.raises(
        ValueError, match=r"leaf 'w' of the batch has 6 .* leaf 'x' has 16: give what .* `train.Shared`"
    ):
        step(state, {"x": X, "y": X, "w": np.ones(6)})
    with pytest.raises(ValueError, match="has arrays with examples along their first axis; found none"):
        step(state, {"x": 1.0})


class Growing(nn.Module):
    what: str

    @nn.compact
    def __call__(self, x, shift=0.0):
        if self.what == "sown":
            self.sow("seen", "m", x.mean())
        if self.what == "by example":
            self.variable("last", "x", jnp.zeros, x.shape).value = x
        last = self.variable("last", "mean", jnp.zeros, ())
        if self.what == "complex" and not self.is_initializing():
            last.value = x.mean().astype(jnp.complex64)
        return nn.Dense(1)(x)


def test_what_cannot_go_from_part_to_part_is_named():
    for what, message in {
        "sown": r"what is stored changes in a step \(seen/m/1\), so that micro-batches cannot carry it on: create",
        "by example": r"last/x has the shape \(16, 6\) before a micro-batch and \(8, 6\) after it",
        "complex": r"last/mean is float32 in the state and complex64 after a step, .* cast it to complex64 once",
    }.items():
        state, step = make(Growing(what), micro_batches=2)
        with pytest.raises((TypeError, ValueError), match=message):
            step(state, {"x": X})
    state, step = make(Growing("sown"))
    with pytest.raises(ValueError, match=r"changes in a step \(stats/seen/m/1\), so that an epoch cannot carry it on"):
        train.epoch(step)(state, {"x": X}, np.arange(16).reshape(2, 8))


class Late(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        if train:
            self.variable("ema", "e", jnp.zeros, 6)
        return nn.Dense(1)(x)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_collection_that_init_did_not_make_is_named(parts):
    def loss(call, batch, train):
        return jnp.mean(call(batch["x"], train)), {}

    state = train.linen_init(Late(), SGD, jax.random.key(0), X, False)
    step = train.linen_step(Late(), loss, SGD, micro_batches=parts)
    with pytest.raises(ValueError, match=r'"e" from collection "ema" .* `linen_init` makes every variable: give it'):
        step(state, {"x": X})


@pytest.mark.slow
@pytest.mark.parametrize("model", [Remembering, NNXRemembering])
def test_on_four_devices_micro_batches_are_those_of_one(model):
    def loss(call, batch, train_mode):
        y = call(batch["x"])[:, 0] * batch["scale"]
        return train.Mean(jnp.sum(y * batch["w"]), jnp.sum(batch["w"])), {"n": train.Sum(jnp.sum(batch["w"]))}

    mesh = jax.make_mesh((4,), ("data",))
    data = {"x": X, "w": np.arange(16.0, dtype=np.float32), "scale": train.Shared(jnp.full(1, 2.0))}
    order, key = np.arange(16).reshape(2, 8), jax.random.key(0)
    found = []
    with jax.numpy_rank_promotion("allow"):
        for here in (None, mesh):
            state, step = make(model(), loss, micro_batches=2, mesh=here)
            placed = state if here is None else train.place(state, here)
            batches = data if here is None else train.shard(data, here)
            run = jit(train.epoch(step, mesh=here), donate_argnums=() if here is None else 0)
            found.append(run(placed, batches, order, key))
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(found[1][0]))
    (one, metrics), (four, others) = found
    one, four = (jax.tree.map(raw, s) for s in (one, four))
    close((one, metrics), (four, others), rtol=1e-4)


def raw(a):
    """A key as numbers; anything else as it is."""
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


@pytest.mark.slow
def test_seeds_side_by_side_have_parts_of_their_own():
    state, step = make(Remembering(), micro_batches=2)
    batch = {"x": X}
    states = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state)
    with jax.numpy_rank_promotion("allow"):
        together, metrics = jit(jax.vmap(step, in_axes=(0, None)))(states, batch)
        for k in range(2):
            alone = jit(step)(jax.tree.map(lambda a, k=k: a[k], states), batch)
            close(alone, jax.tree.map(lambda a, k=k: a[k], (together, metrics)), rtol=1e-4)


class Twins(nn.Module):
    """One layer, called twice."""

    @nn.compact
    def __call__(self, x):
        norm = nl.BatchNorm(use_running_average=False, momentum=0.5)
        return norm(x) + norm(3 * x + 1)


class NNXTwins(nnx.Module):
    def __init__(self):
        self.norm = nx.BatchNorm(6, momentum=0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x) + self.norm(3 * x + 1)


@pytest.mark.parametrize("model", [Twins, slow(NNXTwins)])
def test_a_layer_that_is_called_twice_merges_each_call(model):
    state, step = make(model(), lambda call, x, train: (jnp.mean(call(x)), {}), micro_batches=4)
    after, _ = jit(step)(state, X)
    norm = after.stats["norm"] if model is NNXTwins else after.stats["batch_stats"]["BatchNorm_0"]
    mean, var = X.mean(0, np.float64), X.var(0, dtype=np.float64)
    np.testing.assert_allclose(norm["mean"][...], 0.25 * mean + 0.5 * (3 * mean + 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm["var"][...], 0.25 + 0.25 * var + 0.5 * 9 * var, rtol=1e-5)


def test_a_metric_of_every_example_keeps_the_order_of_the_batch_and_what_parts_cannot_give_is_named():
    def made(bad):
        def loss(call, x, train_mode):
            metrics = {"each": {"first": x[:, 0], "row": x}, "matrix": jnp.ones((3, 4)), "bad": bad(x)}
            return jnp.mean(call(x)), metrics

        return make(nn.Dense(1), loss, x=X, micro_batches=4)

    state, step = made(lambda x: ())
    metrics = jit(step)(state, X)[1]
    np.testing.assert_array_equal(metrics["each"]["first"], X[:, 0])
    np.testing.assert_array_equal(metrics["each"]["row"], X)
    assert metrics["matrix"].shape == (3, 4)
    for bad, shapes in (
        (lambda x: x.T, r"\(6, 16\) .* \(6, 4\)"),
        (lambda x: train.Sum(x[:, 0]), r"\(16,\) .* \(4,\)"),
    ):
        state, step = made(bad)
        with pytest.raises(
            ValueError, match=f"metric bad has the shape {shapes} of a micro-batch: sum or average over"
        ):
            step(state, X)


def test_what_is_stored_of_every_example_is_named_where_a_part_of_them_fails():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            state = self.variable("states", "h", jnp.zeros, x.shape)
            state.value = 0.5 * state.value + x
            return nn.Dense(1)(state.value)

    state, step = make(Recurrent(), lambda call, x, train: (jnp.mean(call(x)), {}), micro_batches=4)
    message = r"a micro-batch of 4 examples fails, .* an axis of the 16 of the whole batch: states/h of shape \(16, 6\)"
    with pytest.raises(ValueError, match=message):
        step(state, X)
