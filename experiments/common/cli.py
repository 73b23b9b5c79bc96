"""Command lines: a dataclass of options, names picked from a table, one way to refuse.

    options = cli.parse(Options, argv, prog="python -m experiments.compare", description=...)
    rows = [cli.pick(name, ROWS, "row") for name in options.rows]

`parse` is tyro: a field is an option, its type checks it, the line under it is its help, and a
misspelt option names the closest one. Whoever refuses prints one message and exits with code 2.
"""

import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn, TypeVar

import tyro

Options = TypeVar("Options")


def parse(options: type[Options], argv: Sequence[str] | None, *, prog: str, description: str) -> Options:
    """Reads the command line (sys.argv if `argv` is None) into an instance of `options`.

    Exits with code 2 and a message on an unknown option or a value of the wrong type.
    """
    return tyro.cli(options, args=argv, prog=prog, description=description)


def pick(name: str, known: Iterable[str], what: str) -> str:
    """Returns `name` if it is known, else exits with code 2 and the closest name.

    >>> pick("batch", ["batch", "layer"], "row")
    'batch'
    """
    known = list(known)
    if name in known:
        return name
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    fail(f"no {what} is called {name!r}; did you mean {closest!r}? There are {', '.join(known)}")


def fail(message: str) -> NoReturn:
    """Prints the message to stderr and exits with code 2: the command was wrong, nothing ran."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
