"""Says in words, with numbers, what a normalizer averages with what."""

import math

from normjax._expect.binding import axes, bind
from normjax.field import Field
from normjax.theory import Normalizer, row, top


def explain(normalizer: Normalizer | str, shape: tuple[int, ...], layout: str = "n ... c") -> str:
    """Says what is averaged with what when an array of this shape is normalized.

    Args:
      normalizer: a Normalizer or the name of a row of TABLE.
      shape: shape of the array, axes as named by `layout`.
      layout: name of each axis.

    Raises:
      FieldError: the fields do not fit the layout or the shape.

    >>> print(explain("group", (8, 32, 32, 64)))
    Normalizer('... c/32', '... c/32') on an array of shape (8, 32, 32, 64), layout "n ... c":
      centre  subtract the mean of 2048 elements: all 32 x 32 of axis '...', the block of 2 of axis 'c' that it is in
              256 means, one for each of: 8 of axis 'n', 32 blocks of axis 'c'
      divide  by (1e-05 + m) ** 0.5, m the mean of |v| ** 2 over the same elements
    >>> print(explain("response", (8, 32, 32, 64)))
    Normalizer(None, 'c:5', eps=2.0, gain=0.0005, power=0.75, border='zero') on an array of shape (8, 32, 32, 64), \
layout "n ... c":
      centre  nothing: v = x
      divide  by (2.0 + 0.0005 m) ** 0.75, m the mean of |v| ** 2 over 5 elements: a box of 5 of axis 'c' around it; \
past the edge it counts zeros
              524288 moments, one for each of: 8 of axis 'n', 32 x 32 of axis '...', 64 of axis 'c'
    """
    n, shape = row(normalizer), tuple(int(size) for size in shape)
    lines = [f'{n} on an array of shape {tuple(shape)}, layout "{layout}":']
    if n.mean is None:
        lines.append("  centre  nothing: v = x")
    else:
        lines += _sentence(n, n.mean, "  centre  subtract the mean of ", "means", shape, layout)
    if n.var is None:
        lines.append("  divide  by nothing: y = " + ("x" if n.keep_mean else "v"))
    else:
        gain = "" if n.gain == 1 else f"{n.gain} "
        kind = f"the mean of |v| ** {n.order}"
        if isinstance(n.order, top):
            kind = f"the mean of the {n.order.k} largest |v|"
        elif n.order == math.inf:
            kind = "the largest |v|"
        start = f"  divide  {'x ' if n.keep_mean else ''}by ({n.eps} + {gain}m) ** {n.power}, m {kind} over "
        if n.var == n.mean:
            lines.append(start + "the same elements")
        else:
            lines += _sentence(n, n.var, start, "moments", shape, layout)
    if n.floor is not None:
        lines += _sentence(n, n.floor, "  floor   the denominator is at least its mean over ", "means", shape, layout)
    return "\n".join(lines)


def _sentence(n: Normalizer, field: Field, start: str, noun: str, shape, layout: str) -> list[str]:
    """Two lines: which elements one average takes, and how many averages there are."""
    bound = bind(field, layout, tuple(shape))
    parts, apart, past_edge = [], [], ""
    for name, numbers in axes(layout, len(bound.shape)).items():
        if not numbers:
            continue
        spans = [span for axis, span in bound.spans if axis in numbers]
        sizes = [bound.shape[axis] for axis in numbers]
        if not spans:
            apart.append(f"{_times(sizes)} of axis '{name}'")
            continue
        span, across = spans[0], f", over the shards along '@{spans[0].mapped}'" if spans[0].mapped else ""
        if span.whole:
            parts.append(f"all {_times(sizes)} of axis '{name}'{across}")
        elif span.blocks:
            inside = [size // span.blocks for size in sizes]
            parts.append(f"the block of {_times(inside)} of axis '{name}' that it is in{across}")
            apart.append(f"{_times([span.blocks] * len(sizes))} blocks of axis '{name}'")
        else:
            parts.append(f"a {n.window} of {_times([span.window] * len(sizes))} of axis '{name}' around it{across}")
            apart.append(f"{_times(sizes)} of axis '{name}'")
            past_edge = "; past the edge it counts zeros" if n.border == "zero" else "; past the edge there is nothing"
    parts += [f"everything along the mapped axis '@{s.mapped}'" for _, s in bound.spans if s.axis is None]
    mapped = " on each shard or mapped example" if field.mapped else ""
    element = "element" if bound.reach() == 1 else "elements"
    lines = [f"{start}{bound.reach()} {element}{mapped}: {', '.join(parts)}{past_edge}"]
    if apart:
        averaged = dict(bound.spans)
        counts = [
            averaged[i].blocks or 1 if i in averaged and not averaged[i].window else size
            for i, size in enumerate(bound.shape)
        ]
        lines.append(f"          {math.prod(counts)} {noun}, one for each of: {', '.join(apart)}")
    return lines


def _times(sizes) -> str:
    return " x ".join(str(size) for size in sizes)
