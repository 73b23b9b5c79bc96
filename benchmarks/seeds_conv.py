"""The forms of a convolution in `experiments/networks/conv.py` on a CPU, each against XLA's own.

    python benchmarks/seeds_conv.py

Forms are interleaved; shown are medians and their ratio. "patches": a gradient step of two 3x3 layers (16 and 32 channels,
batch 64, five seeds under vmap, which makes a grouped convolution of XLA's). "images": a step of SRCNN on ten patches of
33x33, in a loop. "strips": SRCNN's output for one image of 337x497.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.conv import Conv
from experiments.networks.srcnn import SRCNN
from normjax import Normalizer

SEEDS, BATCH, ROUNDS, STEPS = 5, 64, 7, 10


def compare(said: str, forms: Mapping[str, Callable[[], Any]], steps: int = 1) -> None:
    """Prints the medians of two forms and how many times as fast the second is."""
    seconds = {form: [] for form in forms}
    for run in forms.values():
        jax.block_until_ready(run())
    for _ in range(ROUNDS):
        for form, run in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[form].append((time.perf_counter() - start) / steps)
    (a, slow), (b, fast) = ((form, 1000 * statistics.median(each)) for form, each in seconds.items())
    print(f"{said}: {a} {slow:.1f} ms, {b} {fast:.1f} ms, ratio {slow / fast:.1f}")


def seeds(conv: Callable[[int], nn.Module], size: int) -> Callable[[], Any]:
    """A gradient of two layers of `conv`, for all seeds."""
    model = nn.Sequential([conv(16), nn.relu, conv(32)])  # pyright: ignore[reportArgumentType]
    x = jax.random.normal(jax.random.key(0), (SEEDS, BATCH, size, size, 3))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.asarray(model.apply({"params": params}, x))))

    params = jax.vmap(lambda key, x: model.init(key, x)["params"])(jax.random.split(jax.random.key(1), SEEDS), x)
    run = jax.jit(jax.vmap(jax.grad(loss)))
    return lambda: run(params, x)


def srcnn(form: str, shape: tuple[int, int, int], train: bool) -> Callable[[], Any]:
    """The output of SRCNN without normalizer, or a few steps of gradient descent."""
    model = SRCNN(Normalizer(None, None), form=form)
    x = jax.random.normal(jax.random.key(0), shape)
    params = model.init(jax.random.key(1), x, train=False)

    def output(params: Any) -> Any:
        return model.apply(params, x, train=False)

    def step(params: Any, _: None) -> tuple[Any, None]:
        gradient = jax.grad(lambda params: jnp.mean(jnp.square(output(params))))(params)
        return jax.tree.map(lambda a, g: a - 1e-3 * g, params, gradient), None

    run = jax.jit((lambda params: jax.lax.scan(step, params, None, length=STEPS)) if train else output)
    return lambda: run(params)


def main() -> None:
    """Prints a line for each form, and for each size of image."""
    for size in (8, 32):
        grouped, patches = (lambda c: nn.Conv(c, (3, 3))), (lambda c: Conv(c, form="patches"))
        compare(f"{size}x{size}, 5 seeds", {"grouped": seeds(grouped, size), "patches": seeds(patches, size)})
    compare("SRCNN, a step", {form: srcnn(form, (10, 33, 33), True) for form in ("xla", "images")}, STEPS)
    compare("SRCNN, an image", {form: srcnn(form, (1, 337, 497), False) for form in ("xla", "strips")})


if __name__ == "__main__":
    main()
