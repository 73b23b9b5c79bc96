"""What `linen` and `nnx` have in common: one normalization with running statistics, and Flax's arguments read as fields.

The modules hold parameters and statistics; this file decides which statistics an application uses and what it leaves
behind, and translates the arguments of Flax's layers (axes by number, groups, axis names) into a normalizer and a layout.
It imports no Flax.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax import moments
from normjax.field import Field, FieldError, Span, axes
from normjax.running import BatchRecord, Running, as_stats, corrections, mergeable, record, require_renormalizable
from normjax.theory import Normalized, Normalizer, Stats, affine, equation, normalize, top

Axes = int | Sequence[int]
NOTHING = Running()  # no stored statistics


class Applied(NamedTuple):
    """The output of a layer, the statistics to store, what it saw of the batch (None: nothing to store), and v."""

    y: jax.Array
    running: Running
    seen: BatchRecord | None
    centered: jax.Array


def apply(
    x: ArrayLike,
    normalizer: Normalizer,
    layout: str,
    running: Running = NOTHING,
    *,
    refuse: bool,
    use_running: bool = False,
    update_running: bool = True,
    momentum: ArrayLike = 0.0,
    averaging: str = "exponential",
    unbiased: bool = False,
    renorm: tuple[ArrayLike, ArrayLike] | None = None,
    measured: Stats | None = None,
    dtype: Any = None,
    **given: Any,
) -> Applied:
    """Normalizes with the stored statistics, or with the batch's, which then update the stored ones.

    `refuse` asks for the checks of `normalize`; `renorm` are the limits of batch renormalization; `measured` are
    statistics of the batch that the row itself does not take (a range), with their weights; `given` are scale, bias, mask
    and eps.
    """
    x = moments.as_floating(x, "a layer")
    if not refuse and isinstance(normalizer.order, top):  # while initializing, there may be fewer than k elements
        normalizer = dataclasses.replace(normalizer, order=math.inf)
    stats = as_stats(running, normalizer, layout, x.shape) if use_running else measured
    x = promoted(x, dtype) if refuse else x
    dtype = jnp.dtype(dtype or x.dtype)
    if renorm is not None:
        require_renormalizable(normalizer, renorm)
    training = not use_running and any(stored is not None for stored in running)
    if training and renorm is not None:
        out = _renormalize(x, normalizer, layout, running, renorm, refuse, dtype, stats, **given)
    elif refuse:
        out = normalize(x, normalizer, layout, stats=stats, **given)
        out = out._replace(y=out.y.astype(dtype))
    else:
        out = equation(x, normalizer, layout, stats=stats, dtype=dtype, **given)
    if not (training and update_running):
        return Applied(out.y, running, None, out.centered)
    return remember(out, running, normalizer, layout, momentum, averaging, unbiased)


def remember(
    out: Normalized,
    running: Running,
    normalizer: Normalizer,
    layout: str,
    momentum: ArrayLike,
    averaging: str = "exponential",
    unbiased: bool = False,
) -> Applied:
    """What an application to a training batch leaves: the statistics to store from now on, and what the layer saw.

    >>> from normjax import TABLE
    >>> out = normalize(jnp.array([[1.0], [3.0]]), "batch")
    >>> remember(out, Running(jnp.zeros(1), jnp.ones(1)), TABLE["batch"], "n c", 0.5).running.mean
    Array([1.], dtype=float32)
    """
    given = {"momentum": momentum, "averaging": averaging, "unbiased": unbiased, "exact": mergeable(normalizer, layout)}
    return Applied(out.y, *record(running, out.stats, normalizer, layout, out.y.shape, **given), out.centered)


def _renormalize(
    x: jax.Array, normalizer: Normalizer, layout: str, running: Running, limits: tuple, refuse: bool, dtype: Any,
    stats: Stats | None, *, scale: Any = None, bias: Any = None, mask: Any = None, eps: Any = None,
) -> Normalized:  # fmt: skip
    """Batch renormalization: r * y + d in place of y, zero where masked."""
    wide = x.astype(moments.wide(x.dtype))
    out = (normalize if refuse else equation)(wide, normalizer, layout, stats=stats, mask=mask, eps=eps)
    r, d = corrections(out.stats, running, normalizer, layout, x.shape, limits, eps)
    y = moments.silence(r * out.y + d, moments.weigh(mask, wide))
    return out._replace(y=affine(y, layout, scale, bias).astype(dtype))


def promoted(x: jax.Array, dtype: Any) -> jax.Array:
    """The array in a dtype wide enough for an output of this dtype; None leaves it.

    >>> promoted(jnp.ones(2, jnp.bfloat16), jnp.float32).dtype, promoted(jnp.ones(2), jnp.bfloat16).dtype
    (dtype('float32'), dtype('float32'))
    """
    with jax.numpy_dtype_promotion("standard"):
        return x if dtype is None else x.astype(jnp.promote_types(x.dtype, dtype))


def channel_shape(layout: str, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shape of a learned scale or bias: one number for each index of the axis `c`.

    Raises:
      FieldError: the layout names no channels.

    >>> channel_shape("n c ...", (8, 64, 32, 32))
    (64,)
    """
    where = axes(layout, len(shape))
    if "c" not in where:
        raise FieldError(f"a learned scale or bias lies along axis 'c', which layout \"{layout}\" does not name; "
                         "use_scale=False, use_bias=False goes without")  # fmt: skip
    return (shape[where["c"][0]],)


