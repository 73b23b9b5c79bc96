"""Tables of results: a published number beside ours, and differences between rows, paired over their seeds."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import scipy.stats

from experiments.common import report, trained


@dataclass(frozen=True)
class Metric:
    """What a table shows of a run.

    Attributes:
      name: of the metric in metrics.jsonl.
      title: what it is called, with its unit.
      factor: of the values shown, 100 for per cent.
      digits: decimals shown.
      lower: whether less is better.
    """

    name: str
    title: str
    factor: float = 1.0
    digits: int = 2
    lower: bool = False

    def of(self, row: trained.Row) -> list[float]:
        """Its last value for each seed."""
        return [self.factor * value for value in row.last(self.name)]

    def difference(self, a: trained.Row, b: trained.Row) -> tuple[float, float]:
        """Mean and spread of a - b, over the seeds that both have."""
        seeds = min(len(a.seeds), len(b.seeds))
        return report.difference(self.of(a)[:seeds], self.of(b)[:seeds])

    def show(self, mean: float, std: float) -> str:
        """A difference: "+1.20 +- 0.30"; without the spread where there is none."""
        spread = "" if math.isnan(std) else f" +- {std:.{self.digits}f}"
        return f"{mean:+.{self.digits}f}{spread}"


Column = Callable[[trained.Row], str]


def shown(metric: str, digits: int, factor: float = 1.0, when: str = "last") -> Column:
    """A column of `each`: mean +- standard deviation over seeds of a metric.

    Args:
      metric: its name in metrics.jsonl.
      digits: decimals.
      factor: of the values, 100 for per cent.
      when: its "last" value, its "first", before training, or the mean over the "recent" steps, since the last but one
        evaluation.
    """

    def column(row: trained.Row) -> str:
        if when == "recent":
            values = row.recent(metric, row.config["evaluate_every"])
        else:
            values = row.first(metric) if when == "first" else row.last(metric)
        return report.plus_minus([factor * value for value in values], digits)

    return column


def seconds(digits: int = 0) -> Column:
    """A column of `each`: the seconds of training steps, of all seeds together."""
    # Seeds that trained together have one number, and the others, added later, their own.
    return lambda row: f"{sum(dict.fromkeys(row.last('seconds'))):.{digits}f}"


def config(fields: Mapping[str, str]) -> dict[str, Column]:
    """Columns of `each`: {what is above it: a field of the configuration}."""
    return {head: lambda row, name=name: str(row.config[name]) for head, name in fields.items()}


NORMALIZERS: dict[str, Column] = {
    "normalizer": lambda row: f"`{row.config['normalizer']}`",
    **config({"alpha": "l1", "scale and bias": "affine"}),
}


def each(rows: Mapping[str, trained.Row], columns: Mapping[str, Column], code: bool = True) -> str:
    """A line for each row, with a function of it in each column; `code` sets the rows' names as such.

    >>> print(each({"bn": trained.Row({"lr": 0.1}, {}, [])}, config({"rate": "lr"})))
    | row  | rate |
    | :--- | ---: |
    | `bn` |  0.1 |
    """
    lines = [[f"`{name}`" if code else name, *(of(row) for of in columns.values())] for name, row in rows.items()]
    return report.table(["row", *columns], lines)


def published(
    rows: Mapping[str, trained.Row], metric: Metric, numbers: Mapping[str, float | None], names: Sequence[str]
) -> str:
    """A line for each of `names`: the published number, ours, and what it was trained with.

    A row that was not run to its end is listed as such: nothing is left out silently.

    Args:
      rows: those that were, by name.
      metric: what is compared.
      numbers: published values, in the metric's unit; None or missing where there is none.
      names: the rows of the table.
    """
    lines = []
    for name in names:
        number = numbers.get(name)
        said = "-" if number is None else f"{number:.{metric.digits}f}"
        if name not in rows:
            lines.append([f"`{name}`", said, "not run", "", "", ""])
            continue
        row = rows[name]
        ours = metric.of(row)
        against = "" if number is None else f"{sum(ours) / len(ours) - number:+.{metric.digits}f}"
        counts = [str(len(row.seeds)), f"{row.config['steps']:,}"]
        lines.append([f"`{name}`", said, report.plus_minus(ours, metric.digits), against, *counts])
    return report.table(["row", f"{metric.title}: published", "ours", "ours - published", "seeds", "steps"], lines)


def missed(rows: Mapping[str, trained.Row], metric: Metric, numbers: Mapping[str, float]) -> str:
    """Says which published numbers lie further from ours than two standard deviations over our seeds."""
    if not any(row in rows for row in numbers):
        return "None of these rows has a published number."
    found = []
    for row, number in numbers.items():
        ours = metric.of(rows[row]) if row in rows else []
        if ours and not abs(sum(ours) / len(ours) - number) <= 2 * (report.spread(ours) if len(ours) > 1 else 0.0):
            found.append(f"`{row}`")
    if not found:
        return "No published number of these rows is missed by more than two standard deviations over seeds."
    return f"Missed by more than two standard deviations over seeds (any miss, with one seed): {', '.join(found)}."


def verdict(mean: float, std: float) -> str:
    """What a mean difference over seeds is beside their standard deviation: "more" than that, "not more", or "one seed".

    >>> verdict(-0.5, 0.4), verdict(0.5, 0.5), verdict(0.5, math.nan)
    ('more', 'not more', 'one seed')
    """
    if math.isnan(std):
        return "one seed"
    return "more" if abs(mean) > std else "not more"


def answer(mean: float, std: float, lower: bool = False) -> str:
    """What seeds answer to the claim that a is better than b, from the mean of a - b over them and its spread.

    >>> answer(2.0, 0.5), answer(2.0, 0.5, lower=True)
    ('yes, by more than the spread over seeds', 'no, the opposite by more than the spread over seeds')
    >>> answer(0.5, 2.0), answer(2.0, math.nan)
    ('not told apart: within the spread over seeds', 'one seed, so not known')
    """
    if (beside := verdict(mean, std)) == "one seed":
        return "one seed, so not known"
    if beside == "not more":
        return "not told apart: within the spread over seeds"
    return f"{'yes,' if (mean < 0) == lower else 'no, the opposite'} by more than the spread over seeds"


def compared(rows: Mapping[str, trained.Row], metric: Metric, claims: Sequence[tuple[str, str]]) -> str:
    """A sentence: the difference of each pair (a, b) that was run, paired over seeds, and what it is beside its spread."""
    said = []
    for a, b in claims:
        if a in rows and b in rows:
            mean, std = metric.difference(rows[a], rows[b])
            than = {"one seed": "one seed"}.get(verdict(mean, std), f"{verdict(mean, std)} than its spread")
            said.append(f"{a} - {b}: {metric.show(mean, std)}, {than}")
    return f"{metric.title[:1].upper()}{metric.title[1:]}, paired over seeds: {'; '.join(said)}." if said else ""


def differences(rows: Mapping[str, trained.Row], metric: Metric) -> str:
    """Each row minus each other row; bold where the mean exceeds the spread."""

    def cell(a: str, b: str) -> str:
        mean, std = metric.difference(rows[a], rows[b])
        return f"**{metric.show(mean, std)}**" if verdict(mean, std) == "more" else metric.show(mean, std)

    body = [[a, *("" if a == b else cell(a, b) for b in rows)] for a in rows]
    return report.table(["row minus column", *rows], body)


def claims(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs of rows, of which the first is said to be the better.

    >>> claims("dn* > bn, bn* > bn")
    (('dn*', 'bn'), ('bn*', 'bn'))
    """
    return tuple((a, b) for a, _, b in (claim.partition(" > ") for claim in text.split(", ")))


