"""Layers described without Flax: what `linen` and `nnx` share, so that each of them only holds variables."""
