"""Ren et al. 2017, experiment 3: SRCNN on the luminance of bicubically enlarged images, with and without normalizers.

    python -m experiments.superres --data-dir DIR       # DIR/superres/{T91, Set5, Set14, BSD200}, folders of images
    python -m experiments.superres --data-dir DIR --scale 0.06 --seeds 2   # the table of README.md
    python -m experiments.superres --data-dir DIR --images 1 --patches 100 --lr 0.0001      # batches and rate as published
    python -m experiments.superres --train-dir A --test-dir B C     # any folders of images
    python -m experiments.superres --bicubic --zoom 4 --data-dir DIR        # what there is to beat; trains nothing
    python -m experiments.superres --list               # the rows, with the published numbers beside

Without folders it takes photographs that come with scikit-image. What is published is followed where it is known and
works: 9-5-5 convolutions that see no border, truncated normal weights of 1e-3, SGD with momentum 0.9 and half the mean
square as the loss. dn* centres over 5 x 5 and divides over 7 x 7 positions, sigma 1, alpha 0.1, no scale or bias; sigma
and alpha are the published values, which may have been chosen on the test sets. Rows dn (5 x 5 both) and dn-ms are ours.
As in the published code, the penalty is left out of the loss, and windows count zeros past the border; --penalty paper
adds it (at our rate dn* then diverges within 700 steps: it needs a smaller --lr), and --border truncate has windows
end at the border.

Chosen here: how long to train (the published code never stops), the sigma of bn (0.01, as in the paper's experiment 1),
a batch of one patch of 33 x 33 from each of ten images (of all, if there are fewer) where the published code draws 100 of
one image, and a rate of 0.1 (0.01 for bn, which diverges at 0.1) where 0.0001 is published. With weights of 1e-3 the
output starts as a constant, and at the published rate it remains one for hundreds of thousands of steps, by the product
of rate and steps. The rate stays as it is, so scores go up and down to the end (last column of the report).

Scores are those of the literature: PSNR and SSIM of the luminance, rounded to 8 bits, without a border of --zoom pixels.
A convolution that sees no border makes an image smaller, so for a score the input's border is repeated 8 times.

It prints a table and leaves runs/superres/ (superres-x2, superres-x4 for these zooms) with bicubic/scores.json,
<row>/seed-<k>/ (config.json, metrics.jsonl, checkpoint, scores.json), report.md, report.html and the pictures.

Hardware and time: on two CPU cores a step takes 25 ms (srcnn) to 35 (dn*), 42 to 58 minutes for all 100,000 of one
row and seed (`--scale 0.002 --seeds 1`: 5 to 7 s for 200). Seeds train one after the other.
Known limits: all training images lie in memory at the size of the largest. A resumed run has the same bits only under
the same code, libraries and number of cores, and folders of the same name are taken to hold the same images.
"""

import functools
import importlib.resources
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import normjax.train
from experiments.common import cli, command, data, images, loop, report, runs, tables
from experiments.common.srcnn import SRCNN
from normjax import Normalizer
from normjax.train import State

PATCH = 33
WATCHED = 5  # images
BORDER = 8  # what the three convolutions take off on each side: 4 + 2 + 2


@dataclass(frozen=True)
class Config:
    """One row: everything that its numbers depend on, but for the seed."""

    normalizer: Normalizer
    affine: bool = False  # scale and bias a channel after the normalizer
    l1: float = 0.0  # alpha, factor of the penalty mean |v| of each normalized layer
    zoom: int = 3
    train: str = ""  # names of the folders
    test: str = ""
    seeds: int = 3
    steps: int = 100_000
    evaluate_every: int = 5_000
    images: int = 10  # a batch is so many images, and of each
    patches: int = 1  # so many patches
    lr: float = 0.1
    limit: int | None = None  # use the first images of each folder only (--smoke)


