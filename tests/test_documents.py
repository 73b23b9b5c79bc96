"""The documents are true: README code runs, the notebook executes and equals its source."""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from normjax import TABLE, Field

ROOT = Path(__file__).parents[1]


def blocks(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


BLOCKS = blocks("README.md")


def test_readme_code_runs(capsys):
    import flax.linen as nn

    images, labels = jnp.ones((8, 4, 4, 3)), jnp.zeros(8, jnp.int32)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(names["Block"]()(x, train).mean((1, 2)))

    names = {
        "images": images,
        "data": {"image": images, "label": labels},
        "order": jnp.arange(8, dtype=jnp.int32).reshape(2, 4),
        "model": Classifier(),
    }
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["metrics"]["loss"].shape == (2,)
    assert names["metrics"]["penalty"][0] > 0
    assert "the block of 2 of axis 'c'" in capsys.readouterr().out
    block = names["NNXBlock"](names["nnx"].Rngs(0))
    assert block(jnp.ones((2, 4, 4, 3))).shape == (2, 4, 4, 64)


def test_the_walk_that_adds_a_layer_runs():
    names = {}
    for block in blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    parts = jnp.array([0.0, 2.0, 0.0, 4.0, 0.0, 8.0]).reshape(6, 1)  # variances 1, 4 and 16
    layer = names["NNXFace"](1, 3, momentum=0.0, rngs=names["nnx"].Rngs(0))
    assert (layer(parts) * 2).round(3).tolist() == (parts - parts.mean()).round(3).tolist()
    assert layer.var[...].tolist() == [4.0]


def test_readme_import_lines_are_flax_s_names():

    lines = [line for block in BLOCKS for line in block.splitlines() if line.startswith("from normjax.")]
    assert len(lines) == 2
    for name in ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"):
        assert all(name in line for line in lines)


def test_the_rows_that_the_readme_shows_are_those_of_the_table():
    shown = re.findall(r"^\| `(\w+)` \| (`[^`]*`|none) \| (`[^`]*`|none) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(shown) >= 15
    for name, *fields in shown:
        read = [None if field == "none" else Field.parse(field.strip("`")) for field in fields]
        assert [TABLE[name].mean, TABLE[name].var] == read, name


def test_tables_of_the_experiments_stand_in_the_reports_that_they_name():
    """Each table of rows or pairs in experiments/README.md is part of the last report linked before it."""
    folder, cited, checked = ROOT / "experiments", "", 0
    text = (folder / "README.md").read_text()
    for name, block in re.findall(
        r"\]\((results/[^)]*report\.md)\)|^((?:\| (?:row|pair) .*\n)(?:\|.*\n)+)", text, re.M
    ):
        cited = (folder / name).read_text() if name else cited
        assert block in cited
        checked += bool(block)
    assert checked >= 10


def test_notebook_is_its_source_without_outputs():
    jupytext = pytest.importorskip("jupytext")
    for source in (ROOT / "notebooks").glob("*.py"):
        written, paired = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
        assert [c.source for c in written.cells] == [c.source for c in paired.cells]
        assert all(not c.get("outputs") for c in paired.cells)
        badge = paired.cells[0].source.splitlines()[0]
        assert badge.startswith("[![Open in Colab]")
        assert badge.endswith(f"blob/main/notebooks/{source.stem}.ipynb)")


def test_notebook_runs(monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    plt.switch_backend("agg")
    for source in (ROOT / "notebooks").glob("*.py"):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(source.read_text(), str(source), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_notebook_executes_in_jupyter():
    import subprocess
    import sys

    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", str(notebook)]
        environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"PYTHONPATH": str(ROOT)}
        out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert out.returncode == 0, out.stderr[-2000:]
        assert "image/png" in out.stdout
