"""Constants of Gaussian data, which make a moment of another order a standard deviation (Hoffer et al. 2018)."""

import functools
import math

import numpy as np

from normjax._leaves import COUNT


def gaussian_moment(p: float) -> float:
    """E|z| ** p of a standard normal z, 2 ** (p / 2) * gamma((p + 1) / 2) / sqrt(pi).

    Source: Hoffer et al. 2018, section 4, for p = 1.

    >>> round(gaussian_moment(1) ** -1, 7), round(gaussian_moment(4), 7)     # sqrt(pi / 2)
    (1.2533141, 3.0)
    """
    return 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)


@functools.cache
def gaussian_largest(size: int, k: int = 1, *, signed: bool = False) -> float:
    """The expected mean of the k largest |z| (or z, if `signed`) of `size` standard normal z, to 1e-9, by quadrature.

    Source: order statistics of independent draws; what Hoffer et al. 2018, section 4, bound.

    >>> gaussian_largest(1) == gaussian_largest(8, 8)                        # E|z|, sqrt(2 / pi)
    True
    >>> round(gaussian_largest(3, signed=True), 6)                           # 3 / (2 sqrt(pi))
    0.846284
    """
    k, size = COUNT("k", k), COUNT("size", size)
    if k > size:
        raise ValueError(f"k is within 1 and size={size}; found {k}")
    if k == size:
        return 0.0 if signed else math.sqrt(2 / math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges = np.linspace(0, 12.8, 65)
    t = ((nodes + 1) * 0.1 + edges[:-1, None]).ravel()
    tail = np.array([math.erfc(s / math.sqrt(2)) for s in t])
    # The j-th largest exceeds t if at least j do: their number is binomial, and E min(number, k) is integrated over t.
    if signed:
        total = _expected_of_k(size, k, tail / 2, 1 - tail / 2) + _expected_of_k(size, k, 1 - tail / 2, tail / 2) - k
    else:
        total = _expected_of_k(size, k, tail, 1 - tail)
    return float((total * np.tile(weights, 64)).sum() * 0.1 / k)


def _expected_of_k(size: int, k: int, chance: np.ndarray, other: np.ndarray) -> np.ndarray:
    """E min(B, k) for the binomial number B of `size` trials; `other` is 1 - chance, without its rounding."""
    log, log_not = np.log(chance), np.where(chance < 0.5, np.log1p(-np.minimum(chance, 0.5)), np.log(other))
    ways, short = 0.0, np.zeros(chance.shape)
    for i in range(k):
        short += (k - i) * np.exp(ways + i * log + (size - i) * log_not)
        ways += math.log((size - i) / (i + 1))
    return k - short


def bounds_constant(size: int) -> float:
    """The published constant C(n) of L-infinity and top-k batch norm, (1 + sqrt(pi ln 4)) / (2 sqrt(2 ln n)), n = `size`.

    It is the mean of the reciprocals of two bounds of the expected maximum, not of the maximum: see `top_batch`.

    Source: Hoffer et al. 2018, section 4.

    >>> round(bounds_constant(1024), 4)
    0.4145
    """
    size = COUNT("size", size)
    if size < 2:
        raise ValueError(f"the constant needs at least 2 elements; found size={size}")
    return (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(size)))
