"""Weight norm and its kin: the weights of each output at a norm, centred or not, learned or bounded."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect import extremes
from normjax._expect.arrays import statistics_dtype
from normjax._expect.expectation import OverFields, expect
from normjax._expect.ranges import towards_one
from normjax._leaves import one_of
from normjax._normalize.evaluate import normalize
from normjax.field import Field, FieldError
from normjax.theory import Normalizer
from normjax.weights import _kernel
from normjax.weights._kernel import INPUTS, KERNEL, OUTPUTS, AnyField

BOUNDS = ("rms", "mean")


def weight_centring(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Takes from the weights of each output their mean: w = g * (v - E[v]). A field of one weight is refused.

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      scale: learned factor g: a scalar, `[o]` (the axes not in the field), or of the rank of the kernel; None is 1.
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Source: Huang et al. 2017, the centring alone; `WCConv2d` of Lubana et al. 2021.

    >>> weight_centring(jnp.array([[1.0, 2.0], [3.0, 8.0]])).tolist()
    [[-1.0, -3.0], [1.0, 3.0]]
    """
    return _kernel.evaluate(_kernel.floating_kernel(kernel), Normalizer(field, None), layout, scale, mask)


def weight_norm(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    p: float = 2,
    eps: ArrayLike = 0.0,
    eps_rule: str = "moment",
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Gives the weights of each output the norm g: w = g * v / ||v||_p.

    The paper has no eps; an output whose weights are all zero stays zero, its gradient included. Flax adds 1e-12 to the
    square (`eps=1e-12`), the code of Lubana et al. 2021 adds 1e-5 to the norm (`eps=1e-5, eps_rule="root"`).

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      scale: learned norm g: a scalar, `[o]` (the axes not in the field), or of the rank of the kernel; None is 1.
      p: order of the norm; `inf` divides by the largest |v| (code of Hoffer et al. 2018, bwn.py excepted: by the largest v).
      eps: added to the sum of |v| ** p [u ** p], or to the norm [u] with "root".
      eps_rule: where eps enters: "moment", inside of the root; "root", after it; "floor", the least value inside (NFNets).
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Source: Salimans & Kingma 2016, equation 2; for other p Hoffer et al. 2018.

    >>> weight_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([10.0, 2.0])).tolist()
    [[6.0, 2.0], [8.0, 0.0]]
    >>> weight_norm(jnp.array([[2.0], [-4.0]]), p=float("inf")).tolist()
    [[0.5], [-1.0]]
    """
    kernel = _kernel.zero_masked_kernel(kernel, mask)
    return _kernel.evaluate(kernel, _kernel.lp_norm(kernel, p, layout, field), layout, scale, None, eps_rule, eps)


def centred_weight_norm(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    eps: ArrayLike = 0.0,
    eps_rule: str = "moment",
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Centres the weights of each output and gives them the norm g: w = g * (v - E[v]) / ||v - E[v]||.

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      scale: learned norm g: a scalar, `[o]` (the axes not in the field), or of the rank of the kernel; None is 1.
      eps: added to the sum of squares [u ** 2], or to the norm [u] with "root".
      eps_rule: where eps enters: "moment", inside of the root; "root", after it; "floor", the least value inside (NFNets).
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Source: Huang et al. 2017, "Centered weight normalization in accelerating training of deep neural networks".

    >>> centred_weight_norm(jnp.array([[1.0], [9.0], [1.0], [9.0]])).ravel().tolist()
    [-0.5, 0.5, -0.5, 0.5]
    """
    kernel = _kernel.floating_kernel(kernel)
    if mask is None:
        n = Normalizer(field, field, gain=_kernel.fan_in(kernel, layout, field))
        return _kernel.evaluate(kernel, n, layout, scale, None, eps_rule, eps)
    # In two steps, since each output has a fan-in of its own: after the centring, masked weights are zeros to a sum.
    v = weight_centring(kernel.astype(statistics_dtype(kernel.dtype)), layout=layout, field=field, mask=mask)
    return weight_norm(v, scale, eps=eps, eps_rule=eps_rule, layout=layout, field=field).astype(kernel.dtype)


