"""Names that a module of Flax offers late: submodules nobody has imported yet, and what its own `__getattr__` knows."""

import importlib
from collections.abc import Callable
from types import ModuleType


def late(flax: ModuleType) -> Callable[[str], object]:
    """A `__getattr__` for the namespace that stands for this module of Flax."""

    def found(name: str) -> object:
        try:
            return getattr(flax, name)
        except AttributeError as error:
            if not name.startswith("_"):
                try:
                    return importlib.import_module(f"{flax.__name__}.{name}")
                except ImportError:
                    pass
            raise error

    return found
