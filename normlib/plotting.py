"""The figures of the book: one style, one function for each kind.

Every function takes arrays and an optional Axes, and returns the Axes.
"""

import math

import matplotlib
import matplotlib.pyplot as plt
import numpy

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

    Chapter 5.
    """
    if axes is None:
        axes = plt.subplots(2, 2, figsize=(4.8, 3.9))[1].ravel()
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


def spread(x, runs, label: str, color: str, ax=None):
    """Draw the mean of several runs as a line and every run as a dot.

    Args:
        x: (points,) positions.
        runs: (runs, points) values; NaN where there is none.
        label: of the line.
        color: a key of :data:`COLORS` or any color.
        ax: axes to draw on.

    Returns:
        The axes.

    Chapter 2.
    """
    ax = ax or plt.gca()
    color = COLORS.get(color, color)
    x, runs = numpy.asarray(x), numpy.atleast_2d(runs)
    ax.plot(x, runs.mean(0), color=color, label=label)
    for run in runs:
        ax.plot(x, run, "o", color=color, alpha=0.45, markersize=3.5)
    return ax


def computation_graph(nodes: dict, edges: list, ax=None):
    """Draw a computation: boxes joined by arrows.

    Args:
        nodes: name to ``(x, y, text, note)``; the text stands in the box and
            the note, which may be empty, below it in the accent color.
        edges: pairs of names, from a value to what is computed from it.
        ax: axes to draw on.

    Returns:
        The axes, without a frame.

    Chapter 2.
    """
    ax = ax or plt.gca()
    ax.set_axis_off()
    boxes = {}
    for name, (x, y, text, note) in nodes.items():
        boxes[name] = ax.annotate(
            text,
            (x, y),
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.45", "fc": "white", "ec": "black"},
        )
        ax.text(
            x, y - 0.34, note, ha="center", va="top", color=COLORS["accent"]
        )
    for start, end in edges:
        ax.annotate(
            "",
            nodes[end][:2],
            nodes[start][:2],
            arrowprops={
                "arrowstyle": "-|>",
                "color": COLORS["none"],
                "patchA": boxes[start].get_bbox_patch(),
                "patchB": boxes[end].get_bbox_patch(),
                "shrinkA": 2,
                "shrinkB": 3,
            },
        )
    xs, ys = zip(*(node[:2] for node in nodes.values()), strict=True)
    ax.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
    ax.set_ylim(min(ys) - 0.9, max(ys) + 0.5)
    return ax


def shared_statistics(view, ax=None):
    """Draw a batch as a table of examples and channels, one channel marked.

    Args:
        view: ``(N, C, M)``: examples, channels, positions in a channel. Each
            cell of the table shows its M positions as small squares.
        ax: axes to draw on.

    Returns:
        The axes.

    Chapter 2.
    """
    ax = ax or plt.gca()
    examples, channels, positions = view
    side = math.isqrt(positions)
    step = 1 / (side + 0.45)
    for n, c, k in numpy.ndindex(examples, channels, positions):
        x = c + (k % side + 0.22) * step
        y = n + (k // side + 0.22) * step
        color = COLORS["batch"] if c == 1 else "#e2e8f0"
        square = (x, y), 0.86 * step, 0.86 * step
        ax.add_patch(plt.Rectangle(*square, fc=color, ec="white"))
    ax.set(
        xlim=(0, channels),
        ylim=(examples, 0),
        aspect="equal",
        xticks=numpy.arange(channels) + 0.5,
        xticklabels=numpy.arange(1, channels + 1),
        yticks=numpy.arange(examples) + 0.5,
        yticklabels=numpy.arange(1, examples + 1),
    )
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def tangent_gradient(xhat, gradient, ax):
    """Draw a gradient for three examples and what normalization leaves of it.

    Every output of the normalization lies on one circle: where the plane of
    mean zero meets the sphere of variance one. Only the part of the gradient
    along that circle comes through.

    Args:
        xhat: (3,) normalized values: mean 0, mean square 1.
        gradient: (3,) of the loss with respect to them.
        ax: three-dimensional axes.

    Returns:
        The axes.

    Chapter 2.
    """
    ones = numpy.ones(3) / math.sqrt(3)
    along = xhat / numpy.linalg.norm(xhat)
    third = numpy.cross(ones, along)
    angle = numpy.linspace(0, 2 * math.pi, 121)
    circle = math.sqrt(3) * (
        numpy.outer(numpy.cos(angle), along)
        + numpy.outer(numpy.sin(angle), third)
    )
    ax.plot(*circle.T, color=COLORS["batch"])
    ax.plot(*zip(-2 * ones, 2 * ones, strict=True), color=COLORS["muted"])
    ax.text(*(2.15 * ones), "(1, 1, 1)", color=COLORS["none"])
    ax.plot(*zip(0 * xhat, xhat, strict=True), color=COLORS["muted"])
    ax.plot(*xhat[:, None], "o", color=COLORS["batch"])
    ax.text(*(1.06 * xhat - 0.35 * ones), r"$\hat{x}$", fontsize=12)
    passed = third * (third @ gradient)
    for arrow, color, name in (
        (gradient, "none", "$g$"),
        (passed, "accent", "$Pg$"),
    ):
        ax.quiver(*xhat, *arrow, color=COLORS[color], arrow_length_ratio=0.12)
        ax.text(*(xhat + 1.12 * arrow), name, color=COLORS[color], fontsize=12)
    ends = numpy.stack([xhat + gradient, xhat + passed])
    ax.plot(*ends.T, ":", color=COLORS["none"], linewidth=1.2)
    ax.set_box_aspect((1, 1, 1), zoom=1.45)
    ax.set_axis_off()
    return ax


def intervals(groups: dict, colors: list[str], ax=None):
    """Draw every run as a dot, and the mean with its 95 % interval beside.

    The interval is Student's t over the runs.

    Args:
        groups: label to (runs,) values.
        colors: one key of :data:`COLORS` a group.
        ax: axes to draw on.

    Returns:
        The axes, with a row for each group.

    Chapter 2.
    """
    from scipy.stats import t

    ax = ax or plt.gca()
    for row, (values, color) in enumerate(
        zip(groups.values(), colors, strict=True)
    ):
        values, color = numpy.asarray(values), COLORS[color]
        error = values.std(ddof=1) / math.sqrt(len(values))
        half = t.ppf(0.975, len(values) - 1) * error
        ax.plot(values, 0 * values + row + 0.16, "o", color=color, alpha=0.5)
        ax.errorbar(
            values.mean(),
            row - 0.1,
            xerr=half,
            fmt="D",
            color=color,
            capsize=3,
        )
    ax.set(
        yticks=range(len(groups)),
        yticklabels=groups,
        ylim=(len(groups) - 0.5, -0.5),
    )
    return ax


def loss_contours(u, v, loss, path, minimum, ax=None):
    """Contours of a loss over two weights, and the path of a descent.

    The levels stand closer near the minimum: equal steps in the square root
    of the height above it.

    Args:
        u: first weight, a grid of shape (rows, columns).
        v: second weight, likewise.
        loss: the loss on that grid.
        path: (steps + 1, 2), the points of a descent.
        minimum: where the loss is lowest, two numbers; marked by a cross.
        ax: to draw on; a new one by default.

    Returns:
        The Axes.

    Chapter 1.
    """
    ax = ax or plt.subplots()[1]
    low, high = loss.min(), loss.max()
    heights = low + (high - low) * numpy.linspace(0.03, 1, 14) ** 2
    ax.contourf(u, v, loss, heights, cmap="BuGn_r", alpha=0.5, extend="min")
    ax.contour(
        u, v, loss, heights, colors=COLORS["batch"], linewidths=0.7, alpha=0.7
    )
    ax.plot(*path.T, "o-", color=COLORS["layer"], lw=1.2, ms=2.5)
    ax.plot(*minimum, "+", color="black", ms=9, mew=1.6)
    ax.grid(False)
    return ax


def verdicts(holds, rows: list[str], columns: list[str], ax=None):
    """A table of yes and no: what holds is dark, what does not is pale.

    Args:
        holds: (rows, columns) booleans.
        rows: a label for each row.
        columns: a label for each column.
        ax: axes to draw on.

    Returns:
        The axes.

    Chapter 5.
    """
    ax = ax or plt.gca()
    holds = numpy.asarray(holds, dtype=bool)
    for (row, column), yes in numpy.ndenumerate(holds):
        box = (column + 0.04, row + 0.08), 0.92, 0.84
        color = COLORS["batch"] if yes else "#eef2f7"
        ax.add_patch(plt.Rectangle(*box, fc=color, ec="none"))
        ax.text(
            column + 0.5,
            row + 0.5,
            "yes" if yes else "no",
            color="white" if yes else COLORS["none"],
            ha="center",
            va="center",
        )
    ax.set(
        xlim=(0, len(columns)),
        ylim=(len(rows), 0),
        xticks=numpy.arange(len(columns)) + 0.5,
        xticklabels=columns,
        yticks=numpy.arange(len(rows)) + 0.5,
        yticklabels=rows,
    )
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def pictures(images: dict, columns: int = 3):
    """Small images in a grid, each under its title.

    Args:
        images: title to pixels (3, H, W); what lies outside [0, 1] is cut.
        columns: images in a row.

    Returns:
        The Axes, one for each image.

    Chapter 5.
    """
    rows = -(-len(images) // columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(7.2, 1.85 * rows), squeeze=False
    )
    for ax, (title, image) in zip(axes.flat, images.items(), strict=False):
        ax.imshow(
            numpy.clip(image, 0, 1).transpose(1, 2, 0),
            interpolation="nearest",
        )
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.axis("off")
    return list(axes.flat[: len(images)])


def error_curves(x, measured: dict, laws: dict | None = None, ax=None):
    """Errors on two logarithmic axes, and the laws they should follow.

    Args:
        x: (points,), what the error depends on.
        measured: label to (a key of :data:`COLORS`, (points,) errors); a
            line with dots, broken where the error is NaN. An error of 0,
            which such an axis cannot show, is drawn at the smallest float64
            spacing, 1e-16.
        laws: likewise; drawn dotted, without an entry in the legend.
        ax: axes to draw on.

    Returns:
        The axes.

    Chapter 9.
    """
    ax = ax or plt.gca()
    for color, law in (laws or {}).values():
        ax.plot(x, law, ":", color=COLORS[color], lw=1.2)
    for label, (color, errors) in measured.items():
        errors = numpy.maximum(errors, 1e-16)
        ax.plot(
            x, errors, "o-", color=COLORS[color], ms=2.6, lw=1, label=label
        )
    ax.set(xscale="log", yscale="log")
    ax.legend()
    return ax


def roofline(peak: float, bandwidth: float, points: dict, ax=None):
    """How fast a program can be, given how much it computes with each byte.

    Args:
        peak: the most operations a second.
        bandwidth: the most bytes a second.
        points: label to (a key of :data:`COLORS`, operations for each byte,
            operations a second).
        ax: axes to draw on.

    Returns:
        The axes, in operations a second over operations for each byte, both
        logarithmic.

    Chapter 10.
    """
    ax = ax or plt.gca()
    ridge = peak / bandwidth
    reach = [intensity for _, intensity, _ in points.values()]
    low, high = min([*reach, ridge]) / 2, max([*reach, ridge]) * 3
    ax.plot(
        [low, ridge, high], [low * bandwidth, peak, peak], color=COLORS["none"]
    )
    for label, (color, intensity, speed) in points.items():
        ax.plot(intensity, speed, "o", ms=7, color=COLORS[color], label=label)
    style = {"fontsize": 8.5, "color": COLORS["none"]}
    middle = (low * ridge) ** 0.5
    ax.annotate(
        "memory's limit",
        (middle, middle * bandwidth),
        (-6, 6),
        textcoords="offset points",
        ha="right",
        **style,
    )
    ax.annotate(
        "arithmetic's limit",
        (high, peak),
        (0, 4),
        textcoords="offset points",
        ha="right",
        **style,
    )
    ax.set(xscale="log", yscale="log")
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.legend(loc="lower right")
    return ax


def speed_ratios(ratios: dict, names: dict, ax=None):
    """How many times as fast as another program, a line for each case.

    Args:
        ratios: case to {name: ratio}; 1 is as fast as the other.
        names: name to (a key of :data:`COLORS`, label in the legend).
        ax: axes to draw on.

    Returns:
        The axes, with a logarithmic scale.

    Chapter 10.
    """
    ax = ax or plt.gca()
    cases = list(ratios)
    for name, (color, label) in names.items():
        found = [(ratios[c].get(name), i) for i, c in enumerate(cases)]
        x, y = zip(*[p for p in found if p[0] is not None], strict=True)
        ax.plot(x, y, "o", color=COLORS[color], label=label, ms=5)
    ax.axvline(1, color=COLORS["none"], lw=1)
    ax.set_yticks(range(len(cases)), cases)
    ax.invert_yaxis()
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    return ax
