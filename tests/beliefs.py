"""What the tests of Kalman normalization share: data, and the normalization with a prior in NumPy float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax import Normalizer
from normjax.propagate import Belief

EPS = 1e-5
BATCH = Normalizer("n ...", "n ...")

# Compiled without XLA's optimizer, which is most of the time of these tests.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def blocks_of(count):
    return Normalizer(f"n/{count} ...", f"n/{count} ...")


def close(found, wanted, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(found, wanted, rtol=rtol, atol=atol)


def draw(seed, *shape, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, shape)


def conv(x, w, stride=1):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=names, precision="highest")


X = draw(10, 4, 3, 2, 6, scale=1.5, shift=0.4).astype(np.float32)
PRIOR = (draw(11, 6), np.abs(draw(12, 6, shift=1)))
MASK = draw(13, 4, 3, 2, 1) > -0.8
MASK[0] = True


def belief_of(moments=PRIOR, layout="n ... c"):
    """A belief of six channels."""
    shape = (1, 6, 1, 1) if layout == "n c ..." else (1, 1, 1, 6)
    return Belief(*(jnp.asarray(s, jnp.float32).reshape(shape) for s in moments))


def expected(x, prior, q, mask=None, count=1, group=1):
    """Channels last: y, mean and var of each of `count` blocks of examples and of each `group` of channels."""
    x, w = np.asarray(x, np.float64), np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape).astype(float)
    y = np.zeros(x.shape)
    found = []
    for rows in np.split(np.arange(len(x)), count):
        m = np.zeros((2, x.shape[-1]))
        for columns in np.split(np.arange(x.shape[-1]), x.shape[-1] // group):
            at = np.ix_(rows, *map(np.arange, x.shape[1:-1]), columns)
            axes = None if group > 1 else tuple(range(x.ndim - 1))
            part, weight = np.where(w[at] > 0, x[at], 0), w[at]
            total = weight.sum(axes)
            m[0, columns] = (part * weight).sum(axes) / total
            m[1, columns] = ((part - m[0, columns]) ** 2 * weight).sum(axes) / total
            p, s = prior[0][columns], prior[1][columns]
            if group > 1:
                p, s = p.mean(), (s + (p - p.mean()) ** 2).mean()
            apart = m[0, columns] - p
            m[:, columns] = p + q * apart, s + q * (m[1, columns] - s) + q * (1 - q) * apart**2
        found.append(m)
        y[rows] = np.where(w[rows] > 0, (x[rows] - m[0]) / np.sqrt(m[1] + EPS), 0)
    return y, np.stack(found, 1)
