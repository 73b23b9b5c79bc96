"""The main job: what does each normalizer, and its starred variant, do to a small CNN?

    python -m experiments.compare                       # handwritten digits, 10 rows x 5 seeds
    python -m experiments.compare --rows batch 'batch*' --seeds 8 --dataset cifar10 --data-dir DIR
    python -m experiments.compare --resume              # go on after a kill: the same numbers
    python -m experiments.compare --devices 2           # each batch over 2 devices, simulated on a CPU
    python -m experiments.compare --distributed --coordinator HOST:PORT --processes 2 --process 0   # ... and 1, there

A row is a normalizer; a starred row (Ren et al. 2017) smooths it (a larger eps = sigma ** 2) and
adds the L1 penalty alpha * mean |v| on centred activations. All rows share the network (`CNN`), the
first weights and the order of the examples of each seed, the learning rate and the held-out split.
Write `batch*` in quotes in a shell, or `batch-star`; its folder is called batch-star too.

It prints a table and leaves runs/compare/<row>/seed-<k>/ (config.json, metrics.jsonl, checkpoint),
report.md, report.html, metrics.csv and the pictures. A folder holds one setting: rows that are there with other
options, or without --resume at all, are refused; --overwrite deletes them first.

Hardware and time: two CPU cores, two minutes, compilation included.
Known limits: digits are easy (all rows end within one per cent, and a held-out image is 0.22 of it), and
one learning rate for all rows favours those that like it; the paper's own comparison is on CIFAR.
A resumed run has the same bits only under the same code, libraries and number of cores. On the larger
data sets evaluation takes most of the time on CPUs.

With --devices or --distributed the batch of each step is spread over all devices of all processes, and
running statistics stay those of the whole batch: the numbers are those of one device but for rounding. So a
run may be resumed on another number of devices; config.json notes those it began with, under "environment".
Each process reads its own part of the training data; process 0 alone writes, and reads on --resume. Clusters
that `jax.distributed` knows need no more than --distributed. If a process dies, the others stop within minutes.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments.common import classify, cli, command, data, experiment, loop, pictures, report, tables, trained
from experiments.networks.cnn import CNN
from normjax import TABLE, Normalizer, diagnostics
from normjax.train import State


@dataclass(frozen=True)
class Config:
    """One row: everything that its numbers depend on, but for the seed."""

    normalizer: Normalizer
    affine: bool = True  # scale and bias a channel after the normalizer
    l1: float = 0.0  # alpha, factor of the penalty mean |v| of each normalized layer
    channels: tuple[int, ...] = (16, 32)
    dataset: str = "digits"
    seeds: int = 5
    steps: int = 540
    batch_size: int = 50
    evaluate_every: int = 54
    lr: float = 0.05  # SGD with momentum 0.9, the rate falling to 0 along a cosine
    examples: int | None = None  # use the first of each split only (--smoke)


def starred(config: Config, sigma: float, l1: float = 0.05, affine: bool = True) -> Config:
    """Ren et al.'s variant of a row: smoothed by sigma, and penalized."""
    normalizer = replace(config.normalizer, eps=sigma**2)
    return replace(config, normalizer=normalizer, l1=l1, affine=affine)


# The table's windows of 5 nearly cover these maps of 8x8 and 4x4; 3 keeps "divisive" local. Like the
# paper's dn, it is smoothed even without a star and has no scale and bias (nor has layer*).
WINDOWS = Normalizer("...:3 c", "...:3 c", eps=0.5**2)

# fmt: off
PLAIN = {
    "none":     Config(Normalizer(None, None), affine=False),
    "batch":    Config(TABLE["batch"]),
    "layer":    Config(TABLE["layer"]),
    "group":    Config(Normalizer("... c/4", "... c/4")),  # the table's 32 groups, for 16 channels
    "instance": Config(TABLE["instance"]),
    "rms":      Config(TABLE["rms"]),
    "divisive": Config(WINDOWS, affine=False),
}
ROWS = PLAIN | {
    # sigma: the paper's for CIFAR-10. Its alpha, .005, hardly acts within hundreds of steps (the
    # paper's runs take 80,000): .05 shows the effect on the correlation.
    "batch*":    starred(PLAIN["batch"], sigma=1.0),
    "layer*":    starred(PLAIN["layer"], sigma=0.5, affine=False),
    "divisive*": starred(PLAIN["divisive"], sigma=0.5, affine=False),
}
# fmt: on
ACCURACY = tables.Metric("test_accuracy", "accuracy, in per cent", factor=100, digits=2)
CORRELATION = tables.Metric("test_correlation", "correlation between first-layer units", digits=3, lower=True)
STARRED = (ACCURACY, CORRELATION)  # what is said of each starred row beside its plain one
HELD_OUT_BATCH = 200  # images over whose positions units are correlated


@dataclass(frozen=True, kw_only=True)
class Options(command.ManyDevices):
    """The command line."""

    rows: tuple[str, ...] = tuple(ROWS)
    seeds: int = Config.seeds
    steps: int = Config.steps
    """Training steps."""
    dataset: str = Config.dataset
    """digits, mnist, cifar10 or cifar100."""
    lr: float = Config.lr
    """Learning rate of every row."""
    batch_size: int = Config.batch_size
    """Examples a step (8 with --smoke)."""

    def check(self) -> None:
        """Exits with code 2 where a value is wrong by itself."""
        cli.pick(self.dataset, data.DATASETS, "data set")
        command.positive(self, "seeds", "steps", "lr", "batch_size")
        command.needless(self.dataset, self.data_dir)

    def connect(self) -> Mesh | None:
        """Lays out the devices, over which a batch has to divide."""
        mesh, batch = super().connect(), configure("none", self).batch_size
        if mesh is not None and batch % mesh.size:
            cli.fail(
                f"a batch of {batch} examples does not divide over {mesh.size} devices; choose other --devices or "
                "--batch-size"
            )
        return mesh


