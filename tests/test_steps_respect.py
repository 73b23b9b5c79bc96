"""Steps do what the model says: flags and arguments as they are, control flow as Flax's layers have it, dtypes that stay."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from normjax import linen as nl
from normjax import nnx as nx
from normjax import train
from normjax.running import Running, published_update, update
from normjax.theory import TABLE, Stats
from tests.rows import jit, slow_but

X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (16, 6)).astype(np.float32))
TX = optax.sgd(0.1)
RNGS = nnx.Rngs(0)


def square(call, batch, train):
    return jnp.mean((call(batch) - 1) ** 2), {}


def linen_stepped(model, x=X, loss=square, given=(), **options) -> Any:
    """The State before and after a step, and what the step reports."""
    state = train.linen_init(model, TX, jax.random.key(0), x, *given)
    return state, *jit(train.linen_step(model, loss, TX, **options))(state, x)


def nnx_stepped(model, x=X, loss=square, **options) -> Any:
    structure, state = train.nnx_init(model, TX)
    return state, *jit(train.nnx_step(structure, loss, TX, **options))(state, x)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def close(a, b, **tolerances):
    for one, other in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(one, other, **{"rtol": 1e-4, "atol": 1e-6, **tolerances})


# What is left, and for whom.

LEFT = {  # layers with running statistics, and a call that they train in
    "BatchNorm": (nl.BatchNorm(use_running_average=False), ()),
    "Norm": (nl.Norm("batch", use_running_average=False), ()),
    "EvoNormB0": (nl.EvoNormB0(instance="c", use_running_average=False), ()),
    "KalmanNorm": (nl.KalmanNorm(use_running_average=False), ()),
    "ConditionalNorm": (nl.ConditionalNorm(3, use_running_average=False), (jnp.arange(16) % 3,)),
    "SimpleCell": (nl.SimpleCell(6, normalizer="batch", use_running_average=False), (X,)),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_record_is_left_only_where_it_is_asked_for_by_name(name):
    layer, args = LEFT[name]
    variables = jax.eval_shape(layer.init, jax.random.key(0), X, *args)

    def left(mutable):
        return jax.eval_shape(lambda v: layer.apply(v, X, *args, mutable=mutable)[1], variables)

    assert jax.tree.structure(left(True)) == jax.tree.structure(dict(variables))
    assert jax.tree.structure(left(nn.DenyList("params"))) == jax.tree.structure(
        {"batch_stats": variables["batch_stats"]}
    )
    assert ("moments" in left(["batch_stats", "moments"])) == (name != "SimpleCell")


@pytest.mark.slow
def test_a_returned_state_is_carried_by_a_scan_and_lifted_as_that_of_flax():
    def stack(layer):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return layer(use_running_average=False)(x), None

        return nn.scan(Block, variable_axes={True: 0}, split_rngs={"params": True}, length=3)()

    found = []
    with jax.numpy_rank_promotion("allow"):
        for layer in (nl.BatchNorm, nn.BatchNorm):
            model = stack(layer)
            variables = model.init(jax.random.key(0), X, None)
            every = jit(
                lambda v, m=model: lax.scan(lambda v, _: (m.apply(v, X, None, mutable=True)[1], None), v, length=2)
            )
            found.append(every(variables)[0])
    close(*found)


# Control flow. Each case builds a model around a layer.


def nnx_model(call, *layers):
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(layers)

        def __call__(self, x):
            return call(*self.layers, x)

    return Model()


def linen_model(call, layer):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = layer()
            return norm(x) if self.is_initializing() else call(norm, x)

    return Model()


IN_NNX = {
    "cond": lambda n, x: nnx.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, n, x),
    "switch": lambda n, x: nnx.switch(jnp.int32(1), [lambda m, x: x, lambda m, x: m(x), lambda m, x: -x], n, x),
    "fori_loop": lambda n, x: nnx.fori_loop(0, 2, lambda i, c: (c[0], c[0](c[1])), (n, x))[1],
    "scan": lambda n, x: nnx.scan(
        lambda c, _: ((c[0], c[0](c[1])), None), in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0), length=2
    )((n, x), None)[0][1],
    "remat": lambda n, x: nnx.remat(lambda m, x: m(x))(n, x),
}
IN_LINEN = {
    "cond": lambda n, x: nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, n, x),
    "switch": lambda n, x: nn.switch(jnp.int32(1), [lambda m, x: x, lambda m, x: m(x), lambda m, x: -x], n, x),
    "scan": lambda n, x: nn.scan(
        lambda m, x, _: (m(x), None), variable_broadcast="params", variable_carry="batch_stats", length=2
    )(n, x, None)[0],
}
CASES = [(api, name, m) for api, names in (("nnx", IN_NNX), ("linen", IN_LINEN)) for name in names for m in (1, 2)]
SOONER = [("nnx", "fori_loop", 2), ("linen", "cond", 2)]
QUICK_FIRST = [case if case in SOONER else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


def stepped_in(api, name, ours, **options):
    if api == "nnx":
        layer: Any = (nx if ours else nnx).BatchNorm(6, momentum=0.5, rngs=RNGS)
        state, metrics = nnx_stepped(nnx_model(IN_NNX[name], layer), **options)[1:]
    else:
        namespace: Any = nl if ours else nn
        model = linen_model(IN_LINEN[name], lambda: namespace.BatchNorm(use_running_average=False, momentum=0.5))
        state, metrics = linen_stepped(model, **options)[1:]
    return state.stats, metrics["loss"]


@pytest.mark.parametrize(("api", "name", "micro_batches"), QUICK_FIRST)
def test_layers_in_branches_and_loops_train_as_those_of_flax(api, name, micro_batches):
    with jax.numpy_rank_promotion("allow"):
        ours, theirs = (stepped_in(api, name, ours, micro_batches=micro_batches) for ours in (True, False))
    close(ours, theirs)
    assert any(np.abs(a).max() > 0.01 for a in arrays(ours[0]))


@pytest.mark.parametrize("api", slow_but(("nnx", "linen"), "nnx"))
def test_statistics_of_a_row_in_a_branch_are_those_of_the_whole_batch(api):
    if api == "nnx":
        state = nnx_stepped(nnx_model(IN_NNX["cond"], nx.Norm(6, "batch", momentum=0.5, rngs=RNGS)), micro_batches=4)[1]
    else:
        model = linen_model(IN_LINEN["cond"], lambda: nl.Norm("batch", momentum=0.5, use_running_average=False))
        state = linen_stepped(model, micro_batches=4)[1]
    x = np.asarray(X, np.float64)
    close(state.stats, {"mean": 0.5 * x.mean(0), "var": 0.5 + 0.5 * x.var(0)})


@pytest.mark.parametrize("api", slow_but(("nnx", "linen"), "linen"))
def test_penalties_get_out_of_branches_and_loops(api):
    """Two turns through a loop: the penalty of x, and of what the first turn made of it; a branch not taken has none."""
    loop = "fori_loop" if api == "nnx" else "cond"
    norm: Any = (lambda: nl.Norm("batch", l1=0.5, use_running_average=False)) if api == "linen" else None
    if api == "nnx":
        model = nnx_model(IN_NNX[loop], nx.Norm(6, "batch", l1=0.5, rngs=RNGS))
        taken = [nnx_stepped(model, x)[2]["penalty"] for x in (X,)]
    else:
        taken = [linen_stepped(linen_model(IN_LINEN[loop], norm), x)[2]["penalty"] for x in (X, -X)]
    v = np.asarray(X, np.float64) - np.asarray(X, np.float64).mean(0)
    want = 0.5 * np.abs(v).mean()
    second = 0.5 * np.abs(v / np.sqrt(v.var(0) + 1e-5)).mean()
    close(taken, [want + second] if api == "nnx" else [want, 0.0])


def test_a_penalty_that_cannot_get_out_is_named():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = nnx.vmap(lambda _: nx.Norm(6, "batch", l1=0.5, rngs=nnx.Rngs(0)))(jnp.arange(2))

        def __call__(self, x):
            each = nnx.vmap(lambda n, x: IN_NNX["cond"](n, x), in_axes=(0, None))
            return each(self.norm, x)

    with pytest.raises(ValueError, match="the L1 penalty of layer 'norm' cannot get out of the branch or the loop"):
        nnx_stepped(Model())


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_recalibration_names_layers_whose_record_cannot_get_out(api):
    order, message = jnp.arange(16).reshape(2, 8), r"but saw no batch: .* variable_axes=\{\"moments\": 0\}"
    if api == "nnx":
        structure, state = train.nnx_init(nnx_model(IN_NNX["cond"], nx.BatchNorm(6, rngs=RNGS)), TX)
        recalibrate = train.nnx_recalibrate(structure, square)
    else:
        model = linen_model(IN_LINEN["cond"], lambda: nl.BatchNorm(use_running_average=False))
        state, recalibrate = train.linen_init(model, TX, jax.random.key(0), X), train.linen_recalibrate(model, square)
    with pytest.raises(ValueError, match=f"layer '{'layers.0' if api == 'nnx' else 'BatchNorm_0'}' stores .*{message}"):
        recalibrate(state, X, order)


# Flags and arguments.


def test_nnx_layers_that_were_built_frozen_stay_frozen_and_others_train():
    frozen, free = nx.BatchNorm(6, use_running_average=True, rngs=RNGS), nx.Norm(6, "batch", rngs=RNGS)
    asked = nx.Norm(6, "batch", use_running_average=None, rngs=RNGS)
    still, drops = (nnx.Dropout(0.5, deterministic=flag, rngs=nnx.Rngs(1)) for flag in (True, False))
    model = nnx_model(lambda a, b, c, d, e, x: (a(x), b(x), c(x), d(x), e(x)), frozen, free, asked, still, drops)

    def loss(model, batch, train):
        a, b, c, d, e = model(batch)
        return jnp.mean(a) + jnp.mean(b) + jnp.mean(c), {"off": jnp.all(d == batch), "on": jnp.mean(e == 0)}

    _, state, metrics = nnx_stepped(model, loss=loss)
    layers = state.stats["layers"]
    assert layers[0]["mean"][...].tolist() == [0.0] * 6
    assert layers[0]["var"][...].tolist() == [1.0] * 6
    for k in (1, 2):
        close(layers[k]["mean"][...], 0.01 * X.mean(0))
    assert metrics["off"]
    assert 0.2 < metrics["on"] < 0.8


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_model_in_evaluation_mode_is_frozen_until_it_is_told_to_train(evaluated):
    model = nnx_model(lambda n, x: n(x), nx.BatchNorm(6, rngs=nnx.Rngs(0)))
    model.eval() if evaluated else (model.eval(), model.train())
    before, after, _ = nnx_stepped(model)
    assert (arrays(after.stats)[0] == arrays(before.stats)[0]).all() == evaluated


class Wrapper(nn.Module):
    """A module of a user's, whose arguments have defaults that would hide that they were dropped."""

    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x, use_running_average=None, shift=0.0, *, factor=1.0):
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        return factor * nl.BatchNorm()(x, average) + shift


