"""Which parameters of a model are meant, by path, and their norms.

Paths are text, `"Dense_0/kernel"`, alike for a linen dictionary, an `nnx.State` and an nnx module. Norms are
dictionaries by path, of float32 or wider. `normjax.projection` shows both names too; this room needs no optax.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax._expect import average, extremes
from normjax._expect.arrays import statistics_dtype
from normjax._expect.binding import Bound, Plan, axes, bind
from normjax._expect.ranges import towards_one
from normjax._leaves import safe_root
from normjax._paths import ByPath, arrays_by_path, paths_and_shapes
from normjax.field import Field, FieldError

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

    Source: which scales a normalizer does not see: Lyle et al. 2024 (whole kernels), Hoffer et al. 2018 (features).

    >>> params = {"hidden": {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}}
    >>> norms(params, Kernels(field="... i"))
    {'hidden/kernel': Array([5., 1.], dtype=float32)}
    """

    where: object = None
    _: KW_ONLY
    output: Patterns | None = None
    field: str | Field = "... i o"
    layout: str = "... i o"

    def __post_init__(self):
        spans = Field.parse(self.field).spans
        if any(span.window for span in spans):
            raise FieldError(f'a norm is taken over whole axes and blocks; field "{self.field}" has a window')
        self._bound((0,) * len(self.layout.split()))

    def select(self, params: object, caller: str) -> ByPath:
        """The parameters themselves, {path: array}, in the order of the tree.

        `params` is any pytree; errors begin with `caller`: a FieldError where a mask takes what the layout does not fit,
        a TypeError for a mask without booleans or weights that are not floating, a ValueError where nothing matches.

        >>> params = {"hidden": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
        >>> list(Kernels(output="head").select(params, "example"))
        ['hidden/kernel']
        """
        leaves = arrays_by_path(params)
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        if patterns is None:
            chosen = {name for name, w in leaves.items() if name.split("/")[-1] == "kernel" and self._fits(w)}
        elif isinstance(patterns, tuple | list) and all(isinstance(pattern, str) for pattern in patterns):
            chosen = self._matching(patterns, leaves, caller)
        else:
            mask = patterns(params) if callable(patterns) else patterns
            flags = _flags(mask, params, leaves, caller)
            if wrong := [flag for flag in flags if not isinstance(flag, bool | np.bool_)]:
                raise TypeError(f"{caller}: a mask is made of booleans, found {type(wrong[0]).__name__}")
            chosen = {name for name, flag in zip(leaves, flags, strict=True) if flag}
        chosen -= self._matching(self.output or (), leaves, caller)
        if not chosen:
            raise ValueError(f"{caller}: no parameter is left to work on. {paths_and_shapes(leaves)}")
        for name, w in leaves.items():
            if name in chosen and not jnp.issubdtype(w.dtype, jnp.floating):
                raise TypeError(f"{caller}: the norm of {name!r} is asked for, which has dtype {w.dtype}")
            if name in chosen and not self._fits(w):
                raise FieldError(f'{caller}: layout "{self.layout}" does not fit {name!r}, which has shape {w.shape}')
        return {name: w for name, w in leaves.items() if name in chosen}

    def squared_norm(self, w: jax.Array) -> jax.Array:
        """The squared norm of one kernel that the layout fits, of its rank: length 1 on axes that the field covers whole.

        >>> Kernels(field="... i").squared_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]]))
        Array([[25.,  1.]], dtype=float32)
        """
        return lax.square(self.wide_norm(w))

    def wide_norm(self, w: jax.Array) -> jax.Array:
        """The norm of one kernel that the layout fits, of its rank: length 1 on axes that the field covers whole.

        Slope 0 at 0. Squares are taken of the kernel times a power of two, so that its size is no matter.

        >>> Kernels(field="... i").wide_norm(jnp.array([[3e-30, 0.0], [4e-30, 1e30]]))
        Array([[5.e-30, 1.e+30]], dtype=float32)
        """
        w, plan = w.astype(statistics_dtype(w.dtype)), Plan(self._bound(w.shape))
        s = towards_one(extremes.pooled_maximum(lax.stop_gradient(jnp.abs(w)), plan))
        return safe_root(average.total(lax.square(w * s), plan)) / s

    def norm(self, w: jax.Array) -> jax.Array:
        """The Euclidean norm of one kernel, float32 or wider, slope 0 at 0: a scalar for "... i o", `[o]` for "... i".

        >>> Kernels(field="... i").norm(jnp.array([[3.0, 0.0], [4.0, 1.0]]))
        Array([5., 1.], dtype=float32)
        """
        return jnp.squeeze(self.wide_norm(w), self._bound(w.shape).whole)

    def align_norm(self, norm: jax.Array, w: jax.Array) -> jax.Array:
        """A norm, of the shape that `norm` gives or a scalar for all, so that it broadcasts against the kernel.

        >>> Kernels(field="... i").align_norm(jnp.array([5.0, 1.0]), jnp.ones((3, 3, 4, 2))).shape
        (1, 1, 1, 2)
        """
        return jnp.expand_dims(norm, self._bound(w.shape).whole) if norm.ndim else norm.reshape((1,) * w.ndim)

    def _bound(self, shape: tuple[int, ...]) -> Bound:
        """The field on a kernel of this shape."""
        return bind(Field.parse(self.field), self.layout, shape)

    def _matching(self, patterns: Patterns, leaves: ByPath, caller: str) -> set[str]:
        """The paths that the patterns stand for, of parameters that the layout fits."""
        found = set()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            here = {name for name in leaves if _matches(name, pattern)}
            fitting = {name for name in here if self._fits(leaves[name])}
            if not fitting:
                what = f'only what layout "{self.layout}" does not fit' if here else "no parameter"
                close = [] if here else difflib.get_close_matches(pattern, leaves, 1, 0.4)
                hint = f"; did you mean {close[0]!r}? " if close else ". "
                raise ValueError(f"{caller}: {pattern!r} matches {what}{hint}{paths_and_shapes(leaves)}")
            found |= fitting
        return found

    def _fits(self, w: jax.Array) -> bool:
        try:
            axes(self.layout, w.ndim)
        except FieldError:
            return False
        return True


def _flags(mask: object, params: object, leaves: ByPath, caller: str) -> list[object]:
    """What a mask says of each parameter; ValueError for a mask that is no beginning of the tree."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(mask, params))
    except (ValueError, TypeError, KeyError):
        found = ", ".join(map(repr, arrays_by_path(mask))) if isinstance(mask, Mapping) else repr(mask)
        raise ValueError(
            f"{caller}: a mask says True or False for every parameter, or for whole beginnings of the tree; found one of "
            f"{found}; patterns such as where='Dense_0' name some alone. {paths_and_shapes(leaves)}"
        ) from None


def norms(params: object, kernels: Kernels = Kernels()) -> ByPath:
    """The norms of kernels, {path: Euclidean norm}; their record is what `scale_by_weight_norm` and `norm_schedule` take.

    Args:
      params: a pytree: linen's parameters, an `nnx.State`, an nnx module. [units w]
      kernels: which, and what one norm is taken over: scalars for "... i o", `[o]` for "... i", float32 or wider.

    Source: Hoffer et al. 2018 record them of a run with weight decay.

    >>> norms({"kernel": jnp.array([[3.0], [4.0]], jnp.bfloat16)})
    {'kernel': Array(5., dtype=float32)}
    """
    return {name: kernels.norm(w) for name, w in kernels.select(params, "norms").items()}


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for this path or for a beginning of it."""
    parts = name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[: k + 1]), pattern) for k in range(len(parts)))
