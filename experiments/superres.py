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
adds it (dn* then needs a smaller --lr than ours), and --border truncate has windows end at the border.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax.train
from experiments.common import command, experiment, images, loop, pairs, pictures, report, runs, scores, tables, trained
from experiments.networks.srcnn import SRCNN
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
SCORES = (("PSNR", 2), ("SSIM", 4))  # with the digits shown
CLAIMS = tables.claims("dn* > srcnn, dn* > bn, bn > srcnn, dn > srcnn, dn* > dn")
SETS = ("Set5", "Set14", "BSD200")


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

    @property
    def only_prints(self) -> bool:
        """Whether the command prints something and trains nothing."""
        return self.show or self.bicubic

    def check(self) -> None:
        """Exits with code 2 where a value is wrong by itself."""
        command.positive(self, "seeds", "scale", "patches", *command.given(self, "lr", "images"))


Sources = tuple[list[pairs.Source], list[pairs.Source]]  # to train on, and to be scored on
Job = experiment.Job[Options, pairs.Dataset]


def listing(options: Options) -> str:
    """The tables of --list and --bicubic."""
    if not options.show:
        dataset = load(options, source(options))
        rows = {"bicubic": trained.Row({"steps": 0}, {}, [[scores.means(scores.score(dataset, scores.bicubic))]])}
        return tables.each(rows, summary(list(dataset.tests)))
    head = ["row", "normalizer", "sigma", "alpha", "affine", *(f"BSD200 x{zoom}: PSNR / SSIM" for zoom in PUBLISHED)]

    def published(name: str) -> list[str]:
        found = [numbers.get(name) for numbers in PUBLISHED.values()]
        return ["-" if n is None else f"{n[0]:.2f} / {n[1]:.4f}" for n in found]

    lines = [["bicubic", "", "", "", "", *published("bicubic")]]
    for name in ROWS:
        config = configure(name, options, source(options))
        n = config.normalizer
        sigma = "" if n.var is None else f"{n.eps**0.5:g}"
        lines.append([name, repr(n), sigma, f"{config.l1:g}", "yes" if config.affine else "no", *published(name)])
    return report.table(head, lines)


def folder(options: Options) -> str:
    """What is compared shares the zoom."""
    return "superres" if options.zoom == 3 else f"superres-x{options.zoom}"


def source(options: Options) -> Sources:
    """Where the images come from."""
    root = None if options.data_dir is None else Path(options.data_dir).expanduser() / "superres"
    training = pairs.sources(options.train_dir, root, ("T91",), "train")
    return training, pairs.sources(options.test_dir, root, SETS, "test")


def configure(row: str, options: Options, sources: Sources) -> Config:
    """A row's configuration under the options of the command line."""
    config, (training, testing) = ROWS[row], sources
    n = config.normalizer
    if ":" in str(n.mean):
        # The published code divides the sum over 7 x 7 by the area of 5 x 5.
        gain = 49 / 25 if options.border == "zero" and str(n.var) == "...:7 c" else 1.0
        n = replace(n, border=options.border, gain=gain)
    steps = command.scaled(config.steps, options.scale)
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
        images=options.images or min(config.images, pairs.count(training)),
        patches=options.patches,
        lr=options.lr or config.lr,
    )
    return command.shrunk(config, images=1, patches=min(config.patches, 4), limit=2) if options.smoke else config


def load(options: Options, sources: Sources) -> pairs.Dataset:
    """Reads all images; raises DataError on one that cannot be read or is too small, and names it."""
    wanted, limit = (0, 2) if options.smoke else (options.images or 0, None)
    return pairs.load(*sources, options.zoom, PATCH, wanted, limit)


# --- training -------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network and its optimizer as functions of one seed."""

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, loop.Metrics]]
    enlarge: Callable[[State, jax.Array], jax.Array]  # a whole image, [h, w] to [h, w]


def build(config: Config) -> Network:
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
        return advance(state, pairs.cut(batch, key, config.patches, PATCH))

    def enlarge(state: State, low: jax.Array) -> jax.Array:
        wide = jnp.pad(low, BORDER, mode="edge")[None]
        return model.apply({"params": state.params, **state.stats}, wide, train=False)[0]  # type: ignore[index]

    return Network(init, step, enlarge)


