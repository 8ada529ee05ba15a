"""The versions of what is installed: pinned for the tests, bounded in the metadata, and what finds them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

place = importlib.util.spec_from_file_location("constraints", ROOT / "constraints.py")
constraints = importlib.util.module_from_spec(place)
place.loader.exec_module(constraints)

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
METADATA = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
REQUIRED = {
    constraints.normal(requirement.name): requirement
    for requirement in map(Requirement, METADATA)
    if requirement.name != "gradientless"
}


def version_of(requirement: Requirement) -> str:
    (only,) = requirement.specifier
    assert only.operator == "=="
    return only.version


def pins(python: str) -> dict[str, str]:
    """The versions in constraints.txt that a Python of this version gets. Each package has one."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert pin.name not in found, line
                found[pin.name] = version_of(pin)
    return found


def installed() -> dict[str, str]:
    """The version of each installed package but this one, without its build's mark (`+cpu`)."""
    found = {
        constraints.normal(each.name): each.version.partition("+")[0] for each in importlib.metadata.distributions()
    }
    return {name: version for name, version in found.items() if name != "gradientless"}


def test_what_is_installed_is_what_was_meant(request):
    """Of the pinned environment every package is pinned; `make` says which environment it has made."""
    kind, found, here = (
        request.config.getoption("--versions"),
        installed(),
        pins(".".join(map(str, sys.version_info[:2]))),
    )
    needed = {name for name, each in REQUIRED.items() if each.marker is None or each.marker.evaluate()}
    assert {name for name in needed if not REQUIRED[name].specifier.contains(found[name], prereleases=True)} == set()
    if kind == "pinned":
        assert {name: version for name, version in found.items() if here.get(name) != version} == {}
    elif kind == "oldest":
        lower = dict(pin.split("==") for pin in constraints.oldest(METADATA))
        assert {name for name in needed if Version(found[name]) != Version(lower[name])} == set()
    elif kind == "newest":
        assert {name for name in needed if Version(found[name]) < Version(here[name])} == set()


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_bounds(python):
    found = pins(python)
    for name, requirement in REQUIRED.items():
        assert found[name] in requirement.specifier, requirement


@pytest.mark.parametrize("requirement", REQUIRED.values(), ids=REQUIRED)
def test_every_requirement_has_both_bounds(requirement):
    assert sorted(bound.operator for bound in requirement.specifier) == ["<", ">="]


def test_the_oldest_are_the_lower_bounds(monkeypatch, capsys):
    given = [
        "Num_py<3,>=2.1",
        "tomli<3,>=2; python_version < '3.11' and extra == 'run'",
        "gradientless[run]; extra == 'dev'",
    ]
    assert constraints.oldest(given) == ["num-py==2.1", "tomli==2"]
    with pytest.raises(ValueError, match=r"a requirement must have a lower bound, got 'rich<16'"):
        constraints.oldest(["rich<16"])
    monkeypatch.setattr(constraints.importlib.metadata, "requires", {"gradientless": METADATA}.get)
    constraints.main("oldest")
    lines = capsys.readouterr().out.split()
    assert {line.partition("==")[0] for line in lines} == set(REQUIRED) and len(lines) == len(REQUIRED)


def report(python: str, **versions: str) -> dict:
    """What pip's --report holds, of what is read here."""
    rows = [{"metadata": {"name": name, "version": of}, "download_info": {"url": "x"}} for name, of in versions.items()]
    here = {"metadata": {"name": "gradientless", "version": "1"}, "download_info": {"url": "x", "dir_info": {}}}
    return {"environment": {"python_version": python}, "install": [*rows, here]}


def test_pins_are_written_for_every_python(monkeypatch, capsys):
    reports = {
        "a": report("3.9", numpy="1.0", SciPy="1.1", torch="2.0", old_one="1"),
        "b": report("3.10", numpy="1.5", SciPy="1.1", torch="2.0+cpu"),
        "c": report("3.12", numpy="2.0", SciPy="1.2", torch="2.0"),
        "d": report("3.13", numpy="2.0", SciPy="1.2", torch="2.0"),
    }
    monkeypatch.setattr(constraints, "resolved", reports.__getitem__)
    constraints.main("pinned", *"dbca")
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")] == [
        "numpy==1.0; python_version < '3.10'",
        "numpy==1.5; python_version >= '3.10' and python_version < '3.12'",
        "numpy==2.0; python_version >= '3.12'",
        "old-one==1",
        "scipy==1.1; python_version < '3.12'",
        "scipy==1.2; python_version >= '3.12'",
        "torch==2.0",
    ]


def test_pip_is_asked_for_an_environment_of_its_own(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps(report("3.12")).encode())

    monkeypatch.setattr(constraints.subprocess, "run", run)
    assert constraints.resolved("some/python")["environment"] == {"python_version": "3.12"}
    (command,) = asked
    assert command[command.index("--python") + 1] == "some/python"
    assert {"--dry-run", "--ignore-installed", "pip", "setuptools", ".[dev]", constraints.TORCH} <= set(command)


def test_the_pinned_torch_is_the_one_held():
    assert all(f"torch=={pins(python)['torch']}" == constraints.TORCH for python in PYTHONS)
