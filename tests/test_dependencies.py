"""Lower bounds of dependencies: they refuse what SECURITY.md says, agree everywhere and admit what was tested."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hf_inti.hub import handler


ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([\w-]+) \| ([\d.]+) \| .*(?:CVE-\d{4}-\d+|release notes)", re.M)


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = [s.version for s in requirement.specifier if s.operator == ">="]
    return Version(bound)


@pytest.fixture
def required(monkeypatch) -> dict[str, set[Version]]:
    """What setup.py asks for, extras included: package -> its lower bounds, one for each place with another."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    found = {}
    for line in [*given["install_requires"], *sum(given["extras_require"].values(), [])]:
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), set()).add(lower_bound(requirement))
    return found


def test_versions_with_known_holes_are_refused(required):
    section = (ROOT / "SECURITY.md").read_text().split("**Dependencies.**")[1]
    rows = ROW.findall(section)
    assert len(rows) == section.count("\n| ") - 2 > 0  # all but the two lines of the table's head
    for name, safe in rows:
        assert min(required[canonicalize_name(name)]) >= Version(safe), name


def test_bounds_are_the_same_everywhere_and_tested(required):
    assert [name for name, bounds in required.items() if len(bounds) > 1] == []
    for requirement in map(Requirement, handler.REQUIREMENTS.split()):  # what an endpoint installs
        assert {lower_bound(requirement)} == required[canonicalize_name(requirement.name)]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(name): Version(version) for name, version in tested.items()}
    assert {name: bounds for name, bounds in required.items() if min(bounds) > tested[name]} == {}
