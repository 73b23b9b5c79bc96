"""Activations of the named layers of any linen or nnx model, and the loss's gradient at each, the model left as it is.

    probe = linen_capture(model, layers=nn.Conv, loss=lambda logits: cross_entropy(logits, labels))
    found = jax.jit(probe)(variables, images)                  # nnx: nnx_capture(model, ...)(images)
    found.activations["conv1"], found.gradients["conv1"]
    normjax.diagnostics.report(found.activations, found.gradients)

A layer is a module, its activations what its `__call__` returns, or what it is given (`at="input"`): what comes out of a
nonlinearity that is a plain function is the input of the next layer. Its name is its path, `"block/conv"`; the model itself
is `"."`. A second call of the same module adds `#2`, an output that is a tuple or another tree the place in it: `"cell[0]"`.

Gradients are taken at zeros that are added to the activations, so nothing of the model is differentiated but what lies
between them and the loss. These zeros take the memory of all that is captured: choose `layers` in large models.
"""

from normjax.capture._probe import Captured
from normjax.capture.linen import linen_capture
from normjax.capture.nnx import nnx_capture

__all__ = ["Captured", "linen_capture", "nnx_capture"]