def pairs(rows: Mapping[str, trained.Row], metric: Metric, claims: Sequence[tuple[str, str]]) -> str:
    """A line for each pair (a, b) that was run: a - b, paired over seeds, and how many seeds have the better a."""
    lines = []
    for a, b in claims:
        if a in rows and b in rows:
            mean, std = metric.difference(rows[a], rows[b])
            each = list(zip(metric.of(rows[a]), metric.of(rows[b]), strict=False))
            better = sum((x < y) if metric.lower else (x > y) for x, y in each)
            seeds = f"{better} of {len(each)}"
            lines.append([f"`{a}` - `{b}`", metric.show(mean, std), seeds, verdict(mean, std)])
    head = ["pair", metric.title, "seeds with the first better", "than its spread over seeds"]
    return report.table(head, lines) if lines else ""


def exceeding(rows: Mapping[str, trained.Row], metric: Metric) -> str:
    """Says which differences exceed their spread over seeds."""
    seeds = min(len(row.seeds) for row in rows.values())
    if seeds < 2:
        return "One seed only: there is no spread over seeds that differences could exceed."
    above = {}
    for high, low in itertools.permutations(rows, 2):
        mean, std = metric.difference(rows[high], rows[low])
        if mean > std:
            above.setdefault(high, []).append(f"{low} (by {mean:.{metric.digits}f} +- {std:.{metric.digits}f})")
    chance = 2 * scipy.stats.t.sf(seeds**0.5, seeds - 1)
    lines = [
        f"Differences in {metric.title}, paired over {seeds} seeds, whose mean exceeds their "
        f"standard deviation over seeds (between equal rows that happens to {chance:.0%} of pairs):",
        "",
        *(f"- {high} is above {', '.join(lows)}" for high, lows in above.items()),
    ]
    return "\n".join(lines) if above else lines[0] + " none."
