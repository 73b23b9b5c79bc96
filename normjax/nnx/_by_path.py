"""What a wrapper keeps of the parameters of its layer: variables under the path of each, as text."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from flax.typing import PathParts


def _text(path: PathParts | str) -> str:
    """A path as text; text is one already."""
    return path if isinstance(path, str) else "/".join(map(str, path))


class ByPath(nnx.Dict):
    """Variables by the path of a parameter, which is text, or the tuple that Flax has for a key.

    >>> scales = ByPath({("dense", "kernel"): nnx.Param(jnp.ones(2))})
    >>> list(scales), scales[("dense", "kernel")].shape, ("dense", "bias") in scales
    (['dense/kernel'], (2,), False)
    """

    def __init__(self, variables: Mapping[PathParts, nnx.Variable]):
        super().__init__({_text(path): variable for path, variable in variables.items()})

    def __getitem__(self, key: PathParts | str) -> Any:
        return vars(self)[_text(key)]

    def __setitem__(self, key: PathParts | str, value: Any) -> None:
        setattr(self, _text(key), value)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and _text(key) in vars(self)

    def _graph_node_set_key(self, key: PathParts | str, value: Any) -> None:
        """Takes an entry of a state that is not there under this key, which `nnx.update` brings."""
        held = vars(self).get(_text(key))
        if isinstance(held, nnx.Variable):
            held.set_value(value.get_value() if isinstance(value, nnx.Variable) else value)
        else:
            super()._graph_node_set_key(key, value)