# fmt: off
ROWS = {
    "srcnn": Config(Normalizer(None, None)),
    "bn":    Config(Normalizer("n ...", "n ...", eps=0.01**2), affine=True, lr=0.01),
    "dn":    Config(Normalizer("...:5 c", "...:5 c", eps=1.0)),
    "dn*":   Config(Normalizer("...:5 c", "...:7 c", eps=1.0), l1=0.1),
    "dn-ms": Config(Normalizer("...:5 c", None)),
}
PUBLISHED = {  # on BSD200: PSNR and SSIM
    3: {"bicubic": (27.19, 0.7636), "srcnn": (28.42, 0.8100), "bn": (21.89, 0.7553), "dn*": (28.44, 0.8110)},
    4: {"bicubic": (25.92, 0.6952), "srcnn": (26.87, 0.7378), "bn": (21.53, 0.6741), "dn*": (26.96, 0.7428)},
}
# fmt: on
CLAIMS = (("dn*", "srcnn"), ("dn*", "bn"), ("bn", "srcnn"), ("dn", "srcnn"), ("dn*", "dn"))
SETS = ("Set5", "Set14", "BSD200")
# Photographs in the wheel of scikit-image, which needs no network for them.
BUNDLED = {
    "train": ("astronaut.png", "brick.png", "camera.png", "coffee.png", "grass.png", "motorcycle_left.png"),
    "test": ("chelsea.png", "coins.png", "moon.png", "rocket.jpg"),
}

DESCRIPTION = "Trains SRCNN with each normalizer on patches, and scores it on whole images beside bicubic."


@dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """The command line."""

    rows: tuple[str, ...] = ("srcnn", "bn", "dn", "dn*")
    seeds: int = Config.seeds
    data_dir: str | None = None
    """Folder that holds superres/T91, Set5, Set14 and BSD200; without any folder, photographs of scikit-image."""
    train_dir: tuple[str, ...] = ()
    """Folders of images to train on, instead of T91 or scikit-image's photographs."""
    test_dir: tuple[str, ...] = ()
    """Folders to be scored on, instead of Set5, Set14 and BSD200 or scikit-image's photographs; the first five images
    of the first are watched during training."""
    zoom: Literal[2, 3, 4] = 3
    """How many times larger along a side; 3 and 4 are published."""
    scale: float = 1.0
    """Factor of the number of steps."""
    lr: float | None = None
    """Learning rate of every row, instead of ours (0.1, and 0.01 for bn); 0.0001 is published."""
    images: int | None = None
    """Images in a batch; the published code takes one. By default 10, or all where there are fewer."""
    patches: int = Config.patches
    """Patches of each image in a batch; the published code takes 100."""
    penalty: Literal["paper", "code"] = "code"
    """Leave the L1 penalty out of the loss as the published code does, or add it (paper; needs a smaller --lr)."""
    border: Literal["zero", "truncate"] = "zero"
    """What windows see past the border: zeros (the published code) or nothing (the paper)."""
    bicubic: bool = False
    """Print the scores of bicubic enlargement, train nothing, write nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the chosen rows and reports on all rows of the folder."""
    options = cli.parse(Options, argv, prog="python -m experiments.superres", description=DESCRIPTION)
    if options.show:
        print(list_rows(options))
        return
    command.positive(options, "seeds", "scale", "patches", *command.given(options, "lr", "images"))
    start = time.perf_counter()
    if options.bicubic:
        try:
            print(bicubic_alone(load(options)))
        except data.DataError as error:
            cli.fail(str(error))
        return
    rows = command.rows_of(options, ROWS)
    configs = {name: configure(config, options) for name, config in ROWS.items()}
    experiment = command.folder(options, "superres" if options.zoom == 3 else f"superres-x{options.zoom}")
    dataset = command.begin(options, experiment, configs, rows, lambda: load(options))
    write_scores(experiment / "bicubic", score_bicubic(dataset))
    environment = runs.environment()
    for name, show in command.each(rows, {name: config.steps for name, config in configs.items()}):
        train(experiment, name, configs[name], dataset, environment, show)
    write_report(experiment, configs, dataset)
    print(f"The whole job took {time.perf_counter() - start:.0f} seconds.")


def list_rows(options: Options) -> str:
    """The table of --list."""
    head = ["row", "normalizer", "sigma", "alpha", "affine", *(f"BSD200 x{zoom}: PSNR / SSIM" for zoom in PUBLISHED)]

    def published(name: str) -> list[str]:
        found = [numbers.get(name) for numbers in PUBLISHED.values()]
        return ["-" if n is None else f"{n[0]:.2f} / {n[1]:.4f}" for n in found]

    lines = [["bicubic", "", "", "", "", *published("bicubic")]]
    for name, row in ROWS.items():
        config = configure(row, options)
        n = config.normalizer
        sigma = "" if n.var is None else f"{n.eps**0.5:g}"
        lines.append([name, repr(n), sigma, f"{config.l1:g}", "yes" if config.affine else "no", *published(name)])
    return report.table(head, lines)