class Forwarding(nn.Module):
    """One that hands on what it is given."""

    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x, *args, **kwargs):
        return nl.BatchNorm(use_running_average=self.use_running_average)(x, *args, **kwargs)


class Renamed(nl.BatchNorm):
    """One whose call has other arguments than that of its base class."""

    @nn.compact
    def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x, not train)


CALLS = {  # a layer, and a call of it in training or not
    "ConditionalNorm": (lambda: nl.ConditionalNorm(3), lambda n, x, train: n(x, jnp.arange(len(x)) % 3, not train)),
    "FiLM": (lambda: nl.FiLM("batch"), lambda n, x, train: n(x, x[:, :4], use_running_average=not train)),
    "AdaLN": (lambda: nl.AdaLN(), lambda n, x, train: n(x, x[:, :4])),
    "KalmanNorm": (lambda: nl.KalmanNorm(), lambda n, x, train: n(x, None, not train)[0]),
    "positional": (lambda: nl.Norm("batch"), lambda n, x, train: n(x, not train)),
    "wrapper": (lambda: Wrapper(), lambda n, x, train: n(x, not train, 3.0, factor=2.0)),
    "keyword": (lambda: Wrapper(), lambda n, x, train: n(x, shift=3.0, use_running_average=not train)),
    "forwarding": (lambda: Forwarding(), lambda n, x, train: n(x, not train, mask=x > 0)),
    "subclass": (lambda: Renamed(), lambda n, x, train: n(x, train)),
    "cell": (
        lambda: nl.RNN(nl.SimpleCell(6, normalizer="batch")),
        lambda n, x, train: n(x[:, None], use_running_average=not train)[:, 0],
    ),
}


