"""What checkpoints hold around arrays and for keys: boxes of metadata, numbers that became text, paths in one key."""

import ast
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from normjax.interop._libraries import Path

# Boxes are known by what they can do, so that no library is imported: linen's `AxisMetadata` have `replace_boxed`, nnx's
# variables `get_value`; a file that Orbax or msgpack restored has a dictionary in place of either, {"value": array}.


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a record was read: the library that wrote it, the keys of the layer, and the empty boxes of its parts."""

    written_by: str
    path: Path
    boxes: Mapping[str, object]


def is_box(value: object) -> bool:
    """Whether a value of a checkpoint is an array in a box."""
    if isinstance(value, Mapping):
        return list(value) == ["value"] and not isinstance(value["value"], Mapping)
    return hasattr(value, "replace_boxed") or (hasattr(value, "get_value") and hasattr(value, "replace"))


def unboxed(value: Any) -> Any:
    """The array in a box, or in a box in a box; anything else as it is. Its place on a mesh is not asked about."""
    while is_box(value):
        if isinstance(value, Mapping):
            value = value["value"]
        elif hasattr(value, "get_value"):
            value = value.get_value()
        else:
            value = value.value if hasattr(value, "value") else value.unbox()
    return value


def emptied(value: Any) -> object | None:
    """A box without its array, so that no memory is kept; None where there is no box."""
    return boxed(value, None) if is_box(value) else None


def boxed(box: Any, array: object) -> object:
    """The array in a box like this one."""
    if isinstance(box, Mapping):
        return {"value": array}
    return box.replace_boxed(array) if hasattr(box, "replace_boxed") else box.replace(array)


def flatten(entries: Mapping[Any, Any], boxes: bool = True, above: Path = ()) -> Iterable[tuple[Path, Any]]:
    """Pairs of a path and a value, which a box may be; None is how Equinox and nnx say that there is nothing."""
    for key, value in entries.items():
        if isinstance(value, Mapping) and not (boxes and is_box(value)):
            yield from flatten(value, boxes, (*above, key))
        elif value is not None:
            yield (*above, key), value


def nest(flat: Mapping[Path, object]) -> dict:
    """Nested dictionaries of values by path."""
    out: dict = {}
    for (*above, last), value in flat.items():
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), above, out)[last] = value
    return out


def like_neighbours(path: Path, others: Iterable[Path], default: bool) -> Path:
    """A path whose numbers are ints, or text, as those are that lie beside them in the rest; ints where none does, if so."""
    out: list[Any] = []
    others = list(others)
    for depth, key in enumerate(path):
        if isinstance(key, str) and key.isdecimal():
            beside = [p[depth] for p in others if len(p) > depth and list(map(str, p[:depth])) == list(map(str, out))]
            numbers = [k for k in beside if isinstance(k, int | np.integer) or (isinstance(k, str) and k.isdecimal())]
            key = int(key) if (not isinstance(numbers[0], str) if numbers else default) else key
        out.append(key)
    return tuple(out)


def text_keys(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """A pure dictionary with text for keys: paths that were one key as a tuple with slashes, and numbers in digits.

    Flax's `nnx.WeightNorm` and `nnx.SpectralNorm`, and ours until they kept text, have tuples for keys, which msgpack and
    JSON refuse and Orbax turns into the text of a tuple. `nnx.replace_by_pure_dict` takes what comes out, for our layers.

    Args:
      entries: nested dictionaries, such as `nnx.to_pure_dict(nnx.state(model))`.

    Source: the checkpoints of `flax.nnx`.

    >>> text_keys({"scales": {("layers", 0, "kernel"): 1.0, "('bias',)": 2.0}})
    {'scales': {'layers/0/kernel': 1.0, 'bias': 2.0}}
    """
    return {as_text(key): text_keys(value) if isinstance(value, Mapping) else value for key, value in entries.items()}


def as_text(key: object) -> str:
    """A key as text; the text of a tuple is that of its members too."""
    if isinstance(key, str) and key.startswith("(") and key.endswith(")"):
        try:
            key = ast.literal_eval(key)
        except (SyntaxError, ValueError):
            return str(key)
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
