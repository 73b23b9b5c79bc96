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
report.md, report.html and the pictures. A folder holds one setting: rows that are there with other
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

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import normjax.train
from experiments.common import cli, command, data, loop, pictures, report, runs, tables
from experiments.common.models import CNN
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
STARS = {name: name[:-1] for name in ROWS if name.endswith("*")}
ACCURACY = tables.Metric("test_accuracy", "accuracy, in per cent", factor=100, digits=2)
HELD_OUT_BATCH = 200  # images over whose positions units are correlated


DESCRIPTION = "Trains a small CNN with each normalizer, and reports what the normalizer did."


@dataclass(frozen=True, kw_only=True)
class Options(command.Options):
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
    devices: int | None = None
    """Spread each batch over so many devices (of each process, with --distributed), on a CPU simulated ones."""
    distributed: bool = False
    """This is one of several processes, each started with the same options."""
    coordinator: str | None = None
    """HOST:PORT of process 0; needless, as the next two, on clusters that jax.distributed knows."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the chosen rows and reports on all rows of the folder."""
    prog = "python -m experiments.compare"
    options = cli.parse(Options, argv, prog=prog, description=DESCRIPTION)
    if options.show:
        head = ["row", "normalizer", "alpha", "scale and bias"]
        print(report.table(head, [[name, repr(c.normalizer), str(c.l1), str(c.affine)] for name, c in ROWS.items()]))
        return
    start = time.perf_counter()
    mesh = cli.connect(options.devices, options.distributed, options.coordinator, options.processes, options.process)
    # Every process its own folders; all else must be alike.
    cli.agree(replace(options, process=None, out=Path(), data_dir=None), "options")
    with cli.together():
        rows, configs, experiment, dataset = prepare(options, mesh)
    pixels = pixel_moments(dataset)
    devices = 1 if mesh is None else mesh.size
    job = Job(experiment, dataset, pixels, mesh, runs.environment(devices))

    for name, show in command.each(rows, {name: config.steps for name, config in configs.items()}):
        train(job, name, configs[name], show)
    with cli.together():
        if jax.process_index() == 0:
            write_report(job, configs)
            print(f"The whole job took {time.perf_counter() - start:.0f} seconds.")


def prepare(options: Options, mesh: Mesh | None) -> tuple[list[str], dict[str, "Config"], Path, data.Dataset]:
    """Refuses what cannot be done, reads the data, and makes the folder: rows, configurations, folder and data."""
    rows = command.rows_of(options, ROWS)
    cli.pick(options.dataset, data.DATASETS, "data set")
    command.positive(options, "seeds", "steps", "lr", "batch_size")
    configs = {name: configure(config, options) for name, config in ROWS.items()}
    batch_size = configs[rows[0]].batch_size
    if mesh is not None and batch_size % mesh.size:
        cli.fail(
            f"a batch of {batch_size} examples does not divide over {mesh.size} devices; choose other --devices or "
            "--batch-size"
        )

    experiment = command.folder(options, "compare")
    part = (jax.process_index(), jax.process_count())
    dataset = command.begin(
        options, experiment, configs, rows, lambda: data.load(options.dataset, options.data_dir, part)
    )
    return rows, configs, experiment, dataset


