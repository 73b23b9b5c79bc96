"""Other people's normalizers: stored outputs and gradients, made by tests/golden/make_golden.py, and numbers by hand."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import TABLE, Normalizer, Stats, normalize
from normjax import linen as ours
from normjax._expect.binding import axes
from tests import reference

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ("n ... c", "n c ...")


@dataclass(frozen=True)
class Case:
    """A case of the golden files: what it is here, how its arrays are laid out, and the linen layer that should equal it.

    The layer lacks only what the arrays and the layout say; those of Flax's names know channels last alone.
    """

    normalizer: Normalizer
    layout: str
    preset: functools.partial[Any] | None = None


def divisive(field: str, eps: float, gain: float = 1.0, var: str | None = None, **preset: int) -> Case:
    """The published code's convention; DivisiveNorm where both windows are one square."""
    normalizer = Normalizer(field, var or field, eps=eps, gain=gain, border="zero")
    make = functools.partial(ours.DivisiveNorm, sigma=math.sqrt(eps), border="zero", **preset) if preset else None
    return Case(normalizer, "n h w c" if "h" in field else "n ... c", make)


def square(width: int, eps: float) -> Case:
    return divisive(f"...:{width} c", eps, window=width)


def features(width: int, eps: float) -> Case:
    return divisive(f"c:{width}", eps, channels=width)


