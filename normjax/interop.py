"""Checkpoints of normalization layers to and from Flax, PyTorch, Keras, Haiku and Equinox, as dictionaries of arrays.

    records, rest = read(model.state_dict(), "torch", {"*": {"eps": 1e-3}, "head/norm": {"kind": "rms"}})
    variables = write({"BatchNorm_0": records["layer1/0/bn1"]}, "linen")
    layer = normjax.linen.BatchNorm(**arguments(records["layer1/0/bn1"], "linen"))

Between the libraries stands one `Record` a layer, under its path ("layer1/0/bn1", slashes in every library). Entries that
belong to no normalization layer come back as `rest`, in the form and under the path in which they came; conv kernels are
transposed by somebody else. This file imports none of the libraries. normjax's own layers are "linen" and "nnx".

|            | linen, nnx             | torch               | keras             | haiku             | equinox              |
|------------|------------------------|---------------------|-------------------|-------------------|----------------------|
| dictionary | variables; pure_dict   | state_dict          | path: value       | params, state     | attribute: value     |
| scale      | scale                  | weight              | gamma; rms: scale | scale             | weight               |
| bias       | bias                   | bias                | beta              | offset            | bias                 |
| mean       | mean                   | running_mean        | moving_mean       | mean_ema/average  | batch_state_index[0] |
| var        | var                    | running_var         | moving_variance   | var_ema/average   | batch_state_index[1] |
| updates    | mean_count, var_count  | num_batches_tracked | none              | counter           | batch_counter        |
| variance   | biased                 | unbiased            | biased            | biased            | biased               |
| averaging  | exponential            | exponential         | exponential       | debiased          | debiased             |
| momentum   | old value's, 0.99      | new value's, 0.1    | old value's, 0.99 | old value's       | old value's, 0.99    |
| epsilon    | 1e-6; batch 1e-5       | 1e-5; rms 2 ** -23  | 1e-3; rms 1e-6    | 1e-5              | 1e-5                 |

Averaging. A debiased average is sum / (1 - momentum ** updates); `Record.mean` and `Record.var` are always the average
itself, which inference uses. Haiku keeps average and sum (`hidden`), Equinox the sum alone. Any other average goes into
these two as that of 2 ** 30 updates, whose debiasing divides by one. normjax counts only if debiased or cumulative; torch is
cumulative where momentum is None. Equinox's mode "ema" keeps `ema_state_index` and `ema_first_time_index` instead.

Variance. Inference takes it as it stands. What training in torch adds is n / (n - 1) times what training elsewhere adds,
n elements behind a batch's statistics; `elements=n` undoes it, exactly once the initial 1 is forgotten. A layer of normjax
with `unbiased=True` goes on as torch does.

Shapes. Haiku's batch norm keeps singleton axes, (1, 1, 1, c): reading drops them, writing takes `shape=(1, 1, 1, -1)`.
Nothing is transposed: a torch or Equinox layer norm over (c, h, w) is not one over (h, w, c). nnx wants `reshape(-1)`.

What is lost: Flax and Keras have no place for the number of updates. torch and Equinox learn both scale and bias or
neither (batch, group, instance), so that a missing one is written as ones or zeros.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

KINDS = ("batch", "layer", "group", "instance", "rms")
AVERAGING = ("exponential", "debiased", "cumulative")
FOREVER = 2**30  # updates after which nothing is left of a debiasing; a step more still fits int32

# fmt: off
# Where each library keeps what; * is the path of the layer.
_NNX = {name: f"*/{name}" for name in ("scale", "bias", "mean", "var", "mean_count", "var_count")}
ADDRESSES: dict[str, dict[str, str]] = {
    "linen": {name: f"{'params' if name in ('scale', 'bias') else 'batch_stats'}/{at}" for name, at in _NNX.items()},
    "nnx": _NNX,
    "torch": {"scale": "*/weight", "bias": "*/bias",
              "mean": "*/running_mean", "var": "*/running_var", "count": "*/num_batches_tracked"},
    "keras": {"scale": "*/gamma", "rms_scale": "*/scale", "bias": "*/beta",
              "mean": "*/moving_mean", "var": "*/moving_variance"},
    "haiku": {"scale": "params/*/scale", "bias": "params/*/offset"} | {
        f"{name}{part}": f"state/*/~/{name}_ema/{at}" for name in ("mean", "var")
        for part, at in (("", "average"), ("_sum", "hidden"), ("_count", "counter"))},
    "equinox": {"scale": "*/weight", "bias": "*/bias", "sums": "*/batch_state_index", "count": "*/batch_counter",
                "averages": "*/ema_state_index", "first": "*/ema_first_time_index"},
}
COLLECTIONS = {"linen": ("params", "batch_stats"), "haiku": ("params", "state")}
# Names of epsilon and momentum; default epsilon of batch, of rms, of the others; default momentum, as the library means it.
_HYPER: dict[str, tuple] = {
    "linen": ("epsilon", "momentum", 1e-5, 1e-6, 1e-6, 0.99),
    "nnx": ("epsilon", "momentum", 1e-5, 1e-6, 1e-6, 0.99),
    "torch": ("eps", "momentum", 1e-5, 2.0**-23, 1e-5, 0.1),
    "keras": ("epsilon", "momentum", 1e-3, 1e-6, 1e-3, 0.99),
    "haiku": ("eps", "decay_rate", 1e-5, 1e-5, 1e-5, None),
    "equinox": ("eps", "momentum", 1e-5, 1e-5, 1e-5, None),  # 0.99; the averages depend on it, so it must be said
}
# What else `read` and `write` can be told.
_READS = {"linen": ("averaging",), "nnx": ("averaging",), "torch": ("elements",)}
_WRITES = {**_READS, "haiku": ("shape",), "equinox": ("mode",)}
# fmt: on

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Record:
    """One normalization layer, in no library's terms.

    Attributes:
      kind: "batch", "layer", "group", "instance" or "rms".
      scale: factor, None where the layer has none; `[c]` or the axes that the layer learns it for.
      bias: addend, the same.
      mean: running mean, float32 or wider, None where nothing is stored. [u]
      var: running variance. [u ** 2]
      count: number of updates behind mean and var, a scalar or of their shape; None where it is not known.
      averaging: "exponential", "debiased" or "cumulative".
      epsilon: added to the variance. [u ** 2]
      momentum: weight of the old value in an update, None where it is not known or there is none.
    """

    kind: str
    scale: Any = None
    bias: Any = None
    mean: Any = None
    var: Any = None
    count: Any = None
    averaging: str = "exponential"
    epsilon: float | None = None
    momentum: float | None = None


def read(entries: Mapping, library: str, layers: Options | None = None) -> tuple[dict[str, Record], dict]:
    """Reads the normalization layers of a checkpoint.

    A dictionary does not say what its layers are. Without being told, `read` takes a layer with running statistics for
    "batch", and one with scale and bias of the same shape and nothing else for "layer" (which differs from "group" and
    "instance" in nothing that is stored). A scale alone may be RMS norm or a PReLU, so that it must be told.

    Args:
      entries: the checkpoint: for "linen" `{"params": ..., "batch_stats": ...}`; for "nnx" `nnx.to_pure_dict(state)`; for
        "torch" the flat state_dict; for "keras" `{v.path: v.numpy() for v in model.variables}`; for "haiku" `{"params":
        ..., "state": ...}`; for "equinox" nested dictionaries that end in a layer's attributes, a `StateIndex` replaced
        by `state.get(index)`. Values are anything `np.array` takes. It is not changed, and no memory is shared with it.
      library: its name.
      layers: patterns of paths (`fnmatch`), and what the dictionary does not say of these layers: `kind` (None leaves a
        layer in the rest), epsilon and momentum by the library's names and meaning, `elements` for torch, `averaging`
        for normjax's counted averages ("debiased" or "cumulative"). Later patterns override earlier ones.

    Returns:
      A dictionary from paths to Records, and the rest of the checkpoint.

    Raises:
      ValueError: no such library, kind or option; a pattern that no layer has; a layer that lacks a part or has another.

    Source: the table above, as measured in `tests/test_interop.py`.

    >>> state = {"0.weight": np.ones((8, 3, 5, 5)), "1.running_mean": np.zeros(8), "1.running_var": np.ones(8)}
    >>> records, rest = read(state, "torch", {"1": {"momentum": 0.25}})
    >>> records["1"].kind, records["1"].momentum, list(rest)
    ('batch', 0.75, ['0.weight'])
    >>> list(write(records, "linen")["batch_stats"]["1"])
    ['mean', 'var']
    """
    names = _hyper(library)[:2]
    layers = layers or {}
    wanted = COLLECTIONS.get(library, ())
    if wanted and entries and not set(wanted) & set(entries):
        _refuse(f"a {library} checkpoint", f"the collections {_list(entries)}", _list(wanted))
    flat = dict(_flatten(entries))
    found: dict[str, dict[str, tuple]] = {}
    for path in flat:
        layer, part = _locate(path, library)
        found.setdefault(layer, {})[part] = path
    records = {}
    for layer, parts in found.items():
        said = _said(layers, layer)
        values = {part: _array(flat[path], part) for part, path in parts.items() if part in ADDRESSES[library]}
        kind = said.get("kind", _guess(values, parts))
        if kind is None:
            continue
        where = f"{library} layer {layer!r}"
        _choose(f"{where}: kind", kind, KINDS)
        strange = [part[1:] for part in parts if part not in values]
        if strange:
            _refuse(where, f"entries {_list(strange)}", _list(at.split("*/")[1] for at in ADDRESSES[library].values()))
        records[layer] = _record(where, library, kind, values, said)
        for path in parts.values():
            del flat[path]
    _check(layers, library, ("kind", *names, *_READS.get(library, ())), records)
    return records, _nest(flat)


def write(
    records: Mapping[str, Record], library: str, layers: Options | None = None, rest: Mapping | None = None
) -> dict:
    """The checkpoint of a library with these normalization layers.

    Args:
      records: Records by path, slashes between names; rename layers by renaming keys.
      library: whose checkpoint.
      layers: patterns of paths, and what Records do not say: for "torch" `elements`; for "haiku" the `shape` of batch
        norm's arrays, such as (1, 1, 1, -1); for "equinox" the `mode`, "batch" (default) or "ema"; for a layer of normjax
        its `averaging`: unless "exponential" (default, as Flax) the counts go along.
      rest: entries in the library's own form to lay beside the layers, such as those that `read` returned.

    Returns:
      A dictionary in the form that `read` takes, of new arrays. (Equinox loads it by `state.set` and `eqx.tree_at`.)

    Raises:
      ValueError: no such library or option; a pattern that no layer has; a layer that the library cannot hold; an entry
        that `rest` has too.

    Source: the table above.

    >>> records, _ = read({"params": {"n": {"scale": np.ones(2), "bias": np.zeros(2)}}}, "linen")
    >>> write(records, "haiku")["params"]["n"]["offset"]
    array([0., 0.])
    """
    _hyper(library)
    layers = layers or {}
    _check(layers, library, _WRITES.get(library, ()), records)
    flat = dict(_flatten(rest or {}))
    joined = {_joined(path, library) for path in flat}
    for layer, record in records.items():
        where = f"{library} layer {layer!r}"
        parts = _parts(where, library, record, _said(layers, layer))
        for part, value in parts.items():
            at = ADDRESSES[library][part].replace("*/", f"{layer}/" if layer else "")
            if at in joined:
                _refuse(where, f"the entry {at!r} in the rest too", "one of the two")
            flat[_split(at, library)] = value
    return _nest(flat)


def arguments(record: Record, library: str) -> dict[str, Any]:
    """Arguments with which the library builds this layer; sizes, axes and groups are yours to add.

    Args:
      record: what `read` returned.
      library: whose arguments.

    Raises:
      ValueError: no such library.

    Source: the table above.

    >>> arguments(Record("batch", np.ones(3), np.ones(3), epsilon=1e-3, momentum=0.75), "torch")
    {'eps': 0.001, 'momentum': 0.25, 'affine': True, 'track_running_stats': False}
    """
    eps, momentum, *_ = _hyper(library)
    kind, scale, bias = record.kind, record.scale is not None, record.bias is not None
    out: dict[str, Any] = {} if record.epsilon is None else {eps: record.epsilon}
    tracked = record.mean is not None
    if library == "torch" and (kind == "batch" or tracked) and record.averaging == "cumulative":
        out[momentum] = None
    elif record.momentum is not None and (kind == "batch" or tracked):
        # Rounded, since 1 - 0.9 would be 0.09999999999999998.
        out[momentum] = round(1 - record.momentum, 15) if library == "torch" else record.momentum
    if library in ("linen", "nnx"):
        return out | {"use_scale": scale} | ({"use_bias": bias} if kind != "rms" or bias else {})
    if library == "keras":
        return out if kind == "rms" else out | {"scale": scale, "center": bias}
    if library == "haiku":
        return out | {"create_scale": scale} | ({} if kind == "rms" else {"create_offset": bias})
    if library == "equinox":
        if kind in ("layer", "rms"):
            return out | {"use_weight": scale, "use_bias": bias}
        return out | {"channelwise_affine": scale or bias} | ({"mode": "batch"} if kind == "batch" else {})
    if kind in ("layer", "rms"):
        return out | {"elementwise_affine": scale or bias} | ({"bias": bias} if kind == "layer" else {})
    return out | {"affine": scale or bias} | ({"track_running_stats": tracked} if kind != "group" else {})


def _record(where: str, library: str, kind: str, values: dict[str, Any], said: Mapping[str, Any]) -> Record:
    """A Record of the parts found in a layer."""
    eps, momentum, batch, rms, other, default = _hyper(library)
    epsilon = said.get(eps)
    epsilon = {"batch": batch, "rms": rms}.get(kind, other) if epsilon is None else epsilon
    old = said.get(momentum, default)
    averaging = "cumulative" if library == "torch" and old is None else "exponential"
    if library == "torch" and old is not None:
        old = round(1 - old, 15)
    if library == "haiku":
        values = {part: _squeeze(value) for part, value in values.items()}
    mean, var, count = (values.get(part) for part in ("mean", "var", "count"))
    counts = [values[part] for part in ("mean_count", "var_count") if part in values]
    if counts:
        if len(counts) < 2 or not np.array_equal(counts[0], counts[1]):
            _refuse(where, "other counts of updates for the mean than for the variance", "the same")
        count, averaging = counts[0], said.get("averaging", "debiased")
        _choose(f"{where}: averaging", averaging, AVERAGING)
    if "averages" in values:
        mean, var = values["averages"]
        if values.get("first", False):  # nothing is stored yet, only memory that nobody has filled
            mean, var, count = np.zeros_like(mean), np.ones_like(var), np.array(0)
    if "sums" in values:
        if count is None or old is None:
            _refuse(where, "no count of updates or no momentum", "batch_counter, and 'momentum' as it was in training")
        mean, var = (total / _debiasing(total, old, _one(where, count), library) for total in values["sums"])
        averaging = "debiased"
    if averaging == "debiased" and count is not None and np.all(count >= FOREVER):
        count, averaging = None, "exponential"
    if (mean is None) != (var is None):
        _refuse(where, f"a running {'mean' if var is None else 'variance'} alone", "both or neither")
    if var is not None and "elements" in said:
        var = var * var.dtype.type(1 / _bessel(where, said["elements"]))
    scale = values.get("rms_scale", values.get("scale"))
    if kind != "batch" and mean is None:
        old, averaging = None, "exponential"
    return Record(kind, scale, values.get("bias"), mean, var, count, averaging, epsilon, old)


def _parts(where: str, library: str, record: Record, said: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a layer as a library keeps them."""
    kind, scale, bias, mean, var = record.kind, record.scale, record.bias, record.mean, record.var
    _choose(f"{where}: kind", kind, KINDS)
    if (mean is None) != (var is None):
        _refuse(where, f"a running {'mean' if var is None else 'variance'} alone", "both or neither")
    if mean is not None and kind != "batch" and (library, kind) != ("torch", "instance"):
        _refuse(where, f"running statistics in kind {kind!r}", "kind 'batch', which gives the same inference")
    if kind == "rms" and bias is not None and library in ("torch", "keras", "haiku"):
        _refuse(where, "a bias in kind 'rms'", "a scale alone")
    if library in ("torch", "equinox"):
        both = kind in ("batch", "group", "instance")
        if scale is None and bias is not None and (both or library == "torch"):
            scale = np.ones_like(bias)
        if bias is None and scale is not None and both:
            bias = np.zeros_like(scale)
    affine = {"rms_scale" if (library, kind) == ("keras", "rms") else "scale": scale, "bias": bias}
    stored = {} if mean is None else _stored(where, library, record, said)
    parts: dict[str, Any] = {part: value for part, value in (affine | stored).items() if value is not None}
    if library == "haiku":
        shape = said.get("shape")
        if shape is None and kind == "batch" and parts:
            _refuse(where, "no 'shape'", "'shape', the singleton axes of Haiku's arrays, such as (1, 1, 1, -1)")
        if shape is not None:
            parts = {part: v if part.endswith("count") else np.reshape(v, shape) for part, v in parts.items()}
    # Copies; and a Python int stays one, since Equinox compares weak types and its own counter has one.
    return {part: tuple(map(np.array, v)) if isinstance(v, tuple) else v if isinstance(v, int) else np.array(v)
            for part, v in parts.items()}  # fmt: skip


