"""What trainers ask of a step: optimizers that want the loss, keys for random numbers, and answers to a first guess."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from normjax import linen as nl
from normjax import nnx as nx
from normjax import train
from tests.rows import jit, slow_but

X = np.random.default_rng(0).normal(1, 2, (16, 3)).astype(np.float32)
BATCH = {"x": X, "y": np.sin(X).sum(1)}
SGD = optax.sgd(0.1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nl.Norm("batch", "n c", l1=0.1)(nn.Dense(4)(x), use_running_average=not train)
        return nn.Dense(1)(nn.Dropout(0.25, deterministic=not train)(nn.tanh(x)))


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm, self.dropout = nx.Norm(4, "batch", layout="n c", l1=0.1, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def loss(call, batch, train):
    kwargs = {} if isinstance(call, nnx.Module) else {"train": train}
    return jnp.mean((call(batch["x"], **kwargs)[:, 0] - batch["y"]) ** 2), {}


OPTIMIZERS = {
    "plateau": optax.chain(SGD, optax.contrib.reduce_on_plateau(patience=0, cooldown=0, factor=0.5)),
    "polyak": optax.polyak_sgd(),
    "momo": optax.contrib.momo(),
    "lbfgs": optax.lbfgs(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(4)),
    "backtracking": optax.chain(SGD, optax.scale_by_backtracking_linesearch(4)),
    "masked, inner": optax.chain(optax.masked(optax.polyak_sgd(), lambda p: jax.tree.map(lambda _: True, p)), SGD),
    "accumulated": optax.MultiSteps(optax.polyak_sgd(), 2).gradient_transformation(),
}


def by_hand(objective, tx, state):
    """The parameters after a step of an optimizer that is given the loss."""
    value, grads = jax.value_and_grad(objective)(state.params)
    given = {"value": value, "grad": grads, "value_fn": objective}
    updates, _ = tx.update(grads, state.opt_state, state.params, **given)
    return value, optax.apply_updates(state.params, updates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("api", "name"), [("linen", name) for name in OPTIMIZERS] + [("nnx", "backtracking"), ("nnx", "masked, inner")]
)
@jax.numpy_dtype_promotion("standard")  # which some of optax's own need
def test_optimizers_that_ask_for_the_loss_are_given_it(api, name):
    tx, key, parts = OPTIMIZERS[name], jax.random.key(3), 1 if name == "plateau" else 2
    if api == "linen":
        state = jit(lambda key: train.linen_init(Net(), tx, key, X, train=False))(jax.random.key(0))
        step = train.linen_step(Net(), loss, tx, micro_batches=parts)

        def evaluate(stats, k, params):
            own = key if parts == 1 else jax.random.fold_in(key, k)
            variables = {"params": params, **stats}
            part = jax.tree.map(lambda a: a[k::parts], BATCH)
            call = functools.partial(Net().apply, variables, mutable=["batch_stats", "losses"], rngs={"dropout": own})
            y: Any = call(part["x"], train=True)
            return jnp.mean((y[0][:, 0] - part["y"]) ** 2) + y[1]["losses"]["Norm_0"]["l1"]

        def of_linen(stats, params):
            return sum(evaluate(stats, k, params) for k in range(parts)) / parts

        objective = of_linen

    else:
        structure, state = train.nnx_init(NNXNet(), tx)
        step = train.nnx_step(structure, loss, tx, micro_batches=parts)

        def of_nnx(stats, params):
            model, total = nnx.merge(structure, params, stats, copy=True), 0.0
            model = nnx.view(model, use_running_average=False, deterministic=False)
            for k in range(parts):
                part = jax.tree.map(lambda a, k=k: a[k::parts], BATCH)
                value, penalties = nnx.capture(lambda m, part=part: loss(m, part, True)[0], nx.Penalty)(model)
                total += value + jax.tree.leaves(penalties)[0]
            return total / parts

        objective = of_nnx

    step = jit(step)
    for _ in range(2):
        value, want = jit(lambda state: by_hand(functools.partial(objective, state.stats), tx, state))(state)
        after, metrics = step(state, BATCH, key)
        np.testing.assert_allclose(metrics["loss"] + metrics["penalty"], value, rtol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), after.params, want)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        state = after


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_the_first_state_may_be_donated_whatever_the_optimizer_keeps_of_it(api):
    tx = optax.lbfgs(memory_size=1)
    if api == "linen":
        state = train.linen_init(nn.Dense(1), tx, jax.random.key(0), X)
    else:
        state = train.nnx_init(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), tx)[1]
    jit(lambda state: state, donate_argnums=0)(state)


def test_an_optimizer_that_names_other_arguments_is_given_none_of_them():
    tx = optax.contrib.sam(SGD, optax.sgd(0.01))
    state = train.linen_init(nn.Dense(1), tx, jax.random.key(0), X)
    step = train.linen_step(nn.Dense(1), lambda call, batch, train: (jnp.mean(call(batch)), {}), tx)
    with jax.numpy_dtype_promotion("standard"):  # which sam itself asks for
        assert step(state, X)[0].step == 1


def spy():
    """A transformation that asks for the loss, and keeps what it is told."""

    def init(params):
        return {"value": jnp.zeros(()), "half": jnp.zeros(()), "grad": jax.tree.map(jnp.zeros_like, params)}

    def update(updates, state, params, *, value, grad, value_fn, **others):
        assert not others
        half = jax.grad(value_fn)(jax.tree.map(lambda p: p / 2, params))  # it can be differentiated
        return updates, {"value": value, "half": sum(map(jnp.sum, jax.tree.leaves(half))), "grad": grad}

    make: Any = optax.GradientTransformationExtraArgs
    return optax.chain(SGD, make(init, update))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_value_gradient_and_value_function_are_those_of_what_is_minimized(api, parts):
    def squares(call, batch, train_mode):
        return train.Mean(jnp.sum(batch["w"] * (call(batch["x"])[:, 0] - batch["y"]) ** 2), jnp.sum(batch["w"])), {}

    batch, ones = {**BATCH, "w": np.arange(16.0, dtype=np.float32)}, nn.initializers.ones
    if api == "linen":
        model = nn.Dense(1, kernel_init=ones)
        state = train.linen_init(model, spy(), jax.random.key(0), X)
        step = train.linen_step(model, squares, spy(), micro_batches=parts)
    else:
        structure, state = train.nnx_init(nnx.Linear(3, 1, kernel_init=ones, rngs=nnx.Rngs(0)), spy())
        step = train.nnx_step(structure, squares, spy(), micro_batches=parts)
    after, metrics = jit(step)(state, batch)
    told = after.opt_state[1]
    x, share = np.c_[X, np.ones(16)].astype(np.float64), batch["w"] / batch["w"].sum()
    error, half = x @ np.array([1, 1, 1, 0]) - batch["y"], x @ np.array([0.5, 0.5, 0.5, 0]) - batch["y"]
    np.testing.assert_allclose([told["value"], metrics["loss"]], share @ error**2, rtol=1e-5)
    np.testing.assert_allclose(told["half"], (2 * share * half @ x).sum(), rtol=1e-5)
    grads = jnp.concatenate([g.ravel() for g in jax.tree.leaves(told["grad"])])
    np.testing.assert_allclose(grads, np.roll(2 * share * error @ x, 1), rtol=1e-5)  # the bias first
    assert jax.tree.structure(state) == jax.tree.structure(after)


# Keys.


class Noisy(nn.Module):
    """Noise of a stream of its own, of one more that only `make_rng` knows, and of one in a lifted layer."""

    lifted: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.lifted:
            return nn.Dense(1)(x), {name: jax.random.uniform(self.make_rng(name)) for name in ("noise", "other")}
        scanned = nn.scan(Inner, variable_broadcast="params", split_rngs={"params": False, "noise": True}, length=3)
        return nn.Dense(1)(x), {"noise": scanned()(jnp.zeros(()), None)[1]}


class Inner(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return carry, jax.random.uniform(self.make_rng("noise"))


@pytest.mark.parametrize("lifted", slow_but((False, True), False))
def test_every_stream_of_random_numbers_is_served_and_every_part_draws_its_own(lifted):
    def drawn(call, batch, train_mode):
        y, noise = call(batch["x"])
        return jnp.mean(y), jax.tree.map(lambda a: {"mean": a, "square": a**2}, noise)

    model, rngs = Noisy(lifted), ("dropout", "noise") if lifted else "dropout"
    state = train.linen_init(model, SGD, jax.random.key(0), X, rngs=rngs)
    whole, parted = (jit(train.linen_step(model, drawn, SGD, rngs=rngs, micro_batches=parts)) for parts in (1, 2))
    calls = ((whole, 0), (whole, 0), (whole, 1), (parted, 0))
    found = [step(state, BATCH, jax.random.key(seed))[1] for step, seed in calls]
    for name in ("noise",) if lifted else ("noise", "other"):
        one, again, other, halves = (m[name] for m in found)
        np.testing.assert_array_equal(one["mean"], again["mean"])
        assert not np.any(one["mean"] == other["mean"])
        assert np.all(halves["square"] - halves["mean"] ** 2 > 1e-6)  # the variance of two draws
        if lifted:
            assert len(np.unique(one["mean"])) == 3
    if not lifted:
        assert found[0]["noise"]["mean"] != found[0]["other"]["mean"]
        assert jit(train.linen_eval(model, drawn))(state, BATCH, jax.random.key(0))["loss"].shape == ()


@pytest.mark.parametrize("api", slow_but(("linen", "nnx"), "nnx"))
def test_a_loss_that_takes_a_key_is_given_one_of_its_own(api):
    def drawing(call, batch, train_mode, key):
        value = jnp.mean(call(batch["x"]))
        return value, {"drawn": -1.0 if key is None else jax.random.uniform(key)}

    def quiet(call, batch, train_mode, key=None):
        return drawing(call, batch, train_mode, key)

    if api == "linen":
        state = train.linen_init(nn.Dense(1), SGD, jax.random.key(0), X)
        make, evaluate = functools.partial(train.linen_step, nn.Dense(1)), jit(train.linen_eval(nn.Dense(1), drawing))
    else:
        structure, state = train.nnx_init(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), SGD)
        make, evaluate = functools.partial(train.nnx_step, structure), jit(train.nnx_eval(structure, drawing))
    step = jit(make(drawing, SGD))
    one, two, again = (step(state, BATCH, jax.random.key(k))[1]["drawn"] for k in (0, 1, 0))
    assert one == again != two
    assert jit(make(drawing, SGD, micro_batches=2))(state, BATCH, jax.random.key(0))[1]["drawn"] != one
    assert evaluate(state, BATCH)["drawn"] == -1
    assert 0 <= evaluate(state, BATCH, jax.random.key(0))["drawn"] < 1
    with pytest.raises(ValueError, match=r"the loss takes a key: give the step one, `step\(state, batch, key\)`"):
        make(drawing, SGD)(state, BATCH)
    assert jit(make(quiet, SGD, statistics="keep"))(state, BATCH)[1]["drawn"] == -1


# First guesses.

NET = Net()
STATE = train.linen_init(NET, SGD, jax.random.key(0), X, train=False)
STRUCTURE, NNX_STATE = train.nnx_init(NNXNet(), SGD)
guess_nothing: Any = None


def stepped(returned, **options):
    """One step of a loss that returns what a function makes of the model's output."""
    step = train.linen_step(NET, lambda call, b, t: returned(call(b["x"], train=t)), SGD, **options)
    return jit(step)(STATE, BATCH, jax.random.key(0))


