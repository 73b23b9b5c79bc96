"""Ren et al. 2017, CIFAR-10 and CIFAR-100: what smoothing and the L1 penalty do for batch, layer and divisive norm.

    python -m experiments.cifar --data-dir DIR                      # six published rows as published: 35 hours on 2 cores
    python -m experiments.cifar --data-dir DIR --scale 0.01 --rows bn 'bn*' ln 'ln*' 'dn*'
    python -m experiments.cifar --data-dir DIR --dataset cifar100 --scale 0.01 --seeds 2 --resume
    python -m experiments.cifar --list                              # all rows, with the published numbers
    python -m experiments.cifar --smoke                             # try everything out, on digits: no files needed

The network, the schedule, sigma and alpha are the published ones (`common/ren.py`, `ROWS`); --scale shrinks the schedule
as a whole, decay points included. --border zero, the default, is the dialect of the published code (zeros past the edge
count in the windows of dn), truncate that of the paper. Rows of resnet- train a ResNet-32, for which no number was
published. digits takes the settings of CIFAR-10.

It prints a table and leaves runs/cifar-10/<row>/seed-<k>/ (or cifar-100, cifar-digits) with config.json, metrics.jsonl and a
checkpoint, report.md, report.html and pictures, as `compare` does. Held-out accuracy is that on all test images at
the last step, and on the first BETWEEN of them before.

Hardware and time: on two CPU cores a step of bn takes 0.08 s, and 0.105 s on one, most of it convolutions; a plain Flax
loop takes 1.5 to 1.9 times as long (`python -m benchmarks.loops`, `--heap stock`). So the published schedule takes two
hours a row and seed there, and --scale 0.01 about a minute. Seeds run one after the other: the three convolutions as
patches and products, which seeds side by side would need, took 243 against 119 ms a seed, both directions. Nothing was
measured on a GPU.
Known limits: a short schedule is no substitute for the long one: bn reaches 53 per cent with --scale 0.01 (one seed).
A rate of 0.01 instead of 0.001 did not help it: 49.1 against 50.8 after 480 of 800 steps. Its first weights, of size
1e-4, grew a thousandfold within 310 steps (rate 0.0003), which would leave its gradient little hold on them (not
tested); those of bn* grew sixtyfold, and bn* starts slowly instead (35 per cent by then).
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import normjax.train
from experiments.common import cli, command, data, loop, pictures, report, runs, tables
from experiments.common.ren import CNN, ResNet
from normjax import Normalizer
from normjax.diagnostics import correlation, mutual_information
from normjax.train import State

# --- the rows -------------------------------------------------------------------------------------

# Fields A and B of each kind of normalizer; in windows of {} stand the published widths.
FIELDS = {"batch": "n ...", "layer": "... c", "divisive": "...:{} c", "none": None}
WINDOWS = {"cnn": (5, 3, 3), "resnet": (7, 5, 5, 5)}
DATASETS = ("cifar10", "cifar100", "digits")


class Published(NamedTuple):
    """A row as published; what depends on the data set is (of CIFAR-10, of CIFAR-100).

    Attributes:
      kind: of normalizer, a key of FIELDS.
      sigma: smoothing, eps = sigma ** 2; None centres and does not divide.
      alpha: factor of the L1 penalty.
      affine: whether a scale and a bias a channel follow.
      accuracy: on the test images, in per cent; None where no number was published.
      network: "cnn" or "resnet".
      learn_sigma: whether sigma is learned, from that value on.
      dropout: on the inputs of both dense layers.
      base: whether it has the schedule of the baseline.
      lr: learning rate.
    """

    kind: str
    sigma: tuple[float, float] | None = (1e-2, 1e-2)
    alpha: tuple[float, float] = (0.0, 0.0)
    affine: bool = True
    accuracy: tuple[float, float] | None = None
    network: str = "cnn"
    learn_sigma: bool = False
    dropout: float = 0.0
    base: bool = False
    lr: float = 1e-3


def _base(**more: Any) -> Published:
    return Published("none", None, affine=False, base=True, **more)


def _resnet(kind: str, *given: Any, lr: float = 0.1, **more: Any) -> Published:
    return Published(kind, *given, network="resnet", lr=lr, **more)


# fmt: off
ROWS = {
    "base":         _base(accuracy=(75.65, 44.09)),
    "base+dropout": _base(dropout=0.5),
    "base-l1":      _base(alpha=(0.01, 0.01)),
    "bn":           Published("batch", accuracy=(78.07, 48.14)),
    "bn-s":         Published("batch", (1.0, 0.25)),
    "bn-l1":        Published("batch", alpha=(0.005, 0.01)),
    "bn*":          Published("batch", (1.0, 0.25), (0.005, 0.01), accuracy=(81.79, 51.56)),
    "ln":           Published("layer", accuracy=(72.11, 42.49)),
    "ln-s":         Published("layer", (0.5, 0.5), affine=False),
    "ln-l1":        Published("layer", alpha=(0.005, 0.005)),
    "ln*":          Published("layer", (0.5, 0.5), (0.005, 0.005), False, (80.91, 49.57)),
    "dn":           Published("divisive", (0.5, 0.5), affine=False),
    "dn*":          Published("divisive", (0.5, 0.5), (0.005, 0.001), False, (81.22, 50.66)),
    "bn-ms":        Published("batch", None),
    "ln-ms":        Published("layer", None),
    "dn-ms":        Published("divisive", None, affine=False),
    "resnet-none":  _resnet("none", None, affine=False, lr=0.005),
    "resnet-bn":    _resnet("batch"),
    "resnet-ln":    _resnet("layer", (0.5, 0.5), affine=False),
    "resnet-dn":    _resnet("divisive", (0.5, 2.0), affine=False, learn_sigma=True),
    "resnet-dn*":   _resnet("divisive", (0.5, 2.0), (1e-3, 1e-2), False, learn_sigma=True),
}
# fmt: on
STARS = {name: name[:-1] for name in ROWS if name.endswith("*")}
# What the paper claims, as row - row: the star against its plain row, dn* against bn, and each half of the star alone.
CLAIMS = (
    *STARS.items(), ("dn*", "bn"), ("bn-s", "bn"), ("bn-l1", "bn"), ("bn*", "bn-s"), ("bn*", "bn-l1"),
    ("ln-s", "ln"), ("ln-l1", "ln"), ("ln*", "ln-s"), ("ln*", "ln-l1"), ("bn", "bn-ms"), ("ln", "ln-ms"), ("dn", "dn-ms"),
    ("bn", "base"), ("base-l1", "base"), ("base+dropout", "base"),
)  # fmt: skip
ACCURACY = tables.Metric("test_accuracy", "test accuracy, in per cent", factor=100)
CORRELATION = tables.Metric("test_correlation", "correlation", digits=3, lower=True)
INFORMATION = tables.Metric("test_information", "mutual information in nats", digits=3, lower=True)

BETWEEN = 1000  # test images of the evaluations before the last
HELD_OUT_BATCH = 200  # images over whose positions units are correlated
BINS = 20  # of mutual information, a unit
EVALUATIONS = 10


@dataclass(frozen=True)
class Config:
    """One row under the options of a command: everything that its numbers depend on, but for the seed."""

    network: str
    normalizers: tuple[Normalizer, ...]  # one a layer of the CNN; of the ResNet's first layer and stages
    affine: bool
    l1: float
    learn_sigma: bool
    dropout: float
    dataset: str
    border: str
    scale: float
    seeds: int
    steps: int
    decays: tuple[int, ...]  # steps after which the learning rate is a tenth
    lr: float
    weight_decay: float  # gradient of kernels: weight_decay * kernel
    augment: bool  # pad, crop and flip
    batch_size: int
    evaluate_every: int
    examples: int | None  # use the first of each split only (--smoke)


@dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """The command line."""

    rows: tuple[str, ...] = tuple(name for name, row in ROWS.items() if row.accuracy)
    seeds: int = 3
    dataset: str | None = None
    """cifar10, cifar100 or digits; by default cifar10, and with --smoke digits, which need no files."""
    scale: float = 1.0
    """Factor of all steps: 0.02 trains 1,600 instead of 80,000, and decays the learning rate 50 times as early."""
    lr: float | None = None
    """Learning rate of every row instead of the published ones."""
    border: str = "zero"
    """Past the edge, dn's windows see zero (the published code) or nothing: truncate (the paper)."""
    side_by_side: bool = False
    """Train the seeds of a row in one vmap rather than one after the other: slower on CPUs, not measured elsewhere."""


