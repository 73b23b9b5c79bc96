"""Texts as numbers: words or characters, a vocabulary from the training text, segments of unrolled steps.

    load(None)                  Python's own documentation, which every Python carries: 100,000 words
    load("DIR")                 Penn Treebank as Mikolov prepared it: DIR/simple-examples/data/ptb.train.txt, ...
    load("DIR")                 any text: DIR/train.txt, valid.txt and test.txt, or NAME.train.txt, ...

Words are what white space separates; each line ends with <eos>. At the level of characters the words of a line stand
one space apart. What the vocabulary lacks is <unk>.

Source: Mikolov et al. 2010 (the preparation of the Treebank); Ren et al. 2017, section 5.2.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.data import DataError

SPLITS = ("train", "valid", "test")
LEVELS = ("word", "char")
END, UNKNOWN = "<eos>", "<unk>"
WORDS = 10_000  # the most frequent ones make the vocabulary; the Treebank has as many
DOCUMENTATION_WORDS = 2_000  # of 3,000, of which a quarter occur once
PLACES = (".", "data", "simple-examples/data")
# Bytes and SHA-256 of Mikolov's files.
TREEBANK = {
    "ptb.train.txt": (5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "ptb.valid.txt": (399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "ptb.test.txt": (449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
}


class Text(NamedTuple):
    """A text in three parts.

    Attributes:
      name: where it comes from.
      train: numbers of its words or characters, int32 [tokens].
      valid: the same.
      test: the same.
      symbols: the vocabulary, the most frequent first; a number is a place in it.
      digest: of the numbers of all parts.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    symbols: tuple[str, ...]
    digest: str


def load(data_dir: str | Path | None = None, level: str = "word") -> Text:
    """Reads a text and numbers its words or characters.

    Args:
      data_dir: the folder with the files; None takes Python's documentation.
      level: "word" or "char".

    Returns:
      A Text.

    Raises:
      DataError: a file is missing, empty, not UTF-8, or not the one that its name promises.

    >>> text = load(None, "char")
    >>> len(text.symbols) < 100, " " in text.symbols, UNKNOWN in text.symbols
    (True, True, False)
    """
    if data_dir is None:
        name, limit, texts = "Python's documentation", DOCUMENTATION_WORDS, documentation()
    else:
        files = find(Path(data_dir).expanduser())
        limit, texts = WORDS, {split: read(path) for split, path in files.items()}
        name = "Penn Treebank" if set(TREEBANK) == {path.name for path in files.values()} else files["train"].name
    tokens = {split: tokenize(text, level) for split, text in texts.items()}
    symbols = vocabulary(tokens, limit)
    number = {symbol: k for k, symbol in enumerate(symbols)}
    unknown = number.get(UNKNOWN, -1)
    train, valid, test = (
        np.array([number.get(symbol, unknown) for symbol in tokens[split]], np.int32) for split in SPLITS
    )
    digest = hashlib.sha256(b"|".join(part.tobytes() for part in (train, valid, test))).hexdigest()[:16]
    return Text(name, train, valid, test, tuple(symbols), digest)


def find(folder: Path) -> dict[str, Path]:
    """The files of the three parts: in the folder itself, or where Mikolov's archive has them below it.

    Raises:
      DataError: one of them is not there, or there are several.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    for place in PLACES:
        here = folder / place if place != "." else folder
        found = {split: candidates(here, split) for split in SPLITS}
        if not any(found.values()):
            continue
        for split, paths in found.items():
            if not paths:
                raise DataError(
                    f"{here} has no {split} text: expected {split}.txt or NAME.{split}.txt beside "
                    f"{', '.join(sorted(p.name for some in found.values() for p in some))}"
                )
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                raise DataError(f"{here} has several {split} texts, {names}: keep one of them there")
        return {split: paths[0] for split, paths in found.items()}
    archive = next(iter(sorted(folder.glob("simple-examples*"))), None)
    hint = f"; unpack {archive} first" if archive is not None and archive.is_file() else ""
    raise DataError(
        f"{folder} holds no texts: expected simple-examples/data/ptb.train.txt, ptb.valid.txt and ptb.test.txt (from "
        f"Mikolov's simple-examples.tgz), or train.txt, valid.txt and test.txt{hint}"
    )


def candidates(folder: Path, split: str) -> list[Path]:
    """Files of a folder that may be this part. Mikolov's copies with a space after each character are not."""
    pattern = re.compile(rf"(?:.+[._-])?{split}\.txt")
    named = sorted(path for path in folder.glob("*.txt") if pattern.fullmatch(path.name) and path.is_file())
    paths = [path for path in named if not re.search(r"(?:^|[._-])char[._-]", path.name)]
    treebank = [path for path in paths if path.name in TREEBANK]
    return treebank or paths


