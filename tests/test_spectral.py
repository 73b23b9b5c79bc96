"""Spectral norm: the iteration in NumPy float64, singular values, PyTorch, every transformation and the mistakes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import FieldError
from normjax.spectral import spectral_norm
from tests.kernels import close, draw, each, quickly, run
from tests.refusals import refuses

# Spectral norm.


def power_iteration(m, u, steps):
    """The iteration and the gradient of sum(W / sigma * dw), in float64."""
    u = u / np.linalg.norm(u)
    v = m @ u / np.linalg.norm(m @ u)
    for _ in range(steps):
        v = m @ u / np.linalg.norm(m @ u)
        u = v @ m / np.linalg.norm(v @ m)
    return v, u, v @ m @ u


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_spectral_norm_is_the_iteration_and_its_gradient_that_of_the_paper(steps):
    k, u, dw = (draw(s, i) for i, s in ((25, (2, 3, 4)), (26, (1, 4)), (27, (2, 3, 4))))
    with jax.enable_x64(True):

        @quickly
        def run(k):
            out, back = jax.vjp(lambda k: spectral_norm(k, u, steps=steps).kernel, k)
            return out, spectral_norm(k, u, steps=steps), back(jnp.asarray(dw))[0]

        out, after, gradient = run(k)
    v, exact_u, sigma = power_iteration(k.reshape(6, 4), u[0], steps)
    close(out, k / sigma, 1e-9)
    close(after.u, exact_u[None], 1e-9)
    close(after.sigma, sigma, 1e-9)
    # Equation 12: the singular vectors are constants.
    flat = dw.reshape(6, 4)
    exact = (flat - np.sum(flat * k.reshape(6, 4)) / sigma * np.outer(v, exact_u)) / sigma
    close(gradient, exact.reshape(k.shape), 1e-9)


@pytest.mark.slow
def test_many_iterations_find_the_largest_singular_value():
    k = draw((3, 3, 2, 5), 28).astype(np.float32)
    one = np.ones(5, np.float32)
    out = run(spectral_norm, k, one, steps=60)
    close(out.sigma, np.linalg.svd(k.reshape(18, 5).astype(float))[1][0], 1e-5)
    close(np.linalg.svd(np.asarray(out.kernel, float).reshape(18, 5))[1][0], 1.0, 1e-5)


def test_other_layouts_and_dtypes_are_the_same_iteration():
    k = draw((3, 3, 2, 5), 28).astype(jnp.bfloat16)
    one = np.ones(5, np.float32)

    @quickly
    def each(k):
        wide = k.astype(np.float32)
        first = spectral_norm(wide.transpose(3, 2, 0, 1), one, layout="o i ...")
        return spectral_norm(wide, one), first, spectral_norm(k, one)

    last, first, low = each(k)
    close(first.kernel, np.asarray(last.kernel).transpose(3, 2, 0, 1))
    assert (low.kernel.dtype, low.u.dtype, low.sigma.dtype) == (jnp.bfloat16, np.float32, np.float32)
    close(low.sigma, last.sigma)
    close(low.kernel, last.kernel, 2**-8)


def test_spectral_norm_under_every_transformation():
    k, u, t = (jnp.asarray(draw(s, i), jnp.float32) for i, s in ((29, (6, 4)), (30, (4,)), (31, (6, 4))))

    def loss(k):
        out = spectral_norm(k, u, steps=2)
        return jnp.sum(out.kernel * jnp.sin(out.kernel))

    @quickly
    def run(k):
        two = jnp.stack([k, t])
        gradient = jax.grad(loss)(k)
        return {
            "plain": gradient,
            "checkpoint": jax.grad(jax.checkpoint(loss))(k),
            "vmap": jax.vmap(jax.grad(loss))(two)[0],
            "scan": jax.lax.scan(lambda c, k: (c, jax.grad(loss)(k)), 0, two)[1][0],
            "jvp": (jax.jvp(loss, (k,), (t,))[1], jnp.vdot(gradient, t)),
            "second": (
                jnp.vdot(jax.jvp(jax.grad(loss), (k,), (t,))[1], t),
                jnp.vdot(jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k), t))(k), t),
            ),
            "zero": jax.grad(loss)(jnp.zeros_like(k)),
        }

    out = run(k)
    for kind in ("checkpoint", "vmap", "scan"):
        close(out[kind], out["plain"], 1e-5)
    close(out["jvp"][0], out["jvp"][1], 1e-5)
    close(out["second"][0], out["second"][1], 1e-4)
    assert (out["zero"] == 0).all()


@pytest.mark.slow
def test_spectral_norm_in_evaluation_is_that_of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 5, 2), n_power_iterations=1)
    layer.eval()
    p = layer.parametrizations.weight
    k, u = p.original.detach().numpy(), p[0]._u.numpy()
    ours = spectral_norm(k, u, steps=0, layout="o i ...")
    # Torch keeps v beside u: after its step u = W v, it takes v = W u, which is where zero steps start.
    close(ours.kernel, layer.weight.detach().numpy(), 1e-5)


def test_the_training_weight_of_torch_is_half_an_iteration_beyond_ours():
    k, u = draw((6, 4), 15), draw((4,), 16)
    v = k @ u / np.linalg.norm(k @ u)
    new = v @ k / np.linalg.norm(v @ k)  # torch: u from the stored v, then v from that u, then sigma
    ours = spectral_norm(np.float32(k), np.float32(u))
    theirs = spectral_norm(np.float32(k), ours.u, steps=0)
    close(ours.u, new)
    close(ours.sigma, np.linalg.norm(v @ k))
    close(theirs.sigma, np.linalg.norm(k @ new))
    close(theirs.kernel, k / np.linalg.norm(k @ new))
    assert abs(ours.sigma - theirs.sigma) > 1e-3


def test_zeros_stay_zeros_with_or_without_eps():
    zero, one = np.zeros((3, 2), np.float32), np.ones(2, np.float32)
    for eps in (1e-12, 0.0):
        out = run(spectral_norm, zero, one, eps=eps)
        assert (np.asarray(out.kernel) == 0).all()
        assert out.sigma == 0


V = np.ones((2, 3), np.float32)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "u": (
        lambda: spectral_norm(V, np.ones(2, np.float32)),
        FieldError,
        'u of shape (2,) does not fit 3 outputs: kernel of shape (2, 3), layout "... i o", outputs "o"',
    ),
    "outputs": (
        lambda: spectral_norm(V, np.ones(3, np.float32), outputs="c"),
        FieldError,
        'outputs are names of axes of layout "... i o"; found "c"',
    ),
    "steps": (
        lambda: spectral_norm(V, np.ones(3, np.float32), steps=-1),
        ValueError,
        "steps is a number of power iterations, at least 0; found -1",
    ),
    "complex": (
        lambda: spectral_norm(V.astype(np.complex64), V[0]),
        TypeError,
        "spectral_norm takes real arrays, found complex64",
    ),
}


@each(REFUSED)
def test_refusals_name_what_was_found_and_what_is_accepted(name):
    refuses(*REFUSED[name])
