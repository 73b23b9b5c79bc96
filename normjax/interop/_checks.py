"""What `read` refuses: what is no checkpoint, and arrays that are no normalization layer's."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from normjax.interop._libraries import ADDRESSES, COLLECTIONS, listed, refuse

_MADE_BY = {
    "linen": "the variables of a model, {'params': ..., 'batch_stats': ...}",
    "nnx": "nnx.to_pure_dict(nnx.state(model))",
    "torch": "model.state_dict()",
    "keras": "{v.path: v.numpy() for v in model.variables}",
    "haiku": "{'params': ..., 'state': ...}",
    "equinox": "nested dictionaries that end in a layer's attributes",
}


def check_entries(entries: Any, library: str) -> None:
    """Refuses what is no checkpoint of the library: TypeError for no dictionary, ValueError for one around it."""
    if not isinstance(entries, Mapping):
        raise TypeError(f"a {library} checkpoint is a dictionary, {_MADE_BY[library]}; found {type(entries).__name__}")
    wanted = COLLECTIONS.get(library, ())
    if wanted and entries and not set(wanted) & set(entries):
        refuse(f"a {library} checkpoint", f"the collections {listed(entries)}", listed(wanted))
    if library not in ("torch", "keras"):
        return
    for key, value in entries.items():
        if isinstance(value, Mapping) and not str(key).endswith("_extra_state"):  # which modules of torch may write
            inner = f"the flat dictionary, {_MADE_BY[library]}; if that is the inner one, pass entries[{key!r}]"
            refuse(f"a {library} checkpoint", f"a dictionary under {key!r}", inner)


def check_parts(where: str, library: str, values: Mapping[str, Any]) -> None:
    """Refuses what is no array of numbers, lengths that do not fit each other, NaN, and negative variances."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"learned": {}, "stored": {}}
    for part, value in values.items():
        called = ADDRESSES[library][part].split("*/")[1]
        named = {f"{called}[{i}]": one for i, one in enumerate(value)} if isinstance(value, tuple) else {called: value}
        for name, array in named.items():
            if not (np.issubdtype(array.dtype, np.number) or array.dtype.kind in "bV"):  # V: bfloat16 and its like
                refuse(where, f"{_described(array)} for {name!r}", "an array of numbers")
            learned = part in ("scale", "rms_scale", "bias")
            if not learned and part in ("first", "count", "mean_count", "var_count"):
                continue
            shapes["learned" if learned else "stored"][name] = array.shape
            variance = part.startswith("var") or name.endswith("[1]")
            wrong = np.isnan(array) | (array < 0) if variance else np.isnan(array)
            if wrong.any() and not learned:
                found = f"{'a negative variance or NaN' if variance else 'NaN'} in {wrong.sum()} of {wrong.size} places"
                refuse(where, f"{found} of {name!r}", "statistics of a batch")
    for group in shapes.values():
        if len(set(group.values())) > 1:
            refuse(where, _shapes(group), "one shape")
    both = shapes["learned"] | shapes["stored"]
    if not _broadcast(both.values()):
        refuse(where, _shapes(both), "shapes that fit each other")


def _broadcast(shapes: Iterable[tuple[int, ...]]) -> bool:
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name!r} of shape {shape}" for name, shape in shapes.items())


def _described(array: np.ndarray) -> str:
    """What was found where numbers are meant."""
    return f"an array of dtype {array.dtype}" if array.ndim else f"{type(array.item()).__name__} {array.item()!r}"
