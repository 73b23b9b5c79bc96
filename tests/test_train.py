"""Training steps: the penalty, running statistics, micro-batches, seeds side by side; linen and nnx agree, and so do many
devices with one."""

import functools
import itertools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from normjax import Normalizer, normalize, train
from normjax import linen as nl
from normjax import nnx as nx
from tests.rows import jit


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
        self.norm = nx.Norm(4, "batch", layout="n c", momentum=0.9, l1=l1, rngs=rngs)
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
    return model, tx, jit(lambda key: train.linen_init(model, tx, key, data()["x"], train=False))(jax.random.key(seed))


def twin(state):
    """The nnx model with the parameters of the linen one."""
    model = NNXNet(nnx.Rngs(0))
    p = state.params
    for name, module in (("Dense_0", model.first), ("Dense_1", model.last)):
        nnx.update(module, p[name])
    return train.nnx_init(model, optax.sgd(0.05))


def close(a, b, rtol=1e-5):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=1e-6)


def test_step_is_gradient_descent_on_the_loss_plus_the_penalty():
    model, tx, state = start()
    batch = data()

    def objective(params):
        variables = {"params": params, **state.stats}
        y, changed = model.apply(variables, batch["x"], train=True, mutable=["batch_stats", "losses"])
        y, changed = jnp.asarray(y), dict(changed)
        return jnp.mean((y[:, 0] - batch["y"]) ** 2) + changed["losses"]["Norm_0"]["l1"], changed

    (value, changed), grads = jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    after, metrics = jit(train.linen_step(model, loss, tx))(state, batch)
    close(after.params, jax.tree.map(lambda p, g: p - 0.05 * g, state.params, grads))
    close(after.stats["batch_stats"], changed["batch_stats"])
    np.testing.assert_allclose(metrics["loss"] + metrics["penalty"], value, rtol=1e-6)
    assert metrics["penalty"] > 0
    assert set(metrics) == {"loss", "penalty", "worst"}
    assert after.step == 1


def test_linen_and_nnx_steps_agree():
    model, tx, state = start()
    structure, other = twin(state)
    one, two = jit(train.linen_step(model, loss, tx)), jit(train.nnx_step(structure, loss, optax.sgd(0.05)))
    for seed in range(3):
        state, m1 = one(state, data(seed))
        other, m2 = two(other, data(seed))
        close(m1, m2)
    close(state.stats["batch_stats"]["Norm_0"]["mean"], other.stats["norm"]["mean"][...])
    close(state.stats["batch_stats"]["Norm_0"]["var"], other.stats["norm"]["var"][...])
    close(state.params["Dense_0"]["kernel"], other.params["first"]["kernel"][...])
    close(jit(train.linen_eval(model, loss))(state, data(9)), jit(train.nnx_eval(structure, loss))(other, data(9)))


def test_an_epoch_is_its_steps_one_after_another():
    model, tx, state = start(Net(dropout=0.5))
    step, key = train.linen_step(model, loss, tx), jax.random.key(3)
    order = jnp.asarray(np.random.default_rng(0).permutation(24).reshape(4, 6), jnp.int32)
    last, metrics = jit(train.epoch(step))(state, data(), order, key)
    single = jit(step)
    for i in range(4):
        batch = jax.tree.map(lambda a, i=i: a[order[i]], data())
        state, m = single(state, batch, jax.random.fold_in(key, i))
        close(m, jax.tree.map(lambda a, i=i: a[i], metrics))
    close(state, last)


