"""Data sets as arrays: load("digits"), load("cifar10", "~/normjax-data").

    name       images                classes   train / test      source
    digits     8 x 8 x 1, 0..16      10        1,352 / 445       Alpaydin & Kaynak 1998
    mnist      28 x 28 x 1, 0..255   10        60,000 / 10,000   LeCun et al. 1998
    cifar10    32 x 32 x 3, 0..255   10        50,000 / 10,000   Krizhevsky 2009
    cifar100   32 x 32 x 3, 0..255   100       50,000 / 10,000   Krizhevsky 2009

digits comes with scikit-learn. The others are read from their publishers' own archives (downloaded where there are none)
by tensorflow-datasets, without TensorFlow: an archive is prepared once, as array_record files under DATA_DIR/tfds, and
from then on only those files are read.
"""

import contextlib
import difflib
import gzip
import io
import math
import posixpath
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATASETS = ("digits", "mnist", "cifar10", "cifar100")
DEFAULT_DATA_DIR = "~/.cache/normjax/data"

# What the archives hold: the shape of an image, the labels with how many values each may take, and the records in each
# part of a split. A record of CIFAR is its labels, then the planes r, g, b.
SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
LABELS = {"mnist": {"label": 10}, "cifar10": {"label": 10}, "cifar100": {"coarse_label": 20, "label": 100}}
PARTS = {
    "mnist": {"train": {"train": 60_000}, "test": {"t10k": 10_000}},
    "cifar10": {
        "train": {f"cifar-10-batches-bin/data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        "test": {"cifar-10-batches-bin/test_batch.bin": 10_000},
    },
    "cifar100": {"train": {"cifar-100-binary/train.bin": 50_000}, "test": {"cifar-100-binary/test.bin": 10_000}},
}

Split = dict[str, np.ndarray]


class DataError(ValueError):
    """A data set is not there, or a file is not what its publisher describes."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images with their fixed held-out split."""

    name: str  # one of DATASETS
    train: Split  # {"image": uint8 [n, h, w, c], "label": int32 [n]}, in the publisher's order
    test: Split  # the held-out split, as the one above
    classes: int  # labels are 0..classes-1
    high: int  # pixels are 0..high, so `image / high` is 0..1
    examples: int  # how many the training split has, of which `train` may be a part


def load(name: str, data_dir: str | Path | None = None, part: tuple[int, int] = (0, 1)) -> Dataset:
    """Loads a data set; the first time also prepares it, and downloads it if need be.

    Prepared files win over an archive: delete DATA_DIR/tfds/NAME to have another archive read.

    Args:
      name: one of the table above.
      data_dir: the folder with the publisher's archives (in it, or in a subfolder called `name`), which takes the
        prepared files too; DEFAULT_DATA_DIR if None. digits does not use it.
      part: (k, p) reads the training examples k, k + p, k + 2 p, ... only, and the whole held-out split: the part of
        process k of p.

    Raises:
      DataError: no such data set; no archive and no network; or an archive that is damaged.
    """
    if name == "digits":
        return digits(part)
    if name not in DATASETS:
        (close,) = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.0)
        raise DataError(f"no data set is called {name!r}; the closest is {close!r} of {', '.join(DATASETS)}")
    root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    # tfds prepares under another name and renames at the end, so this folder is whole or absent.
    folder = root / "tfds" / name / str(stock(name).VERSION)
    if not folder.exists():
        paths = find_archives(name, root)
        splits = read_mnist(paths) if name == "mnist" else read_cifar(name, *paths.values())
        check_labels(name, splits, next(iter(paths.values())).parent)
        prepare(name, splits, root / "tfds")
    train, test = read_prepared(name, "train", folder, part), read_prepared(name, "test", folder)
    return Dataset(name, train, test, LABELS[name]["label"], 255, sum(PARTS[name]["train"].values()))


