"""experiments.common.data: exact pixels through tensorflow-datasets, and what it says when it cannot."""

import gzip
import hashlib
import http.server
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.common import data

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"

# The publishers' layouts, with a handful of records in each part.
SMALL = {
    "mnist": {"train": {"train": 6}, "test": {"t10k": 3}},
    "cifar10": {
        "train": {f"cifar-10-batches-bin/data_batch_{i}.bin": 2 for i in range(1, 6)},
        "test": {"cifar-10-batches-bin/test_batch.bin": 3},
    },
    "cifar100": {"train": {"cifar-100-binary/train.bin": 7}, "test": {"cifar-100-binary/test.bin": 3}},
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(url, **kwargs):
        raise OSError(f"no network in tests: {url}")

    monkeypatch.setattr("requests.head", refuse)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data, "PARTS", SMALL)


def fabricate(name, seed=0):
    """Returns {"train" | "test": {"image", "label"[, "coarse_label"]}}, random, of SMALL's sizes."""
    rng = np.random.default_rng(seed)
    splits = {}
    for split, parts in SMALL[name].items():
        n = sum(parts.values())
        image = rng.integers(0, 256, (n, *data.SHAPES[name]), np.uint8)
        labels = {k: rng.integers(0, c, n, np.uint8) for k, c in data.LABELS[name].items()}
        splits[split] = {"image": image, **labels}
    return splits


def members(name, splits):
    """Returns {part: bytes} of a CIFAR archive, written record by record as the publisher says."""
    out = {}
    for split, parts in SMALL[name].items():
        rows = iter(zip(*(splits[split][k] for k in (*data.LABELS[name], "image")), strict=True))
        for part, n in parts.items():
            records = [next(rows) for _ in range(n)]
            out[part] = b"".join(
                bytes(int(label) for label in labels) + b"".join(image[:, :, c].tobytes() for c in range(3))
                for *labels, image in records
            )
    return out