@pytest.mark.slow
def test_seeds_side_by_side_are_the_seeds_alone():
    model, tx, _ = start()
    states = [start(seed=k)[2] for k in range(3)]
    orders = jnp.stack([jax.random.permutation(jax.random.key(k), 24).reshape(4, 6) for k in range(3)])
    run = train.epoch(train.linen_step(model, loss, tx))
    together = jit(jax.vmap(run, in_axes=(0, None, 0)))
    stacked, metrics = together(jax.tree.map(lambda *a: jnp.stack(a), *states), data(), orders)
    alone = jit(run)
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
    after, metrics = jit(step)(state, batch)
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
    whole, _ = jit(train.linen_step(model, loss, tx))(state, data())
    parts, _ = jit(train.linen_step(model, loss, tx, micro_batches=3))(state, data())
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
    _, metrics = jit(step)(state, {"x": jnp.ones((64, 3))}, jax.random.key(1))
    masks = {
        np.asarray(metrics["kept"][part::4]).tobytes() for part in range(4)
    }  # part k has the examples k, k + 4, ...
    assert len(masks) == 4


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
        frozen, m1 = jit(train.linen_step(model, loss, tx, statistics="frozen"))(state, data())
        _, m2 = jit(train.linen_step(model, loss, tx))(state, data())
        evaluated = jit(train.linen_eval(model, loss))(state, data())
    close(frozen.stats, state.stats)
    close(m1["loss"], evaluated["loss"])
    assert abs(m1["loss"] - m2["loss"]) > 1e-3


def test_kept_statistics_normalize_with_the_batch_and_store_nothing():
    model, tx, state = start()
    structure, other = twin(state)
    kept, m1 = jit(train.linen_step(model, loss, tx, statistics="keep"))(state, data())
    updated, m2 = jit(train.linen_step(model, loss, tx))(state, data())
    close(kept.stats, state.stats)
    close(kept.params, updated.params)
    close(m1, m2)
    nnx_kept, _ = jit(train.nnx_step(structure, loss, tx, statistics="keep"))(other, data())
    close(nnx_kept.stats["norm"]["mean"][...], jnp.zeros(4))


def test_frozen_nnx_statistics_stay():
    _, tx, state = start()
    structure, other = twin(state)
    other.stats["norm"]["mean"][...] = jnp.ones(4) * 3
    after, metrics = jit(train.nnx_step(structure, loss, tx, statistics="frozen"))(other, data())
    close(after.stats["norm"]["mean"][...], jnp.ones(4) * 3)
    close(metrics["loss"], jit(train.nnx_eval(structure, loss))(other, data())["loss"])


def test_bad_requests_say_what_is_accepted():
    model, tx, state = start()
    with pytest.raises(ValueError, match="statistics is one of 'update', 'keep', 'frozen'; found 'freeze'"):
        train.linen_step(model, loss, tx, statistics="freeze")
    with pytest.raises(ValueError, match="a batch of 24 examples does not split into 5 equal micro-batches"):
        train.linen_step(model, loss, tx, micro_batches=5)(state, data())
    with pytest.raises(ValueError, match=r"the step itself reports \['loss'\]"):
        train.linen_step(model, lambda *a: (loss(*a)[0], {"loss": 0.0}), tx)(state, data())


# --- many devices: eight, simulated (conftest.py) ---------------------------------------------------

MOMENTUM = optax.sgd(0.05, momentum=0.9)
KERNELS = ((None, "model"), ("model", None))


def lay(names):
    return (
        nn.initializers.lecun_normal() if names is None else nn.with_partitioning(nn.initializers.lecun_normal(), names)
    )


class Masked(nn.Module):
    """Dense, batch norm with a mask and a penalty, dropout, dense."""

    names: tuple = (None, None)

    @nn.compact
    def __call__(self, x, mask, train):
        x = nn.Dense(8, kernel_init=lay(self.names[0]))(x)
        x = nl.Norm("batch", "n c", momentum=0.9, l1=0.1)(x, use_running_average=not train, mask=mask)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(1, kernel_init=lay(self.names[1]))(x)


class NNXMasked(nnx.Module):
    def __init__(self, rngs, names=((), ())):
        self.first = nnx.Linear(3, 8, rngs=rngs, kernel_metadata={"out_sharding": names[0]})
        self.norm = nx.Norm(8, "batch", layout="n c", momentum=0.9, l1=0.1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs, kernel_metadata={"out_sharding": names[1]})

    def __call__(self, x, mask):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x), mask=mask))))


