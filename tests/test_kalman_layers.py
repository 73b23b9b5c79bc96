"""KalmanNorm in linen and nnx: the same numbers, learned parts, stored statistics, inference."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from normjax import FieldError, Normalizer, normalize
from normjax.linen import KalmanNorm
from normjax.nnx import KalmanNorm as NNXKalmanNorm
from normjax.nnx.host import Moments
from normjax.propagate import Belief, predict
from tests.beliefs import EPS, PRIOR, X, belief_of, blocks_of, close, draw, expected, quick
from tests.refusals import refuses


class Stack(nn.Module):
    """Two layers with everything learned."""

    @nn.compact
    def __call__(self, x):
        h, state = KalmanNorm(blocks_of(2), use_running_average=False)(x)
        conv = nn.Conv(3, (3, 3))
        h = conv(nn.relu(h))
        p = conv.variables["params"]
        prior = predict(state, p["kernel"], bias=p["bias"], size=h.shape[1:3])
        return KalmanNorm(blocks_of(2), gain=0.2, learn_gain=True, learn_transition=True,
                          use_running_average=False)(h, prior)  # fmt: skip


class NNXStack(nnx.Module):
    def __init__(self, rngs):
        self.conv: Any = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.first: Any = NNXKalmanNorm(2, blocks_of(2), rngs=rngs)
        self.last: Any = NNXKalmanNorm(3, blocks_of(2), gain=0.2, learn_gain=True, learn_transition=True, rngs=rngs)

    def __call__(self, x):
        h, state = self.first(x)
        h = self.conv(nnx.relu(h))
        prior = predict(state, self.conv.kernel[...], bias=self.conv.bias[...], size=h.shape[1:3])
        return self.last(h, prior)


@pytest.mark.slow
def test_linen_and_nnx_stacks_agree_and_gradients_reach_every_parameter():
    x = jnp.asarray(draw(0, 4, 4, 3, 2), jnp.float32)
    variables = quick(Stack().init)(jax.random.key(0), x)
    params = jax.tree.map(
        lambda a: a + np.float32(0.1) * draw(a.size, *a.shape).astype(np.float32), variables["params"]
    )
    assert {k: v.shape for k, v in params["KalmanNorm_1"].items()} == {
        "scale": (3,), "bias": (3,), "gain_logit": (), "a": (3,), "u": (3,), "r": (3,)}  # fmt: skip

    def run(params):
        (y, state), changed = Stack().apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y + jnp.arange(3.0).reshape(1, 1, 1, 3))), (y, state, changed["batch_stats"])

    (_, (y, state, stored)), grads = quick(jax.value_and_grad(run, has_aux=True))(params)
    assert [jax.tree_util.keystr(at) for at, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)] == []
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    model = NNXStack(nnx.Rngs(0))
    shapes = nnx.eval_shape(lambda: NNXStack(nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, nnx.state(shapes)) == jax.tree.map(jnp.shape, nnx.state(model))
    layers = {"KalmanNorm_0": model.first, "KalmanNorm_1": model.last, "Conv_0": model.conv}
    for layer, values in params.items():
        for name, value in values.items():
            getattr(layers[layer], name)[...] = value

    graph, arrays = nnx.split(model)

    def apply(arrays, x):
        merged = nnx.merge(graph, arrays)
        return merged(x), nnx.state(merged, nnx.BatchStat)

    out, stats = quick(apply)(arrays, x)
    close(out, (y, state))
    nnx.update(model, stats)
    for layer, values in stored.items():
        close({name: getattr(layers[layer], name)[...] for name in values}, values)


@pytest.mark.parametrize(
    "source", ["filtered", *(pytest.param(source, marks=pytest.mark.slow) for source in ("batch", "first_block"))]
)
def test_running_average_keeps_nine_tenths_of_what_is_named_and_inference_is_plain(source):
    n, q, prior = blocks_of(2), 0.3, belief_of()
    layer = KalmanNorm(n, gain=q, stored=source, momentum=0.9)
    variables = layer.init(jax.random.key(0), X, prior, use_running_average=False)
    out, changed = layer.apply(variables, X, prior, use_running_average=False, mutable=["batch_stats"])
    _, kept = expected(X, PRIOR, 1.0 if source == "batch" else q, count=2)
    mean, var = kept[:, 0] if source == "first_block" else kept.mean(1)
    close(changed["batch_stats"], {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var})
    other = NNXKalmanNorm(6, n, gain=q, stored=source, rngs=nnx.Rngs(0))
    capture: Any = nnx.capture(other, Moments)
    same, sown = capture(X, prior)
    close(same, out)
    close({"mean": other.mean[...], "var": other.var[...]}, changed["batch_stats"])
    close(sown["batch"].get_value()[0].stats.var, var)
    y, state = cast(Any, layer.apply({**variables, **changed}, X, prior, use_running_average=True))
    mean, var = (cast(Any, changed["batch_stats"][name]) for name in ("mean", "var"))
    close(y, (X - np.asarray(mean)) / np.sqrt(np.asarray(var) + EPS), 1e-5, 1e-5)
    close(state.input, Belief(mean.reshape(1, 1, 1, 6), var.reshape(1, 1, 1, 6)))
    other.eval()
    close(other(X, prior), (y, state))


@pytest.mark.slow
def test_first_variance_is_unbiased_where_asked_and_stored_so():
    count = X.size // 6
    layer = KalmanNorm(unbiased=True, momentum=0.0)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    (y, state), changed = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    close(changed["batch_stats"]["var"], X.var((0, 1, 2), ddof=1))
    close(state.input.var.ravel(), X.var((0, 1, 2)) * count / (count - 1))
    close(y, normalize(X, "batch").y, 1e-5, 1e-5)


@pytest.mark.slow
def test_group_layer_stores_nothing_and_uses_its_prior_at_inference_too():
    layer = KalmanNorm(Normalizer("... c/2", "... c/2"), gain=0.3)
    variables = layer.init(jax.random.key(0), X, belief_of())
    assert set(variables) == {"params"}
    y, _ = layer.apply(variables, X, belief_of(), use_running_average=True)
    close(y, expected(X, PRIOR, 0.3, None, 4, 3)[0], 1e-4, 1e-5)


@pytest.mark.slow
def test_layer_with_a_mapped_axis_starts_outside_of_it_and_stores_the_statistics_of_the_whole():
    field = Normalizer("@data n ...", "@data n ...")
    whole = KalmanNorm(Normalizer("n ...", "n ..."))
    variables = KalmanNorm(field).init(jax.random.key(0), X, belief_of(), False)

    def run(layer, x):
        return layer.apply(variables, x, belief_of(), False, mutable=["batch_stats"])

    wanted = quick(lambda x: run(whole, x))(X)
    (y, state), stored = quick(jax.vmap(lambda x: run(KalmanNorm(field), x), axis_name="data"))(
        X.reshape(2, 2, 3, 2, 6)
    )
    close(y.reshape(X.shape), wanted[0][0], 1e-5, 1e-5)
    close((state, stored), jax.tree.map(lambda s: np.stack([s, s]), (wanted[0][1], wanted[1])))


@pytest.mark.slow
def test_frozen_statistics_stay_and_a_masked_batch_stores_nothing():
    layer = NNXKalmanNorm(6, "batch", rngs=nnx.Rngs(0))
    layer(X, belief_of(), mask=jnp.zeros((1, 1, 1, 1), bool))
    nnx.view(layer, update_running_average=False)(X)
    close((layer.mean[...], layer.var[...]), (np.zeros(6), np.ones(6)))


NEEDED = "No `use_running_average` argument was provided to KalmanNorm. Pass it to the constructor or to the call, "
REFUSED = [
    (lambda: KalmanNorm(stored="last").init(jax.random.key(0), X, None, False), ValueError,
     "stored is one of 'filtered', 'batch', 'first_block'; found 'last'"),
    (lambda: NNXKalmanNorm(6, "batch", stored="last", rngs=nnx.Rngs(0)), ValueError,
     "stored is one of 'filtered', 'batch', 'first_block'; found 'last'"),
    (lambda: NNXKalmanNorm(6, "batch", gain=2.0, rngs=nnx.Rngs(0)), ValueError,
     "gain of KalmanNorm is a number from 0 to 1; found 2.0"),
    (lambda: NNXKalmanNorm(6, "rms", rngs=nnx.Rngs(0)), ValueError,
     "Kalman normalization needs a mean and a variance: A = B, order 2, gain 1, power 1/2, without windows, floor or "
     "keep_mean; found Normalizer(None, 'c')"),
    (lambda: NNXKalmanNorm(6, "batch", use_running_average=None, rngs=nnx.Rngs(0))(X), ValueError,
     NEEDED + "or set it on the whole model: nnx.view(model, use_running_average=True) or False."),
    (lambda: NNXKalmanNorm(6, Normalizer("n", "n"), rngs=nnx.Rngs(0)), FieldError,
     "Normalizer('n', 'n') stores statistics along other axes than the channels: give the whole shape of an input as "
     "`features`, found 6"),
    (lambda: NNXKalmanNorm(4, "batch", use_scale=False, use_bias=False, rngs=nnx.Rngs(0))(X), FieldError,
     "a layer made for 4 features cannot take an input of shape (4, 3, 2, 6)"),
]  # fmt: skip


@pytest.mark.slow
def test_refusal_names_what_was_found_and_what_is_accepted():
    for case in REFUSED:
        refuses(*case)
