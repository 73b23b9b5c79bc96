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

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax.train
from experiments.common import cli, command, data, loop, report, runs, tables, text
from experiments.common.language_model import LanguageModel, cross_entropy, mean_nats
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
CLAIMS = (("bn*", "bn"), ("ln*", "ln"), ("ln*", "base"), ("dn*", "base"), ("dn*", "dn"), ("dn*", "ln*"), ("dn*", "bn*"))
EPOCHS, FULL_RATE = 13, 4
TEST_STEPS = 1000  # predictions of the test whose softmax is one matrix product
METRICS = {
    "word": tables.Metric("test_perplexity", "test perplexity", lower=True),
    "char": tables.Metric("test_bits", "test bits per character", digits=3, lower=True),
}
DESCRIPTION = "Trains recurrent language models with each normalizer, and reports their perplexity."


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


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the chosen rows and reports on all rows of the folder."""
    options = cli.parse(Options, argv, prog="python -m experiments.language", description=DESCRIPTION)
    cli.pick(options.cell, CELLS, "cell")
    cli.pick(options.level, text.LEVELS, "level")
    cli.pick(options.dialect, recurrent.REN2017_DIALECTS, "dialect")
    if options.show:
        print(list_rows(options))
        return
    start = time.perf_counter()
    rows = command.rows_of(options, ROWS)
    command.positive(options, "seeds", "scale")
    try:
        texts = text.load(options.data_dir, options.level)
        configs = {row: configure(row, options, texts) for row in ROWS}
        job = Job(command.folder(options, name(options)), prepare(configs["base"], texts), runs.environment())
    except (data.DataError, OSError) as error:
        cli.fail(str(error))
    command.begin(options, job.experiment, configs, rows, lambda: None)

    for row, show in command.each(rows, {row: config.steps for row, config in configs.items()}):
        train(job, configs[row], show)
    write_report(job, configs, options, text.describe(texts))
    print(f"The whole job took {time.perf_counter() - start:.0f} seconds.")


def name(options: Options) -> str:
    """The folder of an experiment: what is compared shares the cell and the level."""
    return f"language-{options.cell}" if options.level == "word" else f"language-{options.level}-{options.cell}"


def list_rows(options: Options) -> str:
    """A table of the rows of a cell, with the published numbers."""
    numbers = PUBLISHED[options.cell] if options.level == "word" else {}
    lines = []
    for row in ROWS:
        normalizer, affine, alpha = published_cell(row, options)
        sigma = "-" if normalizer is None else f"{normalizer.eps**0.5:g}"
        number = numbers.get(row)
        lines.append([row, repr(normalizer), sigma, f"{alpha:g}", str(affine), f"{number:.3f}" if number else "-"])
    return report.table(["row", "normalizer", "sigma", "alpha", "affine", "published"], lines)


def published_cell(row: str, options: Options) -> tuple[Normalizer | None, bool, float]:
    """A row's normalizer, whether it has a scale and a bias, and alpha."""
    found = recurrent.ren2017(row, options.cell, options.dialect)
    normalizer = found["normalizer"]
    return normalizer, normalizer is not None and found.get("use_scale", True), found.get("l1", 0.0)


