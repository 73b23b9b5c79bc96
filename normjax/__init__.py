"""normjax: a normalizer is two fields and a few numbers.

Start with `theory.py`. The Flax layers are in `normjax.linen` and `normjax.nnx`, optax training steps in
`normjax.train`; importing normjax itself imports neither Flax nor optax.
"""

from normjax._expect.expectation import expect
from normjax._explain import explain
from normjax._normalize.evaluate import Normalized, normalize
from normjax.field import Field, FieldError, Span
from normjax.penalty import l1_penalty
from normjax.theory import TABLE, Normalizer, Stats, top

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
