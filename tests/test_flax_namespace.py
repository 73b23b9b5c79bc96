"""Programs written for Flax run on our layers: by one changed line, or, unchanged, where layers are swapped from outside."""

import functools
import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct

import normjax.flax
import normjax.nnx
from normjax import train
from normjax.linen import swap_layers as swapped_in_linen
from normjax.nnx import swap_layers as swapped_in_nnx
from tests.rows import jit
from tests.test_flax import assert_close, lenient

NORMS = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "SpectralNorm", "WeightNorm")
OURS = {*NORMS, "GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"}

LINEN_CLIENT = """
from flax import linen as nn, struct
import functools, jax.numpy as jnp

@struct.dataclass
class Widths:
    hidden: int = 8

class Block(nn.Module):
    norm: type = nn.BatchNorm
    @nn.compact
    def __call__(self, x, train, mask):
        x = nn.Dense(Widths().hidden, use_bias=False, kernel_init=nn.initializers.lecun_normal())(x)
        x = self.norm(use_running_average=not train, momentum=0.9)(x, mask=mask)
        x = nn.relu(nn.GroupNorm(num_groups=2)(x)) + nn.remat(nn.LayerNorm)()(x)
        return nn.SpectralNorm(nn.Dense(8))(nn.RMSNorm()(x), update_stats=train)

class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask):
        x = Block()(x, train, mask)[:, 0]
        return nn.OptimizedLSTMCell(4)((x[:, :4], x[:, 4:]), x)
"""
NNX_CLIENT = """
from flax import nnx

class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, use_bias=False, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(8, momentum=0.9, rngs=rngs), nnx.GroupNorm(8, 2, rngs=rngs)])
        self.last = nnx.Sequential(nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs))
        self.cell = nnx.GRUCell(8, 4, rngs=rngs)

    def __call__(self, x, mask):
        x = nnx.relu(self.first(x))
        x = self.norms[1](self.norms[0](x, mask=mask))
        x = self.last(x)[:, 0]
        return self.cell(x[:, :4], x)[1]
"""
X = np.random.default_rng(0).normal(1, 2, (4, 5, 3)).astype(np.float32)
MASK = np.arange(5)[None, :, None] < np.array([5, 1, 2, 3])[:, None, None]


def client(text: str, changed: bool) -> dict[str, Any]:
    """The names of a program, with its one line changed or not."""
    names: dict[str, Any] = {"__name__": "client"}
    exec(
        compile(text.replace("from flax import", "from normjax.flax import") if changed else text, "client", "exec"),
        names,
    )
    return names


def of_linen(model, variables, call=lambda f: f):
    """The output of a training batch with its gradients and statistics, and the output of inference."""

    @jit
    def run(variables):
        def loss(params):
            apply = call(functools.partial(model.apply, mutable=["batch_stats"]))
            y, changed = apply({**variables, "params": params}, X, True, MASK)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y)), (y, changed)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    with lenient():
        return run(variables)


def of_nnx(model):
    """The output of a training batch, gradients, and all variables after it."""

    structure, state = nnx.split(model)

    @jit
    def step(state, x):
        twin = nnx.merge(structure, state, copy=True)
        return nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(x, MASK))))(twin), nnx.state(twin)

    with lenient():
        out, changed = step(state, X)
    nnx.update(model, changed)
    after = [nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)]
    return jax.tree.map(jnp.asarray, (out[0], nnx.to_pure_dict(out[1]), *after))


@functools.cache
def by_flax():
    return of_nnx(client(NNX_CLIENT, False)["Model"](nnx.Rngs(0)))


def test_the_namespaces_have_all_names_of_flax_and_ours_for_the_layers_that_agree():
    for name in ("flax", "flax.linen", "flax.nnx"):
        theirs, mine = importlib.import_module(name), importlib.import_module(f"normjax.{name}")
        names = [known for known in dir(theirs) if not known.startswith("_")]
        assert not {known for known in dir(mine) if not known.startswith("_")} - set(names), "a name that Flax has not"
        other = {known for known in names if getattr(mine, known) is not getattr(theirs, known)}
        assert other == ({"linen", "nnx"} if name == "flax" else OURS)
        for known in other - {"linen", "nnx"}:
            assert issubclass(getattr(mine, known), getattr(theirs, known))
        with pytest.raises(AttributeError, match="Densee"):
            mine.Densee  # noqa: B018
    from normjax.flax.linen import fp8_ops  # a submodule that Flax does not load by itself  # noqa: F401

    assert normjax.flax.struct is struct


def recorded(monkeypatch):
    """The layouts that our layers have read, in the order of the calls."""
    from normjax._layers import flax_names

    seen, plain = [], flax_names.normalize_as_read

    def spy(x, reading, *args, **kwargs):
        seen.append(reading.layout)
        return plain(x, reading, *args, **kwargs)

    monkeypatch.setattr(flax_names, "normalize_as_read", spy)
    return seen