def same_channels(features: int, layout: str, shape: tuple[int, ...]) -> None:
    """Raises FieldError unless arrays of this shape have so many channels.

    >>> same_channels(3, "n c", (8, 4))
    Traceback (most recent call last):
    ...
    normjax.field.FieldError: a layer made for 3 features cannot take an input of shape (8, 4)
    """
    if channel_shape(layout, shape) != (features,):
        raise FieldError(f"a layer made for {features} features cannot take an input of shape {shape}")


def whole_shape(features: int | Sequence[int], layout: str) -> tuple[int | None, ...]:
    """The shape of an input as far as `features` tells it: all of it, or the number of channels.

    >>> whole_shape(64, "n ... c"), whole_shape((8, 32, 32, 64), "n ... c")
    ((None, None, 64), (8, 32, 32, 64))
    """
    if not isinstance(features, int):
        return tuple(features)
    return tuple(features if name == "c" else None for name in layout.split())


# Flax's arguments as fields. Axes go by number there, so the layout names them by number: "a0 a1 a2".


class Reading(NamedTuple):
    """Flax's arguments, read for an array of one rank."""

    normalizer: Normalizer
    layout: str
    features: tuple[int, ...]  # the axes along which scale and bias differ, ascending


def positive(ndim: int, numbers: Axes) -> tuple[int, ...]:
    """Axes as positive numbers, each once, ascending.

    >>> positive(4, (-1, 1, 3))
    (1, 3)
    """
    listed = tuple(numbers) if isinstance(numbers, Iterable) else (numbers,)
    for axis in listed:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} is out of bounds for an array of {ndim} axes")
    return tuple(sorted({axis % ndim for axis in listed}))


def read(
    ndim: int,
    reduced: Axes,
    features: Axes,
    epsilon: float,
    *,
    axis_name: str | Sequence[str] | None = None,
    groups: Any = None,
    centre: bool = True,
    blocks: int | None = None,
) -> Reading:
    """Flax's axes as a normalizer: average over `reduced` (the last one in blocks, if asked) and over `axis_name`.

    >>> read(4, (1, 2, 3), -1, 1e-6, blocks=8)
    Reading(normalizer=Normalizer('a1 a2 a3/8', 'a1 a2 a3/8', eps=1e-06), layout='a0 a1 a2 a3', features=(3,))
    """
    reduced = positive(ndim, reduced)
    spans = [Span(f"a{axis}") for axis in reduced]
    if blocks is not None:
        spans[-1] = Span(f"a{reduced[-1]}", blocks=blocks)
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    index_groups = tuple(tuple(int(i) for i in group) for group in groups) if groups is not None and names else None
    field = Field((*spans, *(Span(None, mapped=name, groups=index_groups) for name in names)))
    normalizer = Normalizer(field if centre else None, field, eps=epsilon)
    return Reading(normalizer, " ".join(f"a{i}" for i in range(ndim)), positive(ndim, features))


def group_count(channels: int, num_groups: int | None, group_size: int | None, noun: str = "channels") -> int:
    """The number of groups, from Flax's two arguments.

    Raises:
      ValueError: neither or both are given, or the channels do not divide.

    >>> group_count(64, 32, None), group_count(64, None, 8)
    (32, 8)
    """
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "Either `num_groups` or `group_size` should be specified. If `group_size` is to be specified, pass "
            "`num_groups=None` as argument to override the default `num_groups` value of 32."
        )
    if group_size is not None:
        if group_size <= 0 or channels % group_size:
            raise ValueError(f"Number of {noun} ({channels}) is not multiple of the group size ({group_size}).")
        return channels // group_size
    if not isinstance(num_groups, int) or num_groups <= 0 or channels % num_groups:
        raise ValueError(f"Number of groups ({num_groups}) does not divide the number of channels ({channels}).")
    return num_groups


def group_axes(ndim: int, reduction_axes: Axes | None) -> tuple[int, ...]:
    """The axes that group norm averages over; the last must be the channels.

    Raises:
      ValueError: the last axis is missing.
    """
    reduced = positive(ndim, [*range(1, ndim - 1), -1] if reduction_axes is None else reduction_axes)
    if not reduced or reduced[-1] != ndim - 1:
        raise ValueError(
            "The reduction axes must include the final dimension as this is assumed to be the feature axis."
        )
    return reduced


def instance_axes(ndim: int, feature_axes: Axes) -> tuple[int, ...]:
    """The axes that instance norm averages over: all but the first and the features.

    Raises:
      ValueError: the features include the first axis.
    """
    features = positive(ndim, feature_axes)
    if 0 in features:
        raise ValueError(
            "The channel axes cannot include the leading dimension as this is assumed to be the batch axis."
        )
    return tuple(axis for axis in range(1, ndim) if axis not in features)


def flax_input(x: ArrayLike, dtype: Any) -> jax.Array:
    """The array x as Flax's layers take it: integers become floats, and a wider `dtype` widens the work."""
    x = jnp.asarray(x)
    with jax.numpy_dtype_promotion("standard"):
        work = jnp.promote_types(x.dtype if dtype is None else dtype, jnp.float32)
    if jnp.issubdtype(x.dtype, jnp.inexact) and moments.wide(x.dtype) == work:
        return x
    return x.astype(work)


def beside(p: jax.Array | None, features: tuple[int, ...], x: jax.Array) -> jax.Array | None:
    """A parameter of Flax's shape, laid along its feature axes.

    Raises:
      FieldError: the parameter has another size than those axes.
    """
    if p is not None and p.size != math.prod(x.shape[axis] for axis in features):
        raise FieldError(f"a layer made for {p.size} features cannot take an input of shape {x.shape}")
    return None if p is None else p.reshape([n if axis in features else 1 for axis, n in enumerate(x.shape)])
