"""Weight norm and spectral norm in checkpoints: of PyTorch, in both of its spellings, and of the wrappers of linen and nnx.

    records, rest = read_weights(model.state_dict(), "torch")
    variables = write_weights({"WeightNorm_0": records["conv1"]}, "linen")
    layer = normjax.linen.WeightNorm(nn.Conv(8, (3, 3)), feature_axes=records["conv1"].feature_axes, epsilon=0.0)

PyTorch keeps `weight_g` and `weight_v`, or `parametrizations.weight.original0` and `original1`, of weight norm; and
`weight_orig`, `weight_u`, `weight_v`, or `parametrizations.weight.original`, `.0._u`, `.0._v`, of spectral norm. Its axes
come in another order: a Linear's `[o, i]` is Flax's `[i, o]`, a Conv's `[o, i, h, w]` is `[h, w, i, o]`, and a
ConvTranspose's `[i, o, h, w]` is `[h, w, o, i]`, which `nn.ConvTranspose` takes with `transpose_kernel=True`. PyTorch's
`dim=0` is the feature axis -1, `dim=1` is -2, and `dim=None` is None, one norm for all.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from normjax._leaves import one_of
from normjax.interop._boxes import as_text, flatten, like_neighbours, nest, unboxed
from normjax.interop._checks import check_entries
from normjax.interop._layer import Array, Options, said_of
from normjax.interop._libraries import refuse
from normjax.interop._weight import WeightRecord, keepdims, rows, sigma
from normjax.interop.convert import Entries

LIBRARIES = ("torch", "linen", "nnx")
_SPELLINGS = {  # of PyTorch: the entries of (weight norm's scale and kernel), (spectral norm's kernel, u and v)
    "hooks": (("{}_g", "{}_v"), ("{}_orig", "{}_u", "{}_v")),
    "parametrizations": (
        ("parametrizations.{}.original0", "parametrizations.{}.original1"),
        ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
    ),
}


def read_weights(
    entries: Entries, library: str, layers: Options | None = None
) -> tuple[dict[str, WeightRecord], dict[Any, Any]]:
    """Reads the normalized weights of a checkpoint: WeightRecords by the path of the layer, and the rest.

    A weight of PyTorch with another name than `weight` lies under "layer/name". In linen and nnx the layers are the wrappers
    `WeightNorm` and `SpectralNorm` around one layer with a kernel.

    Args:
      entries: the checkpoint as `normjax.interop.read` takes it.
      library: "torch", "linen" or "nnx".
      layers: patterns of paths, and what the lengths do not say: `feature_axes`, where several axes have the length of the
        scale or of u (then the last, or of two that spectral norm may mean that of the larger sigma, by default).

    Source: `torch.nn.utils.weight_norm`, `spectral_norm` and those of `torch.nn.utils.parametrizations`.

    >>> state = {"fc.weight_g": np.array([[10.0]]), "fc.weight_v": np.array([[3.0, 4.0]]), "fc.bias": np.zeros(1)}
    >>> records, rest = read_weights(state, "torch")
    >>> records["fc"].kernel.shape, records["fc"].weight().ravel().tolist(), rest
    ((2, 1), [6.0, 8.0], {})
    """
    one_of("library", library, LIBRARIES)
    check_entries(entries, library)
    flat, came = {}, {}
    for path, value in flatten(entries, library != "torch"):
        at = tuple(map(as_text, path)) if library == "nnx" else path
        flat[at], came[at] = value, path
    found = _find_torch(flat) if library == "torch" else _find_flax(flat, library)
    records = {}
    for layer, (record, paths) in found.items():
        where = f"{library} layer {layer!r}"
        values = {part: _numbers(where, part, unboxed(flat[path])) for part, path in paths.items()}
        said = said_of(layers or {}, layer)
        records[layer] = _finished(where, replace(record, **values), said, library)
    for _, paths in found.values():
        for path in paths.values():
            flat.pop(path, None)
    return records, nest({came[at]: value for at, value in flat.items()})


def write_weights(
    records: Mapping[str, WeightRecord], library: str, layers: Options | None = None, rest: Entries | None = None
) -> dict[Any, Any]:
    """The checkpoint with these weights, of new arrays, in the form that `read_weights` takes.

    Args:
      records: WeightRecords by path, slashes between names; rename layers by renaming keys.
      library: "torch", "linen" or "nnx".
      layers: patterns of paths, and what is not said: for "torch" `spelling`, "parametrizations" or "hooks" (default: as it
        was read); for "linen" `beside`, the name of a wrapped layer that was made in the caller's compact method, such as
        "Dense_0", whose parameters lie beside the wrapper's and not in it.
      rest: entries in the library's own form to lay beside, such as those that `read_weights` returned.

    Source: `torch.nn.utils.weight_norm`, `spectral_norm` and those of `torch.nn.utils.parametrizations`.

    >>> record = WeightRecord("weight", np.ones((2, 3)), np.ones(3), bias=np.zeros(3))
    >>> write_weights({"out": record}, "linen")["params"]["out"].keys()
    dict_keys(['layer_instance', 'layer_instance/kernel/scale'])
    >>> list(write_weights({"out": record}, "torch"))
    ['out.parametrizations.weight.original0', 'out.parametrizations.weight.original1', 'out.bias']
    """
    one_of("library", library, LIBRARIES)
    flat = dict(flatten(rest or {}, library != "torch"))
    others = list(flat)
    for layer, record in records.items():
        said = said_of(layers or {}, layer)
        place = _to_torch(layer, record, said) if library == "torch" else _to_flax(layer, record, said, library)
        for path, value in place.items():
            path = path if library == "torch" else like_neighbours(path, others, library == "nnx")
            if path in flat:
                refuse(f"{library} layer {layer!r}", f"the entry {path!r} in the rest too", "one of the two")
            flat[path] = np.array(value)
    return nest(flat)


Paths = dict[str, tuple[Any, ...]]


def _find_torch(flat: Mapping[tuple[Any, ...], Any]) -> dict[str, tuple[WeightRecord, Paths]]:
    """Where PyTorch keeps which part, by layer."""
    found = {}
    for (key,) in flat:
        for spelling, (norm, spectral) in _SPELLINGS.items():
            for kind, names, parts in (
                ("weight", norm, ("scale", "kernel")),
                ("spectral", spectral, ("kernel", "u", "v")),
            ):
                match = re.fullmatch(r"(?:(.*)\.)?" + re.escape(names[0]).replace(r"\{\}", r"([^.]+)"), str(key))
                if match is None:
                    continue
                layer, name = match[1] or "", match[2]
                before = f"{layer}." if layer else ""
                paths = {part: (before + one.format(name),) for part, one in zip(parts, names, strict=True)}
                if all(path in flat for path in paths.values()):
                    bias = (f"{before}bias",)
                    paths |= {"bias": bias} if name == "weight" and bias in flat else {}
                    called = "/".join(filter(None, (layer.replace(".", "/"), "" if name == "weight" else name)))
                    found[called] = WeightRecord(kind, None, name=name, spelling=spelling), paths
    return found


def _find_flax(flat: Mapping[tuple[Any, ...], Any], library: str) -> dict[str, tuple[WeightRecord, Paths]]:
    """Where the wrappers of Flax, and ours, keep which part, by layer."""
    found = {}
    for path in flat:
        wrapper, name = (
            path[:-1],
            str(path[-1]),
        )  # the wrapper ends with its attribute in nnx, begins with a collection here
        if library == "nnx":
            kind = {("scales", "kernel"): "weight", ("batch_stats", "kernel/u"): "spectral"}.get((*wrapper[-1:], name))
            layer, prefix = wrapper[:-1], ""
            inner = (*layer, "layer_instance")
        else:
            prefix, _, part = name.rpartition("kernel/")
            kind = {("params", "scale"): "weight", ("batch_stats", "u"): "spectral"}.get((*wrapper[:1], part))
            layer, instance = wrapper[1:], prefix.removesuffix("/").split("/")
            own = ("params", *layer, *instance)  # of a layer that the wrapper was given as an attribute; or beside it
            inner = own if (*own, "kernel") in flat else ("params", *layer[:-1], *instance)
        if not kind or (*inner, "kernel") not in flat:
            continue
        sigma = (*wrapper, f"{prefix}kernel/sigma")
        paths = {"scale": path} if kind == "weight" else {"u": path, "sigma": sigma}
        paths |= {"kernel": (*inner, "kernel")} | ({"bias": (*inner, "bias")} if (*inner, "bias") in flat else {})
        found["/".join(map(str, layer))] = WeightRecord(kind, None), paths
    return found


def _finished(where: str, record: WeightRecord, said: Mapping[str, Any], library: str) -> WeightRecord:
    """A record with Flax's axes, of arrays as the library keeps them."""
    kernel, torch = np.asarray(record.kernel), library == "torch"
    if kernel.ndim < 2:
        refuse(where, f"a weight of shape {kernel.shape}", "two axes or more")
    axes = (*range(2, kernel.ndim), 1, 0) if torch else tuple(range(kernel.ndim))
    kernel = np.transpose(kernel, axes)
    length = np.size(record.scale if record.kind == "weight" else record.u)
    scalar = record.kind == "weight" and np.ndim(record.scale) == 0
    fits = [axis - kernel.ndim for axis in range(kernel.ndim) if kernel.shape[axis] == length][::-1]
    if torch and record.kind == "weight" and not scalar:  # its shape says the axis, but where the length is one
        fits = [axis for axis in fits if record.scale.shape == keepdims(kernel.shape, axis, axes)] or fits
    if "feature_axes" in said:
        feature = said["feature_axes"]
    elif scalar:
        feature = None
    elif not fits:
        refuse(where, f"{length} numbers for a kernel of shape {kernel.shape}", "as many as an axis has")
    else:
        feature = (
            fits[0] if record.kind == "weight" or not torch else max(fits[:2], key=lambda a: sigma(kernel, a, record))
        )
    record = replace(record, kernel=kernel.copy(), feature_axes=feature)
    if record.kind == "weight":
        return replace(record, scale=np.reshape(record.scale, () if feature is None else (-1,)))
    u = np.reshape(record.u, -1)
    return replace(record, u=u, sigma=sigma(kernel, feature, record) if torch else record.sigma)


