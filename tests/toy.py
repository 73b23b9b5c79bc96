"""The smallest experiment, `python -m tests.toy`: lines are fitted to points, a row for each learning rate."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import command, experiment, loop, report, tables
from normjax.train import State


@dataclass(frozen=True)
class Config:
    lr: float
    seeds: int = 2
    steps: int = 6
    evaluate_every: int = 2


ROWS = {"slow": Config(0.1), "fast*": Config(0.5)}


@dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    rows: tuple[str, ...] = tuple(ROWS)
    steps: int = 6


def configure(row, options, _):
    config = replace(ROWS[row], steps=options.steps)
    return command.shrunk(config) if options.smoke else config


def load(options, _):
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    return {"x": x, "y": 2 * x + 1}


def train(job, config):
    def loss(w, batch):
        return jnp.mean(jnp.square(w[0] * batch["x"] + w[1] - batch["y"]))

    def init(key):
        return State(jnp.zeros((), jnp.int32), jax.random.normal(key, (2,)), {}, ())

    def step(state, batch, key):
        value, gradient = jax.value_and_grad(loss)(state.params, batch)
        w = state.params - config.lr * gradient + 0.01 * jax.random.normal(key, (2,))
        return State(state.step + 1, w, {}, ()), {"loss": value}

    def evaluate(state, test):
        return {"error": loss(state.params, test)}

    return loop.Task(init, step, evaluate, job.data, job.data, batch_size=4, noise=True)


def write(job, configs, rows):
    summary = tables.each(rows, {"error": tables.shown("test_error", 3)})
    curves = report.curves(rows, {"test_error": "error (log)"}, lambda name: {}, 2)
    return report.Report((summary,), {"curves": curves}, {"summary": summary})


TOY = experiment.Experiment(
    "toy",
    "Fits lines.",
    Options,
    tuple(ROWS),
    lambda options: "slow, fast*",
    configure,
    load,
    train,
    write,
    text=Path(__file__).with_suffix(".md"),
)

main = functools.partial(experiment.run, TOY)

if __name__ == "__main__":
    main()
