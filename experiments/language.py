"""Ren et al.'s second experiment: what does each normalizer do to a recurrent language model of the Penn Treebank?

    python -m experiments.language --data-dir DIR                   # LSTM; DIR holds Mikolov's simple-examples
    python -m experiments.language --data-dir DIR --cell tanh       # or relu: plain RNNs
    python -m experiments.language --data-dir DIR --rows base 'dn*' --scale 0.1 --seeds 2
    python -m experiments.language --level char                     # bits per character instead of perplexity
    python -m experiments.language --list                           # the rows, with the published numbers

Two layers of 200 units, 20 unrolled steps, 20 streams of text, SGD: 13 epochs, the learning rate halved in each from
the fifth. The state goes from segment to segment and is zero where the text begins. The loss is the sum over the steps
of the mean over the streams, and so is the penalty. DIR may hold any train.txt, valid.txt and test.txt; without
--data-dir the text is Python's own documentation, whose numbers compare with nobody's.

--scale shrinks the schedule: an epoch of the schedule, between whose ends the learning rate stays, is then a fraction of
an epoch of the text. Validation follows each epoch of the schedule, on 20 streams (on the beginning of each where the
scale is small). The test is the paper's, at the end: one stream, the whole text in order. There the published code
unrolls one step, so bn rows use what is stored for the first of the 20 steps, whatever the step; so do we. In
validation they use each step's own.

It prints a table and leaves runs/language-<cell>/<row>/seed-<k>/ (config.json, metrics.jsonl, checkpoint),
report.md, report.html and the pictures; --level char has language-char-<cell>. A run that was killed goes on with
--resume and ends with the same numbers.

Hardware and time: on two CPU cores, nothing beside it, a step of the LSTM takes 55 to 70 ms without norm
(`python -m benchmarks.loops`); the rows of README.md took 0.10 (base, ln*) to 0.12 s (dn*) a step on one core. So a row and
seed takes half an hour to an hour at full length (30,199 steps), the test of 82,429 words in sequence included. A plain Flax
loop takes about as long, since matrix products rule both. Seeds side by side in one vmap take as long as one after the
other (57 and 57 ms a seed; dn* 63 and 65), so they go one after the other, and the test waits for the end.
Known limits: the paper may have chosen the sigma and alpha of its starred rows on the test set; we take them as published.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax.train
from experiments.common import cli, command, experiment, loop, report, tables, text, trained
from experiments.networks.language import LanguageModel, cross_entropy, mean_nats
from normjax import Normalizer, recurrent
from normjax.train import State

CELLS = ("lstm", "tanh", "relu")
ROWS = ("base", "bn", "bn-l1", "bn*", "ln", "ln-s", "ln-l1", "ln*", "dn", "dn*")
# Test perplexity of words.
PUBLISHED = {
    "lstm": {"base": 115.720, "bn": 123.245, "ln": 119.247, "bn*": 116.920, "ln*": 101.725, "dn*": 102.238},
    "tanh": {"base": 149.357, "bn": 148.052, "ln": 154.324, "bn*": 129.155, "ln*": 129.823, "dn*": 123.652},
    "relu": {"base": 147.630, "bn": 164.977, "ln": 149.128, "bn*": 138.947, "ln*": 116.609, "dn*": 117.868},
}
SLOW = (("base", "tanh"), ("base", "relu"), ("bn", "relu"))  # learning rate 0.1
CLAIMS = tables.claims("bn* > bn, ln* > ln, ln* > base, dn* > base, dn* > dn, dn* > ln*, dn* > bn*")
EPOCHS, FULL_RATE = 13, 4
TEST_STEPS = 1000  # predictions of the test whose softmax is one matrix product
METRICS = {
    "word": tables.Metric("test_perplexity", "test perplexity", lower=True),
    "char": tables.Metric("test_bits", "test bits per character", digits=3, lower=True),
}


@dataclass(frozen=True)
class Config:
    """One row: everything that its numbers depend on, but for the seed."""

    row: str
    cell: str
    dialect: str
    normalizer: Normalizer | None
    place: str  # of the normalizer in the cell, see normjax/recurrent/
    affine: bool
    l1: float  # alpha of each normalized array at each step
    lr: float
    text: str
    level: str
    digest: str  # of the text
    vocabulary: int
    seeds: int
    steps: int
    evaluate_every: int  # steps of an epoch of the schedule
    validation: int  # segments
    test: int  # tokens
    hidden: int = 200
    layers: int = 2
    unrolled: int = 20
    batch_size: int = 20
    clip: float = 5.0  # global norm of the gradient


@dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """The command line."""

    rows: tuple[str, ...] = tuple(PUBLISHED["lstm"])
    seeds: int = 3
    cell: str = "lstm"
    """lstm, tanh or relu."""
    level: str = "word"
    """word or char."""
    scale: float = 1.0
    """Factor of the published schedule, decay points included."""
    dialect: str = "code"
    """Where the two differ: code or paper. In the code, windows count zeros past the edge, and on the plain RNNs ln sits
    inside the activation and ln and ln-s have the penalty of ln-l1; the published numbers come from it."""

    def check(self) -> None:
        """Exits with code 2 where a value is wrong by itself."""
        cli.pick(self.cell, CELLS, "cell")
        cli.pick(self.level, text.LEVELS, "level")
        cli.pick(self.dialect, recurrent.REN2017_DIALECTS, "dialect")
        command.positive(self, "seeds", "scale")

    @property
    def published(self) -> dict[str, float]:
        """The numbers of a cell; there are none at the level of characters."""
        return PUBLISHED[self.cell] if self.level == "word" else {}


Parts = dict[str, dict[str, np.ndarray]]  # segments of train, valid and test
Job = experiment.Job[Options, Parts]


def folder(options: Options) -> str:
    """What is compared shares the cell and the level."""
    return f"language-{options.cell}" if options.level == "word" else f"language-{options.level}-{options.cell}"


def listing(options: Options) -> str:
    """A table of the rows of a cell, with the published numbers."""
    lines = []
    for row in ROWS:
        normalizer, _, affine, alpha = published_cell(row, options)
        sigma = "-" if normalizer is None else f"{normalizer.eps**0.5:g}"
        number = options.published.get(row)
        lines.append([row, repr(normalizer), sigma, f"{alpha:g}", str(affine), f"{number:.3f}" if number else "-"])
    return report.table(["row", "normalizer", "sigma", "alpha", "affine", "published"], lines)


def published_cell(row: str, options: Options) -> tuple[Normalizer | None, str, bool, float]:
    """A row's normalizer, its place in the cell, whether it has a scale and a bias, and alpha."""
    found = recurrent.ren2017(row, options.cell, options.dialect)
    normalizer = found["normalizer"]
    place = "" if normalizer is None else found.get("place", "inside")
    return normalizer, place, normalizer is not None and found.get("use_scale", True), found.get("l1", 0.0)


