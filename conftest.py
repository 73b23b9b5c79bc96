"""What every test and doctest sees: strict dtype promotion, no silent rank promotion, jnp in doctests."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import pytest

collect_ignore_glob = ["normjax/linen/layers.py", "normjax/nnx/layers.py"]  # doctests of descriptions run once, there

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace):
    doctest_namespace["jax"] = jax
    doctest_namespace["jnp"] = jnp
