"""Training steps: the penalty, running statistics, micro-batches, seeds side by side; linen and nnx agree."""

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


class Net(nn.Module):
    """Dense, norm, dense; the norm is our batch norm with a penalty."""

    l1: float = 0.1
    dropout: float = 0.0
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nl.Norm("batch", "n c", momentum=self.momentum, l1=self.l1)(x, use_running_average=not train)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(1)(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs, l1=0.1):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nx.Norm("batch", 4, layout="n c", momentum=0.9, l1=l1, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def loss(call, batch, train):
    kwargs = {} if isinstance(call, nnx.Module) else {"train": train}
    error = call(batch["x"], **kwargs)[:, 0] - batch["y"]
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


def data(seed=0, size=24):
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, (size, 3)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(np.sin(x).sum(1))}


def start(model=None, tx=None, seed=0):
    model, tx = model or Net(), tx or optax.sgd(0.05)
    return model, tx, train.linen_init(model, tx, jax.random.key(seed), data()["x"], train=False)


def twin(state):
    """The nnx model with the parameters of the linen one."""
    model = NNXNet(nnx.Rngs(0))
    p = state.params
    for name, module in (("Dense_0", model.first), ("Dense_1", model.last)):
        nnx.update(module, p[name])
    return train.nnx_init(model, optax.sgd(0.05))


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def test_step_is_gradient_descent_on_the_loss_plus_the_penalty():
    model, tx, state = start()
    batch = data()

    def objective(params):
        variables = {"params": params, **state.stats}
        y, changed = model.apply(variables, batch["x"], train=True, mutable=["batch_stats", "losses"])
        y, changed = jnp.asarray(y), dict(changed)
        return jnp.mean((y[:, 0] - batch["y"]) ** 2) + changed["losses"]["Norm_0"]["l1"], changed

    (value, changed), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    after, metrics = jax.jit(train.linen_step(model, loss, tx))(state, batch)
    close(after.params, jax.tree.map(lambda p, g: p - 0.05 * g, state.params, grads))
    close(after.stats["batch_stats"], changed["batch_stats"])
    np.testing.assert_allclose(metrics["loss"] + metrics["penalty"], value, rtol=1e-6)
    assert metrics["penalty"] > 0
    assert set(metrics) == {"loss", "penalty", "worst"}
    assert after.step == 1


def test_linen_and_nnx_steps_agree():
    model, tx, state = start()
    structure, other = twin(state)
    one, two = jax.jit(train.linen_step(model, loss, tx)), jax.jit(train.nnx_step(structure, loss, optax.sgd(0.05)))
    for seed in range(3):
        state, m1 = one(state, data(seed))
        other, m2 = two(other, data(seed))
        close(m1, m2)
    close(state.stats["batch_stats"]["Norm_0"]["mean"], other.stats["norm"]["mean"][...])
    close(state.stats["batch_stats"]["Norm_0"]["var"], other.stats["norm"]["var"][...])
    close(state.params["Dense_0"]["kernel"], other.params["first"]["kernel"][...])
    close(train.linen_eval(model, loss)(state, data(9)), train.nnx_eval(structure, loss)(other, data(9)))


def test_an_epoch_is_its_steps_one_after_another():
    model, tx, state = start(Net(dropout=0.5))
    step, key = train.linen_step(model, loss, tx), jax.random.key(3)
    order = jnp.asarray(np.random.default_rng(0).permutation(24).reshape(4, 6), jnp.int32)
    last, metrics = jax.jit(train.epoch(step))(state, data(), order, key)
    single = jax.jit(step)
    for i in range(4):
        batch = jax.tree.map(lambda a, i=i: a[order[i]], data())
        state, m = single(state, batch, jax.random.fold_in(key, i))
        close(m, jax.tree.map(lambda a, i=i: a[i], metrics))
    close(state, last)


def test_seeds_side_by_side_are_the_seeds_alone():
    model, tx, _ = start()
    states = [start(seed=k)[2] for k in range(3)]
    orders = jnp.stack([jax.random.permutation(jax.random.key(k), 24).reshape(4, 6) for k in range(3)])
    run = train.epoch(train.linen_step(model, loss, tx))
    together = jax.jit(jax.vmap(run, in_axes=(0, None, 0)))
    stacked, metrics = together(jax.tree.map(lambda *a: jnp.stack(a), *states), data(), orders)
    alone = jax.jit(run)
    for k in range(3):
        last, m = alone(states[k], data(), orders[k])
        close((last, m), jax.tree.map(lambda a, k=k: a[k], (stacked, metrics)))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_micro_batches_merge_their_statistics(api):
    model, tx, state = start(Net(l1=0.0))
    batch = data()
    if api == "nnx":
        structure, state = twin(state)
        state.stats["norm"]["mean"][...] = jnp.ones(4)
        step = train.nnx_step(structure, loss, tx, micro_batches=4)
        kernel, bias = state.params["first"]["kernel"][...], state.params["first"]["bias"][...]
    else:
        state.stats["batch_stats"]["Norm_0"]["mean"] = jnp.ones(4)
        step = train.linen_step(model, loss, tx, micro_batches=4)
        kernel, bias = state.params["Dense_0"]["kernel"], state.params["Dense_0"]["bias"]
    z = np.asarray(batch["x"] @ kernel + bias.reshape(1, -1), np.float64)
    after, metrics = jax.jit(step)(state, batch)
    got = after.stats["norm"] if api == "nnx" else after.stats["batch_stats"]["Norm_0"]
    np.testing.assert_allclose(got["mean"][...], 0.9 + 0.1 * z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["var"][...], 0.9 + 0.1 * z.var(0), rtol=1e-5)
    assert metrics["loss"].shape == ()