def read(path: Path) -> str:
    """A file's text.

    Raises:
      DataError: it is empty, not UTF-8, or has the name of one of the Treebank's files and other content.
    """
    content = path.read_bytes()
    if path.name in TREEBANK:
        size, digest = TREEBANK[path.name]
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            differs = f"{len(content):,} bytes" if len(content) != size else f"SHA-256 {found}"
            raise DataError(
                f"{path} is truncated or not the Treebank's: found {differs}, expected {size:,} bytes with SHA-256 "
                f"{digest}; another text needs another name, such as {path.name.removeprefix('ptb.')}"
            )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start:,} of {len(content):,} is none") from error
    if "\0" in text:
        raise DataError(f"{path} is not UTF-8 text: it holds zero bytes, as UTF-16 does")
    if not text.strip():
        raise DataError(f"{path} is empty ({len(content):,} bytes), expected lines of text")
    return text


def documentation() -> dict[str, str]:
    """The topics of Python's help, in the order of their names: of ten, one is for validation and one for the test.

    Words are lower case, apart from punctuation, and a number is N. It differs between versions of Python.

    >>> {split: text.count("topic") > 0 for split, text in documentation().items()}
    {'train': True, 'valid': True, 'test': True}
    """
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for k, name in enumerate(sorted(topics)):
        words = [f"topic {name}", *topics[name].splitlines()]
        split = {0: "valid", 5: "test"}.get(k % 10, "train")
        for line in words:
            found = re.findall(r"[a-z_]+|[0-9]+|[^\w\s]", line.lower())
            if found:
                parts[split].append(" ".join("N" if word[0].isdigit() else word for word in found))
    return {split: "\n".join(lines) + "\n" for split, lines in parts.items()}


def tokenize(text: str, level: str) -> list[str]:
    r"""The words or the characters of a text, with <eos> at the end of each line.

    >>> tokenize(" a  bc\nd", "word"), tokenize(" a  bc\nd", "char")
    (['a', 'bc', '<eos>', 'd', '<eos>'], ['a', ' ', 'b', 'c', '<eos>', 'd', '<eos>'])
    """
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    out: list[str] = []
    for line in lines:
        words = line.split()
        out += words if level == "word" else " ".join(words)
        out.append(END)
    return out


def vocabulary(tokens: dict[str, list[str]], limit: int) -> list[str]:
    """The most frequent symbols of the training text, with <unk> if any part needs it; ties by the alphabet.

    >>> vocabulary({"train": ["b", "a", "b", "c"], "valid": [], "test": []}, 2)
    ['b', '<unk>']
    >>> vocabulary({"train": ["b", "a", "b"], "valid": ["a"], "test": ["d"]}, 9)
    ['b', 'a', '<unk>']
    """
    counts = Counter(tokens["train"])
    every = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))
    kept = every[:limit]
    known = set(kept)
    needed = len(every) > limit or any(symbol not in known for split in ("valid", "test") for symbol in tokens[split])
    return [*kept[: limit - 1], UNKNOWN] if needed and UNKNOWN not in known else kept


def segments(
    tokens: np.ndarray, batch: int, steps: int, whole: bool = False, name: str = "a text"
) -> dict[str, np.ndarray]:
    """Cuts a text into `batch` streams side by side, and these into segments, each a token longer than its steps.

    A segment's tokens but the last are inputs, its tokens but the first what is to be predicted.

    Args:
      tokens: int32 [n].
      batch: number of streams.
      steps: predictions of a stream in a segment.
      whole: whether the last segment is filled up with -1; else what does not fill one is left out.
      name: what an error calls the text.

    Returns:
      tokens: int32 [segments, batch, steps + 1]; first: bool [segments], whether the text begins there.

    Raises:
      DataError: the text is too short for one segment.

    >>> segments(np.arange(10), 2, 2)["tokens"].tolist()
    [[[0, 1, 2], [5, 6, 7]], [[2, 3, 4], [7, 8, 9]]]
    >>> segments(np.arange(4), 1, 2, whole=True)["tokens"].tolist()
    [[[0, 1, 2]], [[2, 3, -1]]]
    """
    length = len(tokens) // batch
    streams = np.asarray(tokens, np.int32)[: batch * length].reshape(batch, length)
    if whole:
        streams = np.pad(streams, ((0, 0), (0, -(length - 1) % steps)), constant_values=-1)
    count = (streams.shape[1] - 1) // steps
    if count < 1:
        raise DataError(f"{name} of {len(tokens):,} tokens is too short: {batch} x {steps + 1} are needed")
    at = np.arange(count)[:, None] * steps + np.arange(steps + 1)
    return {"tokens": np.ascontiguousarray(streams[:, at].swapaxes(0, 1)), "first": np.arange(count) == 0}


def describe(text: Text) -> str:
    """A sentence about a text.

    >>> one = np.zeros(1, np.int32)
    >>> describe(Text("nothing", one, one, one, ("a",), ""))
    'nothing, 1 / 1 / 1 tokens of a vocabulary of 1'
    """
    counts: Sequence[str] = [f"{len(part):,}" for part in (text.train, text.valid, text.test)]
    return f"{text.name}, {' / '.join(counts)} tokens of a vocabulary of {len(text.symbols):,}"