def masked_loss(call, batch, train):
    kwargs = {} if isinstance(call, nnx.Module) else {"train": train}
    error = (call(batch["x"], batch["mask"], **kwargs)[:, 0] - batch["y"]) ** 2 * batch["mask"][:, 0]
    return jnp.sum(error) / jnp.sum(batch["mask"]), {"worst": jnp.max(error)}


def masked_data():
    """32 examples, unequally many of them valid on each of 8 devices: none on the first."""
    mask = np.random.default_rng(1).random((32, 1)) < 0.6
    mask[:4] = False
    return data(size=32) | {"mask": jnp.asarray(mask, jnp.float32)}


def maker(api, names=KERNELS):
    """A first state and how to make its step, the parameters with Flax's metadata or (names None) without."""
    batch, names = masked_data(), names or (None, None)
    if api == "linen":
        model = Masked(names)
        state = train.linen_init(model, MOMENTUM, jax.random.key(0), batch["x"], batch["mask"], train=False)
        return state, lambda **kwargs: train.linen_step(model, masked_loss, MOMENTUM, **kwargs)
    with jax.set_mesh(jax.sharding.Mesh([[jax.local_devices()[0]]], ("data", "model"))):  # or nnx refuses the metadata
        model = NNXMasked(nnx.Rngs(0), tuple(n or () for n in names))
    structure, state = train.nnx_init(model, MOMENTUM)
    # As from one device: nnx has laid the parameters out on its mesh.
    state = jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray(a), state)
    return state, lambda **kwargs: train.nnx_step(structure, masked_loss, MOMENTUM, **kwargs)


