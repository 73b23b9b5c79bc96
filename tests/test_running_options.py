"""The options of every layer with running statistics, in the two layers whose statistics are mixtures."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

from normjax import linen
from normjax import nnx as our_nnx
from normjax.nnx.host import Penalty
from normjax.propagate import Belief
from tests.beliefs import EPS, PRIOR, X, belief_of, blocks_of, close, draw, expected, quick

GAIN, AXES = 0.3, (0, 1, 2)
OTHER = draw(30, 4, 3, 2, 6, scale=0.7, shift=-0.5).astype(np.float32)
ROWS = ("instance", "batch")
LAYERS: dict[str, tuple[tuple, dict[str, Any], tuple]] = {
    "KalmanNorm": (("batch",), {"gain": GAIN}, (belief_of(),)),
    "SwitchableNorm": ((ROWS,), {}, ()),
}
EACH = pytest.mark.parametrize("name", LAYERS)


def in_linen(name, **options):
    arguments, more, given = LAYERS[name]
    layer = getattr(linen, name)(*arguments, **more, **options)
    return layer, given


def in_nnx(name, **options):
    arguments, more, given = LAYERS[name]
    return getattr(our_nnx, name)(6, *arguments, **more, **options, rngs=nnx.Rngs(0)), given


def shown(name, x):
    """What a batch gives to the stored mean and variance, in float64."""
    if name == "KalmanNorm":
        return np.asarray(expected(x, PRIOR, GAIN)[1])[:, 0]
    return np.asarray(x, np.float64).mean(AXES), np.asarray(x, np.float64).var(AXES)


def y_of(out):
    return out[0] if isinstance(out, tuple) else out


@EACH
def test_first_values_and_debiased_averages_are_stored_and_a_call_may_leave_them(name):
    options: dict[str, Any] = {"averaging": "debiased", "mean_init": 3.0, "var_init": 2.0, "momentum": 0.9}
    layer, given = in_linen(name, update_running_average=False, **options)
    start = layer.init(jax.random.key(0), X, *given, use_running_average=False)
    close(start["batch_stats"]["mean"], np.full(6, 3.0))
    close(start["batch_stats"]["var"], np.full(6, 2.0))
    twin, _ = in_nnx(name, update_running_average=False, **options)

    @quick
    def twice(stats):
        for x in (X, OTHER):
            _, changed = layer.apply(
                {**start, "batch_stats": stats},
                x,
                *given,
                use_running_average=False,
                update_running_average=True,
                mutable=["batch_stats"],
            )
            stats = changed["batch_stats"]
        return stats

    stats = twice(start["batch_stats"])
    assert stats["mean_count"].tolist() == [2] * 6
    # The first values have no weight: 0.1 of each batch, of which the older has faded by 0.9, over 1 - 0.9 ** 2.
    for key, old, new in zip(("mean", "var"), shown(name, X), shown(name, OTHER), strict=True):
        close(stats[key], (0.09 * old + 0.1 * new) / 0.19, 1e-5, 1e-5)
    _, left = layer.apply(
        {**start, "batch_stats": stats}, X, *given, use_running_average=False, mutable=["batch_stats"]
    )
    close(left["batch_stats"], stats)
    for x in (X, OTHER):
        twin(x, *given)  # the option leaves the stored ones
        assert twin.mean[...].tolist() == [3.0] * 6 or x is OTHER
        twin(x, *given, update_running_average=True)
    close({key: getattr(twin, key)[...] for key in stats}, stats, 1e-5, 1e-5)


def corrections_by_hand(mean, var, running, r_max, d_max):
    sigma, before = np.sqrt(var + EPS), np.sqrt(np.asarray(running["var"]) + EPS)
    r = np.clip(sigma / before, 1 / r_max, r_max)
    return r, np.clip((mean - np.asarray(running["mean"])) / before, -d_max, d_max)


@EACH
def test_renorm_is_r_times_y_plus_d_within_limits_and_inference_beyond_them(name):
    layer, given = in_linen(name, momentum=0.5)
    variables = layer.init(jax.random.key(0), X, *given, use_running_average=False)
    running = {"mean": jnp.linspace(-1.0, 1.0, 6), "var": jnp.linspace(0.5, 3.0, 6)}
    variables = {**variables, "batch_stats": running}
    run = functools.partial(layer.apply, variables, X, *given, mutable=["batch_stats"])
    plain, moved = quick(functools.partial(run, use_running_average=False))()
    inference, _ = quick(functools.partial(run, use_running_average=True))()
    renormed = functools.partial(run, use_running_average=False)
    for limits, wanted in (((1.0, 0.0), plain), ((1e6, 1e6), inference)):
        out, stored = quick(functools.partial(renormed, renorm=limits))()
        close(y_of(out), y_of(wanted), 1e-4, 1e-5)
        close(stored, moved)  # what is stored is what the batch shows
    out, _ = quick(functools.partial(renormed, renorm=(1.3, 0.4)))()
    mean, var = shown(name, X)
    r, d = corrections_by_hand(mean, var, running, 1.3, 0.4)
    assert 0 < np.sum(np.abs(d) == 0.4) < 6
    if name == "KalmanNorm":
        close(y_of(out), r * np.asarray(plain[0]) + d, 1e-4, 1e-5)
        close(out[1].input, plain[1].input)
        close(out[1].output, Belief(d.reshape(1, 1, 1, 6), (r**2 * var / (var + EPS)).reshape(1, 1, 1, 6)), 1e-4, 1e-5)
    else:  # the batch's part of the mixture is corrected, before it is mixed with the instance's
        sigma = np.sqrt(var + EPS) / r
        x = np.asarray(X, np.float64)
        mean = (x.mean((1, 2), keepdims=True) + mean - d * sigma) / 2
        var = (x.var((1, 2), keepdims=True) + sigma**2 - EPS) / 2
        close(y_of(out), (x - mean) / np.sqrt(var + EPS), 1e-4, 1e-5)
    twin, _ = in_nnx(name, renorm=(1.3, 0.4))
    twin.mean[...], twin.var[...] = running["mean"], running["var"]
    close(twin(X, *given), out, 1e-5, 1e-5)


@pytest.mark.parametrize("source", ["filtered", pytest.param("first_block", marks=pytest.mark.slow)])
def test_renorm_of_blocks_corrects_what_normalizes_each_whatever_is_stored(source):
    layer = linen.KalmanNorm(blocks_of(2), gain=GAIN, stored=source)
    stored = {"params": {"scale": jnp.full(6, 2.0), "bias": jnp.ones(6)}}
    running = {"mean": jnp.linspace(-1.0, 1.0, 6), "var": jnp.linspace(0.5, 3.0, 6)}
    run = functools.partial(
        layer.apply,
        {**stored, "batch_stats": running},
        X,
        belief_of(),
        use_running_average=False,
        mutable=["batch_stats"],
    )
    (_, state), moved = quick(run)()
    (y, renormed), changed = quick(functools.partial(run, renorm=(1.3, 0.4)))()
    plain, found = expected(X, PRIOR, GAIN, count=2)
    r, d = corrections_by_hand(found[0], found[1], running, 1.3, 0.4)
    close(y, 2 * (np.repeat(r, 2, 0)[:, None, None] * plain + np.repeat(d, 2, 0)[:, None, None]) + 1, 1e-4, 1e-5)
    close((renormed.input, changed), (state.input, moved))
    close(renormed.output.mean[:, 0, 0], 2 * d + 1, 1e-4, 1e-5)


@EACH
def test_stored_statistics_have_sharding_names_in_both_faces(name):
    layer, given = in_linen(name, stats_names=("model",), use_running_average=False)
    variables = layer.init(jax.random.key(0), X, *given)
    assert nn.get_partition_spec(variables)["batch_stats"] == dict.fromkeys(("mean", "var"), PartitionSpec("model"))
    _, changed = quick(functools.partial(layer.apply, variables, X, *given, mutable=["batch_stats"]))()
    assert isinstance(changed["batch_stats"]["mean"], nn.Partitioned)
    close(changed["batch_stats"]["mean"].value, 0.1 * shown(name, X)[0], 1e-5, 1e-5)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        twin, _ = in_nnx(name, stats_metadata={"out_sharding": ("model",)})
        specs = jax.tree.leaves(nnx.get_partition_spec(nnx.state(twin, nnx.BatchStat)))
    assert specs == [PartitionSpec("model")] * 2


@EACH
def test_penalty_is_that_of_x_less_the_mean_that_normalized_it(name):
    mean, _ = shown(name, X)
    mean = mean if name == "KalmanNorm" else (X.mean((1, 2), keepdims=True) + mean) / 2
    wanted = 0.1 * np.abs(X - mean).mean()
    layer, given = in_linen(name, l1=0.1, use_running_average=False)
    variables = layer.init(jax.random.key(0), X, *given)
    assert set(variables) == {"params", "batch_stats"}
    _, changed = quick(functools.partial(layer.apply, variables, X, *given, mutable=["batch_stats", "losses"]))()
    close(changed["losses"]["l1"], wanted)
    twin, _ = in_nnx(name, l1=0.1)
    captured: Any = nnx.capture(twin, Penalty)
    close(captured(X, *given)[1]["l1"].get_value(), wanted)