def _stored(where: str, library: str, record: Record, said: Mapping[str, Any]) -> dict[str, Any]:
    """The running statistics as a library keeps them."""
    mean, var, count, debiased = record.mean, record.var, record.count, record.averaging == "debiased"
    if library in ("linen", "nnx"):
        averaging = said.get("averaging", "exponential")
        _choose(f"{where}: averaging", averaging, AVERAGING)
        if averaging == "exponential":
            return {"mean": mean, "var": var}
        if count is None:
            _refuse(where, f"no count of updates for {averaging} averages", "a count")
        counts = (np.broadcast_to(count, value.shape).astype(np.int32) for value in (mean, var))
        return {"mean": mean, "var": var} | dict(zip(("mean_count", "var_count"), counts, strict=True))
    if library == "keras":
        return {"mean": mean, "var": var}
    one = None if count is None else _one(where, count)
    if library == "torch":
        var = var * var.dtype.type(_bessel(where, said["elements"])) if "elements" in said else var
        return {"mean": mean, "var": var, "count": np.array(one or 0, np.int64)}
    mode = said.get("mode", "batch")
    _choose(f"{where}: mode", mode, ("batch", "ema"))
    if mode == "ema":
        return {"averages": (mean, var), "first": np.array(one == 0)}
    updates, momentum = FOREVER, 0.0
    if debiased:
        if one is None or record.momentum is None:
            _refuse(where, "debiased averages without count or momentum", "both")
        updates, momentum = one, record.momentum
    sums = [value * _debiasing(value, momentum, updates, library) for value in (mean, var)]
    if library == "equinox":
        return {"sums": tuple(sums), "count": updates}
    counter = np.array(updates, np.int32)
    return {
        "mean": mean, "mean_sum": sums[0], "mean_count": counter, "var": var, "var_sum": sums[1], "var_count": counter,
    }  # fmt: skip