def _numbers(where: str, part: str, value: Any) -> np.ndarray:
    array = np.array(value)
    if array.dtype.kind not in "fV":
        refuse(where, f"{part} of dtype {array.dtype}", "an array of floating numbers")
    return array


def _to_torch(layer: str, record: WeightRecord, said: Mapping[str, Any]) -> dict[tuple[Any, ...], Array]:
    """The entries of PyTorch's state_dict."""
    spelling = said.get("spelling", record.spelling)
    one_of(f"torch layer {layer!r}: spelling", spelling, tuple(_SPELLINGS))
    kernel = np.asarray(record.kernel)
    ndim, name = kernel.ndim, record.name
    theirs = np.transpose(kernel, (ndim - 1, ndim - 2, *range(ndim - 2)))
    layer = layer.removesuffix(name).removesuffix("/") if name != "weight" else layer
    before = f"{layer.replace('/', '.')}." if layer else ""
    norm, spectral = _SPELLINGS[spelling]
    if record.kind == "weight":
        axes = (*range(2, ndim), 1, 0)
        shape = () if record.feature_axes is None else keepdims(kernel.shape, record.feature_axes, axes)
        values = dict(zip(norm, (np.reshape(record.scale, shape), theirs), strict=True))
    else:
        v = rows(kernel, record.feature_axes).T @ record.u if record.v is None else record.v
        v = v / max(np.linalg.norm(v), 1e-12) if record.v is None else v
        values = dict(zip(spectral, (theirs, record.u, v), strict=True))
    bias = {} if record.bias is None else {(f"{before}bias",): record.bias}
    return {(before + key.format(name),): value for key, value in values.items()} | bias


