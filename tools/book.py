"""Build the pages: ``python -m tools.book``, which is ``make book``.

Runs Jupyter Book with warnings as errors, shows what it says, speaks up
during long silences, and ends with one line: where the pages are, or which
notebook failed in which cell.
"""

import ast
import json
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
BUILD = ROOT / "_build"
SILENCE = 10
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# What says nothing about the book: a kernel's remark on its own transport,
# the echo of the whole configuration, a table of percentages.
NOISE = re.compile(
    r"Kernel is running over TCP|ParserConfig\(|highlighting module code"
    r"|copying (images|assets)|^\s*$"
)
FAILED = re.compile(r"Executing notebook failed: (\w+)")
CELL = re.compile(
    r"An error occurred while executing the following cell:\n"
    r"-+\n(?P<source>.*?)\n-+\n.*?\n(?P<error>[A-Za-z_.]+(?:Error|"
    r"Exception|Interrupt|Exit|Warning):[^\n]*)\n",
    re.DOTALL,
)


SLOW = re.compile(
    r"(A cell timed out [^\n]*)\n.*?preview of the cell contents:\n-+\n"
    r"(.*?)\n-+\n",
    re.DOTALL,
)


def say(message):
    """Print one line of our own."""
    print(f"normlib: {message}", flush=True)


def lines_of(process):
    """Yield the lines of a process, and None for each long silence."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SILENCE)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        yield line


def run_sphinx():
    """Run Jupyter Book; return its status and everything it said."""
    command = pathlib.Path(sys.executable).parent / "jupyter-book"
    process = subprocess.Popen(
        [command, "build", ".", "-W", "-n", "--keep-going"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    start, said = time.time(), []
    for line in lines_of(process):
        if line is None:
            say(f"still at work after {time.time() - start:.0f} s ...")
        else:
            said.append(line)
            if not NOISE.search(line):
                print("  " + line, end="", flush=True)
    return process.wait(), ANSI.sub("", "".join(said))


def code_cells(path):
    """Return the sources of a notebook's code cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def describe(path, source, error):
    """Say in one line which cell of which notebook raised what."""
    sources = [text.strip() for text in code_cells(path)]
    number = sources.index(source) + 1 if source in sources else "?"
    first = source.splitlines()[0] if source else ""
    return (
        f"{path.relative_to(ROOT)} failed in code cell {number} of "
        f"{len(sources)} ({first!r}): {error}"
    )


def failed_notebook(said):
    """Return one line about the notebook that failed, or None."""
    if not FAILED.search(said):
        return None
    at = FAILED.search(said).start()
    names = re.findall(r"(\S+\.ipynb)", said[: at + 1])
    path = next(
        (p for p in map(pathlib.Path, reversed(names)) if p.exists()), None
    )
    if path is None:
        return "a notebook failed; its traceback is above"
    if slow := SLOW.search(said, at):
        return describe(path, whole(path, slow[2]), slow[1])
    if cell := CELL.search(said, at):
        return describe(path, cell["source"].strip(), cell["error"].strip())
    return f"{path.relative_to(ROOT)} failed; its traceback is above"


def whole(path, preview):
    """Return the cell that a timeout shows, a long one by its first lines."""
    if not preview.startswith("["):
        return preview.strip()
    shown = ast.literal_eval(preview.splitlines()[0])
    cells = (source.strip() for source in code_cells(path))
    start = "\n".join(shown)
    return next((cell for cell in cells if cell.startswith(start)), "")


def reason(said):
    """Return one line that says why the book was not built."""
    warnings = re.findall(r".*WARNING:.*", said)
    raised = re.findall(r"^[A-Za-z_.]+(?:Error|Exception): .+", said, re.M)
    if notebook := failed_notebook(said):
        return notebook
    if warnings:
        return f"{len(warnings)} warning(s), the first: {warnings[0].strip()}"
    return raised[-1] if raised else "its last words are above"


def main():
    """Build, and say in the last line what came of it."""
    start = time.time()
    status, said = run_sphinx()
    if status == 0:
        seconds = time.time() - start
        say(f"the pages are in _build/html (built in {seconds:.0f} s)")
        say("`make serve` shows them at http://127.0.0.1:8000")
        return
    # A page that was read with a warning would be silent in the next build.
    shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    sys.exit(f"normlib: the book was not built: {reason(said)}")


if __name__ == "__main__":
    main()
