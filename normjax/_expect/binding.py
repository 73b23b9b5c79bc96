"""Fields bound to arrays: which axes the names of a layout are, which of them a field averages, and how.

Everything here is static: it follows from strings and shapes, and compiled code depends on it alone.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from normjax._expect.sizes import divides, is_known, max_dim, min_dim, said
from normjax.field import EXAMPLES, REST, Field, FieldError, Span, caret
from normjax.theory import TABLE

_LAYOUT_NAME = re.compile(r"\.\.\.|[A-Za-z_]\w*")


def axes(layout: str, ndim: int) -> dict[str, tuple[int, ...]]:
    """Which axes of an array of `ndim` axes each name of the layout stands for."""
    return _axes(as_layout(layout), ndim)


def as_layout(layout: object) -> str:
    """The layout; FieldError for what is no string, which could not be looked up in a cache either."""
    if not isinstance(layout, str):
        raise FieldError(f'a layout names axes, as "n ... c" does; found {layout!r}')
    return layout


@functools.cache
def _axes(layout: str, ndim: int) -> dict[str, tuple[int, ...]]:
    names = layout.split()
    if not names or not all(_LAYOUT_NAME.fullmatch(name) for name in names):
        raise FieldError(f'a layout names axes, as "n ... c" does; found {layout!r}')
    for i, name in enumerate(names):
        if name in names[:i]:
            raise FieldError(f"layout \"{layout}\" names '{name}' twice" + caret(layout, name, last=True))
    rest = ndim - len(names) + 1 if REST in names else None
    if (rest is None and ndim != len(names)) or (rest is not None and rest < 0):
        count = len(names) if rest is None else f"at least {len(names) - 1}"
        noun = "axis" if count in (1, "at least 1") else "axes"
        raise FieldError(f'layout "{layout}" names {count} {noun}, but the array has {ndim}')
    numbers = iter(range(ndim))
    return {name: tuple(itertools.islice(numbers, rest if name == REST else 1)) for name in names}


@dataclass(frozen=True)
class Bound:
    """A field bound to an array: its spans by number of axis. Made by `bind`."""

    field: Field
    shape: tuple[int, ...]  # of the array, or of one shard or mapped example of it
    spans: tuple[tuple[int | None, Span], ...]  # by axis number, None for an axis that is only mapped

    def by(self, kind: str) -> Iterator[tuple[int, Span]]:
        """The (axis, span) pairs of one kind: "whole", "blocks" or "window"."""
        for axis, span in self.spans:
            if axis is not None and (span.whole if kind == "whole" else getattr(span, kind)):
                yield axis, span

    @property
    def whole(self) -> tuple[int, ...]:
        """Axes that are averaged from end to end, on this shard."""
        return tuple(axis for axis, _ in self.by("whole"))

    @property
    def pooled(self) -> bool:
        """Whether the field is made of whole axes and blocks alone: equal fields are then the same set."""
        return not any(True for _ in self.by("window"))

    @property
    def collectives(self) -> tuple[tuple[str, tuple[tuple[int, ...], ...] | None], ...]:
        """(mapped axis, index groups) of every span that is averaged whole over a mapped axis."""
        return tuple(dict.fromkeys((s.mapped, s.groups) for _, s in self.spans if s.mapped and s.whole))

    def reach(self) -> int:
        """The largest number of elements of this array that the field holds around one of them."""
        size = 1
        for axis, span in self.spans:
            if axis is not None:
                length = self.shape[axis]
                inside = max_dim(length // (span.blocks or 1), min_dim(length, 1))
                size *= min_dim(span.window, length) if span.window else inside
        return size


def bind(field: Field, layout: str, shape: tuple[int, ...]) -> Bound:
    """Fits a field to an array. `...` that matches no axis is dropped where another atom remains."""
    return _bind(field, as_layout(layout), tuple(shape))


@functools.cache
def _bind(field: Field, layout: str, shape: tuple[int, ...]) -> Bound:
    where = axes(layout, len(shape))
    spans: list[tuple[int | None, Span]] = []
    for span in field.spans:
        if span.axis is None:
            spans.append((None, span))
            continue
        if span.axis not in where and span.axis != REST:
            unnamed = f'field "{field}" averages over \'{span.axis}\', which layout "{layout}" does not name'
            error = FieldError(unnamed + caret(str(field), span.axis))
            if span.axis == EXAMPLES:
                error.add_note('examples that jax.vmap maps over are "@n", with jax.vmap(..., axis_name="n")')
            raise error
        for axis in where.get(span.axis, ()):
            if span.blocks and not span.mapped and not divides(span.blocks, shape[axis]):
                uneven = (
                    f"axis '{span.axis}' of length {said(shape[axis], span.blocks)} into {span.blocks} equal groups"
                )
                error = FieldError(f"cannot split {uneven}")
                for note in _other_blocks(field, span, shape[axis]):
                    error.add_note(note)
                raise error
            spans.append((axis, span))
    if field.spans and not spans:
        raise FieldError(f'field "{field}" matches no axis of an array of shape {shape}, layout "{layout}"')
    return Bound(field, tuple(shape), tuple(spans))


def _other_blocks(field: Field, span: Span, length: int) -> Iterator[str]:
    """For a row of TABLE whose number of blocks does not divide this length: one that does, as the user may write it."""
    if not is_known(length):
        return
    best = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
    spans = tuple(replace(s, blocks=best if best > 1 else None) if s == span else s for s in field.spans)
    for name, row in TABLE.items():
        if field in row.fields:
            made = replace(row, **{k: Field(spans) for k in ("mean", "var", "floor") if getattr(row, k) == field})
            yield f"row {name!r} has {span.blocks} groups; a row of your own has others: {made}"


@dataclass(frozen=True)
class Plan:
    """A bound field and what its windows do: static, so that compiled code depends on it alone."""

    bound: Bound
    border: str = "truncate"
    window: str = "box"
    lean: str = "after"

    def extent(self, span: Span) -> tuple[int, int]:
        """How many elements the window takes before and after its own."""
        short, long = ((span.window or 1) - 1) // 2, (span.window or 1) // 2
        return (short, long) if self.lean == "after" else (long, short)

    def taps(self, span: Span) -> np.ndarray:
        """The weights within the window, by offset: ones, or a Gaussian of standard deviation width / 4."""
        before, after = self.extent(span)
        offsets = np.arange(-before, after + 1)
        return np.ones(len(offsets)) if self.window == "box" else np.exp(-0.5 * (offsets / (len(offsets) / 4)) ** 2)


def pooled_and_windowed(plan: Plan) -> tuple[Plan, Plan]:
    """The plan as its pooled part (whole axes, collectives, blocks) and its windows."""
    parts = [tuple(s for s in plan.bound.spans if bool(s[1].window) == windows) for windows in (False, True)]
    pooled, windowed = (replace(plan, bound=replace(plan.bound, spans=spans)) for spans in parts)
    return pooled, windowed
