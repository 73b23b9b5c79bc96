"""One normalization layer: in no library's terms, and from and to the parts that a library keeps."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from normjax._leaves import one_of
from normjax.interop._boxes import Origin
from normjax.interop._libraries import AVERAGING, FOREVER, KINDS, numbers_of, refuse

Array: TypeAlias = Any  # of NumPy, or None where the layer has none; whoever takes it knows which
Said: TypeAlias = Mapping[str, Any]  # what the caller says of a layer: numbers, words and shapes by name
Options: TypeAlias = Mapping[str, Said]  # by patterns of paths


@dataclass(frozen=True, eq=False)
class Record:
    """One normalization layer, in no library's terms.

    Attributes:
      kind: "batch", "layer", "group", "instance" or "rms".
      scale, bias: factor and addend, None where the layer has none; `[c]` or the axes that the layer learns them for.
      mean, var: running statistics, float32 or wider, None where nothing is stored. [u], [u ** 2]
      count: number of updates behind mean and var, a scalar or of their shape; None where it is not known.
      averaging: "exponential", "debiased" or "cumulative".
      epsilon: added to the variance. [u ** 2]
      momentum: weight of the old value in an update, None where it is not known or there is none.

    >>> Record("rms", np.ones(3), epsilon=1e-6).bias is None
    True
    """

    kind: str
    scale: Array = None
    bias: Array = None
    mean: Array = None
    var: Array = None
    count: Array = None
    averaging: str = "exponential"
    epsilon: float | None = None
    momentum: float | None = None


@dataclass(frozen=True, eq=False)
class Found(Record):
    """A Record as `read` returns it, which remembers the keys and boxes of its arrays for `write`."""

    origin: Origin | None = None


def to_record(where: str, library: str, kind: str, values: dict[str, Array], said: Said, origin: Origin) -> Found:
    """A Record of the arrays found in a layer, by part as `ADDRESSES` names them."""
    numbers = numbers_of(library)
    epsilon = said.get(numbers.epsilon)
    epsilon = {"batch": numbers.batch, "rms": numbers.rms}.get(kind, numbers.other) if epsilon is None else epsilon
    momentum = said.get(numbers.momentum, numbers.default)
    averaging = "exponential"
    if library == "torch":
        averaging = "cumulative" if momentum is None else averaging
        momentum = None if momentum is None else other_way(momentum)
    if library == "haiku":
        # without the axes of length 1, but for the last of an array that has no others
        shapes = {part: [n for n in v.shape if n != 1] or [1] * min(v.ndim, 1) for part, v in values.items()}
        values = {part: v.reshape(shapes[part]) for part, v in values.items()}
    mean, var, count = (values.get(part) for part in ("mean", "var", "count"))
    if counts := [values[part] for part in ("mean_count", "var_count") if part in values]:
        if len(counts) < 2 or not np.array_equal(*counts):
            refuse(where, "other counts of updates for the mean than for the variance", "the same")
        count, averaging = counts[0], said.get("averaging", "debiased")
        one_of(f"{where}: averaging", averaging, AVERAGING)
    if "averages" in values:
        mean, var = values["averages"]
        if values.get("first", False):  # nothing is stored yet, only memory that nobody has filled
            mean, var, count = np.zeros_like(mean), np.ones_like(var), np.array(0)
    if "sums" in values:
        if count is None or momentum is None:
            refuse(where, "no count of updates or no momentum", "batch_counter, and 'momentum' as it was in training")
        mean, var = (total / _debiasing(total, momentum, _one(where, count), library) for total in values["sums"])
        averaging = "debiased"
    if averaging == "debiased" and count is not None and np.all(count >= FOREVER):
        count, averaging = None, "exponential"
    _check_pair(where, mean, var)
    if var is not None and "elements" in said:
        var = var * var.dtype.type(1 / _bessel(where, said["elements"]))
    if kind != "batch" and mean is None:
        momentum, averaging = None, "exponential"
    scale, bias = values.get("rms_scale", values.get("scale")), values.get("bias")
    return Found(kind, scale, bias, mean, var, count, averaging, epsilon, momentum, origin)


def to_parts(where: str, library: str, record: Record, said: Said) -> dict[str, Array]:
    """The parts of a layer as a library keeps them: copies, by the names of `ADDRESSES`."""
    kind, scale, bias, mean = record.kind, record.scale, record.bias, record.mean
    one_of(f"{where}: kind", kind, KINDS)
    _check_pair(where, mean, record.var)
    if mean is not None and kind != "batch" and (library, kind) != ("torch", "instance"):
        refuse(where, f"running statistics in kind {kind!r}", "kind 'batch', which gives the same inference")
    if kind == "rms" and bias is not None and library in ("torch", "keras", "haiku"):
        refuse(where, "a bias in kind 'rms'", "a scale alone")
    if library in ("torch", "equinox"):
        both = kind in ("batch", "group", "instance")
        if scale is None and bias is not None and (both or library == "torch"):
            scale = np.ones_like(bias)
        if bias is None and scale is not None and both:
            bias = np.zeros_like(scale)
    affine = {"rms_scale" if (library, kind) == ("keras", "rms") else "scale": scale, "bias": bias}
    stored = {} if mean is None else _stored(where, library, record, said)
    parts = {part: value for part, value in (affine | stored).items() if value is not None}
    if library == "haiku":
        shape = said.get("shape")
        if shape is None and kind == "batch" and parts:
            refuse(where, "no 'shape'", "'shape', the singleton axes of Haiku's arrays, such as (1, 1, 1, -1)")
        if shape is not None:
            parts = {part: v if part.endswith("count") else np.reshape(v, shape) for part, v in parts.items()}
    # A Python int stays one, since Equinox compares weak types and its own counter has one.
    copies = {int: lambda v: v, tuple: lambda v: tuple(map(np.array, v))}
    return {part: copies.get(type(value), np.array)(value) for part, value in parts.items()}


def _stored(where: str, library: str, record: Record, said: Said) -> dict[str, Array]:
    """The running statistics as a library keeps them."""
    mean, var, count = record.mean, record.var, record.count
    plain = {"mean": mean, "var": var}
    if library in ("linen", "nnx"):
        averaging = said.get("averaging", "exponential")
        one_of(f"{where}: averaging", averaging, AVERAGING)
        if averaging == "exponential":
            return plain
        if count is None:
            refuse(where, f"no count of updates for {averaging} averages", "a count")
        return plain | {f"{name}_count": np.broadcast_to(count, v.shape).astype(np.int32) for name, v in plain.items()}
    if library == "keras":
        return plain
    one = None if count is None else _one(where, count)
    if library == "torch":
        var = var * var.dtype.type(_bessel(where, said["elements"])) if "elements" in said else var
        return {"mean": mean, "var": var, "count": np.array(one or 0, np.int64)}
    mode = said.get("mode", "batch")
    one_of(f"{where}: mode", mode, ("batch", "ema"))
    if mode == "ema":
        return {"averages": (mean, var), "first": np.array(one == 0)}
    updates, momentum = FOREVER, 0.0
    if record.averaging == "debiased":
        if one is None or record.momentum is None:
            refuse(where, "debiased averages without count or momentum", "both")
        updates, momentum = one, record.momentum
    sums = {name: value * _debiasing(value, momentum, updates, library) for name, value in plain.items()}
    if library == "equinox":
        return {"sums": tuple(sums.values()), "count": updates}
    counts = {f"{name}_count": np.array(updates, np.int32) for name in plain}
    return plain | counts | {f"{name}_sum": value for name, value in sums.items()}


def _check_pair(where: str, mean: Array, var: Array) -> None:
    """Refuses one running statistic without the other."""
    if (mean is None) != (var is None):
        refuse(where, f"a running {'mean' if var is None else 'variance'} alone", "both or neither")


def other_way(momentum: float) -> float:
    """The weight of the new value from that of the old one, or back; rounded, as 1 - 0.9 is 0.09999999999999998."""
    return round(1 - momentum, 15)


def _debiasing(value: np.ndarray, momentum: float, updates: int, library: str) -> np.floating:
    """What divides a sum into an average, in the precision of the libraries; at no updates Equinox divides by one."""
    number = value.dtype.type
    factor = number(1) - number(momentum) ** number(updates)
    return number(1) if library == "equinox" and updates == 0 else factor


def _bessel(where: str, elements: float) -> float:
    """The factor n / (n - 1) that makes a variance unbiased."""
    if not elements > 1:
        refuse(where, f"elements={elements!r}", "a number above 1")
    return elements / (elements - 1)


def _one(where: str, count: np.ndarray) -> int:
    """The count of updates as one number."""
    if np.size(count) == 0 or np.min(count) != np.max(count):
        refuse(where, f"counts of updates that differ by channel, {np.unique(count).tolist()}", "one count for all")
    return int(np.max(count))


def said_of(layers: Options, layer: str) -> Said:
    """What the caller says of a layer; later patterns override earlier ones."""
    fitting = [options for pattern, options in layers.items() if fnmatch.fnmatchcase(layer, pattern)]
    return {name: value for options in fitting for name, value in options.items()}