def digits(part: tuple[int, int] = (0, 1)) -> Dataset:
    """Scikit-learn's digits, every fourth image of each class held out; (k, p) as `part` leaves every p-th for training.

    The split depends on nothing: no seed, no generator, no version of a library.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (its test part).

    >>> digits().train["image"].shape, digits().test["image"].shape
    ((1352, 8, 8, 1), (445, 8, 8, 1))
    """
    from sklearn.datasets import load_digits

    pixels, label = load_digits(return_X_y=True)
    image, label = pixels.reshape(-1, 8, 8, 1).astype(np.uint8), label.astype(np.int32)
    held_out = np.zeros(len(label), bool)
    for digit in range(10):
        held_out[np.flatnonzero(label == digit)[3::4]] = True
    mine = np.flatnonzero(~held_out)[part[0] :: part[1]]
    train, test = ({"image": image[rows], "label": label[rows]} for rows in (mine, held_out))
    return Dataset("digits", train, test, classes=10, high=16, examples=int(np.sum(~held_out)))


def stock(name: str) -> Any:
    """Returns the builder class that ships with tfds: addresses, digests, features, version."""
    import tensorflow_datasets as tfds

    return tfds.builder_cls(name)


def find_archives(name: str, root: Path) -> dict[str, Path]:
    """Returns {file name: path} of a publisher's files, downloading those that `root` lacks."""
    urls = {posixpath.basename(url): url for url in stock(name).url_infos}
    paths = {f: p for f in urls for p in (root / f, root / name / f) if p.is_file()}
    missing = {f: url for f, url in urls.items() if f not in paths}
    if not missing:
        return paths
    fetch = f"fetch {' and '.join(missing.values())} and put it into {root}"
    for file in [f.replace("-binary", "-python") for f in missing]:
        for path in (root / file, root / name / file):
            if path.is_file():
                raise DataError(f"{path} holds pickles, which can run code when read; {fetch}")
    try:
        return paths | download(name, missing, root / "tfds" / "downloads")
    except OSError as error:
        lacks = f"{root} lacks {', '.join(missing)} and the download failed"
        raise DataError(f"{lacks}; {fetch}; the data set digits needs no files") from error


def download(name: str, urls: dict[str, str], folder: Path) -> dict[str, Path]:
    """Downloads {file name: address} with tfds, which checks digests; raises OSError."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    for url in urls.values():  # without a network, tfds would knock for over three minutes
        requests.head(url, timeout=5, allow_redirects=True).raise_for_status()
    with quiet():
        known = stock(name).url_infos
        manager: Any = tfds.download.DownloadManager(download_dir=folder, url_infos=known, dataset_name=name)
        try:
            return {file: Path(path) for file, path in manager.download(urls).items()}
        except (NonMatchingChecksumError, tfds.download.DownloadError) as error:
            raise OSError(str(error)) from error


def read_mnist(paths: dict[str, Path]) -> dict[str, Split]:
    """Reads MNIST's IDX files: a big-endian header of magic number and sizes, then the bytes."""
    splits: dict[str, Split] = {"train": {}, "test": {}}
    for split, columns in splits.items():
        ((part, n),) = PARTS["mnist"][split].items()
        for key, kind, sizes in (("image", "images-idx3", (n, 28, 28)), ("label", "labels-idx1", (n,))):
            path = paths[f"{part}-{kind}-ubyte.gz"]
            header = np.array([0x800 + len(sizes), *sizes], ">u4").tobytes()
            raw, whole = gunzip("mnist", path), len(header) + math.prod(sizes)
            if not raw.startswith(header) or len(raw) != whole:
                found = f"{len(raw)} bytes that start with {raw[: len(header)].hex()}"
                raise DataError(f"{path} unpacks to {found}, expected {whole} that start with {header.hex()}")
            columns[key] = np.frombuffer(raw, np.uint8, offset=len(header)).reshape(sizes)
    return splits


