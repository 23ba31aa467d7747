"""Keep the notebooks in order.

``python -m tools.notebooks`` stamps the repository's address (which stands in
``_config.yml``) where it is needed, and brings every notebook into the normal
form: stable metadata, no timings. ``--execute`` runs the notebooks first,
``--check`` changes nothing and fails where something would change.
"""

import argparse
import pathlib
import sys
import time
import tomllib

import nbclient
import nbformat
import yaml

from tools import book

ROOT = pathlib.Path(__file__).parents[1]
STAMPED = (
    "README.md",
    "intro.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "pyproject.toml",
)
KEPT = {"mystnb", "tags"}
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
SETUP_TAGS = ["hide-cell", "setup"]
SETUP = """\
# Installs normlib where it is missing (on Colab, for example).
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("normlib") is None:
    package = "normlib[course] @ git+{repository}"
    command = [sys.executable, "-m", "pip", "install", "-q", package]
    subprocess.run(command, check=True)"""


def repository():
    """Return the address of the repository, from its one place."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    return config["repository"]["url"].rstrip("/")


def notebooks():
    """Return the paths of all notebooks of the book."""
    folders = ("chapters", "appendix")
    return [p for f in folders for p in sorted((ROOT / f).glob("*.ipynb"))]


def forms(address):
    """Return the ways in which a repository's address is written."""
    owner, name = address.split("/")[-2:]
    return (
        f"github.com/{owner}/{name}",
        f"/github/{owner}/{name}",
        f"/gh/{owner}/{name}",
        f"{owner}.github.io/{name}",
    )


def stamped_text(text, old, new):
    """Replace one repository's address by another, in all its forms."""
    for before, after in zip(forms(old), forms(new), strict=True):
        text = text.replace(before, after)
    return text


def setup_cell():
    """Return the first cell that every notebook has."""
    return SETUP.format(repository=repository())


def normal(notebook):
    """Return the notebook's text in the normal form, its setup stamped."""
    notebook["metadata"] = METADATA
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    for cell in notebook["cells"]:
        cell["metadata"] = {
            key: value
            for key, value in cell["metadata"].items()
            if key in KEPT
        }
    for cell in notebook["cells"]:
        if "setup" in cell["metadata"].get("tags", []):
            cell["source"] = setup_cell()
        if "outputs" in cell:
            cell["outputs"] = merged(cell["outputs"])
    return nbformat.writes(nbformat.from_dict(notebook)) + "\n"


def merged(outputs):
    """Join neighbouring pieces of one stream: how many there are is chance."""
    joined = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output.get("name") == before.get("name", ""):
            before["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def read(path):
    """Return a notebook as plain data, with joined sources."""
    return nbformat.read(path, as_version=4)


def changes():
    """Yield each file that is not in order, with the text it should have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    old = project["project"]["urls"]["Repository"]
    for name in STAMPED:
        path = ROOT / name
        if path.exists():
            text = path.read_text("utf-8")
            wanted = stamped_text(text, old, repository())
            if wanted != text:
                yield path, wanted
    for path in notebooks():
        wanted = normal(read(path))
        if wanted != path.read_text("utf-8"):
            yield path, wanted


def execute(path):
    """Run one notebook in place; end with one line where a cell fails."""
    notebook = read(path)
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    name, start, done = path.relative_to(ROOT), time.time(), 0
    print(f"{name}: {count} cells", end="", flush=True)

    def progress(cell, cell_index, **_):
        nonlocal done
        if cell.cell_type == "code":
            done += 1
            if sys.stdout.isatty():
                print(f"\r{name}: cell {done} of {count}", end="", flush=True)

    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=progress,
        record_timing=False,
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        print()
        source = code_source(notebook, done)
        reason = f"{error.ename}: {error.evalue}"
        sys.exit(f"normlib: {book.describe(path, source, reason)}")
    print(f", {time.time() - start:.0f} s", flush=True)
    path.write_text(normal(notebook), "utf-8")


def code_source(notebook, number):
    """Return the source of a notebook's code cell, counted from 1."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return code[number - 1].source.strip()


def main():
    """Do what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--execute", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("paths", nargs="*", type=pathlib.Path)
    options = parser.parse_args()
    if options.execute:
        for path in [p.resolve() for p in options.paths] or notebooks():
            execute(path)
    found = list(changes())
    for path, wanted in found:
        print(f"{'not in order' if options.check else 'mended'}: {path.name}")
        if not options.check:
            path.write_text(wanted, "utf-8")
    if options.check and found:
        sys.exit("normlib: `python -m tools.notebooks` mends these")


if __name__ == "__main__":
    main()