def write_tar(path, contents):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_archive(name, splits, folder):
    if name != "mnist":
        file = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}[name]
        write_tar(folder / file, members(name, splits))
        return
    (folder / "mnist").mkdir()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image, label = splits[split]["image"], splits[split]["label"]
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (len(image), 28, 28))
        with gzip.open(folder / "mnist" / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(head + image.tobytes())
        head = bytes([0, 0, 8, 1]) + len(label).to_bytes(4, "big")
        with gzip.open(folder / "mnist" / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(head + label.tobytes())


def assert_holds(loaded, splits):
    for split in ("train", "test"):
        got = getattr(loaded, split)
        assert got.keys() == {"image", "label"}
        assert got["image"].dtype == np.uint8
        assert got["label"].dtype == np.int32
        np.testing.assert_array_equal(got["image"], splits[split]["image"])
        np.testing.assert_array_equal(got["label"], splits[split]["label"])


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refusal(name, folder):
    """Returns the message of load, which must refuse and leave `folder` as it was."""
    before = tree(folder)
    with pytest.raises(data.DataError) as caught:
        data.load(name, folder)
    assert tree(folder) == before
    return str(caught.value)


# --- digits


def test_digits_are_split_by_class_into_fixed_disjoint_parts():
    digits = data.load("digits")
    assert digits.train["image"].shape == (1352, 8, 8, 1)
    assert digits.test["image"].shape == (445, 8, 8, 1)
    assert (digits.classes, digits.high) == (10, 16)
    assert digits.train["image"].max() == digits.test["image"].max() == 16
    assert np.bincount(digits.train["label"]).tolist() == [134, 137, 133, 138, 136, 137, 136, 135, 131, 135]
    assert np.bincount(digits.test["label"]).tolist() == [44, 45, 44, 45, 45, 45, 45, 44, 43, 45]
    train, test = ({i.tobytes() for i in s["image"]} for s in (digits.train, digits.test))
    assert len(train) + len(test) == 1797
    assert not train & test
    digest = hashlib.sha256(digits.test["image"].tobytes() + digits.test["label"].tobytes())
    assert digest.hexdigest()[:16] == "dd2e50238603c72d"


def test_parts_of_the_processes_are_every_pth_example_and_all_of_the_held_out_split():
    whole, parts = data.load("digits"), [data.load("digits", part=(k, 3)) for k in range(3)]
    for k, part in enumerate(parts):
        assert_holds(part, {"train": {n: a[k::3] for n, a in whole.train.items()}, "test": whole.test})
        assert part.examples == whole.examples == 1352


# --- archives


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_pixels_and_labels_survive_exactly_and_in_order(name, tmp_path, capfd):
    splits = fabricate(name)
    write_archive(name, splits, tmp_path)
    loaded = data.load(name, tmp_path)
    assert_holds(loaded, splits)
    assert (loaded.name, loaded.high) == (name, 255)
    assert loaded.classes == {"mnist": 10, "cifar10": 10, "cifar100": 100}[name]
    assert loaded.examples == len(splits["train"]["label"])
    part = {"train": {key: column[1::2] for key, column in splits["train"].items()}, "test": splits["test"]}
    assert_holds(data.load(name, tmp_path, part=(1, 2)), part)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("small")
def test_second_load_reads_the_prepared_files_only(tmp_path):
    splits = fabricate("cifar10")
    write_archive("cifar10", splits, tmp_path)
    data.load("cifar10", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    assert_holds(data.load("cifar10", str(tmp_path)), splits)


@pytest.mark.usefixtures("small")
def test_prepared_files_are_what_stock_tfds_reads(tmp_path):
    import tensorflow_datasets as tfds

    splits = fabricate("cifar100")
    write_archive("cifar100", splits, tmp_path)
    data.load("cifar100", tmp_path)
    source: Any = tfds.data_source(
        "cifar100", split="train", data_dir=tmp_path / "tfds", download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )  # fmt: skip
    assert [e["id"] for e in source] == [f"train_{i:05d}".encode() for i in range(7)]
    assert [e["coarse_label"] for e in source] == splits["train"]["coarse_label"].tolist()


@pytest.mark.usefixtures("small")
def test_archive_may_lie_in_a_subfolder_with_dotted_member_names(tmp_path):
    splits = fabricate("cifar10")
    (tmp_path / "cifar10").mkdir()
    dotted = {f"./{k}": v for k, v in members("cifar10", splits).items()}
    write_tar(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", {"../../evil": b"x"} | dotted)
    assert_holds(data.load("cifar10", tmp_path), splits)
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.usefixtures("small")
def test_process_killed_while_preparing_leaves_nothing_that_reads_as_complete(tmp_path):
    splits = fabricate("cifar10")
    write_archive("cifar10", splits, tmp_path)
    script = """
import os, signal, sys
import PIL.Image
from experiments.common import data
from tests.test_data import SMALL
calls, encode = [], PIL.Image.fromarray
def fromarray(array):
    calls.append(1)
    if len(calls) == 12:  # the test split: train is already written
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(array)
PIL.Image.fromarray = fromarray
data.PARTS = SMALL
data.load("cifar10", sys.argv[1])
"""
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (left,) = (tmp_path / "tfds" / "cifar10").iterdir()
    assert re.fullmatch(r"incomplete\.\w+_3\.0\.2", left.name)
    assert_holds(data.load("cifar10", tmp_path), splits)


@pytest.mark.usefixtures("small")
def test_error_while_preparing_leaves_no_files(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))

    def fromarray(array):
        raise OSError(28, "No space left on device")

    write_archive("cifar10", fabricate("cifar10"), tmp_path)
    monkeypatch.setattr("PIL.Image.fromarray", fromarray)
    with pytest.raises(OSError, match="No space left on device"):
        data.load("cifar10", tmp_path)
    assert [p for p in (tmp_path / "tfds").rglob("*") if p.is_file()] == []
    assert not list((tmp_path / "tfds" / "cifar10").iterdir())
    assert not list((tmp_path / "scratch").iterdir())


def test_two_processes_may_prepare_at_once(tmp_path):
    splits = fabricate("mnist")

    def late():  # while the first process writes, a second one starts and finishes
        data.prepare("mnist", splits, tmp_path)
        yield from splits["train"]["label"]

    data.prepare("mnist", splits | {"train": splits["train"] | {"label": late()}}, tmp_path)  # type: ignore
    assert sorted(p.name for p in (tmp_path / "mnist").iterdir()) == ["3.0.1"]


# --- refusals


def test_misspelt_name_names_the_closest(tmp_path):
    assert refusal("cifar-10", tmp_path) == (
        "no data set is called 'cifar-10'; the closest is 'cifar10' of digits, mnist, cifar10, cifar100"
    )
    assert refusal("Minst", tmp_path).startswith("no data set is called 'Minst'; the closest is 'mnist'")


def test_missing_archive_without_network_says_what_to_fetch_and_where_to_put_it(tmp_path):
    assert refusal("cifar10", tmp_path) == (
        f"{tmp_path} lacks cifar-10-binary.tar.gz and the download failed; "
        f"fetch {CIFAR10_URL} and put it into {tmp_path}; the data set digits needs no files"
    )


@pytest.mark.usefixtures("small")
def test_missing_files_of_mnist_are_all_named(tmp_path):
    write_archive("mnist", fabricate("mnist"), tmp_path)
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / "mnist" / name).unlink()
    assert refusal("mnist", tmp_path) == (
        f"{tmp_path} lacks t10k-labels-idx1-ubyte.gz, train-images-idx3-ubyte.gz and the download "
        f"failed; fetch {MNIST_URL}t10k-labels-idx1-ubyte.gz and "
        f"{MNIST_URL}train-images-idx3-ubyte.gz and put it into {tmp_path}; the data set digits needs no files"
    )


def test_pickled_archive_is_refused_unopened(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"never read")
    assert refusal("cifar10", tmp_path) == (
        f"{tmp_path}/cifar-10-python.tar.gz holds pickles, which can run code when read; "
        f"fetch {CIFAR10_URL} and put it into {tmp_path}"
    )


@pytest.mark.usefixtures("small")
def test_truncated_archive_is_named_with_its_size(tmp_path):
    write_archive("cifar10", fabricate("cifar10"), tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:5000])
    assert refusal("cifar10", tmp_path) == (
        f"{path} is truncated or damaged, 5000 bytes where the publisher's has 170052171: "
        "Compressed file ended before the end-of-stream marker was reached"
    )


def test_damaged_download_under_the_name_that_tfds_gives_it_is_named(tmp_path):
    path = tmp_path / "cs.toronto.edu_kriz_cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(b"content")[:-1])
    with pytest.raises(data.DataError, match=re.escape(f"{path} is truncated or damaged, 26 bytes: ")):
        data.gunzip("cifar10", path)


@pytest.mark.usefixtures("small")
def test_changed_byte_in_a_gzip_file_is_found(tmp_path):
    write_archive("mnist", fabricate("mnist"), tmp_path)
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # in the digest at the end
    path.write_bytes(raw)
    assert refusal("mnist", tmp_path).startswith(
        f"{path} is truncated or damaged, {len(raw)} bytes where the publisher's has 28881: CRC check"
    )


@pytest.mark.usefixtures("small")
def test_file_that_is_no_tar_is_named(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(b"no tar" * 1000))
    assert refusal("cifar10", tmp_path).startswith(f"{path} is not a whole tar archive: ")


@pytest.mark.usefixtures("small")
def test_short_and_missing_members_are_named_with_the_expected_size(tmp_path):
    contents = members("cifar10", fabricate("cifar10"))
    path, member = tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin/data_batch_4.bin"
    write_tar(path, contents | {member: contents[member][:-1]})
    assert refusal("cifar10", tmp_path) == (f"{path}: {member} holds 6145 bytes, expected 2 records of 3073 bytes")
    del contents[member]
    write_tar(path, contents)
    assert refusal("cifar10", tmp_path) == (f"{path}: {member} is missing, expected 2 records of 3073 bytes")


@pytest.mark.usefixtures("small")
def test_short_idx_file_and_other_idx_file_are_told_apart(tmp_path):
    write_archive("mnist", fabricate("mnist"), tmp_path)
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    assert refusal("mnist", tmp_path) == (
        f"{path} unpacks to 10 bytes that start with 0000080100000003, expected 11 that start with 0000080100000003"
    )
    shutil.copy(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz", path)
    assert refusal("mnist", tmp_path) == (
        f"{path} unpacks to 14 bytes that start with 0000080100000006, expected 11 that start with 0000080100000003"
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "label", "top"), [("mnist", "label", 9), ("cifar100", "coarse_label", 19)])
def test_label_out_of_range_is_named_with_its_record(name, label, top, tmp_path):
    splits = fabricate(name)
    splits["train"][label][4] = 77
    write_archive(name, splits, tmp_path)
    where = tmp_path / "mnist" if name == "mnist" else tmp_path
    assert refusal(name, tmp_path) == (f"{name} in {where}: train record 4 has {label} 77, expected 0..{top}")


@pytest.mark.usefixtures("small")
def test_damaged_prepared_files_are_named(tmp_path):
    write_archive("cifar10", fabricate("cifar10"), tmp_path)
    data.load("cifar10", tmp_path)
    folder = tmp_path / "tfds" / "cifar10" / "3.0.2"
    (records,) = folder.glob("*train*")
    records.write_bytes(records.read_bytes()[:1000])
    message = refusal("cifar10", tmp_path)
    assert message.startswith(f"cannot read {folder}: ")
    assert message.endswith("; delete it to prepare it again")


# --- downloads, from a server on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/served; returns its address, with tfds' table of digests pointed at it."""
    import requests
    from tensorflow_datasets.core.download.checksums import UrlInfo

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, format, *args):
            pass

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.gz").write_bytes(b"content")
    monkeypatch.setattr("requests.head", lambda url, **kw: requests.request("HEAD", url, **kw))
    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as httpd:
        url = f"http://localhost:{httpd.server_port}/a.gz"
        info = UrlInfo(size=7, checksum=hashlib.sha256(b"content").hexdigest(), filename="a.gz")  # type: ignore
        monkeypatch.setattr(data, "stock", lambda name: SimpleNamespace(url_infos={url: info}))
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield url
        httpd.shutdown()
        thread.join()


