"""superres: MATLAB's conventions, the network against NumPy and torch, what is refused, a killed run."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy import signal as scipy_signal

from experiments import superres
from experiments.common import files, images, pairs, scores
from experiments.common.data import DataError
from experiments.networks.conv import Conv
from tests.commands import kill_here, refused

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "superres"  # T91, Set5, Set14, BSD200, where they lie beside the checkout


# --- images: resize, colour, metrics ----------------------------------------------------------------


def keys_cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def matlab_axis(x, scale):
    """MATLAB's imresize of a vector, one output at a time: every input in reach, those past the border mirrored."""
    new, shrink = math.ceil(round(len(x) * scale, 6)), min(scale, 1)
    y = []
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        near = range(math.floor(centre - 2 / shrink) - 1, math.ceil(centre + 2 / shrink) + 2)
        weights = np.array([keys_cubic(shrink * (centre - j)) for j in near])
        mirrored = np.pad(x, 8 * len(x), mode="symmetric")
        y.append(np.dot(weights, [mirrored[j + 8 * len(x)] for j in near]) / weights.sum())
    return np.array(y)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 24), (7, 5)])
def test_resize_equals_the_definition_along_rows_then_columns(shape, scale):
    x = np.random.default_rng(0).normal(size=shape)
    rows = np.stack([matlab_axis(column, scale) for column in x.T], axis=1)
    expected = np.stack([matlab_axis(row, scale) for row in rows])
    np.testing.assert_allclose(images.resize(x, scale), expected, atol=1e-12)


def test_resize_differs_from_jaxs_at_the_border_alone():
    x = np.random.default_rng(0).uniform(size=(60, 48)).astype(np.float32)
    ours = images.resize(x, 1 / 3)
    theirs = np.asarray(jax.image.resize(x, (20, 16), "cubic", antialias=True))
    pillows = np.asarray(Image.fromarray(x).resize((16, 20), Image.Resampling.BICUBIC))
    for other in (theirs, pillows):
        difference = np.abs(ours - other)
        assert difference[2:-2, 2:-2].max() < 1e-6
        assert difference[0].max() > 1e-3
        assert difference[:, -1].max() > 1e-3


def test_luminance_has_matlabs_values_and_grey_stays():
    colours = {"black": 16, "red": 81, "lime": 145, "blue": 41, "white": 235}  # BT.601, 8 bits
    for name, y in colours.items():
        pixel = np.asarray(Image.new("RGB", (1, 1), name))
        assert images.luminance(pixel) * 255 == pytest.approx(y)
    assert images.luminance(np.array([[7]], np.uint8)) * 255 == pytest.approx(7)


def ssim(a, b):
    """Wang et al. 2004 in 8-bit units: a Gaussian window of 11 x 11, where it lies inside."""
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / g.sum() ** 2

    def mean(x):
        return scipy_signal.convolve2d(x, window, mode="valid")

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))


@pytest.mark.parametrize("crop", [0, 3])
def test_scores_are_those_of_8_bits_inside_the_border(crop):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (30, 40))
    image = truth / 255 + rng.normal(scale=0.1, size=truth.shape)
    whole = np.clip(np.round(image * 255), 0, 255)
    inside = (slice(crop, 30 - crop), slice(crop, 40 - crop))
    a, b = whole[inside], truth[inside].astype(float)
    found = images.score(image, truth / 255, crop)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((a - b) ** 2)))
    assert found["ssim"] == pytest.approx(ssim(a, b), abs=1e-9)
    assert images.score(truth / 255, truth / 255, crop) == {"psnr": math.inf, "ssim": 1.0}