def _debiasing(value: np.ndarray, momentum: float, updates: int, library: str) -> Any:
    """What divides a sum into an average, in the precision of the libraries; at no updates Equinox divides by one."""
    number = value.dtype.type
    factor = number(1) - number(momentum) ** number(updates)
    return number(1) if library == "equinox" and updates == 0 else factor


def _bessel(where: str, elements: float) -> float:
    """The factor n / (n - 1) that makes a variance unbiased."""
    if not elements > 1:
        _refuse(where, f"elements={elements!r}", "a number above 1")
    return elements / (elements - 1)


def _one(where: str, count: np.ndarray) -> int:
    """The count of updates as one number."""
    if np.size(count) == 0 or np.min(count) != np.max(count):
        _refuse(where, f"counts of updates that differ by channel, {np.unique(count).tolist()}", "one count for all")
    return int(np.max(count))


def _guess(values: Mapping[str, np.ndarray], parts: Mapping[str, Any]) -> str | None:
    """The kind of a layer that was not told, by what it holds; None for what may be no normalization layer."""
    if len(values) < len(parts):
        return None
    if {"mean", "var"} <= set(values) or {"sums", "averages"} & set(values):
        return "batch"
    same = set(values) == {"scale", "bias"} and values["scale"].shape == values["bias"].shape
    return "layer" if same else None