def configure(config: Config, options: Options) -> Config:
    """A row's configuration under the options of the command line."""
    config = replace(
        config,
        seeds=options.seeds,
        steps=options.steps,
        evaluate_every=max(1, options.steps // 10),
        dataset=options.dataset,
        batch_size=options.batch_size,
        lr=options.lr,
    )
    if options.smoke:
        seeds, steps = min(config.seeds, 2), min(config.steps, 6)
        config = replace(config, seeds=seeds, steps=steps, evaluate_every=2, batch_size=8, examples=64)
    return config


class Job(NamedTuple):
    """What the rows of one command share."""

    experiment: Path
    dataset: data.Dataset  # of several processes, this one's part
    pixels: tuple[float, float]  # mean and standard deviation of the training images
    mesh: Mesh | None
    environment: dict


def pixel_moments(dataset: data.Dataset) -> tuple[float, float]:
    """Mean and standard deviation of the pixels of all training images, those of the other processes too."""
    blocks = np.array_split(dataset.train["image"], 100)  # all pixels as integers would fill the memory
    counts = loop.total(np.sum([np.bincount(block.ravel(), minlength=256) for block in blocks], axis=0))
    values = np.arange(256)
    mean = float(np.average(values, weights=counts))
    return mean, float(np.average((values - mean) ** 2, weights=counts) ** 0.5)


def train(job: Job, name: str, config: Config, show: Callable[[int, str], None]) -> None:
    """Trains all seeds of one row, from where its folders say that it stopped."""
    folders = runs.seed_folders(job.experiment, name, config.seeds)
    with cli.together():
        if jax.process_index() == 0:
            runs.create(folders, config, job.environment)

    def on_chunk(step: int, evaluation: dict[str, np.ndarray]) -> None:
        show(step, f"held-out accuracy {evaluation['accuracy'].mean():.1%}")

    task = build(config, job)
    examples = min(config.examples or job.dataset.examples, job.dataset.examples)
    mine = len(range(jax.process_index(), examples, jax.process_count()))
    loop.train(
        folders,
        task.init,
        task.step,
        task.evaluate,
        {name: column[:mine] for name, column in job.dataset.train.items()},
        {name: column[: config.examples] for name, column in job.dataset.test.items()},
        steps=config.steps,
        batch_size=config.batch_size,
        evaluate_every=config.evaluate_every,
        examples=examples,
        mesh=job.mesh,
        on_chunk=on_chunk,
    )


class Task(NamedTuple):
    """What a configuration means: functions of one seed."""

    init: Callable[[jax.Array], State]
    step: Callable[[State, loop.Batch], tuple[State, loop.Metrics]]
    evaluate: Callable[[State, loop.Batch], loop.Metrics]
    preactivation: Callable[[State, jax.Array], Any]  # of the first layer, [n, h, w, c]


def build(config: Config, job: Job) -> Task:
    """Network, loss and optimizer of a row."""
    model = CNN(
        config.normalizer,
        classes=job.dataset.classes,
        channels=config.channels,
        affine=config.affine,
        l1=config.l1,
    )
    tx = optax.sgd(optax.cosine_decay_schedule(config.lr, config.steps), momentum=0.9)
    mean, std = job.pixels

    def standardize(image: jax.Array) -> jax.Array:
        return (image.astype(jnp.float32) - mean) / std

    def loss(call: Callable[..., jax.Array], batch: loop.Batch, train: bool):
        logits = call(standardize(batch["image"]), train=train)
        label = batch["label"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return cross_entropy.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == label)}

    judge = normjax.train.linen_eval(model, loss, mesh=job.mesh)
    devices = 1 if job.mesh is None else job.mesh.size

    def init(key: jax.Array) -> State:
        image = jnp.zeros((1, *job.dataset.train["image"].shape[1:]))
        return normjax.train.linen_init(model, tx, key, image, train=False)

    def preactivation(state: State, image: jax.Array) -> Any:
        return model.apply({"params": state.params, **state.stats}, standardize(image), method="preactivation")

    def evaluate(state: State, test: loop.Batch) -> loop.Metrics:
        z = preactivation(state, test["image"][:HELD_OUT_BATCH])
        examples = len(test["label"])  # all at once, or in batches that caches hold: twice as fast on MNIST
        size = examples if examples < 1000 else 100
        size = max(size - size % devices, 1)  # so that each device has its share; the few that remain go to all
        return loop.mean_over(judge, state, test, size) | {"correlation": diagnostics.correlation(z)}

    return Task(init, normjax.train.linen_step(model, loss, tx, mesh=job.mesh), evaluate, preactivation)


# --- the report -----------------------------------------------------------------------------------


def write_report(job: Job, configs: Mapping[str, Config]) -> None:
    """Prints the table, and writes it with the pictures to report.md and report.html.

    Shown are all complete rows of the folder, whatever --rows: `runs.check` saw that they share one setting, so
    `configs` holds for every one of them.
    """
    experiment = job.experiment
    rows = report.read_rows(experiment, list(configs))
    config = next(iter(rows.values())).config
    summary = summarize(rows)
    differences = f"{tables.exceeding(rows, ACCURACY)}\n\n{compare_correlations(rows)}"
    print(f"\n{summary}\n\n{differences}\n")

    smooth = config["evaluate_every"]
    held_out = len(job.dataset.test["label"][: config["examples"]])
    metrics = {"test_accuracy": "held-out accuracy", "loss": "training loss (log)"}
    report.save(report.curves(rows, metrics, style, smooth), experiment / "curves.png")
    report.save(pictures.draw_responses(), experiment / "response.png")
    histograms = ""
    pairs = {star: plain for star, plain in STARS.items() if star in rows and plain in rows}
    if pairs:
        z = {name: first_layer(name, configs[name], job) for pair in pairs.items() for name in pair}
        report.save(pictures.draw_histograms(pairs, z), experiment / "histograms.png")
        histograms = HISTOGRAMS
    settings = ", ".join(f"{name} {config[name]}" for name in ("dataset", "seeds", "steps", "batch_size", "lr"))
    normalizers = report.table(
        ["row", "normalizer", "alpha", "scale and bias"],
        [
            [name, f"`{r.config['normalizer']}`", str(r.config["l1"]), str(r.config["affine"])]
            for name, r in rows.items()
        ],
    )
    report.write_pages(
        experiment,
        REPORT.format(
            settings=settings,
            environments=report.environments(rows),
            summary=summary,
            differences=differences,
            all_differences=tables.differences(rows, ACCURACY),
            normalizers=normalizers,
            histograms=histograms,
            batch=min(HELD_OUT_BATCH, config["examples"] or HELD_OUT_BATCH),
            smooth=smooth,
            held_out=held_out,
            one_image=100 / held_out,
        ),
    )
    print(f"Report: {experiment / 'report.html'} (and report.md)")


