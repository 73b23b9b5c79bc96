"""Which parameters of a model are meant, by path, and their norms.

Paths are text, `"Dense_0/kernel"`, the same for a linen dictionary, an `nnx.State` and an nnx module. Norms are dictionaries
by path, `{"Dense_0/kernel": norm}`, of float32 or wider.
"""

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax._expect import average
from normjax._expect.arrays import statistics_dtype
from normjax._expect.binding import Plan, axes, bind
from normjax.field import Field, FieldError

Norms = dict[str, jax.Array]
Patterns = str | Iterable[str]


@dataclass(frozen=True)
class Kernels:
    """Which parameters, and what one norm of them is taken over.

    What may be scaled without changing the network depends on the normalizer that follows:

        "... i o"      the whole kernel          layer or RMS norm
        "... i"        each output feature       batch or instance norm
        "... i o/32"   each block of features    group norm

    Layers that `nn.scan` or `nnx.vmap` stacked along a first axis have a norm each with `layout="l ... i o"`.

    Attributes:
      where: None: those called `kernel` that the layout fits. Patterns: `"encoder/*/kernel"`, `"Dense_0"` (all that is
        below it), with shell wildcards, of which those count that the layout fits. A mask: a tree of booleans, or of its
        beginnings, or a function that gives one, as for `optax.masked`.
      output: patterns of what is left out, the output layer, which no normalizer follows; `()` takes it too. A
        transformation wants it said where `where` is None: names do not tell which kernel it is.
      field: what one norm is taken over: whole axes and blocks.
      layout: name of each axis of a kernel, i for inputs and o for output features; `"o i ..."` where these come first.

    Raises:
      FieldError: field and layout do not fit each other.

    >>> params = {"hidden": {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}}
    >>> norms(params, Kernels(field="... i"))
    {'hidden/kernel': Array([5., 1.], dtype=float32)}
    """

    where: Any = None
    _: KW_ONLY
    output: Patterns | None = None
    field: str | Field = "... i o"
    layout: str = "... i o"

    def __post_init__(self):
        spans = Field.parse(self.field).spans
        if any(span.window for span in spans):
            raise FieldError(f'a norm is taken over whole axes and blocks; field "{self.field}" has a window')
        bind(Field.parse(self.field), self.layout, (0,) * len(self.layout.split()))

    def select(self, params: Any, caller: str) -> Norms:
        """The parameters themselves, by path.

        Raises:
          FieldError: a mask takes a parameter that the layout does not fit.
          TypeError: a mask without booleans, or weights that are not floating.
          ValueError: a pattern matches nothing, or nothing is left.
        """
        leaves = by_path(params)
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        if patterns is None:
            chosen = {name for name, w in leaves.items() if name.split("/")[-1] == "kernel" and self._fits(w)}
        elif isinstance(patterns, tuple | list) and all(isinstance(pattern, str) for pattern in patterns):
            chosen = self._matching(patterns, leaves, caller)
        else:
            mask = patterns(params) if callable(patterns) else patterns
            flags = jax.tree.leaves(jax.tree.broadcast(mask, params))
            if wrong := [flag for flag in flags if not isinstance(flag, bool | np.bool_)]:
                raise TypeError(f"{caller}: a mask is made of booleans, found {type(wrong[0]).__name__}")
            chosen = {name for name, flag in zip(leaves, flags, strict=True) if flag}
        chosen -= self._matching(self.output or (), leaves, caller)
        if not chosen:
            raise ValueError(f"{caller}: no parameter is left to work on. {listed(leaves)}")
        for name, w in leaves.items():
            if name in chosen and not jnp.issubdtype(w.dtype, jnp.floating):
                raise TypeError(f"{caller}: the norm of {name!r} is asked for, which has dtype {w.dtype}")
            if name in chosen and not self._fits(w):
                raise FieldError(f'{caller}: layout "{self.layout}" does not fit {name!r}, which has shape {w.shape}')
        return {name: w for name, w in leaves.items() if name in chosen}

    def _matching(self, patterns: Patterns, leaves: Norms, caller: str) -> set[str]:
        """The paths that the patterns stand for, of parameters that the layout fits."""
        found = set()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            here = {name for name in leaves if _matches(name, pattern)}
            fitting = {name for name in here if self._fits(leaves[name])}
            if not fitting:
                what = f'only what layout "{self.layout}" does not fit' if here else "no parameter"
                close = [] if here else difflib.get_close_matches(pattern, leaves, 1, 0.4)
                hint = f"; did you mean {close[0]!r}? " if close else ". "
                raise ValueError(f"{caller}: {pattern!r} matches {what}{hint}{listed(leaves)}")
            found |= fitting
        return found

    def _fits(self, w: jax.Array) -> bool:
        try:
            axes(self.layout, w.ndim)
        except FieldError:
            return False
        return True

    def _whole(self, w: jax.Array) -> tuple[int, ...]:
        """The axes that a norm covers whole."""
        return bind(Field.parse(self.field), self.layout, w.shape).whole

    def squared(self, w: jax.Array) -> jax.Array:
        """The squared norm, of the rank of w, float32 or wider."""
        plan = Plan(bind(Field.parse(self.field), self.layout, w.shape))
        return average.total(lax.square(w.astype(statistics_dtype(w.dtype))), plan)

    def norm(self, w: jax.Array) -> jax.Array:
        """The norm, without the axes that it covers whole."""
        return jnp.squeeze(root(self.squared(w)), self._whole(w))

    def beside(self, norm: jax.Array, w: jax.Array) -> jax.Array:
        """A norm, or one for all, so that it broadcasts against w."""
        return jnp.expand_dims(norm, self._whole(w)) if norm.ndim else norm.reshape((1,) * w.ndim)


def norms(params: Any, kernels: Kernels = Kernels()) -> Norms:
    """The norms of kernels, by path; a record of them is what `scale_by_weight_norm` and `norm_schedule` take.

    Args:
      params: a pytree: linen's parameters, an `nnx.State`, an nnx module. [units w]
      kernels: which; by default all that are called `kernel`, each as a whole.

    Returns:
      Euclidean norms, float32 or wider, without the axes that the field covers whole. [units w]

    Raises:
      FieldError, TypeError, ValueError: see `Kernels.select`.

    >>> norms({"kernel": jnp.array([[3.0], [4.0]], jnp.bfloat16)})
    {'kernel': Array(5., dtype=float32)}
    """
    return {name: kernels.norm(w) for name, w in kernels.select(params, "norms").items()}


def path_name(path: tuple[Any, ...]) -> str:
    """A path as text. An nnx variable and a box of linen end theirs with `value`, which is left out.

    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1.0, {"kernel": 2.0}]})]
    ['a/0', 'a/1/kernel']
    """
    boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return jax.tree_util.keystr(path[:-1] if boxed else path, simple=True, separator="/")


def by_path(tree: Any) -> Norms:
    """The arrays of a tree by path.

    >>> by_path({"dense": {"bias": jnp.zeros(1)}})
    {'dense/bias': Array([0.], dtype=float32)}
    """
    return {path_name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def listed(leaves: Norms) -> str:
    """The first twelve paths and shapes, for errors."""
    shown = ", ".join(f"{name} {leaf.shape}" for name, leaf in list(leaves.items())[:12])
    return f"The parameters are {shown}{', ...' if len(leaves) > 12 else ''}"


def root(squared: jax.Array) -> jax.Array:
    """The square root, with a gradient of 0 at 0."""
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for this path or for a beginning of it."""
    parts = name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[: k + 1]), pattern) for k in range(len(parts)))
