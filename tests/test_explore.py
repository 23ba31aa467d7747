"""The interactive figures stand alone, and say what the mathematics says."""

import json
import math
import re
from html.parser import HTMLParser

import numpy
import pytest
import torch

from normlib import reference
from normlib.diagnostics import Walk
from normlib.explore import (
    GradientWalk,
    LossContours,
    NormCube,
    RunningAverage,
)
from normlib.stats import ExponentialAverage, Moments

VOID = {"input", "br", "img"}


class Tags(HTMLParser):
    """Collects attributes and text; fails where a tag is left open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.seen if name == tag]


def html(**kwargs):
    return LossContours(**kwargs)._repr_html_()


def test_both_sliders_and_the_picture_have_names():
    tags = Tags(html())
    sliders = tags.all("input")
    assert [s["type"] for s in sliders] == ["range", "range"]
    assert all(s["aria-label"] and s["aria-valuetext"] for s in sliders)
    assert tags.all("svg")[0]["aria-label"]
    assert [b["type"] for b in tags.all("button")] == ["button", "button"]
    assert "noscript" in [name for name, _ in tags.seen]


def test_the_first_picture_needs_no_script():
    tags = Tags(html(condition_number=25, rate=1.8))
    points = tags.all("polyline")[0]["points"].split()
    assert points[0] == "-215.0,-90.3"
    assert points[1] == f"{-215 * (1 - 1.8 / 25):.1f},{90.3 * 0.8:.1f}"
    assert len(tags.all("circle")) == len(points) == 201
    stretch = [float(e["rx"]) / float(e["ry"]) for e in tags.all("ellipse")]
    assert stretch[0] == pytest.approx(5, abs=0.01)  # square root of 25


@pytest.mark.parametrize(
    ("kappa", "rate", "factor"),
    [(100, 1.0, 1 - 1 / 100), (25, 50 / 26, 24 / 26), (10, 0.5, 1 - 0.05)],
)
def test_the_flat_direction_decides_the_number_of_steps(kappa, rate, factor):
    steps = LossContours(kappa, rate).steps_to(0.01)
    assert steps == pytest.approx(math.log(0.01) / math.log(factor), rel=0.04)


def test_a_round_valley_takes_one_step():
    assert LossContours(1, 1.0).steps_to() == 1
    assert "After 1 step, 1 %" in html(condition_number=1, rate=1)


def test_above_two_over_l_it_diverges_and_says_so():
    assert LossContours(25, 2.1).steps_to() is None
    page = html(rate=2.1)
    assert "Diverges: the rate is above 2/L" in page
    assert "steep direction by 1.10." in page
    assert 'data-state="bad"' in page
    assert "On the edge" in html(rate=2.0)
    assert 'data-state="good"' in html(rate=1.99)


@pytest.mark.parametrize("kappa", [0.5, 2000])
def test_condition_number_out_of_range(kappa):
    with pytest.raises(ValueError, match=rf"\[1, 1000\], got {kappa}"):
        LossContours(condition_number=kappa)


@pytest.mark.parametrize("rate", [0.0, 2.5])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=rf"\[0.05, 2.2\], got {rate}"):
        LossContours(rate=rate)


def test_repr_names_the_setting():
    assert repr(LossContours()) == (
        "LossContours(condition_number=25, rate=1.8)"
    )


def quadratic(curvature, length=1.0):
    """A walk down a parabola whose gradient has this length."""
    size = torch.tensor([0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 4.0])
    gap = length / curvature - size * length
    change = size * length * curvature
    return Walk(size.double(), gap**2 * curvature / 2, change, curvature)


def walk(**kwargs):
    walks = {
        "steep": [quadratic(2.0), quadratic(1.0)],
        "flat": [quadratic(0.5), quadratic(0.25)],
    }
    settings = {"unit": 0.25, "size": 1.0} | kwargs
    return GradientWalk(walks, ["step 0", "step <9>"], **settings)


FIGURES = [LossContours, NormCube, RunningAverage, walk]
CUBE = (3, 6, 4)  # samples, channels, positions
NORMS = ["batch", "sample", "token", "instance", "group", "rms"]


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_stands_alone(figure):
    page = figure()._repr_html_()
    assert page == figure()._repr_html_()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(", page)
    assert not re.search(r"\s(?:src|href)=", page)
    assert not re.search(r"@[A-Z]+@", page)
    tags = Tags(page)
    assert [a["id"] for _, a in tags.seen if "id" in a] == []
    assert "noscript" in [name for name, _ in tags.seen]


def normalized(norm, groups, x):
    """The norm of (N, C, H, W) that a button of the cube stands for."""
    last = x.transpose(0, 2, 3, 1)
    y, _ = {
        "batch": lambda: reference.batch_norm(x),
        "sample": lambda: reference.layer_norm(x, x.shape[1:]),
        "token": lambda: reference.layer_norm(last, x.shape[1:2]),
        "instance": lambda: reference.instance_norm(x),
        "group": lambda: reference.group_norm(x, groups),
        "rms": lambda: reference.rms_norm(last, x.shape[1:2]),
    }[norm]()
    return y.transpose(0, 3, 1, 2) if norm in ("token", "rms") else y


@pytest.mark.parametrize("cell", [(0, 1, 2), (2, 5, 0)])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("norm", NORMS)
def test_the_lit_cells_are_those_that_change_with_the_chosen_one(
    norm, groups, cell
):
    x = numpy.random.default_rng(0).normal(size=CUBE)
    moved = x.copy()
    moved[cell] += 1.0
    before, after = (
        normalized(norm, groups, a.reshape(3, 6, 2, 2)).reshape(CUBE)
        for a in (x, moved)
    )
    shared = NormCube(norm, groups, cell).shared()
    numpy.testing.assert_array_equal(before != after, shared)


@pytest.mark.parametrize("norm", NORMS)
def test_the_cube_is_drawn_and_told_without_a_script(norm):
    cube = NormCube(norm, 3, (1, 4, 2))
    tags = Tags(cube._repr_html_())
    lit = [int(r["data-i"]) for r in tags.all("rect") if "on" in r["class"]]
    assert sorted(lit) == numpy.flatnonzero(cube.shared()).tolist()
    chosen = [r["data-i"] for r in tags.all("rect") if "at" in r["class"]]
    assert chosen == [str((1 * 6 + 4) * 4 + 2)]
    page = cube._repr_html_()
    assert "Sample 2, channel 5, position 3" in page
    assert f"<dd>{len(lit)} of 72 values" in page
    others = "Yes, in training" if norm == "batch" else "No"
    assert f"<dt>Do other samples change this output?</dt><dd>{others}" in page


def test_the_script_of_the_cube_looks_up_what_python_computed():
    page = NormCube()._repr_html_()
    found = json.loads(re.search(r'class="nk-data">(.+?)</script>', page)[1])
    assert set(found) == {*NORMS, *(f"group{g}" for g in (1, 2, 3, 6))} - {
        "group"
    }
    for key, setting in found.items():
        norm, groups = key.rstrip("1236"), int((key[-1:] + "1")[0], 36)
        labels = numpy.reshape(setting["labels"], CUBE)
        shared = NormCube(norm, groups if norm == "group" else 1).shared()
        numpy.testing.assert_array_equal(labels == labels[0, 1, 2], shared)


def test_the_ends_of_group_norm_are_layer_and_instance_norm():
    for groups, norm in ((1, "sample"), (6, "instance")):
        group = NormCube("group", groups).shared()
        numpy.testing.assert_array_equal(group, NormCube(norm).shared())


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"norm": "weight"}, "got 'weight'"),
        ({"groups": 4}, "got 4"),
        ({"cell": (0, 6, 0)}, r"got \(0, 6, 0\)"),
        ({"cell": (0, 1)}, r"got \(0, 1\)"),
    ],
)
def test_the_cube_refuses_what_it_does_not_have(arguments, received):
    with pytest.raises(ValueError, match=received):
        NormCube(**arguments)


def test_the_cube_names_its_setting():
    assert repr(NormCube("group", 3)) == (
        "NormCube(norm='group', groups=3, cell=(0, 1, 2))"
    )


def running(**kwargs):
    return RunningAverage(**kwargs)._repr_html_()


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.99])
def test_the_average_is_that_of_the_package(momentum, debias):
    figure = RunningAverage(momentum, debias=debias)
    average = ExponentialAverage(momentum, debias=debias)
    found = []
    for batch in figure.batches():
        value = torch.tensor([batch], dtype=torch.float64)
        average.update(Moments(2, value, value))
        found.append(average.mean.item())
    numpy.testing.assert_allclose(figure.estimates()[1:], found, rtol=1e-6)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(("momentum", "step"), [(0.001, 80), (0.3, 7)])
def test_the_weights_make_the_average(momentum, step, debias):
    figure = RunningAverage(momentum, step, debias)
    weights = figure.weights()
    assert len(weights) == step + 1
    assert sum(weights) == pytest.approx(1)
    assert weights[0] == (
        0 if debias else pytest.approx((1 - momentum) ** step)
    )
    average = numpy.dot(weights[1:], figure.batches()[:step])
    assert figure.estimates()[step] == pytest.approx(average)


def test_a_long_average_is_one_over_momentum_less_one_batches_old():
    assert RunningAverage(0.2, 80).mean_age() == pytest.approx(4, abs=1e-4)


def test_the_running_average_is_drawn_and_told_without_a_script():
    figure = RunningAverage(0.1, 30)
    tags = Tags(figure._repr_html_())
    dots = tags.all("circle")[:80]
    assert [d.get("class") for d in dots] == [None] * 30 + ["later"] * 50
    bars = tags.all("rect")
    assert [b.get("class") for b in bars] == ["start"] + [None] * 30
    heights = [float(b["height"]) for b in bars]
    shares = numpy.divide(figure.weights(), max(figure.weights()))
    numpy.testing.assert_allclose(heights, 58 * shares, atol=0.06)
    page = figure._repr_html_()
    assert "After batch 30 the average is 2.83; the statistic is 3.38" in page
    assert "The start, 0, still makes up 4.2 % of it." in page
    assert "The start makes up nothing of it." in running(debias=True)
    sliders = tags.all("input")
    assert [s["aria-valuetext"] for s in sliders] == ["0.1", "batch 30"]
    assert all(s["aria-label"] for s in sliders)
    assert tags.all("svg")[0]["aria-label"]


def test_the_script_of_the_average_gets_the_batches_that_python_drew():
    found = json.loads(
        re.search(r'class="nr-data">(.+?)</script>', running())[1]
    )
    assert found["batches"] == RunningAverage.batches()
    assert len(found["statistic"]) == len(found["batches"]) + 1
    for named in (0.01, 0.1, 0.99):  # the buttons look them up
        assert named in found["momenta"]
    noise = numpy.subtract(found["batches"], found["statistic"][1:])
    assert abs(noise.mean()) < 0.1
    assert 0.3 < noise.std() < 0.4


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"momentum": 0.0}, r"\[0.001, 0.99\], got 0.0"),
        ({"momentum": 1.0}, r"\[0.001, 0.99\], got 1.0"),
        ({"step": 0}, r"\[1, 80\], got 0"),
        ({"step": 81}, r"\[1, 80\], got 81"),
    ],
)
def test_the_average_refuses_what_it_does_not_have(arguments, received):
    with pytest.raises(ValueError, match=received):
        RunningAverage(**arguments)


def test_the_average_names_its_setting():
    assert repr(RunningAverage(0.1004)) == (
        "RunningAverage(momentum=0.1, step=30, debias=False)"
    )


def test_the_walk_is_drawn_and_told_without_a_script():
    tags = Tags(walk()._repr_html_())
    lines = [p["points"].split() for p in tags.all("polyline")]
    assert len(lines) == 4  # two networks, above and below
    assert {len(line) for line in lines} == {7}
    dots = tags.all("circle")
    for line, dot in zip(lines, dots, strict=True):
        assert f"{dot['cx']},{dot['cy']}" == line[3]  # one learning rate
    page = walk()._repr_html_()
    # The parabola of curvature 2: 1/4, then (1/2 - 1/4)^2 = 1/16.
    assert "goes from 0.25 to 0.062, and the gradient changes by 0.50" in page
    assert "step &lt;9&gt;" in page
    assert tags.all("input")[0]["aria-valuetext"] == "1.00"
    assert tags.all("svg")[0]["aria-label"]
    pressed = [b.get("aria-pressed") for b in tags.all("button")]
    assert pressed == ["true", "false", None]


def test_a_point_is_a_decade_higher_where_the_value_is_ten_times_as_large():
    page = walk(moment=1)._repr_html_()
    data = re.search(r'class="ng-data">(.+?)</script>', page)[1]
    low, high, top, floor = json.loads(data)["panels"][0]
    decade = (floor - top) / (high - low)
    y = [
        [float(point.split(",")[1]) for point in line["points"].split()]
        for line in Tags(page).all("polyline")[:2]
    ]
    loss = [quadratic(c).loss.numpy() for c in (1.0, 0.25)]
    for found, wanted in zip(y, loss, strict=True):
        kept = wanted > 10.0**low
        up = floor - decade * (numpy.log10(wanted[kept]) - low)
        numpy.testing.assert_allclose(numpy.array(found)[kept], up, atol=0.06)


def test_the_script_of_the_walk_gets_what_was_measured():
    data = re.search(r'class="ng-data">(.+?)</script>', walk()._repr_html_())
    found = json.loads(data[1])
    assert found["sizes"] == [0, 0.25, 0.5, 1, 2, 4, 16]
    numpy.testing.assert_allclose(
        found["change"][1][0], quadratic(0.5).grad_change, rtol=1e-3
    )


def test_a_walk_to_infinity_is_drawn_at_the_border():
    lost = quadratic(1.0)
    lost.loss[-1], lost.grad_change[-1] = math.nan, math.inf
    page = GradientWalk({"lost": [lost]}, ["start"], unit=0.25, size=99)
    html = page._repr_html_()
    assert "nan" not in html.lower()
    assert "Infinity" not in html
    line = Tags(html).all("polyline")[0]["points"].split()
    assert line[-1].endswith(",24.0")
    assert "to more than 1,000," in html


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        (({}, ["a"]), "at least one walk"),
        (({"x": [quadratic(1.0)]}, ["a", "b"]), r"2 moments, got {'x': 1}"),
        (
            ({"x": [quadratic(1.0)._replace(step_size=[1.0, 2.0])]}, ["a"]),
            r"rise from 0, got \[1.0, 2.0\]",
        ),
        (
            (
                {
                    "x": [quadratic(1.0)],
                    "y": [quadratic(1.0)._replace(step_size=[0.0, 2.0])],
                },
                ["a"],
            ),
            "the same step sizes",
        ),
    ],
)
def test_walks_that_do_not_fit_are_refused(arguments, received):
    with pytest.raises(ValueError, match=received):
        GradientWalk(*arguments, unit=1.0)


def test_a_moment_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
        walk(moment=2)


def test_the_walk_names_its_networks():
    assert (
        repr(walk()) == "GradientWalk(steep, flat; step 0, step <9>; 7 steps)"
    )