def summarize(rows: Mapping[str, report.Row]) -> str:
    """The table of results, one line a row."""
    head = ["row", "accuracy %", "training loss", "correlation", "at random weights", "seconds"]
    return report.table(
        head,
        [
            [
                name,
                report.plus_minus([100 * a for a in row.last("test_accuracy")], 2),
                report.plus_minus(row.recent("loss", row.config["evaluate_every"]), 4),
                report.plus_minus(row.last("test_correlation"), 3),
                report.plus_minus(row.first("test_correlation"), 3),
                f"{row.last('seconds')[0]:.1f}",
            ]
            for name, row in rows.items()
        ],
    )


def compare_correlations(rows: Mapping[str, report.Row]) -> str:
    """Says what the star did to the correlation between units, paired over seeds."""
    said = []
    for star, plain in STARS.items():
        if star in rows and plain in rows:
            a, b = (rows[name].last("test_correlation") for name in (star, plain))
            mean, std = report.difference(a, b)
            verdict = "more" if abs(mean) > std else "not more"
            said.append(f"{star} - {plain}: {mean:+.3f} +- {std:.3f}, {verdict} than its spread")
    return f"Correlation between first-layer units, paired over seeds: {'; '.join(said)}." if said else ""


def style(name: str) -> dict:
    """A colour for each normalizer; its starred row is dashed in the same colour."""
    plain = STARS.get(name, name)
    return {"color": f"C{list(PLAIN).index(plain)}", "ls": "--" if name in STARS else "-"}


def first_layer(name: str, config: Config, job: Job) -> np.ndarray:
    """Pre-activations of a row's seed 0, from its checkpoint, on the held-out batch: [samples, units]."""
    task = build(config, job)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    state = runs.load(runs.seed_folders(job.experiment, name, 1)[0], shapes)
    image = jnp.asarray(job.dataset.test["image"][: config.examples][:HELD_OUT_BATCH])
    z = np.asarray(task.preactivation(state, image))
    return z.reshape(-1, z.shape[-1])


HISTOGRAMS = """## Two units before normalization, without and with smoothing and penalty

![Joint histograms of two units](histograms.png)

First-layer pre-activations of seed 0 on the held-out batch, all positions, counts on a logarithmic
scale; both pictures of a column have the same axes. The two units are a typical pair of their row: the
one whose |correlation| is the closest to the mean over all pairs.
"""

REPORT = """# What normalizers do to a small CNN

{settings}. Every row starts from the same weights and sees the same examples in the same order.

{summary}

Mean +- standard deviation over seeds. Accuracy is that on the {held_out} held-out images, in per cent,
after the last step (one image is {one_image:.2f} per cent); training loss the mean over the last {smooth}
steps, without the penalty; correlation the mean |correlation| between different units of the first
layer before normalization, over all positions of one held-out batch of {batch} images, beside the same
at random (initial) weights; seconds are those of the training steps of all seeds together, without
compilation, evaluation and writing.

{differences}

## Learning curves

![Learning curves](curves.png)

Mean over seeds, band of one standard deviation; starred rows are dashed.

{histograms}
## Divisive norm and ReLU, read as one activation function

![Response curves](response.png)

The response to the centre of three pixels while its neighbours stay as they are: a small sigma
turns the unit into a detector of contrast, a large one leaves a scaled ReLU.

## All differences in accuracy

Per cent, row minus column, paired over seeds; bold where the mean exceeds the standard deviation.

{all_differences}

## The rows

{normalizers}

v is centred over the first field and divided by the square root of eps (sigma squared) plus the
mean square over the second; alpha is the factor of the L1 penalty mean |v|.

## Where the numbers come from

The folders beside this file: config.json, metrics.jsonl and a checkpoint for each row and seed.

{environments}
"""


if __name__ == "__main__":
    main()
