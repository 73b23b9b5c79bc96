"""The field language: a short string that says which elements are averaged together.

A *layout* names the axes of an array, `"n ... c"`; `...` stands for every axis left unnamed. A *field* is a
product of atoms over those names:

    c         the whole axis                      c:5      a sliding window of 5 centred on the element
    c/32      its block, of 32 equal ones         @n       a mapped axis of examples (vmap, shard_map, pmap)
    ...:5     the same on every unnamed axis      c@model  an axis whose shards lie along a mapped axis

Strings are parsed once into frozen values, `Field` and `Span`; `_expect/binding.py` binds them to a layout and a shape
when an array is at hand. This file knows no arrays; every refusal is a `FieldError`.
"""

import functools
import operator
import re
from dataclasses import dataclass

EXAMPLES = "n"  # the axis of examples has this name in every layout
REST = "..."
WIDEST = 2**24  # elements of a window: the weights of one are laid out in memory

_ATOM = re.compile(
    r"(?:(?P<axis>\.\.\.|[A-Za-z_]\w*)(?::(?P<window>[1-9]\d*)|/(?P<blocks>[1-9]\d*))?)?(?:@(?P<mapped>[A-Za-z_]\w*))?"
)


class FieldError(ValueError):
    """A field, a layout and an array that do not fit together."""


@dataclass(frozen=True)
class Span:
    """One atom of a field: what is averaged along one axis.

    Attributes:
      axis: a name of the layout, `"..."` for every unnamed axis, or None for an axis that is only mapped (`@n`).
      window: width of a sliding window, or None.
      blocks: number of equal blocks, or None. Neither window nor blocks: the whole axis.
      mapped: name of the mapped axis along which the shards of `axis` (or the examples) lie, or None.
      groups: index groups of the mapped axis to combine separately, as in `jax.lax.psum`; has no string form.

    >>> str(Span("c", blocks=32)), str(Span("h", window=5, mapped="rows")), str(Span(None, mapped="n"))
    ('c/32', 'h:5@rows', '@n')
    """

    axis: str | None
    window: int | None = None
    blocks: int | None = None
    mapped: str | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(tuple(map(operator.index, group)) for group in self.groups))
        if self.axis is None and self.mapped is None:
            raise FieldError("a span needs an axis, a mapped axis, or both")
        if self.window is not None and self.blocks is not None:
            raise FieldError(f"a span is a window or blocks of axis {self.axis!r}, not both")
        for name, size in (("window", self.window), ("blocks", self.blocks)):
            number = _integer(size)  # NumPy's become Python's, with which spans hash, pickle and show themselves
            if size is not None and (number is None or number < 1):
                raise FieldError(f"{name} of axis {self.axis!r} must be an integer of at least 1, found {size!r}")
            object.__setattr__(self, name, number)
        if self.window is not None and self.window > WIDEST:
            raise FieldError(
                f"window of axis {self.axis!r} is at most {WIDEST} wide, found {self.window}; {self.axis!r} alone takes the "
                "whole axis"
            )
        if self.axis is None and (self.window or self.blocks):
            raise FieldError(f"mapped axis '@{self.mapped}' is averaged whole: no window, no blocks")

    @property
    def whole(self) -> bool:
        """Whether the span covers its axis from end to end."""
        return self.window is None and self.blocks is None

    @property
    def mixes_examples(self) -> bool:
        """Whether the span averages over different examples: an atom `n` or `@n`."""
        return self.axis is None or self.axis == EXAMPLES

    def __str__(self) -> str:
        size = f":{self.window}" if self.window else f"/{self.blocks}" if self.blocks else ""
        return f"{self.axis or ''}{size}" + (f"@{self.mapped}" if self.mapped else "")


def _integer(size: object) -> int | None:
    """An integer of Python or NumPy as Python's, None for anything else."""
    try:
        return None if isinstance(size, bool) else operator.index(size)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


