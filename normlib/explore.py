"""Figures to play with in the page: HTML, SVG and JavaScript, no kernel.

Python draws the first picture, so that a page without JavaScript shows it
too; the script redraws it when a slider moves. No file is loaded from
anywhere, and the same arguments give the same bytes.
"""

import math

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
        html = _PAGE
        for key, value in fill.items():
            html = html.replace(key, value)
        return html


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
.normlib-contours label{display:block;margin:.4rem 0 0}
.normlib-contours input{display:block;width:100%;margin:.2rem 0;
accent-color:var(--nc-line)}
.normlib-contours .nc-ruler{position:relative;height:1.5rem;
margin:0 8px;font-size:.8rem;color:var(--nc-muted)}
.normlib-contours .nc-ruler b{position:absolute;left:90.7%;right:0;top:0;
height:4px;background:var(--nc-bad);border-radius:2px}
.normlib-contours .nc-ruler i{position:absolute;top:.3rem;
left:calc(100%*var(--at));transform:translateX(-50%);font-style:normal}
.normlib-contours .nc-ruler .nc-two{color:var(--nc-bad);font-weight:600}
.normlib-contours .nc-buttons{display:flex;flex-wrap:wrap;gap:.5rem;
margin:.4rem 0}
.normlib-contours button{font:inherit;color:inherit;padding:.25rem .7rem;
background:var(--nc-back);border:1px solid var(--nc-muted);
border-radius:6px;cursor:pointer}
.normlib-contours button:focus-visible,
.normlib-contours input:focus-visible{outline:2px solid var(--nc-path);
outline-offset:2px}
"""

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
