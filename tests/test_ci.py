"""What `.ci/run` relies on: versions that are locked, and tests that are not skipped."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SKIPPED = {
    "one": 'import pytest\ndef test_one(): pytest.skip("not here")',
    "a whole file": 'import pytest\npytest.importorskip("no_such_package")',
}
pytest_plugins = ["pytester"]


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


@pytest.mark.parametrize("source", SKIPPED.values(), ids=SKIPPED)
@pytest.mark.parametrize("ci", ["true", ""])
def test_what_is_skipped_fails_in_ci_alone(ci, source, pytester, monkeypatch):
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(source)
    ran = pytester.runpytest_inprocess()
    ran.assert_outcomes(**{("failed" if "def" in source else "errors") if ci else "skipped": 1})
    assert ("MAY_SKIP_IN_CI" in ran.stdout.str()) == bool(ci)
