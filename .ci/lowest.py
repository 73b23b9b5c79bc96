"""Prints the lowest versions of the dependencies that pyproject.toml allows, as pip takes them: jax==0.10 numpy==2.0 ...

python .ci/lowest.py
"""

import pathlib
import tomllib

project = tomllib.loads(pathlib.Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
print(*(need.replace(">=", "==") for need in project["dependencies"]))
