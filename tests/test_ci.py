"""What `.ci/run` relies on: versions that are locked."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_every_requirement_is_locked_to_a_version_that_it_allows():
    with (ROOT / "pyproject.toml").open("rb") as file:
        read = tomllib.load(file)
    project = read["project"]
    locked = {}
    for line in (ROOT / "ci.lock").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            locked[name] = version
    lists = (project["dependencies"], *project["optional-dependencies"].values())
    lists += (read["build-system"]["requires"],)
    asked = [Requirement(line) for lines in lists for line in lines]
    missed = [
        str(one)
        for one in asked
        if one.name != "osscar"
        and not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))
    ]
    assert not missed, f"see CONTRIBUTING.md: renew ci.lock, which is behind {missed}"