@pytest.mark.usefixtures("server")
def test_missing_archive_is_downloaded_once(tmp_path):
    paths = data.find_archives("cifar10", tmp_path / "root")
    assert paths["a.gz"].read_bytes() == b"content"
    (tmp_path / "served" / "a.gz").write_bytes(b"changed")
    assert data.find_archives("cifar10", tmp_path / "root") == paths


def test_download_with_a_wrong_digest_is_refused(tmp_path, server):
    (tmp_path / "served" / "a.gz").write_bytes(b"another")
    with pytest.raises(data.DataError) as caught:
        data.find_archives("cifar10", tmp_path / "root")
    assert str(caught.value) == (
        f"{tmp_path}/root lacks a.gz and the download failed; fetch {server} and put it into {tmp_path}/root; "
        "the data set digits needs no files"
    )
    assert "has wrong checksum" in str(caught.value.__cause__)
    (tmp_path / "served" / "a.gz").write_bytes(b"content")
    assert data.find_archives("cifar10", tmp_path / "root")["a.gz"].read_bytes() == b"content"


# --- cost, and the real sets


def test_import_loads_no_heavy_package():
    script = """
import sys
import experiments.common.data
print(*sys.modules.keys() & {"tensorflow", "tensorflow_datasets", "sklearn", "PIL", "requests", "jax"})
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert run.stdout.decode().strip() == ""


def unpack(name, folder):
    if not SHARED.is_dir():
        pytest.skip("no folder shared/data beside the checkout")
    command = [sys.executable, SHARED / "prepare.py", "--out", folder, "--only", name]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


@pytest.mark.slow
@pytest.mark.shared
def test_real_mnist_is_exact(tmp_path):
    unpack("mnist", tmp_path)
    loaded = data.load("mnist", tmp_path)
    with np.load(SHARED / "mnist" / "mnist.npz") as real:
        splits = {
            split: {"image": real[f"{split}_images"][..., None], "label": real[f"{split}_labels"]}
            for split in ("train", "test")
        }
    assert_holds(loaded, splits)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_cifar_is_exact(name, tmp_path):
    unpack(name, tmp_path)
    spec = importlib.util.spec_from_file_location("load_data", SHARED / "load_data.py")
    assert spec
    assert spec.loader
    repacked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(repacked)
    splits = {}
    for split in ("train", "test"):
        image, label = repacked.cifar(name, split)
        splits[split] = {"image": image, "label": label}
    assert_holds(data.load(name, tmp_path), splits)
