"""Convolution of several seeds at once on a CPU: a grouped convolution against shifted slices and one matrix product.

    python benchmarks/seeds_conv.py

Times one gradient step of two 3x3 layers (16 and 32 channels, batch 64, five seeds under vmap), both forms interleaved in
one run, and prints the medians and their ratio. For this reason, the second is
a form of `experiments/networks/conv.py`, "patches".
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.conv import Conv

SEEDS, BATCH, ROUNDS = 5, 64, 7


def step(conv):
    """A jitted gradient of two layers of `conv`, for all seeds, and what it takes."""
    model = nn.Sequential([conv(16), nn.relu, conv(32)])

    def loss(params, x):
        return jnp.mean(jnp.square(jnp.asarray(model.apply({"params": params}, x))))

    def init(key, x):
        return model.init(key, x)["params"]

    return jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, 0))), init


def main():
    """Prints a line for each size of image."""
    forms = {"grouped": step(lambda c: nn.Conv(c, (3, 3))), "slices": step(lambda c: Conv(c, form="patches"))}
    for size in (8, 32):
        x = jax.random.normal(jax.random.key(0), (SEEDS, BATCH, size, size, 3))
        params = {k: jax.vmap(init)(jax.random.split(jax.random.key(1), SEEDS), x) for k, (_, init) in forms.items()}
        seconds = {k: [] for k in forms}
        for form, (run, _) in forms.items():
            jax.block_until_ready(run(params[form], x))
        for _ in range(ROUNDS):
            for form, (run, _) in forms.items():
                start = time.perf_counter()
                jax.block_until_ready(run(params[form], x))
                seconds[form].append(time.perf_counter() - start)
        grouped, slices = (1000 * statistics.median(seconds[k]) for k in forms)
        print(f"{size}x{size}: grouped {grouped:.1f} ms, slices {slices:.1f} ms, ratio {grouped / slices:.1f}")


if __name__ == "__main__":
    main()
