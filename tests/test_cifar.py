"""experiments.cifar: the networks are those of Ren et al. 2017, as NumPy has them; rows, schedule and report are true."""

import dataclasses
import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cifar
from experiments.common import classify, data, files, loop, runs
from experiments.networks import cnn, conv, layers
from experiments.networks.resnet import ResNet
from normjax import Normalizer
from tests.commands import contents, kill_here, refused

# --- written out in NumPy -------------------------------------------------------------------------


def window(x, i, j):
    """What a 3x3 window of stride 2 sees at (i, j) with TensorFlow's SAME border on even sizes: [n, <= 3, <= 3, c]."""
    return x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]


def numpy_pool(x, reduce):
    n, h, w, c = x.shape
    y = np.empty((n, h // 2, w // 2, c))
    for i, j in np.ndindex(h // 2, w // 2):
        y[:, i, j] = reduce(window(x, i, j), axis=(1, 2))
    return y


def numpy_conv(x, params, stride=1):
    kernel = np.asarray(params["kernel"], np.float64)
    size, out = kernel.shape[0], -(-x.shape[1] // stride)
    total = max((out - 1) * stride + size - x.shape[1], 0)
    padded = np.pad(x, ((0, 0), *((total // 2, total - total // 2),) * 2, (0, 0)))
    y = np.empty((len(x), out, out, kernel.shape[-1]))
    for i, j in np.ndindex(out, out):
        seen = padded[:, stride * i : stride * i + size, stride * j : stride * j + size]
        y[:, i, j] = np.einsum("nabi,abio->no", seen, kernel)
    return y + np.asarray(params.get("bias", 0.0), np.float64)


def numpy_mean(z, kind, width):
    """E_F[z] for each field of the paper; zeros past the edge count in a window of dn (the published code)."""
    if kind == "batch":
        return z.mean(axis=(0, 1, 2), keepdims=True)
    if kind == "layer":
        return z.mean(axis=(1, 2, 3), keepdims=True)
    channels, r = z.mean(axis=3, keepdims=True), width // 2
    padded = np.pad(channels, ((0, 0), (r, r), (r, r), (0, 0)))
    h, w = z.shape[1:3]
    return sum(padded[:, a : a + h, b : b + w] for a in range(width) for b in range(width)) / width**2


def numpy_norm(z, row, which, width, params, sigma=None):
    """(output, mean |v|) of a normalized layer."""
    if row.kind == "none":
        return z, np.abs(z).mean()
    v = z - numpy_mean(z, row.kind, width)
    y = v
    if row.sigma is not None:
        sigma = row.sigma[which] if sigma is None else sigma
        y = v / np.sqrt(sigma**2 + numpy_mean(v**2, row.kind, width))
    return y * np.asarray(params.get("scale", 1.0)) + np.asarray(params.get("bias", 0.0)), np.abs(v).mean()


def perturbed(params, seed=0):
    """Parameters of a size that makes every layer matter, scales and biases too."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    made = [
        random.normal(size=leaf.shape) * (2 / max(np.prod(leaf.shape[:-1]), 1)) ** 0.5 if leaf.ndim > 1
        else np.abs(random.normal(size=leaf.shape)) + 0.2
        for leaf in leaves
    ]  # fmt: skip
    return jax.tree.unflatten(tree, [np.asarray(m, np.float32) for m in made])


def applied(model, x):
    """Parameters, logits and the sum of penalties in training mode."""
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    params = perturbed(variables["params"])
    stats = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variables.get("batch_stats", {}))

    @jax.jit
    def run(params, x):
        given = {"params": params, "batch_stats": stats}
        return model.apply(given, x, train=True, mutable=["losses", "batch_stats"])

    logits, changed = run(params, x)
    return params, logits, sum(jax.tree.leaves(changed.get("losses", {})))


@pytest.mark.parametrize("name", ["base-l1", "bn*", "ln*", "dn*", "ln-ms"])
def test_cnn_is_the_papers_in_numpy(name):
    row = cifar.ROWS[name]
    config = cifar.configure(name, cifar.Options(dataset="cifar100"))
    model = cnn.ren2017(config.normalizers, channels=(3, 4, 5), hidden=6, affine=config.affine, l1=config.l1)
    x = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    params, logits, penalty = applied(model, x)
    a, sizes = x.astype(np.float64), []
    for k, width in enumerate((5, 3, 3)):
        z = numpy_conv(a, params[f"convs_{k}"])
        y, size = numpy_norm(z, row, 1, width, params.get(f"norms_{k}", {}))
        a = numpy_pool(np.maximum(y, 0), np.max if k == 0 else np.mean)
        sizes.append(size)
    a = a.reshape(2, -1)
    for k in (0, 1):
        a = a @ np.asarray(params[f"dense_{k}"]["kernel"], np.float64) + np.asarray(params[f"dense_{k}"]["bias"])
    np.testing.assert_allclose(logits, a, rtol=2e-4, atol=2e-4 * np.abs(a).max())
    assert penalty == pytest.approx(row.alpha[1] * sum(sizes), rel=1e-4)


@pytest.mark.parametrize("name", [pytest.param("resnet-bn", marks=pytest.mark.slow), "resnet-dn*"])
def test_resnet_is_the_papers_in_numpy(name):
    """Two stages of one unit suffice: one keeps its size, one halves it."""
    row, widths = cifar.ROWS[name], (4, 4, 6)
    config = cifar.configure(name, cifar.Options(dataset="cifar10"))
    learned, more = config.learn_sigma, {"affine": config.affine, "l1": config.l1}
    model = ResNet(config.normalizers[:3], widths=widths, units=1, learn_sigma=learned, **more)
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params, logits, penalty = applied(model, x)
    sizes = []

    def active(z, width, name):
        own = params[name]
        y, size = numpy_norm(z, row, 0, width, own, own.get("sigma"))
        sizes.append(size)
        return np.maximum(y, 0)

    a = active(numpy_conv(x.astype(np.float64), params["first"]), 7, "first_norm")
    a = a + numpy_conv(active(numpy_conv(a, params["convs_0"]), 5, "norms_0"), params["convs_1"])
    branch = numpy_conv(active(a, 5, "norms_1"), params["convs_2"], stride=2)
    short = np.pad(a.reshape(2, 4, 2, 4, 2, 4).mean(axis=(2, 4)), ((0, 0), (0, 0), (0, 0), (1, 1)))
    a = short + numpy_conv(active(branch, 5, "norms_2"), params["convs_3"])
    a = active(a, 5, "last_norm").mean(axis=(1, 2))
    a = a @ np.asarray(params["dense"]["kernel"], np.float64) + np.asarray(params["dense"]["bias"])
    np.testing.assert_allclose(logits, a, rtol=2e-4, atol=2e-4 * np.abs(a).max())
    assert penalty == pytest.approx(row.alpha[0] * sum(sizes), rel=1e-4)


def test_resnet_has_32_layers_and_464_154_weights():
    """He et al.'s count for 32 layers of these widths, and no biases but the last: 464,154 kernels and a bias of 10."""
    model = ResNet((Normalizer(None, None),) * 4, affine=False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))["params"]
    kernels = [leaf for leaf in jax.tree.leaves(shapes) if len(leaf.shape) > 1]
    assert len(kernels) == 32
    widths = [(3, 16), *[(16, 16)] * 10, (16, 32), *[(32, 32)] * 9, (32, 64), *[(64, 64)] * 9]
    assert sum(leaf.size for leaf in kernels) == sum(9 * i * o for i, o in widths) + 640


# --- pools and convolution ------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def pulled(f, x, g):
    y, back = jax.vjp(f, x)
    return y, back(g)[0]


def test_max_pools_gradient_goes_to_the_first_maximum_of_each_window():
    x = np.random.default_rng(0).integers(0, 3, (2, 8, 6, 3)).astype(np.float32)  # many ties
    g = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    y, back = pulled(layers.overlapping_max, x, g)
    np.testing.assert_array_equal(y, numpy_pool(x, np.max))
    expected = np.zeros_like(x)
    for n, i, j, c in np.ndindex(*g.shape):
        seen = window(x, i, j)[n, :, :, c]
        a, b = np.unravel_index(seen.argmax(), seen.shape)
        expected[n, 2 * i + a, 2 * j + b, c] += g[n, i, j, c]
    np.testing.assert_allclose(back, expected, atol=1e-6)


def test_avg_pool_and_its_gradient_count_what_is_there():
    x, g = (np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32) for size in (6, 3))
    y, back = pulled(layers.overlapping_mean, x, g)
    np.testing.assert_allclose(y, numpy_pool(x, np.mean), atol=1e-6)
    expected = np.zeros_like(x)
    for i, j in np.ndindex(3, 3):
        seen = window(expected, i, j)
        seen += g[:, i, j][:, None, None] / seen[0, :, :, 0].size
    np.testing.assert_allclose(back, expected, atol=1e-6)


@pytest.mark.parametrize("pool", [layers.overlapping_max, layers.overlapping_mean])
def test_odd_maps_are_refused(pool):
    with pytest.raises(ValueError, match=r"pooling takes maps of even size; found \(1, 4, 7, 3\)"):
        pool(jnp.zeros((1, 4, 7, 3)))


@pytest.mark.parametrize("n", [2, 3])  # an even batch is convolved in two halves
def test_convolution_and_all_its_derivatives_equal_flaxs(n):
    channels, stride = 3, 2
    x = np.random.default_rng(0).normal(size=(n, 6, 8, channels)).astype(np.float32)
    variables = {"params": perturbed({"kernel": np.empty((3, 3, channels, 4)), "bias": np.empty(4)})}

    @partial(jax.jit, static_argnums=0)
    def measured(conv, variables, x):
        def wave(variables, x):
            return jnp.sum(jnp.sin(conv.apply(variables, x)))

        def slope(variables, x):
            return sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(jax.grad(wave, (0, 1))(variables, x)))

        forward = jax.jvp(wave, (variables, x), jax.tree.map(jnp.cos, (variables, x)))[1]
        return conv.apply(variables, x), jax.grad(wave, (0, 1))(variables, x), forward, jax.grad(slope)(variables, x)

    ours, theirs = (
        measured(c, variables, x)
        for c in (conv.Conv(4, stride=stride, form="halves"), nn.Conv(4, (3, 3), (stride, stride)))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_gradients_of_convolutions_reach_xla_in_the_order_that_loops_need():
    """Batch first, features last, kernels (h, w, i, o): all else is slow in a loop on CPUs."""

    def loss(x, kernel):
        return jnp.sum(jnp.square(conv.convolve(x, kernel)))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((5, 6, 6, 4)), jnp.ones((3, 3, 4, 8))).as_text()
    orders = re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text)
    assert orders == ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"] * 3


def test_first_weights_have_the_published_spread():
    model = cnn.ren2017((Normalizer(None, None),) * 3, affine=False)
    params = jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)), train=False))()[
        "params"
    ]
    published = {"convs_0": 1e-4, "convs_1": 1e-2, "convs_2": 1e-2, "dense_0": 0.1, "dense_1": 0.1}
    cut = 0.8796  # standard deviation of a normal cut at two
    for name, std in published.items():
        kernel = np.asarray(params[name]["kernel"])
        assert kernel.std() == pytest.approx(cut * std, rel=0.07)
        assert 1.9 * std < np.abs(kernel).max() <= 2 * std
        assert not np.any(params[name]["bias"])


