"""Which module of the package may import which: the layering, as a test."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "normlib"
CORE = {"axes", "reference", "stats", "backends", "functional", "modules"}
ALLOWED = {
    "axes": set(),
    "reference": {"axes"},
    "stats": {"axes"},
    "backends": {"axes", "stats"},
    "functional": {"axes", "stats", "backends"},
    "modules": {"axes", "stats", "functional"},
    "variants": {"axes", "stats", "backends", "functional", "modules"},
    "calls": set(),
    "folding": {"backends", "modules", "calls"},
    "progress": set(),
    "inference": {"axes", "stats", "modules", "variants", "folding"}
    | {"progress"},
    "convert": {"modules"},
    "models": {"functional", "modules"},
    "diagnostics": {"stats", "progress"},
    "data": set(),
    "training": {"data", "models"},
    "plotting": set(),
    "explore": {"axes"},
    "blocks": set(),
    "records": set(),
    "testing": set(),
    "exercises": CORE
    | {"variants", "inference", "models", "data", "training", "testing"}
    | {"blocks"},
}


def imported(path):
    """Return the dotted names that a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def files(module):
    folder = PACKAGE / module
    return folder.rglob("*.py") if folder.is_dir() else [f"{folder}.py"]


def imports(module):
    return {name for f in files(module) for name in imported(pathlib.Path(f))}


def modules_of_the_package():
    return {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}


def test_every_module_has_its_place_in_the_layering():
    assert modules_of_the_package() == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_only_from_the_layers_below_it(module):
    used = {
        name.split(".")[1]
        for name in imports(module)
        if name.startswith("normlib.")
    }
    assert used <= ALLOWED[module] | {module}


@pytest.mark.parametrize("module", ["axes", "reference"])
def test_the_oracle_never_sees_torch(module):
    assert not {n for n in imports(module) if n.split(".")[0] == "torch"}


def at_the_top(path):
    """Return the packages that a file needs to be imported at all."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = [n for n in tree.body if isinstance(n, ast.Import)]
    names = {alias.name for node in nodes for alias in node.names}
    names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_the_tests_of_a_gpu_need_little_of_its_machine():
    """No Jupyter, nothing of the book; the others are not collected there."""
    paths = {path.stem: path for path in (ROOT / "tests").glob("*.py")}
    wanted = {n for n, path in paths.items() if "devices" in at_the_top(path)}
    assert len(wanted) > 7
    needed = set()
    while wanted:
        name = wanted.pop()
        found = at_the_top(paths[name]) - needed
        needed |= found
        wanted |= found & set(paths)
    there = {"torch", "numpy", "pytest", "hypothesis"}
    ours = {"normlib", "benchmarks", *paths}
    assert needed <= there | ours | sys.stdlib_module_names


def test_importing_normlib_loads_numpy_torch_and_itself_only():
    code = (
        "import json, sys, torch, numpy; before = set(sys.modules); "
        "import normlib; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    added = json.loads(run.stdout)
    ours = [name for name in added if name.split(".")[0] == "normlib"]
    heavy = {"matplotlib", "sklearn", "scipy", "triton", "pandas", "IPython"}
    assert not heavy & {name.split(".")[0] for name in added}
    # 0.1 s is allowed on top of torch; a module costs about 1 ms.
    assert len(added) - len(ours) < 25, added
