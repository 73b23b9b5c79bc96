"""Conditional normalization and RevIN, against NumPy float64 and the published forms written in PyTorch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax
from normjax import FieldError, Normalizer, Stats, normalize
from normjax.conditional import TOKEN, Modulation, adain, by_class, gated, modulate, project, split_modulation, style
from normjax.reversible import denormalize, revin
from normjax.spade import Convolutions, from_map, kernel_shapes, nearest
from tests.refusals import refuses
from tests.test_gdn import assert_same_derivatives, quick

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(0.5, 2.0, (3, 4, 5, 6))
STYLE = RNG.normal(-1.0, 0.7, (3, 2, 3, 6))
SERIES = RNG.normal(3.0, 2.0, (2, 7, 3))
SPACE = (1, 2)


def single(a) -> Any:
    return jax.tree.map(lambda b: jnp.asarray(b, jnp.float32), a)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def close(got, want, rtol=1e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=rtol * max(np.abs(want).max(), 1))


def first(x):
    """Channels first."""
    return jnp.moveaxis(x, -1, 1)


def last(x):
    return jnp.moveaxis(x, 1, -1)


def tensors(torch, *arrays):
    return [torch.tensor(np.asarray(a), dtype=torch.float64, requires_grad=True) for a in arrays]


def assert_as_torch(f, theirs, args, rtol=1e-5):
    """f(*args) and the gradients of a weighted sum of it are torch's; `theirs` maps torch tensors to a tensor."""
    torch = pytest.importorskip("torch")
    leaves = tensors(torch, *args)
    y = theirs(torch, *leaves)
    weight = np.cos(np.arange(y.numel())).reshape(y.shape)
    (y * torch.tensor(weight)).sum().backward()

    def loss(*args):
        out = f(*args)
        return jnp.sum(out * jnp.asarray(weight, jnp.float32)), out

    (_, got), grads = quick(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*single(list(args)))
    close(got, y.detach().numpy(), rtol)
    for k, (mine, leaf) in enumerate(zip(grads, leaves, strict=True)):
        want = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(mine, want, rtol=rtol, atol=rtol * max(np.abs(want).max(), 1), err_msg=str(k))


# AdaIN.


def test_adain_is_each_of_the_three_versions_that_are_about_in_both_layouts():
    versions = [({}, 0, 1e-2), ({"style_eps": 0.0}, 0, 0.0), ({"unbiased": True}, 1, 1e-2)]

    @quick
    def ours(content, picture):
        f = functools.partial(adain, eps=1e-2)
        plain = [f(content, picture, **settings) for settings, _, _ in versions]
        turned = [last(f(first(content), first(picture), "n c ...", **settings)) for settings, _, _ in versions]
        return list(zip(plain, turned, strict=True)), f(content, picture, strength=0.25)

    found, quarter = ours(*single((IMAGE, STYLE)))
    for pair, (_, ddof, style_eps) in zip(found, versions, strict=True):
        mean, var = IMAGE.mean(SPACE, keepdims=True), IMAGE.var(SPACE, ddof=ddof, keepdims=True)
        spread = np.sqrt(STYLE.var(SPACE, ddof=ddof, keepdims=True) + style_eps)
        want = (IMAGE - mean) / np.sqrt(var + 1e-2) * spread + STYLE.mean(SPACE, keepdims=True)
        for got in pair:
            close(got, want)
    close(quarter, 0.25 * np.asarray(found[0][0]) + 0.75 * IMAGE)


@pytest.mark.slow
def test_adain_has_the_gradients_of_torch():
    def theirs(torch, x, s):
        def moments(a):
            return a.mean(SPACE, keepdim=True), (a.var(SPACE, keepdim=True, unbiased=True) + 1e-5).sqrt()

        (mean, std), (style_mean, style_std) = moments(x), moments(s)
        return (x - mean) / std * style_std + style_mean

    assert_as_torch(lambda x, s: adain(x, s, unbiased=True), theirs, (IMAGE, STYLE))


