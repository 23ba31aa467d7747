"""Figures to play with in the page: HTML, SVG and JavaScript, no kernel.

Python draws the first picture, so that a page without JavaScript shows it
too; the script redraws it when a slider moves. No file is loaded from
anywhere, and the same arguments give the same bytes.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy

from normlib.axes import TABLE, stat_axes

START = (-1.0, 0.42)
_SCALE, _WIDTH, _HEIGHT = 215.0, 480, 236
_MAX_STEPS = 100_000
_DRAWN_STEPS = 200


class LossContours:
    """Contours of a quadratic loss, and gradient descent on it.

    The loss is ``(u**2 / condition_number + v**2) / 2``: curvature L = 1
    along v, the steep direction, and L / condition_number along u, the flat
    one. Two sliders set the condition number and the learning rate. The
    figure says after how many steps 1 % of the distance is left, or that
    the rate is above 2/L and the descent diverges.

    Show it by naming it at the end of a cell.

    Args:
        condition_number: at first, 1 to 1000; the nearest of the slider's
            61 values is taken.
        rate: the learning rate at first, in units of 1/L, 0.05 to 2.2.

    Raises:
        ValueError: an argument outside its range.

    Chapter 1.
    """

    def __init__(self, condition_number: float = 25.0, rate: float = 1.8):
        if not 1 <= condition_number <= 1000:
            raise ValueError(
                f"condition_number must be in [1, 1000], "
                f"got {condition_number}"
            )
        if not 0.05 <= rate <= 2.2:
            raise ValueError(f"rate must be in [0.05, 2.2], got {rate}")
        self._notch = round(20 * math.log10(condition_number))
        self.condition_number = float(f"{10 ** (self._notch / 20):.2g}")
        self.rate = round(float(rate), 2)

    def __repr__(self) -> str:
        return (
            f"LossContours(condition_number={self.condition_number:g}, "
            f"rate={self.rate:g})"
        )

    def path(self, steps: int) -> list[tuple[float, float]]:
        """The start and the next ``steps`` points of gradient descent."""
        flat, steep = self._factors()
        u, v = START
        return [(u * flat**t, v * steep**t) for t in range(steps + 1)]

    def steps_to(self, share: float = 0.01) -> int | None:
        """Steps until this share of the distance is left; None if never."""
        if self.rate >= 2:
            return None
        flat, steep = self._factors()
        u, v = START
        goal = share * math.hypot(u, v)
        for step in range(_MAX_STEPS):
            if math.hypot(u, v) <= goal:
                return step
            u, v = u * flat, v * steep
        return None

    def _factors(self) -> tuple[float, float]:
        return 1 - self.rate / self.condition_number, 1 - self.rate

    def _message(self) -> str:
        if self.rate > 2:
            return (
                "Diverges: the rate is above 2/L. Each step multiplies the "
                f"steep direction by {self.rate - 1:.2f}."
            )
        if self.rate == 2:
            return (
                "On the edge, 2/L: the steep direction bounces from wall "
                "to wall for ever."
            )
        steps = self.steps_to()
        return (
            f"After {steps:,} step{'' if steps == 1 else 's'}, 1 % of the "
            "distance to the minimum is left."
        )

    def _ellipses(self) -> str:
        start = START[0] ** 2 / self.condition_number + START[1] ** 2
        radii = [math.sqrt(start) * 2 ** (0.5 * k) for k in range(4, -13, -1)]
        stretch = math.sqrt(self.condition_number)
        return "".join(
            f'<ellipse rx="{_SCALE * r * stretch:.1f}" ry="{_SCALE * r:.1f}"/>'
            for r in radii
        )

    def _points(self) -> str:
        kept = []
        for u, v in self.path(_DRAWN_STEPS):
            if abs(v) > 1:
                break
            kept.append(f"{_SCALE * u:.1f},{-_SCALE * v:.1f}")
        return " ".join(kept)

    def _repr_html_(self) -> str:
        kappa = self.condition_number
        fill = {
            "@STYLE@": _STYLE,
            "@SCRIPT@": _SCRIPT,
            "@ELLIPSES@": self._ellipses(),
            "@POINTS@": self._points(),
            "@DOTS@": "".join(
                f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" '
                'r="2.6"/>'
                for p in self._points().split()
            ),
            "@MESSAGE@": self._message(),
            "@STATE@": "bad" if self.rate >= 2 else "good",
            "@NOTCH@": str(self._notch),
            "@KAPPA@": _number(kappa),
            "@RATE@": f"{self.rate:.2f}",
            "@BEST@": f"{2 * kappa / (kappa + 1):.2f}",
        }
        return _filled(_PAGE, fill)


def _filled(page: str, fill: Mapping[str, str]) -> str:
    """The page with its placeholders replaced, one after the other."""
    for key, value in fill.items():
        page = page.replace(key, value)
    return page


def _number(kappa: float) -> str:
    return f"{kappa:.0f}" if kappa >= 10 else f"{kappa:.1f}"


_PAGE = """\
<div class="normlib-contours" data-notch="@NOTCH@" data-rate="@RATE@">
<style>@STYLE@</style>
<svg viewBox="-240 -118 480 236" role="img" aria-label="Contours of a
 quadratic loss, and the path of gradient descent from the left towards the
 minimum in the middle">
<g class="nc-levels">@ELLIPSES@</g>
<polyline class="nc-path" points="@POINTS@"/>
<g class="nc-dots">@DOTS@</g>
<path class="nc-goal" d="M-6,0H6M0,-6V6"/>
<text x="-232" y="108">flat direction &#8594;</text>
<text x="-232" y="-102">&#8593; steep direction</text>
<text x="232" y="108" text-anchor="end">+ minimum</text>
</svg>
<p class="nc-message" data-state="@STATE@" aria-live="polite">@MESSAGE@</p>
<label><span>Condition number &#954; = <output class="nc-kappa">@KAPPA@\
</output></span>
<input class="nc-notch" type="range" min="0" max="60" step="1"
 value="@NOTCH@" aria-label="Condition number, logarithmic"
 aria-valuetext="@KAPPA@"></label>
<label><span>Learning rate &#951; = <output class="nc-eta">@RATE@</output>
 / L</span>
<input class="nc-rate" type="range" min="0.05" max="2.2" step="0.01"
 value="@RATE@" aria-label="Learning rate in units of 1/L"
 aria-valuetext="@RATE@ over L"></label>
<div class="nc-ruler" aria-hidden="true"><b></b>
<i style="--at:0.4419">1/L</i><i class="nc-two" style="--at:0.9070">2/L</i>
</div>
<div class="nc-buttons"><button type="button" class="nc-best">Best rate
 (<output class="nc-bestvalue">@BEST@</output> / L)</button>
<button type="button" class="nc-reset">Reset</button></div>
<noscript>The sliders need JavaScript; the picture shows one setting.\
</noscript>
<script>@SCRIPT@</script>
</div>
"""


def _controls(figure: str, prefix: str, on: str, focus: str) -> str:
    """The style of sliders and buttons, with the figure's own colors."""
    fill = {"@FIGURE@": figure, "@P@": prefix, "@ON@": on, "@FOCUS@": focus}
    return _filled(_CONTROLS, fill)


_CONTROLS = """\
.normlib-@FIGURE@ label{display:block;margin:.4rem 0 0}
.normlib-@FIGURE@ input{display:block;width:100%;margin:.2rem 0;
accent-color:var(--@P@-@ON@)}
.normlib-@FIGURE@ .@P@-buttons{display:flex;flex-wrap:wrap;gap:.4rem;
margin:.5rem 0 .2rem}
.normlib-@FIGURE@ button{font:inherit;color:inherit;padding:.25rem .6rem;
background:var(--@P@-back);border:1px solid var(--@P@-muted);
border-radius:6px;cursor:pointer}
.normlib-@FIGURE@ button[aria-pressed=true]{border-color:var(--@P@-@ON@);
box-shadow:inset 0 0 0 1px var(--@P@-@ON@);font-weight:600}
.normlib-@FIGURE@ button:focus-visible,
.normlib-@FIGURE@ input:focus-visible{outline:2px solid var(--@P@-@FOCUS@);
outline-offset:2px}
"""