def configure(name: str, options: Options) -> Config:
    """A row's configuration under the options of the command line."""
    row, dataset = ROWS[name], chosen_dataset(options)
    which = int(dataset == "cifar100")
    field = FIELDS[row.kind]
    eps = 0.0 if row.sigma is None else row.sigma[which] ** 2
    fields = [field and field.format(width) for width in WINDOWS[row.network]]
    normalizers = tuple(
        Normalizer(f, None if row.sigma is None else f, eps=eps, border=options.border) for f in fields
    )  # fmt: skip
    resnet = row.network == "resnet"
    # Decay points and length, published.
    *decays, steps = (
        (5_000, 30_000, 50_000) if row.base else (40_000, 60_000, 80_000) if resnet else (30_000, 50_000, 80_000)
    )
    scale = options.scale
    steps = command.scaled(steps, scale)
    config = Config(
        row.network, normalizers, row.affine, row.alpha[which], row.learn_sigma, row.dropout, dataset, options.border,
        scale, options.seeds, steps, tuple(command.scaled(d, scale) for d in decays), options.lr or row.lr,
        2e-4 if resnet else 0.0, resnet, 100, max(1, -(-steps // EVALUATIONS)), None,
    )  # fmt: skip
    return smoke(config) if options.smoke else config


def smoke(config: Config) -> Config:
    """The same with few seeds, steps and examples."""
    steps = min(config.steps, 6)
    return dataclasses.replace(
        config, seeds=min(config.seeds, 2), steps=steps, decays=(4, 5), evaluate_every=2, batch_size=8, examples=64
    )


def chosen_dataset(options: Options) -> str:
    """The data set of the command line."""
    return options.dataset or ("digits" if options.smoke else "cifar10")


def listing(options: Options) -> str:
    """The rows with what they are and the published accuracy."""
    lines = []
    for name, row in ROWS.items():
        config = configure(name, options)
        fields = dict.fromkeys(str(n.mean) if n.mean else "none" for n in config.normalizers)
        shown = ", ".join(fields) + (", not divided" if row.kind != "none" and row.sigma is None else "")
        which = int(config.dataset == "cifar100")
        sigma = "-" if row.sigma is None else f"{row.sigma[which]:g}" + (", learned" if row.learn_sigma else "")
        published = "-" if row.accuracy is None else f"{row.accuracy[which]:.2f}"
        lines.append([name, shown, sigma, f"{config.l1:g}", "yes" if row.affine else "no", published])
    return report.table(["row", "normalizer", "sigma", "alpha", "affine", "published"], lines)


# --- training -------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What the rows of one command share."""

    experiment: Path
    dataset: data.Dataset
    mean: np.ndarray  # of all images, train and test, float32 [h, w, c]
    side_by_side: bool
    environment: dict


class Task(NamedTuple):
    """What a configuration means: functions of one seed."""

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, loop.Metrics]]
    evaluate: Callable[[State, loop.Batch], loop.Metrics]
    preactivation: Callable[[State, jax.Array], Any]  # of the first layer, [n, h, w, c]
    noise: bool  # whether a step takes a key


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the chosen rows and reports on all rows of the folder."""
    description = "Trains the CIFAR networks of Ren et al. 2017, and reports beside the published numbers."
    options = cli.parse(Options, argv, prog="python -m experiments.cifar", description=description)
    rows = command.rows_of(options, ROWS)
    dataset = cli.pick(chosen_dataset(options), DATASETS, "data set")
    cli.pick(options.border, ("zero", "truncate"), "border")
    command.positive(options, "seeds", "scale", *command.given(options, "lr"))
    if options.show:
        print(listing(options))
        return
    start = time.perf_counter()
    configs = {name: configure(name, options) for name in ROWS}
    experiment = command.folder(options, f"cifar-{dataset.removeprefix('cifar')}")
    loaded = command.begin(options, experiment, configs, rows, lambda: data.load(dataset, options.data_dir))
    job = Job(experiment, loaded, mean_image(loaded), options.side_by_side, runs.environment())
    for name, show in command.each(rows, {name: config.steps for name, config in configs.items()}):
        train(job, name, configs[name], show)
    write_report(job, configs)
    print(f"The whole job took {time.perf_counter() - start:.0f} seconds.")


def mean_image(dataset: data.Dataset) -> np.ndarray:
    """The mean over all images, of training and test together as published, float32 [h, w, c]."""
    splits = (dataset.train["image"], dataset.test["image"])
    total = np.sum([split.sum(axis=0, dtype=np.int64) for split in splits], axis=0)
    return (total / sum(map(len, splits))).astype(np.float32)


def train(job: Job, name: str, config: Config, show: Callable[[int, str], None]) -> None:
    """Trains all seeds of one row, from where its folders say that it stopped."""
    folders = runs.seed_folders(job.experiment, name, config.seeds)
    runs.create(folders, config, job.environment)

    def on_chunk(step: int, evaluation: dict[str, np.ndarray]) -> None:
        show(step, f"held-out accuracy {evaluation['accuracy'].mean():.1%}")

    task = build(config, job)
    loop.train(
        folders,
        task.init,
        task.step,
        task.evaluate,
        {name: column[: config.examples] for name, column in job.dataset.train.items()},
        {name: column[: config.examples] for name, column in job.dataset.test.items()},
        steps=config.steps,
        batch_size=config.batch_size,
        evaluate_every=config.evaluate_every,
        side_by_side=job.side_by_side,
        noise=task.noise,
        on_chunk=on_chunk,
    )


def build(config: Config, job: Job) -> Task:
    """Network, loss and optimizer of a row."""
    own = {"classes": job.dataset.classes, "affine": config.affine, "learn_sigma": config.learn_sigma, "l1": config.l1}
    if config.network == "cnn":
        model = CNN(config.normalizers, dropout=config.dropout, **own)
    else:
        model = ResNet(config.normalizers, **own)
    rate = optax.piecewise_constant_schedule(config.lr, dict.fromkeys(config.decays, 0.1))
    tx = optax.sgd(lambda count: rate(jnp.asarray(count, jnp.float32)), momentum=0.9)  # else optax mixes dtypes
    if config.weight_decay:
        tx = optax.chain(optax.add_decayed_weights(config.weight_decay, kernels), tx)
    mean, high = job.mean[None], job.dataset.high

    def scaled(image: jax.Array) -> jax.Array:
        image = image.astype(jnp.float32)
        return image - mean if config.network == "cnn" else image / high

    def loss(call: Callable[..., jax.Array], batch: loop.Batch, train: bool):
        logits = call(scaled(batch["image"]), train=train)
        label = batch["label"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return cross_entropy.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == label)}

    judge = normjax.train.linen_eval(model, loss)
    plain_step = normjax.train.linen_step(model, loss, tx)

    def init(key: jax.Array) -> State:
        image = jnp.zeros((1, *job.dataset.train["image"].shape[1:]))
        return normjax.train.linen_init(model, tx, key, image, train=False)

    def step(state: State, batch: loop.Batch, key: jax.Array | None = None) -> tuple[State, loop.Metrics]:
        if config.augment and key is not None:
            key, own = jax.random.split(key)
            batch = {**batch, "image": augment(own, batch["image"])}
        return plain_step(state, batch, key)

    def preactivation(state: State, image: jax.Array) -> Any:
        return model.apply({"params": state.params, **state.stats}, scaled(image), method="preactivation")

    def evaluate(state: State, test: loop.Batch) -> loop.Metrics:
        first = jax.tree.map(lambda a: a[:BETWEEN], test)
        judged = lax.cond(
            state.step == config.steps,
            lambda state: loop.mean_over(judge, state, test, config.batch_size),
            lambda state: loop.mean_over(judge, state, first, config.batch_size),
            state,
        )
        z = preactivation(state, test["image"][:HELD_OUT_BATCH])
        # A fourth of the positions of 40 images: histograms are slow on CPUs.
        information = mutual_information(z[:40, ::2, ::2], bins=BINS, miller_madow=True)
        return judged | {"correlation": correlation(z), "information": information}

    return Task(init, step, evaluate, preactivation, config.augment or config.dropout > 0)


def kernels(params: Any) -> Any:
    """Which parameters decay: the kernels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Shifts each image [n, h, w, c] by up to 4 pixels along both axes, zeros coming in, and mirrors half of them."""
    n, h, w, c = image.shape
    shift, mirror = jax.random.split(key)
    corners = jax.random.randint(shift, (n, 2), 0, 9)
    padded = jnp.pad(image, ((0, 0), (4, 4), (4, 4), (0, 0)))

    def crop(one: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(one, (corner[0], corner[1], 0), (h, w, c))

    flipped = jax.random.bernoulli(mirror, shape=(n, 1, 1, 1))
    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


# --- the report -----------------------------------------------------------------------------------


def write_report(job: Job, configs: Mapping[str, Config]) -> None:
    """Prints the tables, and writes them with the pictures to report.md and report.html.

    Shown are all complete rows of the folder, whatever --rows: `runs.check` saw that they share one setting.
    """
    experiment = job.experiment
    rows = report.read_rows(experiment, list(configs))
    config = next(iter(rows.values())).config
    dataset = config["dataset"]
    numbers = {
        name: None if row.accuracy is None or dataset == "digits" else row.accuracy[int(dataset == "cifar100")]
        for name, row in ROWS.items()
    }
    names = [name for name in ROWS if numbers[name] is not None or name in rows]
    results = tables.published(rows, ACCURACY, numbers, names)
    claims = tables.pairs(rows, ACCURACY, CLAIMS)
    units = "\n\n".join(filter(None, (tables.pairs(rows, metric, CLAIMS) for metric in (CORRELATION, INFORMATION))))
    print("\n" + "\n\n".join(filter(None, (results, claims, units))) + "\n")

    smooth = config["evaluate_every"]
    metrics = {"test_accuracy": "held-out accuracy", "loss": "training loss (log)", "test_correlation": "correlation"}
    report.save(report.curves(rows, metrics, style, smooth), experiment / "curves.png")
    report.save(pictures.draw_responses(), experiment / "response.png")
    pairs = {star: plain for star, plain in STARS.items() if star in rows and plain in rows}
    if pairs:
        z = {name: first_layer(name, configs[name], job) for pair in pairs.items() for name in pair}
        report.save(pictures.draw_histograms(pairs, z), experiment / "histograms.png")
    held_out = len(job.dataset.test["label"][: config["examples"]])
    report.write_pages(
        experiment,
        REPORT.format(
            dataset=dataset,
            settings=", ".join(f"{name} {config[name]}" for name in ("scale", "seeds", "batch_size", "border")),
            schedule=SCALED.format(scale=config["scale"]) if config["scale"] != 1 else "",
            results=results,
            missed=tables.missed(rows, ACCURACY, {name: n for name, n in numbers.items() if n is not None}),
            claims=claims or "No pair of rows was run.",
            units=units,
            summary=summarize(rows),
            histograms=HISTOGRAMS if pairs else "",
            configurations=configurations(rows),
            environments=report.environments(rows),
            held_out=held_out,
            between=min(BETWEEN, held_out),
            batch=min(HELD_OUT_BATCH, held_out),
            bins=BINS,
        ),
    )
    print(f"Report: {experiment / 'report.html'} (and report.md)")


def summarize(rows: Mapping[str, report.Row]) -> str:
    """What else was measured, one line a row."""
    head = [
        "row",
        "training loss",
        "training accuracy",
        "correlation",
        "at random weights",
        "mutual information",
        "seconds of training steps",
    ]
    lines = []
    for name, row in rows.items():
        loss = report.plus_minus(row.recent("loss", row.config["evaluate_every"]), 4)
        shown = [report.plus_minus(row.last(f"test_{metric}"), 3) for metric in ("correlation", "information")]
        shown.insert(1, report.plus_minus(row.first("test_correlation"), 3))
        accuracy = report.plus_minus([100 * a for a in row.recent("accuracy", row.config["evaluate_every"])], 2)
        lines.append([f"`{name}`", loss, accuracy, *shown, f"{row.last('seconds')[0]:.0f}"])
    return report.table(head, lines)


def configurations(rows: Mapping[str, report.Row]) -> str:
    """What the rows were trained with, as their folders say."""
    head = ["row", "normalizers", "alpha", "scale and bias", "sigma learned", "learning rate", "decays at", "steps"]
    lines = []
    for name, row in rows.items():
        c = row.config
        normalizers = ", ".join(f"`{n}`" for n in dict.fromkeys(c["normalizers"]))
        facts = (c["l1"], c["affine"], c["learn_sigma"], c["lr"], ", ".join(map(str, c["decays"])), c["steps"])
        lines.append([f"`{name}`", normalizers, *map(str, facts)])
    return report.table(head, lines)


def style(name: str) -> dict:
    """A colour for each kind of normalizer, and a line for each of its variants."""
    network, _, plain = name.rpartition("-") if name.startswith("resnet-") else ("", "", name)
    kind = plain.rstrip("*").partition("-")[0].partition("+")[0]
    colour = ("base", "bn", "ln", "dn", "none").index(kind)
    variant = "--" if name.endswith("*") else ":" if plain != kind else "-"
    return {"color": f"C{colour}", "ls": variant, "lw": 2.5 if network else 1.5}


def first_layer(name: str, config: Config, job: Job) -> np.ndarray:
    """Pre-activations of a row's seed 0, from its checkpoint, on the held-out batch: [samples, units]."""
    task = build(config, job)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    state = runs.load(runs.seed_folders(job.experiment, name, 1)[0], shapes)
    image = jnp.asarray(job.dataset.test["image"][: config.examples][:HELD_OUT_BATCH])
    z = np.asarray(jax.jit(task.preactivation)(state, image))
    return z.reshape(-1, z.shape[-1])


