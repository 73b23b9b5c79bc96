"""WeightNorm and SpectralNorm around a layer: Flax's numbers on Flax's variables."""

import functools
import inspect
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import normjax.linen.weights as linen_weights
import normjax.nnx as our_nnx
import normjax.nnx.weights as nnx_weights
from normjax.interop import text_keys
from tests.kernels import close, draw, each, quickly

X: Any = draw((4, 5), 40).astype(np.float32)


class Inner(nn.Module):
    """Two layers, one below another."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.Dense(3, bias_init=nn.initializers.normal())(x))


def linen_wrapper(library, row):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return library.WeightNorm(Inner(), **row)(nn.Dense(6)(x))

    return Model()


# What our calls read, or ignore on purpose (`promote_dtype`, `rngs` after construction). What Flax adds must be read too.
READ: dict[Any, str] = {
    nn.WeightNorm: "layer_instance epsilon dtype param_dtype use_scale scale_init feature_axes variable_filter parent name",
    nn.SpectralNorm: "layer_instance n_steps epsilon dtype param_dtype error_on_non_matrix collection_name parent name",
    nnx.WeightNorm: "self layer_instance feature_axes use_scale scale_init epsilon dtype param_dtype variable_filter "
    "promote_dtype rngs",
    nnx.SpectralNorm: "self layer_instance n_steps epsilon dtype param_dtype error_on_non_matrix update_stats rngs",
}


@pytest.mark.parametrize("library", [nn, nnx], ids=["linen", "nnx"])
def test_wrappers_are_flax_s_own_with_every_argument_read(library):
    ours = {nn: linen_weights, nnx: nnx_weights}[library]
    for name in ("WeightNorm", "SpectralNorm"):
        flax, mine = getattr(library, name), getattr(ours, name)
        assert issubclass(mine, flax)
        for wrapper in (flax, mine):
            made = wrapper if library is nn else wrapper.__init__
            more = {"feature_axes"} if wrapper is mine and name == "SpectralNorm" else set()  # of ours alone
            listed = {*READ[flax].split(), *more}
            assert set(inspect.signature(made).parameters) == listed


WRAPPED: dict[str, dict[str, Any]] = {
    "default": {},
    "all variables": {"variable_filter": None, "scale_init": nn.initializers.normal()},
    "one layer": {"variable_filter": {"last"}, "use_scale": False},
    "one norm": {"feature_axes": None, "epsilon": 0.1, "scale_init": nn.initializers.normal()},
    "inputs": {"feature_axes": 0, "scale_init": nn.initializers.normal()},
    "none averaged": {"feature_axes": (0, -1), "epsilon": 0.1},
}


@each(WRAPPED, ())
def test_linen_weight_norm_takes_flax_s_variables_and_gives_its_numbers(name):
    row = WRAPPED[name]
    ours, flax = linen_wrapper(linen_weights, row), linen_wrapper(nn, row)
    variables = flax.init(jax.random.key(0), X)
    mine = ours.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)

    def everything(model):
        def loss(variables):
            y = model.apply(variables, X)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)

    both = quickly(lambda v: (everything(ours)(v), everything(flax)(v)))
    for inputs in (variables, mine):
        got, want = both(inputs)
        # A bias by itself is a sign times its scale, and its gradient 0.
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_linen_wrappers_store_the_kernels_that_the_layer_made():
    wrapper: Any
    options: Any
    for wrapper, options in ((linen_weights.WeightNorm, {}), (linen_weights.SpectralNorm, {"update_stats": True})):
        layer: Any = wrapper(nn.Dense(4, kernel_init=nn.initializers.constant(3.0)))
        variables = layer.init(jax.random.key(0), X, **options)
        assert (variables["params"]["layer_instance"]["kernel"] == 3).all()
        _, after = layer.apply(variables, X, mutable=True, **options)
        chex.assert_trees_all_equal(after["params"], variables["params"])


class Normed(nn.Module):
    """A layer with running statistics of two axes, which are no parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        mean = self.variable("batch_stats", "kernel", jnp.zeros, (2, 4))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            mean.value = mean.value + jnp.mean(x, 0)[None]
        return x + mean.value[:1]


