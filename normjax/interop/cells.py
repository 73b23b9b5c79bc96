"""Recurrent cells in checkpoints of PyTorch, Keras, linen and nnx: kernels and biases, with the gates in one order.

    records, rest = read_cells(lstm.state_dict(), "torch")
    variables = write_cells({"cell": records["l0"]}, "linen")            # of linen.RNN(linen.LSTMCell(hidden))

|                  | linen, nnx            | torch                     | keras              | here                   |
|------------------|-----------------------|---------------------------|--------------------|------------------------|
| LSTM, gates      | a kernel for each     | i f g o                   | i f c o            | i f g o; g is Keras's c |
| GRU, gates       | a kernel for each     | r z n                     | z r h              | r z n; n is Keras's h  |
| kernels          | `[i, c]`, `[c, c]`    | `[gates * c, i]`          | `[i, gates * c]`   | `[i, gates * c]`       |
| biases           | one; a GRU's n has two | two                      | one; a GRU has two | one on each side       |

The functions are the same where no normalizer stands between: two biases are added into the one that Flax has. A GRU with
Keras's `reset_after=False` is another function, and is refused. nnx's GRU has no second bias of n.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normjax._leaves import one_of
from normjax.interop._boxes import flatten, like_neighbours, nest, unboxed
from normjax.interop._checks import check_entries
from normjax.interop._layer import Array
from normjax.interop._libraries import Path, refuse
from normjax.interop.convert import Entries
from normjax.recurrent import GATES

LIBRARIES = ("torch", "keras", "linen", "nnx")
CELLS = {len(gates): cell for cell, gates in GATES.items()}  # by number of gates
_KERAS = {"lstm": "ifgo", "gru": "zrn", "simple": "z"}  # the order of Keras, in our letters
_TORCH = re.compile(r"(?:(.*)\.)?(weight|bias)_(ih|hh)(?:_(l\d+(?:_reverse)?))?")


@dataclass(frozen=True, eq=False)
class CellRecord:
    """One recurrent cell, with the gates side by side in the order of `normjax.recurrent.GATES`.

    Attributes:
      kind: "lstm" (gates i f g o), "gru" (r z n) or "simple" (one gate).
      w, u: kernels of the input, `[i, gates * c]`, and of the state, `[c, gates * c]`.
      bw, bu: added to W x and to U h, each `[gates * c]`; None adds nothing.

    Source: `normjax.recurrent.Weights`.

    >>> CellRecord("simple", np.ones((2, 3)), np.ones((3, 3))).bw is None
    True
    """

    kind: str
    w: Array
    u: Array
    bw: Array = None
    bu: Array = None


def read_cells(entries: Entries, library: str) -> tuple[dict[str, CellRecord], dict[Any, Any]]:
    """Reads the recurrent cells of a checkpoint: CellRecords by path, and the rest.

    Args:
      entries: the checkpoint as `normjax.interop.read` takes it. A layer of PyTorch's `nn.LSTM` lies under "rnn/l0", the
        backward one under "rnn/l0_reverse".
      library: "torch", "keras", "linen" or "nnx".

    Source: the documentation of `torch.nn.LSTM` and `keras.layers.GRU`.

    >>> state = {"weight_ih_l0": np.ones((4 * 3, 2)), "weight_hh_l0": np.ones((4 * 3, 3))}
    >>> records, rest = read_cells(state, "torch")
    >>> records["l0"].kind, records["l0"].w.shape, rest
    ('lstm', (2, 12), {})
    """
    one_of("library", library, LIBRARIES)
    check_entries(entries, library)
    flat = dict(flatten(entries, library in ("linen", "nnx")))
    find = {"torch": _of_torch, "keras": _of_keras}.get(library, _of_flax)
    records = {}
    for layer, parts in find(flat).items():
        values = {part: np.array(unboxed(flat[path])) for part, path in parts.items()}
        record = _gathered(f"{library} layer {layer!r}", library, values)
        if record is None:
            continue
        records[layer] = record
        for path in parts.values():
            del flat[path]
    return records, nest(flat)


def write_cells(records: Mapping[str, CellRecord], library: str, rest: Entries | None = None) -> dict[Any, Any]:
    """The checkpoint with these cells, of new arrays.

    Args:
      records: CellRecords by path, slashes between names; rename cells by renaming keys.
      library: "torch", "linen" (LSTMCell, GRUCell, SimpleCell) or "nnx" (OptimizedLSTMCell, GRUCell, SimpleCell, whose gates
        lie side by side).
      rest: entries in the library's own form to lay beside, such as those that `read_cells` returned.

    Source: the parameters of `flax.linen`'s and `flax.nnx`'s cells.

    >>> record = CellRecord("lstm", np.ones((2, 12)), np.ones((3, 12)), np.ones(12), np.ones(12))
    >>> list(write_cells({"cell": record}, "linen")["params"]["cell"])
    ['ii', 'if', 'ig', 'io', 'hi', 'hf', 'hg', 'ho']
    """
    one_of("library", library, ("torch", "linen", "nnx"))
    flat = dict(flatten(rest or {}, library != "torch"))
    others = list(flat)
    for layer, record in records.items():
        where, path = f"{library} layer {layer!r}", tuple(layer.split("/")) if layer else ()
        made = _to_torch(path, record) if library == "torch" else _to_flax(where, path, record, library)
        for at, value in made.items():
            at = at if library == "torch" else like_neighbours(at, others, library == "nnx")
            if at in flat:
                refuse(where, f"the entry {'/'.join(map(str, at))!r} in the rest too", "one of the two")
            flat[at] = np.array(value)
    return nest(flat)


def _of_torch(flat: Mapping[Path, Any]) -> dict[str, dict[str, Path]]:
    found: dict[str, dict[str, Path]] = {}
    for (key,) in flat:
        if match := _TORCH.fullmatch(str(key)):
            layer = "/".join(filter(None, ((match[1] or "").replace(".", "/"), match[4])))
            found.setdefault(layer, {})[{"weight": "", "bias": "b"}[match[2]] + {"ih": "w", "hh": "u"}[match[3]]] = (
                key,
            )
    return found


def _of_keras(flat: Mapping[Path, Any]) -> dict[str, dict[str, Path]]:
    found: dict[str, dict[str, Path]] = {}
    for (key,) in flat:
        layer, _, name = str(key).rpartition("/")
        if (f"{layer}/recurrent_kernel".lstrip("/"),) in flat and name in ("kernel", "recurrent_kernel", "bias"):
            found.setdefault(layer, {})[{"kernel": "w", "recurrent_kernel": "u", "bias": "bw"}[name]] = (key,)
    return found


def _of_flax(flat: Mapping[Path, Any]) -> dict[str, dict[str, Path]]:
    """By cell, "i"+gate or "h"+gate and the name of the parameter, as "ii/kernel"; "i" and "h" where gates lie together."""
    found: dict[str, dict[str, Path]] = {}
    for path in flat:
        if len(path) < 2 or not re.fullmatch(r"[ih][ifgorzn]?_?|dense_[ih]", str(path[-2])):
            continue
        before = path[1:-2] if path[0] == "params" else path[:-2]
        gate = str(path[-2]).removeprefix("dense_").removesuffix("_")  # nnx has `if_`, since `if` is Python's
        name = f"{gate}/{path[-1]}"
        found.setdefault("/".join(map(str, before)), {})[name] = path
    return found


def _gathered(where: str, library: str, values: dict[str, np.ndarray]) -> CellRecord | None:
    """The record of what was found; None where it is no cell."""
    if library == "torch":
        values = {part: value.T for part, value in values.items()}
    elif library != "keras":
        values = _side_by_side(values)
    if not {"w", "u"} <= set(values):
        return None
    w, u = values["w"], values["u"]
    gates, left = divmod(w.shape[-1], max(u.shape[0], 1)) if w.ndim == u.ndim == 2 else (0, 0)
    if left or gates not in CELLS or u.shape != (u.shape[0], w.shape[-1]):
        refuse(
            where, f"kernels of shape {w.shape} and {u.shape}", "[i, gates * c] and [c, gates * c] of 1, 3 or 4 gates"
        )
    kind = CELLS[gates]
    if library == "keras":
        bias = values.get("bw")
        if kind == "gru" and bias is not None and bias.ndim == 1:
            refuse(
                where, "a GRU with one bias, reset_after=False", "reset_after=True, which is the function of all others"
            )
        if bias is not None and bias.ndim == 2:
            values |= {"bw": bias[0], "bu": bias[1]}
        order = [_KERAS[kind].index(gate) for gate in GATES[kind]]
        values = {part: _reordered(value, order) for part, value in values.items()}
    return CellRecord(kind, *(values.get(part) for part in ("w", "u", "bw", "bu")))


def _side_by_side(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gates of Flax's kernels and biases side by side; a bias that some gates lack is 0 there."""
    letters = {name.partition("/")[0][1:] for name in values}
    gates = next((g for g in GATES.values() if letters == set(g)), "") if letters != {""} else ""
    out = {}
    for side, part in (("i", "w"), ("h", "u")):
        names = [side + gate for gate in gates] or [side]
        if not all(f"{name}/kernel" in values for name in names):
            return {}
        kernels, biases = ([values.get(f"{name}/{what}") for name in names] for what in ("kernel", "bias"))
        out[part] = np.concatenate([kernel for kernel in kernels if kernel is not None], -1)
        if any(bias is not None for bias in biases):
            zero = np.zeros(out[part].shape[-1] // len(names), out[part].dtype)
            out[f"b{part}"] = np.concatenate([zero if bias is None else bias for bias in biases])
    return out


def _reordered(value: np.ndarray, order: list[int]) -> np.ndarray:
    """The gates along the last axis in another order."""
    parts = np.split(value, len(order), -1)
    return np.concatenate([parts[index] for index in order], -1)


def _sum(*biases: Array) -> Array:
    """The sum of what there is; None of nothing."""
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def _to_torch(path: Path, record: CellRecord) -> dict[Path, Array]:
    """The entries of PyTorch; a layer called l0, l1_reverse and so on is one of `nn.LSTM`, others are `nn.LSTMCell`."""
    numbered = bool(path) and re.fullmatch(r"l\d+(_reverse)?", str(path[-1]))
    before, after = (path[:-1], f"_{path[-1]}") if numbered else (path, "")
    bw, bu = record.bw, record.bu
    if bw is not None or bu is not None:  # PyTorch has both or neither
        bw, bu = (np.zeros_like(_sum(bw, bu)) if bias is None else bias for bias in (bw, bu))
    parts = {"weight_ih": record.w.T, "weight_hh": record.u.T, "bias_ih": bw, "bias_hh": bu}
    prefix = ".".join((*map(str, before), ""))
    return {(f"{prefix}{name}{after}",): value for name, value in parts.items() if value is not None}


def _to_flax(where: str, path: Path, record: CellRecord, library: str) -> dict[Path, Array]:
    """The entries of Flax's cells, with one bias where Flax has one."""
    kind, gates, bw, bu = record.kind, GATES[record.kind], record.bw, record.bu
    one_of(f"{where}: kind", kind, tuple(GATES))
    zero = np.zeros_like(record.w[0])  # Flax's cells have a bias always
    if kind == "gru":
        bw, bu = (zero if bias is None else bias for bias in (bw, bu))
        first = np.arange(len(zero)) < 2 * len(zero) // 3  # r and z add both at once
        bw, bu = np.where(first, bw + bu, bw), np.where(first, 0, bu).astype(bu.dtype)
        if library == "nnx" and np.any(bu):
            refuse(where, "a bias of U h for the candidate", "none: nnx's GRUCell has no place for it, linen's has")
    elif kind == "lstm":
        bw, bu = None, _sum(zero, bw, bu)
    else:
        bw, bu = _sum(zero, bw, bu), None
    if library == "nnx":
        parts = {("dense_i", "kernel"): record.w, ("dense_i", "bias"): bw, ("dense_h", "kernel"): record.u}
        parts |= {("dense_h", "bias"): None if kind == "gru" else bu}
        return {(*path, *at): value for at, value in parts.items() if value is not None}
    out: dict[Path, Array] = {}
    for side, kernel, bias in (("i", record.w, bw), ("h", record.u, bu)):
        for index, gate in enumerate(gates):
            name = side + gate if len(gates) > 1 else side
            out["params", *path, name, "kernel"] = np.split(kernel, len(gates), -1)[index]
            if bias is not None and not (kind == "gru" and side == "h" and gate != "n"):
                out["params", *path, name, "bias"] = np.split(bias, len(gates), -1)[index]
    return out
