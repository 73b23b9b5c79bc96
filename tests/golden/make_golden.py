"""Makes ren2017.npz and torch.npz: what other people's normalizers give, which tests/test_golden.py compares with.

    python tests/golden/make_golden.py

It needs torch (made with 2.13 on a CPU; 2.4 has all of it); the tests need only the two files. Seeds are fixed. Inputs
are rounded to float32, everything after them is computed in float64 by torch and its autograd, and the results are
rounded to float32.

A case `name` is the arrays `name/x`, `name/dy` (a random cotangent), `name/y` and `name/dx` (the input's gradient), and,
where it has them, `name/scale` and `name/bias` with their gradients `name/dscale` and `name/dbias`, and the statistics
of inference `name/mean` and `name/var`.

ren2017.npz: the four functions that Ren et al. 2017 published, written anew from what they compute; channels last.
torch.npz: functions of torch.nn.functional as they are; channels second, but last in the cases called "token".
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


# Ren et al. 2017, published code. eps is sigma squared; what lies past the border is zero, and counts.


def box(x: Any, window: tuple[int, int], area: int) -> Any:
    """Sums an array [n, h, w] over a window with zeros past the border, and divides by an area."""
    from torch.nn.functional import pad  # pyright: ignore[reportMissingImports]

    (height, width) = window
    padded = pad(x, ((width - 1) // 2, width // 2, (height - 1) // 2, height // 2))
    return padded.unfold(1, height, 1).unfold(2, width, 1).sum((-2, -1)) / area


def affine(y: Any, scale: Any, bias: Any) -> Any:
    """The factor and the addend, each one number a channel or absent."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def div_norm_2d(x, scale, bias, *, sum_window, sup_window, eps):
    """Divisive norm of [n, h, w, c]; both sums are divided by the area of the summation window."""
    area = sum_window[0] * sum_window[1]
    centered = x - box(x.mean(3), sum_window, area).unsqueeze(3)
    moment = box(centered.square().mean(3), sup_window, area).unsqueeze(3)
    return affine(centered / (moment + eps).sqrt(), scale, bias)


def div_norm_1d(x, scale, bias, *, window, eps):
    """Divisive norm of [n, c] over a window of features."""
    centered = x - box(x.unsqueeze(1), (1, window), window).squeeze(1)
    moment = box(centered.square().unsqueeze(1), (1, window), window).squeeze(1)
    return affine(centered / (moment + eps).sqrt(), scale, bias)


def layer_norm(x, scale, bias, *, eps):
    """Layer norm of one example: over h, w and c. The variance is the biased one."""
    axes = tuple(range(1, x.ndim))
    centered = x - x.mean(axes, keepdim=True)
    return affine(centered / (centered.square().mean(axes, keepdim=True) + eps).sqrt(), scale, bias)