Job = experiment.Job[Options, data.Dataset]


def listing(options: Options) -> str:
    """The rows, and what they are."""
    lines = [[name, repr(c.normalizer), str(c.l1), str(c.affine)] for name, c in ROWS.items()]
    return report.table(["row", "normalizer", "alpha", "scale and bias"], lines)


def configure(row: str, options: Options, _: None = None) -> Config:
    """A row's configuration under the options of the command line."""
    config = replace(
        ROWS[row],
        seeds=options.seeds,
        steps=options.steps,
        evaluate_every=max(1, options.steps // 10),
        dataset=options.dataset,
        batch_size=options.batch_size,
        lr=options.lr,
    )
    return command.shrunk(config, batch_size=8, examples=64) if options.smoke else config


def load(options: Options, _: None) -> data.Dataset:
    """The data set; of several processes, this one's part."""
    loaded = data.load(options.dataset, options.data_dir, (jax.process_index(), jax.process_count()))
    batch = configure("none", options).batch_size
    if batch > loaded.examples:
        raise data.DataError(f"--batch-size {batch}: a batch of more examples than the {loaded.examples:,} to train on")
    return loaded


def build(job: Job, config: Config) -> classify.Classifier:
    """Network, loss and optimizer of a row."""
    own = {"classes": job.data.classes, "channels": config.channels, "affine": config.affine, "l1": config.l1}
    model = CNN((config.normalizer,) * len(config.channels), **own)
    tx = optax.sgd(optax.cosine_decay_schedule(config.lr, config.steps), momentum=0.9)
    mean, std = classify.pixel_moments(job.data)

    def standardized(batch: loop.Batch) -> jax.Array:
        return (batch["image"].astype(jnp.float32) - mean) / std

    return classify.classifier(model, tx, job.data.train["image"].shape[1:], standardized, job.mesh)


def train(job: Job, config: Config) -> loop.Task:
    """How a row is trained."""
    model = build(job, config)
    devices = 1 if job.mesh is None else job.mesh.size

    def evaluate(state: State, test: loop.Batch) -> loop.Metrics:
        z = model.preactivation(state, classify.first(test, HELD_OUT_BATCH))
        examples = len(test["label"])  # all at once, or in batches that caches hold: twice as fast on MNIST
        size = examples if examples < 1000 else 100
        size = max(size - size % devices, 1)  # so that each device has its share; the few that remain go to all
        return loop.mean_over(model.judge, state, test, size) | {"correlation": diagnostics.correlation(z)}

    examples = min(config.examples or job.data.examples, job.data.examples)
    mine = len(range(jax.process_index(), examples, jax.process_count()))
    return loop.Task(
        model.init,
        model.step,
        evaluate,
        classify.first(job.data.train, mine),
        classify.first(job.data.test, config.examples),
        config.batch_size,
        examples,
        say=classify.say,
    )


# --- the report -----------------------------------------------------------------------------------


def write(job: Job, configs: Mapping[str, Config], rows: dict[str, trained.Row]) -> report.Report:
    """The table of results, differences between rows, curves, and what two units look like."""
    config = next(iter(configs.values()))
    test = classify.first(job.data.test, config.examples)
    held_out, smooth = len(test["label"]), config.evaluate_every
    summary = tables.each(rows, COLUMNS, code=False)
    stars = tuple(classify.stars(list(rows)).items())
    said = (tables.exceeding(rows, ACCURACY), *(tables.compared(rows, metric, stars) for metric in STARRED))
    differences = "\n\n".join(filter(None, said))
    metrics = {"test_accuracy": "held-out accuracy", "loss": "training loss (log)"}
    batch = classify.first(test, HELD_OUT_BATCH)
    histograms = classify.histograms(job.folder, list(rows), lambda name: build(job, configs[name]), batch)
    drawn = {"curves": report.curves(rows, metrics, style, smooth), "response": pictures.draw_responses()}
    values = {
        "settings": f"{report.settings(vars(config), 'dataset', 'steps', 'batch_size', 'lr')}, {trained.seeds(rows)}",
        "summary": summary,
        "differences": differences,
        "all_differences": tables.differences(rows, ACCURACY),
        "normalizers": tables.each(rows, tables.NORMALIZERS, code=False),
        "pairs": histograms,
        "batch": min(HELD_OUT_BATCH, config.examples or HELD_OUT_BATCH),
        "smooth": smooth,
        "held_out": held_out,
        "one_image": 100 / held_out,
    }
    return report.Report((summary, differences), drawn | histograms, values)


COLUMNS: dict[str, tables.Column] = {
    "accuracy %": tables.shown("test_accuracy", 2, factor=100),
    "training loss": tables.shown("loss", 4, when="recent"),
    "correlation": tables.shown("test_correlation", 3),
    "at random weights": tables.shown("test_correlation", 3, when="first"),
    "seconds": tables.seconds(1),
}


def style(name: str) -> dict:
    """A colour for each normalizer; its starred row is dashed in the same colour."""
    plain = name.rstrip("*")
    return {"color": f"C{list(PLAIN).index(plain)}", "ls": "-" if name == plain else "--"}


DESCRIPTION = "Trains a small CNN with each normalizer, and reports what the normalizer did."
EXPERIMENT = experiment.Experiment("compare", DESCRIPTION, Options, tuple(ROWS), listing, configure, load, train, write)
main = functools.partial(experiment.run, EXPERIMENT)

if __name__ == "__main__":
    main()