def alike(one, other):
    """Equal to 1e-6 of the largest element, and keys exactly."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * max(1, np.abs(a).max()))


GIVEN = {
    "linen": {"Dense_0": {"kernel": P(None, "model")}, "Dense_1": {"kernel": P("model")}},
    "nnx": {"first": {"kernel": P(None, "model")}, "last": {"kernel": P("model")}},
}
SETTINGS = {  # shape of the mesh, axis of the examples, how parameters are laid out, micro-batches
    "replicated": ((8, 1), "data", None, 1),
    "metadata": ((4, 2), "data", "metadata", 2),
    "specs": ((2, 4), "data", "specs", 1),
    "two axes": ((4, 2), ("data", "model"), None, 2),
}


@functools.cache
def one_devices(api, annotated, micro_batches):
    """A first state, how to make its step, and the step of one device, compiled once for all meshes."""
    state, make = maker(api, KERNELS if annotated else None)
    return state, make, jit(make(micro_batches=micro_batches))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_step_on_many_devices_is_one_devices_and_leaves_the_state_where_it_was(api, kind, setting):
    shape, axis, laid, micro_batches = SETTINGS[setting]
    mesh = jax.make_mesh(shape, ("data", "model"), (getattr(AxisType, kind),) * 2)
    state, make, alone = one_devices(api, laid == "metadata", micro_batches)
    specs = GIVEN[api] if laid == "specs" else None
    batch, keys = masked_data(), jax.random.split(jax.random.key(7))
    together = jit(make(micro_batches=micro_batches, mesh=mesh, axis=axis, specs=specs), donate_argnums=0)
    placed, spread = train.place(state, mesh, specs), train.shard(batch, mesh, axis)
    before = jax.tree.map(lambda a: a.sharding, placed)
    expected = state
    for key in keys:
        expected, wanted = alone(expected, batch, key)
        placed, metrics = together(placed, spread, key)
        alike(wanted, metrics)
    alike(expected, placed)
    moved = jax.tree.map(lambda a, s: not a.sharding.is_equivalent_to(s, a.ndim), placed, before)
    assert not any(jax.tree.leaves(moved))
    kernels = [a for a in jax.tree.leaves((placed.params, placed.opt_state)) if a.ndim == 2]
    assert [a.sharding.is_fully_replicated for a in kernels] == [laid is None] * 4  # momentum lies as its parameter


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_an_epoch_on_many_devices_is_one_devices_however_the_data_lie(kind):
    mesh = jax.make_mesh((8,), ("data",), (getattr(AxisType, kind),))
    (state, make), key = maker("linen", None), jax.random.key(7)
    order = jnp.asarray(np.random.default_rng(0).permutation(32).reshape(2, 16), jnp.int32)
    expected = jit(train.epoch(make(micro_batches=2)))(state, masked_data(), order, key)
    run = jit(train.epoch(make(micro_batches=2, mesh=mesh), mesh=mesh))
    placed, copies = train.place(state, mesh), train.place(masked_data(), mesh)
    compiled = run.lower(placed, copies, order, key).compile()
    alike(expected, compiled(placed, copies, order, key))
    # Each device picks its examples from its own copy, and those of each micro-batch from these: only sums are sent.
    collectives = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    assert set(re.findall(collectives, str(compiled.as_text()))) == {"all-reduce"}
    alike(expected, run(placed, train.shard(masked_data(), mesh), order, key))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_evaluation_on_many_devices_is_one_devices_also_of_a_batch_that_does_not_divide(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (getattr(AxisType, kind),) * 2)
    model, (state, _) = Masked(), maker("linen", None)
    placed = train.place(state, mesh, GIVEN["linen"])
    for size in (32, 30):
        batch = jax.tree.map(lambda a, n=size: a[:n], masked_data())
        expected = jit(train.linen_eval(model, masked_loss))(state, batch)
        alike(expected, jit(train.linen_eval(model, masked_loss, mesh=mesh))(placed, train.place(batch, mesh)))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_shard_map_a_step_that_averages_both_loss_and_gradient_is_one_devices(check_vma):
    class Sharded(nn.Module):
        field: str

        @nn.compact
        def __call__(self, x, train):
            norm = nl.Norm(Normalizer(self.field, self.field), "n c", momentum=0.9, l1=0.1)
            return nn.Dense(1)(nn.tanh(norm(nn.Dense(4)(x), use_running_average=not train)))

    def averaged(call, batch, train):
        value, metrics = loss(call, batch, train)
        return lax.pmean(value, "data"), {"worst": lax.pmax(lax.stop_gradient(metrics["worst"]), "data")}

    mesh, batch = jax.make_mesh((8,), ("data",)), data()
    tx = optax.chain(optax.stateless(lambda grads, params: lax.pmean(grads, "data")), MOMENTUM)
    model, whole = Sharded("@data n"), Sharded("n")
    state = train.linen_init(whole, tx, jax.random.key(0), batch["x"], train=False)
    local = train.linen_step(model, averaged, tx)
    specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    got = jit(jax.shard_map(local, **specs))(train.place(state, mesh), train.shard(batch, mesh))
    alone = state._replace(opt_state=state.opt_state[1:])
    expected, metrics = jit(train.linen_step(whole, loss, optax.chain(MOMENTUM)))(alone, batch)
    alike((expected.params, expected.stats, metrics), (got[0].params, got[0].stats, got[1]))


def test_in_shard_map_one_average_is_right_under_one_setting_only():
    mesh = jax.make_mesh((8,), ("data",))
    w, x = jnp.float32(1.0), jnp.arange(1.0, 9.0)

    def gradient(average_loss, average_gradient, w, x):
        def local(w):
            value = jnp.mean((w * x) ** 2)
            return lax.pmean(value, "data") if average_loss else value

        grads = jax.grad(local)(w)
        return (lax.pmean(grads, "data") if average_gradient else grads).reshape(1)

    def ratios(w, x):  # to the right gradient, [8] where each device has its own
        for averages, check_vma in cases:
            specs = {"in_specs": (P(), P("data")), "out_specs": P() if check_vma else P("data")}
            mapped = jax.shard_map(functools.partial(gradient, *averages), mesh=mesh, check_vma=check_vma, **specs)
            yield mapped(w, x) / 51.0

    cases = [((a, b), check_vma) for a, b, check_vma in itertools.product((True, False), repeat=3)]
    found = jit(lambda w, x: list(ratios(w, x)))(w, train.shard(x, mesh))
    assert jax.grad(lambda w: jnp.mean((w * x) ** 2))(w) == 51
    own = np.arange(1, 9) ** 2 / 25.5
    factors = {  # (the loss is averaged, the gradient is averaged), check_vma
        ((True, True), True): 1, ((True, True), False): 1,
        ((True, False), True): 1, ((True, False), False): own,
        ((False, True), True): 8, ((False, True), False): 1,
        ((False, False), True): 8, ((False, False), False): own,
    }  # fmt: skip
    for case, ratio in zip(cases, found, strict=True):
        np.testing.assert_allclose(ratio, np.broadcast_to(factors[case], ratio.shape), rtol=1e-6, err_msg=str(case))


def test_a_placed_state_shares_no_memory_with_the_one_it_came_from():
    mesh = jax.make_mesh((8,), ("data",))
    first = jnp.ones(3)
    jit(lambda a: a + 1, donate_argnums=0)(train.place(first, mesh)).block_until_ready()
    assert first.tolist() == [1, 1, 1]


def test_a_large_state_is_made_where_it_is_to_lie():
    mesh = jax.make_mesh((4, 2), ("data", "model"))

    def init():
        return train.linen_init(nn.Dense(8), MOMENTUM, jax.random.key(0), jnp.ones((1, 3)))

    layout = train.shardings(jax.eval_shape(init), mesh, {"kernel": P(None, "model")})
    state = jit(init, out_shardings=layout)()
    assert [s.data.shape for s in state.params["kernel"].addressable_shards] == [(3, 4)] * 8
    assert state.opt_state[0].trace["kernel"].sharding.spec == P(None, "model")
    alike(init(), state)


def test_logical_names_of_flax_are_those_of_the_mesh_under_its_rules():
    model = nn.Dense(8, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("in", "out")))
    state = train.linen_init(model, MOMENTUM, jax.random.key(0), jnp.ones((1, 3)))
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with nn.logical_axis_rules((("in", None), ("out", "model"))):
        (kernel,) = (a for a in jax.tree.leaves(train.shardings(state, mesh).params) if a.spec)
    assert kernel.spec == P(None, "model")


def test_what_does_not_lie_on_the_devices_is_refused_by_name_and_number():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    model, tx, state = start()

    def refused(message, do, *args, **kwargs):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            do(*args, **kwargs)

    batch = "a batch of 30 examples does not divide over the 4 devices of mesh axis 'data'"
    refused(batch, train.shard, data(size=30), mesh)
    refused(batch, jit(train.linen_step(model, loss, tx, mesh=mesh)), state, data(size=30))
    refused(
        "a micro-batch of 4 examples does not divide over the 8 devices of mesh axis ('data', 'model')",
        jit(train.linen_step(model, loss, tx, micro_batches=4, mesh=mesh, axis=("data", "model"))),
        state,
        data(size=16),
    )
    for do in (train.linen_step, train.linen_eval):
        args = (model, loss, tx)[: 3 if do is train.linen_step else 2]
        refused("the mesh has the axes 'data', 'model'; found 'batch'", do, *args, mesh=mesh, axis="batch")
    refused("the mesh has the axes 'data', 'model'; found 'batch'", train.shard, data(), mesh, "batch")
    for specs, message in {
        "Dense_1": ({"kernel": P("model", "data")}, "params.Dense_1.kernel of shape (4, 1) does not divide: axis 1 of "
                                                    "length 1 over the 4 devices of mesh axis 'data'"),
        "Dense_0": ({"kernel": P("expert")}, "params.Dense_0.kernel is to lie along 'expert'; the mesh has the axes "
                                             "'data', 'model'"),
        "Norm_0": (P(None, "model"), "params.Norm_0.bias of shape (4,) has fewer axes than P(None, 'model')"),
        "Dense_9": ({"kernel": P("model")}, "specs name 'Dense_9.kernel', but no parameter is left there"),
    }.items():  # fmt: skip
        refused(message[1], train.place, state, mesh, {specs: message[0]})


# Recalibration: the running statistics of the parameters as they are.


class Two(nn.Module):
    """Two normalized layers with dropout between them; the flag at the call or at construction."""

    unbiased: bool = False
    second: str = "batch"

    @nn.compact
    def __call__(self, x, train):
        x = nl.Norm("batch", "n c", unbiased=self.unbiased, averaging="debiased", stats_names=("model",))(x, not train)
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(1)(nl.Norm(self.second, "n c", use_running_average=not train)(x))


@pytest.mark.parametrize("second", ["batch", "l1_batch"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_recalibrated_statistics_are_those_of_the_data_set(second, unbiased):
    model, _, state = start(Two(unbiased, second))
    order = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    after = jit(train.linen_recalibrate(model, loss))(state, data(), order)
    stored = after.stats["batch_stats"]
    x = np.asarray(data()["x"], np.float64)
    first = {name: box.unbox() for name, box in stored["Norm_0"].items()}
    assert stored["Norm_0"]["mean"].names == ("model",)
    np.testing.assert_allclose(first["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(first["var"], x.var(0, ddof=unbiased), rtol=1e-5)
    assert first["mean_count"].tolist() == [4] * 3
    # The second layer sees each batch normalized by its own statistics, and no dropout.
    batches = x.reshape(4, 6, 3)
    h = np.tanh((batches - batches.mean(1, keepdims=True)) / np.sqrt(batches.var(1, keepdims=True) + 1e-5))
    np.testing.assert_allclose(stored["Norm_1"]["mean"], h.mean((0, 1)), rtol=1e-4, atol=1e-6)
    spread = np.abs(h - h.mean(1, keepdims=True)).mean((0, 1)) if second == "l1_batch" else h.var((0, 1))
    np.testing.assert_allclose(stored["Norm_1"]["var"], spread, rtol=1e-4)
    close(after.params, state.params)
    assert after.step == state.step


@pytest.mark.slow
def test_nnx_models_and_meshes_recalibrate_alike():
    model, _, state = start(Net(l1=0.0))
    structure, other = twin(state)
    order = jnp.asarray(np.random.default_rng(0).permutation(24).reshape(3, 8), jnp.int32)
    one = jit(train.linen_recalibrate(model, loss))(state, data(), order).stats["batch_stats"]["Norm_0"]
    before = jax.tree.map(jnp.copy, other.stats)
    two = train.nnx_recalibrate(structure, loss)(other, data(), order).stats["norm"]
    for name in ("mean", "var"):
        close(one[name], two[name][...])
    close(before, other.stats)  # the caller's variables are as they were
    mesh = jax.make_mesh((4,), ("data",))
    spread = train.linen_recalibrate(model, loss, mesh=mesh)
    close(one, jit(spread)(train.place(state, mesh), train.place(data(), mesh), order).stats["batch_stats"]["Norm_0"])


def test_a_layer_that_leaves_nothing_is_named():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm()(x, use_running_average=not train)

    with jax.numpy_rank_promotion("allow"):
        model, _, state = start(Foreign())
        with pytest.raises(ValueError, match="layer 'BatchNorm_0' stores mean, var but saw no batch: it is not one of"):
            train.linen_recalibrate(model, loss)(state, data(), jnp.arange(24).reshape(4, 6))


@pytest.mark.slow
def test_micro_batches_merge_statistics_that_carry_names_and_counts():
    model, tx, state = start(Two(unbiased=True))
    whole, _ = jit(train.linen_step(model, loss, tx))(state, data(), jax.random.key(1))
    parts, _ = jit(train.linen_step(model, loss, tx, micro_batches=3))(state, data(), jax.random.key(1))
    close(parts.stats["batch_stats"]["Norm_0"], whole.stats["batch_stats"]["Norm_0"])
    assert parts.stats["batch_stats"]["Norm_0"]["var_count"].unbox().tolist() == [1] * 3


def square(call, batch, train):
    return jnp.mean((call(batch["x"]) - 1) ** 2), {}


class Named(nn.Module):
    """A layer whose name is that under which layers leave what they saw."""

    normalizer: Any = "batch"

    def setup(self):
        self.batch = nl.Norm(self.normalizer, use_running_average=False)

    def __call__(self, x):
        return self.batch(x)


class SideBySide(nn.Module):
    """Three layers under one vmap, what they saw with them."""

    @nn.compact
    def __call__(self, x):
        axes: Any = {"params": 0, "batch_stats": 0, "moments": 0}
        each = nn.vmap(nl.Norm, variable_axes=axes, split_rngs={"params": True}, axis_size=3)
        return each("batch", use_running_average=False)(jnp.stack([x, 2 * x, x + 3]))


class NNXSideBySide(nnx.Module):
    def __init__(self):
        self.batch = nnx.vmap(lambda k: nx.Norm(3, "batch", rngs=nnx.Rngs(0)))(jnp.arange(3))

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x))(self.batch, jnp.stack([x, 2 * x, x + 3]))


@pytest.mark.parametrize("model", [Named(), SideBySide(), NNXSideBySide], ids=lambda m: getattr(m, "__name__", str(m)))
def test_micro_batches_merge_whatever_layers_are_called_and_however_they_are_lifted(model):
    batch, tx, seen = {"x": data()["x"]}, optax.sgd(0.1), []
    for parts in (1, 3):
        if isinstance(model, nn.Module):
            step = train.linen_step(model, square, tx, micro_batches=parts)
            state = train.linen_init(model, tx, jax.random.key(0), batch["x"])
        else:
            structure, state = train.nnx_init(model(), tx)
            step = train.nnx_step(structure, square, tx, micro_batches=parts)
        stats = jit(step)(state, batch)[0].stats
        seen.append(stats if isinstance(model, nn.Module) else nnx.to_pure_dict(stats))
    close(*seen)


@pytest.mark.slow
def test_windows_beside_examples_are_averaged_over_micro_batches():
    x = jnp.asarray(np.random.default_rng(0).normal(np.arange(5.0), 1, (8, 5)).astype(np.float32)[..., None])
    model, tx = Named(Normalizer("n ...:3", "n ...:3")), optax.sgd(0.1)
    state = train.linen_init(model, tx, jax.random.key(0), x)
    after, _ = jit(train.linen_step(model, square, tx, micro_batches=2))(state, {"x": x})
    parts = [normalize(x[k::2], model.normalizer).stats.var[0] for k in range(2)]
    close(after.stats["batch_stats"]["batch"]["var"], 0.99 + 0.01 * (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_statistics_with_names_of_the_mesh_train_inside_it(kind):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nl.Norm("batch", use_running_average=False, stats_names=("model",))(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    model, tx = Boxed(), optax.sgd(0.1)
    state = train.linen_init(model, tx, jax.random.key(0), x)
    want, _ = jit(train.linen_step(model, square, tx))(state, {"x": x})
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = train.place(state, mesh)
        assert placed.stats["batch_stats"]["Norm_0"]["mean"].value.sharding.spec == P("model")
        step = jit(train.linen_step(model, square, tx, micro_batches=2, mesh=mesh))
        got, _ = step(placed, train.shard({"x": x}, mesh))
    close(got.stats, want.stats)