def configure(config: Config, options: Options) -> Config:
    """A row's configuration under the options of the command line."""
    n = config.normalizer
    if ":" in str(n.mean):
        # The published code divides the sum over 7 x 7 by the area of 5 x 5.
        gain = 49 / 25 if options.border == "zero" and str(n.var) == "...:7 c" else 1.0
        n = replace(n, border=options.border, gain=gain)
    steps, (training, testing) = command.scaled(config.steps, options.scale), sources(options)
    config = replace(
        config,
        normalizer=n,
        l1=config.l1 if options.penalty == "paper" else 0.0,
        zoom=options.zoom,
        train=" ".join(source.name for source in training),
        test=" ".join(source.name for source in testing),
        seeds=options.seeds,
        steps=steps,
        evaluate_every=max(1, -(-steps // 20)),
        images=options.images or min(config.images, count(training)),
        patches=options.patches,
        lr=options.lr or config.lr,
    )
    if options.smoke:
        seeds, steps = min(config.seeds, 2), min(config.steps, 6)
        patches = min(config.patches, 4)
        config = replace(config, seeds=seeds, steps=steps, evaluate_every=2, images=1, patches=patches, limit=2)
    return config


# --- images ---------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where images come from: a folder, or files in scikit-image."""

    name: str
    paths: Callable[[], list[Path]]


class Dataset(NamedTuple):
    """The images of an experiment, by file name: those to train on, and each set to be scored on."""

    zoom: int
    train: dict[str, images.Pair]
    tests: dict[str, dict[str, images.Pair]]


def sources(options: Options) -> tuple[list[Source], list[Source]]:
    """What to train on, and what to be scored on."""

    def folders(given: Sequence[str], names: Sequence[str], bundled: str) -> list[Source]:
        root = None if options.data_dir is None else Path(options.data_dir).expanduser() / "superres"
        chosen = [Path(path).expanduser() for path in given] or ([root / name for name in names] if root else [])
        if not chosen:
            pictures = Path(str(importlib.resources.files("skimage.data")))
            return [Source(f"scikit-image-{bundled}", lambda: [pictures / file for file in BUNDLED[bundled]])]
        return [Source(path.resolve().name, functools.partial(images.files, path)) for path in chosen]

    return folders(options.train_dir, ("T91",), "train"), folders(options.test_dir, SETS, "test")


def count(training: Sequence[Source]) -> int:
    """How many images there are to train on, 1 or more: what is wrong with the folders, `load` says."""
    try:
        return max(1, sum(len(source.paths()) for source in training))
    except (data.DataError, OSError):
        return 1


def load(options: Options) -> Dataset:
    """Reads all images; raises DataError on one that cannot be read or is too small, and names it."""
    training, testing = sources(options)
    limit = 2 if options.smoke else None

    def read(source: Source, smallest: int) -> dict[str, images.Pair]:
        return images.pairs(source.paths()[:limit], options.zoom, smallest)

    for option, these in (("--train-dir", training), ("--test-dir", testing)):
        if len({source.name for source in these}) < len(these):
            raise data.DataError(f"two folders of {option} have one name, by which their images and scores are kept")
    train: dict[str, images.Pair] = {}
    for source in training:
        train |= {f"{source.name}/{name}": pair for name, pair in read(source, PATCH).items()}
    if not options.smoke and (options.images or 0) > len(train):
        raise data.DataError(f"--images {options.images}: a batch of more images than the {len(train)} to train on")
    return Dataset(
        options.zoom, train, {source.name: read(source, images.SMALLEST + 2 * options.zoom) for source in testing}
    )


# --- the network ----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a configuration means: functions of one seed."""

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, loop.Metrics]]
    evaluate: Callable[[State, loop.Batch], loop.Metrics]
    enlarge: Callable[[State, jax.Array], jax.Array]  # a whole image, [h, w] to [h, w]


