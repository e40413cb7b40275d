"""Type checkers see what `pip install -e` has installed, as the README says it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USE = """
import osscar
from graph import trace
from solvers import solve
from torch import nn

reveal_type(osscar.load("small"))
reveal_type(osscar.load("small", dense=nn.Linear(2, 2)))
reveal_type(solve)
reveal_type(trace)
osscar.no_such_name
"""
SAID = (
    r"PreTrainedModel \| Any",
    r"Linear \| Any",
    r"-> ([\w.]+\.)?Solution",
    r"-> ([\w.]+\.)?DependencyGraph",
    "error: .*no_such_name",
)
BUILD = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has this project as an editable install, and what it needs."""
    place = tmp_path_factory.mktemp("types")
    source = place / "source"
    for name in ("osscar", "solvers", "graph"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, str(place)], check=True, cwd=source)
    venv.create(place / "venv", with_pip=False, symlinks=True)
    [packages] = (place / "venv").glob("lib/python*/site-packages")
    [wheel] = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    [laid] = packages.glob("*osscar*.pth")
    assert laid.read_text().split() == [str(source)]  # a path, which type checkers follow
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (place / "use.py").write_text(USE)
    return place / "venv" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_see_the_public_names(checker, python):
    pytest.importorskip(checker)
    interpreter = {"mypy": "--python-executable", "basedpyright": "--pythonpath"}[checker]
    command = [sys.executable, "-m", checker, interpreter, str(python), "use.py"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=python.parents[2], env=alone)
    assert done.stdout.count("error: ") == 1, done.stdout + done.stderr
    for expected in SAID:
        assert re.search(expected, done.stdout), (expected, done.stdout)
