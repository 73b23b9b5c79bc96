"""normjax: a normalizer is two fields and a few numbers.

Start with `theory.py`. The Flax layers are in `normjax.linen` and `normjax.nnx`, optax training steps in
`normjax.train`; importing normjax itself imports neither Flax nor optax.
"""

from normjax.explain import explain
from normjax.field import Field, FieldError, Span
from normjax.moments import expect
from normjax.order import top
from normjax.penalty import l1_penalty
from normjax.theory import TABLE, Normalized, Normalizer, Stats, normalize

__version__ = "0.1.0"

__all__ = [
    "TABLE",
    "Field",
    "FieldError",
    "Normalized",
    "Normalizer",
    "Span",
    "Stats",
    "expect",
    "explain",
    "l1_penalty",
    "normalize",
    "top",
]
