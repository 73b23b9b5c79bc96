"""The table of `benchmarks/correctness.py`: defects that normjax does not have, and what the table itself must do."""

import json

import jax
import pytest

from benchmarks import correctness
from benchmarks.correctness import CASES, Case

DEVICES = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
# Quick to compile, and one of each kind: axes, a mask, a gradient, a shard, precision, a window.
QUICK = (
    "nnx.GroupNorm of video",
    "LayerNorm of a row that is masked whole",
    "gradient of LayerNorm",
    "BatchNorm in `shard_map`, the mask leaves one",
    "LayerNorm at mean",
    "GroupNorm with its channels sharded",
)


def tier(entry):
    return pytest.param(entry, id=entry.what, marks=() if entry.what.startswith(QUICK) else pytest.mark.slow)


@DEVICES
@pytest.mark.parametrize("entry", [tier(entry) for entry in CASES])
def test_normjax_is_right_where_flax_errs(entry):
    row = correctness.measure(entry)
    assert row["kept"], row


def test_every_defect_is_named_once():
    names = [entry.what for entry in CASES]
    assert len(set(names)) == len(names)
    assert all(sum(name.startswith(quick) for name in names) for quick in QUICK)


@DEVICES
@pytest.mark.parametrize(
    ("ours", "status", "shown"),
    [(1e-7, 0, "| NaN | 1e-07 |"), (0.5, 1, "**missed**"), ("NaN", 1, "**missed**"), (float("nan"), 1, "**missed**")],
)
def test_a_missed_bound_is_shown_and_fails_the_script(monkeypatch, capsys, tmp_path, ours, status, shown):
    monkeypatch.setattr(correctness, "CASES", [Case("a defect", lambda: ("NaN", ours), 1e-6)])
    assert correctness.main(["--json", str(tmp_path / "rows.json")]) == status
    assert shown in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"][0]["kept"] == (status == 0)
    assert set(written["versions"]) == {"jax", "flax", "numpy"}


def test_a_defect_that_flax_no_longer_has_is_shown_as_mended():
    row = correctness.measure(Case("a defect", lambda: (1e-8, 1e-7), 1e-6))
    assert "| mended (1e-08) | 1e-07 |" in correctness.table([row])


def raises():
    raise KeyError("x")


@pytest.mark.parametrize(
    ("run", "found"), [(lambda: [1.0, 2.5], 0.5), (lambda: [1.0, float("inf")], "NaN"), (raises, "KeyError")]
)
def test_an_error_is_the_worst_difference_or_what_came_instead(run, found):
    assert correctness.error(run, [1.0, 2.0]) == found