# --- rows and schedule ----------------------------------------------------------------------------

# As in the paper's table: sigma, alpha of CIFAR-10 and of CIFAR-100, affine, published accuracy in per cent.
TABLE = {
    "base": ("-", "-", "0", "0", "no", "75.65", "44.09"),
    "base-l1": ("-", "-", "0.01", "0.01", "no", "-", "-"),
    "bn": ("0.01", "0.01", "0", "0", "yes", "78.07", "48.14"),
    "bn-s": ("1", "0.25", "0", "0", "yes", "-", "-"),
    "bn-l1": ("0.01", "0.01", "0.005", "0.01", "yes", "-", "-"),
    "bn*": ("1", "0.25", "0.005", "0.01", "yes", "81.79", "51.56"),
    "ln": ("0.01", "0.01", "0", "0", "yes", "72.11", "42.49"),
    "ln-s": ("0.5", "0.5", "0", "0", "no", "-", "-"),
    "ln-l1": ("0.01", "0.01", "0.005", "0.005", "yes", "-", "-"),
    "ln*": ("0.5", "0.5", "0.005", "0.005", "no", "80.91", "49.57"),
    "dn": ("0.5", "0.5", "0", "0", "no", "-", "-"),
    "dn*": ("0.5", "0.5", "0.005", "0.001", "no", "81.22", "50.66"),
    "bn-ms": ("-", "-", "0", "0", "yes", "-", "-"),
    "ln-ms": ("-", "-", "0", "0", "yes", "-", "-"),
    "dn-ms": ("-", "-", "0", "0", "no", "-", "-"),
    "resnet-dn": ("0.5, learned", "2, learned", "0", "0", "no", "-", "-"),
    "resnet-dn*": ("0.5, learned", "2, learned", "0.001", "0.01", "no", "-", "-"),
}


