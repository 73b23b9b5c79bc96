"""The rooms of the house: who imports whom, what importing costs, what every file and public name must have."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import normjax

ROOT = Path(__file__).parents[1]
FLAX = ("linen", "nnx", "mesh", "train", "capture")  # the rooms that know Flax
BELOW_LAYERS = {
    *("field", "moments", "theory", "running", "penalty", "layer", "rows", "around", "conditional", "reversible"),
    *("switchable", "gdn", "weights", "spectral", "reparametrize", "selu", "units", "belief", "kalman", "recurrent"),
}
# Each room, and the rooms of the package it may import.
ROOMS = {
    "field": set(),
    "window": set(),
    "moments": {"field", "window"},
    "kernels": {"moments"},
    "order": {"field", "moments"},
    "derivative": {"moments"},
    "theory": {"field", "moments", "kernels", "order", "derivative"},
    "explain": {"field", "order", "theory"},
    "running": {"field", "moments", "theory"},
    "renorm": {"moments", "theory", "running"},
    "seen": {"field", "theory", "running"},
    "penalty": {"field", "moments", "theory"},
    "layer": {"field", "moments", "theory", "running", "renorm", "seen", "penalty"},
    # more normalizers, each of them pure functions
    "gaussian": set(),
    "gain": set(),
    "rows": {"field", "order", "theory", "gaussian"},
    "around": {"field", "moments", "theory", "running", "gaussian", "rows"},
    "dialects": {"moments", "theory", "running"},
    "conditional": {"field", "moments", "theory", "running"},
    "reversible": {"field", "moments", "theory", "conditional"},
    "switchable": {"field", "moments", "theory", "running", "seen", "layer"},
    "gdn": {"field", "moments"},
    "weights": {"field", "moments", "theory", "gain"},
    "spectral": {"field", "moments"},
    "selection": {"field", "moments"},
    "reparametrize": {"field", "moments", "theory", "weights", "selection"},
    "selu": {"moments"},
    "units": {"field", "moments", "theory", "running", "selu"},
    "belief": {"field", "moments", "theory"},
    "kalman": {"field", "moments", "theory", "running", "belief"},
    "recurrent": {"field", "moments", "theory", "running", "penalty", "layer"},
    # what training does to a model, and what normalization does to it
    "projection": {"moments", "selection"},
    "information": {"field", "moments"},
    "similarity": {"field", "moments", "theory", "information"},
    "diagnostics": {"field", "moments", "theory", "running", "selection", "information", "similarity"},
    "capture": {"moments"},
    "_layers": BELOW_LAYERS | {"order", "renorm", "seen"},
    "linen": BELOW_LAYERS | {"seen", "_layers"},
    "nnx": BELOW_LAYERS | {"seen", "_layers"},
    "mesh": set(),
    "train": {"seen", "penalty", "linen", "nnx", "mesh"},
    "interop": set(),
}


def files(room):
    """The file of a room, or the files of its folder."""
    folder = ROOT / "normjax" / room
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


MODULES = [
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for room in ROOMS
    for path in files(room)
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "normjax":
            yield from (f"normjax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_room_is_known():
    modules = {path.stem for path in (ROOT / "normjax").glob("*.py")} - {"__init__"}
    assert modules | {path.parent.name for path in (ROOT / "normjax").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_the_rooms_below_it(room):
    names = [name for path in files(room) for name in imports(path)]
    found = {name.split(".")[1] for name in names if name.startswith("normjax.")}
    assert found <= ROOMS[room] | {room}


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in FLAX])
def test_room_below_the_layers_knows_neither_flax_nor_optax(room):
    names = {name.split(".")[0] for path in files(room) for name in imports(path)}
    allowed = {"optax"} if room == "projection" else set()
    assert not names & {"flax", "optax", "tensorflow_datasets", "experiments"} - allowed


def test_field_needs_the_standard_library_alone():
    assert {name.split(".")[0] for name in imports(ROOT / "normjax" / "field.py")} <= set(sys.stdlib_module_names)


def test_interop_needs_the_standard_library_and_numpy_alone():
    names = {name.split(".")[0] for name in imports(ROOT / "normjax" / "interop.py")}
    assert names - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize("folder", ["normjax", "experiments"])
def test_nothing_imports_from_the_rooms_above(folder):
    above = {"normjax": {"experiments", "notebooks", "tests"}, "experiments": {"notebooks", "tests"}}[folder]
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & above, path


def test_importing_normjax_imports_none_of_flax_optax_pallas_tensorflow_datasets():
    heavy = ("flax", "optax", "tensorflow_datasets", "jax.experimental.pallas")
    code = f"import sys, normjax; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def public_functions_and_classes():
    for module in MODULES:
        for name, thing in vars(module).items():
            mine = getattr(thing, "__module__", None) == module.__name__
            if not name.startswith("_") and mine and (inspect.isfunction(thing) or inspect.isclass(thing)):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", list(public_functions_and_classes()))
def test_public_name_has_a_docstring(thing):
    assert thing.__doc__
    first = thing.__doc__.strip().splitlines()[0]
    assert first.endswith((".", ":", ";", ",", "?"))


@pytest.mark.parametrize("name", normjax.__all__)
def test_exported_function_has_a_doctest(name):
    thing = getattr(normjax, name)
    if inspect.isfunction(thing):
        assert doctest.DocTestParser().get_examples(thing.__doc__ or ""), name


@pytest.mark.parametrize("name", normjax.__all__)
def test_exported_name_is_in_the_readme(name):
    assert name in (ROOT / "README.md").read_text()


def test_every_row_of_the_table_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [row for row in normjax.TABLE if f"`{row}`" not in text] == []