def build(config: Config) -> Task:
    """Network, loss and optimizer of a row."""
    model = SRCNN(config.normalizer, config.affine, config.l1)
    tx = optax.sgd(config.lr, momentum=0.9)

    def loss(call: Callable[..., jax.Array], batch: loop.Batch, train: bool):
        inside = batch["high"][:, BORDER:-BORDER, BORDER:-BORDER]
        return jnp.mean(jnp.square(call(batch["low"], train=train) - inside)) / 2, {}

    advance = normjax.train.linen_step(model, loss, tx)

    def init(key: jax.Array) -> State:
        return normjax.train.linen_init(model, tx, key, jnp.zeros((1, PATCH, PATCH)), train=False)

    def step(state: State, batch: loop.Batch, key: jax.Array) -> tuple[State, loop.Metrics]:
        return advance(state, images.cut(batch, key, config.patches, PATCH))

    def enlarge(state: State, low: jax.Array) -> jax.Array:
        wide = jnp.pad(low, BORDER, mode="edge")[None]
        return model.apply({"params": state.params, **state.stats}, wide, train=False)[0]  # type: ignore[index]

    def evaluate(state: State, test: loop.Batch) -> loop.Metrics:
        crop, each = config.zoom, []
        for low, high in zip(test["low"], test["high"], strict=True):
            error = jnp.round(jnp.clip(enlarge(state, low), 0, 1) * 255) / 255 - high
            each.append(-10 * jnp.log10(jnp.mean(jnp.square(error[crop:-crop, crop:-crop]))))
        return {"psnr": jnp.stack(each).mean()}

    return Task(init, step, evaluate, enlarge)


def train(
    experiment: Path,
    name: str,
    config: Config,
    dataset: Dataset,
    environment: dict,
    show: Callable[[int, str], None],
) -> None:
    """Trains all seeds of one row, from where its folders say that it stopped, then scores them on all sets."""
    folders = runs.seed_folders(experiment, name, config.seeds)
    runs.create(folders, config, environment)
    task = build(config)
    watched = list(next(iter(dataset.tests.values())).values())[:WATCHED]
    test = {field: [getattr(pair, field).astype(np.float32) for pair in watched] for field in images.Pair._fields}
    loop.train(
        folders,
        task.init,
        task.step,
        task.evaluate,
        images.stack(dataset.train),
        test,
        steps=config.steps,
        batch_size=config.images,
        evaluate_every=config.evaluate_every,
        side_by_side=False,
        noise=True,
        on_chunk=lambda step, metrics: show(step, f"PSNR {metrics['psnr'].mean():.2f} dB"),
    )
    missing = [folder for folder in folders if not (folder / "scores.json").exists()]
    enlarge = jax.jit(task.enlarge)  # compiles once for each shape
    for folder in missing:
        show(config.steps, "scoring")
        state = runs.load(folder, jax.eval_shape(task.init, jax.random.key(0)))
        write_scores(folder, score(dataset, lambda low, state=state: np.asarray(enlarge(state, low))))


# --- scores ---------------------------------------------------------------------------------------

Scores = dict[str, dict[str, dict[str, float | None]]]  # by set and image; None where it is not finite