@pytest.mark.slow
@pytest.mark.parametrize("unbiased", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adain_with_masks_is_adain_of_what_is_left_and_a_nan_behind_them_reaches_nothing(unbiased):
    mask, style_mask = np.ones((3, 4, 5, 1), bool), np.ones((3, 2, 3, 1), bool)
    mask[:, :, 3:], style_mask[:, :, :1] = False, False
    content, picture = single((np.where(mask, IMAGE, np.nan), np.where(style_mask, STYLE, np.nan)))

    def loss(content, picture):
        y = adain(content, picture, mask=jnp.asarray(mask), style_mask=jnp.asarray(style_mask), unbiased=unbiased)
        return jnp.sum(jnp.sin(y)), (y, adain(content[:, :, :3], picture[:, :, 1:], unbiased=unbiased))

    grads, (got, want) = quick(jax.grad(loss, (0, 1), has_aux=True))(content, picture)
    close(got[:, :, :3], want)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.slow
def test_constant_style_has_a_finite_gradient_without_eps():
    content = jnp.asarray(IMAGE, jnp.float32)
    grad = quick(jax.grad(lambda s: jnp.sum(jnp.sin(adain(content, s, style_eps=0.0)))))(jnp.ones((3, 2, 2, 6)))
    assert bool(jnp.isfinite(grad).all())
    found = quick(functools.partial(style, eps=0.0))(jnp.ones((2, 4, 3), jnp.bfloat16))
    assert found.scale.dtype == jnp.float32
    assert float(found.scale.max()) == 0


# A scale and a bias from a class, a vector, a map.

KERNEL, KERNEL_BIAS, CONDITION = RNG.normal(0, 0.5, (4, 18)), RNG.normal(0, 0.5, 18), RNG.normal(size=(3, 4))


def test_adaln_zero_has_outputs_and_gradients_of_the_published_block_written_in_torch():
    tokens = IMAGE[:, 0]

    def theirs(torch, x, c, kernel, bias):
        shift, scale, gate = (torch.nn.functional.silu(c) @ kernel + bias).chunk(3, dim=1)
        h = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x + gate.unsqueeze(1) * torch.tanh(h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))

    def ours(x, c, kernel, bias):
        m = project(c, kernel, bias, ("bias", "scale", "gate"), activation=jax.nn.silu)
        return gated(x, jnp.tanh(modulate(x, m, TOKEN)), m.gate)

    assert_as_torch(ours, theirs, (tokens, CONDITION, KERNEL, KERNEL_BIAS))


@pytest.mark.slow
def test_film_has_outputs_and_gradients_of_the_published_form_in_both_layouts():
    kernel, bias = KERNEL[:, :12], KERNEL_BIAS[:12]

    def theirs(torch, x, c, kernel, bias):
        scale, shift = (a.reshape(3, 1, 1, 6) for a in (c @ kernel + bias).split(6, dim=1))
        return (1 + scale) * x + shift

    assert_as_torch(lambda x, c, k, b: modulate(x, project(c, k, b)), theirs, (IMAGE, CONDITION, kernel, bias))

    @quick
    def layouts(x, *p):
        m = project(*p)
        turned = [last(modulate(first(x), m, n, "n c ...")) for n in (None, "batch")]
        return turned, [modulate(x, m), modulate(x, m, "batch")], m.scale, project(*p, around=0.0).scale

    turned, plain, scale, bare = layouts(*single((IMAGE, CONDITION, kernel, bias)))
    for got, want in zip(turned, plain, strict=True):
        close(got, want)
    close(bare, scale - 1)


