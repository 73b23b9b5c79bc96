"""Ren et al. 2017, CIFAR-10 and CIFAR-100: what smoothing and the L1 penalty do for batch, layer and divisive norm.

    python -m experiments.cifar --data-dir DIR                      # six published rows as published: 35 hours on 2 cores
    python -m experiments.cifar --data-dir DIR --scale 0.01 --rows bn 'bn*' ln 'ln*' 'dn*'
    python -m experiments.cifar --data-dir DIR --dataset cifar100 --scale 0.01 --seeds 2 --resume
    python -m experiments.cifar --list                              # all rows, with the published numbers
    python -m experiments.cifar --smoke                             # try everything out, on digits: no files needed

The network, the schedule, sigma and alpha are the published ones (`networks`, `ROWS`); --scale shrinks the schedule
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
Known limits: a short schedule is no substitute for the long one: results/cifar-10 has what 3,200 of 80,000 steps reach.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from experiments.common import classify, cli, command, data, experiment, loop, pictures, report, tables, trained
from experiments.networks import cnn
from experiments.networks.resnet import ResNet
from normjax import Normalizer
from normjax.diagnostics import correlation, mutual_information
from normjax.train import State

# Fields A and B of each kind of normalizer; in windows of {} stand the published widths.
FIELDS = {"batch": "n ...", "layer": "... c", "divisive": "...:{} c", "none": None}
WINDOWS = {"cnn": (5, 3, 3), "resnet": (7, 5, 5, 5)}
DATASETS = ("cifar10", "cifar100", "digits")


class Published(NamedTuple):
    """A row as published; what depends on the data set is (of CIFAR-10, of CIFAR-100)."""

    kind: str  # of normalizer, a key of FIELDS
    sigma: tuple[float, float] | None = (1e-2, 1e-2)  # smoothing, eps = sigma ** 2; None centres and does not divide
    alpha: tuple[float, float] = (0.0, 0.0)  # factor of the L1 penalty
    affine: bool = True  # whether a scale and a bias a channel follow
    accuracy: tuple[float, float] | None = None  # on the test images, in per cent; None where none was published
    network: str = "cnn"  # or "resnet"
    learn_sigma: bool = False  # whether sigma is learned, from that value on
    dropout: float = 0.0  # on the inputs of both dense layers
    base: bool = False  # whether it has the schedule of the baseline
    lr: float = 1e-3

    def schedule(self) -> tuple[int, ...]:
        """Decay points and length, published."""
        if self.base:
            return 5_000, 30_000, 50_000
        return (40_000, 60_000, 80_000) if self.network == "resnet" else (30_000, 50_000, 80_000)


_base = functools.partial(Published, "none", None, affine=False, base=True)
_resnet = functools.partial(Published, network="resnet", lr=0.1)

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
# What the paper claims: the star against its plain row, dn* against bn, and each half of the star alone.
CLAIMS = (
    *classify.stars(tuple(ROWS)).items(),
    *tables.claims("dn* > bn, bn-s > bn, bn-l1 > bn, bn* > bn-s, bn* > bn-l1, ln-s > ln, ln-l1 > ln, ln* > ln-s"),
    *tables.claims("ln* > ln-l1, bn > bn-ms, ln > ln-ms, dn > dn-ms, bn > base, base-l1 > base, base+dropout > base"),
)
ACCURACY = tables.Metric("test_accuracy", "test accuracy, in per cent", factor=100)
CORRELATION = tables.Metric("test_correlation", "correlation", digits=3, lower=True)
INFORMATION = tables.Metric("test_information", "mutual information in nats", digits=3, lower=True)

BETWEEN = 1000  # test images of the evaluations before the last
HELD_OUT_BATCH = 200  # images over whose positions units are correlated
BINS = 20  # of mutual information, a unit


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
    """cifar10, cifar100 or digits; by default cifar10, and with --smoke and no --data-dir digits, which need no files."""
    scale: float = 1.0
    """Factor of all steps: 0.02 trains 1,600 instead of 80,000, and decays the learning rate 50 times as early."""
    lr: float | None = None
    """Learning rate of every row instead of the published ones."""
    border: str = "zero"
    """Past the edge, dn's windows see zero (the published code) or nothing: truncate (the paper)."""
    side_by_side: bool = False
    """Train the seeds of a row in one vmap rather than one after the other: slower on CPUs, not measured elsewhere."""

    @property
    def chosen(self) -> str:
        """The data set."""
        return self.dataset or ("digits" if self.smoke and self.data_dir is None else "cifar10")

    def check(self) -> None:
        """Exits with code 2 where a value is wrong by itself."""
        cli.pick(self.chosen, DATASETS, "data set")
        cli.pick(self.border, ("zero", "truncate"), "border")
        command.positive(self, "seeds", "scale", *command.given(self, "lr"))
        command.needless(self.chosen, self.data_dir)


