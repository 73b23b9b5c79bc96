# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/normjax/normjax/blob/main/notebooks/fields.ipynb)
#
# # A normalizer is two fields and a few numbers
#
# Around every element of an array lie two fields: A, over which it is centred, and B, by whose spread it is divided. This
# notebook draws them, and shows what they do to real images.

# %%
# In Colab: # !pip install --upgrade "normjax[experiments] @ git+https://github.com/normjax/normjax"
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from normjax import TABLE, Normalizer, expect, explain, normalize

# %% [markdown]
# ## The fields, drawn
#
# The average over a field is linear, so its gradient at one element *is* the field: the weight of every element in that
# element's average. Each picture is one array of 4 examples x 8 positions (rows) and 8 channels (columns); the averages are
# those of example 1, position 3, channel 4.


# %%
def weights(field, layout="n ... c", shape=(4, 8, 8), at=(1, 3, 4), **options):
    """The weight of every element in the average around one of them."""

    def one(x):
        return jnp.broadcast_to(expect(x, field, layout, **options), shape)[at]

    return jax.grad(one)(jnp.ones(shape))


def draw(axis, field, **options):
    w = np.asarray(weights(field, **options)).reshape(4 * 8, 8)
    axis.imshow(w / w.max(), cmap="magma", aspect="auto")
    axis.set_title(f'"{field}"', fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([7.5, 15.5, 23.5], [])


fields = ["n ...", "... c", "c", "...", "... c/4", "...:5 c", "c:5", "n/2 ..."]
figure, axes = plt.subplots(1, len(fields), figsize=(14, 3.5))
for axis, field in zip(axes, fields, strict=True):
    draw(axis, field)
axes[0].set_ylabel("4 examples x 8 positions")
plt.show()

# %% [markdown]
# Batch norm averages over `n ...`, layer norm over `... c`, instance norm over `...`, divisive norm over a window of space
# and all channels. The table has a row for each, and `explain` puts a row into words.

# %%
for name in ("batch", "group", "divisive"):
    print(name, "=", explain(name, (128, 28, 28, 64)), "\n")

# %% [markdown]
# ## What they do to an image
#
# Real handwritten digits. The contrast of the right half is turned down: normalizers with a local field bring it back.

# %%
digits = jnp.asarray(load_digits().images[:8, :, :, None], jnp.float32) / 16
dimmed = digits.at[:, :, 4:].multiply(0.2)
rows = {
    "input": None,
    "batch": TABLE["batch"],
    "instance": TABLE["instance"],
    "divisive": Normalizer("...:3 c", "...:3 c", eps=0.01),
    "contrast": Normalizer("...:5 c", "...:5 c", floor="...", window="gaussian"),
}
figure, axes = plt.subplots(1, len(rows), figsize=(12, 2.6))
for axis, (name, row) in zip(axes, rows.items(), strict=True):
    axis.imshow((dimmed if row is None else normalize(dimmed, row).y)[3, :, :, 0], cmap="gray")
    axis.set_title(name)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Smoothing
#
# `eps` is sigma squared. Divisive normalization followed by ReLU is a new activation function of an element and its
# neighbour; sigma says how soon it saturates (Ren et al. 2017).

# %%
z = jnp.linspace(-4, 4, 201)
pairs = jnp.stack([z, jnp.ones_like(z)], -1)  # a unit, and its only neighbour, which stays at 1
for sigma in (0.1, 0.5, 1.0, 2.0):
    y = normalize(pairs, Normalizer("c", "c", eps=sigma**2)).y
    plt.plot(z, jax.nn.relu(y[:, 0]), label=f"sigma {sigma}")
plt.xlabel("the unit, its neighbour at 1")
plt.ylabel("relu(divisive norm)")
plt.legend()
plt.show()

# %%
assert float(jnp.abs(normalize(digits, "batch").y.mean((0, 1, 2))).max()) < 1e-5
assert weights("...:5 c").sum().round(4) == 1