def test_classes_pick_rows_mixtures_mix_them_and_gradients_reach_only_the_rows_that_were_used():
    scale, bias = draw(1, 2, 4, 6)
    labels = np.array([2, 0, 2])
    mean, var = IMAGE.mean((0, *SPACE)), IMAGE.var((0, *SPACE))
    want = (IMAGE - mean) / np.sqrt(var + 1e-5) * scale[labels][:, None, None] + bias[labels][:, None, None]
    x, s, b = single((IMAGE, scale, bias))

    def loss(s, b):
        y = modulate(x, by_class(jnp.asarray(labels), s, b), "batch")
        return jnp.sum(jnp.sin(y)), y

    grads, y = quick(jax.grad(loss, (0, 1), has_aux=True))(s, b)
    close(y, want)
    assert all(np.flatnonzero(np.abs(g).sum(1)).tolist() == [0, 2] for g in grads)
    soft = jnp.asarray([[0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75], [0, 1, 0, 0]])
    close(by_class(soft, s, b).scale, np.asarray(soft) @ scale)
    one_hot = jax.nn.one_hot(jnp.asarray(labels), 4)
    assert by_class(one_hot, s, b).bias.tolist() == by_class(jnp.asarray(labels), s, b).bias.tolist()
    outside = quick(by_class)(jnp.array([4, -1, 3]), s, b).scale
    assert np.isnan(outside).all(1).tolist() == [True, True, False]


def learned(seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.4, shape) for shape in kernel_shapes(6, 2, 2, hidden=3)]


@pytest.mark.slow
def test_spade_has_outputs_and_gradients_of_the_published_form_written_in_torch():
    labels = np.eye(2)[np.random.default_rng(2).integers(0, 2, (3, 8, 7))]

    def theirs(torch, x, hidden, hidden_bias, scale, scale_bias, shift, shift_bias):
        f = torch.nn.functional

        def convolve(a, kernel, bias):
            return f.conv2d(a, kernel.permute(3, 2, 0, 1), bias, padding=1)

        h = f.instance_norm(x.permute(0, 3, 1, 2))
        maps = f.interpolate(torch.tensor(labels).permute(0, 3, 1, 2), size=(4, 5), mode="nearest")
        a = f.relu(convolve(maps, hidden, hidden_bias))
        return (h * (1 + convolve(a, scale, scale_bias)) + convolve(a, shift, shift_bias)).permute(0, 2, 3, 1)

    maps = jnp.asarray(labels, jnp.float32)

    def ours(x, *kernels):
        return modulate(x, from_map(maps, Convolutions(*kernels), size=(4, 5)), "instance")

    assert_as_torch(ours, theirs, (IMAGE, *learned()))

    def turned(x, *kernels):
        m = from_map(first(maps), Convolutions(*kernels), "n c ...", (4, 5))
        return last(modulate(first(x), m, "instance", "n c ..."))

    got, want = quick(lambda *args: (turned(*args), ours(*args)))(*single([IMAGE, *learned()]))
    close(got, want)


@pytest.mark.slow
def test_nearest_takes_the_elements_that_torch_takes():
    torch = pytest.importorskip("torch")
    for old, new in ((8, 4), (7, 5), (3, 8), (5, 5), (9, 2)):
        x = np.arange(float(old))[None, None]
        want = torch.nn.functional.interpolate(torch.tensor(x), size=new, mode="nearest").numpy()[0, 0]
        assert nearest(jnp.arange(float(old)), (new,), "...").tolist() == want.tolist()


@pytest.mark.slow
def test_a_small_scale_survives_a_bfloat16_condition():
    flat = jnp.array([[2.0**-9, 0.0]], jnp.bfloat16)  # 1 + 2 ** -9 is 1 in bfloat16
    assert float(split_modulation(flat).scale[0, 0]) == 1 + 2.0**-9
    x = jnp.ones((1, 3, 1), jnp.bfloat16)
    assert modulate(x, split_modulation(flat)).dtype == jnp.bfloat16
    assert gated(x, x.astype(jnp.float32), jnp.ones((1, 1))).dtype == jnp.bfloat16


# RevIN.


def series_in_torch(torch, x, scale, bias, last=False):
    """What the published code does there and back, with a model that triples, in float64."""
    mean = x[:, -1:] if last else x.mean(1, keepdim=True).detach()
    std = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
    y = (x - mean) / std * scale + bias
    z = 3 * y[:, :4]
    return torch.cat([y, (z - bias) / (scale + 1e-10) * std + mean], 1)