@pytest.mark.slow
def test_linen_wrappers_leave_the_statistics_of_the_layer_alone():
    wrapper: Any
    options: Any
    for wrapper, options in ((linen_weights.WeightNorm, {}), (linen_weights.SpectralNorm, {"update_stats": True})):
        layer = wrapper(Normed())
        variables = layer.init(jax.random.key(0), X, **options)
        bare = {"params": variables["params"]["layer_instance"]}
        _, after = layer.apply(variables, X, mutable=["batch_stats"], **options)
        stored = after["batch_stats"]["layer_instance"]["kernel"]
        kernel = np.asarray(bare["params"]["Dense_0"]["kernel"], float)
        scale = (
            np.sqrt((kernel**2).sum(0)) if not options else after["batch_stats"]["layer_instance/Dense_0/kernel/sigma"]
        )
        close(stored, np.broadcast_to((X @ (kernel / scale)).mean(0), (2, 4)), 1e-5)


@pytest.mark.slow
def test_linen_spectral_norm_takes_flax_s_variables_and_gives_its_numbers():
    ours, flax = (library.SpectralNorm(Inner(), n_steps=2) for library in (linen_weights, nn))
    variables = flax.init(jax.random.key(0), X, update_stats=False)
    mine = ours.init(jax.random.key(0), X, update_stats=False)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)

    def everything(model):
        def loss(params, update):
            rest = {"batch_stats": variables["batch_stats"]}
            y, after = model.apply({"params": params, **rest}, X, update_stats=update, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, after)

        return [jax.grad(loss, has_aux=True)(variables["params"], update) for update in (True, False)]

    got, want = quickly(lambda: (everything(ours), everything(flax)))()
    jax.tree.map(functools.partial(close, bound=1e-5), got, want)
    kept = got[1][1][1]["batch_stats"]
    chex.assert_trees_all_equal(kept, variables["batch_stats"])


