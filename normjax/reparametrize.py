"""Normalized kernels in models: by path in a tree of parameters, and what the layers of linen and nnx ask for."""

import difflib
import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax import weights
from normjax._expect.arrays import as_weights, require_float, statistics_dtype
from normjax._expect.binding import bind
from normjax._expect.expectation import OverFields, expect
from normjax._expect.ranges import scale_of
from normjax._leaves import integers, inverse_power
from normjax._normalize.evaluate import normalize
from normjax._paths import path_name
from normjax.field import Field, Span
from normjax.theory import Normalizer
from normjax.weights import INPUTS, KERNEL, norm_bound, weight_norm

Weight = Callable[..., jax.Array]  # kernel, and scale where one is learned -> kernel


def reparametrize(params: Any, rules: Mapping[str, Weight]) -> Any:
    """Replaces kernels of a tree of parameters, chosen by path, by functions of themselves.

    Inside of a loss, before the parameters are used: `model.apply({"params": reparametrize(params, rules)}, x)`, and for
    nnx `nnx.merge(structure, reparametrize(params, rules), rest)`. What is trained are the kernels that went in.

    Args:
      params: a linen dictionary, an `nnx.State` or any other pytree of arrays.
      rules: patterns of paths "block/conv1/kernel" and functions kernel -> kernel. `*` matches slashes too, `?`, `[ab]`
        as in `fnmatch`; of several that match a path the first counts, and one that matches none is refused.

    >>> params = {"conv": {"kernel": jnp.ones((4, 1)), "bias": jnp.ones(1)}}
    >>> reparametrize(params, {"*/kernel": weight_norm})["conv"]["kernel"].ravel().tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_name(path) for path, _ in leaves]
    for pattern in rules:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"no parameter has a path like {pattern!r}; the paths are {', '.join(map(repr, paths))}")

    def replaced(path: str, value: Any) -> Any:
        rule = next((rule for pattern, rule in rules.items() if fnmatch.fnmatchcase(path, pattern)), None)
        return value if rule is None else rule(value)

    return structure.unflatten([replaced(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)])


def matching_scale(kernel: ArrayLike, weight: Weight = weight_norm, **options: Any) -> jax.Array:
    """The scale `[o]` that brings a reparametrized kernel nearest to the kernel itself, in least squares for each output.

    For weight norm, bounded or not, it is ||v||, which PyTorch and Hoffer et al. 2018 start from: the layer then computes
    what it did. Float32 or wider. [u over the units of what `weight` gives]

    Args:
      kernel: the initial kernel, `[... i o]` or as the layout of `weight` says. [units u]
      weight: a reparametrization, called without a scale; a constant rho that it needs is 1.
      **options: arguments of `weight`.

    Source: for weight norm Salimans & Kingma 2016, section 2 (g = ||v|| leaves w as it is).

    >>> matching_scale(jnp.array([[3.0, 1.0], [4.0, 0.0]])).tolist()
    [5.0, 1.0]
    """
    kernel = require_float(kernel, "a reparametrization")
    kernel = kernel.astype(statistics_dtype(kernel.dtype))
    weight = functools.partial(weight, **options)
    chosen: dict[str, Any] = {"layout": KERNEL, "field": INPUTS} | _chosen(weight, "layout", "field", "mask")
    w = weight(kernel, rho=1.0) if takes_bound(weight) else weight(kernel)
    along, square = (expect(a * w, **chosen) for a in (kernel, w))
    there = square > 0
    scale = jnp.where(there, along / jnp.where(there, square, 1), 1)
    named = {axis for axis, _ in bind(Field.parse(chosen["field"]), chosen["layout"], kernel.shape).spans}
    return scale.reshape([size for axis, size in enumerate(scale.shape) if axis not in named or size > 1])


def initial_bound(kernel: ArrayLike, weight: Weight, rule: str = "rms", **options: Any) -> jax.Array:
    """The constant `rho` that a reparametrization needs, of the initial kernel: a scalar [u], float32 or wider.

    It is `norm_bound` with the p, fields, layout and mask that the weight was given: with the L1 norms for
    `functools.partial(bounded_weight_norm, p=1)`, as in the code of Hoffer et al. 2018.

    Args:
      kernel: the initial kernel, `[... i o]` or as the layout of `weight` says. [units u]
      weight: `bounded_weight_norm`, or a `functools.partial` of it.
      rule: "rms", the root mean square of the norms of the outputs, or "mean", their mean (see `norm_bound`).
      **options: further arguments of `weight`.

    Source: Hoffer et al. 2018, bounded weight normalization.

    >>> from normjax.weights import bounded_weight_norm
    >>> initial_bound(jnp.array([[3.0], [4.0]]), functools.partial(bounded_weight_norm, p=1)).item()
    7.0
    """
    weight = functools.partial(weight, **options)
    return norm_bound(kernel, rule=rule, **_chosen(weight, "p", "layout", "field", "outputs", "mask"))


def data_dependent_start(
    t: ArrayLike, *, layout: str = "n ... c", field: Field | str = "n ...", mask: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """The scale and the bias of weight norm with which the outputs of a first batch have mean 0 and variance 1.

    They are g = 1 / std[t] [1 / u] and b = -mean[t] / std[t], each `[c]`, float32 or wider; 0 where t is constant.

    Args:
      t: what the layer gives for that batch with scale 1 and bias 0, `[n ... c]` or as the layout says. [units u]
      layout: name of each axis of t.
      field: what one number of the scale and of the bias is shared by.
      mask: booleans or weights that broadcast against t.

    Source: Salimans & Kingma 2016, section 3, equation 6.

    >>> data_dependent_start(jnp.array([[1.0], [5.0]]))
    (Array([0.5], dtype=float32), Array([-1.5], dtype=float32))
    """
    t = require_float(t, "data_dependent_start")
    t = t.astype(statistics_dtype(t.dtype))
    n = Normalizer(field, field, eps=0.0)
    E = OverFields(layout, t.shape, weights=as_weights(mask, t))
    s = scale_of(t, Field.parse(field), E)  # exact, so that squares of small and of large outputs are floats
    stats = normalize(t * s.astype(t.dtype), n, layout, mask=mask).stats
    scale = inverse_power(stats.var, 0.5)
    return (scale * s).ravel(), (-stats.mean * scale.astype(t.dtype)).ravel()


def takes_bound(weight: Weight) -> bool:
    """Whether a reparametrization, or a `functools.partial` of one, still needs its constant `rho`.

    >>> from normjax.weights import bounded_weight_norm
    >>> takes_bound(bounded_weight_norm), takes_bound(weight_norm)
    (True, False)
    """
    if not callable(weight):
        close = difflib.get_close_matches(str(weight), weights.__all__, 1, 0.4)
        raise TypeError(
            f"weight is a function, such as normjax.weights.{close[0] if close else 'weight_norm'}; found {weight!r}"
        )
    rho = inspect.signature(weight).parameters.get("rho")
    return rho is not None and rho.default is inspect.Parameter.empty


def _chosen(weight: Weight, *names: str) -> dict[str, Any]:
    """The values that a reparametrization has for these of its arguments: its defaults, or those of a partial."""
    parameters = inspect.signature(weight).parameters
    return {name: parameters[name].default for name in names if name in parameters}


def by_number(ndim: int, feature_axes: int | Sequence[int] | None) -> tuple[str, Field, tuple[int, ...]]:
    """Flax's feature axes as a layout of so many axes, the field of all others, and their numbers, ascending.

    Feature axes are those that are averaged apart; negative ones count from the end; None averages all together.

    >>> by_number(3, (-1, 0))
    ('a0 a1 a2', Field.parse('a1'), (0, 2))
    """
    numbers = () if feature_axes is None else integers("feature_axes", feature_axes)
    for axis in numbers:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} is out of bounds for a parameter of {ndim} axes")
    features = tuple(sorted({axis % ndim for axis in numbers}))
    field = Field(tuple(Span(f"a{axis}") for axis in range(ndim) if axis not in features))
    return " ".join(f"a{axis}" for axis in range(ndim)), field, features