@pytest.mark.parametrize("centre", ["mean", pytest.param("last", marks=pytest.mark.slow)])
def test_revin_has_outputs_and_gradients_of_the_published_code_written_in_torch(centre):
    def ours(x, scale, bias):
        y, stats = revin(x, scale=scale, bias=bias, centre=centre, detach=True)
        back = denormalize(3 * y[:, :4], stats, scale=scale, bias=bias, slack=1e-10)
        return jnp.concatenate([y, back], 1)

    args = (SERIES, np.array([0.5, 2.0, -1.5]), np.array([0.1, 0.0, -3.0]))
    assert_as_torch(ours, lambda torch, *a: series_in_torch(torch, *a, last=centre == "last"), args)


@pytest.mark.parametrize(
    "settings",
    [
        {"centre": "last"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"normalizer": Normalizer(None, "...", order=1, power=1.0)}, marks=pytest.mark.slow),
    ],
)
def test_revin_is_undone_exactly_in_both_layouts_and_beside_a_mask(settings):
    mask = jnp.asarray(np.arange(7) < 5).reshape(1, 7, 1)
    back = {key: value for key, value in settings.items() if key != "centre"}

    @quick
    def ours(x, **p):
        y, stats = revin(x, **p, **settings)
        turned, turned_stats = revin(first(x), "n c ...", **p, **settings)
        part, part_stats = revin(jnp.where(mask, x, jnp.nan), mask=mask, **p, **settings)
        short, short_stats = revin(x[:, :5], **p, **settings)
        undone = (
            denormalize(y, stats, **p, **back),
            last(denormalize(turned, turned_stats, "n c ...", **p, **back)),
            denormalize(part, part_stats, **p, **back)[:, :5],
        )
        return undone, ((last(turned), y), (part[:, :5], short), (part_stats.var, short_stats.var))

    x, scale, bias = single((100 * SERIES, np.array([0.01, -2.0, 30.0]), np.array([1.0, 0.0, -3.0])))
    undone, pairs = ours(x, scale=scale, bias=bias)
    for got, want in zip(undone, (x, x, x[:, :5]), strict=True):
        close(got, want, 2e-6)
    for got, want in pairs:
        close(got, want)


@pytest.mark.slow
def test_revin_takes_the_last_value_that_is_not_masked_of_each_series():
    mask = np.ones((2, 7, 3), bool)
    mask[0, 5:, 0], mask[1, :, 2] = False, False
    x = jnp.where(jnp.asarray(mask), jnp.asarray(SERIES, jnp.float32), jnp.nan)
    want = SERIES[:, -1].copy()
    want[0, 0], want[1, 2] = SERIES[0, 4, 0], 0.0

    def loss(x):
        y, stats = revin(x, centre="last", mask=jnp.asarray(mask))
        return jnp.sum(jnp.sin(y)), stats.mean[:, 0]

    grad, found = quick(jax.grad(loss, has_aux=True))(x)
    close(found, want)
    assert bool(jnp.isfinite(grad).all())


@pytest.mark.slow
def test_statistics_of_revin_are_float32_beside_bfloat16_and_a_constant_series_comes_back():
    x = jnp.full((1, 300, 1), 257.0, jnp.bfloat16)
    (y, stats), back = quick(lambda x: ((r := revin(x)), denormalize(*r)))(x)
    assert y.dtype == back.dtype == jnp.bfloat16
    assert stats.mean.dtype == jnp.float32
    assert bool((y == 0).all())
    assert bool((back == x).all())