# PSNR and SSIM of bicubic enlargement in the literature (MATLAB), and how far ours may be.
LITERATURE = [
    ("Set5", 3, 30.39, 0.8682, 0.01, 2e-4),
    ("Set5", 4, 28.42, 0.8104, 0.01, 2e-4),
    ("Set14", 3, 27.55, 0.7742, 0.1, 1e-3),
    ("Set14", 4, 26.00, 0.7027, 0.1, 1e-3),
]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no images beside the checkout")
@pytest.mark.parametrize(("name", "zoom", "psnr", "ssim", "psnr_off", "ssim_off"), LITERATURE)
def test_bicubic_has_the_literatures_scores(name, zoom, psnr, ssim, psnr_off, ssim_off):
    read = pairs.pairs(images.files(SHARED / name), zoom).values()
    found = [images.score(pair.low, pair.high, zoom) for pair in read]
    assert np.mean([s["psnr"] for s in found]) == pytest.approx(psnr, abs=psnr_off)
    assert np.mean([s["ssim"] for s in found]) == pytest.approx(ssim, abs=ssim_off)


# --- images: files ----------------------------------------------------------------------------------


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1"])
def test_images_of_every_mode_become_grey_or_rgb(tmp_path, picture, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(picture).convert(mode).save(path)
    image = images.read(path)
    assert image.dtype == np.uint8
    assert image.shape == ((40, 50) if mode in ("L", "LA", "1") else (40, 50, 3))
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(image, picture)


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert images.read(tmp_path / "a.png").tolist() == [[0, 1, 255]]


def broken(path, kind, picture):
    Image.fromarray(picture).save(path)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "small":
        Image.fromarray(picture[:10]).save(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated"),
        ("text", "cannot identify"),
        ("empty", "(0 bytes)"),
        ("small", "is 9 x 48 pixels, cropped to a multiple of 3; expected 11 at least"),
    ],
)
def test_unreadable_image_is_refused_by_name(tmp_path, picture, kind, message):
    path = tmp_path / "a.png"
    broken(path, kind, picture)
    with pytest.raises(DataError) as caught:
        pairs.pairs(images.files(tmp_path), 3)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_floating_point_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="no known range"):
        images.read(tmp_path / "a.tif")


# --- patches and network ----------------------------------------------------------------------------


