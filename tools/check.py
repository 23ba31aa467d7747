"""Everything that checks, in order: ``python -m tools.check``, ``make test``.

The style first, because it is quick; then the book, because its pages are
tested; then one run of pytest over units, notebooks and pages.
"""

import subprocess
import sys

from tools import book

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
            check=False,
        )
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
