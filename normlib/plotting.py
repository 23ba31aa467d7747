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