def batch_norm(x, scale, bias, *, eps, mean=None, var=None):
    """Batch norm of each channel, with the batch's biased variance, or with given statistics."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes) if mean is None else mean
    var = (x - mean).square().mean(axes) if var is None else var
    return affine((x - mean) / (var + eps).sqrt(), scale, bias)


# Each case: name -> (function, shape of x, its arguments), with these entries of the arguments meaning something here:
# `affine` is the shape of scale and bias, `scale_only` leaves the bias out, `spread` and `offset` are those of x, and
# `statistics` asks for given ones, of this shape.
REN: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "div_norm_2d 5x5": (div_norm_2d, (2, 7, 6, 3), dict(sum_window=(5, 5), sup_window=(5, 5), eps=0.25)),
    "div_norm_2d 3x3 affine": (
        div_norm_2d, (2, 5, 8, 4), dict(sum_window=(3, 3), sup_window=(3, 3), eps=1.0, affine=(4,)),
    ),
    "div_norm_2d 5x5 7x7": (div_norm_2d, (2, 9, 8, 3), dict(sum_window=(5, 5), sup_window=(7, 7), eps=1.0)),
    "div_norm_2d 3x5": (div_norm_2d, (2, 6, 5, 3), dict(sum_window=(3, 5), sup_window=(3, 5), eps=0.25)),
    "div_norm_2d 4x4 even": (div_norm_2d, (2, 6, 5, 2), dict(sum_window=(4, 4), sup_window=(4, 4), eps=0.25)),
    "div_norm_2d 2x6 even": (div_norm_2d, (2, 5, 7, 3), dict(sum_window=(2, 6), sup_window=(2, 6), eps=0.25)),
    "div_norm_2d 7x7 wider than the image": (
        div_norm_2d, (2, 3, 4, 3), dict(sum_window=(7, 7), sup_window=(7, 7), eps=0.25),
    ),
    "div_norm_2d 16x16 wider than the image": (
        div_norm_2d, (2, 5, 3, 2), dict(sum_window=(16, 16), sup_window=(16, 16), eps=0.01),
    ),
    "div_norm_2d 5x5 one channel": (div_norm_2d, (2, 6, 8, 1), dict(sum_window=(5, 5), sup_window=(5, 5), eps=0.25)),
    "div_norm_2d 5x5 pixels": (
        div_norm_2d, (1, 8, 9, 3), dict(sum_window=(5, 5), sup_window=(5, 5), eps=0.25, spread=60.0),
    ),
    "div_norm_1d 30": (div_norm_1d, (2, 100), dict(window=30, eps=1.0)),
    "div_norm_1d 60": (div_norm_1d, (2, 100), dict(window=60, eps=1.0)),
    "div_norm_1d 60 wider than the layer": (div_norm_1d, (3, 40), dict(window=60, eps=1e-4)),
    "div_norm_1d 7 affine": (div_norm_1d, (4, 20), dict(window=7, eps=0.25, affine=(20,))),
    "layer_norm image affine": (layer_norm, (3, 5, 4, 6), dict(eps=1e-4, affine=(6,))),
    "layer_norm image smoothed": (layer_norm, (3, 4, 5, 3), dict(eps=0.25)),
    "layer_norm features affine": (layer_norm, (4, 24), dict(eps=1e-4, affine=(24,))),
    "batch_norm image affine": (batch_norm, (4, 5, 4, 3), dict(eps=1e-4, affine=(3,))),
    "batch_norm image smoothed": (batch_norm, (3, 4, 5, 3), dict(eps=1.0, affine=(3,))),
    "batch_norm features": (batch_norm, (8, 12), dict(eps=1e-4)),
    "batch_norm image inference": (batch_norm, (2, 5, 4, 3), dict(eps=1e-4, affine=(3,), statistics=(3,))),
}  # fmt: skip

# The function is named; its arguments are those of torch.nn.functional.
TORCH: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "local_response_norm 5": ("local_response_norm", (2, 9, 4, 3), dict(size=5, spread=100.0)),
    "local_response_norm 5 alexnet": (
        "local_response_norm", (2, 9, 3, 4), dict(size=5, alpha=5e-4, beta=0.75, k=2.0, spread=100.0),
    ),
    "local_response_norm 3 image": ("local_response_norm", (2, 6, 4, 5), dict(size=3, alpha=1.0, beta=0.75, k=1.0)),
    "local_response_norm 4 even": ("local_response_norm", (2, 7, 3, 5), dict(size=4, alpha=2.0, beta=0.5, k=2.0)),
    "local_response_norm 2 even": ("local_response_norm", (2, 5, 4, 3), dict(size=2, alpha=1.0, beta=1.0, k=0.5)),
    "local_response_norm 6 even wider than the channels": (
        "local_response_norm", (2, 4, 3, 5), dict(size=6, alpha=3.0, beta=0.75, k=1.0),
    ),
    "local_response_norm 9 wider than the channels": (
        "local_response_norm", (2, 4, 3, 3), dict(size=9, alpha=3.0, beta=0.3, k=1.0),
    ),
    "local_response_norm 3 sequence": ("local_response_norm", (3, 8, 6), dict(size=3, alpha=1.0, beta=0.75, k=1.0)),
    "local_response_norm 4 even sequence": (
        "local_response_norm", (3, 8, 5), dict(size=4, alpha=1.0, beta=0.6, k=1.5),
    ),
    "local_response_norm 5 volume": (
        "local_response_norm", (1, 6, 2, 3, 4), dict(size=5, alpha=1.0, beta=0.75, k=1.0),
    ),
    "group_norm 2": ("group_norm", (3, 6, 4, 5), dict(num_groups=2)),
    "group_norm 3 affine": ("group_norm", (2, 6, 5, 3), dict(num_groups=3, affine=(6,), offset=3.0)),
    "group_norm 1 affine": ("group_norm", (3, 4, 3, 4), dict(num_groups=1, affine=(4,), eps=1e-3)),
    "group_norm 4 sequence affine": ("group_norm", (3, 8, 7), dict(num_groups=4, affine=(8,))),
    "group_norm 3 features affine": ("group_norm", (5, 12), dict(num_groups=3, affine=(12,))),
    "instance_norm image affine": ("instance_norm", (3, 4, 5, 6), dict(affine=(4,))),
    "instance_norm image smoothed": ("instance_norm", (2, 3, 6, 5), dict(eps=0.1, offset=3.0)),
    "instance_norm sequence affine": ("instance_norm", (3, 5, 8), dict(affine=(5,))),
    "layer_norm token affine": ("layer_norm", (3, 5, 16), dict(normalized_shape=(16,), affine=(16,))),
    "layer_norm token": ("layer_norm", (6, 20), dict(normalized_shape=(20,), eps=1e-3, offset=3.0)),
    "layer_norm whole affine": ("layer_norm", (3, 4, 5, 3), dict(normalized_shape=(4, 5, 3), affine=(4, 5, 3))),
    "batch_norm image affine": ("batch_norm", (4, 3, 5, 4), dict(training=True, affine=(3,))),
    "batch_norm features affine": ("batch_norm", (8, 12), dict(training=True, eps=1e-3, affine=(12,), offset=3.0)),
    "batch_norm volume": ("batch_norm", (2, 3, 3, 4, 2), dict(training=True)),
    "batch_norm image inference": ("batch_norm", (2, 4, 5, 3), dict(affine=(4,), statistics=(4,))),
    "rms_norm token": ("rms_norm", (3, 5, 16), dict(normalized_shape=(16,), eps=1e-6, affine=(16,), scale_only=True)),
    "rms_norm whole": ("rms_norm", (3, 4, 5, 3), dict(normalized_shape=(4, 5, 3), eps=1e-3)),
}  # fmt: skip


def evaluate(name: str, function: Any, shape: tuple[int, ...], arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of one case; its seed is a checksum of its name, so that a new case leaves the others as they are."""
    import torch  # pyright: ignore[reportMissingImports]

    arguments = dict(arguments)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    made = {"x": rng.normal(arguments.pop("offset", 0.5), 1, shape) * arguments.pop("spread", 1.0)}
    made["dy"] = rng.normal(size=shape)
    size = arguments.pop("affine", None)
    if size:
        made["scale"] = rng.uniform(0.5, 2, size)
        if not arguments.pop("scale_only", False):
            made["bias"] = rng.normal(size=size)
    size = arguments.pop("statistics", None)
    if size:
        made |= {"mean": rng.normal(size=size), "var": rng.uniform(0.5, 2, size)}
    made = {key: value.astype(np.float32) for key, value in made.items()}

    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in made.items()}
    learned = [tensors[key].requires_grad_() for key in ("x", "scale", "bias") if key in tensors]
    scale, bias, mean, var = (tensors.get(key) for key in ("scale", "bias", "mean", "var"))
    if isinstance(function, str):
        if scale is not None:
            arguments["weight"] = scale
        if bias is not None:
            arguments["bias"] = bias
        if function == "batch_norm":
            arguments |= {"running_mean": mean, "running_var": var}
        y = getattr(torch.nn.functional, function)(tensors["x"], **arguments)
    else:
        if mean is not None:
            arguments |= {"mean": mean, "var": var}
        y = function(tensors["x"], scale, bias, **arguments)
    gradients = torch.autograd.grad(y, learned, tensors["dy"])
    made["y"] = y.detach().numpy().astype(np.float32)
    for key, gradient in zip([key for key in ("x", "scale", "bias") if key in tensors], gradients, strict=True):
        made["d" + key] = gradient.numpy().astype(np.float32)
    return made


def main() -> None:
    """Writes both files beside this one."""
    for file, cases in (("ren2017.npz", REN), ("torch.npz", TORCH)):
        arrays = {
            f"{name}/{key}": array for name, case in cases.items() for key, array in evaluate(name, *case).items()
        }
        np.savez_compressed(HERE / file, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{file}: {len(cases)} cases, {(HERE / file).stat().st_size} bytes")


if __name__ == "__main__":
    main()