def test_patches_lie_inside_their_image_at_the_same_place_in_both():
    made = {}
    for k, shape in enumerate(((33, 50), (40, 34))):
        code = (np.arange(math.prod(shape)).reshape(shape) + 10_000 * k).astype(np.float64)
        made[str(k)] = images.Pair(high=code + 0.5, low=code)
    stacked = pairs.stack(made)
    assert stacked["low"].shape == (2, 40, 50)
    patches = pairs.cut(jax.tree.map(jnp.asarray, stacked), jax.random.key(0), 20, 33)
    low, high = (np.asarray(patches[name]) for name in ("low", "high"))
    np.testing.assert_array_equal(high, low + 0.5)
    for k, (low_k, width, rows, columns) in enumerate(((low[:20], 50, 1, 18), (low[20:], 34, 8, 2))):
        first = low_k[:, 0, 0] - 10_000 * k
        corners = {(int(f) // width, int(f) % width) for f in first}
        offsets = np.arange(33)[:, None] * width + np.arange(33)
        np.testing.assert_array_equal(low_k - low_k[:, :1, :1], np.broadcast_to(offsets, low_k.shape))
        assert all(row < rows and column < columns for row, column in corners)
        assert {row for row, _ in corners} | {column for _, column in corners} > {0, 1}


def correlate(x, kernel, bias):
    """The convolution layer in float64, [h, w, i] to [h', w', o]."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(0, 1))  # [h', w', i, k, k]
    return np.tensordot(windows, kernel.transpose(2, 0, 1, 3), axes=3) + bias


def published_dn(z, a, b):
    """The published code's divisive norm: zeros count past the border, and the sum over B is divided by A's area."""
    v = z - ndimage.uniform_filter(z.mean(axis=-1), a, mode="constant")[..., None]
    square = ndimage.uniform_filter((v**2).mean(axis=-1), b, mode="constant") * b**2 / a**2
    return v, v / np.sqrt(1.0 + square)[..., None]


def published_dn_star(params, image):
    """The network in float64, [h, w] to [h - 16, w - 16], and its penalty."""
    x, penalty = image[..., None], 0.0
    for k in range(3):
        layer = params[f"Conv_{k}"]
        x = correlate(x, layer["kernel"], layer["bias"])
        if k < 2:
            v, x = published_dn(x, 5, 7)
            penalty += 0.1 * np.abs(v).mean()
            x = np.maximum(x, 0)
    return x[..., 0], penalty


def configured(row, **options):
    options = superres.Options(**options)
    return superres.configure(row, options, superres.source(options))


@pytest.mark.slow
def test_step_of_dn_star_is_the_published_network_and_loss():
    config = configured("dn*", patches=2, penalty="paper")
    task = superres.build(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0)).params
    params = jax.tree.map(lambda s: rng.normal(scale=0.3 if len(s.shape) > 1 else 0.1, size=s.shape), shapes)
    low = rng.uniform(size=(33, 33))
    high = low[::-1]
    y, penalty = published_dn_star(params, low)
    expected = np.mean((y - high[8:-8, 8:-8]) ** 2) / 2

    state = task.init(jax.random.key(0))._replace(params=jax.tree.map(np.float32, params))
    batch = {"low": np.float32(low[None]), "high": np.float32(high[None]), "size": np.array([[33, 33]], np.int32)}
    after, metrics = jax.jit(task.step)(state, batch, jax.random.key(0))  # there is but one place for both patches
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["penalty"]) == pytest.approx(penalty, rel=1e-4)
    assert int(after.step) == 1
    enlarged = jax.jit(task.enlarge)(state, batch["low"][0, :12, :14])
    y, _ = published_dn_star(params, np.pad(low[:12, :14], 8, mode="edge"))
    np.testing.assert_allclose(enlarged, y, atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize("features", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_all_forms_of_the_convolution_have_the_same_output_and_gradient(features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(11, 9, 8, 16)).astype(np.float32)
    variables = {"params": {"kernel": rng.normal(size=(5, 5, 16, features)), "bias": rng.normal(size=features)}}
    z = correlate(x[0].astype(np.float64), variables["params"]["kernel"], variables["params"]["bias"])
    variables = jax.tree.map(np.float32, variables)

    def run(form):
        layer = Conv(features, (5, 5), padding="VALID", form=form)

        def loss(variables, x):
            y: Any = layer.apply(variables, x)
            return jnp.sum(jnp.sin(y / 8)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

    (_, expected), expected_gradients = run("xla")
    np.testing.assert_allclose(expected[0], z, atol=1e-4)
    for form in ("images", "strips"):
        (_, y), gradients = run(form)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-7, atol=1e-3)


def test_first_weights_are_truncated_normal_of_a_thousandth():
    first = jax.jit(superres.build(superres.ROWS["srcnn"]).init)(jax.random.key(0))
    kernel = np.asarray(first.params["Conv_1"]["kernel"])
    assert np.abs(kernel).max() <= 2e-3
    assert kernel.std() == pytest.approx(0.8796e-3, rel=0.02)  # of a normal that is cut at 2 standard deviations


# --- the command ------------------------------------------------------------------------------------


def test_options_change_the_configuration_as_they_say():
    of = partial(configured, "dn*")
    assert (of().normalizer.border, of().normalizer.gain, of().l1) == ("zero", 49 / 25, 0.0)
    assert (of(border="truncate").normalizer.border, of(border="truncate").normalizer.gain) == ("truncate", 1.0)
    assert of(penalty="paper").l1 == 0.1
    assert of(scale=0.01).steps == superres.Config.steps / 100
    assert of(scale=0.01).evaluate_every == superres.Config.steps / 2000
    assert of(data_dir="d").test == "Set5 Set14 BSD200"
    assert (of().lr, of().patches, of().images, of(images=3).images) == (0.1, 1, 6, 3)  # six bundled photographs
    assert [configured("bn", lr=lr).lr for lr in (None, 1e-4)] == [0.01, 1e-4]


def test_list_shows_the_published_numbers(capsys):
    superres.main(["--list"])
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "28.44 / 0.8110 |         26.96 / 0.7428 |" in lines["dn*"]
    assert "21.89 / 0.7553" in lines["bn"]
    assert list(lines)[2:] == ["bicubic", *superres.ROWS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "dn-star", "srcn"], "no row is called 'srcn'; did you mean 'srcnn'?"),
        (["--scale", "0"], "--scale is a positive number; found 0"),
        (["--images", "0"], "--images is a positive number; found 0"),
        (["--images", "7"], "--images 7: a batch of more images than the 6 to train on"),
        (["--resume", "--overwrite"], "choose one"),
        (["--data-dir", "nowhere"], "there is no folder nowhere/superres/T91"),
        (["--test-dir", "{tmp}/bad"], "cannot read the image {tmp}/bad/a.png"),
        (["--train-dir", "{tmp}/bad"], "cannot read the image {tmp}/bad/a.png"),
        (["--test-dir", "{tmp}/empty"], "{tmp}/empty holds no images"),
        (["--train-dir", "a/x", "b/x"], "two folders of --train-dir have one name"),
    ],
)
def test_wrong_command_is_refused_and_writes_nothing(capsys, tmp_path, picture, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    broken(tmp_path / "bad" / "a.png", "truncated", picture)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert message.format(tmp=tmp_path) in refused(capsys, superres.main, "--out", str(tmp_path / "runs"), *arguments)
    assert not (tmp_path / "runs").exists()


def test_folder_of_ones_own_is_scored_without_training(capsys, tmp_path, picture):
    (tmp_path / "mine").mkdir()
    Image.fromarray(picture).save(tmp_path / "mine" / "a.png")
    superres.main(
        ["--bicubic", "--zoom", "2", "--train-dir", str(tmp_path / "mine"), "--test-dir", str(tmp_path / "mine")]
    )
    pair = images.degrade(images.luminance(picture), 2)
    found = images.score(pair.low, pair.high, 2)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "bicubic" in line)
    assert [cell.strip() for cell in line.split("|")][2:4] == [f"{found['psnr']:.2f}", f"{found['ssim']:.4f}"]


SMOKE = ["--smoke", "--rows", "bn"]


def own_images(folder):
    """Two images: the options that take them to train on and to be scored on."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    (folder / "mine").mkdir()
    for k in range(2):
        Image.fromarray(pixels[:, : 50 - 10 * k]).save(folder / "mine" / f"{k}.png")
    return ["--train-dir", str(folder / "mine"), "--test-dir", str(folder / "mine"), "--out", str(folder)]


def left(folder):
    """All that must not change: metrics without the seconds, and the scores."""
    found = {}
    for path in sorted((folder / "superres-smoke").glob("*/seed-*")):
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in files.read(path / "metrics.jsonl")]
        found[str(path.relative_to(folder))] = lines, json.loads((path / "scores.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a row, tried out undisturbed on two images."""
    folder = tmp_path_factory.mktemp("whole")
    superres.main([*SMOKE, *own_images(folder)])
    return folder


@pytest.mark.slow
def test_table_holds_the_means_of_the_scores(whole):
    seeds = left(whole).values()
    assert [len(lines) for lines, _ in seeds] == [7, 7]
    means = [float(np.mean([image["psnr"] for image in scores["mine"].values()])) for _, scores in seeds]
    text = (whole / "superres-smoke" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `bn` "))
    assert row.split("|")[2].strip() == f"{np.mean(means):.2f} +- {np.std(means, ddof=1):.2f}"
    html = (whole / "superres-smoke" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2


@pytest.mark.slow
def test_overwriting_with_other_test_images_scores_bicubic_on_them(tmp_path):
    scores.write(tmp_path / "superres" / "bicubic", {"other": {}})
    superres.main([*own_images(tmp_path), "--rows", "srcnn", "--seeds", "1", "--scale", "1e-5", "--overwrite"])
    bicubic = json.loads((tmp_path / "superres" / "bicubic" / "scores.json").read_text())
    assert list(bicubic) == ["mine"]


@pytest.mark.slow
def test_run_killed_between_the_scores_of_two_seeds_resumes_to_the_same_numbers(whole, tmp_path, monkeypatch):
    arguments = [*SMOKE, *own_images(tmp_path)]
    kill_here(monkeypatch, scores, "write", 2, superres.main, arguments)
    assert len(list(tmp_path.rglob("scores.json"))) == 1
    superres.main([*arguments, "--resume"])
    assert left(tmp_path) == left(whole)