@dataclass(frozen=True)
class Field:
    """A product of spans: the set of elements around each element that are averaged together.

    >>> Field.parse("...:5 c")
    Field.parse('...:5 c')
    >>> Field.parse("n c/4").spans
    (Span(axis='n', window=None, blocks=None, mapped=None, groups=None), \
Span(axis='c', window=None, blocks=4, mapped=None, groups=None))
    """

    spans: tuple[Span, ...]

    def __post_init__(self):
        object.__setattr__(self, "spans", tuple(self.spans))
        if not all(isinstance(span, Span) for span in self.spans):
            raise FieldError(f"a Field is built of Spans; for a string use Field.parse: found {self.spans!r}")
        names = [n for s in self.spans for n in (s.axis, s.mapped and "@" + s.mapped) if n is not None]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise FieldError(f'field "{self}" names {name!r} twice' + caret(str(self), name, last=True))

    @classmethod
    def parse(cls, text: "str | Field") -> "Field":
        """Reads a field; a Field passes through.

        >>> Field.parse("h:5 w:-5 c")
        Traceback (most recent call last):
        ...
        normjax.field.FieldError: cannot read this as axis, axis:window or axis/groups
            h:5 w:-5 c
                ^^^^
        """
        return text if isinstance(text, Field) else _parse(text)

    @property
    def mixes_examples(self) -> bool:
        """Whether statistics over this field depend on other examples, so that inference needs stored ones."""
        return any(span.mixes_examples for span in self.spans)

    @property
    def mapped(self) -> tuple[str, ...]:
        """Names of the mapped axes that the field averages over."""
        return tuple(span.mapped for span in self.spans if span.mapped)

    def local(self) -> "Field | None":
        """The part that one shard or one mapped example sees; None if nothing is left."""
        spans = tuple(Span(s.axis, s.window, s.blocks) for s in self.spans if s.axis is not None)
        return Field(spans) if spans else None

    def __str__(self) -> str:
        return " ".join(map(str, self.spans))

    def __repr__(self) -> str:
        if not self.spans or any(span.groups for span in self.spans):
            return f"Field({self.spans!r})"
        return f"Field.parse({str(self)!r})"


class Parsed:
    """An attribute of a dataclass: it is given a Field, its string or None, and holds a Field or None.

    >>> @dataclass(frozen=True)
    ... class Pair:
    ...     one: Parsed = Parsed()
    ...     two: Parsed = Parsed(None)  # with a default
    >>> Pair("c")
    Pair(one=Field.parse('c'), two=None)
    """

    def __init__(self, *default: Field | str | None):
        self.default = tuple(None if value is None else Field.parse(value) for value in default)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        owner.__annotations__[name] = Field | str | None  # what `help` says of the constructor

    def __get__(self, instance: object | None, owner: type) -> Field | None:
        if instance is not None:
            return instance.__dict__[self.name]
        if not self.default:
            raise AttributeError(self.name)  # a dataclass reads from this that there is no default
        return self.default[0]

    def __set__(self, instance: object, value: Field | str | None) -> None:
        instance.__dict__[self.name] = None if value is None else Field.parse(value)


@functools.cache
def _parse(text: str) -> Field:
    if not isinstance(text, str):
        raise FieldError(f"a field is a string or a Field, found {type(text).__name__}")
    if not text.strip():
        raise FieldError("an empty field averages nothing; use None to skip the step")
    spans = []
    for atom in re.finditer(r"\S+", text):
        match = _ATOM.fullmatch(atom.group())
        if match is None:
            marker = " " * (4 + atom.start()) + "^" * len(atom.group())
            raise FieldError(f"cannot read this as axis, axis:window or axis/groups\n    {text}\n{marker}")
        window, blocks = (int(match[k]) if match[k] else None for k in ("window", "blocks"))
        spans.append(Span(match["axis"], window, blocks, match["mapped"]))
    return Field(tuple(spans))


def caret(text: str, name: str, last: bool = False) -> str:
    """Two lines for an error: the text, and a mark under its first (or last) atom that speaks of `name`.

    >>> print("no axis w here:" + caret("h w:3", "w"))
    no axis w here:
        h w:3
          ^^^
    """
    atoms = [m for m in re.finditer(r"\S+", text) if name in re.split(r"[:/]|(?=@)", m.group())]
    if not atoms:
        return ""
    atom = atoms[-1 if last else 0]
    return f"\n    {text}\n" + " " * (4 + atom.start()) + "^" * len(atom.group())