def _array(value: Any, part: str) -> Any:
    """A copy of an array; running statistics in float32 or wider, for averages in bfloat16 stop moving."""
    if part in ("sums", "averages"):
        return tuple(_array(one, "mean") for one in value)
    value = np.array(value)
    return value.astype(np.promote_types(value.dtype, np.float32)) if part in ("mean", "var") else value


def _squeeze(value: np.ndarray) -> np.ndarray:
    """Without the axes of length 1, but for the last of an array that has no others."""
    return value.reshape([n for n in value.shape if n != 1] or [1] * min(value.ndim, 1))


def _said(layers: Options, layer: str) -> dict[str, Any]:
    """What the caller says of a layer; later patterns override earlier ones."""
    fitting = [options for pattern, options in layers.items() if fnmatch.fnmatchcase(layer, pattern)]
    return {name: value for options in fitting for name, value in options.items()}


def _check(layers: Options, library: str, accepted: tuple[str, ...], records: Iterable[str]) -> None:
    """Refuses options that mean nothing here, and patterns that fit no normalization layer (or leave it in the rest)."""
    for pattern, options in layers.items():
        strange = [name for name in options if name not in accepted]
        if strange:
            _refuse(f"{library} layers {pattern!r}", f"options {_list(strange)}", _list(accepted) or "none")
        if options.get("kind", "") is not None and not fnmatch.filter(records, pattern):
            _refuse(f"{library} layers {pattern!r}", "no such normalization layer", _list(records) or "none")


