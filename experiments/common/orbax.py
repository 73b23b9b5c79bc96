"""Checkpoints as files, by Orbax: its errors without what it prints of them."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


@contextlib.contextmanager
def saving() -> Iterator[Callable[[Path, Any], None]]:
    """Gives `save(path, tree)`, which returns when the checkpoint is whole on the disk."""
    with _quiet(), _checkpointer() as checkpointer:

        def save(path: Path, tree: Any) -> None:
            checkpointer.save(path.absolute(), tree)
            checkpointer.wait_until_finished()

        yield save


def restore(path: Path, like: Any) -> Any:
    """The tree in a checkpoint, in the structure of `like`."""
    with _quiet(), _checkpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)


def reason(error: BaseException) -> str:
    """What is at the bottom of an error, in a few words."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}"


def _checkpointer() -> ocp.StandardCheckpointer:
    """Orbax without its waiting for other processes, which do not call it."""
    alone = {"active_processes": {0}, "barrier_sync_key_prefix": "process-0"} if jax.process_count() > 1 else {}
    return ocp.StandardCheckpointer(multiprocessing_options=ocp.options.MultiprocessingOptions(**alone))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves the word to our own error, where Orbax logs a traceback and another arrives after its event loop is gone."""
    logger, hook, hook_of_threads = logging.getLogger("absl"), sys.excepthook, sys.unraisablehook

    def without_the_loop(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if str(error) != "Event loop is closed":
            hook(kind, error, trace)

    def of_threads_without_the_loop(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            hook_of_threads(found)

    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except Exception:
        sys.excepthook, sys.unraisablehook = without_the_loop, of_threads_without_the_loop
        raise
    finally:
        logger.setLevel(level)
