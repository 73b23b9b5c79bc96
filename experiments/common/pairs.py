"""Data of super-resolution: where images come from, pairs of low and high resolution, patches of them."""

import functools
import importlib.resources
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.common import images
from experiments.common.data import DataError
from experiments.common.images import Pair

Enlarge = Callable[[np.ndarray], np.ndarray]  # a bicubic image, [h, w], to a better one

# Photographs in the wheel of scikit-image, which needs no network for them.
BUNDLED = {
    "train": ("astronaut.png", "brick.png", "camera.png", "coffee.png", "grass.png", "motorcycle_left.png"),
    "test": ("chelsea.png", "coins.png", "moon.png", "rocket.jpg"),
}


class Source(NamedTuple):
    """Where images come from: a folder, or files in scikit-image."""

    name: str
    paths: Callable[[], list[Path]]


class Dataset(NamedTuple):
    """The images of an experiment, by file name: those to train on, and each set to be scored on."""

    zoom: int
    train: dict[str, Pair]
    tests: dict[str, dict[str, Pair]]


def sources(given: Sequence[str], root: Path | None, names: Sequence[str], bundled: str) -> list[Source]:
    """The given folders, or else those of these names in `root`, or without both photographs of scikit-image."""
    chosen = [Path(path).expanduser() for path in given] or ([root / name for name in names] if root else [])
    if not chosen:
        pictures = Path(str(importlib.resources.files("skimage.data")))
        return [Source(f"scikit-image-{bundled}", lambda: [pictures / file for file in BUNDLED[bundled]])]
    return [Source(path.resolve().name, functools.partial(images.files, path)) for path in chosen]


def count(training: Sequence[Source]) -> int:
    """How many images there are to train on, 1 or more: what is wrong with the folders, `load` says."""
    try:
        return max(1, sum(len(source.paths()) for source in training))
    except (DataError, OSError):
        return 1


def pairs(paths: Iterable[Path], zoom: int, smallest: int = images.SMALLEST) -> dict[str, Pair]:
    """Reads images, and makes what super-resolution is given of each; by file name.

    Raises:
      DataError: an image that cannot be read, or whose sides are shorter than `smallest` once cropped.
    """
    made = {}
    for path in paths:
        made[path.name] = pair = images.degrade(images.luminance(images.read(path)), zoom)
        if min(pair.high.shape) < smallest:
            h, w = pair.high.shape
            raise DataError(
                f"{path} is {h} x {w} pixels, cropped to a multiple of {zoom}; expected {smallest} at least"
            )
    return made


def load(
    training: Sequence[Source], testing: Sequence[Source], zoom: int, patch: int, wanted: int, limit: int | None
) -> Dataset:
    """Reads all images.

    Args:
      training: where those to train on come from.
      testing: where those to be scored on come from.
      zoom: how many times smaller the low resolution is.
      patch: pixels along the smaller side of an image to train on, at least.
      wanted: how many are to be trained on, at least.
      limit: use so many of each folder.

    Raises:
      DataError: an image that cannot be read or is too small, too few of them, or two folders of one name.
    """
    for option, these in (("--train-dir", training), ("--test-dir", testing)):
        if len({source.name for source in these}) < len(these):
            raise DataError(f"two folders of {option} have one name, by which their images and scores are kept")
    train: dict[str, Pair] = {}
    for source in training:
        found = pairs(source.paths()[:limit], zoom, patch)
        train |= {f"{source.name}/{name}": pair for name, pair in found.items()}
    if wanted > len(train):
        raise DataError(f"--images {wanted}: a batch of more images than the {len(train)} to train on")
    smallest = images.SMALLEST + 2 * zoom  # a score leaves a border out
    return Dataset(zoom, train, {source.name: pairs(source.paths()[:limit], zoom, smallest) for source in testing})


def stack(pairs: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    """Images as arrays of one size: {"high", "low": float32 [n, h, w], zeros after each image, "size": int32 [n, 2]}."""
    size = np.array([pair.high.shape for pair in pairs.values()], np.int32)
    h, w = size.max(axis=0)
    both = {}
    for field in Pair._fields:
        both[field] = np.zeros((len(pairs), h, w), np.float32)
        for k, pair in enumerate(pairs.values()):
            both[field][k, : size[k, 0], : size[k, 1]] = getattr(pair, field)
    return both | {"size": size}


def cut(batch: Mapping[str, jax.Array], key: jax.Array, patches: int, width: int) -> dict[str, jax.Array]:
    """Cuts patches at random places of each image, the same from both.

    Args:
      batch: images from `stack`.
      key: of the places.
      patches: how many of each image.
      width: of a patch, in pixels; no more than an image's.

    Returns:
      {"low": [images * patches, width, width], "high": the same}.
    """

    def one(low: jax.Array, high: jax.Array, size: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        corner = jax.random.randint(key, (patches, 2), 0, size[None] - (width - 1))

        def at(image: jax.Array) -> jax.Array:
            return jax.vmap(lambda c: jax.lax.dynamic_slice(image, (c[0], c[1]), (width, width)))(corner)

        return at(low), at(high)

    keys = jax.random.split(key, len(batch["size"]))
    low, high = jax.vmap(one)(batch["low"], batch["high"], batch["size"], keys)
    return {"low": low.reshape(-1, width, width), "high": high.reshape(-1, width, width)}