def _flatten(entries: Mapping, above: tuple = ()) -> Iterable[tuple[tuple, Any]]:
    """Pairs of a path (a tuple of keys) and a value; None is how Equinox and nnx say that there is nothing."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*above, key))
        elif value is not None:
            yield (*above, key), value


def _nest(flat: Mapping[tuple, Any]) -> dict:
    out: dict = {}
    for path, value in flat.items():
        inner = out
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return out


def _joined(path: tuple, library: str) -> str:
    joined = "/".join(map(str, path))
    return joined.replace(".", "/") if library == "torch" else joined


def _locate(path: tuple, library: str) -> tuple[str, str]:
    """The layer that an entry belongs to, and which part it is; a slash and the entry's name where it is none."""
    joined = _joined(path, library)
    for part, address in ADDRESSES[library].items():
        before, after = address.split("*/")
        if joined.startswith(before) and f"/{joined[len(before) :]}".endswith(f"/{after}"):
            return joined[len(before) : -len(after)].removesuffix("/"), part
    for collection in COLLECTIONS.get(library, ()):
        joined = joined.removeprefix(f"{collection}/")
    layer, _, name = joined.rpartition("/")
    return layer, f"/{name}"


def _split(at: str, library: str) -> tuple:
    """The keys under which a library keeps an address."""
    if library == "torch":
        return (at.replace("/", "."),)
    if library == "keras":
        return (at,)
    names = at.split("/")
    if library == "haiku":  # modules are one key, with its slashes
        return names[0], "/".join(names[1:-1]), names[-1]
    return tuple(int(name) if library == "nnx" and name.isdecimal() else name for name in names)


def _hyper(library: str) -> tuple:
    _choose("library", library, tuple(_HYPER))
    return _HYPER[library]


def _choose(name: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is one of {_list(accepted)}; found {value!r}")


def _list(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)


def _refuse(where: str, found: str, accepted: str) -> NoReturn:
    raise ValueError(f"{where}: found {found}; accepted: {accepted}")
