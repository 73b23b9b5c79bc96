"""Rows by the unbiased variance, with the division by n - 1 that PyTorch's `var` has by default."""

import dataclasses

from normjax._leaves import COUNT, INTEGER
from normjax.theory import Normalizer, row


def with_ddof(normalizer: Normalizer | str, size: int, ddof: int = 1) -> Normalizer:
    """The row with the gain size / (size - ddof): a variance over `size` elements becomes unbiased.

    Args:
      normalizer: a row that divides by a variance, or its name in TABLE.
      size: number of elements of its field.
      ddof: what is subtracted from `size`, the "delta degrees of freedom" of NumPy.

    Source: the division by n - 1 of PyTorch's `var`.

    >>> from normjax import TABLE
    >>> with_ddof(TABLE["instance"], 16).gain
    1.0666666666666667
    """
    size, ddof = COUNT("size", size), INTEGER("ddof", ddof)
    if not size > ddof:
        raise ValueError(f"size is more than ddof={ddof}; found {size}")
    normalizer = row(normalizer)
    return dataclasses.replace(normalizer, gain=normalizer.gain * size / (size - ddof))


def unbiased_group(groups: int, size: int, *, eps: float = 1e-5) -> Normalizer:
    """Group norm by the unbiased variance of groups of `size` elements, positions * channels of a group.

    With one group it is not layer norm, and with a group for each channel not instance norm, by sqrt((size - 1) / size).

    Args:
      groups: number of groups of channels.
      size: elements of a group, positions * channels.
      eps: added to the variance. [units of x squared]

    Source: the code of Lubana et al. 2021.

    >>> unbiased_group(2, 5)
    Normalizer('... c/2', '... c/2', gain=1.25)
    """
    field = f"... c/{COUNT('groups', groups)}"
    return with_ddof(Normalizer(field, field, eps=eps), size)
