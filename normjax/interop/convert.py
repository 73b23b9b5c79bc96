"""Whole checkpoints: reads their normalization layers, and writes these as another library keeps them."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from normjax._leaves import one_of
from normjax.interop import _libraries as libraries
from normjax.interop._boxes import Origin, boxed, emptied, flatten, like_neighbours, nest, unboxed
from normjax.interop._checks import check_entries, check_parts
from normjax.interop._layer import Array, Found, Options, Record, other_way, said_of, to_parts, to_record
from normjax.interop._libraries import ADDRESSES, KINDS, Path, listed, numbers_of, refuse

Entries: TypeAlias = Mapping[Any, Any]  # arrays, or whatever the library keeps, in dictionaries that may be nested
NESTED, BOXED = ("linen", "nnx", "equinox"), ("linen", "nnx")  # with a key for each name; with boxes around arrays


def read(entries: Entries, library: str, layers: Options | None = None) -> tuple[dict[str, Record], dict]:
    """Reads the normalization layers of a checkpoint: Records by path, and the rest of the checkpoint.

    A dictionary does not say what its layers are. Unless told, `read` takes a layer with running statistics for "batch",
    one with scale and bias of the same shape and nothing else for "layer" ("group" and "instance" store no more), and a
    scale alone, which may be RMS norm or a PReLU, for none. A ValueError says what does not fit: lengths of a layer's
    arrays, NaN and negative variances, what is no number; a TypeError what is no dictionary.

    Args:
      entries: the checkpoint: for "linen" `{"params": ..., "batch_stats": ...}`; for "nnx" `nnx.to_pure_dict(state)`; for
        "torch" the flat state_dict; for "keras" `{v.path: v.numpy() for v in model.variables}`; for "haiku" `{"params":
        ..., "state": ...}`; for "equinox" nested dictionaries that end in a layer's attributes, a `StateIndex` replaced
        by `state.get(index)`. Values are anything `np.array` takes; no memory is shared with them. A FrozenDict, an
        `nnx.State`, and what Orbax, msgpack or JSON restored with text for numbers are such dictionaries too, and arrays
        may be in boxes (`nn.Partitioned`, `nnx.Param`, {"value": array}): `write` puts them back.
      library: its name.
      layers: patterns of paths (`fnmatch`), and what the dictionary does not say of these layers: `kind` (None leaves a
        layer in the rest), epsilon and momentum by the library's names and meaning, `elements` for torch, `averaging`
        for normjax's counted averages ("debiased" or "cumulative"). Later patterns override earlier ones.

    Source: the table of `normjax.interop`, as measured in `tests/test_interop.py`.

    >>> state = {"0.weight": np.ones((8, 3, 5, 5)), "1.running_mean": np.zeros(8), "1.running_var": np.ones(8)}
    >>> records, rest = read(state, "torch", {"1": {"momentum": 0.25}})
    >>> records["1"].kind, records["1"].momentum, list(rest)
    ('batch', 0.75, ['0.weight'])
    >>> list(write(records, "linen")["batch_stats"]["1"])
    ['mean', 'var']
    """
    names, layers = numbers_of(library)[:2], layers or {}
    check_entries(entries, library)
    flat = dict(flatten(entries, library in BOXED))
    wanted, found = libraries.COLLECTIONS.get(library, ()), dict[str, dict[str, Path]]()
    for path in flat:
        layer, part = libraries.locate(path, library)
        found.setdefault(layer, {})[part] = path
    records = {}
    for layer, parts in found.items():
        said = said_of(layers, layer)
        where = f"{library} layer {layer!r}"
        held = {part: flat[path] for part, path in parts.items() if part in ADDRESSES[library]}
        values = {part: _array(unboxed(value), part) for part, value in held.items()}
        kind = said.get("kind", _guess(values, parts))
        if kind is None:
            continue
        one_of(f"{where}: kind", kind, KINDS)
        if strange := [part[1:] for part in parts if part not in values]:
            refuse(where, f"entries {listed(strange)}", listed(at.split("*/")[1] for at in ADDRESSES[library].values()))
        check_parts(where, library, values)
        boxes = {part: box for part, value in held.items() if (box := emptied(value)) is not None}
        keys = next(iter(parts.values()))[len(wanted[:1]) : -1]
        records[layer] = to_record(where, library, kind, values, said, Origin(library, keys, boxes))
        for path in parts.values():
            del flat[path]
    _check(layers, library, ("kind", *names, *libraries.READS.get(library, ())), records)
    return records, nest(flat)


def write(
    records: Mapping[str, Record], library: str, layers: Options | None = None, rest: Entries | None = None
) -> dict:
    """The checkpoint of a library with these normalization layers, of new arrays, in the form that `read` takes.

    Equinox loads it by `state.set` and `eqx.tree_at`. A layer that the library cannot hold is a ValueError.

    Args:
      records: Records by path, slashes between names; rename layers by renaming keys.
      library: whose checkpoint.
      layers: patterns of paths, and what Records do not say: for "torch" `elements`; for "haiku" the `shape` of batch
        norm's arrays, such as (1, 1, 1, -1); for "equinox" the `mode`, "batch" (default) or "ema"; for a layer of normjax
        its `averaging`: unless "exponential" (default, as Flax) the counts go along.
      rest: entries in the library's own form to lay beside the layers, such as those that `read` returned.

    Source: the table of `normjax.interop`.

    >>> records, _ = read({"params": {"n": {"scale": np.ones(2), "bias": np.zeros(2)}}}, "linen")
    >>> write(records, "haiku")["params"]["n"]["offset"]
    array([0., 0.])
    """
    numbers_of(library)  # which refuses a library that is not known
    layers = layers or {}
    _check(layers, library, libraries.WRITES.get(library, ()), records)
    flat = dict(flatten(rest or {}, library in BOXED))
    joined, others = {libraries.joined(path, library) for path in flat}, list(flat)
    for layer, record in records.items():
        where = f"{library} layer {layer!r}"
        for part, value in to_parts(where, library, record, said_of(layers, layer)).items():
            at = ADDRESSES[library][part].replace("*/", f"{layer}/" if layer else "")
            if at in joined:
                refuse(where, f"the entry {at!r} in the rest too", "one of the two")
            origin = record.origin if isinstance(record, Found) and record.origin else Origin("", (), {})
            box = origin.boxes.get(part) if origin.written_by == library else None
            flat[_place(at, layer, library, origin, others)] = value if box is None else boxed(box, value)
    return nest(flat)


def arguments(record: Record, library: str) -> dict[str, Any]:
    """Arguments with which a library builds the layer of a Record; sizes, axes and groups are yours to add.

    Source: the table of `normjax.interop`.

    >>> arguments(Record("batch", np.ones(3), np.ones(3), epsilon=1e-3, momentum=0.75), "torch")
    {'eps': 0.001, 'momentum': 0.25, 'affine': True, 'track_running_stats': False}
    """
    numbers, kind, tracked = numbers_of(library), record.kind, record.mean is not None
    out: dict[str, Any] = {} if record.epsilon is None else {numbers.epsilon: record.epsilon}
    if library == "torch" and (kind == "batch" or tracked) and record.averaging == "cumulative":
        out[numbers.momentum] = None
    elif record.momentum is not None and (kind == "batch" or tracked):
        out[numbers.momentum] = other_way(record.momentum) if library == "torch" else record.momentum
    scale, bias, alone = record.scale is not None, record.bias is not None, kind in ("layer", "rms")
    if library in ("linen", "nnx"):
        return out | {"use_scale": scale} | ({"use_bias": bias} if kind != "rms" or bias else {})
    if library == "keras":
        return out if kind == "rms" else out | {"scale": scale, "center": bias}
    if library == "haiku":
        return out | {"create_scale": scale} | ({} if kind == "rms" else {"create_offset": bias})
    if library == "equinox" and alone:
        return out | {"use_weight": scale, "use_bias": bias}
    if library == "equinox":
        return out | {"channelwise_affine": scale or bias} | ({"mode": "batch"} if kind == "batch" else {})
    if alone:
        return out | {"elementwise_affine": scale or bias} | ({"bias": bias} if kind == "layer" else {})
    return out | {"affine": scale or bias} | ({"track_running_stats": tracked} if kind != "group" else {})


def _place(at: str, layer: str, library: str, origin: Origin, others: Iterable[Path]) -> Path:
    """The keys of an address: those of where the layer was read, or numbers as they are in the rest beside it."""
    keys = libraries.keys_of(at, library)
    if library not in NESTED:
        return keys
    if origin.written_by == library and libraries.joined(origin.path, library) == layer:
        return (*keys[: len(libraries.COLLECTIONS.get(library, ())[:1])], *origin.path, keys[-1])
    return like_neighbours(keys, others, library == "nnx")


def _guess(values: Mapping[str, Array], parts: Mapping[str, Path]) -> str | None:
    """The kind of a layer that was not told, by what it holds; None for what may be no normalization layer."""
    if len(values) < len(parts):
        return None
    if {"mean", "var"} <= set(values) or {"sums", "averages"} & set(values):
        return "batch"
    same = set(values) == {"scale", "bias"} and values["scale"].shape == values["bias"].shape
    return "layer" if same else None


def _array(value: Array, part: str) -> Array:
    """A copy of an array; running statistics in float32 or wider, for averages in bfloat16 stop moving."""
    if part in ("sums", "averages"):
        return tuple(_array(one, "mean") for one in value)
    value = np.array(value)
    return value.astype(np.promote_types(value.dtype, np.float32)) if part in ("mean", "var") else value


def _check(layers: Options, library: str, accepted: tuple[str, ...], records: Iterable[str]) -> None:
    """Refuses options that mean nothing here, and patterns that fit no normalization layer (or leave it in the rest)."""
    for pattern, options in layers.items():
        if strange := [name for name in options if name not in accepted]:
            refuse(f"{library} layers {pattern!r}", f"options {listed(strange)}", listed(accepted) or "none")
        if options.get("kind", "") is not None and not fnmatch.filter(records, pattern):
            refuse(f"{library} layers {pattern!r}", "no such normalization layer", listed(records) or "none")
