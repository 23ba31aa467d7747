"""Draw the picture of the README and the front page: `_static/norms.svg`."""

import pathlib

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from normlib import plotting

PATH = pathlib.Path(__file__).parents[1] / "_static" / "norms.svg"


def main() -> None:
    """Write the picture."""
    plotting.use_style()
    plotting.axis_cubes()
    plt.savefig(PATH, metadata={"Date": None})
    print(PATH)


if __name__ == "__main__":
    main()