@pytest.mark.parametrize("which", [0, 1])
def test_list_shows_the_published_table(capsys, which):
    cifar.main(["--list", "--dataset", ("cifar10", "cifar100")[which]])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["row", "normalizer", "sigma", "alpha", "affine", "published"]
    shown = {line[0]: line[2:] for line in lines[2:]}
    assert shown.keys() == cifar.ROWS.keys()
    for name, row in TABLE.items():
        assert shown[name] == [row[which], row[2 + which], row[4], row[5 + which]], name


def test_scale_shrinks_steps_and_decay_points_alike():
    def schedule(name, scale):
        config = cifar.configure(name, cifar.Options(scale=scale))
        return (*config.decays, config.steps)

    assert schedule("bn", 1.0) == (30_000, 50_000, 80_000)
    assert schedule("base", 1.0) == (5_000, 30_000, 50_000)
    assert schedule("resnet-dn", 1.0) == (40_000, 60_000, 80_000)
    assert schedule("bn", 0.02) == (600, 1_000, 1_600)
    assert schedule("base+dropout", 0.02) == (100, 600, 1_000)


def test_border_and_learning_rate_of_the_command_line_reach_the_rows():
    options = cifar.Options(border="truncate", lr=0.3)
    config = cifar.configure("dn", options)
    assert [(n.border, str(n.mean), str(n.var)) for n in config.normalizers] == [
        ("truncate", f"...:{width} c", f"...:{width} c") for width in (5, 3, 3)
    ]
    assert config.lr == 0.3
    assert cifar.configure("dn", cifar.Options()).normalizers[0].border == "zero"
    assert [cifar.configure(name, cifar.Options()).lr for name in ("bn", "resnet-bn", "resnet-none")] == [
        1e-3,
        0.1,
        5e-3,
    ]