@pytest.mark.parametrize("name", slow_but(CALLS, "wrapper", "forwarding"))
def test_arguments_pass_through_whatever_the_statistics(name):
    make, call = CALLS[name]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return call(make(), x, train)

    def loss(call, batch, train):
        return jnp.mean((call(batch, train) - 1) ** 2), {}

    model = Model()
    before, after, metrics = linen_stepped(model, loss=loss, given=(True,), statistics="frozen")
    close(after.stats, before.stats, rtol=0, atol=0)
    close(metrics["loss"], jit(train.linen_eval(model, loss))(before, X)["loss"])
    if name not in ("AdaLN", "cell"):
        recalibrated = jit(train.linen_recalibrate(model, loss))(before, X, jnp.arange(16).reshape(2, 8))
        mean = [a for path, a in jax.tree_util.tree_leaves_with_path(recalibrated.stats) if "mean" in str(path[-1])]
        want = np.mean(X, 0, where=np.asarray(X) > 0) if name == "forwarding" else X.mean(0)
        close(mean, [want])


def test_collections_that_a_call_changes_are_named():
    def loss(mutable):
        return lambda call, batch, train: (jnp.mean(call(batch, mutable=mutable)), {})

    layer = nl.BatchNorm(use_running_average=False)
    assert linen_stepped(layer, loss=loss(False))[2]["loss"].shape == ()
    for everything in (True, nn.DenyList("params")):
        with pytest.raises(TypeError, match=r"mutable= names further collections, such as \['intermediates'\]; found"):
            linen_stepped(layer, loss=loss(everything))