_STYLE = """
.normlib-contours{--nc-line:#0f766e;--nc-fill:#0f766e;--nc-path:#b45309;
--nc-bad:#dc2626;--nc-text:#1e293b;--nc-muted:#64748b;--nc-box:#cbd5e1;
--nc-back:#fff;max-width:620px;margin:0 auto;color:var(--nc-text);
font-size:.95rem;line-height:1.4}
html[data-theme=dark] .normlib-contours,
[data-jp-theme-light=false] .normlib-contours{--nc-line:#2dd4bf;
--nc-fill:#14b8a6;--nc-path:#fbbf24;--nc-bad:#f87171;--nc-text:#e2e8f0;
--nc-muted:#94a3b8;--nc-box:#475569;--nc-back:#0f172a}
html[data-theme=dark] .bd-content div.cell_output
.text_html:has(.normlib-contours){background:none!important;padding:0}
.normlib-contours svg{display:block;width:100%;height:auto;
background:var(--nc-back);border:1px solid var(--nc-box);border-radius:6px;
overflow:hidden}
.normlib-contours text{font-size:13px;fill:var(--nc-text);
paint-order:stroke;stroke:var(--nc-back);stroke-width:4px}
.normlib-contours ellipse{fill:var(--nc-fill);fill-opacity:.045;
stroke:var(--nc-line);stroke-opacity:.55}
.normlib-contours .nc-path{fill:none;stroke:var(--nc-path);stroke-width:1.4}
.normlib-contours .nc-dots{fill:var(--nc-path)}
.normlib-contours .nc-goal{stroke:var(--nc-text);stroke-width:2}
.normlib-contours .nc-message{margin:.5rem 0;font-weight:600;
min-height:2.8em}
.normlib-contours .nc-message[data-state=bad]{color:var(--nc-bad)}
.normlib-contours .nc-ruler{position:relative;height:1.5rem;
margin:0 8px;font-size:.8rem;color:var(--nc-muted)}
.normlib-contours .nc-ruler b{position:absolute;left:90.7%;right:0;top:0;
height:4px;background:var(--nc-bad);border-radius:2px}
.normlib-contours .nc-ruler i{position:absolute;top:.3rem;
left:calc(100%*var(--at));transform:translateX(-50%);font-style:normal}
.normlib-contours .nc-ruler .nc-two{color:var(--nc-bad);font-weight:600}
""" + _controls("contours", "nc", "line", "path")

_SCRIPT = """
document.querySelectorAll(".normlib-contours:not([data-ready])")
.forEach(function (box) {
  box.dataset.ready = "1";
  var part = function (name) { return box.querySelector(".nc-" + name); };
  var scale = 215, start = [-1, 0.42];
  var notch = part("notch"), rate = part("rate");
  var best = function (kappa) { return 2 * kappa / (kappa + 1); };
  function condition() {
    return Number(Math.pow(10, notch.value / 20).toPrecision(2));
  }
  function stepsTo(flat, steep) {
    var u = start[0], v = start[1], goal = 0.01 * Math.hypot(u, v), t = 0;
    while (Math.hypot(u, v) > goal && t < 100000) {
      u *= flat; v *= steep; t += 1;
    }
    return t;
  }
  function message(eta, flat, steep) {
    if (eta > 2) {
      return "Diverges: the rate is above 2/L. Each step multiplies the " +
        "steep direction by " + (eta - 1).toFixed(2) + ".";
    }
    if (eta === 2) {
      return "On the edge, 2/L: the steep direction bounces from wall " +
        "to wall for ever.";
    }
    var t = stepsTo(flat, steep);
    return "After " + t.toLocaleString("en-US") +
      (t === 1 ? " step" : " steps") +
      ", 1 % of the distance to the minimum is left.";
  }
  function draw() {
    var kappa = condition(), eta = +rate.value;
    var flat = 1 - eta / kappa, steep = 1 - eta, k, t;
    var r0 = Math.sqrt(start[0] * start[0] / kappa + start[1] * start[1]);
    var levels = "", dots = "", points = [];
    for (k = 4; k > -13; k -= 1) {
      var r = scale * r0 * Math.pow(2, 0.5 * k);
      levels += '<ellipse rx="' + (r * Math.sqrt(kappa)).toFixed(1) +
        '" ry="' + r.toFixed(1) + '"/>';
    }
    var u = start[0], v = start[1];
    for (t = 0; t <= 200 && Math.abs(v) <= 1; t += 1) {
      var x = (scale * u).toFixed(1), y = (-scale * v).toFixed(1);
      points.push(x + "," + y);
      dots += '<circle cx="' + x + '" cy="' + y + '" r="2.6"/>';
      u *= flat; v *= steep;
    }
    part("levels").innerHTML = levels;
    part("path").setAttribute("points", points.join(" "));
    part("dots").innerHTML = dots;
    var shown = kappa.toFixed(kappa >= 10 ? 0 : 1);
    part("kappa").textContent = shown;
    notch.setAttribute("aria-valuetext", shown);
    part("eta").textContent = eta.toFixed(2);
    rate.setAttribute("aria-valuetext", eta.toFixed(2) + " over L");
    part("bestvalue").textContent = best(kappa).toFixed(2);
    part("message").textContent = message(eta, flat, steep);
    part("message").dataset.state = eta >= 2 ? "bad" : "good";
  }
  notch.addEventListener("input", draw);
  rate.addEventListener("input", draw);
  part("best").addEventListener("click", function () {
    rate.value = best(condition()).toFixed(2); draw();
  });
  part("reset").addEventListener("click", function () {
    notch.value = box.dataset.notch; rate.value = box.dataset.rate;
    draw();
  });
});
"""


_SAMPLES, _CHANNELS, _SIDE = 3, 6, 2
_PLACES = _SIDE * _SIDE
_CELLS = _SAMPLES * _CHANNELS * _PLACES
_CUBE_NORMS = {
    "batch": ("Batch", "batch_norm"),
    "sample": ("Layer, whole sample", "layer_norm"),
    "token": ("Layer, each position", "layer_norm"),
    "instance": ("Instance", "instance_norm"),
    "group": ("Group", "group_norm"),
    "rms": ("RMS, each position", "rms_norm"),
}