@pytest.mark.slow
def test_a_scale_of_zero_gives_the_mean_where_the_published_code_multiplies_rounding_by_1e10():
    x = jnp.asarray(SERIES, jnp.float32)

    def loss(scale):
        y, stats = revin(x, scale=jnp.zeros(3))
        back = denormalize(y + 1, stats, scale=scale)
        return jnp.sum(back), (back, denormalize(y + 1, stats, scale=scale, slack=1e-10))

    grad, (exact, published) = quick(jax.grad(loss, has_aux=True))(jnp.zeros(3))
    close(exact, np.broadcast_to(SERIES.mean(1, keepdims=True), SERIES.shape))
    assert float(jnp.abs(published).max()) > 1e9
    assert bool(jnp.isfinite(grad).all())


# Every method under every transformation.


def whitened(x, axes, eps=1e-5):
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + eps)


def plain_revin(x, scale, bias):
    d = jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
    y = (x - x[:, -1:]) / d * scale.reshape(1, 1, -1) + bias.reshape(1, 1, -1)
    return y, (y**2 - bias.reshape(1, 1, -1)) / scale.reshape(1, 1, -1) * d + x[:, -1:]


def our_revin(x, scale, bias):
    y, stats = revin(x, scale=scale, bias=bias, centre="last")
    return y, denormalize(y**2, stats, scale=scale, bias=bias)


SMALL, OTHER, VECTOR = RNG.normal(size=(2, 3, 2)), RNG.normal(size=(2, 4, 2)), RNG.normal(size=(2, 2))
METHODS = {
    "adain": (
        adain,
        lambda x, s: whitened(x, 1) * jnp.sqrt(s.var(1, keepdims=True) + 1e-5) + s.mean(1, keepdims=True),
        (SMALL, OTHER),
    ),
    "adaln_zero": (
        lambda x, c, k: gated(x, modulate(x, m := project(c, k, None, ("scale", "bias", "gate")), TOKEN), m.gate),
        lambda x, c, k: x + (c @ k)[:, None, 4:] * (
            whitened(x, -1, 1e-6) * (1 + (c @ k)[:, None, :2]) + (c @ k)[:, None, 2:4]
        ),
        (SMALL, VECTOR, RNG.normal(size=(2, 6))),
    ),
    "by_class": (
        lambda x, s, b: modulate(x, by_class(jnp.array([1, 0]), s, b), "batch"),
        lambda x, s, b: whitened(x, (0, 1)) * s[::-1, None] + b[::-1, None],
        (SMALL, VECTOR, RNG.normal(size=(2, 2))),
    ),
    "spade": (
        lambda x, k, s, b: modulate(x, from_map(x, Convolutions(k, k[0, 0], s, s[0, 0], b, b[0, 0])), "instance"),
        lambda x, k, s, b: whitened(x, 1)
        * (1 + (h := jnp.maximum(x @ k[0] + k[0, :1], 0)) @ s[0] + s[0, :1]) + h @ b[0] + b[0, :1],
        (SMALL, *RNG.normal(size=(3, 1, 2, 2))),
    ),
    "revin": (our_revin, plain_revin, (SMALL, np.array([0.7, -1.3]), np.array([0.2, 0.4]))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_method_has_every_derivative_of_its_plain_form(name):
    ours, plain, args = METHODS[name]
    with jax.numpy_rank_promotion("allow"):
        assert_same_derivatives(ours, plain, args, rtol=1e-7)


# Modules.

X, CONDITIONS = jnp.asarray(IMAGE, jnp.float32), jnp.asarray(CONDITION, jnp.float32)
MAPS = jnp.asarray(RNG.normal(size=(3, 8, 7, 2)), jnp.float32)
MODULES = {
    "AdaIN": ((), {"style_epsilon": 0.0}, (jnp.asarray(STYLE, jnp.float32),)),
    "ConditionalNorm": ((6, 4), {"momentum": 0.5}, (jnp.array([1, 3, 1]),)),
    "FiLM": ((6, 4), {"normalizer": "batch"}, (CONDITIONS,)),
    "AdaLN": ((6, 4), {"around": 0.5}, (CONDITIONS,)),
    "AdaLNZero": ((6, 4), {}, (CONDITIONS,)),
    "SPADE": ((6, 2), {"hidden": 3}, (MAPS,)),
    "RevIN": ((6,), {"detach": True}, ()),
    "SwitchableNorm": ((6,), {"momentum": 0.5, "averaging": "debiased"}, ()),
}


def linen_and_nnx(name, **more):
    """The layer in linen with random parameters, its variables, and the layer in nnx with the same."""
    sizes, settings, given = MODULES[name]
    settings = {**settings, **more}
    theirs = getattr(normjax.nnx, name)
    other = theirs(**settings) if name == "AdaIN" else theirs(*sizes, **settings, rngs=nnx.Rngs(0))
    kept = {"ConditionalNorm": sizes[1:], "RevIN": sizes}.get(name, ())
    training = {"use_running_average": False} if name in ("ConditionalNorm", "FiLM", "SPADE", "SwitchableNorm") else {}
    layer: Any = getattr(normjax.linen, name)(*kept, **settings)
    variables = quick(functools.partial(layer.init, **training))(jax.random.key(0), X, *given)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), variables.get("params", {}))
    for key, value in params.items():
        getattr(other, key)[...] = value
    return functools.partial(layer.apply, **training), {**variables, "params": params}, other, given, layer