def configure(row: str, options: Options, texts: text.Text) -> Config:
    """A row's configuration under the options of the command line."""
    normalizer, affine, alpha = published_cell(row, options)
    epoch = command.scaled(segments_of(texts.train, "the training text"), options.scale)
    share = min(max(options.scale, 0.2), 1.0)  # of each validation stream: else it would take as long as the training
    config = Config(
        row=row,
        cell=options.cell,
        dialect=options.dialect,
        normalizer=normalizer,
        place=""
        if normalizer is None
        else recurrent.ren2017(row, options.cell, options.dialect).get("place", "inside"),
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
    if options.smoke:
        config = replace(config, seeds=min(config.seeds, 2), steps=6, evaluate_every=2, hidden=60)
        config = replace(config, validation=2, test=300)
    return config


def segments_of(tokens: np.ndarray, name: str) -> int:
    """How many segments a text has, of 20 steps of 20 streams."""
    return len(text.segments(tokens, Config.batch_size, Config.unrolled, name=name)["first"])


class Job(NamedTuple):
    """What the rows of one command share."""

    experiment: Path
    parts: dict[str, dict]  # segments of train, valid and test
    environment: dict


def prepare(config: Config, texts: text.Text) -> dict[str, dict]:
    """The segments of the three parts."""
    n, t = config.batch_size, config.unrolled
    valid = text.segments(texts.valid, n, t)
    return {
        "train": text.segments(texts.train, n, t),
        "valid": {name: array[: config.validation] for name, array in valid.items()},
        "test": text.segments(texts.test[: config.test], 1, min(TEST_STEPS, config.test - 1), whole=True),
    }


def train(job: Job, config: Config, show: Callable[[int, str], None]) -> None:
    """Trains all seeds of one row, from where its folders say that it stopped."""
    folders = runs.seed_folders(job.experiment, config.row, config.seeds)
    runs.create(folders, config, job.environment)
    unit = METRICS[config.level].name.removeprefix("test_")
    task = build(config)
    loop.train(
        folders,
        task.init,
        task.step,
        task.evaluate,
        job.parts["train"],
        {split: job.parts[split] for split in ("valid", "test")},
        steps=config.steps,
        batch_size=1,  # a segment of all streams
        evaluate_every=config.evaluate_every,
        shuffle=False,
        side_by_side=False,  # so that the test, long because it is sequential, waits for the end
        on_chunk=lambda step, scores: show(step, f"validation {unit} {scores[f'valid_{unit}'].mean():.4g}"),
    )


# --- training -------------------------------------------------------------------------------------


def learning_rate(config: Config) -> Callable[[Any], jax.Array]:
    """The learning rate at a step: halved after each epoch of the schedule but the first few."""

    def at(step: Any) -> jax.Array:
        halvings = jnp.maximum(step // config.evaluate_every - FULL_RATE + 1, 0)
        return config.lr * 0.5 ** halvings.astype(jnp.float32)

    return at


class Task(NamedTuple):
    """What a configuration means: functions of one seed."""

    init: Callable[[jax.Array], State]
    step: Callable[[State, loop.Batch], tuple[State, loop.Metrics]]
    evaluate: Callable[[State, loop.Batch], loop.Metrics]


def build(config: Config) -> Task:
    """Model, loss and optimizer of a row."""
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

    return Task(init, normjax.train.linen_step(model, loss, tx), evaluate)


# --- the report -----------------------------------------------------------------------------------


def write_report(job: Job, configs: Mapping[str, Config], options: Options, said: str) -> None:
    """Prints the table, and writes it with the picture to report.md and report.html.

    Shown are all complete rows of the folder, whatever --rows: `runs.check` saw that they share one setting.
    """
    rows = report.read_rows(job.experiment, list(configs))
    metric = METRICS[options.level]
    numbers = PUBLISHED[options.cell] if options.level == "word" else {}
    config = next(iter(rows.values())).config
    compared = numbers if config["text"] == "Penn Treebank" else {}
    summary = tables.published(rows, metric, compared, [row for row in ROWS if row in rows or row in compared])
    missed = tables.missed(rows, metric, compared)
    pairs = tables.pairs(rows, metric, CLAIMS)
    kind = "words" if options.level == "word" else "characters"
    said = f"{config['cell']} cells, {kind}, {said}. {schedule(config, job)}"
    print("\n" + "\n\n".join(part for part in (said + ".", summary, missed, pairs) if part) + "\n")

    labels = {f"test_valid_{metric.name.removeprefix('test_')}": "validation (log)", "loss": "training loss"}
    report.save(report.curves(rows, labels, style, config["evaluate_every"]), job.experiment / "curves.png")
    settings = table_of_rows(rows)
    environments = report.environments(rows)
    shown = {"said": said, "summary": summary, "missed": missed, "pairs": pairs or "No pair of them was run."}
    shown |= {"what": metric.title, "settings": settings, "environments": environments, "rows": len(rows)}
    tokens = config["validation"] * config["batch_size"] * config["unrolled"]
    shown |= {"validation": f"{tokens:,}", "all_differences": tables.differences(rows, metric)}
    report.write_pages(job.experiment, REPORT.format(**shown))
    print(f"Report: {job.experiment / 'report.html'} (and report.md)")


def schedule(config: Mapping[str, Any], job: Job) -> str:
    """A sentence about the schedule."""
    segments = len(job.parts["train"]["first"])
    share = config["steps"] / (EPOCHS * segments)
    published = "the published schedule" if share == 1 else f"{share:.3g} of the published schedule"
    return f"{config['steps']:,} steps a row, {published}: {config['steps'] / segments:.3g} epochs of the text"


def table_of_rows(rows: Mapping[str, report.Row]) -> str:
    """What each row is."""
    unit = METRICS[next(iter(rows.values())).config["level"]].name.removeprefix("test_")
    head = ["row", "normalizer", "place", "alpha", "scale and bias", "learning rate", f"training {unit}", "seconds"]
    lines = []
    for row, found in rows.items():
        c = found.config
        nats = np.array(found.recent("loss", c["evaluate_every"])) / c["unrolled"]
        training = report.plus_minus((np.exp(nats) if unit == "perplexity" else nats / np.log(2)).tolist(), 2)
        facts = [f"`{c['normalizer']}`", c["place"], f"{c['l1']:g}", str(c["affine"]), f"{c['lr']:g}"]
        lines.append([f"`{row}`", *facts, training, f"{found.last('seconds')[0]:.0f}"])
    return report.table(head, lines)


def style(row: str) -> dict:
    """A colour for each normalizer; a dash for each variant of it."""
    dashes = {"*": "--", "s": ":", "l1": "-."}
    return {
        "color": f"C{('ba', 'bn', 'ln', 'dn').index(row[:2])}",
        "ls": next((dash for end, dash in dashes.items() if row.endswith(end) and row != "base"), "-"),
    }


REPORT = """# Normalizers in a recurrent language model

{said}. Every row starts from the same weights of the layers that it shares with the others, and reads the same text.

{summary}

Mean +- standard deviation over seeds of the {what}: one stream, the whole text in order, after the last step. {missed}

sigma and alpha are the published ones. The paper may have chosen those of its starred rows on the test set: its code has
a validation split, but the choice is not recorded.

## Differences, paired over seeds

{pairs}

## Learning curves

![Learning curves](curves.png)

Mean over seeds, band of one standard deviation. Validation predicts {validation} tokens in 20 streams, which begin
all over its text; the training loss is the sum over 20 steps, in nats, without the penalty, averaged over each epoch of
the schedule.

## All differences

{what}, row minus column, paired over seeds; bold where the mean exceeds the standard deviation.

{all_differences}

## The rows

{settings}

Place: `inside` normalizes in every activation, `separate` W x and U h each for itself, and the LSTM's cell state. alpha is
the factor of mean |v| of each normalized array at each of the 20 steps, which are added up. `bn` rows store statistics for
each step; the test takes those of the first for all, as the published code does. The training column is the mean over the
last epoch of the schedule, while the weights still move. Seconds are those of the training steps of all seeds
together.

## Where the numbers come from

The folders beside this file: config.json, metrics.jsonl and a checkpoint for each row and seed.

{environments}
"""


if __name__ == "__main__":
    main()
