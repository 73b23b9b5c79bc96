"""Known defects of normalization layers: each run once in Flax and once in normjax, both against an independent truth.

    python benchmarks/correctness.py                    # a markdown table; exit status 1 if normjax misses a bound
    python benchmarks/correctness.py --json FILE        # the same as JSON, `-` for standard output

Both libraries get the same input in the same process, and where both have the feature they run the same lines. A number is
the largest absolute error against NumPy in float64, which sees all devices' data at once; a word is what came instead: NaN,
the name of an exception, a dtype. `lacks` marks a feature that Flax does not have. `mended` marks a defect that the Flax
at hand no longer shows. It takes eight devices, simulated on the CPU. Weight and spectral norm come when normjax has them.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# Before JAX is imported; what the user has set stands.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normjax
import normjax.linen
import normjax.nnx
import normjax.train
from normjax import Normalizer, expect, normalize

LINEN = (linen, normjax.linen)
NNX = (nnx, normjax.nnx)
EPS = float(np.finfo(np.float32).eps)
LACKS = "lacks"

Measured = float | str


class Case(NamedTuple):
    """One defect: what it is, a function that measures (flax, normjax), and what normjax must keep.

    The bound is the largest error, or the very word that is right.
    """

    what: str
    measure: Callable[[], tuple[Measured, Measured]]
    bound: Measured


CASES: list[Case] = []


def case(what: str, bound: Measured, **arguments: Any):
    """Enters a function into the table."""

    def enter(f: Callable[..., tuple[Measured, Measured]]):
        CASES.append(Case(what, lambda: f(**arguments), bound))
        return f

    return enter


def error(run: Callable[[], Any], want: Any) -> Measured:
    """The largest absolute error of what `run` returns, "NaN" where it is not finite, or the name of what it raised."""
    try:
        got = run()
    except Exception as raised:  # whatever a library does is the finding
        return type(raised).__name__
    worst = 0.0
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g = np.asarray(g).astype(np.float64)
        if not np.isfinite(g).all():
            return "NaN"
        worst = max(worst, float(np.abs(g - w).max(initial=0)))
    return worst


def both(run: Callable[[Any], Any], libraries: tuple[Any, Any], want: Any) -> tuple[Measured, Measured]:
    """The errors of `run(library)` for Flax and for normjax."""
    with lenient():
        theirs = error(lambda: run(libraries[0]), want)
    return theirs, error(lambda: run(libraries[1]), want)


def lenient():
    """JAX's default promotion, which Flax's layers are written for; ours run under whatever is set."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def random(*shape: int, mean: float = 0.5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, shape).astype(np.float32)


