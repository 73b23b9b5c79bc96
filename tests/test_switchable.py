"""Switchable norm, against NumPy float64 and the published code written in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from normjax import FieldError, Normalizer, Stats, normalize
from normjax.linen import SwitchableNorm
from normjax.running import Running, merge_into
from normjax.switchable import ROWS, blend, mix, pool, require_mixable, storing, weights_of
from tests.refusals import refuses
from tests.test_conditional import IMAGE, SPACE, assert_as_torch, close, draw, first, last, single
from tests.test_gdn import assert_same_derivatives, quick

RNG = np.random.default_rng(8)
LOGITS = RNG.normal(size=3), RNG.normal(size=3)


def softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()


def mixed(x, w, v, axes=((1, 2), (1, 2, 3), (0, 1, 2)), eps=1e-5):
    mean = sum(k * x.mean(a, keepdims=True) for k, a in zip(w, axes, strict=True))
    var = sum(k * x.var(a, keepdims=True) for k, a in zip(v, axes, strict=True))
    return (x - mean) / np.sqrt(var + eps)


def test_switchable_norm_is_the_direct_mixture_of_means_and_variances_in_both_layouts():
    w, v = (softmax(a) for a in LOGITS)
    want, x = mixed(IMAGE, w, v), jnp.asarray(IMAGE, jnp.float32)

    @quick
    def ours(x, w, v, *logits):
        same = (
            mix(x, ROWS, w, v).y,
            last(mix(first(x), ROWS, w, v, "n c ...").y),
            mix(x, ROWS, weights_of(logits[0]), weights_of(logits[1])).y,
        )
        return same, mix(x, ROWS).stats.var, mix(x + 3000, ROWS).stats.var

    same, near, far = ours(x, *single((w, v, *LOGITS)))
    for got in same:
        close(got, want)
    close(far, near, 1e-3)  # the authors' difference of squares would lose this


@pytest.mark.slow
def test_switchable_norm_of_one_row_is_that_row_and_rows_without_a_mean_give_zero():
    x = jnp.asarray(IMAGE, jnp.float32)

    @quick
    def ours(x):
        only = [mix(x, ROWS, one, one).y for one in jnp.eye(3)]
        alone = [normalize(x, name).y for name in (*ROWS, "rms")]
        return [*only, mix(x, ("rms",)).y], alone, mix(x, ("rms", "token")).stats

    only, alone, half = ours(x)
    for got, want in zip(only, alone, strict=True):
        close(got, want)
    close(half.mean, IMAGE.mean(-1, keepdims=True) / 2)
    close(half.var, (np.square(IMAGE).mean(-1, keepdims=True) + IMAGE.var(-1, keepdims=True)) / 2)


def test_switchable_norm_has_outputs_and_gradients_of_the_published_code_written_in_torch():
    def theirs(torch, x, mean_weight, var_weight, scale, bias):
        mean_in, var_in = x.mean(SPACE, keepdim=True), x.var(SPACE, keepdim=True, unbiased=True)
        square = var_in + mean_in**2
        mean_ln, mean_bn = mean_in.mean(3, keepdim=True), mean_in.mean(0, keepdim=True)
        var_ln, var_bn = square.mean(3, keepdim=True) - mean_ln**2, square.mean(0, keepdim=True) - mean_bn**2
        w, v = torch.softmax(mean_weight, 0), torch.softmax(var_weight, 0)
        mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean_bn
        var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
        return (x - mean) / (var + 1e-5).sqrt() * scale + bias

    def ours(x, mean_weight, var_weight, scale, bias):
        weights = weights_of(mean_weight), weights_of(var_weight)
        return mix(x, ROWS, *weights, scale=scale, bias=bias, unbiased=True).y

    assert_as_torch(ours, theirs, (IMAGE, *LOGITS, *draw(3, 2, 6)))


@pytest.mark.slow
def test_switchable_norm_of_vectors_has_unbiased_variances_of_its_own_like_the_published_code():
    x = IMAGE[:, 0, 0]
    mean = (x.mean(1, keepdims=True) + x.mean(0, keepdims=True)) / 2
    var = (x.var(1, ddof=1, keepdims=True) + x.var(0, ddof=1, keepdims=True)) / 2
    got = quick(lambda x: mix(x, ("layer", "batch"), unbiased=True).y)(single(x))
    close(got, (x - mean) / np.sqrt(var + 1e-5))


MASK = RNG.uniform(size=(3, 4, 5, 1)) > 0.3
MASK[2] = False


@pytest.mark.slow
def test_pooled_statistics_are_those_of_the_rows_themselves_also_beside_masks_and_weights():
    rows = (*ROWS, Normalizer("... c/2", "... c/2"))
    weights = MASK * np.random.default_rng(4).uniform(0.1, 2, MASK.shape)

    def loss(x):
        masks = jnp.asarray(MASK), jnp.asarray(weights, jnp.float32)
        found = [(mix(x, rows, mask=m).parts, [normalize(x, n, mask=m).stats for n in rows]) for m in masks]
        return jnp.sum(jnp.sin(mix(x, ROWS, mask=masks[0]).y)), found

    grad, found = quick(jax.grad(loss, has_aux=True))(jnp.asarray(np.where(MASK, IMAGE, np.nan), jnp.float32))
    for parts, direct in found:
        for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(direct), strict=True):
            close(np.broadcast_to(got, IMAGE.shape), np.broadcast_to(want, IMAGE.shape))
    assert bool(jnp.isfinite(grad).all())


@pytest.mark.parametrize("way", ["vmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_a_mixture_over_a_mapped_axis_is_that_of_the_whole_batch(way):
    x = jnp.asarray(np.random.default_rng(5).normal(1, 2, (8, 2, 3, 4)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(6).uniform(size=(8, 2, 3, 1)) > 0.4)
    want = quick(lambda x, m: mix(x, ROWS, mask=m).y)(x, mask)
    if way == "vmap":
        rows, layout = ("instance", "layer", Normalizer("@d ...", "@d ...")), "... c"
        got = quick(jax.vmap(lambda x, m: mix(x, rows, layout=layout, mask=m).y, axis_name="d"))(x, mask)
    else:
        rows, spec = ("instance", "layer", Normalizer("@d n ...", "@d n ...")), PartitionSpec("d")
        mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
        f = jax.shard_map(lambda x, m: mix(x, rows, mask=m).y, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        got = quick(f)(x, mask)
    close(got, want)


def layer_on(x, running, average=False, rows=ROWS, logits=LOGITS, **options):
    """The output of a layer without scale and bias, and what it leaves."""
    layer = SwitchableNorm(rows, use_scale=False, use_bias=False, **options)
    params = dict(zip(("mean_weight", "var_weight"), single(logits), strict=True))
    stored = {name: value for name, value in running._asdict().items() if value is not None}
    variables = {"params": params, "batch_stats": stored}
    return layer.apply(variables, x, average, mutable=["batch_stats", "moments"])


def test_running_statistics_of_a_mixture_move_and_serve_as_those_of_batch_norm():
    x = jnp.asarray(IMAGE, jnp.float32)
    running = Running(jnp.zeros(6), jnp.ones(6))
    mean, var = IMAGE.mean((0, 1, 2)), IMAGE.var((0, 1, 2))
    stored = Running(*single((mean, var)))

    @quick
    def ours(x):
        out = layer_on(x, running)
        one = layer_on(x[:1], stored, True)
        kept = layer_on(x, running, update_running_average=False)
        return out, one, kept, layer_on(x, running, momentum=0.0, unbiased=True)[1]["batch_stats"]["var"]

    (y, left), (one, nothing), kept, unbiased = ours(x)
    close(left["batch_stats"]["mean"], 0.1 * mean)
    close(left["batch_stats"]["var"], 0.9 + 0.1 * var)
    close(one, y[:1])
    assert "moments" not in nothing
    assert kept[1]["batch_stats"]["var"].tolist() == [1.0] * 6
    within = IMAGE.var(SPACE, ddof=1)  # the authors' are unbiased in an instance, and biased over them
    close(unbiased, within.mean(0) + IMAGE.mean(SPACE).var(0))


def test_what_a_mixture_saw_of_micro_batches_is_stored_as_that_of_the_whole_batch():
    running = Running(jnp.zeros(6), jnp.ones(6))

    def seen_of(x, **options):
        return layer_on(x, running, **options)[1]["moments"]["batch"][0]

    @quick
    def ours(x):
        together = merge_into(running, jax.tree.map(lambda *s: jnp.stack(s), seen_of(x[:2]), seen_of(x[2:])))
        return together._asdict(), layer_on(x, running)[1]["batch_stats"]

    together, whole = ours(single(IMAGE))
    jax.tree.map(close, {name: together[name] for name in whole}, whole)
    halves = ("instance", Normalizer("n/3 ...", "n/3 ..."))
    for rows, settings, merges in ((ROWS, {}, True), (ROWS, {"unbiased": True}, False), (halves, {}, False)):
        f = functools.partial(seen_of, rows=rows, logits=[np.zeros(len(rows))] * 2, **settings)
        assert jax.eval_shape(f, single(IMAGE)).mergeable == merges


@pytest.mark.slow
def test_blend_mixes_outputs_by_row_and_channel():
    x, rho = jnp.asarray(IMAGE, jnp.float32), np.linspace(0, 1, 6)

    @quick
    def ours(x, w):
        rows = [normalize(x, name).y for name in ("batch", "instance", "response")]
        both = blend(x, ("batch", "response"), jnp.array([0.3, 0.7]), scale=2.0, bias=jnp.ones(6))
        return rows, blend(x, ("batch", "instance"), w), both

    (batch, instance, response), channels, both = ours(x, jnp.asarray(np.stack([rho, 1 - rho]), jnp.float32))
    close(channels, rho * np.asarray(batch) + (1 - rho) * np.asarray(instance))
    close(both, 2 * (0.3 * batch + 0.7 * response) + 1)


def plain_mix(x, w, v):
    axes = ((1,), (1, 2), (0, 1))
    w, v = jax.nn.softmax(w), jax.nn.softmax(v)
    mean = sum(w[k] * x.mean(a, keepdims=True) for k, a in enumerate(axes))
    var = sum(v[k] * x.var(a, keepdims=True) for k, a in enumerate(axes))
    return (x - mean) / jnp.sqrt(var + 1e-5)


@pytest.mark.slow
def test_switchable_norm_has_every_derivative_of_its_plain_form():
    with jax.numpy_rank_promotion("allow"):
        args = (RNG.normal(size=(2, 3, 2)), *LOGITS)
        assert_same_derivatives(
            lambda x, w, v: mix(x, ROWS, weights_of(w), weights_of(v)).y, plain_mix, args, rtol=1e-7
        )


D = jnp.ones((2, 3))
ERRORS = {
    "no rows": (lambda: mix(D, ()), ValueError, "a mix needs at least one row"),
    "weights of a mix": (
        lambda: mix(D, ("token", "batch"), jnp.ones(3)),
        ValueError,
        "mean weights are one for each of the 2 rows; found shape (3,)",
    ),
    "statistics of a mix": (
        lambda: mix(D, ("token", "batch"), stats=(None,)),
        ValueError,
        "statistics are one for each of the 2 rows; found 1",
    ),
    "row of a mix": (
        lambda: mix(D, ("l1_batch",)),
        ValueError,
        "a mix takes rows that divide, of order 2, without floor and keep_mean; found Normalizer('n ...', 'n ...', "
        "gain=1.2533141373155001, power=1.0, order=1)",
    ),
    "two that store": (
        lambda: storing(require_mixable(("batch", "ghost"))),
        ValueError,
        "one row of a mix may store statistics; found Normalizer('n ...', 'n ...'), Normalizer('n/8 ...', 'n/8 ...')",
    ),
    "weights of a blend": (
        lambda: blend(D, ("token", "batch"), jnp.ones(3)),
        ValueError,
        "weights are [rows] or [rows, c] for 2 rows; found shape (3,)",
    ),
    "pool": (
        lambda: pool(Stats(D), "layer"),
        FieldError,
        "pooling needs means, variances and their weights, and a row that divides; found Normalizer('... c', '... c')",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusal_says_what_was_found_and_what_is_accepted(name):
    refuses(*ERRORS[name])
