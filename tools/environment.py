"""Make the virtual environment: ``python tools/environment.py .venv``.

Written for any Python, so that a wrong one is told in one line. The whole
installation is one call of pip, so that one resolution holds for everything.
"""

import os
import subprocess
import sys
import threading

OLDEST, TOO_NEW = (3, 11), (3, 14)
NETWORK = (
    "Failed to establish a new connection",
    "Name or service not known",
    "NameResolutionError",
    "Network is unreachable",
    "No route to host",
    "ProxyError",
    "Temporary failure in name resolution",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "NewConnectionError",
)


def fits(version):
    """Tell whether this version of Python can build the book."""
    return OLDEST <= tuple(version[:2]) < TOO_NEW


def fail(message):
    """End with one line that says what is wrong and what helps."""
    sys.exit("normlib: " + message)


def tick(ended):
    """Say every 20 seconds that pip is still at work."""
    while not ended.wait(20):
        sys.stdout.write("  ... pip is at work\n")
        sys.stdout.flush()


def install(python, root):
    """Run pip, showing its output; return its status and what it said."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--constraint",
        os.path.join(root, "constraints.txt"),
        "--editable",
        root + "[dev]",
    ]
    pip = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    said, ended = [], threading.Event()
    threading.Thread(target=tick, args=(ended,)).start()
    for line in pip.stdout:
        if line.startswith("WARNING: Location"):
            continue
        said.append(line)
        sys.stdout.write("  " + line.rstrip()[:110] + "\n")
        sys.stdout.flush()
    pip.stdout.close()
    ended.set()
    return pip.wait(), "".join(said)


def make(venv):
    """Create the environment where it is missing and install into it."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        print("normlib: creating %s" % venv)
        made = subprocess.call([sys.executable, "-m", "venv", venv])
        if made != 0:
            fail(
                "%s has no working venv module (on Debian: apt-get install "
                "python3-venv)" % sys.executable
            )
    print("normlib: installing into %s (some minutes the first time)" % venv)
    status, said = install(python, root)
    if status != 0 and any(word in said for word in NETWORK):
        fail("no network: pip could not reach a package index")
    if status != 0:
        fail("pip could not install; its last words are above")
    with open(os.path.join(venv, ".ready"), "w") as ready:
        ready.write("made by tools/environment.py\n")


def main():
    """Check this Python, then make the environment that is asked for."""
    if sys.argv[1:] == ["--fits"]:
        if fits(sys.version_info):
            print(sys.executable)
        return
    if not fits(sys.version_info):
        fail(
            "needs Python 3.11, 3.12 or 3.13; %s is %s (choose another: "
            "make PYTHON=python3.12)"
            % (sys.executable, ".".join(map(str, sys.version_info[:3])))
        )
    make(sys.argv[1])


if __name__ == "__main__":
    main()