def read_cifar(name: str, path: Path) -> dict[str, Split]:
    """Reads a CIFAR archive, in memory: nothing of it is unpacked to a disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzip(name, path)), mode="r:") as tar:
            for member in tar:
                if file := member.isreg() and tar.extractfile(member):
                    found[posixpath.normpath(member.name)] = file.read()
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole tar archive: {error}") from error
    (h, w, c), labels, splits = SHAPES[name], list(LABELS[name]), {}
    size = len(labels) + h * w * c
    for split, parts in PARTS[name].items():
        for part, n in parts.items():
            if len(found.get(part, b"")) != n * size:
                holds = f"holds {len(found[part])} bytes" if part in found else "is missing"
                raise DataError(f"{path}: {part} {holds}, expected {n} records of {size} bytes")
        records = np.frombuffer(b"".join(map(found.pop, parts)), np.uint8).reshape(-1, size)
        image = records[:, len(labels) :].reshape(-1, c, h, w).transpose(0, 2, 3, 1)
        splits[split] = {"image": image} | {label: records[:, i] for i, label in enumerate(labels)}
    return splits


def gunzip(name: str, path: Path) -> bytes:
    """Returns the content of a gzip file: all of it, as its digest stands at the end."""
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        size = f"{path.stat().st_size} bytes"
        for url, info in stock(name).url_infos.items():
            if posixpath.basename(url) == path.name:
                size += f" where the publisher's has {int(info.size)}"
        raise DataError(f"{path} is truncated or damaged, {size}: {error}") from error


def check_labels(name: str, splits: dict[str, Split], where: Path) -> None:
    """Raises DataError if a label is out of range."""
    for split, columns in splits.items():
        for label, classes in LABELS[name].items():
            for i in np.flatnonzero(columns[label] >= classes)[:1]:
                says = f"{split} record {i} has {label} {columns[label][i]}"
                raise DataError(f"{name} in {where}: {says}, expected 0..{classes - 1}")


def prepare(name: str, splits: dict[str, Split], root: Path) -> None:
    """Writes arrays as the tfds data set `name` below `root`, in their order: all or nothing.

    Name, version and features are the stock builder's, so `tfds.data_source(name, data_dir=root, download=False)` reads
    the files too. A killed process leaves a folder called incomplete.*.
    """
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import registered

    base = stock(name)
    with registered.skip_registration():  # the stock builder has the name

        class Builder(base):
            name = base.name

            def _info(self):
                features = super()._info().features
                info: Any = tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)
                info.initialize_from_bucket = lambda: None  # else an empty folder stays in /tmp
                return info

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                columns = splits[split]
                for i, row in enumerate(zip(*columns.values(), strict=True)):
                    example: dict[str, Any] = dict(zip(columns, row, strict=True))
                    # tfds encodes an array with TensorFlow, but a PIL image with PIL.
                    example["image"] = Image.fromarray(np.squeeze(example["image"]))
                    if "id" in self.info.features:
                        example["id"] = f"{split}_{i:05d}"
                    yield i, example

    builder: Any = Builder(data_dir=root, file_format="array_record")
    try:
        with quiet():
            builder.download_and_prepare()
    except OSError:
        if not builder.data_path.exists():  # else another process was first: the same files
            raise


def read_prepared(name: str, split: str, folder: Path, part: tuple[int, int] = (0, 1)) -> Split:
    """Decodes a prepared split, or a part of it, to {"image": uint8 [n, h, w, c], "label": int32 [n]}."""
    import tensorflow_datasets as tfds
    from PIL import Image

    n, shape = sum(PARTS[name][split].values()), SHAPES[name]
    mine = range(n)[part[0] :: part[1]]
    image, label = np.empty((len(mine), *shape), np.uint8), np.empty(len(mine), np.int32)
    decoders = {"image": tfds.decode.SkipDecoding()}  # tfds takes twice as long, and warns where OpenCV is missing
    try:
        builder: Any = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split, decoders=decoders)
        if len(source) != n:
            raise DataError(f"{len(source)} images in {split}, expected {n}")
        for start in range(0, len(mine), 1000):
            for i, example in enumerate(source.__getitems__(mine[start : start + 1000]), start):
                png = Image.open(io.BytesIO(example["image"]), formats=("PNG",))
                image[i], label[i] = np.asarray(png).reshape(shape), example["label"]
    except Exception as error:  # array_record raises what it likes on a damaged file
        raise DataError(f"cannot read {folder}: {error}; delete it to prepare it again") from error
    return {"image": image, "label": label}


def quiet() -> contextlib.AbstractContextManager:
    """Silences tfds' messages and progress bars where nobody watches."""
    import tensorflow_datasets as tfds

    if sys.stderr.isatty():
        return contextlib.nullcontext()
    tfds.disable_progress_bar()
    return contextlib.redirect_stdout(io.StringIO())
