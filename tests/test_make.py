"""Each way in which `make` can go wrong ends in one clear line."""

import json
import pathlib
import re
import runpy
import subprocess
import sys

import nbformat
import pytest

from tools import book, browser, environment, notebooks, serve

ROOT = pathlib.Path(__file__).parents[1]


def make(*arguments):
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_help_names_the_two_commands():
    shown = make("help").stdout
    assert "make book " in shown
    assert "make test " in shown


def test_an_old_python_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    monkeypatch.setattr(sys, "argv", ["environment.py", ".venv"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(environment.__file__, run_name="__main__")
    assert re.fullmatch(
        r"normlib: needs Python 3.11, 3.12 or 3.13; \S+ is 3.9.18 .*",
        end.value.code,
    )


def test_the_check_of_the_version_runs_on_any_python_3():
    # No f-string, walrus or annotation: an old Python must get as far.
    source = pathlib.Path(environment.__file__).read_text()
    compile(source, "environment.py", "exec")
    assert not re.search(r"\bf\"|:=|->", source)


def fake_pip(tmp_path, words, status):
    """Write a program that stands for a Python whose pip fails."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{words}'\nexit {status}\n")
    program.chmod(0o755)
    return str(tmp_path)


def test_no_network_is_told_in_one_line(tmp_path):
    words = "WARNING: Retrying after NewConnectionError: [Errno -2]"
    with pytest.raises(SystemExit, match="normlib: no network"):
        environment.make(fake_pip(tmp_path, words, 1))
    assert not (tmp_path / ".ready").exists()


def test_a_failing_pip_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="normlib: pip could not install"):
        environment.make(fake_pip(tmp_path, "ERROR: no wheel", 1))


def test_a_shaky_network_that_held_is_no_failure(tmp_path):
    words = "WARNING: Retrying after ReadTimeoutError"
    environment.make(fake_pip(tmp_path, words, 0))
    assert (tmp_path / ".ready").exists()


def test_a_busy_port_is_told_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("")
    monkeypatch.setattr(serve, "PAGES", tmp_path)
    with serve.server(0) as busy:
        port = busy.server_port
        monkeypatch.setattr(sys, "argv", ["serve.py", str(port)])
        with pytest.raises(SystemExit, match=f"PORT={port + 1}"):
            serve.main()


def test_serving_before_building_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "PAGES", tmp_path)
    with pytest.raises(SystemExit, match="run `make book` first"):
        serve.main()


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """A notebook whose second code cell divides by zero."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("a = 0"),
            nbformat.v4.new_markdown_cell("Watch."),
            nbformat.v4.new_code_cell("# Too far\n1 / a"),
        ]
    )
    for module in (book, notebooks):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    path = tmp_path / "one.ipynb"
    nbformat.write(notebook, path)
    return path


LINE = (
    r"one.ipynb failed in code cell 2 of 2 \('# Too far'\): "
    r"ZeroDivisionError: division by zero"
)


def test_a_failing_notebook_is_told_in_one_line(failing):
    with pytest.raises(SystemExit, match=LINE):
        notebooks.execute(failing)


def test_a_failing_build_names_notebook_cell_and_exception(failing):
    rule = "------------------"
    said = (
        f"{failing}: Executing notebook using local CWD [mystnb]\n"
        f"WARNING: {failing}: Executing notebook failed: CellExecutionError\n"
        "nbclient.exceptions.CellExecutionError: An error occurred while "
        f"executing the following cell:\n{rule}\n# Too far\n1 / a\n{rule}\n\n"
        "\n----\nZeroDivisionError      Traceback (most recent call last)\n"
        "Cell In[2], line 2\n\nZeroDivisionError: division by zero\n"
    )
    assert re.fullmatch(LINE, book.failed_notebook(said))


SHORT = "# Too far\n1 / a"
LONG = "['# Too far', '1 / a']\n...\n['more', 'and more']"


@pytest.mark.parametrize("preview", [SHORT, LONG])
def test_a_cell_that_takes_too_long_is_named(failing, preview):
    rule = "-------------------"
    said = (
        f"WARNING: {failing}: Executing notebook failed: CellTimeoutError\n"
        "A cell timed out while it was being executed, after 300 seconds.\n"
        "The message was: Cell execution timed out.\n"
        f"Here is a preview of the cell contents:\n{rule}\n{preview}\n{rule}\n"
    )
    assert re.fullmatch(
        r"one.ipynb failed in code cell 2 of 2 \('# Too far'\): "
        r"A cell timed out .* after 300 seconds.",
        book.failed_notebook(said),
    )


@pytest.mark.parametrize("user", [0, 1000])
def test_a_missing_browser_is_installed_or_its_absence_told(
    monkeypatch, capsys, user
):
    tried = []
    monkeypatch.setattr(browser, "find", lambda: None)
    monkeypatch.setattr(browser.os, "geteuid", lambda: user)
    monkeypatch.setattr(browser.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        browser.subprocess, "run", lambda way, **_: tried.append(way[0])
    )
    browser.main()
    assert ("apt-get" in tried) == (user == 0)
    assert tried[-1] == sys.executable
    assert (
        "browser for the tests of the pages: none" in capsys.readouterr().out
    )


def test_the_ci_runs_the_same_and_never_skips_the_browser():
    script = (ROOT / ".ci" / "run").read_text()
    assert "exec make test" in script
    assert "NORMLIB_REQUIRE_BROWSER=1" in script


def test_the_normal_form_drops_what_changes_from_run_to_run(failing):
    notebook = json.loads(failing.read_text())
    cell = notebook["cells"][0]
    cell["metadata"] = {"tags": ["a"], "execution": {"iopub.execute": "now"}}
    notebook["metadata"] = {"language_info": {"version": "3.11.4"}}
    text = notebooks.normal(nbformat.from_dict(notebook))
    assert "iopub" not in text
    assert "3.11.4" not in text
    assert notebooks.normal(nbformat.reads(text, as_version=4)) == text


def test_the_pieces_of_a_stream_are_joined_and_nothing_else():
    def stream(name, text):
        return {"output_type": "stream", "name": name, "text": text}

    image = {"output_type": "display_data", "data": {}, "metadata": {}}
    outputs = [stream("stdout", "a\n"), stream("stdout", "b\n"), image, image]
    outputs += [stream("stderr", "c\n"), stream("stdout", "d\n")]
    joined = notebooks.merged(outputs)
    assert [o.get("text") for o in joined] == [
        "a\nb\n",
        None,
        None,
        "c\n",
        "d\n",
    ]