def response(size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Case:
    """PyTorch's convention: alpha over size, an even window takes its extra element before."""
    normalizer = Normalizer(None, f"c:{size}", eps=k, gain=alpha, power=beta, border="zero", lean="before")
    make = functools.partial(ours.LocalResponseNorm, size, alpha, beta, k)
    return Case(normalizer, "n c ...", make)


def same(field: str, eps: float, layout: str, make: Any, **arguments: Any) -> Case:
    """One field for centre and spread, and a class of Flax's name."""
    return Case(Normalizer(field, field, eps=eps), layout, functools.partial(make, epsilon=eps, **arguments))


def rms(field: str, eps: float, layout: str, **arguments: Any) -> Case:
    return Case(Normalizer(None, field, eps=eps), layout, functools.partial(ours.RMSNorm, epsilon=eps, **arguments))


def group(groups: int, eps: float = 1e-5) -> Case:
    return same(f"... c/{groups}", eps, "n c ...", ours.GroupNorm, num_groups=groups)


WHOLE = {"reduction_axes": (1, 2, 3), "feature_axes": (1, 2, 3)}
batch = functools.partial(same, "n ...", make=ours.BatchNorm)

CASES: dict[str, dict[str, Case]] = {
    "ren2017": {
        "div_norm_2d 5x5": square(5, 0.25),
        "div_norm_2d 3x3 affine": square(3, 1.0),
        # The suppression window is divided by the area of the summation window: 49 / 25 of an average.
        "div_norm_2d 5x5 7x7": divisive("...:5 c", 1.0, 49 / 25, "...:7 c"),
        "div_norm_2d 3x5": divisive("h:3 w:5 c", 0.25),
        "div_norm_2d 4x4 even": square(4, 0.25),
        "div_norm_2d 2x6 even": divisive("h:2 w:6 c", 0.25),
        "div_norm_2d 7x7 wider than the image": square(7, 0.25),
        "div_norm_2d 16x16 wider than the image": square(16, 0.01),
        "div_norm_2d 5x5 one channel": square(5, 0.25),
        "div_norm_2d 5x5 pixels": square(5, 0.25),
        "div_norm_1d 30": features(30, 1.0),
        "div_norm_1d 60": features(60, 1.0),
        "div_norm_1d 60 wider than the layer": features(60, 1e-4),
        "div_norm_1d 7 affine": features(7, 0.25),
        "layer_norm image affine": same("... c", 1e-4, "n ... c", ours.LayerNorm, reduction_axes=(1, 2, 3)),
        "layer_norm image smoothed": same("... c", 0.25, "n ... c", ours.LayerNorm, reduction_axes=(1, 2, 3)),
        "layer_norm features affine": same("... c", 1e-4, "n ... c", ours.LayerNorm),
        "batch_norm image affine": batch(1e-4, "n ... c"),
        "batch_norm image smoothed": batch(1.0, "n ... c"),
        "batch_norm features": batch(1e-4, "n ... c"),
        "batch_norm image inference": batch(1e-4, "n ... c"),
    },
    "torch": {
        "local_response_norm 5": response(5),
        "local_response_norm 5 alexnet": response(5, 5e-4, 0.75, 2.0),
        "local_response_norm 3 image": response(3, 1.0, 0.75, 1.0),
        "local_response_norm 4 even": response(4, 2.0, 0.5, 2.0),
        "local_response_norm 2 even": response(2, 1.0, 1.0, 0.5),
        "local_response_norm 6 even wider than the channels": response(6, 3.0, 0.75, 1.0),
        "local_response_norm 9 wider than the channels": response(9, 3.0, 0.3, 1.0),
        "local_response_norm 3 sequence": response(3, 1.0, 0.75, 1.0),
        "local_response_norm 4 even sequence": response(4, 1.0, 0.6, 1.5),
        "local_response_norm 5 volume": response(5, 1.0, 0.75, 1.0),
        "group_norm 2": group(2),
        "group_norm 3 affine": group(3),
        "group_norm 1 affine": group(1, 1e-3),
        "group_norm 4 sequence affine": group(4),
        "group_norm 3 features affine": group(3),
        "instance_norm image affine": same("...", 1e-5, "n c ...", ours.InstanceNorm),
        "instance_norm image smoothed": same("...", 0.1, "n c ...", ours.InstanceNorm),
        "instance_norm sequence affine": same("...", 1e-5, "n c ...", ours.InstanceNorm),
        "layer_norm token affine": same("c", 1e-5, "n ... c", ours.LayerNorm),
        "layer_norm token": same("c", 1e-3, "n ... c", ours.LayerNorm),
        "layer_norm whole affine": same("... c", 1e-5, "n c ...", ours.LayerNorm, **WHOLE),
        "batch_norm image affine": batch(1e-5, "n c ..."),
        "batch_norm features affine": batch(1e-3, "n c ..."),
        "batch_norm volume": batch(1e-5, "n c ..."),
        "batch_norm image inference": batch(1e-5, "n c ..."),
        "rms_norm token": rms("c", 1e-6, "n ... c"),
        "rms_norm whole": rms("... c", 1e-3, "n c ...", **WHOLE),
    },
}


@functools.cache
def stored(file: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every case of a golden file."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        for key in arrays:
            name, _, array = key.rpartition("/")
            cases.setdefault(name, {})[array] = arrays[key]
    return cases


def laid(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """An array whose axes stand in another order; a number a channel stays as it is."""
    if array.ndim == 1:
        return array
    where = axes(source, array.ndim)
    return array.transpose([axis for name in target.split() for axis in where[name]])


def layouts(case: Case) -> tuple[str, ...]:
    return ("n h w c", "n c h w") if "h" in case.layout else LAYOUTS


def relaid(file: str, name: str, layout: str) -> dict[str, np.ndarray]:
    """The arrays of a case in a layout; a scale and bias of every feature get the rank of x."""
    arrays, source = stored(file)[name], CASES[file][name].layout
    ndim = arrays["x"].ndim
    full = {key: a[None] if 1 < a.ndim < ndim else a for key, a in arrays.items()}
    return {key: laid(a, source, layout) for key, a in full.items()}


def learned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: arrays[key] for key in ("scale", "bias") if key in arrays}


def statistics(arrays: dict[str, np.ndarray], layout: str) -> Stats | None:
    """The given mean and variance of each channel, beside x."""
    if "mean" not in arrays:
        return None
    ndim = arrays["x"].ndim
    beside = [-1 if axis in axes(layout, ndim)["c"] else 1 for axis in range(ndim)]
    return Stats(arrays["mean"].reshape(beside), arrays["var"].reshape(beside))


def preset(case: Case, layout: str, arrays: dict[str, np.ndarray]) -> Any:
    """The case's linen layer for a layout, or None."""
    if case.preset is None:
        return None
    make: Any = case.preset.func
    known = {field.name for field in dataclasses.fields(make)}
    if "layout" not in known and layout != "n ... c":
        return None
    given = {"layout": layout, "use_scale": "scale" in arrays, "use_bias": "bias" in arrays}
    return case.preset(**{key: value for key, value in given.items() if key in known})


def by_normalize(case: Case, layout: str, arrays: Any) -> Callable[..., Any]:
    """The case as a function of x and its parameters."""
    stats = statistics(arrays, layout)
    return lambda x, parameters: normalize(x, case.normalizer, layout, stats=stats, **parameters).y


def by_preset(case: Case, layout: str, arrays: Any) -> Callable[..., Any]:
    """The same by the linen layer."""
    module = preset(case, layout, arrays)
    extra: dict[str, Any] = {}
    state: dict[str, Any] = {}
    if isinstance(module, ours.BatchNorm):
        given, channels = "mean" in arrays, arrays["x"].shape[-1]
        extra = {"use_running_average": given}
        state = {"batch_stats": {key: arrays[key] if given else jnp.ones(channels) for key in ("mean", "var")}}

    def f(x, parameters):
        # Flax's shapes: of the features alone.
        own = {key: a.reshape(a.shape[a.ndim == x.ndim :]) for key, a in parameters.items()}
        return module.apply({"params": own, **state}, x, mutable=["batch_stats"], **extra)[0]

    return f


def with_gradients(make: Callable[..., Any], case: Case, layout: str, arrays: Any) -> dict[str, jax.Array]:
    """The output and the gradients for the stored cotangent, under the names of the golden files."""
    y, pull = jax.vjp(make(case, layout, arrays), arrays["x"], learned(arrays))
    dx, dparameters = pull(arrays["dy"])
    return {"y": y, "dx": dx} | {"d" + key: value for key, value in dparameters.items()}


@functools.cache
def compiled(file: str, name: str) -> dict[tuple[Any, str], dict[str, jax.Array]]:
    """All that the tests ask of a case, under one jit: compiling is what takes the time."""
    case = CASES[file][name]
    arrays = {layout: relaid(file, name, layout) for layout in layouts(case)}
    wanted = [(by_normalize, layout) for layout in arrays]
    wanted += [(by_preset, layout) for layout in arrays if preset(case, layout, arrays[layout]) is not None]

    # Compiling is what takes the time here: without the optimizer's passes it takes three fifths.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(arrays):
        return [with_gradients(make, case, layout, arrays[layout]) for make, layout in wanted]

    return dict(zip(wanted, run(arrays), strict=True))


def assert_stored(got: dict[str, jax.Array], file: str, name: str, layout: str) -> None:
    """Every output and gradient is within 1e-5 of the largest stored value."""
    arrays = relaid(file, name, layout)
    assert set(got) == {"y", "dx"} | {"d" + key for key in learned(arrays)}
    for key, value in got.items():
        want = arrays[key]
        assert value.dtype == jnp.float32, key
        assert value.shape == want.shape, key
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=key)


def parametrize(arguments: str, rows: list[Any]) -> Any:
    return pytest.mark.parametrize(arguments.split(), rows, ids=[": ".join(map(str, row)) for row in rows])


NAMES = [(file, name) for file, cases in CASES.items() for name in cases]
FUNCTIONS = list({(file, name.split()[0]): (file, name) for file, name in reversed(NAMES)}.values())
ROWS = [(file, name, layout) for file, name in NAMES for layout in layouts(CASES[file][name])]
PRESETS = [(file, name, layout) for file, name, layout in ROWS if preset(CASES[file][name], layout, {}) is not None]


def test_the_table_has_every_stored_case():
    assert {file: list(cases) for file, cases in CASES.items()} == {file: list(stored(file)) for file in CASES}


@parametrize("file name layout", ROWS)
def test_normalize_equals_stored_outputs_and_gradients_under_jit(file, name, layout):
    assert_stored(compiled(file, name)[by_normalize, layout], file, name, layout)


@parametrize("file name layout", PRESETS)
def test_linen_presets_equal_stored_outputs_and_gradients(file, name, layout):
    assert_stored(compiled(file, name)[by_preset, layout], file, name, layout)


@parametrize("file name", FUNCTIONS)
def test_normalize_equals_stored_outputs_of_every_function_without_jit(file, name):
    case, arrays = CASES[file][name], relaid(file, name, CASES[file][name].layout)
    y = by_normalize(case, case.layout, arrays)(arrays["x"], learned(arrays))
    np.testing.assert_allclose(y, arrays["y"], rtol=0, atol=1e-5 * np.abs(arrays["y"]).max())


def conventions() -> list[Any]:
    """Each case with a window, under every other convention that a port could slip into."""
    found = []
    for file, name in NAMES:
        normalizer, longest = CASES[file][name].normalizer, max(stored(file)[name]["x"].shape)
        widths = [span.window for field in normalizer.fields for span in field.spans if span.window]
        if widths:
            found.append((file, name, {"border": "truncate"}))
        if any(width % 2 == 0 and width < 2 * longest for width in widths):
            found.append((file, name, {"lean": "before" if normalizer.lean == "after" else "after"}))
        if normalizer.gain != 1:
            found.append((file, name, {"gain": 1.0 if file == "ren2017" else normalizer.gain * widths[0]}))
    return found


@parametrize("file name change", conventions())
def test_stored_outputs_tell_conventions_apart(file, name, change):
    case, arrays = CASES[file][name], relaid(file, name, CASES[file][name].layout)
    for normalizer, equal in ((case.normalizer, True), (dataclasses.replace(case.normalizer, **change), False)):
        y = reference.normalize(arrays["x"], normalizer, case.layout)[0]
        y = y * arrays.get("scale", 1) + arrays.get("bias", 0)  # channels are last in the cases that have these
        error = np.abs(y - arrays["y"]).max() / np.abs(arrays["y"]).max()
        assert error < 1e-6 if equal else error > 1e-3


# By hand.


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_response_equals_alexnet_equation(transform):
    # Krizhevsky et al. 2012, section 3.3: b_i = a_i / (k + alpha * sum of a_j ** 2 over |j - i| <= n // 2) ** beta.
    # With n = 5, k = 7, alpha = 1, beta = 3/4 every non-zero channel below sees 1 + 4 + 4 = 9 or 9 alone,
    # so that its denominator is (7 + 9) ** 0.75 = 8.
    a = jnp.array([[1.0, 2.0, 2.0, 0.0, 0.0, 3.0]])
    row = dataclasses.replace(TABLE["response"], eps=7.0, gain=5.0)  # gain: of the mean over five, so 5 * alpha
    y = transform(lambda a: normalize(a, row).y)(a)
    np.testing.assert_allclose(y, [[1 / 8, 2 / 8, 2 / 8, 0, 0, 3 / 8]], rtol=1e-6)

    # The paper's own k = 2, n = 5, alpha = 1e-4, beta = 3/4: 2 + 1e-4 * (100**2 + 200**2 + 300**2) = 16.
    a = jnp.array([[100.0, 200.0, 300.0]])
    y = transform(lambda a: normalize(a, TABLE["response"]).y)(a)
    np.testing.assert_allclose(y, [[12.5, 25.0, 37.5]], rtol=1e-6)
    module = ours.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
    np.testing.assert_allclose(transform(lambda a: module.apply({}, a))(a), [[12.5, 25.0, 37.5]], rtol=1e-6)


def test_slope_of_response_equals_the_derivative_of_alexnet_equation():
    # Where all see 2 + 1e-4 * (100**2 + 200**2 + 300**2) = 16, with 16 ** 1.75 = 128:
    # db_i / da_j = (i == j) / 8 - 2 beta alpha a_i a_j / 128 = (i == j) / 8 - 1.5 / 128 * (1e-4 a_i a_j)
    slope = jax.jit(jax.jacobian(lambda a: normalize(a, TABLE["response"], "c").y))(jnp.array([100.0, 200.0, 300.0]))
    products = np.array([[1, 2, 3], [2, 4, 6], [3, 6, 9]])
    np.testing.assert_allclose(slope, np.eye(3) / 8 - 1.5 / 128 * products, rtol=1e-5)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_divisive_norm_of_a_bright_pixel_with_zeros_past_the_border(transform):
    # A 3 x 3 image, 36 in the middle, windows of 3 x 3 that count nine pixels everywhere. Each holds the middle, so the
    # mean is 4 everywhere and v is 32 in the middle, -4 elsewhere: v ** 2 is 1024 and 16. The windows hold of the image
    #   a corner: 4 pixels, m = (1024 + 3 * 16) / 9 = 1072 / 9      an edge: 6 pixels, m = (1024 + 5 * 16) / 9 = 1104 / 9
    #   the middle: 9 pixels, m = (1024 + 8 * 16) / 9 = 128
    # and with eps = sigma ** 2 = 16 the denominators are sqrt(1216) / 3, sqrt(1248) / 3 and 12.
    image = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(36.0)
    corner, edge, middle = -12 / 1216**0.5, -12 / 1248**0.5, 8 / 3
    want = [[corner, edge, corner], [edge, middle, edge], [corner, edge, corner]]
    row = Normalizer("...:3 c", "...:3 c", eps=16.0, border="zero")
    np.testing.assert_allclose(transform(lambda x: normalize(x, row).y)(image)[0, :, :, 0], want, rtol=1e-6)
    module = ours.DivisiveNorm(window=3, sigma=4.0, border="zero")
    np.testing.assert_allclose(transform(lambda x: module.apply({}, x))(image)[0, :, :, 0], want, rtol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_divisive_norm_of_a_bright_pixel_with_windows_cut_at_the_border(transform):
    # The same image; windows count the pixels that exist: 4 at a corner, 6 at an edge, 9 in the middle. So the means are
    # 9, 6 and 4, v is -9, -6 and 32, v ** 2 is 81, 36 and 1024. The windows hold, and average,
    #   a corner: 1 corner, 2 edges, the middle,   m = (81 + 72 + 1024) / 4 = 1177 / 4
    #   an edge: 2 corners, 3 edges, the middle,   m = (162 + 108 + 1024) / 6 = 647 / 3
    #   the middle: 4 corners, 4 edges, itself,    m = (324 + 144 + 1024) / 9 = 1492 / 9
    # and with eps = 16: 1241 / 4, 695 / 3, 1636 / 9.
    image = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(36.0)
    corner, edge, middle = -9 / (1241 / 4) ** 0.5, -6 / (695 / 3) ** 0.5, 32 / (1636 / 9) ** 0.5
    want = [[corner, edge, corner], [edge, middle, edge], [corner, edge, corner]]
    row = dataclasses.replace(TABLE["divisive"], mean="...:3 c", var="...:3 c", eps=16.0)
    np.testing.assert_allclose(transform(lambda x: normalize(x, row).y)(image)[0, :, :, 0], want, rtol=1e-6)
    module = ours.DivisiveNorm(window=3, sigma=4.0)
    np.testing.assert_allclose(transform(lambda x: module.apply({}, x))(image)[0, :, :, 0], want, rtol=1e-6)