def test_a_linen_program_computes_what_it_did_with_one_changed_line_and_unchanged_with_swapped_layers(monkeypatch):
    seen, (theirs, mine) = (
        recorded(monkeypatch),
        (client(LINEN_CLIENT, changed)["Model"]() for changed in (False, True)),
    )
    start = {"train": True, "mask": MASK}
    with lenient():
        variables = jax.jit(functools.partial(theirs.init, **start))(jax.random.key(0), X)
        want = of_linen(theirs, variables)
        assert not seen
        tree = jax.eval_shape(functools.partial(mine.init, **start), jax.random.key(0), X)
        assert jax.tree.structure(tree) == jax.tree.structure(variables)
    seen.clear()
    for model, call in ((mine, lambda f: f), (theirs, lambda f: swapped_in_linen()(f))):
        got = of_linen(model, variables, call)
        assert len(seen) == 4  # batch, group, layer and RMS norm
        assert_close(got, want, 3e-5)
        seen.clear()


@pytest.mark.slow
def test_an_nnx_program_with_one_changed_line_computes_what_it_did():
    mine = client(NNX_CLIENT, True)["Model"](nnx.Rngs(0))
    assert type(mine.norms[0]).__module__ == "normjax.nnx.flax_names"
    assert_close(of_nnx(mine), by_flax(), 3e-5)


def test_a_subclass_that_asks_flax_s_call_asks_ours_and_other_threads_do_not(monkeypatch):
    class Twice(nn.LayerNorm):
        @nn.compact
        def __call__(self, x, *, mask=None):
            return 2 * super().__call__(x, mask=mask)

    seen, x = recorded(monkeypatch), jnp.array([[1.0, 3.0]])
    variables = Twice().init(jax.random.key(0), x)
    with swapped_in_linen():
        assert np.asarray(Twice().apply(variables, x)).round(3).tolist() == [[-2.0, 2.0]]
        assert len(seen) == 1
        nn.Dense(2).init(jax.random.key(0), x)
    Twice().apply(variables, x)
    assert len(seen) == 1


def test_swapped_layers_of_an_nnx_model_keep_variables_references_and_numbers():
    model = client(NNX_CLIENT, False)["Model"](nnx.Rngs(0))
    shared, before = model.norms[0], nnx.to_pure_dict(nnx.state(model, nnx.Param))
    twin = swapped_in_nnx(nnx.clone(model))
    assert type(shared) is nnx.BatchNorm
    assert swapped_in_nnx(model) is model
    assert type(shared).__module__ == "normjax.nnx.flax_names"
    assert nnx.graphdef(model) == nnx.graphdef(twin)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), before, 0.0)
    assert_close(of_nnx(model), by_flax(), 3e-5)
    wrapped = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    with lenient():
        y = nnx.clone(wrapped)(X)
    assert_close(swapped_in_nnx(wrapped)(X), y)
    assert wrapped.scales is not None
    assert {type(scale) for scale in wrapped.scales.values()} == {nnx.Param}
    assert type(pickle.loads(pickle.dumps(wrapped))) is normjax.nnx.WeightNorm


@pytest.mark.slow
def test_swapped_wrappers_of_kernels_keep_their_numbers_and_train():
    for made in (nnx.SpectralNorm, nnx.WeightNorm):
        wrapped, plain = (made(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)) for _ in range(2))
        ours = swapped_in_nnx(wrapped)
        assert ours is wrapped
        assert type(ours) is getattr(normjax.nnx, made.__name__)
        with lenient():
            assert_close(ours(X), plain(X), 1e-6)
        nnx.update(
            ours, nnx.state(made(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)))
        )  # a checkpoint of Flax's


def test_a_training_step_of_swapped_layers_merges_micro_batches_and_freezes_as_that_of_flax():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, momentum=0.5)(x)

    def loss(call, batch, train):
        return jnp.mean((call(batch) - 1) ** 2), {}

    x, tx = X.reshape(20, 3), optax.sgd(0.1)
    state = train.linen_init(Model(), tx, jax.random.key(0), x)
    merged = jax.jit(swapped_in_linen()(train.linen_step(Model(), loss, tx, micro_batches=4)))(state, x)[0].stats
    var = x.var(0, dtype=np.float64)
    np.testing.assert_allclose(merged["batch_stats"]["BatchNorm_0"]["var"], 0.5 + 0.5 * var, rtol=1e-5)
    frozen = jax.jit(swapped_in_linen()(train.linen_step(Model(), loss, tx, statistics="frozen")))(state, x)[1]
    np.testing.assert_allclose(frozen["loss"], np.mean((x / np.sqrt(1 + 1e-5) - 1) ** 2), rtol=1e-5)


TYPED = """
from normjax.flax import linen as nn, nnx, struct
from normjax import flax
import normjax.flax.linen as lower

class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, kernel_init=nn.initializers.ones)(x)
        return nn.relu(nn.LayerNorm(epsilon=1e-3)(x))

nn.LSTMCell(3, normalizer="token")
nnx.LSTMCell(3, 4, normalizer="token", gate_fn=nnx.sigmoid, rngs=nnx.Rngs(0))
lower.partitioning, nn.meta.unbox, nnx.initializers.ones, flax.linen.Conv, struct.dataclass
nn.LayerNorm(epsilom=3)
nn.Densee
nnx.LayerNorm(3, bogus=2, rngs=nnx.Rngs(0))
nnx.GRUCell(3, 4, bogus=3, rngs=nnx.Rngs(0))
flax.linnen
"""


@pytest.mark.slow
def test_a_checker_knows_the_names_of_the_namespaces(tmp_path):
    (tmp_path / "program.py").write_text(TYPED)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if " - error: " in line}
    assert lines == set(range(15, 20)), done.stdout
