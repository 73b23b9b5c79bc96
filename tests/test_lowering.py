"""A program says the same for a chip wherever it is traced: on the chip, or on a CPU for export and cross-compiling."""

import types

import jax
import jax.numpy as jnp
import pytest

import normjax

X = jax.ShapeDtypeStruct((16, 8, 8, 64), jnp.bfloat16)


def lowered(platform):
    """Every row of the table with its gradient, lowered for a platform; traced anew at every call."""

    def f(x, g):
        found = []
        for n in normjax.TABLE.values():
            y, pull = jax.vjp(lambda x, n=n: normjax.normalize(x, n).y, x)
            found.append((y, pull(g)))
        return found

    return jax.jit(f).trace(X, X).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_program_for_a_chip_is_the_one_that_the_chip_would_trace(platform, monkeypatch):
    here = lowered(platform)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if platform == "cuda" else platform)
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(platform=jax.default_backend())])
    assert lowered(platform) == here
