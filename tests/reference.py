"""The obvious code that the fast code is compared with: averaging matrices in NumPy float64, and the equation on them.

A field is a product of spans, so it is one L x L matrix of weights per axis; an average is a matrix product per axis.
Everything here is dense and slow, and shares nothing with the package but the parsed field.
"""

import math

import numpy as np

from normjax.field import Field


def where(layout, ndim):
    names = layout.split()
    rest = ndim - len(names) + 1
    out = []
    for name in names:
        out += [name] * (rest if name == "..." else 1)
    return out


def matrix(span, length, border, window, lean):
    """Row i: the weight of each element in the sum around element i, and what the sum is divided by without a mask."""
    m = np.zeros((length, length))
    width = span.window
    if width is None:
        for i in range(length):
            for j in range(length):
                m[i, j] = span.blocks is None or i * span.blocks // length == j * span.blocks // length
        return m, m.sum(1)
    before, after = (width - 1) // 2, width // 2
    if lean == "before":
        before, after = after, before

    def tap(offset):
        return 1.0 if window == "box" else math.exp(-(offset**2) / (2 * (width / 4) ** 2))

    for i in range(length):
        for j in range(length):
            if -before <= j - i <= after:
                m[i, j] = tap(j - i)
    full = sum(tap(o) for o in range(-before, after + 1))
    return m, (np.full(length, full) if border == "zero" else m.sum(1))


def along(m, x, axis):
    return np.moveaxis(np.tensordot(m, x, axes=(1, axis)), 0, axis)


def expect(x, field, layout, border="truncate", window="box", lean="after", mask=None):
    """E_F[x] with every axis at full length; weights by NumPy's broadcasting."""
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    w = np.ones(x.shape) if mask is None else np.broadcast_to(np.asarray(mask, np.float64), x.shape)
    top, weight = np.where(w != 0, x, 0) * w, w
    names = where(layout, x.ndim)
    padding = 1.0
    for windows in (False, True):
        if windows and border == "zero":
            # A masked element is one more zero of the window.
            top, weight = np.divide(top, weight, out=np.zeros_like(top), where=weight != 0), np.ones_like(weight)
        for span in Field.parse(field).spans:
            if bool(span.window) != windows:
                continue
            for axis in [i for i, name in enumerate(names) if name == span.axis]:
                m, full = matrix(span, x.shape[axis], border, window, lean)
                top = along(m, top, axis)
                if windows and border == "zero":
                    padding = padding * full.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
                else:
                    weight = along(m, weight, axis)
    if border == "zero" and any(s.window for s in Field.parse(field).spans):
        return top / padding
    return np.divide(top, weight, out=np.zeros_like(top), where=weight != 0)


def normalize(x, n, layout="n ... c", mask=None, eps=None):
    """The equation, for orders p; every statistic at the full shape of x. Returns y, v, mean, m."""
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask) != 0, x.shape)
    x = np.where(valid, x, 0)

    def average(a, field):
        return expect(a, field, layout, n.border, n.window, n.lean, mask)

    mean = None if n.mean is None else average(x, n.mean)
    v = x if mean is None else np.where(valid, x - mean, 0)
    if n.var is None:
        return (x if n.keep_mean else v), v, mean, None
    if n.order == math.inf:
        axes = tuple(i for i, name in enumerate(where(layout, x.ndim)) if name in str(n.var).split())
        m = np.broadcast_to(np.abs(v).max(axes, keepdims=True), x.shape)
    else:
        m = average(np.abs(v) ** n.order, n.var)
    d = ((n.eps if eps is None else eps) + n.gain * m) ** n.power
    if n.floor is not None:
        d = np.maximum(d, average(np.where(valid, d, 0), n.floor))
    y = np.divide(x if n.keep_mean else v, d, out=np.zeros_like(x), where=d != 0)
    return y, v, mean, m
