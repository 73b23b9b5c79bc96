"""Fields bound to arrays: which axes the names of a layout are, which of them a field averages, and how.

Everything here is static: it follows from strings and shapes, and compiled code depends on it alone. Every refusal is a
`FieldError` with a caret under the atom that does not fit.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from normjax.field import REST, Field, FieldError, Span, caret

_LAYOUT_NAME = re.compile(r"\.\.\.|[A-Za-z_]\w*")


@functools.cache
def axes(layout: str, ndim: int) -> dict[str, tuple[int, ...]]:
    """Which axes of an array of `ndim` axes each name of the layout stands for.

    Raises:
      FieldError: the layout cannot be read, or does not fit `ndim`.

    >>> axes("n ... c", 4)
    {'n': (0,), '...': (1, 2), 'c': (3,)}
    """
    names = layout.split() if isinstance(layout, str) else None
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
    found, start = {}, 0
    for name in names:
        stop = start + (rest if name == REST and rest is not None else 1)
        found[name] = tuple(range(start, stop))
        start = stop
    return found


@dataclass(frozen=True)
class Bound:
    """A field bound to an array: its spans by number of axis. Made by `bind`.

    Attributes:
      field: the field.
      shape: shape of the array (of one shard or one mapped example, where axes are mapped).
      spans: (axis number, or None for an axis that is only mapped; the span) for each axis that is averaged.
    """

    field: Field
    shape: tuple[int, ...]
    spans: tuple[tuple[int | None, Span], ...]

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
                size *= min(span.window, length) if span.window else max(length // (span.blocks or 1), min(length, 1))
        return size


@functools.cache
def bind(field: Field, layout: str, shape: tuple[int, ...]) -> Bound:
    """Fits a field to an array.

    `...` that matches no axis is dropped where another atom remains.

    Raises:
      FieldError: the field names an axis that the layout lacks, blocks do not divide, or nothing is left.

    >>> [(axis, str(span)) for axis, span in bind(Field.parse("...:3 c"), "n ... c", (2, 8, 8, 4)).spans]
    [(1, '...:3'), (2, '...:3'), (3, 'c')]
    """
    where = axes(layout, len(shape))
    spans: list[tuple[int | None, Span]] = []
    for span in field.spans:
        if span.axis is None:
            spans.append((None, span))
            continue
        if span.axis not in where and span.axis != REST:
            raise FieldError(
                f'field "{field}" averages over \'{span.axis}\', which layout "{layout}" does not name'
                + caret(str(field), span.axis)
            )
        for axis in where.get(span.axis, ()):
            if span.blocks and not span.mapped and shape[axis] % span.blocks:
                raise FieldError(
                    f"cannot split axis '{span.axis}' of length {shape[axis]} into {span.blocks} equal groups"
                )
            spans.append((axis, span))
    if field.spans and not spans:
        raise FieldError(f'field "{field}" matches no axis of an array of shape {shape}, layout "{layout}"')
    return Bound(field, tuple(shape), tuple(spans))


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
        if self.window == "box":
            return np.ones(len(offsets))
        return np.exp(-0.5 * (offsets / (len(offsets) / 4)) ** 2)


def pooled_and_windowed(plan: Plan) -> tuple[Plan, Plan]:
    """The plan as its pooled part (whole axes, collectives, blocks) and its windows.

    >>> both = pooled_and_windowed(Plan(bind(Field.parse("...:3 c"), "n ... c", (2, 8, 4))))
    >>> [[(axis, str(span)) for axis, span in part.bound.spans] for part in both]
    [[(2, 'c')], [(1, '...:3')]]
    """

    def part(windows: bool) -> Plan:
        spans = tuple((axis, s) for axis, s in plan.bound.spans if bool(s.window) == windows)
        return Plan(Bound(plan.bound.field, plan.bound.shape, spans), plan.border, plan.window, plan.lean)

    return part(False), part(True)