LINEN, NNX = "{} takes a linen module first; found ", "{} takes the graph definition of `nnx_init` first; found "
PAIR = "loss returns a value and a dictionary of metrics, `return value, {}`; found "
MESH = "mesh is a `jax.sharding.Mesh`, as `jax.make_mesh` makes it; found str"
guess: Any = train
GUESSES = {
    "a scalar": (lambda: stepped(jnp.mean), PAIR + "an array of shape ()"),
    "nothing": (lambda: stepped(lambda y: None), PAIR + "NoneType"),
    "three": (lambda: stepped(lambda y: (jnp.mean(y), {}, 1)), PAIR + "a tuple of 3"),
    "a mean alone": (lambda: stepped(lambda y: train.Mean(jnp.sum(y), 16)), PAIR + "Mean"),
    "no metrics": (
        lambda: stepped(lambda y: (jnp.mean(y), None)),
        "the metrics of the loss are a dictionary, which may be empty; found NoneType",
    ),
    "a vector": (
        lambda: stepped(lambda y: (y[:, 0], {})),
        "the value of a loss is a scalar, as `jnp.mean` gives it; found shape (16,)",
    ),
    "vector of means": (
        lambda: stepped(lambda y: (train.Mean(y[:, 0], 16.0), {})),
        "the value of a loss is a scalar, as `jnp.mean` gives it; found shape (16,)",
    ),
    "evaluated": (lambda: train.linen_eval(NET, lambda call, b, t: guess_nothing)(STATE, BATCH), PAIR + "NoneType"),
    "linen_step of nnx": (
        lambda: guess.linen_step(STRUCTURE, loss, SGD),
        LINEN.format("linen_step") + "GraphDef: of nnx, take `nnx_step`",
    ),
    "linen_eval of nnx": (
        lambda: guess.linen_eval(NNXNet(), loss),
        LINEN.format("linen_eval") + "NNXNet: of nnx, take `nnx_eval`",
    ),
    "nnx_step of linen": (
        lambda: guess.nnx_step(NET, loss, SGD),
        NNX.format("nnx_step") + "Net: of linen, take `linen_step`",
    ),
    "nnx_step of a model": (lambda: guess.nnx_step(NNXNet(), loss, SGD), NNX.format("nnx_step") + "NNXNet"),
    "nnx_recalibrate": (
        lambda: guess.nnx_recalibrate(NET, loss),
        NNX.format("nnx_recalibrate") + "Net: of linen, take `linen_recalibrate`",
    ),
    "loss and model": (lambda: guess.linen_step(loss, NET, SGD), LINEN.format("linen_step") + "function"),
    "tx and loss": (
        lambda: guess.linen_step(NET, SGD, loss),
        "linen_step takes a function `loss(model, batch, train)` second; found GradientTransformationExtraArgs",
    ),
    "no tx": (
        lambda: guess.nnx_init(NNXNet(), loss),
        "tx is an optax transformation, such as optax.sgd(0.1); found function",
    ),
    "key and tx": (
        lambda: guess.linen_init(NET, jax.random.key(0), SGD, X),
        "tx is an optax transformation, such as optax.sgd(0.1); found PRNGKeyArray",
    ),
    "linen in nnx_init": (
        lambda: guess.nnx_init(NET, SGD),
        "nnx_init takes an nnx module first; found Net: of linen, take `linen_init`",
    ),
    "batch and state": (
        lambda: guess.linen_step(NET, loss, SGD)(BATCH, STATE),
        "`step(state, batch, key=None)` takes a `train.State` first; found dict",
    ),
    "state of nnx": (
        lambda: guess.linen_step(NET, loss, SGD)(NNX_STATE, BATCH),
        "linen_step takes the state of `linen_init`; found one of `nnx_init`",
    ),
    "state of linen": (
        lambda: guess.nnx_step(STRUCTURE, loss, SGD)(STATE, BATCH),
        "nnx_step takes the state of `nnx_init`; its parameters are dict",
    ),
    "place": (lambda: guess.place(STATE, "data"), MESH),
    "shard": (lambda: guess.shard(BATCH, "data"), MESH),
    "mesh of a step": (lambda: guess.linen_step(NET, loss, SGD, mesh="data"), MESH),
    "half a batch": (
        lambda: guess.linen_step(NET, loss, SGD, micro_batches=2.5),
        "micro_batches is a whole number of at least 1; found 2.5",
    ),
    "penalty weights": (
        lambda: stepped(lambda y: (jnp.mean(y), {}), penalty_weights={"Norm_7": 2.0}),
        "penalty_weights name 'Norm_7', which matches no penalty; the penalties are 'Norm_0/l1'",
    ),
    "a flat order": (
        lambda: train.epoch(train.linen_step(NET, loss, SGD))(STATE, BATCH, jnp.arange(16)),
        "order holds integer indices of shape [steps, batch]; found int32 of shape (16,)",
    ),
    "order as floats": (
        lambda: train.epoch(train.linen_step(NET, loss, SGD))(STATE, BATCH, jnp.ones((2, 8))),
        "order holds integer indices of shape [steps, batch]; found float32 of shape (2, 8)",
    ),
    "order beyond": (
        lambda: train.epoch(train.linen_step(NET, loss, SGD))(STATE, BATCH, np.full((1, 2), 99)),
        "order holds indices of the 16 examples, 0 to 15; found 99 to 99",
    ),
    "recalibrate beyond": (
        lambda: train.linen_recalibrate(NET, loss)(STATE, BATCH, jnp.array([[0, 16]])),
        "order holds indices of the 16 examples, 0 to 15; found 0 to 16",
    ),
}