def configure(row: str, options: Options, texts: text.Text) -> Config:
    """A row's configuration under the options of the command line."""
    normalizer, place, affine, alpha = published_cell(row, options)
    epoch = command.scaled(segments_of(texts.train, "the training text"), options.scale)
    share = min(max(options.scale, 0.2), 1.0)  # of each validation stream: else it would take as long as the training
    config = Config(
        row=row,
        cell=options.cell,
        dialect=options.dialect,
        normalizer=normalizer,
        place=place,
        affine=affine,
        l1=alpha,
        lr=0.1 if (row, options.cell) in SLOW else 1.0,
        text=texts.name,
        level=options.level,
        digest=texts.digest,
        vocabulary=len(texts.symbols),
        seeds=options.seeds,
        steps=EPOCHS * epoch,
        evaluate_every=epoch,
        validation=max(1, round(share * segments_of(texts.valid, "the validation text"))),
        test=len(texts.test),
    )
    return command.shrunk(config, hidden=60, validation=2, test=300) if options.smoke else config


def segments_of(tokens: np.ndarray, name: str) -> int:
    """How many segments a text has, of 20 steps of 20 streams."""
    return len(text.segments(tokens, Config.batch_size, Config.unrolled, name=name)["first"])


@functools.cache
def source(options: Options) -> text.Text:
    """The text."""
    return text.load(options.data_dir, options.level)


def load(options: Options, texts: text.Text) -> Parts:
    """The segments of the three parts."""
    config = configure("base", options, texts)
    n, t = config.batch_size, config.unrolled
    valid = text.segments(texts.valid, n, t)
    return {
        "train": text.segments(texts.train, n, t),
        "valid": {name: array[: config.validation] for name, array in valid.items()},
        "test": text.segments(texts.test[: config.test], 1, min(TEST_STEPS, config.test - 1), whole=True),
    }


# --- training -------------------------------------------------------------------------------------


