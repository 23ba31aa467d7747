"""The files that say what is needed agree with each other."""

import importlib.metadata
import pathlib
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import normlib
from tools import environment, notebooks

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"pytorch": "torch"}


def requirements(lines):
    found = map(Requirement, lines)
    return {canonicalize_name(r.name): r.specifier for r in found}


def ours():
    """What pyproject.toml asks for, the extras included."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + extras["course"] + extras["dev"]
    return {
        name: specifier
        for name, specifier in requirements(lines).items()
        if name != "normlib"
    }


def theirs():
    """What environment.yml asks for, under the names of PyPI."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())
    lines = [x for x in listed["dependencies"] if isinstance(x, str)]
    pip = next(x for x in listed["dependencies"] if isinstance(x, dict))
    lines += [x for x in pip["pip"] if not x.startswith("-e")]
    found = requirements(lines)
    return {CONDA_NAMES.get(name, name): s for name, s in found.items()}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return requirements(line for line in lines if line[:1] not in ("#", ""))


def test_conda_gets_what_pip_gets():
    conda = theirs()
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert conda.pop("pip") == SpecifierSet()
    assert conda == ours()


def test_conda_installs_the_package_from_the_checkout():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert "-e ." in listed["dependencies"][-1]["pip"]


@pytest.mark.parametrize("name", sorted(ours()))
def test_every_dependency_is_pinned_within_its_range(name):
    (pin,) = pins()[name]
    assert pin.operator == "=="
    assert pin.version in ours()[name]


def test_the_package_itself_needs_numpy_and_torch_only():
    assert set(requirements(PROJECT["dependencies"])) == {"numpy", "torch"}


def test_torch_is_pinned_but_not_for_those_who_install_the_package():
    assert str(pins()["torch"]) == "==2.13.0"
    needed = requirements(PROJECT["dependencies"])
    assert str(needed["torch"]) == ">=2.9"


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (4, 0)])
def test_setting_up_refuses_other_pythons(version):
    assert not environment.fits(version)
    assert ".".join(map(str, version)) not in SpecifierSet(
        PROJECT["requires-python"]
    )


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_setting_up_takes_the_supported_pythons(version):
    assert environment.fits(version)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    latest = re.search(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)
    assert citation["version"] == normlib.__version__
    assert latest[1] == normlib.__version__
    assert importlib.metadata.version("normlib") == normlib.__version__


def test_the_address_of_the_repository_is_the_configured_one():
    address = notebooks.repository()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == address
    assert PROJECT["urls"]["Repository"] == address
    assert not list(notebooks.changes()), "python -m tools.notebooks"


def test_another_address_replaces_every_form_of_the_old_one():
    old, new = "https://github.com/a/b", "https://github.com/c/d"
    text = (
        "https://github.com/a/b.git https://mybinder.org/v2/gh/a/b/main "
        "https://colab.research.google.com/github/a/b/blob https://a.github.io/b"
    )
    moved = notebooks.stamped_text(text, old, new)
    assert "a/b" not in moved
    assert moved.count("c/d") == 3
    assert "c.github.io/d" in moved


def test_the_examples_of_the_readme_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert names["mean"].shape == (16,)
    assert "Folded" in repr(names["served"])
