"""From trained rows to a report: learning curves, a text of experiments/reports, one HTML page.

Everything shown is read back from run folders (`trained.py`); a number without a run folder is not shown.
"""

import base64
import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import markdown
import numpy as np
from matplotlib.figure import Figure

from experiments.common import files, trained

TEXTS = Path(__file__).parents[1] / "reports"
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .7em; border-bottom: 1px solid #ddd; }
img { max-width: 100%; } code { background: #f4f4f4; }"""


# --- numbers --------------------------------------------------------------------------------------


def settings(config: Mapping[str, object], *names: str) -> str:
    """Some fields of a configuration.

    >>> settings({"seeds": 3, "steps": 100, "lr": 0.1}, "seeds", "lr")
    'seeds 3, lr 0.1'
    """
    return ", ".join(f"{name} {config[name]}" for name in names)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); NaN for a single seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan  # NaN passes, unlike in `statistics`


def plus_minus(values: Sequence[float], digits: int) -> str:
    """Mean +- standard deviation over seeds.

    >>> plus_minus([1.0, 2.0, 3.0], 1)
    '2.0 +- 1.0'
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} +- {spread(values):.{digits}f}"


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean and spread over seeds of a - b, seed by seed.

    >>> difference([3.0, 5.0], [1.0, 1.0])
    (3.0, 1.4142135623730951)
    """
    each = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.fmean(each), spread(each)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable in a terminal too; the first column is text.

    >>> print(table(["row", "loss"], [["batch", "1.5"], ["layer*", "12.5"]]))
    | row    | loss |
    | :----- | ---: |
    | batch  |  1.5 |
    | layer* | 12.5 |
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = f"{cells[0]:<{widths[0]}}"
        rest = [f"{cell:>{w}}" for cell, w in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


# --- pictures and pages ---------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write(path, buffer.getvalue())


def curves(
    rows: Mapping[str, trained.Row],
    metrics: Mapping[str, str],
    style: Callable[[str], dict],
    smooth: int,
) -> Figure:
    """Draws metrics against the step: mean over seeds, band of one standard deviation.

    The axis is fitted to what comes after the first fifth of the steps, where the rows part.

    Args:
      rows: what to draw.
      metrics: {name in metrics.jsonl: label of the axis}; a label with "log" in it has a log axis.
      style: arguments of `plot` for a row's name.
      smooth: metrics written at every step are averaged over this many.
    """
    figure = Figure(figsize=(6.2 * len(metrics), 4.6), layout="constrained")
    for ax, (metric, label) in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics.items(), strict=True):
        late, drawn = [], []
        for name, row in rows.items():
            steps, values = row.curve(metric)
            if len(steps) > 2 * smooth and np.all(np.diff(steps) == 1):
                whole = len(steps) // smooth * smooth
                steps = steps[:whole].reshape(-1, smooth)[:, -1]
                values = values[:, :whole].reshape(len(values), -1, smooth).mean(axis=-1)
            mean, std = values.mean(axis=0), values.std(axis=0)
            (line,) = ax.plot(steps, mean, label=name, **style(name))
            drawn.append(mean)
            ax.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.1, lw=0)
            ends = np.stack([mean - std, mean + std])[:, steps > steps[-1] / 5]
            late += ends[np.isfinite(ends)].tolist()
        if "log" in label:
            if np.any(np.nan_to_num(np.concatenate(drawn), posinf=0) > 0):  # not where all runs diverged at once
                ax.set_yscale("log")
        elif late and np.ptp(late) > 0:
            ax.set_ylim(min(late) - 0.1 * np.ptp(late), max(late) + 0.1 * np.ptp(late))
        ax.set(xlabel="step", ylabel=label)
        ax.grid(alpha=0.3)
    figure.axes[-1].legend(ncols=2, fontsize=9)
    return figure


def page(path: Path, values: Mapping[str, object]) -> str:
    """Fills the text of a report.

    {x} is a value. What stands between <!-- if x --> and <!-- end --> stays if x is not empty. <!-- include y --> is
    experiments/reports/y.md.

    >>> page(TEXTS / "numbers.md", {"environments": ""}).splitlines()[0]
    '## Where the numbers come from'
    """
    text = path.read_text()
    text = re.sub(r"<!-- include (\w+) -->\n", lambda match: (TEXTS / f"{match[1]}.md").read_text(), text)
    optional = re.compile(r"<!-- if (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
    return optional.sub(lambda match: match[2] if values[match[1]] else "", text).format_map(values)


class Report(NamedTuple):
    """What an experiment reports.

    Attributes:
      printed: what the terminal shows too; empty parts are left out.
      pictures: by the name of their file, without .png.
      values: for the text of the experiment, see `page`.
    """

    printed: Sequence[str]
    pictures: Mapping[str, Figure]
    values: Mapping[str, object]


def publish(folder: Path, text: Path, made: Report, rows: Mapping[str, trained.Row]) -> None:
    """Prints a report, and writes it with its pictures to report.md and report.html, and its curves to metrics.csv."""
    print("\n" + "\n\n".join(part for part in made.printed if part) + "\n")
    for file, figure in made.pictures.items():
        save(figure, folder / f"{file}.png")
    files.write(folder / "metrics.csv", trained.as_csv(rows))
    write_pages(folder, page(text, {**made.values, "environments": trained.environments(rows)}))
    print(f"Report: {folder / 'report.html'} (and report.md)")


def write_pages(folder: Path, text: str) -> None:
    """Writes report.md, and report.html with its pictures inside: one file that needs no other."""
    files.write(folder / "report.md", text)
    body = markdown.markdown(text, extensions=["tables"])

    def inline(match: re.Match) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inline, body)
    title = text.partition("\n")[0].lstrip("# ")
    files.write(
        folder / "report.html",
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n",
    )