# --- training -------------------------------------------------------------------------------------

SMOKE = cifar.Options(smoke=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Digits, on which every row can be tried."""
    return cifar.Job(SMOKE, tmp_path_factory.mktemp("cifar"), data.digits())


def test_mean_image_is_that_of_train_and_test(job):
    pixels = np.concatenate([job.data.train["image"], job.data.test["image"]]).astype(np.float64)
    mean = classify.mean_image(job.data)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-6)
    assert mean.shape == (8, 8, 1)


QUICK = ("base+dropout", "bn*", "dn-ms", "resnet-dn*")


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(cifar.ROWS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_rows_make_a_step(job, names):
    """Traced only: dtypes, shapes and names fit, and a row is penalized as its table says."""
    batch = {"image": jax.ShapeDtypeStruct((4, 8, 8, 1), np.uint8), "label": jax.ShapeDtypeStruct((4,), np.int32)}
    for name in names:
        row = cifar.ROWS[name]
        config = cifar.configure(name, SMOKE)
        task = cifar.train(job, config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        before = jax.eval_shape(task.init, key)
        after, metrics = jax.eval_shape(task.step, before, batch, key if task.noise else None)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
        assert {"loss", "penalty", "accuracy"} == metrics.keys()
        assert task.noise == (row.dropout > 0 or row.network == "resnet")
        assert config.l1 == row.alpha[0]


def start(task):
    """A first state with parameters that matter; compiling `init` would take seconds."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return zeros._replace(params=jax.tree.map(jnp.asarray, perturbed(shapes.params)))


@pytest.mark.slow
def test_learning_rate_falls_to_a_tenth_at_each_decay_point_and_kernels_alone_decay(job):
    """An update is -rate * trace, the trace of momentum: here almost wholly the decay, 1e6 * kernel."""
    config = dataclasses.replace(cifar.configure("bn", SMOKE), decays=(1, 2), lr=1e-7, weight_decay=1e6)
    task = cifar.train(job, config)
    state, step, rates = start(task), jax.jit(task.step), []
    batch = {name: jnp.asarray(column[:8]) for name, column in job.data.train.items()}
    for k in range(3):
        after, _ = step(state, batch)
        (trace,) = (s.trace for s in jax.tree.leaves(after.opt_state, is_leaf=is_trace) if is_trace(s))
        before, new, traced = (np.asarray(t["dense_0"]["kernel"]) for t in (state.params, after.params, trace))
        rates.append(-float(np.vdot(new - before, traced)) / float(np.vdot(traced, traced)))
        if k == 0:
            np.testing.assert_allclose(traced, 1e6 * before, rtol=1e-2, atol=1e3)
            assert np.abs(trace["norms_0"]["scale"]).max() < 1e4 < 1e6 * state.params["norms_0"]["scale"].min()
        state = after
    np.testing.assert_allclose(rates, [1e-7, 1e-8, 1e-9], rtol=1e-2)


def is_trace(state):
    return isinstance(state, optax.TraceState)


def test_augmented_images_are_crops_of_the_padded_ones_half_of_them_mirrored():
    image = np.random.default_rng(0).integers(1, 256, (64, 6, 6, 3), np.uint8)
    made = np.asarray(jax.jit(classify.augment)(jax.random.key(0), image))
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = []
    for one, source in zip(made, padded, strict=True):
        found += [
            (a, b, flip)
            for a, b in np.ndindex(9, 9)
            for flip in (False, True)
            if np.array_equal(one[:, ::-1] if flip else one, source[a : a + 6, b : b + 6])
        ][:1]
    rows, columns, flips = zip(*found, strict=True)
    assert len(found) == 64
    assert {0, 8} <= set(rows)
    assert {0, 8} <= set(columns)
    assert 20 < sum(flips) < 44
    assert made.dtype == np.uint8


@pytest.mark.slow
def test_last_evaluation_is_on_all_test_images_and_earlier_ones_on_the_first(job, monkeypatch):
    monkeypatch.setattr(cifar, "BETWEEN", 40)
    monkeypatch.setattr(cifar, "HELD_OUT_BATCH", 20)
    config = dataclasses.replace(cifar.configure("base", SMOKE), batch_size=30)
    task = cifar.train(job, config)
    state = start(task)
    test = {name: jnp.asarray(column[:100]) for name, column in job.data.test.items()}
    evaluate = jax.jit(task.evaluate)
    model = cnn.ren2017(config.normalizers, affine=False)
    x = test["image"].astype(jnp.float32) - classify.mean_image(job.data)[None]
    logits = model.apply({"params": state.params}, x, train=False)
    right = np.asarray(logits).argmax(-1) == np.asarray(test["label"])  # type: ignore[union-attr]
    for step, n in ((config.steps - 1, 40), (config.steps, 100)):
        found = evaluate(state._replace(step=jnp.asarray(step, jnp.int32)), test)
        assert float(found["accuracy"]) == pytest.approx(right[:n].mean(), abs=1e-6)
        assert 0 < float(found["correlation"]) < 1


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "bn**"], "no row is called 'bn**'; did you mean 'bn*'? There are base, "),
        (["--dataset", "cifar"], "no data set is called 'cifar'; did you mean 'cifar10'? There are cifar10, "),
        (["--border", "zeros"], "no border is called 'zeros'; did you mean 'zero'? There are zero, truncate"),
        (["--scale", "0"], "--scale is a positive number; found 0.0"),
        (["--lr", "-1"], "--lr is a positive number; found -1.0"),
    ],
)  # fmt: skip
def test_wrong_command_is_refused_and_writes_nothing(capsys, tmp_path, arguments, message):
    assert refused(capsys, cifar.main, "--out", str(tmp_path), *arguments).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_truncated_archive_is_named_with_the_expected_size(capsys, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"\x1f\x8b\x08\x00" + bytes(100))
    error = refused(capsys, cifar.main, "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs"))
    assert error.startswith(f"error: {archive} is truncated or damaged, 104 bytes where the publisher's has 170052171")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits_and_the_report_shows_them(tmp_path, monkeypatch):
    """A row with noise is killed in its second chunk."""
    rows = ["--smoke", "--out"]
    cifar.main([*rows, str(tmp_path / "a"), "--rows", "bn", "bn*", "base+dropout"])
    dropout = [*rows, str(tmp_path / "b"), "--rows", "base+dropout"]
    kill_here(monkeypatch, loop, "batches", 2, cifar.main, dropout)
    cifar.main([*dropout, "--resume"])
    a, b = (tmp_path / name / "cifar-digits-smoke" for name in "ab")
    for seed in ("seed-0", "seed-1"):
        assert contents(a / "base+dropout" / seed) == contents(b / "base+dropout" / seed)
    text = (a / "report.md").read_text()
    last = [files.read(a / "bn-star" / f"seed-{k}" / "metrics.jsonl")[-1] for k in (0, 1)]
    shown = [100 * line["test_accuracy"] for line in last]
    assert f"{np.mean(shown):.2f} +- {np.std(shown, ddof=1):.2f}" in text
    assert "(histograms.png)" in text
    assert (a / "report.html").read_text().count("data:image/png;base64,") == 3
    assert (b / "report.html").read_text().count("data:image/png;base64,") == 2  # no pair of rows
    config = json.loads((a / "bn-star" / "seed-1" / "config.json").read_text())
    assert config["config"] == runs.as_json(cifar.configure("bn*", SMOKE))