class NormCube:
    """A batch cut into its values: point at one, see which share its mean.

    Three samples of six channels and 2 by 2 positions stand side by side,
    the positions one above the other.
    Buttons choose the norm, and for group norm the number of groups. The
    cells that are averaged together with the chosen one light up; beside
    them stand how many they are, the shapes of statistics and parameters,
    whether the other samples matter, and what differs in the test.

    Which cells belong together is computed by :data:`normlib.axes.TABLE`;
    the script in the page only looks it up. Show it by naming it at the end
    of a cell.

    Args:
        norm: at first; ``"batch"``, ``"sample"`` (layer norm of the whole
            sample), ``"token"`` (layer norm of each position),
            ``"instance"``, ``"group"`` or ``"rms"`` (of each position).
        groups: of group norm: 1, 2, 3 or 6.
        cell: the chosen one: sample, channel, position, counted from 0.

    Raises:
        ValueError: an argument outside its range.

    Chapter 5.
    """

    def __init__(
        self,
        norm: str = "batch",
        groups: int = 2,
        cell: Sequence[int] = (0, 1, 2),
    ):
        if norm not in _CUBE_NORMS:
            raise ValueError(
                f"norm must be one of {', '.join(_CUBE_NORMS)}; got {norm!r}"
            )
        if groups not in _divisors(_CHANNELS):
            raise ValueError(
                f"groups must divide {_CHANNELS}: {_divisors(_CHANNELS)}, "
                f"got {groups}"
            )
        sizes = (_SAMPLES, _CHANNELS, _PLACES)
        fits = len(cell) == 3 and all(
            0 <= i < size for i, size in zip(cell, sizes, strict=True)
        )
        if not fits:
            raise ValueError(f"cell must lie inside {sizes}, got {cell}")
        self.norm, self.groups, self.cell = norm, groups, tuple(cell)

    def __repr__(self) -> str:
        return (
            f"NormCube(norm={self.norm!r}, groups={self.groups}, "
            f"cell={self.cell})"
        )

    def shared(self) -> numpy.ndarray:
        """Which cells share the chosen one's statistics.

        Returns:
            Booleans of shape (samples, channels, positions).
        """
        labels = _labels(self.norm, self.groups)
        return labels == labels[self.cell]

    def _key(self) -> str:
        return self.norm + (str(self.groups) if self.norm == "group" else "")

    def _repr_html_(self) -> str:
        shared, index = self.shared().ravel(), _index(self.cell)
        state = ["on" if inside else "" for inside in shared]
        state[index] = "on at"
        settings = _cube_settings()
        fill = {
            "@STYLE@": _CUBE_STYLE,
            "@SCRIPT@": _CUBE_SCRIPT,
            "@DATA@": json.dumps(settings, separators=(",", ":")),
            "@SHEETS@": "".join(_sheet(n, state) for n in range(_SAMPLES)),
            "@NORMS@": "".join(
                _choice("norm", key, title, key == self.norm)
                for key, (title, _) in _CUBE_NORMS.items()
            ),
            "@GROUPS@": "".join(
                _choice("groups", str(g), str(g), g == self.groups)
                for g in _divisors(_CHANNELS)
            ),
            "@FACTS@": "".join(
                f"<dt>{title}</dt><dd>{told}</dd>"
                for title, told in settings[self._key()]["facts"]
            ),
            "@WHERE@": _where(self.cell),
            "@NORM@": self.norm,
            "@CELL@": str(index),
            "@SIZES@": f"{_SAMPLES},{_CHANNELS},{_PLACES}",
            "@HIDDEN@": "" if self.norm == "group" else " hidden",
        }
        return _filled(_CUBE_PAGE, fill)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _index(cell: Sequence[int]) -> int:
    n, c, m = cell
    return (n * _CHANNELS + c) * _PLACES + m


def _labels(norm: str, groups: int) -> numpy.ndarray:
    """One number for each cell; cells with the same share statistics."""
    row = TABLE[_CUBE_NORMS[norm][1]]
    shape = (_SAMPLES, _CHANNELS, _PLACES)
    cells = numpy.arange(_CELLS).reshape(shape)
    if norm in ("token", "rms"):  # channels last: each position a vector
        cells = cells.transpose(0, 2, 1)
        view = row.view(cells.shape, (_CHANNELS,))
    elif norm == "sample":
        view = row.view(shape, (_CHANNELS, _PLACES))
    else:
        view = row.view(shape, *((groups,) if norm == "group" else ()))
    first = cells.reshape(view).min(stat_axes(row.over_batch), keepdims=True)
    labels = numpy.empty(_CELLS, dtype=int)
    labels[cells.ravel()] = numpy.broadcast_to(first, view).ravel()
    return labels.reshape(shape)


def _cube_settings() -> dict:
    """What the page shows for each choice of a norm and its groups."""
    found = {}
    for norm in _CUBE_NORMS:
        for groups in _divisors(_CHANNELS) if norm == "group" else [1]:
            labels = _labels(norm, groups)
            key = norm + (str(groups) if norm == "group" else "")
            found[key] = {
                "labels": labels.ravel().tolist(),
                "facts": _facts(norm, groups, labels),
            }
    return found


def _facts(norm: str, groups: int, labels: numpy.ndarray) -> list:
    width = _CHANNELS // groups
    side = f"{_SIDE}, {_SIDE}"
    plural = "" if width == 1 else "s"
    among, shape, parameters = {
        "batch": (
            "this channel in all samples: N·H·W",
            f"({_CHANNELS},): one pair for each channel",
            f"({_CHANNELS},)",
        ),
        "sample": (
            "all of this sample: C·H·W",
            f"({_SAMPLES},): one pair for each sample",
            f"({_CHANNELS}, {side}): one pair for each element",
        ),
        "token": (
            "all channels at this position of this sample: C",
            f"({_SAMPLES}, {side}): one pair for each position of a sample",
            f"({_CHANNELS},)",
        ),
        "instance": (
            "this channel of this sample: H·W",
            f"({_SAMPLES}, {_CHANNELS}): one pair for each channel of a "
            "sample",
            f"({_CHANNELS},); in PyTorch none by default",
        ),
        "group": (
            f"{width} neighboring channel{plural} of this sample: (C/G)·H·W",
            f"({_SAMPLES}, {groups}): one pair for each group of a sample",
            f"({_CHANNELS},)",
        ),
        "rms": (
            "all channels at this position of this sample: C",
            f"({_SAMPLES}, {side}): a mean square each, and no mean",
            f"({_CHANNELS},); no bias",
        ),
    }[norm]
    count = int((labels == labels[0, 0, 0]).sum())
    batch = norm == "batch"
    return [
        ("Averaged together", f"{count} of {_CELLS} values: {among}"),
        ("Mean and variance", shape),
        ("Weight and bias", parameters),
        (
            "Do other samples change this output?",
            "Yes, in training" if batch else "No",
        ),
        (
            "Training and test",
            "differ: the batch's statistics, then running averages"
            if batch
            else "are the same computation",
        ),
    ]


def _where(cell: Sequence[int]) -> str:
    n, c, m = (i + 1 for i in cell)
    return f"Sample {n}, channel {c}, position {m}"


def _choice(kind: str, value: str, title: str, chosen: bool) -> str:
    return (
        f'<button type="button" data-{kind}="{value}" '
        f'aria-pressed="{"true" if chosen else "false"}">{title}</button>'
    )


def _sheet(n: int, state: list[str]) -> str:
    cells = "".join(
        f'<rect data-i="{i}" class="{state[i]}" x="{30 * c + 1}" '
        f'y="{30 * m + 1}" width="28" height="28" rx="3"/>'
        for c in range(_CHANNELS)
        for m in range(_PLACES)
        for i in [_index((n, c, m))]
    )
    return (
        '<svg viewBox="-16 -4 208 172" aria-hidden="true">'
        f'<g transform="translate(0,20) skewY(-6)">{cells}</g>'
        '<text x="6" y="160">channels →</text>'
        f'<text x="186" y="160" text-anchor="end">sample {n + 1}</text>'
        '<text transform="translate(-5,134) rotate(-90)">positions</text>'
        "</svg>"
    )


_CUBE_PAGE = """\
<div class="normlib-cube" data-norm="@NORM@" data-cell="@CELL@"
 data-sizes="@SIZES@">
<style>@STYLE@</style>
<div class="nk-buttons nk-norms" role="group" aria-label="Norm">@NORMS@</div>
<div class="nk-buttons nk-groups" role="group" aria-label="Groups"@HIDDEN@>\
<span>Groups:</span>@GROUPS@</div>
<div class="nk-sheets" tabindex="0" role="group" aria-label="The values of a
 batch. Arrow keys choose a channel and a position, Page Up and Page Down a
 sample.">@SHEETS@</div>
<div class="nk-told" aria-live="polite"><p class="nk-where">@WHERE@</p>
<dl class="nk-facts">@FACTS@</dl></div>
<noscript>Choosing needs JavaScript; the picture shows one setting.\
</noscript>
<script type="application/json" class="nk-data">@DATA@</script>
<script>@SCRIPT@</script>
</div>
"""