def moments(x: Any, axes: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance in float64, over the elements that the mask keeps; zeros where it keeps none."""
    x = np.asarray(x, np.float64)
    w = np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape).astype(np.float64)
    x, count = np.where(w > 0, x, 0), np.maximum(w.sum(axes, keepdims=True), 1)
    mean = (w * x).sum(axes, keepdims=True) / count
    return mean, (w * (x - mean) ** 2).sum(axes, keepdims=True) / count


def normalized(x: Any, axes: Any, mask: Any = None, eps: float = 1e-6) -> np.ndarray:
    mean, var = moments(x, axes, mask)
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + eps)


def grouped(x: Any, groups: int, axes: tuple[int, ...], mask: Any = None) -> np.ndarray:
    """Group norm over `axes` and the group's channels, in float64."""
    split = (*x.shape[:-1], groups, x.shape[-1] // groups)
    mask = None if mask is None else np.broadcast_to(mask, x.shape).reshape(split)
    return normalized(np.asarray(x, np.float64).reshape(split), (*axes, x.ndim), mask).reshape(x.shape)


def stored(channels: int) -> dict[str, jax.Array]:
    return {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}


def train_batch_norm(library: Any, x: Any, mask: Any = None, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The output and the new running statistics of a linen batch norm without parameters."""
    layer = library.BatchNorm(use_running_average=False, use_scale=False, use_bias=False, **kwargs)
    variables = {"batch_stats": stored(x.shape[-1])}
    y, changed = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, changed["batch_stats"]


def devices(axes: str = "data", shape: tuple[int, ...] = (8,), kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    names = tuple(axes.split())
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


# Axes and groups


@case("nnx.GroupNorm of video `(n, t, h, w, c)`, over h, w and the group", 1e-5)
def leading_axes():
    x = random(2, 3, 4, 5, 8)
    x = x * np.linspace(1, 4, 3, dtype=np.float32)[:, None, None, None]
    return both(
        lambda library: library.GroupNorm(8, num_groups=4, reduction_axes=(2, 3, 4), rngs=nnx.Rngs(0))(x),
        NNX,
        grouped(x, 4, (2, 3)),
    )


@case("nnx.BatchNorm of two feature axes, output and running mean", 1e-5)
def two_feature_axes():
    x = random(4, 3, 2, 5)

    def run(library):
        layer = library.BatchNorm(15, axis=(1, 3), momentum=0.5, rngs=nnx.Rngs(0))
        return layer(x), layer.mean[...]

    return both(run, NNX, (normalized(x, (0, 2), eps=1e-5), moments(x, (0, 2))[0].ravel() / 2))


@case("`LayerNorm(axis_name=...)` initialized outside of the mapped axis", 0.0)
def initialized_outside():
    x = jnp.ones((2, 4))
    want = {"params": {"bias": np.zeros(4), "scale": np.ones(4)}}
    return both(lambda library: library.LayerNorm(axis_name="data").init(jax.random.key(0), x), LINEN, want)


# Masks


@case("GroupNorm with a mask `(n, h, w, 1)` that broadcasts", 1e-5)
def group_mask():
    x, mask = random(2, 5, 4, 8), random(2, 5, 4, 1, seed=1) > 0
    keep = np.broadcast_to(mask, x.shape)

    def run(library):
        return np.asarray(library.GroupNorm(num_groups=4, use_scale=False, use_bias=False).apply({}, x, mask=mask))[
            keep
        ]

    return both(run, LINEN, grouped(x, 4, (1, 2), mask)[keep])


def gradient_behind_a_mask(layer: Callable[[Any], Any], x: np.ndarray, want: np.ndarray, mask: np.ndarray):
    """The gradient of the squared valid outputs at the valid elements, where masked ones are NaN."""
    poisoned = jnp.asarray(np.where(mask, x, np.nan))

    def run(library):
        def loss(x):
            y = layer(library).apply({}, x, mask=mask)
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return np.where(mask, jax.jit(jax.grad(loss))(poisoned), 0)

    return both(run, LINEN, want)


def cubed_gradient(x: Any, axes: Any, mask: Any) -> np.ndarray:
    """Gradient of sum y ** 3 over the valid elements by hand: (g - mean g - y mean(g y)) / sigma, g = 3 y ** 2."""
    y = np.where(mask, normalized(x, axes, mask), 0)
    var, g = moments(x, axes, mask)[1], 3 * y**2
    count = np.sum(mask, axes, keepdims=True)
    inner = g - g.sum(axes, keepdims=True) / count - y * (g * y).sum(axes, keepdims=True) / count
    return np.where(mask, inner / np.sqrt(var + 1e-6), 0)


@case("gradient of LayerNorm, NaN at a masked element", 1e-4)
def layer_norm_gradient():
    x, mask = random(4, 12), random(4, 12, seed=1) > -0.2
    return gradient_behind_a_mask(
        lambda library: library.LayerNorm(use_scale=False, use_bias=False), x, cubed_gradient(x, 1, mask), mask
    )


@case("gradient of GroupNorm, NaN at a masked element", 1e-4)
def group_norm_gradient():
    x, mask = random(2, 6, 8), random(2, 6, 8, seed=1) > -0.2
    split = (2, 6, 4, 2)
    want = cubed_gradient(x.reshape(split), (1, 3), mask.reshape(split)).reshape(x.shape)
    return gradient_behind_a_mask(
        lambda library: library.GroupNorm(num_groups=4, use_scale=False, use_bias=False), x, want, mask
    )


@case("output of LayerNorm at a masked NaN (normjax: the bias)", 1e-5)
def masked_output():
    x, mask = random(4, 12), random(4, 12, seed=1) > -0.2
    poisoned = np.where(mask, x, np.nan)
    return both(
        lambda library: library.LayerNorm(use_scale=False, use_bias=False).apply({}, poisoned, mask=mask),
        LINEN,
        np.where(mask, normalized(x, 1, mask), 0),
    )


@case("LayerNorm of a row that is masked whole (normjax: the bias)", 1e-5)
def masked_row():
    x, mask = random(4, 12), np.ones((4, 1), bool)
    mask[2] = False
    return both(
        lambda library: library.LayerNorm(use_scale=False, use_bias=False).apply({}, x, mask=mask),
        LINEN,
        np.where(mask, normalized(x, 1), 0),
    )


@case("running statistics after a batch that is masked whole (normjax: as before)", 0.0)
def masked_batch():
    x, mask = random(6, 3), np.zeros((6, 1), bool)
    return both(lambda library: train_batch_norm(library, x, mask)[1], LINEN, {"mean": np.zeros(3), "var": np.ones(3)})


@case("running statistics after a batch with one channel masked whole", 1e-6)
def masked_channel():
    x, mask = random(6, 3), np.array([True, False, True])
    mean, var = (m[0] for m in moments(x, 0))
    want = {"mean": np.where(mask, 0.01 * mean, 0), "var": np.where(mask, 0.99 + 0.01 * var, 1)}
    return both(lambda library: train_batch_norm(library, x, mask)[1], LINEN, want)


# Masks and devices


def across_shards(mask: np.ndarray, mesh: jax.sharding.Mesh, spec: P, axis_name: Any):
    """Batch norm in shard_map under both settings of check_vma, at the valid elements of the whole batch."""
    x = random(*mask.shape[:-1], 5)
    x = x + np.arange(x.shape[0], dtype=np.float32).reshape(-1, *[1] * (x.ndim - 1)) / 4
    keep = np.broadcast_to(mask, x.shape)

    def run(library):
        def shard(x, mask):
            return train_batch_norm(library, x, mask, axis_name=axis_name)[0]

        def mapped(check):
            return jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check))

        return [np.asarray(mapped(check)(x, mask))[keep] for check in (True, False)]

    axes = tuple(range(x.ndim - 1))
    return both(run, LINEN, [normalized(x, axes, mask, 1e-5)[keep]] * 2)


@case("BatchNorm in `shard_map`, the mask leaves unequal counts on 8 devices", 1e-5)
def unequal_counts():
    mask = random(16, 6, 1, seed=1) > np.linspace(-1.5, 1.5, 16)[:, None, None]
    mask[:, 0] = True  # no device is left without an element
    return across_shards(mask, devices(), P("data"), "data")


@case("BatchNorm in `shard_map`, the mask leaves one device nothing", 1e-5)
def empty_shard():
    mask = random(16, 6, 1, seed=1) > 0
    mask[4:6] = False
    return across_shards(mask, devices(), P("data"), "data")


@case('BatchNorm in `shard_map`, mask and `axis_name=("data", "space")`', 1e-5)
def two_mesh_axes():
    mask = random(8, 4, 6, 1, seed=1) > np.linspace(-1.5, 1.5, 8)[:, None, None, None]
    mask[:, :, 0] = True
    return across_shards(mask, devices("data space", (4, 2)), P("data", "space"), ("data", "space"))


@case("nnx.LayerNorm under `jax.vmap(axis_name=...)` with a mask", 1e-5)
def mask_under_vmap():
    x, mask = random(4, 3, 8), random(4, 3, 8, seed=1) > np.array([-1.0, 0, 0.5, 1])[:, None, None]
    x = x + np.arange(4, dtype=np.float32)[:, None, None]

    def run(library):
        layer = library.LayerNorm(8, use_scale=False, use_bias=False, axis_name="part", rngs=nnx.Rngs(0))
        return np.asarray(jax.vmap(lambda x, mask: layer(x, mask=mask), axis_name="part")(x, mask))[mask]

    return both(run, NNX, normalized(x, (0, 2), mask)[mask])


# Precision


def large_mean(offset: float):
    x = random(16, 1024, mean=offset)
    return both(
        lambda library: library.LayerNorm(use_scale=False, use_bias=False).apply({}, x), LINEN, normalized(x, 1)
    )


for offset in (1e2, 1e3, 1e4):
    # What float32 can hold: rounding of y (at most 4.2 here) and of the mean, in units of the standard deviation.
    case(f"LayerNorm at mean / std = {offset:g}", 4 * EPS * (5.2 + offset), offset=offset)(large_mean)


@case("running variance of BatchNorm at mean / std = 1e4, true value 1", 1e-3)
def running_variance():
    x = random(256, 8, mean=1e4)
    return both(lambda library: train_batch_norm(library, x, momentum=0.0)[1]["var"], LINEN, moments(x, 0)[1][0])


@case("how far below zero a running variance gets at mean / std = 1e4", 0.0)
def negative_variance():
    x = random(256, 8, mean=1e4, seed=1)
    with lenient():
        theirs = error(lambda: np.minimum(train_batch_norm(linen, x, momentum=0.0)[1]["var"], 0), 0.0)
    return theirs, error(lambda: np.minimum(train_batch_norm(normjax.linen, x, momentum=0.0)[1]["var"], 0), 0.0)


@case("float16 ramp to 2100, `force_float32_reductions=False`", 2e-3)
def half_ramp():
    x = np.linspace(0, 2100, 1024).astype(np.float16)[None]
    return both(
        lambda library: library.LayerNorm(
            use_scale=False, use_bias=False, dtype=jnp.float16, force_float32_reductions=False
        ).apply({}, x),
        LINEN,
        normalized(x, 1),
    )


@case("gradient at a constant row, epsilon 0 (normjax: 0)", 0.0)
def constant_row():
    x = jnp.full((2, 8), 3.0)

    def run(library):
        layer = library.LayerNorm(epsilon=0.0, use_scale=False, use_bias=False)
        return jax.grad(lambda x: jnp.sum(layer.apply({}, x) ** 2))(x)

    return both(run, LINEN, np.zeros((2, 8)))


@case("nnx.BatchNorm inference with `dtype=bfloat16`: running statistics rounded", 2**-6)
def rounded_statistics():
    # The bound is half a step of bfloat16 at the largest output, between 4 and 8.
    x = np.asarray(jnp.asarray(random(64, 4, mean=40.3), jnp.bfloat16).astype(jnp.float32))
    mean, var = np.full(4, 40.37), np.full(4, 0.3)

    def run(library):
        layer = library.BatchNorm(4, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        layer.mean[...], layer.var[...] = (jnp.asarray(a, jnp.float32) for a in (mean, var))
        return layer(x)

    return both(run, NNX, (x.astype(np.float64) - mean) / np.sqrt(var + 1e-5))


@case("dtype of a bfloat16 input's output, no `dtype` given (normjax.linen.Norm)", "bfloat16")
def dtype_drift():
    x = jnp.ones((2, 4), jnp.bfloat16)
    with lenient():
        theirs = linen.LayerNorm().init_with_output(jax.random.key(0), x)[0]
    ours = normjax.linen.Norm("token").init_with_output(jax.random.key(0), x)[0]
    return str(theirs.dtype), str(ours.dtype)


@case("dtype of running statistics beside bfloat16 parameters", "float32")
def statistics_dtype():
    x = jnp.ones((2, 4), jnp.bfloat16)

    def run(library):
        layer = library.BatchNorm(use_running_average=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        variables = layer.init(jax.random.key(0), x)
        return str(layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["var"].dtype)

    with lenient():
        theirs = run(linen)
    return theirs, run(normjax.linen)


@case("mean of 33 x 33 bfloat16 ones in an image of 65 x 65 (flax: `avg_pool`, normjax: `expect`)", 1e-6)
def window_of_ones():
    x = jnp.ones((1, 65, 65, 1), jnp.bfloat16)
    with lenient():
        theirs = error(lambda: linen.avg_pool(x, (33, 33)), 1.0)
    return theirs, error(lambda: expect(x, "...:33"), 1.0)


# Sharded arrays


def on_an_explicit_mesh(run: Callable[[Any], Any], x: np.ndarray, spec: P):
    """f(x) with the sharding in x's type."""
    mesh = devices("model", kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        return run(jax.device_put(x, jax.NamedSharding(mesh, spec)))


@case("GroupNorm with its channels sharded over an explicit mesh", 1e-5)
def sharded_groups():
    x = random(2, 6, 32)

    def run(library):
        layer = library.GroupNorm(num_groups=4, use_scale=False, use_bias=False)
        return on_an_explicit_mesh(lambda x: layer.apply({}, x), x, P(None, None, "model"))

    return both(run, LINEN, grouped(x, 4, (1,)))


@case("sharding metadata of running statistics", "sharded")
def sharding_metadata():
    x = jnp.ones((4, 8))

    def run(library, **names):
        init = linen.with_partitioning(linen.initializers.ones, ("model",))
        layer = library.BatchNorm(use_running_average=False, scale_init=init, **names)
        specs = linen.get_partition_spec(layer.init(jax.random.key(0), x))
        assert specs["params"]["scale"] == P("model")
        return "sharded" if specs["batch_stats"]["mean"] == P("model") else "replicated"

    with lenient():
        theirs = run(linen)
    return theirs, run(normjax.linen, stats_names=("model",))


@case("gradient of a 3-wide mean over a sharded axis, explicit mesh (flax: `avg_pool`)", 1e-6)
def sharded_window_gradient():
    x, weights = random(2, 32, 4), random(2, 32, 4, seed=1)
    padded = np.pad(weights.astype(np.float64), [(0, 0), (1, 1), (0, 0)])
    want = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3

    def gradient(mean):
        return on_an_explicit_mesh(lambda x: jax.grad(lambda x: jnp.sum(mean(x) * weights))(x), x, P(None, "model"))

    with lenient():
        theirs = error(lambda: gradient(lambda x: linen.avg_pool(x, (3,), padding="SAME")), want)
    return theirs, error(lambda: gradient(lambda x: expect(x, "...:3", border="zero")), want)


@case("5-wide mean at the borders of `shard_map`'s blocks (flax: `avg_pool`)", 1e-6)
def halo():
    x = random(2, 32, 4)
    padded = np.pad(x.astype(np.float64), [(0, 0), (2, 2), (0, 0)])
    want = sum(padded[:, i : i + 32] for i in range(5)) / 5

    def mapped(mean):
        return jax.shard_map(mean, mesh=devices("rows"), in_specs=P(None, "rows"), out_specs=P(None, "rows"))(x)

    with lenient():
        theirs = error(lambda: mapped(lambda x: linen.avg_pool(x, (5,), padding="SAME")), want)
    return theirs, error(lambda: mapped(lambda x: expect(x, "h:5@rows", "n h c", border="zero")), want)


# What Flax lacks


@case("normalize with the batch's statistics and keep the stored ones, as a switch", 1e-5)
def kept_statistics():
    x = random(16, 3)

    def run():
        layer = normjax.linen.Norm("batch", use_running_average=False, update_running_average=False)
        variables = layer.init(jax.random.key(0), x)
        y, changed = layer.apply(variables, x, mutable=["batch_stats"])
        return y, changed

    stats = {"batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}
    return LACKS, error(run, (normalized(x, 0, eps=1e-5), stats))


@case("unbiased running variance, as PyTorch stores it", 1e-6)
def unbiased_variance():
    x = random(5, 3)

    def run():
        layer = normjax.linen.Norm("batch", use_running_average=False, momentum=0.0, unbiased=True)
        return layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])[1]["batch_stats"]["var"]

    return LACKS, error(run, moments(x, 0)[1][0] * 5 / 4)


@case("batch renormalization, r within [2/3, 3/2] and d within [-0.3, 0.3]", 1e-5)
def batch_renormalization():
    x = random(16, 3) * np.array([0.5, 1.2, 3.0], np.float32)
    mean, var = moments(x, 0)
    r = np.clip(np.sqrt((var + 1e-5) / (1 + 1e-5)), 2 / 3, 3 / 2)  # stored are mean 0 and variance 1
    d = np.clip(mean / np.sqrt(1 + 1e-5), -0.3, 0.3)

    def run():
        layer = normjax.linen.Norm("batch", use_running_average=False, renorm=(1.5, 0.3))
        return layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])[0]

    return LACKS, error(run, r * normalized(x, 0, eps=1e-5) + d)


@case("conditional normalization: a scale and a bias for each example, given at the call", 1e-5)
def conditional():
    x, scale, bias = random(3, 5, 4), random(3, 4, seed=1), random(3, 4, seed=2)
    want = normalized(x, 1, eps=1e-5) * scale[:, None] + bias[:, None]
    return LACKS, error(lambda: normjax.linen.Norm("instance").apply({}, x, scale=scale, bias=bias), want)


@case("running statistics of four micro-batches as those of the whole batch", 1e-5)
def micro_batches():
    x = random(16, 3) * np.linspace(1, 3, 16, dtype=np.float32)[:, None]
    model, tx = normjax.linen.BatchNorm(use_running_average=False, momentum=0.9), optax.sgd(0.1)
    mean, var = (m[0] for m in moments(x, 0))

    def loss(call, batch, train):
        return jnp.mean(call(batch) ** 3), {}

    def run():
        step = jax.jit(normjax.train.linen_step(model, loss, tx, micro_batches=4))
        state, _ = step(normjax.train.linen_init(model, tx, jax.random.key(0), x), x, jax.random.key(1))
        return state.stats

    return LACKS, error(run, {"batch_stats": {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}})


@case("running statistics recalibrated over a data set, and none of dropout in them", 1e-5)
def recalibrated():
    x = random(16, 3) * np.linspace(1, 3, 16, dtype=np.float32)[:, None]
    mean, var = (m[0] for m in moments(x, 0))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Dropout(0.5, deterministic=not train)(x)
            return normjax.linen.BatchNorm()(x, use_running_average=not train)

    def loss(call, batch, train):
        return jnp.mean(call(batch, train)), {}

    def run():
        model = Model()
        state = normjax.train.linen_init(model, optax.sgd(0.1), jax.random.key(0), x, False)
        recalibrate = jax.jit(normjax.train.linen_recalibrate(model, loss))
        return recalibrate(state, x, np.arange(16).reshape(4, 4)).stats["batch_stats"]["BatchNorm_0"]

    return LACKS, error(run, {"mean": mean, "var": var})


@case("ghost batch norm whose parts do not depend on the number of devices", 1e-5)
def ghost():
    x = random(16, 6, 3)
    want = normalized(x.reshape(4, 4, 6, 3), (1, 2), eps=1e-5).reshape(x.shape)

    def run():
        sharded = jax.device_put(x, jax.NamedSharding(devices(), P("data")))
        return jax.jit(lambda x: normalize(x, Normalizer("n/4 ...", "n/4 ...")).y)(sharded)

    return LACKS, error(run, want)


@case("local response norm", 1e-5)
def local_response():
    x = random(2, 3, 3, 8, mean=0)
    padded = np.pad(x.astype(np.float64) ** 2, [(0, 0)] * 3 + [(2, 2)])
    total = sum(padded[..., i : i + 8] for i in range(5))
    return LACKS, error(lambda: normalize(x, "response").y, x / (2 + 1e-4 * total) ** 0.75)


def local_mean(a: np.ndarray, size: int, gaussian: bool = False) -> np.ndarray:
    """The mean over all channels and the part of a window that lies within the image, around each position."""

    def taps(offset):
        return (np.abs(offset) <= size // 2) * (np.exp(-0.5 * (offset / (size / 4)) ** 2) if gaussian else 1.0)

    out = np.empty((*a.shape[:3], 1))
    for i, j in np.ndindex(a.shape[1:3]):
        w = np.outer(taps(np.arange(a.shape[1]) - i), taps(np.arange(a.shape[2]) - j))
        out[:, i, j, 0] = (a.mean(-1) * w).sum((1, 2)) / w.sum()
    return out


@case("divisive norm over 5 x 5 windows", 1e-5)
def divisive():
    x = random(2, 9, 7, 3)
    v = x - local_mean(x.astype(np.float64), 5)
    return LACKS, error(lambda: normalize(x, "divisive").y, v / np.sqrt(1 + local_mean(v**2, 5)))


@case("local contrast norm over 9 x 9 Gaussian windows", 1e-5)
def local_contrast():
    x = random(2, 9, 7, 3)
    v = x - local_mean(x.astype(np.float64), 9, gaussian=True)
    d = np.sqrt(1e-5 + local_mean(v**2, 9, gaussian=True))
    return LACKS, error(lambda: normalize(x, "contrast").y, v / np.maximum(d, d.mean((1, 2), keepdims=True)))


def kept(value: Measured, bound: Measured) -> bool:
    """Whether a measured error keeps the bound; a word is right only where it is the bound itself."""
    if isinstance(value, str) or isinstance(bound, str):
        return value == bound
    return math.isfinite(value) and value <= bound


def measure(entry: Case) -> dict[str, Any]:
    """One row of the table.

    >>> measure(Case("a defect", lambda: ("NaN", 1e-7), 1e-6))
    {'what': 'a defect', 'flax': 'NaN', 'normjax': 1e-07, 'bound': 1e-06, 'mended': False, 'kept': True}
    """
    theirs, ours = entry.measure()
    return {
        "what": entry.what, "flax": theirs, "normjax": ours, "bound": entry.bound,
        "mended": kept(theirs, entry.bound), "kept": kept(ours, entry.bound),
    }  # fmt: skip


def shown(value: Measured) -> str:
    return value if isinstance(value, str) else "0" if value == 0 else f"{value:.1g}" if value < 10 else f"{value:.0f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [f"| what | flax {flax.__version__} | normjax |", "|---|---|---|"]
    for r in rows:
        theirs = f"mended ({shown(r['flax'])})" if r["mended"] else shown(r["flax"])
        ours = shown(r["normjax"]) + ("" if r["kept"] else f" **missed** (bound {shown(r['bound'])})")
        lines.append(f"| {r['what']} | {theirs} | {ours} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 where normjax misses a bound."""
    parser = argparse.ArgumentParser(description="Known defects of normalization layers, in Flax and in normjax.")
    parser.add_argument("--json", metavar="FILE", help='writes the rows as JSON too; "-": to standard output, no table')
    options = parser.parse_args(arguments)
    if jax.device_count() != 8:
        parser.error(f"needs 8 devices, found {jax.device_count()}: unset XLA_FLAGS and JAX_PLATFORMS")
    rows = [measure(entry) for entry in CASES]
    versions = {"jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__}
    text = json.dumps({"versions": versions, "rows": rows}, indent=1)
    if options.json != "-":
        print(", ".join(f"{name} {version}" for name, version in versions.items()), table(rows), sep="\n\n")
    if options.json == "-":
        print(text)
    elif options.json:
        with open(options.json, "w") as file:
            file.write(text + "\n")
    return 0 if all(r["kept"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