SLOW = ("AdaLN", "AdaLNZero", "ConditionalNorm", "SPADE", "FiLM")  # their code is that of others


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in MODULES])
def test_linen_is_nnx_on_the_same_parameters_with_gradients_and_running_statistics(name):
    train, variables, other, given, layer = linen_and_nnx(name)
    stats = {k: v for k, v in variables.items() if k != "params"}

    def total(out):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(out))

    def plain(params):
        out, changed = train({"params": params, **stats}, X, *given, mutable=["batch_stats"])
        return total(out), (out, changed)

    def learned(params):
        model = nnx.merge(graph, params, rest, copy=True)
        out = model(X, *given)
        return total(out), (out, nnx.state(model, nnx.BatchStat))

    graph, params, rest = nnx.split(other, nnx.Param, ...)
    grads, (out, changed) = quick(jax.grad(plain, has_aux=True))(variables["params"])
    theirs, (same, stored) = quick(jax.grad(learned, has_aux=True))(params)
    jax.tree.map(close, same, out)
    theirs = nnx.to_pure_dict(theirs)
    assert set(theirs) == set(grads)
    for key, grad in grads.items():
        close(grad, theirs[key])
        assert float(jnp.abs(grad).max()) > 0
    kept = dict(changed.get("batch_stats", {}))
    jax.tree.map(close, nnx.to_pure_dict(stored), kept)
    if kept:  # inference takes what was stored
        nnx.update(other, stored)
        other.eval()
        fixed = layer.apply({"params": variables["params"], **changed}, X, *given, use_running_average=True)
        close(other(X, *given), fixed)
        assert np.allclose(fixed, out, atol=1e-4) == (name == "SwitchableNorm")  # debiased, of one batch: that batch's


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FiLM", "AdaLN", "AdaLNZero"])
def test_modulation_starts_as_nothing(name):
    sizes, _, given = MODULES[name]
    layer = getattr(normjax.nnx, name)(*sizes, rngs=nnx.Rngs(0))
    want = X if name == "FiLM" else normalize(X, TOKEN).y
    out = layer(X, *given)
    if name == "AdaLNZero":
        assert gated(X, out[0], out[1]).tolist() == X.tolist()
        out = out[0]
    close(out, want)


@pytest.mark.slow
def test_dtype_of_a_module_is_that_of_its_output():
    for name in ("FiLM", "SwitchableNorm", "RevIN"):
        train, variables, other, given, _ = linen_and_nnx(name, dtype=jnp.bfloat16)
        apply = functools.partial(train, mutable=["batch_stats"])
        outs = jax.eval_shape(apply, variables, X, *given)[0], other(X, *given)
        for out in outs:
            assert (out.y if name == "RevIN" else out).dtype == jnp.bfloat16


# Errors.