def learning_rate(config: Config) -> Callable[[Any], jax.Array]:
    """The learning rate at a step: halved after each epoch of the schedule but the first few."""

    def at(step: Any) -> jax.Array:
        halvings = jnp.maximum(step // config.evaluate_every - FULL_RATE + 1, 0)
        return config.lr * 0.5 ** halvings.astype(jnp.float32)

    return at


def train(job: Job, config: Config) -> loop.Task:
    """Model, loss and optimizer of a row, and how it is trained."""
    shared = {field: getattr(config, field) for field in ("row", "cell", "dialect", "vocabulary", "hidden", "layers")}
    model = LanguageModel(**shared, unrolled=config.unrolled, max_steps=config.unrolled)
    one_step = model.clone(max_steps=1)
    tx = optax.chain(optax.clip_by_global_norm(config.clip), optax.sgd(learning_rate(config)))
    unit = METRICS[config.level].name.removeprefix("test_")
    show = jnp.exp if unit == "perplexity" else lambda nats: nats / jnp.log(2.0)

    def loss(call: Callable[..., jax.Array], batch: loop.Batch, train: bool):
        tokens, first = batch["tokens"][0], batch["first"][0]
        nats = cross_entropy(call(tokens[:, :-1], first, train=train), tokens[:, 1:].T).mean()
        return config.unrolled * nats, {}

    def init(key: jax.Array) -> State:
        tokens = jnp.zeros((config.batch_size, config.unrolled), jnp.int32)
        return normjax.train.linen_init(model, tx, key, tokens, jnp.array(True), train=True)

    def evaluate(state: State, parts: dict[str, dict]) -> loop.Metrics:
        valid = mean_nats(model, state, parts["valid"])
        last = state.step >= config.steps
        test = jax.lax.cond(
            last, lambda: mean_nats(one_step, state, parts["test"]), lambda: jnp.full_like(valid, jnp.nan)
        )
        return {unit: show(test), f"valid_{unit}": show(valid)}

    return loop.Task(
        init,
        normjax.train.linen_step(model, loss, tx),
        evaluate,
        job.data["train"],
        {split: job.data[split] for split in ("valid", "test")},
        batch_size=1,  # a segment of all streams
        shuffle=False,
        side_by_side=False,  # so that the test, long because it is sequential, waits for the end
        say=lambda scores: f"validation {unit} {scores[f'valid_{unit}'].mean():.4g}",
    )


# --- the report -----------------------------------------------------------------------------------


def write(job: Job, configs: Mapping[str, Config], rows: dict[str, trained.Row]) -> report.Report:
    """The test beside the published numbers, the paper's claims, and curves."""
    config, metric, numbers = next(iter(rows.values())).config, METRICS[job.options.level], job.options.published
    compared = numbers if config["text"] == "Penn Treebank" else {}
    summary = tables.published(rows, metric, compared, [row for row in ROWS if row in rows or row in compared])
    missed = tables.missed(rows, metric, compared)
    pairs = tables.pairs(rows, metric, CLAIMS)
    kind = "words" if job.options.level == "word" else "characters"
    texts = text.describe(source(job.options))
    said = f"{config['cell']} cells, {kind}, {texts}. {schedule(config, job)}"
    unit = metric.name.removeprefix("test_")
    labels = {f"test_valid_{unit}": "validation (log)", "loss": "training loss"}
    values = {
        "said": said,
        "summary": summary,
        "missed": missed,
        "pairs": pairs or "No pair of them was run.",
        "what": metric.title,
        "validation": f"{config['validation'] * config['batch_size'] * config['unrolled']:,}",
        "all_differences": tables.differences(rows, metric),
        "settings": tables.each(rows, settings(unit)),
    }
    curves = report.curves(rows, labels, style, config["evaluate_every"])
    return report.Report((said + ".", summary, missed, pairs), {"curves": curves}, values)


def schedule(config: Mapping[str, Any], job: Job) -> str:
    """A sentence about the schedule."""
    segments = len(job.data["train"]["first"])
    share = config["steps"] / (EPOCHS * segments)
    published = "the published schedule" if share == 1 else f"{share:.3g} of the published schedule"
    return f"{config['steps']:,} steps a row, {published}: {config['steps'] / segments:.3g} epochs of the text"


def settings(unit: str) -> dict[str, tables.Column]:
    """What each row is."""

    def training(row: trained.Row) -> str:
        c = row.config
        nats = np.array(row.recent("loss", c["evaluate_every"])) / c["unrolled"]
        return report.plus_minus((np.exp(nats) if unit == "perplexity" else nats / np.log(2)).tolist(), 2)

    return {
        "normalizer": lambda row: f"`{row.config['normalizer']}`",
        "place": lambda row: row.config["place"],
        "alpha": lambda row: f"{row.config['l1']:g}",
        "scale and bias": lambda row: str(row.config["affine"]),
        "learning rate": lambda row: f"{row.config['lr']:g}",
        f"training {unit}": training,
        "seconds": tables.seconds(),
    }


def style(row: str) -> dict:
    """A colour for each normalizer; a dash for each variant of it."""
    dashes = {"*": "--", "s": ":", "l1": "-."}
    return {
        "color": f"C{('ba', 'bn', 'ln', 'dn').index(row[:2])}",
        "ls": next((dash for end, dash in dashes.items() if row.endswith(end) and row != "base"), "-"),
    }


DESCRIPTION = "Trains recurrent language models with each normalizer, and reports their perplexity."
EXPERIMENT = experiment.Experiment(
    "language", DESCRIPTION, Options, ROWS, listing, configure, load, train, write, folder, source
)
main = functools.partial(experiment.run, EXPERIMENT)

if __name__ == "__main__":
    main()