# Dtypes.


@pytest.mark.parametrize(
    ("api", "averaging"), [("nnx", "exponential"), pytest.param("linen", "debiased", marks=pytest.mark.slow)]
)
def test_statistics_keep_the_dtype_that_they_were_cast_to(api, averaging):
    def cast(a):
        return a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a

    if api == "nnx":
        structure, state = train.nnx_init(nx.Norm(6, "batch", averaging=averaging, momentum=0.5, rngs=RNGS), TX)
        step = train.nnx_step(structure, square, TX, micro_batches=2)
    else:
        model = nl.Norm("batch", averaging=averaging, momentum=0.5, use_running_average=False)
        state = train.linen_init(model, TX, jax.random.key(0), X)
        step = train.linen_step(model, square, TX, micro_batches=2)
    run = jit(train.epoch(step), donate_argnums=0)
    state = state._replace(stats=jax.tree.map(cast, state.stats))
    kinds = [a.dtype for a in jax.tree.leaves(state.stats)]
    for _ in range(2):
        state, _ = run(state, X, jnp.arange(16).reshape(2, 8))
    assert [a.dtype for a in jax.tree.leaves(state.stats)] == kinds
    assert run._cache_size() == 1
    mean, want = nnx.to_pure_dict(state.stats)["mean"] if api == "nnx" else state.stats["batch_stats"]["mean"], 0.0
    halves = np.asarray(X).reshape(2, 8, 6).mean(1)
    for half in (*halves, *halves):
        want = 0.5 * want + 0.5 * half
    close(mean.astype(np.float32), want / (1 - 0.5**4 if averaging == "debiased" else 1), rtol=0.02, atol=0.01)