D = jnp.ones((2, 3))
ERRORS = {
    "branch": (
        lambda: gated(D, jnp.ones((2, 4)), 1.0),
        FieldError,
        "a branch has the shape of what it is added to: found (2, 4) and (2, 3)",
    ),
    "style": (
        lambda: style(D, "mean_only"),
        ValueError,
        "a style has a spread: a row that divides, without a floor; found Normalizer('n ...', None)",
    ),
    "tables": (
        lambda: by_class(jnp.array([0]), D, jnp.ones(3)),
        FieldError,
        "tables of scale and bias are both [classes, c]; found shapes (2, 3) and (3,)",
    ),
    "labels": (
        lambda: by_class(jnp.ones(2), D, D),
        FieldError,
        "labels are integers [n], or weights [n, 2]; found float32 of shape (2,)",
    ),
    "order": (
        lambda: split_modulation(D, ("scale", "shift")),
        ValueError,
        "the order names scale, bias and gate, each at most once; found ('scale', 'shift')",
    ),
    "parts": (
        lambda: split_modulation(D),
        FieldError,
        "the last axis of shape (2, 3) does not split into 2 parts: scale, bias",
    ),
    "kernel": (
        lambda: project(D, jnp.ones((2, 4))),
        FieldError,
        "a condition is [n, k] and a kernel [k, parts * c]; found shapes (2, 3) and (2, 4)",
    ),
    "kernel's bias": (
        lambda: project(D, jnp.ones((3, 4)), jnp.ones(2)),
        FieldError,
        "the bias of a kernel (3, 4) is (4,); found shape (2,)",
    ),
    "convolution": (
        lambda: from_map(jnp.ones((1, 4, 4, 3)), Convolutions(*(jnp.ones(s) for s in kernel_shapes(6, 2, 2)))),
        FieldError,
        "a kernel of shape (3, 3, 2, 128) with a bias of shape (128,) does not fit maps of shape (1, 4, 4, 3), layout "
        '"n ... c"',
    ),
    "layout of a map": (
        lambda: from_map(jnp.ones((1, 4, 3)), Convolutions(*(jnp.ones(s) for s in kernel_shapes(6, 3, 1))), "n t c"),
        FieldError,
        'SPADE takes layouts of n, c and "..." for space; found "n t c"',
    ),
    "window": (lambda: kernel_shapes(6, 2, 2, width=4), ValueError, "the windows of the convolutions are odd; found 4"),
    "lengths": (
        lambda: nearest(D, (4,)),
        FieldError,
        '1 lengths do not fit the 0 axes of "..." of shape (2, 3), layout "n ... c"',
    ),
    "centre": (lambda: revin(D, centre="first"), ValueError, "centre is one of 'mean', 'last'; found 'first'"),
    "row that cannot be undone": (
        lambda: revin(D, normalizer="divisive"),
        ValueError,
        "only a row of whole axes, without floor and keep_mean, can be undone; found Normalizer('...:5 c', '...:5 c', "
        "eps=1.0)",
    ),
    "no time": (
        lambda: revin(jnp.ones((2, 3, 4, 5)), centre="last"),
        FieldError,
        '"last" needs one axis of time; field "..." averages 2 axes of an array of shape (2, 3, 4, 5), layout "n ... c"',
    ),
    "last of nothing": (
        lambda: revin(D, normalizer="rms", centre="last"),
        ValueError,
        "\"last\" takes the place of a mean; found Normalizer(None, 'c'), which has none",
    ),
    "other statistics": (
        lambda: denormalize(jnp.ones((2, 3, 4)), Stats(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 3)))),
        FieldError,
        "the statistics have the rank of y and broadcast against it: found shapes (2, 1, 3) and (2, 3, 4)",
    ),
    "scale": (
        lambda: modulate(D, Modulation(jnp.ones(4), None)),
        FieldError,
        'scale of shape (4,) does not broadcast against shape (2, 3), layout "n ... c"',
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusal_says_what_was_found_and_what_is_accepted(name):
    refuses(*ERRORS[name])
