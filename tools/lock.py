"""Write the installed versions to constraints.txt: ``make lock``."""

import pathlib
import subprocess
import sys

CONSTRAINTS = pathlib.Path(__file__).parents[1] / "constraints.txt"
UNPINNED = ("normlib", "pip", "setuptools", "wheel")


def main():
    """Keep the file's comments, replace its pins."""
    lines = CONSTRAINTS.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = subprocess.run(freeze, check=True, capture_output=True, text=True)
    # "2.13.0+cpu" is one build of 2.13.0: other machines have other builds.
    pins = [line.split("+")[0] for line in frozen.stdout.splitlines()]
    pins = [
        pin
        for pin in pins
        if "==" in pin and pin.split("==")[0].lower() not in UNPINNED
    ]
    CONSTRAINTS.write_text("\n".join(comments + pins) + "\n")


if __name__ == "__main__":
    main()