def train(job: Job, config: Config) -> loop.Task:
    """How a row is trained, and then scored on all sets."""
    network, dataset = build(config), job.data
    watched = list(next(iter(dataset.tests.values())).values())[:WATCHED]
    test = {field: [getattr(pair, field).astype(np.float32) for pair in watched] for field in images.Pair._fields}

    def evaluate(state: State, test: loop.Batch) -> loop.Metrics:
        crop, each = config.zoom, []
        for low, high in zip(test["low"], test["high"], strict=True):
            error = jnp.round(jnp.clip(network.enlarge(state, low), 0, 1) * 255) / 255 - high
            each.append(-10 * jnp.log10(jnp.mean(jnp.square(error[crop:-crop, crop:-crop]))))
        return {"psnr": jnp.stack(each).mean()}

    def finish(folders: Sequence[Path], show: Callable[[int, str], None]) -> None:
        for folder in folders:
            if not (folder / "scores.json").exists():
                show(config.steps, "scoring")
                scores.write(folder, scores.score(dataset, enlarger(folder, network)))

    return loop.Task(
        network.init,
        network.step,
        evaluate,
        pairs.stack(dataset.train),
        test,
        config.images,
        side_by_side=False,
        noise=True,
        say=lambda metrics: f"PSNR {metrics['psnr'].mean():.2f} dB",
        finish=finish,
    )


def enlarger(folder: Path, network: Network) -> pairs.Enlarge:
    """What one seed has learned, from its checkpoint."""
    state, enlarge = loop.trained(folder, network.init), jax.jit(network.enlarge)  # compiles once for each shape
    return lambda low: np.asarray(enlarge(state, low))


# --- the report -----------------------------------------------------------------------------------


def write(job: Job, configs: Mapping[str, Config], rows: dict[str, trained.Row]) -> report.Report:
    """Scores on each set beside the published numbers, curves, and a piece of an image of each set."""
    dataset, config = job.data, next(iter(configs.values()))
    scores.write(job.folder / "bicubic", scores.score(dataset, scores.bicubic))
    scored = scores.joined(job.folder, rows)
    networks = {name: row for name, row in scored.items() if name != "bicubic"}
    results, compared = tables.each(scored, summary(list(dataset.tests))), compare(scored, dataset)
    watched = next(iter(dataset.tests))

    def late(row: trained.Row) -> str:
        return report.plus_minus(row.curve("test_psnr")[1][:, -5:].ravel().tolist(), 2)

    enlarge: dict[str, pairs.Enlarge] = {"bicubic": scores.bicubic}
    for name in networks:
        enlarge[name] = enlarger(runs.seed_folders(job.folder, name, 1)[0], build(configs[name]))
    drawn = {"images": pictures.draw_images(dataset, enlarge)}
    if networks:
        metrics = {"test_psnr": f"PSNR on {watched} (the first {WATCHED}), dB", "loss": "training loss (log)"}
        drawn["curves"] = report.curves(networks, metrics, style, config.evaluate_every)
    columns = tables.NORMALIZERS | tables.config({"learning rate": "lr"})
    columns |= {f"PSNR on {watched}, last 5 evaluations": late}
    values = {
        "settings": f"{report.settings(vars(config), 'zoom', 'train', 'steps', 'images', 'patches')}, {trained.seeds(rows)}",
        "summary": results,
        "compared": compared,
        "zoom": config.zoom,
        "watched": watched,
        "many": WATCHED,
        "normalizers": tables.each(networks, columns),
    }
    return report.Report((results, compared), drawn, values)


def summary(tests: Sequence[str]) -> dict[str, tables.Column]:
    """PSNR and SSIM on each set."""
    found = {f"{test} {name}": (f"{test} {name.lower()}", digits) for test in tests for name, digits in SCORES}
    columns = {head: tables.shown(*metric) for head, metric in found.items()}
    columns["steps"] = lambda row: f"{row.config['steps']:,}"
    return columns | {"seconds": lambda row: tables.seconds()(row) if row.environment else ""}


def compare(rows: Mapping[str, trained.Row], dataset: pairs.Dataset) -> str:
    """Published numbers beside ours where there are any, and differences between rows, paired over seeds."""
    parts = []
    last = list(dataset.tests)[-1]
    psnr = tables.Metric(f"{last} psnr", f"PSNR on {last}, dB")
    chosen = (psnr, tables.Metric(f"{last} ssim", f"SSIM on {last}", digits=4))
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


DESCRIPTION = "Trains SRCNN with each normalizer on patches, and scores it on whole images beside bicubic."
EXPERIMENT = experiment.Experiment(
    "superres", DESCRIPTION, Options, tuple(ROWS), listing, configure, load, train, write, folder, source
)
main = functools.partial(experiment.run, EXPERIMENT)

if __name__ == "__main__":
    main()
