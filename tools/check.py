"""Everything that checks, in order: ``python -m tools.check``, ``make test``.

The style first, because it is quick; then the book, because its pages are
tested; then one run of pytest over units, notebooks and pages.
"""

import os
import subprocess
import sys

from tools import book

ENVIRONMENT = {
    # Each of two workers gets one core.
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    # No test depends on the debugger's warning about frozen modules.
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
STEPS = (
    ("style", ["ruff", "check", "."]),
    ("format", ["ruff", "format", "--check", "."]),
    ("stamps", ["tools.notebooks", "--check"]),
    ("browser", ["tools.browser"]),
    ("book", ["tools.book"]),
    ("tests", ["pytest", "-n", "2", "--dist", "loadfile", "-q"]),
)


def main():
    """Stop at the first step that fails, with its status."""
    for name, command in STEPS:
        book.say(f"{name}: {' '.join(command)}")
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=book.ROOT,
            env={**os.environ, **ENVIRONMENT},
            check=False,
        )
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