@pytest.mark.parametrize("name", GUESSES)
def test_a_first_guess_gets_an_answer(name):
    do, message = GUESSES[name]
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        do()


def test_what_lies_on_no_mesh_is_said():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,))
    step, key, order = train.linen_step(NET, loss, SGD, mesh=mesh), jax.random.key(0), np.arange(16).reshape(2, 8)
    placed, spread = train.place(STATE, mesh), train.shard(BATCH, mesh)
    for do, message in (
        (
            lambda: step(STATE, BATCH, key),
            "the state lies on one device, not on the mesh: `place(state, mesh)` puts it",
        ),
        (
            lambda: jax.jit(step)(STATE, BATCH, key),
            "neither state nor batch lies on the mesh: `place(state, mesh)` puts",
        ),
        (
            lambda: jax.jit(train.epoch(step))(placed, spread, order, key),
            "data 'x' lie as P('data', None) on a mesh: `epoch(",
        ),
        (
            lambda: train.linen_recalibrate(NET, loss)(placed, spread, order),
            "data 'x' lie as P('data', None) on a mesh: `reca",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            do()


def test_weights_of_penalties_that_a_model_does_not_have_this_once_are_no_error():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nl.Norm("batch", "n c", name="norm")(x, use_running_average=False)

    def total(call, x, train):
        return jnp.sum(call(x)), {}

    state = train.linen_init(Plain(), SGD, jax.random.key(0), X)
    assert jit(train.linen_step(Plain(), total, SGD, penalty_weights={"norm": 2.0}))(state, X)[1]["penalty"] == 0
    with pytest.raises(
        ValueError, match="penalty_weights name 'nrom', which matches no penalty; the penalties are none"
    ):
        jit(train.linen_step(Plain(), total, SGD, penalty_weights={"nrom": 2.0}))(state, X)


@pytest.mark.slow
@pytest.mark.parametrize("laid", ["metadata", "specs"])
def test_a_history_of_updates_lies_as_its_parameter(laid):
    class Laid(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.ones
            return nn.Dense(4, kernel_init=nn.with_partitioning(init, (None, "model")) if laid == "metadata" else init)(
                x
            )

    def total(call, x, train):
        return jnp.mean((call(x) - 1) ** 2), {}

    tx, mesh = optax.lbfgs(memory_size=3, linesearch=None), jax.make_mesh((2, 4), ("data", "model"))
    specs = None if laid == "metadata" else {"Dense_0": {"kernel": P(None, "model")}}
    state = train.linen_init(Laid(), tx, jax.random.key(0), X)
    placed = train.place(state, mesh, specs)
    history = jax.tree.leaves(placed.opt_state[0].diff_params_memory["Dense_0"]["kernel"])[0]
    assert (history.shape, history.sharding.spec) == ((3, 3, 4), P(None, None, "model"))
    want, _ = jit(train.linen_step(Laid(), total, tx))(state, X)
    found, _ = jit(train.linen_step(Laid(), total, tx, mesh=mesh, specs=specs))(placed, train.shard(X, mesh))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found.params, want.params)
