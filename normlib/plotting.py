"""The figures of the book: one style, one function for each kind.

Every function takes arrays and an optional Axes, and returns the Axes.
"""

import matplotlib
import matplotlib.pyplot as plt

COLORS = {
    "none": "#64748b",
    "batch": "#0f766e",
    "layer": "#b45309",
    "instance": "#7c3aed",
    "group": "#2563eb",
    "rms": "#be185d",
    "accent": "#dc2626",
    "muted": "#94a3b8",
}
"""One color a norm in the whole book; ``none`` is the plain network,
``accent`` what the eye should find first, ``muted`` everything else."""

_CYCLE = ["batch", "layer", "group", "accent", "instance", "rms", "none"]

_STYLE = {
    "figure.figsize": (7.2, 3.4),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=[COLORS[c] for c in _CYCLE]),
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": "viridis",
    "svg.fonttype": "path",
    "svg.hashsalt": "normlib",
}


def use_style() -> None:
    """Set the style of the book's figures; in a notebook, draw them as SVG.

    The SVG carries no date and fixed identifiers, so that drawing a figure
    again gives the same bytes on the same machine.
    """
    plt.rcParams.update(_STYLE)
    if "inline" in matplotlib.get_backend():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def axis_cubes(axes=None):
    """Which values share one mean and one variance, for four norms.

    The input as a block of N instances by C channels by positions; the
    colored cells are averaged together. RMS norm takes the cells of layer
    norm.

    Args:
        axes: four Axes; by default a new figure's.

    Returns:
        The four Axes.
    """
    if axes is None:
        _, axes = plt.subplots(1, 4, figsize=(7.6, 1.85))
    last, group = _CUBE[1] - 1, range(_CUBE[1] - 3, _CUBE[1])
    shared = {
        "batch": lambda n, c: c == last,
        "layer": lambda n, c: n == 0,
        "instance": lambda n, c: n == 0 and c == last,
        "group": lambda n, c: n == 0 and c in group,
    }
    for ax, (norm, inside) in zip(axes, shared.items(), strict=True):
        _cube(ax, inside, COLORS[norm])
        ax.set_title(f"{norm} norm", color=COLORS[norm], loc="center")
    return axes


_CUBE = (4, 6, 5)  # instances, channels, positions


def _cube(ax, inside, color) -> None:
    n_max, c_max, m_max = _CUBE
    slant = (0.52, 0.34)

    def corner(n, c, m):
        return (c + n * slant[0], m + n * slant[1])

    def tile(cells, corners):
        ax.fill(
            *zip(*corners, strict=True),
            facecolor=color if inside(*cells) else "#e2e8f0",
            edgecolor="white",
            linewidth=0.8,
        )

    for c in range(c_max):
        for m in range(m_max):  # the front: the first instance
            square = [(c, m), (c + 1, m), (c + 1, m + 1), (c, m + 1)]
            tile((0, c), [corner(0, *at) for at in square])
        for n in range(n_max):  # the top
            square = [(n, c), (n, c + 1), (n + 1, c + 1), (n + 1, c)]
            tile((n, c), [corner(*at, m_max) for at in square])
    for n in range(n_max):  # the right side: the last channel
        for m in range(m_max):
            square = [(n, m), (n + 1, m), (n + 1, m + 1), (n, m + 1)]
            tile((n, c_max - 1), [corner(a, c_max, b) for a, b in square])
    style = {"color": COLORS["none"], "fontsize": 8}
    ax.text(c_max / 2, -0.25, "channels C", ha="center", va="top", **style)
    ax.text(
        -0.25,
        m_max / 2,
        "positions",
        ha="right",
        va="center",
        rotation=90,
        **style,
    )
    ax.text(
        c_max + 0.5 * n_max * slant[0] + 0.3,
        0.28 * n_max * slant[1] - 0.25,
        "instances N",
        ha="left",
        va="center",
        rotation=33,
        **style,
    )
    ax.set_aspect("equal")
    ax.axis("off")