def as_flax(state):
    """A pure dictionary, keys as text: Flax keeps its scales as bare arrays."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


@each(["default", "one norm", "inputs", "no scale"], ("default",))
def test_nnx_weight_norm_gives_flax_s_numbers_and_learns_its_scale(name):
    row = {"no scale": {"use_scale": False}, **WRAPPED}[name]
    row = {k: v for k, v in row.items() if k != "scale_init"}
    ours, flax = (
        lib.WeightNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1), **row) for lib in (nnx_weights, nnx)
    )
    before = nnx.to_pure_dict(nnx.state(ours))
    assert as_flax(before).keys() == as_flax(text_keys(nnx.to_pure_dict(nnx.state(flax)))).keys()
    structure, params = nnx.split(ours, nnx.Param)

    def loss(params):
        y = nnx.merge(structure, params)(X)
        return jnp.sum(jnp.sin(y)), y

    gradient, y = jax.grad(loss, has_aux=True)(params)
    close(y, flax(X), 1e-5)
    close(ours(X), y)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(ours)), before)
    if row.get("use_scale", True):
        assert np.abs(gradient["scales"]["kernel"][...]).max() > 1e-3


@pytest.mark.slow
def test_nnx_checkpoints_of_flax_load():
    linear = nnx.Linear(5, 4, rngs=nnx.Rngs(3))
    weight: Any = nnx.WeightNorm(nnx.clone(linear), rngs=nnx.Rngs(1))
    weight.scales[("kernel",)] = jnp.arange(1.0, 5.0)
    for flax, wrapper in (
        (weight, nnx_weights.WeightNorm),
        (nnx.SpectralNorm(nnx.clone(linear), rngs=nnx.Rngs(1)), nnx_weights.SpectralNorm),
    ):
        ours, plain = (wrapper(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)) for _ in range(2))
        nnx.update(ours, nnx.state(flax))  # the state as it is, or as a dictionary
        state = nnx.state(plain)
        nnx.replace_by_pure_dict(state, text_keys(nnx.to_pure_dict(nnx.state(flax))))
        nnx.update(plain, state)
        y = flax(X)
        close(ours(X), y, 1e-5)
        close(plain(X), y, 1e-5)


@pytest.mark.slow
def test_nnx_spectral_norm_gives_flax_s_first_numbers_and_changes_no_kernel():
    made = [
        lib.SpectralNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), n_steps=2, rngs=nnx.Rngs(1)) for lib in (nnx_weights, nnx)
    ]
    ours, flax = made
    theirs = text_keys(nnx.to_pure_dict(nnx.state(flax)))
    assert as_flax(nnx.to_pure_dict(nnx.state(ours))).keys() == as_flax(theirs).keys()
    kernel, u = ours.layer_instance.kernel[...], ours.batch_stats[("kernel", "u")][...]
    ours.eval()
    y = ours(X)
    np.testing.assert_array_equal(ours.batch_stats[("kernel", "u")][...], u)
    np.testing.assert_array_equal(ours.layer_instance.kernel[...], kernel)
    ours.train()
    close(ours(X), y)
    close(flax(X), y, 1e-5)
    for name in ("u", "sigma"):
        close(ours.batch_stats[("kernel", name)][...], flax.batch_stats[("kernel", name)][...], 1e-5)
    for _ in range(30):
        ours(X)
    np.testing.assert_array_equal(ours.layer_instance.kernel[...], kernel)
    close(ours.batch_stats[("kernel", "sigma")][...], np.linalg.svd(np.asarray(kernel, float))[1][0], 1e-4)
    matrix = nnx_weights.SpectralNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), n_steps=0, rngs=nnx.Rngs(0))
    close(matrix(X), matrix.layer_instance(X))


@pytest.mark.slow
def test_nnx_wrappers_let_the_layer_update_and_be_captured():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 4, rngs=rngs)
            self.norm = our_nnx.Norm(4, "batch", l1=0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    for wrapper in (nnx_weights.WeightNorm, nnx_weights.SpectralNorm):
        model: Any = wrapper(Block(nnx.Rngs(0)), rngs=nnx.Rngs(1))
        before = model.layer_instance.norm.mean[...]
        captured: Any = nnx.capture(model, our_nnx.Penalty)(X)
        sown = captured[1]
        assert np.abs(model.layer_instance.norm.mean[...] - before).max() > 1e-4
        assert float(sown["layer_instance"]["norm"]["l1"][...]) > 0


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_nnx_wrappers_go_through_msgpack_and_come_back(name):
    wrapper = getattr(our_nnx, name)
    ours, twin = (wrapper(nnx.Linear(5, 4, rngs=nnx.Rngs(seed)), rngs=nnx.Rngs(seed)) for seed in (0, 1))
    packed = serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(ours)))
    state = nnx.state(twin)
    restored: Any = serialization.msgpack_restore(packed)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(twin, state)
    np.testing.assert_array_equal(twin(X), ours(X))


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_metadata_add_nothing_to_the_names_of_linen_wrappers(box):
    init = nn.initializers.lecun_normal()
    cases: tuple[tuple[Any, dict[str, Any]], ...] = (
        (linen_weights.WeightNorm, {}),
        (linen_weights.SpectralNorm, {"update_stats": True}),
    )
    for wrapper, options in cases:
        plain, boxed = (
            wrapper(nn.Dense(4, kernel_init=made)).init(jax.random.key(0), X, **options)
            for made in (init, box(init, (None, "model")))
        )
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(boxed), plain)


def test_weight_norm_from_the_norms_changes_nothing_at_first():
    for axes in (-1, 0, None):
        layer = linen_weights.WeightNorm(nn.Dense(4), scale_init=None, feature_axes=axes)
        variables = layer.init(jax.random.key(0), X)
        want = nn.Dense(4).apply({"params": variables["params"]["layer_instance"]}, X)
        close(layer.apply(variables, X), want, 1e-6)
        twin = our_nnx.WeightNorm(
            nnx.Linear(5, 4, rngs=nnx.Rngs(0)), scale_init=None, feature_axes=axes, rngs=nnx.Rngs(0)
        )
        close(twin(X), twin.layer_instance(X), 1e-6)


def test_spectral_norm_of_feature_axes_divides_by_the_largest_singular_value_of_that_matrix():
    x = np.ones((2, 6, 5), np.float32)
    transposed = functools.partial(nn.ConvTranspose, 4, (3,), transpose_kernel=True)
    layer: Any = linen_weights.SpectralNorm(transposed(), feature_axes=-2, n_steps=50)
    variables = layer.init(jax.random.key(0), x, update_stats=False)
    params = variables["params"]["layer_instance"]
    sigma = np.linalg.svd(np.moveaxis(np.asarray(params["kernel"], float), 1, -1).reshape(-1, 4))[1][0]
    want = transposed().apply({"params": {**params, "kernel": params["kernel"] / sigma}}, x)
    close(layer.apply(variables, x, update_stats=False), want, 1e-5)
    inner = nnx.ConvTranspose(5, 4, (3,), transpose_kernel=True, rngs=nnx.Rngs(0))
    inner.kernel[...] = params["kernel"]
    twin: Any = our_nnx.SpectralNorm(inner, feature_axes=-2, n_steps=50, rngs=nnx.Rngs(0))
    close(twin(x), want, 1e-5)