def _to_flax(layer: str, record: WeightRecord, said: Mapping[str, Any], library: str) -> dict[tuple[Any, ...], Array]:
    """The entries of a wrapper of linen or nnx."""
    where = f"{library} layer {layer!r}"
    if record.name != "weight":
        refuse(where, f"the weight {record.name!r}", "a layer's `weight`")
    path = tuple(layer.split("/")) if layer else ()
    beside = said.get("beside") if library == "linen" else None
    inner = (*path, "layer_instance") if beside is None else (*path[:-1], beside)
    held = {"kernel": record.kernel} | ({} if record.bias is None else {"bias": record.bias})
    more = {"scale": record.scale} if record.kind == "weight" else {}
    stats = {} if more else {"u": np.reshape(record.u, (1, -1)), "sigma": record.sigma}
    if library == "nnx":
        out = {(*inner, name): value for name, value in held.items()}
        out |= {(*path, "scales", "kernel"): value for value in more.values()}
        return out | {(*path, "batch_stats", f"kernel/{name}"): value for name, value in stats.items()}
    called = "layer_instance" if beside is None else beside
    out = {("params", *inner, name): value for name, value in held.items()}
    out |= {("params", *path, f"{called}/kernel/{name}"): value for name, value in more.items()}
    return out | {("batch_stats", *path, f"{called}/kernel/{name}"): value for name, value in stats.items()}
