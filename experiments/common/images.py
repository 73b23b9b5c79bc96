"""Images for super-resolution: folders of files, luminance, MATLAB's bicubic resize, PSNR and SSIM, patches.

The literature's numbers were made with MATLAB, so its conventions count by tenths of a decibel: luminance in 16..235,
rounded to integers; an antialiased cubic whose border is mirrored; metrics of the luminance, a border left out.
`jax.image.resize` and Pillow have the same cubic and another border.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from skimage import metrics

from experiments.common.data import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SMALLEST = 11  # pixels along a side: the window of SSIM


class Pair(NamedTuple):
    """An image and what is known of it at low resolution, luminance in 0..1, float64 [h, w] each.

    Attributes:
      high: the image, cropped to a multiple of the zoom.
      low: the same, resized by 1 / zoom and back.
    """

    high: np.ndarray
    low: np.ndarray


def read(path: Path) -> np.ndarray:
    """Reads one image file: uint8, [h, w] where it is grey, else [h, w, 3].

    Palettes and other colour spaces become RGB, transparency is dropped, 16 bits become 8. Of a file with several
    pictures it takes the first.

    Raises:
      DataError: no image, a truncated one, or pixels that are no numbers of 8 or 16 bits; it names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):
                return _eight_bits(np.asarray(image), path)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of no known range")
            grey = image.mode in ("1", "L", "LA")
            return np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
        raise DataError(f"cannot read the image {path}{size}: {error}") from error


def _eight_bits(image: np.ndarray, path: Path) -> np.ndarray:
    """Grey pixels of 16 bits, of which Pillow may make 32, as 8 bits."""
    image = image.astype(np.int64)
    if image.min() < 0 or image.max() > 65535:
        raise DataError(f"{path} has pixels in {image.min()}..{image.max()}, expected 16 bits: 0..65535")
    return np.round(image / 257).astype(np.uint8)


def files(folder: Path) -> list[Path]:
    """The image files of a folder, by name.

    Raises:
      DataError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return found


def luminance(image: np.ndarray) -> np.ndarray:
    """Y of YCbCr in MATLAB's convention, from uint8 [h, w, 3] to float64 [h, w] in 16/255..235/255.

    It is rounded to 1/255, as MATLAB's `rgb2ycbcr` of an integer image is. A grey image [h, w] is taken as it is.

    Source: ITU-R BT.601.

    >>> luminance(np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)) * 255
    array([[ 16., 235.,  81.]])
    """
    if image.ndim == 2:
        return image / 255
    y = 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255
    return np.round(y) / 255


def degrade(image: np.ndarray, zoom: int) -> Pair:
    """Crops an image [h, w] to a multiple of `zoom`, and resizes it by 1 / zoom and back."""
    h, w = (n - n % zoom for n in image.shape)
    high = image[:h, :w]
    return Pair(high, resize(resize(high, 1 / zoom), zoom))


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's `imresize(image, scale)` of a floating-point image [h, w]: bicubic, antialiased, float64.

    Where it shrinks, the cubic is as much wider. The border is mirrored, its last pixel twice. Rows and columns are
    two matrix products: their order, of which MATLAB takes a particular one, shows in the last bits alone.

    Source: Keys 1981, a = -1/2.

    >>> resize(np.array([[0.0, 1.0], [0.0, 1.0]]), 2)[0]
    array([-0.09375 ,  0.203125,  0.796875,  1.09375 ])
    """
    rows, columns = (resizing(n, scale) for n in image.shape)
    return rows @ image.astype(np.float64) @ columns.T


def resizing(length: int, scale: float) -> np.ndarray:
    """The matrix that resizes one axis, [ceil(scale * length), length]."""
    new = math.ceil(scale * length - 1e-9)
    shrink = min(scale, 1.0)  # a wider cubic is what keeps a smaller image from aliasing
    centre = (np.arange(new) + 0.5) / scale - 0.5
    taps = math.ceil(4 / shrink) + 2
    index = np.floor(centre - 2 / shrink).astype(int)[:, None] + np.arange(taps)
    weight = cubic(shrink * (centre[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    mirrored = index % (2 * length)
    mirrored = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    matrix = np.zeros((new, length))
    np.add.at(matrix, (np.arange(new)[:, None], mirrored), weight)
    return matrix


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2.

    >>> cubic(np.array([0.0, 0.5, 1.0, 1.5, 2.0]))
    array([ 1.    ,  0.5625,  0.    , -0.0625,  0.    ])
    """
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def score(image: np.ndarray, truth: np.ndarray, crop: int) -> dict[str, float]:
    """PSNR in decibels and SSIM of luminances [h, w] in 0..1, without a border of `crop` pixels.

    The image is clipped and rounded to 8 bits, as the literature's was. PSNR's peak is 255 although luminance ends at 235.

    Source: Wang et al. 2004, SSIM: a Gaussian window of 11 x 11, sigma 1.5, K = 0.01 and 0.03.

    >>> half = np.full((16, 16), 0.5)
    >>> {name: round(value, 4) for name, value in score(half + 0.1, half, 2).items()}
    {'psnr': 20.0, 'ssim': 0.9836}
    """
    inside = (slice(crop, -crop or None),) * 2
    image = np.round(np.clip(np.asarray(image, np.float64), 0, 1) * 255)[inside] / 255
    truth = np.asarray(truth, np.float64)[inside]
    square = np.mean((image - truth) ** 2)
    ssim: Any = metrics.structural_similarity(
        truth, image, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return {"psnr": float(-10 * np.log10(square)) if square else math.inf, "ssim": float(ssim)}


def worst(error: np.ndarray, width: int) -> tuple[int, int]:
    """Corner of the square of this width with the largest sum.

    >>> worst(np.diag([1.0, 0.0, 2.0, 3.0, 0.0]), 2)
    (2, 2)
    """
    sums = np.pad(error, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    h, w = (min(width, n) for n in error.shape)
    square = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    row, column = np.unravel_index(np.argmax(square), square.shape)
    return int(row), int(column)
