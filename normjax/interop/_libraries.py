"""The tables of the libraries: where each keeps what, its names and defaults; its paths; and how it is refused."""

from collections.abc import Hashable, Iterable
from typing import NamedTuple, NoReturn, TypeAlias

from normjax._leaves import one_of

KINDS = ("batch", "layer", "group", "instance", "rms")
AVERAGING = ("exponential", "debiased", "cumulative")
FOREVER = 2**30  # updates after which nothing is left of a debiasing; a step more still fits int32

Path: TypeAlias = tuple[Hashable, ...]  # the keys of an entry, one of each dictionary

# The address of each part of a layer; * is the path of the layer.
_ADDRESSES = {
    "linen": "scale=params/*/scale bias=params/*/bias mean=batch_stats/*/mean var=batch_stats/*/var "
    "mean_count=batch_stats/*/mean_count var_count=batch_stats/*/var_count",
    "nnx": "scale=*/scale bias=*/bias mean=*/mean var=*/var mean_count=*/mean_count var_count=*/var_count",
    "torch": "scale=*/weight bias=*/bias mean=*/running_mean var=*/running_var count=*/num_batches_tracked",
    "keras": "scale=*/gamma rms_scale=*/scale bias=*/beta mean=*/moving_mean var=*/moving_variance",
    "haiku": "scale=params/*/scale bias=params/*/offset "
    "mean=state/*/~/mean_ema/average mean_sum=state/*/~/mean_ema/hidden mean_count=state/*/~/mean_ema/counter "
    "var=state/*/~/var_ema/average var_sum=state/*/~/var_ema/hidden var_count=state/*/~/var_ema/counter",
    "equinox": "scale=*/weight bias=*/bias sums=*/batch_state_index count=*/batch_counter "
    "averages=*/ema_state_index first=*/ema_first_time_index",
}
ADDRESSES = {library: dict(word.split("=") for word in words.split()) for library, words in _ADDRESSES.items()}
COLLECTIONS = {"linen": ("params", "batch_stats"), "haiku": ("params", "state")}
# What else `read` and `write` can be told.
READS = {"linen": ("averaging",), "nnx": ("averaging",), "torch": ("elements",)}
WRITES = {**READS, "haiku": ("shape",), "equinox": ("mode",)}


class _Numbers(NamedTuple):
    """How a library names its numbers, and their defaults."""

    epsilon: str  # the name of what is added to the variance
    momentum: str  # the name of the weight of an update: of the new value in torch, else of the old one
    batch: float  # default epsilon of batch norm
    rms: float  # of RMS norm
    other: float  # of the other kinds
    default: float | None  # momentum as the library means it; None where it must be said: averages depend on it


_NUMBERS = {
    "linen": _Numbers("epsilon", "momentum", 1e-5, 1e-6, 1e-6, 0.99),
    "nnx": _Numbers("epsilon", "momentum", 1e-5, 1e-6, 1e-6, 0.99),
    "torch": _Numbers("eps", "momentum", 1e-5, 2.0**-23, 1e-5, 0.1),
    "keras": _Numbers("epsilon", "momentum", 1e-3, 1e-6, 1e-3, 0.99),
    "haiku": _Numbers("eps", "decay_rate", 1e-5, 1e-5, 1e-5, None),
    "equinox": _Numbers("eps", "momentum", 1e-5, 1e-5, 1e-5, None),
}


def numbers_of(library: str) -> _Numbers:
    """The names and defaults of a library; refuses one that is not known."""
    one_of("library", library, tuple(_NUMBERS))
    return _NUMBERS[library]


def joined(path: Path, library: str) -> str:
    """A path with slashes, in every library."""
    return "/".join(map(str, path)).replace("." if library == "torch" else "/", "/")


def keys_of(address: str, library: str) -> Path:
    """The keys under which a library keeps an address, numbers as text."""
    if library in ("torch", "keras"):
        return (address.replace("/", "." if library == "torch" else "/"),)
    names = address.split("/")
    if library == "haiku":  # modules are one key, with its slashes
        return names[0], "/".join(names[1:-1]), names[-1]
    return tuple(names)


def locate(path: Path, library: str) -> tuple[str, str]:
    """The layer that an entry belongs to, and which part it is; a slash and the entry's name where it is none."""
    text = joined(path, library)
    for part, address in ADDRESSES[library].items():
        before, after = address.split("*/")
        if text.startswith(before) and f"/{text[len(before) :]}".endswith(f"/{after}"):
            return text[len(before) : -len(after)].removesuffix("/"), part
    for collection in COLLECTIONS.get(library, ()):
        text = text.removeprefix(f"{collection}/")
    layer, _, name = text.rpartition("/")
    return layer, f"/{name}"


def listed(names: Iterable[object]) -> str:
    """Names for a sentence."""
    return ", ".join(map(repr, names))


def refuse(where: str, found: str, accepted: str) -> NoReturn:
    """Says what was found and what is accepted."""
    raise ValueError(f"{where}: found {found}; accepted: {accepted}")
