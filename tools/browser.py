"""Find a browser for the tests of the pages, or install one.

``python -m tools.browser`` looks on the PATH, then for Playwright's own, and
else installs Debian's package (as root) or Playwright's. Where none can be
had it says so and still ends well: the tests then say that they were skipped.
"""

import os
import pathlib
import shutil
import subprocess
import sys

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "microsoft-edge",
)
INSTALLED = pathlib.Path("~/.cache/ms-playwright").expanduser()


def find():
    """Return the path of a browser, or None."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    own = sorted(INSTALLED.glob("chromium*/*/*chrome*"))
    return next((str(p) for p in own if os.access(p, os.X_OK)), None)


def install():
    """Try to install a browser; the ways that fail are passed over."""
    ways = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        quiet = ["apt-get", "-qq", "-y"]
        ways = [[*quiet, "update"], [*quiet, "install", "chromium"], *ways]
    for way in ways:
        if find():
            return
        print("normlib: no browser yet:", " ".join(way), flush=True)
        try:
            subprocess.run(
                way, check=False, timeout=600, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"normlib: {error}")


def main():
    """Find or install one, and say which."""
    if not find():
        install()
    found = find()
    print(f"normlib: browser for the tests of the pages: {found or 'none'}")


if __name__ == "__main__":
    main()