@pytest.mark.slow
def test_a_mean_that_becomes_complex_is_known_at_init_or_named_by_the_first_step():
    z = lax.complex(X, X[::-1])

    def loss(call, batch, train):
        return jnp.mean(jnp.abs(call(batch) - 1) ** 2), {}

    for layer in (nl.BatchNorm(use_running_average=False), nl.Norm("batch", use_running_average=False)):
        before, after, _ = linen_stepped(layer, z, loss)
        kinds = [a.dtype for a in arrays(before.stats)]
        assert kinds == [a.dtype for a in arrays(after.stats)] == [jnp.complex64, jnp.float32]
        close(after.stats["batch_stats"]["mean"], 0.01 * z.mean(0))
    message = (
        "mean is float32 in the state and complex64 after a step, but a training loop carries one dtype: cast it to"
    )
    with pytest.raises(TypeError, match=message):
        nnx_stepped(nx.BatchNorm(6, use_scale=False, use_bias=False, rngs=RNGS), z, loss)
    nnx_stepped(nx.Norm(6, "batch", param_dtype=jnp.complex64, rngs=RNGS), z, loss)


DOUBLE = {  # layers whose statistics are those of each channel
    "BatchNorm": ("BatchNorm", ()),
    "Norm": ("Norm", ("batch",)),
    "BatchRenorm": ("BatchRenorm", ()),
    "KalmanNorm": ("KalmanNorm", ()),
    "EvoNormB0": ("EvoNormB0", ("n ...", "c")),
    "SwitchableNorm": ("SwitchableNorm", (("layer", "batch"),)),
}


@pytest.mark.parametrize("name", slow_but(DOUBLE, "Norm"))
def test_statistics_of_float64_are_float64(name):
    """Means of a thousand beside deviations of one, which float32 stores to 3e-5."""
    kind, args = DOUBLE[name]
    momentum, double = 0.25, jnp.float64
    with jax.enable_x64(True):
        z = 1e3 + np.random.default_rng(0).normal(size=(16, 6))
        first = {"mean": np.zeros(6), "var": np.ones(6)}
        want = {k: 0.25 * first[k] + 0.75 * v for k, v in (("mean", z.mean(0)), ("var", z.var(0)))}
        layer = getattr(nl, kind)(*args, use_running_average=False, momentum=momentum)
        variables = layer.init(jax.random.key(0), z)
        stored = layer.apply(variables, z, mutable=["batch_stats"])[1]["batch_stats"]
        module = getattr(nx, kind)(6, *args, momentum=momentum, param_dtype=double, rngs=nnx.Rngs(0))
        kinds = {k: getattr(module, k)[...].dtype for k in stored}
        module(jnp.asarray(z))
        for k, value in stored.items():
            close((value, getattr(module, k)[...]), (want[k], want[k]), rtol=0, atol=1e-9)
            assert variables["batch_stats"][k].dtype == value.dtype == kinds[k] == double


@pytest.mark.slow
def test_merged_and_recalibrated_statistics_and_those_of_cells_are_float64_too():
    with jax.enable_x64(True):
        z = jnp.asarray(1e3 + np.random.default_rng(0).normal(size=(16, 6)))
        model, order = nl.Norm("batch", averaging="debiased", use_running_average=False), jnp.arange(16).reshape(4, 4)
        state, after, _ = linen_stepped(model, z, micro_batches=4)
        for found in (after, train.linen_recalibrate(model, square)(state, z, order)):
            stored = found.stats["batch_stats"]
            close((stored["mean"], stored["var"]), (z.mean(0), z.var(0)), rtol=0, atol=1e-9)
        double = {"momentum": 0.0, "param_dtype": jnp.float64}
        cell = nl.SimpleCell(6, normalizer="batch", use_running_average=False, **double)
        variables: Any = cell.init(jax.random.key(0), z, z)
        stored = cell.apply(variables, z, z, mutable=["batch_stats"])[1]["batch_stats"]
        sums = z @ variables["params"]["i"]["kernel"] + z @ variables["params"]["h"]["kernel"]
        (site,) = stored.values()
        close((site["mean"], site["var"]), (sums.mean(0), sums.var(0)), rtol=0, atol=1e-9)