_CUBE_STYLE = """
.normlib-cube{--nk-on:#0f766e;--nk-at:#dc2626;--nk-off:#e2e8f0;
--nk-text:#1e293b;--nk-muted:#64748b;--nk-line:#cbd5e1;--nk-back:#fff;
--nk-accent:#b45309;max-width:680px;margin:0 auto;color:var(--nk-text);
font-size:.95rem;line-height:1.4}
.normlib-cube[data-norm=sample],.normlib-cube[data-norm=token]{
--nk-on:#b45309}
.normlib-cube[data-norm=instance]{--nk-on:#7c3aed}
.normlib-cube[data-norm=group]{--nk-on:#2563eb}
.normlib-cube[data-norm=rms]{--nk-on:#be185d}
html[data-theme=dark] .normlib-cube,
[data-jp-theme-light=false] .normlib-cube{--nk-on:#2dd4bf;--nk-at:#f87171;
--nk-off:#334155;--nk-text:#e2e8f0;--nk-muted:#94a3b8;--nk-line:#475569;
--nk-back:#0f172a;--nk-accent:#fbbf24}
html[data-theme=dark] .normlib-cube[data-norm=sample],
html[data-theme=dark] .normlib-cube[data-norm=token]{--nk-on:#fbbf24}
html[data-theme=dark] .normlib-cube[data-norm=instance]{--nk-on:#a78bfa}
html[data-theme=dark] .normlib-cube[data-norm=group]{--nk-on:#60a5fa}
html[data-theme=dark] .normlib-cube[data-norm=rms]{--nk-on:#f472b6}
html[data-theme=dark] .bd-content div.cell_output
.text_html:has(.normlib-cube){background:none!important;padding:0}
.normlib-cube .nk-sheets{display:flex;flex-wrap:wrap;gap:.3rem;
justify-content:center;border:1px solid var(--nk-line);border-radius:6px;
background:var(--nk-back);margin:.5rem 0;padding:.4rem;
touch-action:manipulation}
.normlib-cube svg{display:block;flex:0 1 calc(33% - .2rem);min-width:150px;
height:auto}
.normlib-cube rect{fill:var(--nk-off);cursor:pointer}
.normlib-cube rect.on{fill:var(--nk-on)}
.normlib-cube rect.at{stroke:var(--nk-at);stroke-width:4}
.normlib-cube text{font-size:13px;fill:var(--nk-muted)}
.normlib-cube div.nk-buttons{align-items:center;margin:.3rem 0}
.normlib-cube .nk-buttons[hidden]{visibility:hidden}
.normlib-cube .nk-sheets:focus-visible{outline:2px solid var(--nk-accent);
outline-offset:2px}
.normlib-cube .nk-where{margin:.4rem 0 .2rem;font-weight:600}
.normlib-cube dl{display:grid;grid-template-columns:minmax(9rem,auto) 1fr;
gap:.15rem .8rem;margin:0}
.normlib-cube dt{font-weight:400;color:var(--nk-muted);margin:0}
.normlib-cube dd{margin:0}
@media (max-width:560px){.normlib-cube dl{grid-template-columns:1fr;gap:0}
.normlib-cube dd{margin-bottom:.35rem}}
""" + _controls("cube", "nk", "on", "accent")

_CUBE_SCRIPT = """
document.querySelectorAll(".normlib-cube:not([data-ready])")
.forEach(function (box) {
  box.dataset.ready = "1";
  var part = function (name) { return box.querySelector(".nk-" + name); };
  var settings = JSON.parse(part("data").textContent);
  var sizes = box.dataset.sizes.split(",").map(Number);
  var rects = {}, cell = +box.dataset.cell, shown = "";
  box.querySelectorAll("rect").forEach(function (rect) {
    rects[rect.dataset.i] = rect;
  });
  function pressed(kind) {
    return box.querySelector("[data-" + kind + "][aria-pressed=true]")
      .dataset[kind];
  }
  function draw() {
    var norm = pressed("norm");
    var key = norm + (norm === "group" ? pressed("groups") : "");
    var labels = settings[key].labels;
    box.dataset.norm = norm;
    part("groups").hidden = norm !== "group";
    Object.keys(rects).forEach(function (i) {
      rects[i].setAttribute("class",
        (labels[i] === labels[cell] ? "on" : "") +
        (+i === cell ? " at" : ""));
    });
    var m = cell % sizes[2], c = (cell - m) / sizes[2];
    part("where").textContent = "Sample " +
      (Math.floor(c / sizes[1]) + 1) + ", channel " + (c % sizes[1] + 1) +
      ", position " + (m + 1);
    if (shown === key) { return; }
    shown = key;
    var list = part("facts");
    list.textContent = "";
    settings[key].facts.forEach(function (fact) {
      ["dt", "dd"].forEach(function (tag, i) {
        var node = document.createElement(tag);
        node.textContent = fact[i];
        list.appendChild(node);
      });
    });
  }
  function choose(i) {
    if (i !== cell) { cell = i; draw(); }
  }
  function point(event) {
    var at = document.elementFromPoint(event.clientX, event.clientY);
    if (at && at.dataset && at.dataset.i && box.contains(at)) {
      choose(+at.dataset.i);
    }
  }
  part("sheets").addEventListener("pointermove", point);
  part("sheets").addEventListener("pointerdown", point);
  part("sheets").addEventListener("keydown", function (event) {
    var m = cell % sizes[2], row = (cell - m) / sizes[2];
    var rows = sizes[0] * sizes[1];
    var by = {ArrowLeft: -1, ArrowRight: 1, PageUp: -sizes[1],
      PageDown: sizes[1]}[event.key];
    if (by) {
      row = (row + by + rows) % rows;
    } else if (event.key === "ArrowUp") {
      m = (m + sizes[2] - 1) % sizes[2];
    } else if (event.key === "ArrowDown") {
      m = (m + 1) % sizes[2];
    } else {
      return;
    }
    event.preventDefault();
    choose(row * sizes[2] + m);
  });
  ["norm", "groups"].forEach(function (kind) {
    var all = box.querySelectorAll("button[data-" + kind + "]");
    all.forEach(function (button) {
      button.addEventListener("click", function () {
        all.forEach(function (other) {
          other.setAttribute("aria-pressed", other === button);
        });
        draw();
      });
    });
  });
});
"""