SCALED = """**The published schedule shrunk by {scale}**: steps and decay points are that part of the published ones, so
the published numbers are what the rows would be held against after the whole schedule; the differences between rows are
what such a run can show.
"""

HISTOGRAMS = """## Two units before normalization, without and with smoothing and penalty

![Joint histograms of two units](histograms.png)

First-layer pre-activations of seed 0 on the held-out batch, all positions, counts on a logarithmic scale; the axes
differ. The two units are a typical pair of their row: the one whose |correlation| is the closest to the mean over all
pairs.
"""

REPORT = """# Ren et al. 2017 on {dataset}

{settings}. Every row of a network starts each seed from the same weights and sees the same examples in the same order.

{schedule}
{results}

Mean +- standard deviation over seeds, on all {held_out} test images after the last step. {missed}

sigma and alpha are the published values. How they were chosen is not recorded: those of the starred rows may have
been chosen on the test images.

## The claims, paired over seeds

{claims}

## Units of the first layer before normalization

{units}

{summary}

Correlation is the mean |correlation| between different units over all positions of {batch} test images, beside the same at
random (initial) weights; mutual information the mean over pairs, from joint histograms of {bins} x {bins} bins over a
fourth of the positions of 40 of them, with the Miller-Madow correction. Training loss and accuracy (per cent) are means over
the last tenth of the steps, the loss without the penalty; seconds are those of the training steps of all seeds together.

## Learning curves

![Learning curves](curves.png)

Mean over seeds, band of one standard deviation; starred rows are dashed, other variants dotted. Held-out accuracy is that on
the first {between} test images, but at the last step on all.

{histograms}
## Divisive norm and ReLU, read as one activation function

![Response curves](response.png)

The response to the centre of three pixels while its neighbours stay as they are: a small sigma turns the unit into a
detector of contrast, a large one leaves a scaled ReLU.

## The rows

{configurations}

A normalizer is (summation field, suppression field, eps = sigma squared); alpha is the factor of the L1 penalty mean |v|.

## Where the numbers come from

The folders beside this file: config.json, metrics.jsonl and a checkpoint for each row and seed.

{environments}
"""


if __name__ == "__main__":
    main()