# A mean and its variance are a pair.

NAN, INF = jnp.nan, jnp.inf
PAIRS = {  # means and variances of a batch, and where they are stored
    "mean": ([NAN, 2.0, 2.0], [2.0, 2.0, 2.0], [False, True, True]),
    "variance": ([2.0, 2.0, 2.0], [2.0, INF, NAN], [True, False, False]),
    "of all": ([2.0, 2.0, 2.0], INF, [False, False, False]),
    "of one": ([2.0, NAN, 2.0], 2.0, [False, False, False]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_no_mean_is_stored_without_its_variance_nor_a_variance_without_its_mean(case):
    mean, var, stored = PAIRS[case]
    shape = np.shape(var)
    batch = Stats(jnp.array(mean), jnp.array(var), jnp.ones(3), jnp.ones(shape))
    old = Running(jnp.zeros(3), jnp.zeros(shape), jnp.zeros(3, jnp.int32), jnp.zeros(shape, jnp.int32))
    for found in (update(old, batch, 0.5), update(old, batch, 0.5, "cumulative")):
        for value in (found.mean, found.var):
            assert isinstance(value, jax.Array)
            assert (value > 0).tolist() == (stored if value.ndim else stored[0])
    counts: Any = update(old, batch, 0.5, "cumulative").mean_count
    assert counts.tolist() == stored
    found = published_update(old._replace(mean_count=None, var_count=None), batch, TABLE["batch"], "hoffer_lp")
    assert (np.asarray(found.mean) > 0).tolist() == stored


def test_a_layer_stores_neither_where_a_channel_is_not_finite():
    x = X.at[3, 2].set(jnp.inf)
    layer: Any = nl.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    stored = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
    moved = [(stored[k] != variables["batch_stats"][k]).tolist() for k in ("mean", "var")]
    assert moved == [[True, True, False, True, True, True]] * 2


# A trained State goes back into its model.


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_trained_state_goes_back_into_its_model(micro_batches):
    model = nnx_model(lambda d, n, e, x: n(e(d(x))), nnx.Linear(6, 6, rngs=RNGS), nx.Norm(6, "batch", rngs=RNGS),
                      nnx.Dropout(0.5, rngs=nnx.Rngs(1)))  # fmt: skip
    structure, state = train.nnx_init(model, TX)
    mesh = jax.make_mesh((4,), ("data",))
    step = jit(train.nnx_step(structure, square, TX, micro_batches=micro_batches, mesh=mesh), donate_argnums=0)
    state = train.place(state, mesh)
    for _ in range(2):
        state, _ = step(state, train.shard(X, mesh))
        train.nnx_update(model, state)
    want = jit(train.nnx_eval(structure, square))(state, X)["loss"]
    step(state, train.shard(X, mesh))  # takes the state's arrays, not the model's
    found = nnx.view(model, use_running_average=True, deterministic=True)
    close(square(found, X, False)[0], want)
    assert not model.layers[1].use_running_average


def test_a_state_of_another_model_is_refused_by_name():
    model = nnx.Linear(6, 3, rngs=RNGS)
    _, other = train.nnx_init(nnx.Linear(6, 4, rngs=RNGS), TX)
    named = "the State is of another model: bias is (3,) in the model and (4,) in the State"
    with pytest.raises(ValueError, match=re.escape(named)):
        train.nnx_update(model, other)
    with pytest.raises(ValueError, match=r"nnx_update takes a State of `nnx_init` and `nnx_step`"):
        train.nnx_update(model, train.linen_init(nn.Dense(3), TX, jax.random.key(0), X))