Job = experiment.Job[Options, data.Dataset]


def configure(name: str, options: Options, _: None = None) -> Config:
    """A row's configuration under the options of the command line."""
    row, which, scale = ROWS[name], int(options.chosen == "cifar100"), options.scale
    field, resnet = FIELDS[row.kind], row.network == "resnet"
    fields = [field and field.format(width) for width in WINDOWS[row.network]]
    eps, divided = (0.0, False) if row.sigma is None else (row.sigma[which] ** 2, True)
    *decays, steps = (command.scaled(step, scale) for step in row.schedule())
    config = Config(
        network=row.network,
        normalizers=tuple(Normalizer(f, f if divided else None, eps=eps, border=options.border) for f in fields),
        affine=row.affine,
        l1=row.alpha[which],
        learn_sigma=row.learn_sigma,
        dropout=row.dropout,
        dataset=options.chosen,
        border=options.border,
        scale=scale,
        seeds=options.seeds,
        steps=steps,
        decays=tuple(decays),
        lr=options.lr or row.lr,
        weight_decay=2e-4 if resnet else 0.0,
        augment=resnet,
        batch_size=100,
        evaluate_every=max(1, -(-steps // 10)),
        examples=None,
    )
    return command.shrunk(config, decays=(4, 5), batch_size=8, examples=64) if options.smoke else config


def listing(options: Options) -> str:
    """The rows with what they are and the published accuracy; digits have those of CIFAR-10."""
    lines = []
    for name, row in ROWS.items():
        config = configure(name, options)
        fields = dict.fromkeys(str(n.mean) if n.mean else "none" for n in config.normalizers)
        shown = ", ".join(fields) + (", not divided" if row.kind != "none" and row.sigma is None else "")
        which = int(config.dataset == "cifar100")
        sigma = "-" if row.sigma is None else f"{row.sigma[which]:g}" + (", learned" if row.learn_sigma else "")
        accuracy = "-" if row.accuracy is None else f"{row.accuracy[which]:.2f}"
        lines.append([name, shown, sigma, f"{config.l1:g}", "yes" if row.affine else "no", accuracy])
    return report.table(["row", "normalizer", "sigma", "alpha", "affine", "published"], lines)


# --- training -------------------------------------------------------------------------------------


def folder(options: Options) -> str:
    """What is compared shares the data set."""
    return f"cifar-{options.chosen.removeprefix('cifar')}"


def load(options: Options, _: None) -> data.Dataset:
    """The data set."""
    return data.load(options.chosen, options.data_dir)


def build(job: Job, config: Config) -> classify.Classifier:
    """Network, loss and optimizer of a row."""
    own = {"classes": job.data.classes, "affine": config.affine, "learn_sigma": config.learn_sigma, "l1": config.l1}
    network = functools.partial(cnn.ren2017, dropout=config.dropout) if config.network == "cnn" else ResNet
    model = network(config.normalizers, **own)
    rate = optax.piecewise_constant_schedule(config.lr, dict.fromkeys(config.decays, 0.1))
    tx = optax.sgd(lambda count: rate(jnp.asarray(count, jnp.float32)), momentum=0.9)  # else optax mixes dtypes
    if config.weight_decay:
        tx = optax.chain(optax.add_decayed_weights(config.weight_decay, classify.kernels), tx)
    mean, high = classify.mean_image(job.data)[None], job.data.high

    def scaled(batch: loop.Batch) -> jax.Array:
        image = batch["image"].astype(jnp.float32)
        return image - mean if config.network == "cnn" else image / high

    return classify.classifier(model, tx, job.data.train["image"].shape[1:], scaled)


def train(job: Job, config: Config) -> loop.Task:
    """How a row is trained."""
    model = build(job, config)

    def step(state: State, batch: loop.Batch, key: jax.Array | None = None) -> tuple[State, loop.Metrics]:
        if config.augment and key is not None:
            key, own = jax.random.split(key)
            batch = {**batch, "image": classify.augment(own, batch["image"])}
        return model.step(state, batch, key)

    def evaluate(state: State, test: loop.Batch) -> loop.Metrics:
        def judged(batch: loop.Batch) -> Callable[[State], loop.Metrics]:
            return lambda state: loop.mean_over(model.judge, state, batch, config.batch_size)

        last = state.step == config.steps
        metrics = lax.cond(last, judged(test), judged(classify.first(test, BETWEEN)), state)
        z = model.preactivation(state, classify.first(test, HELD_OUT_BATCH))
        # A fourth of the positions of 40 images: histograms are slow on CPUs.
        information = mutual_information(z[:40, ::2, ::2], bins=BINS, miller_madow=True)
        return metrics | {"correlation": correlation(z), "information": information}

    return loop.Task(
        model.init,
        step,
        evaluate,
        classify.first(job.data.train, config.examples),
        classify.first(job.data.test, config.examples),
        config.batch_size,
        side_by_side=job.options.side_by_side,
        noise=config.augment or config.dropout > 0,
        say=classify.say,
    )


# --- the report -----------------------------------------------------------------------------------


def write(job: Job, configs: Mapping[str, Config], rows: dict[str, trained.Row]) -> report.Report:
    """Tables beside the published numbers, the paper's claims, curves, and what two units look like."""
    config = next(iter(rows.values())).config
    which = {"cifar10": 0, "cifar100": 1}.get(config["dataset"])  # nothing is published of digits
    known = {name: row.accuracy[which] for name, row in ROWS.items() if row.accuracy and which is not None}
    results = tables.published(rows, ACCURACY, known, [name for name in ROWS if name in known or name in rows])
    claims = tables.pairs(rows, ACCURACY, CLAIMS)
    units = "\n\n".join(filter(None, (tables.pairs(rows, metric, CLAIMS) for metric in (CORRELATION, INFORMATION))))
    metrics = {"test_accuracy": "held-out accuracy", "loss": "training loss (log)", "test_correlation": "correlation"}
    curves = report.curves(rows, metrics, style, config["evaluate_every"])
    test = classify.first(job.data.test, config["examples"])
    held_out, batch = len(test["label"]), classify.first(test, HELD_OUT_BATCH)
    histograms = classify.histograms(job.folder, list(rows), lambda name: build(job, configs[name]), batch)
    values = {
        "dataset": config["dataset"],
        "settings": f"{report.settings(config, 'scale', 'batch_size', 'border')}, {trained.seeds(rows)}",
        "scale": config["scale"],
        "shrunk": config["scale"] != 1,
        "results": results,
        "missed": tables.missed(rows, ACCURACY, known),
        "claims": claims or "No pair of rows was run.",
        "units": units,
        "summary": tables.each(rows, SUMMARY),
        "pairs": histograms,
        "configurations": tables.each(rows, CONFIGURATIONS),
        "held_out": held_out,
        "between": min(BETWEEN, held_out),
        "batch": min(HELD_OUT_BATCH, held_out),
        "bins": BINS,
    }
    drawn = {"curves": curves, "response": pictures.draw_responses()} | histograms
    return report.Report((results, claims, units), drawn, values)


SUMMARY: dict[str, tables.Column] = {
    "training loss": tables.shown("loss", 4, when="recent"),
    "training accuracy": tables.shown("accuracy", 2, factor=100, when="recent"),
    "correlation": tables.shown("test_correlation", 3),
    "at random weights": tables.shown("test_correlation", 3, when="first"),
    "mutual information": tables.shown("test_information", 3),
    "seconds of training steps": tables.seconds(),
}
CONFIGURATIONS: dict[str, tables.Column] = {
    "normalizers": lambda row: ", ".join(f"`{n}`" for n in dict.fromkeys(row.config["normalizers"])),
    **tables.config({"alpha": "l1", "scale and bias": "affine", "sigma learned": "learn_sigma", "learning rate": "lr"}),
    "decays at": lambda row: ", ".join(map(str, row.config["decays"])),
    **tables.config({"steps": "steps"}),
}


def style(name: str) -> dict:
    """A colour for each kind of normalizer, and a line for each of its variants."""
    network, _, plain = name.rpartition("-") if name.startswith("resnet-") else ("", "", name)
    kind = plain.rstrip("*").partition("-")[0].partition("+")[0]
    colour = ("base", "bn", "ln", "dn", "none").index(kind)
    variant = "--" if name.endswith("*") else ":" if plain != kind else "-"
    return {"color": f"C{colour}", "ls": variant, "lw": 2.5 if network else 1.5}


DESCRIPTION = "Trains the CIFAR networks of Ren et al. 2017, and reports beside the published numbers."
EXPERIMENT = experiment.Experiment(
    "cifar", DESCRIPTION, Options, tuple(ROWS), listing, configure, load, train, write, folder
)
main = functools.partial(experiment.run, EXPERIMENT)

if __name__ == "__main__":
    main()
