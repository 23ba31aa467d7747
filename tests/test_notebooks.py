"""The rules of a chapter, for every notebook of the book."""

import ast
import collections
import pathlib
import re

import pytest
import yaml

from tools import notebooks

ROOT = pathlib.Path(__file__).parents[1]
PATHS = notebooks.notebooks()
ROWS = yaml.safe_load((ROOT / "appendix" / "claims.yml").read_text("utf-8"))
VERDICTS = {"correct", "qualified", "wrong"}
KEYS = {"id", "source", "claim", "verdict", "reason", "reference"}
IMAGES = {"image/svg+xml", "image/png"}
ENTRIES = re.findall(
    r"^@\w+\{([^,\s]+)", (ROOT / "references.bib").read_text("utf-8"), re.M
)


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return notebooks.read(path)


@pytest.fixture
def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def shows_an_image(cell):
    kinds = [set(output.get("data", {})) for output in cell.outputs]
    return any(IMAGES & kind and "text/html" not in kind for kind in kinds)


def claims_of(path):
    """Return the claims that a notebook's cells settle, by their tags."""
    cells = notebooks.read(path).cells
    found = [tag for cell in cells for tag in tags(cell)]
    return [t.removeprefix("claim-") for t in found if t.startswith("claim-")]


def test_there_are_notebooks_and_claims():
    assert PATHS
    assert ROWS


def test_every_chapter_is_in_the_table_of_contents(path):
    contents = (ROOT / "_toc.yml").read_text()
    assert f"file: {path.relative_to(ROOT).with_suffix('')}\n" in contents


def test_every_cell_was_run_in_order_from_a_fresh_kernel(code):
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))


def test_no_output_is_an_error_or_a_warning(code):
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text


def test_lines_fit_into_the_page(code):
    for cell in code:
        long = [line for line in cell.source.splitlines() if len(line) > 79]
        assert not long


def test_code_is_plain_python_without_ipython(code):
    for cell in code:
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            names = [getattr(node, "module", None) or ""]
            names += [a.name for a in getattr(node, "names", []) if a]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any("IPython" in str(name) for name in names)


def test_the_first_code_cell_is_the_stamped_one(code):
    assert code[0].source == notebooks.setup_cell()
    assert tags(code[0]) == notebooks.SETUP_TAGS
    assert not code[0].outputs


def test_the_notebook_is_in_the_normal_form(path):
    assert path.read_text("utf-8") == notebooks.normal(notebooks.read(path))


def test_every_image_has_a_caption_and_alternative_text(code):
    for cell in filter(shows_an_image, code):
        told = cell.metadata.get("mystnb", {})
        assert len(told["image"]["alt"]) > 20, cell.source
        assert len(told["figure"]["caption"]) > 30, cell.source
        assert told["figure"]["name"].startswith("fig-"), cell.source


def test_no_figure_has_the_name_of_another():
    names = collections.Counter(
        cell.metadata["mystnb"]["figure"]["name"]
        for path in PATHS
        for cell in notebooks.read(path).cells
        if "figure" in cell.metadata.get("mystnb", {})
    )
    assert not [name for name, count in names.items() if count > 1]


def test_a_notebook_is_light(path):
    assert path.stat().st_size < 1_000_000


def test_a_notebook_asserts_something(code):
    assert any(
        "assert" in cell.source or "agree(" in cell.source for cell in code
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_claim_is_complete(row):
    assert set(row) == KEYS
    assert re.fullmatch(r"\d{3}-\d{2}[a-z]?", row["id"])
    assert row["verdict"] in VERDICTS
    assert len(row["claim"]) > 10
    assert len(row["reason"]) > 10
    for key in filter(None, (row["reference"] or "").split(",")):
        assert key.strip() in ENTRIES


def test_every_claim_is_settled_by_one_cell_and_every_tag_has_its_claim():
    rows = collections.Counter(row["id"] for row in ROWS)
    cells = collections.Counter(c for path in PATHS for c in claims_of(path))
    assert rows == cells
    assert set(rows.values()) == {1}


def exercises(path):
    """Return the labels of a notebook's exercises, and of its solutions."""
    text = "\n".join(
        c.source
        for c in notebooks.read(path).cells
        if c.cell_type == "markdown"
    )
    posed = re.findall(r"\{exercise(?:-start)?\}[^\n]*\n:label: (\S+)", text)
    solved = re.findall(r"\{solution(?:-start)?\} (\S+)", text)
    return posed, solved


CHAPTERS = [path for path in PATHS if path.parent.name == "chapters"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_four_exercises_and_each_its_solution(path):
    posed, _ = exercises(path)
    number = path.stem[:2]
    _, solved = exercises(ROOT / "appendix" / f"solutions_{number}.ipynb")
    assert len(posed) >= 4
    assert sorted(posed) == sorted(solved)