def score(dataset: Dataset, enlarge: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """PSNR and SSIM of each image of each set; `enlarge` is given the bicubic one, [h, w]."""

    def one(pair: images.Pair) -> dict[str, float | None]:
        found = images.score(enlarge(pair.low.astype(np.float32)), pair.high, dataset.zoom)
        return {name: runs.number(value) for name, value in found.items()}

    return {test: {name: one(pair) for name, pair in pairs.items()} for test, pairs in dataset.tests.items()}


def score_bicubic(dataset: Dataset) -> Scores:
    """What there is to beat."""
    return score(dataset, lambda low: low)


def bicubic_alone(dataset: Dataset) -> str:
    """The table of --bicubic."""
    rows = {"bicubic": report.Row({"steps": 0}, {}, [[means(score_bicubic(dataset))]])}
    return summarize(rows, list(dataset.tests))


def write_scores(folder: Path, scores: Scores) -> None:
    """Writes scores.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    runs.write(folder / "scores.json", json.dumps(scores, indent=1) + "\n")


def means(scores: Scores) -> runs.Line:
    """Averages over the images of each set: {"Set5 psnr": ..., "Set5 ssim": ..., ...}, null where one is."""
    line = {}
    for test, of in scores.items():
        for name in ("psnr", "ssim"):
            values = [math.nan if each[name] is None else each[name] for each in of.values()]
            line[f"{test} {name}"] = runs.number(np.mean(np.asarray(values, np.float64)))
    return line


def read_rows(experiment: Path, names: Sequence[str]) -> dict[str, report.Row]:
    """Bicubic, and those rows that are trained and scored; the scores are in the last line of each seed."""

    def read(folder: Path) -> runs.Line:
        return means(json.loads((folder / "scores.json").read_text()))

    rows = {"bicubic": report.Row({"steps": 0}, {}, [[{"step": 0} | read(experiment / "bicubic")]])}
    for name, row in report.read_rows(experiment, names).items():
        folders = runs.seed_folders(experiment, name, len(row.seeds))
        if all((folder / "scores.json").exists() for folder in folders):
            seeds = [[*lines[:-1], lines[-1] | read(folder)] for lines, folder in zip(row.seeds, folders, strict=True)]
            rows[name] = row._replace(seeds=seeds)
    return rows


# --- the report -----------------------------------------------------------------------------------


def write_report(experiment: Path, configs: Mapping[str, Config], dataset: Dataset) -> None:
    """Prints the tables, and writes them with the pictures to report.md and report.html; all is read back."""
    rows = read_rows(experiment, list(configs))
    trained = {name: row for name, row in rows.items() if name != "bicubic"}
    config = next(iter(configs.values()))
    summary, compared = summarize(rows, list(dataset.tests)), compare(rows, dataset)
    print(f"\n{summary}\n\n{compared}\n")
    watched = next(iter(dataset.tests))
    if trained:
        metrics = {"test_psnr": f"PSNR on {watched} (the first {WATCHED}), dB", "loss": "training loss (log)"}
        report.save(report.curves(trained, metrics, style, config.evaluate_every), experiment / "curves.png")
    report.save(draw(experiment, trained, configs, dataset), experiment / "images.png")
    head = ["row", "normalizer", "alpha", "scale and bias", "learning rate", f"PSNR on {watched}, last 5 evaluations"]
    lines = []
    for k, r in trained.items():
        facts = (r.config["l1"], r.config["affine"], r.config["lr"])
        late = report.plus_minus(r.curve("test_psnr")[1][:, -5:].ravel().tolist(), 2)
        lines.append([f"`{k}`", f"`{r.config['normalizer']}`", *map(str, facts), late])
    settings = ("zoom", "train", "seeds", "steps", "images", "patches")
    text = REPORT.format(
        settings=", ".join(f"{name} {getattr(config, name)}" for name in settings),
        summary=summary,
        compared=compared,
        zoom=config.zoom,
        watched=watched,
        many=WATCHED,
        normalizers=report.table(head, lines),
        environments=report.environments(trained),
    )
    report.write_pages(experiment, text)
    print(f"Report: {experiment / 'report.html'} (and report.md)")


def summarize(rows: Mapping[str, report.Row], tests: Sequence[str]) -> str:
    """The table of results, one line a row: PSNR and SSIM on each set."""
    head = ["row", *(f"{test} {name}" for test in tests for name in ("PSNR", "SSIM")), "steps", "seconds"]
    lines = []
    for name, row in rows.items():
        cells = [
            report.plus_minus(row.last(f"{test} {metric}"), digits)
            for test in tests
            for metric, digits in (("psnr", 2), ("ssim", 4))
        ]
        seconds = "" if name == "bicubic" else f"{row.last('seconds')[0]:.0f}"
        lines.append([f"`{name}`", *cells, f"{row.config['steps']:,}", seconds])
    return report.table(head, lines)


def compare(rows: Mapping[str, report.Row], dataset: Dataset) -> str:
    """Published numbers beside ours where there are any, and differences between rows, paired over seeds."""
    parts = []
    last = list(dataset.tests)[-1]
    chosen = (
        tables.Metric(f"{last} psnr", f"PSNR on {last}, dB"),
        tables.Metric(f"{last} ssim", f"SSIM on {last}", digits=4),
    )
    published = PUBLISHED.get(dataset.zoom, {})
    for k, metric in enumerate(chosen):
        if last == "BSD200" and published:
            numbers = {name: both[k] for name, both in published.items()}
            parts.append(tables.published(rows, metric, numbers, list(dict.fromkeys([*published, *rows]))))
    parts += [tables.pairs(rows, metric, CLAIMS) for metric in chosen]
    return "\n\n".join(part for part in parts if part)


def style(name: str) -> dict:
    """A colour for each row; dn* is dashed in the colour of dn."""
    return {"color": f"C{list(ROWS).index(name.rstrip('*'))}", "ls": "--" if name.endswith("*") else "-"}


def draw(
    experiment: Path, rows: Mapping[str, report.Row], configs: Mapping[str, Config], dataset: Dataset, width: int = 72
) -> Figure:
    """A piece of the first image of each set, bicubic, by seed 0 of each row and the truth, with the image's scores.

    The piece is the one of `width` pixels in which bicubic errs the most.
    """
    enlarge = {"bicubic": lambda low: low} | {name: enlarger(experiment, name, configs[name]) for name in rows}
    figure = Figure(figsize=(2.5 * (len(enlarge) + 1), 2.8 * len(dataset.tests)), layout="constrained")
    axes = figure.subplots(len(dataset.tests), len(enlarge) + 1, squeeze=False)
    for line, (test, pairs) in zip(axes, dataset.tests.items(), strict=True):
        name, pair = next(iter(pairs.items()))
        corner = images.worst(np.square(pair.high - pair.low), width)
        piece = tuple(slice(c, c + width) for c in corner)
        for ax, (row, f) in zip(line, enlarge.items(), strict=False):
            image = f(pair.low.astype(np.float32))
            psnr, ssim = images.score(image, pair.high, dataset.zoom).values()
            ax.imshow(np.clip(image, 0, 1)[piece], cmap="gray", vmin=0, vmax=1)
            ax.set_title(f"{row}: {psnr:.2f} dB, {ssim:.4f}", fontsize=9)
        line[-1].imshow(pair.high[piece], cmap="gray", vmin=0, vmax=1)
        line[-1].set_title(f"{test}: {name}", fontsize=9)
    for ax in figure.axes:
        ax.set(xticks=[], yticks=[])
    return figure


def enlarger(experiment: Path, name: str, config: Config) -> Callable[[np.ndarray], np.ndarray]:
    """What seed 0 of a row has learned, from its checkpoint."""
    task = build(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    state = runs.load(runs.seed_folders(experiment, name, 1)[0], shapes)
    enlarge = jax.jit(task.enlarge)
    return lambda low: np.asarray(enlarge(state, low))


REPORT = """# Super-resolution: SRCNN with and without normalizers

{settings}. Every row starts from the same weights and sees the same patches in the same order.

{summary}

Averages over the images of each set, mean +- standard deviation over seeds; PSNR in decibels and SSIM of the luminance,
rounded to 8 bits, without a border of {zoom} pixels. Seconds are those of the training steps of all seeds together.

{compared}

Published are averages on BSD200 (Ren et al. 2017), of runs whose length is not known. Their bicubic PSNR is half a decibel
below what their own definition gives, on any crop of the border, while their SSIM is the one measured here: so
compare differences between rows. Sigma of dn and dn* and alpha of dn* are the published values, which may have been chosen
on the test sets; alpha 0 of dn* below is the loss of the published code, without the penalty. Sigma of bn, and the rows
dn and dn-ms, are ours.

The learning rate is constant, and what a row scores still moves from one evaluation to the next: the last column
of the table below has the last five of all seeds. Where bn has a smaller rate, by default a tenth, at which it does not
diverge, differences to it contain that.

## Learning curves

![Learning curves](curves.png)

PSNR on the first {many} images of {watched}, and the loss without the penalty. Mean over seeds, band of one standard
deviation.

## Images

![Images](images.png)

A piece of the first image of each set, where bicubic errs the most: bicubic, seed 0 of each row, the truth. The scores are
those of the whole image.

## The rows

{normalizers}

v is centred over the first field and divided by the square root of eps (sigma squared) plus gain times the mean square
over the second; alpha is the factor of the L1 penalty mean |v|.

## Where the numbers come from

The folders beside this file: config.json, metrics.jsonl, a checkpoint and scores.json (of every image) for each row and
seed.

{environments}
"""


if __name__ == "__main__":
    main()