def test_micro_batches_average_gradients_of_layers_without_shared_statistics():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(1)(nl.LayerNorm()(nn.Dense(4)(x)))

    model, tx, state = start(Plain())
    whole, _ = jax.jit(train.linen_step(model, loss, tx))(state, data())
    parts, _ = jax.jit(train.linen_step(model, loss, tx, micro_batches=3))(state, data())
    close(whole.params, parts.params, rtol=1e-4)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_micro_batch_draws_its_own_dropout(api):
    def kept(call, batch, train):
        out = call(batch["x"]) if api == "nnx" else call(batch["x"], deterministic=not train)
        return jnp.sum(out), {"kept": (out != 0).astype(jnp.float32)}

    if api == "nnx":
        structure, state = train.nnx_init(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), optax.sgd(0.1))
        step = train.nnx_step(structure, kept, optax.sgd(0.1), micro_batches=4)
    else:
        model = nn.Dropout(0.5)
        state = train.linen_init(model, optax.sgd(0.1), jax.random.key(0), data()["x"], deterministic=True)
        step = train.linen_step(model, kept, optax.sgd(0.1), micro_batches=4)
    _, metrics = jax.jit(step)(state, {"x": jnp.ones((64, 3))}, jax.random.key(1))
    assert len(np.unique(metrics["kept"])) > 2  # means of four masks, not one mask four times


@pytest.mark.parametrize("layer", [nn.BatchNorm, nl.BatchNorm])
@pytest.mark.parametrize("at", ["constructor", "call"])
def test_frozen_statistics_normalize_with_the_stored_ones(layer, at):
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if at == "call":
                return nn.Dense(1)(layer()(x, use_running_average=not train))
            return nn.Dense(1)(layer(use_running_average=not train)(x))

    with jax.numpy_rank_promotion("allow"):
        model, tx, state = start(Frozen())
        state.stats["batch_stats"]["BatchNorm_0"]["mean"] = jnp.ones(3) * 5
        frozen, m1 = jax.jit(train.linen_step(model, loss, tx, statistics="frozen"))(state, data())
        _, m2 = jax.jit(train.linen_step(model, loss, tx))(state, data())
        evaluated = train.linen_eval(model, loss)(state, data())
    close(frozen.stats, state.stats)
    close(m1["loss"], evaluated["loss"])
    assert abs(m1["loss"] - m2["loss"]) > 1e-3


def test_kept_statistics_normalize_with_the_batch_and_store_nothing():
    model, tx, state = start()
    structure, other = twin(state)
    kept, m1 = jax.jit(train.linen_step(model, loss, tx, statistics="keep"))(state, data())
    updated, m2 = jax.jit(train.linen_step(model, loss, tx))(state, data())
    close(kept.stats, state.stats)
    close(kept.params, updated.params)
    close(m1, m2)
    nnx_kept, _ = jax.jit(train.nnx_step(structure, loss, tx, statistics="keep"))(other, data())
    close(nnx_kept.stats["norm"]["mean"][...], jnp.zeros(4))


def test_frozen_nnx_statistics_stay():
    _, tx, state = start()
    structure, other = twin(state)
    other.stats["norm"]["mean"][...] = jnp.ones(4) * 3
    after, metrics = jax.jit(train.nnx_step(structure, loss, tx, statistics="frozen"))(other, data())
    close(after.stats["norm"]["mean"][...], jnp.ones(4) * 3)
    close(metrics["loss"], train.nnx_eval(structure, loss)(other, data())["loss"])


def test_bad_requests_say_what_is_accepted():
    model, tx, state = start()
    with pytest.raises(ValueError, match="statistics is one of 'update', 'keep', 'frozen'; found 'freeze'"):
        train.linen_step(model, loss, tx, statistics="freeze")
    with pytest.raises(ValueError, match="a batch of 24 examples does not split into 5 equal micro-batches"):
        train.linen_step(model, loss, tx, micro_batches=5)(state, data())
    with pytest.raises(ValueError, match=r"the step itself reports \['loss'\]"):
        train.linen_step(model, lambda *a: (loss(*a)[0], {"loss": 0.0}), tx)(state, data())