_BATCHES, _MOVING, _TOP = 80, 40, 5.0
_MOMENTA = [0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05]
_MOMENTA += [0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
_MOMENTA += [0.99]


class RunningAverage:
    """An exponential average that chases a moving, noisy statistic.

    A statistic rises while a network learns and then rests; each of 80
    batches shows it with some noise, and ``average = (1 - momentum) * average
    + momentum * batch`` follows, from a start at 0. Below the curve stands
    the weight of each past batch in the average, and of the start. A slider
    sets momentum (PyTorch's: the weight of the new batch), another the batch
    to look at; a button takes the start out, as Adam does.

    Show it by naming it at the end of a cell.

    Args:
        momentum: at first, 0.001 to 0.99; the nearest of the slider's 23
            values is taken.
        step: the batch to look at, 1 to 80.
        debias: whether the start is taken out.

    Raises:
        ValueError: an argument outside its range.

    Chapter 4.
    """

    def __init__(
        self, momentum: float = 0.1, step: int = 30, debias: bool = False
    ):
        if not _MOMENTA[0] <= momentum <= _MOMENTA[-1]:
            raise ValueError(
                f"momentum must be in [{_MOMENTA[0]}, {_MOMENTA[-1]}], "
                f"got {momentum}"
            )
        if step not in range(1, _BATCHES + 1):
            raise ValueError(f"step must be in [1, {_BATCHES}], got {step}")
        self._notch = min(
            range(len(_MOMENTA)), key=lambda i: abs(_MOMENTA[i] - momentum)
        )
        self.momentum = _MOMENTA[self._notch]
        self.step = int(step)
        self.debias = bool(debias)

    def __repr__(self) -> str:
        return (
            f"RunningAverage(momentum={self.momentum:g}, step={self.step}, "
            f"debias={self.debias})"
        )

    @staticmethod
    def statistic() -> list[float]:
        """What is to be estimated: before the first batch, at each batch."""
        steps = range(_BATCHES + 1)
        return [1.5 + 2.5 * min(k, _MOVING) / _MOVING for k in steps]

    @staticmethod
    def batches() -> list[float]:
        """What the 80 batches say of it: the statistic and some noise."""
        # random() keeps its numbers over versions; gauss() need not.
        draw = random.Random(4).random
        noise = [sum(draw() for _ in range(12)) - 6 for _ in range(_BATCHES)]
        true = RunningAverage.statistic()[1:]
        return [
            round(value + 0.35 * z, 2)
            for value, z in zip(true, noise, strict=True)
        ]

    def estimates(self) -> list[float]:
        """The average before the first batch and after each batch.

        With ``debias`` there is none before the first batch; 0 stands there.
        """
        found, average = [0.0], 0.0
        for t, batch in enumerate(self.batches(), 1):
            average += self.momentum * (batch - average)
            left = (1 - self.momentum) ** t if self.debias else 0.0
            found.append(average / (1 - left))
        return found

    def weights(self) -> list[float]:
        """What the average at ``step`` is made of; the sum is 1.

        Returns:
            The weight of the start, then of each batch up to ``step``.
        """
        keep, t = 1 - self.momentum, self.step
        batches = [self.momentum * keep ** (t - k) for k in range(1, t + 1)]
        if not self.debias:
            return [keep**t, *batches]
        return [0.0, *(weight / (1 - keep**t) for weight in batches)]

    def mean_age(self) -> float:
        """How many batches ago the batches in the average were, weighted."""
        weights = self.weights()[1:]
        ages = range(self.step - 1, -1, -1)
        old = sum(w * age for w, age in zip(weights, ages, strict=True))
        return old / sum(weights)

    def _messages(self) -> tuple[str, str]:
        start = self.weights()[0]
        said = (
            f"The start, 0, still makes up {_percent(start)} of it"
            if start
            else "The start makes up nothing of it"
        )
        return (
            f"After batch {self.step} the average is "
            f"{self.estimates()[self.step]:.2f}; the statistic is "
            f"{self.statistic()[self.step]:.2f}.",
            f"{said}. The batches in the average are "
            f"{self.mean_age():.1f} batches old, on average.",
        )

    def _bars(self) -> str:
        weights = self.weights()
        high = max(weights)
        return "".join(
            f'<rect x="{_across(k) - 2.2:.1f}" '
            f'y="{_FLOOR - _TALL * w / high:.1f}" width="4.4" '
            f'height="{_TALL * w / high:.1f}"'
            + ("/>" if k else ' class="start"/>')
            for k, w in enumerate(weights)
        )

    def _repr_html_(self) -> str:
        estimates, first = self.estimates(), 1 if self.debias else 0
        path = [_point(k, v) for k, v in enumerate(estimates)]
        t = self.step
        above, below = self._messages()
        fill = {
            "@STYLE@": _RUNNING_STYLE,
            "@SCRIPT@": _RUNNING_SCRIPT,
            "@DATA@": json.dumps(
                {
                    "momenta": _MOMENTA,
                    "batches": self.batches(),
                    "statistic": [round(v, 4) for v in self.statistic()],
                },
                separators=(",", ":"),
            ),
            "@TRUTH@": " ".join(
                _point(k, v) for k, v in enumerate(self.statistic())
            ),
            "@DOTS@": "".join(
                f'<circle cx="{_across(k):.1f}" cy="{_up(v):.1f}" r="2.3"'
                + ("/>" if k <= t else ' class="later"/>')
                for k, v in enumerate(self.batches(), 1)
            ),
            "@PAST@": " ".join(path[first : t + 1]),
            "@LATER@": " ".join(path[max(t, first) :]),
            "@ATX@": f"{_across(t):.1f}",
            "@ATY@": f"{_up(estimates[t]):.1f}",
            "@BARS@": self._bars(),
            "@HIGH@": _percent(max(self.weights())),
            "@ABOVE@": above,
            "@BELOW@": below,
            "@NOTCH@": str(self._notch),
            "@LAST@": str(len(_MOMENTA) - 1),
            "@MOMENTUM@": f"{self.momentum:g}",
            "@DECAY@": _decay(self.momentum),
            "@STEP@": str(t),
            "@BATCHES@": str(_BATCHES),
            "@DEBIAS@": "true" if self.debias else "false",
        }
        return _filled(_RUNNING_PAGE, fill)


_CEILING, _GROUND, _FLOOR, _TALL = 14.0, 190.0, 276.0, 58.0


def _across(step: int) -> float:
    return 26 + 5.5 * step


def _up(value: float) -> float:
    return _GROUND - (_GROUND - _CEILING) * value / _TOP


def _point(step: int, value: float) -> str:
    return f"{_across(step):.1f},{_up(value):.1f}"


def _percent(share: float) -> str:
    if share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def _decay(momentum: float) -> str:
    return f"{1 - momentum:.3f}".rstrip("0")


_RUNNING_PAGE = """\
<div class="normlib-running" data-notch="@NOTCH@" data-step="@STEP@"
 data-debias="@DEBIAS@">
<style>@STYLE@</style>
<svg viewBox="0 0 480 298" role="img" aria-label="Above, a statistic that
 rises and then rests, noisy values of it from 80 batches, and the running
 average that follows them. Below, the weight of each past batch in that
 average">
<path class="nr-axis" d="M22,190H470M22,276H470M22,49H26"/>
<polyline class="nr-truth" points="@TRUTH@"/>
<g class="nr-dots">@DOTS@</g>
<polyline class="nr-later" points="@LATER@"/>
<polyline class="nr-past" points="@PAST@"/>
<g class="nr-bars">@BARS@</g>
<g class="nr-cursor" transform="translate(@ATX@,0)"><path d="M0,10V276"/>
<circle cy="@ATY@" r="5"/></g>
<text x="17" y="195" text-anchor="end">0</text>
<text x="17" y="54" text-anchor="end">4</text>
<text x="30" y="212">weights, the largest <tspan class="nr-high">@HIGH@\
</tspan></text>
<text x="26" y="292" text-anchor="middle">start</text>
<text x="466" y="292" text-anchor="end">batch @BATCHES@</text>
</svg>
<p class="nr-key" aria-hidden="true">
<span><i class="nr-k1"></i>the statistic</span>
<span><i class="nr-k2"></i>what a batch says of it</span>
<span><i class="nr-k3"></i>running average</span>
<span><i class="nr-k4"></i>weight of the start</span></p>
<div class="nr-told" aria-live="polite"><p class="nr-above">@ABOVE@</p>
<p class="nr-below">@BELOW@</p></div>
<label><span>momentum = <output class="nr-momentum">@MOMENTUM@</output>
 (in Keras and TensorFlow: <output class="nr-decay">@DECAY@</output>)</span>
<input class="nr-notch" type="range" min="0" max="@LAST@" step="1"
 value="@NOTCH@" aria-label="Momentum in PyTorch's sense"
 aria-valuetext="@MOMENTUM@"></label>
<label><span>after batch <output class="nr-batch">@STEP@</output></span>
<input class="nr-step" type="range" min="1" max="@BATCHES@" step="1"
 value="@STEP@" aria-label="Look at the average after this batch"
 aria-valuetext="batch @STEP@"></label>
<div class="nr-buttons" role="group" aria-label="Settings">
<button type="button" class="nr-debias" aria-pressed="@DEBIAS@">Take the
 start out</button>
<button type="button" data-to="0.1">0.1, PyTorch's default</button>
<button type="button" data-to="0.01">0.01, Keras' default</button>
<button type="button" data-to="0.99">0.99, the copied bug</button>
<button type="button" class="nr-reset">Reset</button></div>
<noscript>The sliders need JavaScript; the picture shows one setting.\
</noscript>
<script type="application/json" class="nr-data">@DATA@</script>
<script>@SCRIPT@</script>
</div>
"""

_RUNNING_STYLE = """
.normlib-running{--nr-on:#0f766e;--nr-dot:#64748b;--nr-start:#dc2626;
--nr-text:#1e293b;--nr-muted:#64748b;--nr-line:#cbd5e1;--nr-back:#fff;
--nr-accent:#b45309;max-width:680px;margin:0 auto;color:var(--nr-text);
font-size:.95rem;line-height:1.4}
html[data-theme=dark] .normlib-running,
[data-jp-theme-light=false] .normlib-running{--nr-on:#2dd4bf;
--nr-dot:#94a3b8;--nr-start:#f87171;--nr-text:#e2e8f0;--nr-muted:#94a3b8;
--nr-line:#475569;--nr-back:#0f172a;--nr-accent:#fbbf24}
html[data-theme=dark] .bd-content div.cell_output
.text_html:has(.normlib-running){background:none!important;padding:0}
.normlib-running svg{display:block;width:100%;height:auto;cursor:ew-resize;
background:var(--nr-back);border:1px solid var(--nr-line);border-radius:6px;
touch-action:pan-y;user-select:none}
.normlib-running text{font-size:13px;fill:var(--nr-muted);
paint-order:stroke;stroke:var(--nr-back);stroke-width:4px}
.normlib-running .nr-axis{stroke:var(--nr-line);fill:none}
.normlib-running polyline{fill:none;stroke:var(--nr-on);stroke-width:2.4}
.normlib-running .nr-later{stroke-opacity:.28}
.normlib-running .nr-truth{stroke:var(--nr-accent);stroke-width:1.6;
stroke-dasharray:5 4}
.normlib-running .nr-dots{fill:var(--nr-dot)}
.normlib-running .later{fill-opacity:.28}
.normlib-running .nr-bars{fill:var(--nr-on)}
.normlib-running .nr-bars .start{fill:var(--nr-start)}
.normlib-running .nr-cursor path{stroke:var(--nr-text);stroke-opacity:.35}
.normlib-running .nr-cursor circle{fill:var(--nr-on);
stroke:var(--nr-back);stroke-width:1.5}
.normlib-running .nr-key{display:flex;flex-wrap:wrap;gap:.1rem .9rem;
margin:.3rem 0;font-size:.85rem;color:var(--nr-muted)}
.normlib-running .nr-key span{display:flex;align-items:center;gap:.35rem}
.normlib-running .nr-key i{width:1.1rem;height:0;
border-top:3px solid var(--nr-on)}
.normlib-running .nr-key .nr-k1{border-top:2px dashed var(--nr-accent)}
.normlib-running .nr-key .nr-k2{width:.5rem;height:.5rem;border:0;
border-radius:50%;background:var(--nr-dot)}
.normlib-running .nr-key .nr-k4{width:.5rem;height:.7rem;border:0;
background:var(--nr-start)}
.normlib-running .nr-told p{margin:.3rem 0}
.normlib-running .nr-above{font-weight:600}
.normlib-running .nr-below{min-height:2.8em}
""" + _controls("running", "nr", "on", "accent")

_RUNNING_SCRIPT = """
document.querySelectorAll(".normlib-running:not([data-ready])")
.forEach(function (box) {
  box.dataset.ready = "1";
  var part = function (name) { return box.querySelector(".nr-" + name); };
  var data = JSON.parse(part("data").textContent);
  var notch = part("notch"), step = part("step"), debias = part("debias");
  var picture = box.querySelector("svg"), last = data.batches.length;
  var dots = part("dots").children;
  function across(k) { return 26 + 5.5 * k; }
  function up(value) { return 190 - 176 * value / 5; }
  function percent(share) {
    return share < 0.001 ? "less than 0.1 %" :
      (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
  }
  function points(values, from, to) {
    var found = [], k;
    for (k = from; k <= to; k += 1) {
      found.push(across(k).toFixed(1) + "," + up(values[k]).toFixed(1));
    }
    return found.join(" ");
  }
  function draw() {
    var m = data.momenta[+notch.value], t = +step.value, k;
    var out = debias.getAttribute("aria-pressed") === "true";
    var keep = 1 - m, average = 0, estimates = [0], bars = "";
    for (k = 1; k <= last; k += 1) {
      average += m * (data.batches[k - 1] - average);
      estimates.push(average / (out ? 1 - Math.pow(keep, k) : 1));
    }
    var left = Math.pow(keep, t), whole = out ? 1 - left : 1;
    var weights = [out ? 0 : left], high, age = 0;
    for (k = 1; k <= t; k += 1) {
      weights.push(m * Math.pow(keep, t - k) / whole);
      age += weights[k] * (t - k);
    }
    age /= 1 - weights[0];
    high = Math.max.apply(null, weights);
    weights.forEach(function (weight, i) {
      var tall = 58 * weight / high;
      bars += '<rect x="' + (across(i) - 2.2).toFixed(1) + '" y="' +
        (276 - tall).toFixed(1) + '" width="4.4" height="' +
        tall.toFixed(1) + '"' + (i ? "" : ' class="start"') + "/>";
    });
    part("bars").innerHTML = bars;
    part("high").textContent = percent(high);
    part("past").setAttribute("points", points(estimates, out ? 1 : 0, t));
    part("later").setAttribute("points", points(estimates, t, last));
    for (k = 1; k <= last; k += 1) {
      dots[k - 1].setAttribute("class", k <= t ? "" : "later");
    }
    part("cursor").setAttribute("transform",
      "translate(" + across(t).toFixed(1) + ",0)");
    part("cursor").querySelector("circle")
      .setAttribute("cy", up(estimates[t]).toFixed(1));
    part("above").textContent = "After batch " + t + " the average is " +
      estimates[t].toFixed(2) + "; the statistic is " +
      data.statistic[t].toFixed(2) + ".";
    part("below").textContent = (weights[0] ?
      "The start, 0, still makes up " + percent(left) + " of it" :
      "The start makes up nothing of it") + ". The batches in the average " +
      "are " + age.toFixed(1) + " batches old, on average.";
    part("momentum").textContent = String(m);
    part("decay").textContent = keep.toFixed(3).replace(/0+$/, "");
    part("batch").textContent = String(t);
    notch.setAttribute("aria-valuetext", String(m));
    step.setAttribute("aria-valuetext", "batch " + t);
  }
  function point(event) {
    if (event.type === "pointermove" && !event.buttons) { return; }
    var place = picture.getBoundingClientRect();
    var x = 480 * (event.clientX - place.left) / place.width;
    step.value = Math.round((x - 26) / 5.5);
    draw();
  }
  notch.addEventListener("input", draw);
  step.addEventListener("input", draw);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointermove", point);
  debias.addEventListener("click", function () {
    debias.setAttribute("aria-pressed",
      debias.getAttribute("aria-pressed") !== "true");
    draw();
  });
  box.querySelectorAll("button[data-to]").forEach(function (button) {
    button.addEventListener("click", function () {
      notch.value = data.momenta.indexOf(+button.dataset.to);
      draw();
    });
  });
  part("reset").addEventListener("click", function () {
    notch.value = box.dataset.notch;
    step.value = box.dataset.step;
    debias.setAttribute("aria-pressed", box.dataset.debias);
    draw();
  });
});
"""


class GradientWalk:
    """Walks along the gradient, to take by hand: how far is it right?

    Above the loss, below the change of the gradient, of several networks
    against the step size. A slider, or a finger on the picture, chooses the
    step; buttons choose the moment of training at which the walk starts. The
    figure says what loss and gradient have become of. Both scales are
    logarithmic, and the same at every moment.

    Show it by naming it at the end of a cell.

    Args:
        walks: name of a network to its walks, one for each moment, each with
            ``step_size``, ``loss`` and ``grad_change`` as
            :func:`normlib.diagnostics.gradient_walk` returns them. All have
            the same step sizes: 0, then rising.
        moments: a label for each.
        unit: the learning rate, in whose multiples the step is told.
        size: the step at first, in these units; the nearest is taken.
        moment: the one at first, counted from 0.

    Raises:
        ValueError: walks that do not fit each other, or none; a moment that
            is not there.

    Chapter 3.
    """

    def __init__(
        self,
        walks: Mapping[str, Sequence],
        moments: Sequence[str],
        *,
        unit: float,
        size: float = 1.0,
        moment: int = 0,
    ):
        _check_walks(walks, moments)
        if not 0 <= moment < len(moments):
            raise ValueError(
                f"moment must be in [0, {len(moments) - 1}], got {moment}"
            )
        first = next(iter(walks.values()))[0]
        self.sizes = [_digits(s / unit) for s in _listed(first.step_size)]
        self.moments, self.moment = list(moments), moment
        self.names = list(walks)
        self.loss, self.change = (
            [[_told(getattr(w, key)) for w in row] for row in walks.values()]
            for key in ("loss", "grad_change")
        )
        steps = range(len(self.sizes))
        self._notch = min(steps, key=lambda i: abs(self.sizes[i] - size))

    def __repr__(self) -> str:
        return (
            f"GradientWalk({', '.join(self.names)}; "
            f"{', '.join(self.moments)}; {len(self.sizes)} steps)"
        )

    def _messages(self) -> list[str]:
        at, k = self.moment, self._notch
        return [
            f"the loss goes from {_round(loss[at][0])} to "
            f"{_round(loss[at][k])}, and the gradient changes by "
            f"{_round(change[at][k])}."
            for loss, change in zip(self.loss, self.change, strict=True)
        ]

    def _panel(self, values, top: float, floor: float) -> "_Panel":
        flat = [v for row in values for walk in row for v in walk if v > 0]
        low = math.floor(math.log10(min(flat)))
        high = min(math.ceil(math.log10(max(flat))), max(4, low + 1))
        return _Panel(max(low, high - 6), max(high, low + 1), top, floor)

    def _across(self, k: int) -> float:
        return 56 + 416 * k / (len(self.sizes) - 1)

    def _ticks(self) -> str:
        """Labels under the picture: 0, and powers of four of the unit."""
        marks = [(0, "0")]
        for power in range(-3, 6):
            near = min(
                range(1, len(self.sizes)),
                key=lambda i: abs(self.sizes[i] / 4.0**power - 1),
            )
            if abs(self.sizes[near] / 4.0**power - 1) < 0.02:
                label = f"1/{4**-power}" if power < 0 else f"{4**power}"
                marks.append((near, label))
        return "".join(
            f'<text x="{self._across(k):.1f}" y="326" '
            f'text-anchor="middle">{label}</text>'
            for k, label in marks
        )

    def _repr_html_(self) -> str:
        panels = [
            self._panel(self.loss, 24.0, 158.0),
            self._panel(self.change, 194.0, 308.0),
        ]
        k, at, both = self._notch, self.moment, (self.loss, self.change)
        lines, dots = "", ""
        for values, panel in zip(both, panels, strict=True):
            for i, row in enumerate(values):
                points = " ".join(
                    f"{self._across(j):.1f},{panel.up(v):.1f}"
                    for j, v in enumerate(panel.inside(row[at]))
                )
                lines += f'<polyline class="ng-l{i}" points="{points}"/>'
                dots += (
                    f'<circle class="ng-d{i}" cx="{self._across(k):.1f}" '
                    f'cy="{panel.up(row[at][k]):.1f}" r="4.5"/>'
                )
        inside = [j for j, s in enumerate(self.sizes) if 0.49 < s < 4.1]
        left, right = (
            (self._across(inside[0]), self._across(inside[-1]))
            if inside
            else (0, 0)
        )
        fill = {
            "@STYLE@": _WALK_STYLE,
            "@SCRIPT@": _WALK_SCRIPT,
            "@DATA@": json.dumps(
                {
                    "sizes": self.sizes,
                    "loss": self.loss,
                    "change": self.change,
                    "panels": [list(panel) for panel in panels],
                },
                separators=(",", ":"),
            ),
            "@LEFT@": f"{left:.1f}",
            "@WIDE@": f"{right - left:.1f}",
            "@GRID@": "".join(panel.grid() for panel in panels),
            "@TICKS@": self._ticks(),
            "@LINES@": lines,
            "@DOTS@": dots,
            "@ATX@": f"{self._across(k):.1f}",
            "@SAID@": "".join(
                f'<p><i class="ng-k{i}"></i><span><b>{escape(name)}:</b> '
                f'<span class="ng-says">{said}</span></span></p>'
                for i, (name, said) in enumerate(
                    zip(self.names, self._messages(), strict=True)
                )
            ),
            "@SIZE@": _round(self.sizes[k]),
            "@NOTCH@": str(k),
            "@LAST@": str(len(self.sizes) - 1),
            "@MOMENT@": str(at),
            "@BUTTONS@": "".join(
                _choice("at", str(j), escape(label), j == at)
                for j, label in enumerate(self.moments)
            ),
        }
        return _filled(_WALK_PAGE, fill)


class _Panel(NamedTuple):
    """A logarithmic scale: decades, and where they lie in the picture."""

    low: int
    high: int
    top: float
    floor: float

    def up(self, value: float) -> float:
        """The height of a value; what is outside lies on the border."""
        decade = math.log10(value) if value > 0 else self.low
        share = (decade - self.low) / (self.high - self.low)
        return self.floor - (self.floor - self.top) * min(max(share, 0), 1)

    def inside(self, values: Sequence[float]) -> Sequence[float]:
        """The values up to the first that is above the picture."""
        above = (j for j, v in enumerate(values) if v > 10.0**self.high)
        return values[: next(above, len(values)) + 1]

    def grid(self) -> str:
        """A line for each decade, with labels not too close."""
        every = 1 if self.high - self.low < 5 else 2
        found = ""
        for decade in range(self.low, self.high + 1):
            y = self.up(10.0**decade)
            found += f'<path class="ng-grid" d="M56,{y:.1f}H472"/>'
            if (decade - self.low) % every == 0:
                label = f"{10**decade:,}" if decade >= 0 else 10.0**decade
                found += (
                    f'<text x="51" y="{y + 4.5:.1f}" '
                    f'text-anchor="end">{label}</text>'
                )
        return found


def _check_walks(walks, moments) -> None:
    if not walks or not moments:
        raise ValueError("there must be at least one walk")
    counts = {name: len(row) for name, row in walks.items()}
    if set(counts.values()) != {len(moments)}:
        raise ValueError(
            f"each network needs a walk for each of {len(moments)} moments, "
            f"got {counts}"
        )
    sizes = {
        tuple(_listed(walk.step_size))
        for row in walks.values()
        for walk in row
    }
    if len(sizes) > 1:
        raise ValueError("all walks must have the same step sizes")
    (found,) = sizes
    rising = all(a < b for a, b in pairwise(found))
    if len(found) < 2 or found[0] != 0 or not rising:
        raise ValueError(f"step sizes must rise from 0, got {list(found)}")


def _listed(values) -> list[float]:
    return [float(v) for v in values]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _told(values) -> list[float]:
    """As JSON has numbers: 4 digits, and what is not finite as 1e30."""
    return [
        _digits(v) if math.isfinite(v) and v < 1e30 else 1e30
        for v in _listed(values)
    ]


def _round(value: float) -> str:
    if value >= 1000:
        return f"more than {10 ** math.floor(math.log10(value)):,}"
    for limit, places in ((0.0995, 3), (9.95, 2), (99.5, 1)):
        if value < limit:
            return f"{value:.{places}f}"
    return f"{value:.0f}"


_WALK_PAGE = """\
<div class="normlib-walk" data-notch="@NOTCH@" data-moment="@MOMENT@">
<style>@STYLE@</style>
<svg viewBox="0 0 480 352" role="img" aria-label="Two plots against the step
 size, both scales logarithmic, one line for each network. Above, the loss
 along the gradient; below, how far the gradient there is from the gradient
 at the start">
<rect class="ng-span" x="@LEFT@" y="24" width="@WIDE@" height="284"/>
@GRID@
<text x="56" y="15" class="ng-title">loss along the walk</text>
<text x="56" y="185" class="ng-title">change of the gradient</text>
<g class="ng-lines">@LINES@</g>
<path class="ng-cursor" d="M0,24V308" transform="translate(@ATX@,0)"/>
<g class="ng-dots">@DOTS@</g>
@TICKS@
<text x="472" y="345" text-anchor="end">step, in learning rates</text>
</svg>
<div class="ng-told" aria-live="polite">@SAID@</div>
<label><span>A step of <output class="ng-size">@SIZE@</output> learning
 rates</span>
<input class="ng-notch" type="range" min="0" max="@LAST@" step="1"
 value="@NOTCH@" aria-label="Step along the gradient, in learning rates"
 aria-valuetext="@SIZE@"></label>
<div class="ng-buttons" role="group" aria-label="Moment of training">
@BUTTONS@
<button type="button" class="ng-reset">Reset</button></div>
<noscript>Slider and buttons need JavaScript; the picture shows one setting.\
</noscript>
<script type="application/json" class="ng-data">@DATA@</script>
<script>@SCRIPT@</script>
</div>
"""

_WALK_STYLE = """
.normlib-walk{--ng-0:#64748b;--ng-1:#0f766e;--ng-2:#b45309;--ng-text:#1e293b;
--ng-muted:#64748b;--ng-line:#cbd5e1;--ng-grid:#e2e8f0;--ng-back:#fff;
--ng-span:#f1f5f9;--ng-focus:#b45309;max-width:680px;margin:0 auto;
color:var(--ng-text);font-size:.95rem;line-height:1.4}
html[data-theme=dark] .normlib-walk,
[data-jp-theme-light=false] .normlib-walk{--ng-0:#cbd5e1;--ng-1:#2dd4bf;
--ng-2:#fbbf24;--ng-text:#e2e8f0;--ng-muted:#94a3b8;--ng-line:#475569;
--ng-grid:#1e293b;--ng-back:#0f172a;--ng-span:#17233b;--ng-focus:#fbbf24}
html[data-theme=dark] .bd-content div.cell_output
.text_html:has(.normlib-walk){background:none!important;padding:0}
.normlib-walk svg{display:block;width:100%;height:auto;cursor:ew-resize;
background:var(--ng-back);border:1px solid var(--ng-line);border-radius:6px;
touch-action:pan-y;user-select:none}
.normlib-walk text{font-size:13px;fill:var(--ng-muted)}
.normlib-walk .ng-title{font-weight:600;fill:var(--ng-text)}
.normlib-walk .ng-grid{stroke:var(--ng-grid);fill:none}
.normlib-walk .ng-span{fill:var(--ng-span)}
.normlib-walk polyline{fill:none;stroke-width:2.4;stroke-linejoin:round}
.normlib-walk .ng-l0{stroke:var(--ng-0);stroke-dasharray:7 3}
.normlib-walk .ng-l1{stroke:var(--ng-1)}
.normlib-walk .ng-l2{stroke:var(--ng-2);stroke-dasharray:2 3}
.normlib-walk circle{stroke:var(--ng-back);stroke-width:1.5}
.normlib-walk .ng-d0{fill:var(--ng-0)}
.normlib-walk .ng-d1{fill:var(--ng-1)}
.normlib-walk .ng-d2{fill:var(--ng-2)}
.normlib-walk .ng-cursor{stroke:var(--ng-text);stroke-opacity:.4;fill:none}
.normlib-walk .ng-told{margin:.4rem 0}
.normlib-walk .ng-told p{display:flex;gap:.5rem;margin:.3rem 0;
min-height:2.8em}
.normlib-walk .ng-told i{flex:none;width:1.4rem;height:0;margin-top:.65em;
border-top:3px solid var(--ng-1)}
.normlib-walk .ng-told .ng-k0{border-top:3px dashed var(--ng-0)}
.normlib-walk .ng-told .ng-k2{border-top:3px dotted var(--ng-2)}
""" + _controls("walk", "ng", "1", "focus")

_WALK_SCRIPT = """
document.querySelectorAll(".normlib-walk:not([data-ready])")
.forEach(function (box) {
  box.dataset.ready = "1";
  var part = function (name) { return box.querySelector(".ng-" + name); };
  var data = JSON.parse(part("data").textContent);
  var notch = part("notch"), moment = +box.dataset.moment;
  var picture = box.querySelector("svg"), last = data.sizes.length - 1;
  var lines = part("lines").children, dots = part("dots").children;
  var says = box.querySelectorAll(".ng-says");
  var buttons = box.querySelectorAll("button[data-at]");
  function across(k) { return (56 + 416 * k / last).toFixed(1); }
  function up(value, panel) {
    var low = panel[0], top = panel[2], floor = panel[3];
    var decade = value > 0 ? Math.log10(value) : low;
    var share = (decade - low) / (panel[1] - low);
    share = Math.min(Math.max(share, 0), 1);
    return (floor - (floor - top) * share).toFixed(1);
  }
  function round(value) {
    if (value >= 1000) {
      return "more than " + Math.pow(10, Math.floor(Math.log10(value)))
        .toLocaleString("en-US");
    }
    return value.toFixed(value < 0.0995 ? 3 : value < 9.95 ? 2 :
      value < 99.5 ? 1 : 0);
  }
  function draw() {
    var k = +notch.value, n = data.loss.length;
    [data.loss, data.change].forEach(function (values, j) {
      values.forEach(function (row, i) {
        var walk = row[moment], panel = data.panels[j];
        var top = Math.pow(10, panel[1]);
        var above = walk.findIndex(function (v) { return v > top; });
        var drawn = above < 0 ? walk : walk.slice(0, above + 1);
        lines[j * n + i].setAttribute("points", drawn.map(
          function (v, at) { return across(at) + "," + up(v, panel); }
        ).join(" "));
        dots[j * n + i].setAttribute("cx", across(k));
        dots[j * n + i].setAttribute("cy", up(walk[k], panel));
      });
    });
    data.loss.forEach(function (row, i) {
      says[i].textContent = "the loss goes from " + round(row[moment][0]) +
        " to " + round(row[moment][k]) + ", and the gradient changes by " +
        round(data.change[i][moment][k]) + ".";
    });
    part("cursor").setAttribute("transform",
      "translate(" + across(k) + ",0)");
    part("size").textContent = round(data.sizes[k]);
    notch.setAttribute("aria-valuetext", round(data.sizes[k]));
    buttons.forEach(function (button) {
      button.setAttribute("aria-pressed", +button.dataset.at === moment);
    });
  }
  function point(event) {
    if (event.type === "pointermove" && !event.buttons) { return; }
    var place = picture.getBoundingClientRect();
    var x = 480 * (event.clientX - place.left) / place.width;
    notch.value = Math.round((x - 56) * last / 416);
    draw();
  }
  notch.addEventListener("input", draw);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointermove", point);
  buttons.forEach(function (button) {
    button.addEventListener("click", function () {
      moment = +button.dataset.at;
      draw();
    });
  });
  part("reset").addEventListener("click", function () {
    notch.value = box.dataset.notch;
    moment = +box.dataset.moment;
    draw();
  });
});
"""
