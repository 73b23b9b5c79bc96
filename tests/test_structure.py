"""The rules of the house: who imports whom, what importing costs, how long files and functions are, what names say."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normjax

ROOT = Path(__file__).parents[1]
# The rooms of the package from the ground up: each imports only rooms that stand before it.
ROOMS = (
    *("_leaves", "field", "theory", "_expect", "kernels", "_normalize", "_explain"),
    *("_paths", "penalty", "running"),
    # families of methods: pure functions
    *("gaussian", "gain", "batch", "batch_extremes", "response", "tokens", "unbiased", "conditional", "spade"),
    *("reversible", "switchable", "gdn", "selu", "units", "weights", "spectral", "selection", "reparametrize"),
    *("propagate", "kalman", "recurrent"),
    # what normalization does to a network, and checkpoints of other libraries
    *("diagnostics", "interop"),
    # layers, and training
    *("_layers", "linen", "nnx", "flax", "projection", "capture", "train"),
)
FLAX = {"linen", "nnx", "flax", "train", "capture"}
OPTAX = {"train", "projection"}
STRANGERS = ({"linen", "nnx"},)  # rooms that never import each other
LINES = {
    "normjax/theory.py": 218
}  # the budget of a file, where it is another than its folder's; without TABLE, which grows
FOLDERS = {"normjax": 300, "experiments": 350}
FUNCTION = 50  # lines of a function without its docstring
PUBLIC = {
    *("TABLE", "Field", "FieldError", "Normalized", "Normalizer", "Span", "Stats", "__version__"),
    *("expect", "explain", "l1_penalty", "normalize", "top"),
    *(
        "batch",
        "batch_extremes",
        "capture",
        "conditional",
        "diagnostics",
        "gain",
        "gaussian",
        "gdn",
        "interop",
        "kalman",
    ),
    *(
        "flax",
        "kernels",
        "linen",
        "nnx",
        "projection",
        "propagate",
        "recurrent",
        "reparametrize",
        "response",
        "reversible",
    ),
    *(
        "running",
        "selection",
        "selu",
        "spade",
        "spectral",
        "switchable",
        "tokens",
        "train",
        "unbiased",
        "units",
        "weights",
    ),
}


def files(room):
    """The file of a room, or the files of its folder."""
    folder = ROOT / "normjax" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "normjax":
            yield from (f"normjax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def libraries(path):
    return {name.split(".")[0] for name in imports(path)}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


# Who imports whom.


def test_every_room_is_known():
    modules = {path.stem for path in (ROOT / "normjax").glob("*.py")} - {"__init__"}
    assert modules | {path.parent.name for path in (ROOT / "normjax").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_the_rooms_below_it(room):
    below = set(ROOMS[: ROOMS.index(room) + 1])
    for path in files(room):
        found = {name.split(".")[1] for name in imports(path) if name.startswith("normjax.")}
        assert found <= below, path
        assert not any({room} < {room, other} <= pair for pair in STRANGERS for other in found - {room}), path
        known = libraries(path) & {"flax", "optax"}
        assert known <= ({"flax"} if room in FLAX else set()) | ({"optax"} if room in OPTAX else set()), path


def test_theory_knows_no_evaluation():
    found = {name for name in imports(ROOT / "normjax" / "theory.py") if name.startswith("normjax")}
    assert found <= {"normjax._leaves", "normjax.field"}


def test_field_needs_the_standard_library_alone():
    assert libraries(ROOT / "normjax" / "field.py") <= set(sys.stdlib_module_names)


def test_interop_needs_the_standard_library_and_numpy_alone():
    names = set().union(*(libraries(path) for path in files("interop")))
    assert names - set(sys.stdlib_module_names) - {"normjax"} == {"numpy"}


def test_nothing_imports_from_the_rooms_above():
    for folder, above in (("normjax", {"experiments", "notebooks", "tests"}), ("experiments", {"notebooks", "tests"})):
        for path in sources(folder):
            assert not libraries(path) & above, path


# What importing costs and shows.


def test_importing_normjax_imports_none_of_flax_optax_pallas_and_shows_the_rooms_of_users():
    heavy = ("flax", "optax", "tensorflow_datasets", "jax.experimental.pallas")
    code = f"import sys, normjax; print([m for m in {heavy} if m in sys.modules]); print(*dir(normjax))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, shown = out.stdout.splitlines()
    assert loaded == "[]"
    assert set(shown.split()) == PUBLIC
    assert all(getattr(normjax, name) is not None for name in PUBLIC)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'normjax' has no attribute 'wieghts'"):
        getattr(normjax, "wieghts")  # noqa: B009


# How long a file and a function may be.


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", sources("normjax", "experiments"), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_fit_the_head(path):
    name = str(path.relative_to(ROOT))
    text = path.read_text()
    table = sum(_length(node) for node in ast.parse(text).body if ast.unparse(node).startswith("TABLE"))
    assert len(text.splitlines()) - table <= LINES.get(name, FOLDERS[name.split("/")[0]])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            said = ast.get_docstring(node) is not None
            lines = _length(node) - (_length(first) if said else 0)
            assert lines <= FUNCTION, node.name


# What is said of public names.


def public_things():
    """Functions and classes that a user can name, once each: of public files, and what these offer of private ones."""
    seen = set()
    for room in ("__init__", *ROOMS):
        for path in files(room):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if any(part.startswith("_") and part != "__init__" for part in parts):
                continue
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            for name, thing in vars(module).items():
                home = getattr(thing, "__module__", None) or ""
                mine = home == module.__name__ or (name in getattr(module, "__all__", ()) and "._" in home)
                known = name.startswith("_") or not mine or not (inspect.isfunction(thing) or inspect.isclass(thing))
                if not known and thing not in seen:
                    seen.add(thing)
                    yield pytest.param(name, thing, id=f"{module.__name__}.{name}")


THINGS = list(public_things())
METHODS = {f"normjax.{room}" for room in ROOMS[ROOMS.index("running") : ROOMS.index("interop")]}
NO_PAPER = {  # names of these rooms that no paper has: what is carried, checks, helpers for layers
    *(
        "BatchRecord",
        "Slot",
        "PublishedAveraging",
        "as_stats",
        "initial",
        "mean_of_parts",
        "mergeable",
        "merge_into",
        "record",
        "slots",
    ),
    *("require_renormalizable", "require_unbiased", "stores"),
    *("Belief", "Filtered", "activate", "as_wide", "standard_deviation"),
    *("Kalman", "logit", "require_gain", "require_kalman_row", "Mixed", "require_mixable", "storing", "weights_of"),
    *("Clock", "Site", "Weights", "advance", "choose_sites", "hand_over", "mean_over_time", "needs_clock", "pack"),
    *("penalty_axes", "restart", "start_clock", "unpack", "valid", "with_lengths"),
    *("by_number", "reparametrize", "takes_bound", "Spectral"),
}
ELLIPTICAL = re.compile(r": (the same|as there|as for `[\w.]+`|see there)[.;,]?$", re.MULTILINE)


@pytest.mark.parametrize(("name", "thing"), THINGS)
def test_public_name_is_documented(name, thing):
    text = thing.__doc__ or ""
    first = text.strip().splitlines()[0] if text else ""
    assert first.endswith((".", ":", "?")), first
    assert not ELLIPTICAL.search(text)
    if ".".join(thing.__module__.split(".")[:2]) in METHODS:
        assert ("Source" in text) == (name not in NO_PAPER)
    if inspect.isfunction(thing):
        assert doctest.DocTestParser().get_examples(text)
        arguments = [p for p in inspect.signature(thing).parameters if not p.startswith("_")]
        if "Args:" in text:
            said = re.findall(r"^ +\*{0,2}(\w+)(?:, (\w+))*:", text[text.index("Args:") :], re.MULTILINE)
            assert {a for a in arguments} <= {word for words in said for word in words if word}


@pytest.mark.parametrize("name", normjax.__all__)
def test_exported_name_is_in_the_readme(name):
    assert name in (ROOT / "README.md").read_text()