def bounded_weight_norm(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    rho: ArrayLike,
    p: float = 2,
    eps: ArrayLike = 0.0,
    eps_rule: str = "moment",
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    outputs: AnyField = OUTPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Gives the weights of every output one norm that is never learned: w = rho * v / ||v||_p.

    With a learned scale, as in the published bwn.py, only the norm of all outputs together is bounded: g is rescaled to
    the root mean square rho. Its sibling bwn_alt.py has no scale and `rho = norm_bound(kernel, rule="mean")`.

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      scale: None for the paper; the learned g of each output, `[o]`, for bwn.py.
      rho: a constant of the layer, `norm_bound` of its initial kernel. [units of w]
      p: order of the norm; `inf` divides by the largest |v|.
      eps: added to the sum of |v| ** p [u ** p], or to the norm [u] with "root".
      eps_rule: where eps enters: "moment", inside of the root; "root", after it; "floor", the least value inside (NFNets).
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      outputs: the field of the outputs, over which the mean square of the scale is taken.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Source: Hoffer et al. 2018, bounded weight normalization.

    >>> kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> bounded_weight_norm(kernel, rho=5.0).tolist()
    [[3.0, 5.0], [4.0, 0.0]]
    >>> w = bounded_weight_norm(kernel, jnp.array([14.0, 2.0]), rho=5.0)
    >>> [round(norm, 3) for norm in jnp.linalg.norm(w, axis=0).tolist()]    # root mean square 5
    [7.0, 1.0]
    """
    kernel = _kernel.zero_masked_kernel(kernel, mask)
    work = statistics_dtype(kernel.dtype)
    g = jnp.asarray(rho).astype(jnp.finfo(work).dtype)
    if scale is not None:
        scale = _kernel.align_kernel_scale(scale, kernel, layout, field, work)
        scale = jnp.broadcast_to(scale, _kernel.rows_shape(kernel, layout, field))
        g = g * normalize(scale, Normalizer(None, outputs, eps=0.0), layout).y
    return _kernel.evaluate(kernel, _kernel.lp_norm(kernel, p, layout, field), layout, g, None, eps_rule, eps)


def norm_bound(
    kernel: ArrayLike,
    *,
    rule: str = "rms",
    p: float = 2,
    layout: str = KERNEL,
    field: AnyField = INPUTS,
    outputs: AnyField = OUTPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """The constant rho of `bounded_weight_norm`, from the initial kernel V: a scalar [u], float32 or wider.

    It is the norm of one output. The published bwn.py keeps what all outputs have together, `weight_g_prenorm`, the length
    of the vector of their norms (||V||_F for p = 2), and rescales its learned g to it: that number is sqrt(N_out) times this
    one, with "rms". bwn_alt.py (`weight_v_prenorm`) and a later version (`weight_init_norm`) keep this one, with "mean".

    Args:
      kernel: array of a floating dtype, `[... i o]` or as the layout says. [units u]
      rule: "rms", the paper's ||V||_F / sqrt(N_out), is the root mean square of the norms; "mean" (bwn_alt.py) their mean.
      p: order of the norm; `inf` is the largest |v|.
      layout: name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
      field: all that one output sums; "... i o" gives the whole kernel one norm, "... i@model" has sharded inputs.
      outputs: the field of the outputs, which with the other leaves one number.
      mask: booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.

    Source: Hoffer et al. 2018.

    >>> kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> round(norm_bound(kernel).item() ** 2, 3), norm_bound(kernel, rule="mean").item()
    (13.0, 3.0)
    """
    one_of("rule", rule, BOUNDS)
    kernel = _kernel.zero_masked_kernel(kernel, mask)
    n = _kernel.lp_norm(kernel, p, layout, field)
    kernel = kernel.astype(statistics_dtype(kernel.dtype))
    # One factor for all outputs and all shards, exact, so that powers of small and of large weights are floats.
    E, size = OverFields(layout, kernel.shape), lax.stop_gradient(jnp.abs(kernel))
    for every in (field, outputs):
        size = extremes.pooled_maximum(size, E.plan(Field.parse(every)))
    s = towards_one(jnp.max(size, initial=0))
    norms = _kernel.root(n.gain * normalize(kernel * s.astype(kernel.dtype), n, layout).stats.var, n.power)
    rho = expect(norms if rule == "mean" else norms**2, outputs, layout)
    if rho.size != 1:
        raise FieldError(
            f'one bound is asked for: outputs "{outputs}" beside field "{field}" leave {rho.size} numbers of a '
            f'kernel of shape {kernel.shape}, layout "{layout}"'
        )
    return ((rho if rule == "mean" else _kernel.root(rho, 0.5)) / s).reshape(())
