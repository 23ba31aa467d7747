"""The figures show the numbers that they were given."""

import matplotlib
import numpy
import pytest

from normlib import plotting


@pytest.fixture(autouse=True)
def _without_a_screen():
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


def test_loss_contours_shows_the_path_and_marks_the_minimum():
    u, v = numpy.meshgrid(numpy.linspace(-2, 2, 9), numpy.linspace(-1, 1, 9))
    path = numpy.array([[-1.5, 0.5], [-1.0, -0.25], [-0.5, 0.125]])
    ax = plotting.loss_contours(u, v, u**2 + 9 * v**2, path, (0.0, 0.0))
    walked, marked = ax.lines
    numpy.testing.assert_array_equal(walked.get_xydata(), path)
    numpy.testing.assert_array_equal(marked.get_xydata(), [[0, 0]])
    assert ax.get_xlim() == (-2, 2)


def test_loss_contours_stand_closer_near_the_minimum():
    u, v = numpy.meshgrid(numpy.linspace(-1, 1, 9), numpy.linspace(-1, 1, 9))
    ax = plotting.loss_contours(u, v, u**2 + v**2, u[:1, :2], (0, 0))
    levels = ax.collections[-1].levels
    assert (numpy.diff(levels, n=2) > 0).all()
    assert levels[-1] == 2  # the loss in the corners


def test_loss_contours_draws_where_it_is_told():
    _, axes = matplotlib.pyplot.subplots(1, 2)
    grid = numpy.meshgrid(numpy.arange(3.0), numpy.arange(3.0))
    args = (*grid, grid[0] + grid[1], numpy.zeros((1, 2)), (0, 0))
    assert plotting.loss_contours(*args, ax=axes[1]) is axes[1]


def test_spread_draws_every_run_and_their_mean():
    runs = numpy.array([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]])
    ax = plotting.spread([1, 2, 3], runs, "two runs", "batch")
    mean, *dots = ax.lines
    numpy.testing.assert_array_equal(mean.get_ydata(), [2, 2, 4])
    assert mean.get_label() == "two runs"
    for run, dot in zip(runs, dots, strict=True):
        numpy.testing.assert_array_equal(dot.get_ydata(), run)


def test_computation_graph_shows_each_box_and_arrow():
    nodes = {"x": (0, 0, "X", "note"), "y": (2, 1, "Y", "")}
    ax = plotting.computation_graph(nodes, [("x", "y")])
    texts = [text.get_text() for text in ax.texts]
    assert {"X", "Y", "note"} <= set(texts)
    arrows = [t for t in ax.texts if getattr(t, "arrow_patch", None)]
    assert len(arrows) == 1


def test_shared_statistics_marks_one_channel_of_every_example():
    ax = plotting.shared_statistics((3, 4, 9))
    colors = [patch.get_facecolor() for patch in ax.patches]
    marked = matplotlib.colors.to_rgba(plotting.COLORS["batch"])
    assert len(colors) == 3 * 4 * 9
    assert colors.count(marked) == 3 * 9


def test_tangent_gradient_keeps_to_the_circle():
    xhat = numpy.array([1.0, -1.0, 0.0]) * numpy.sqrt(1.5)
    axes = matplotlib.pyplot.figure().add_subplot(projection="3d")
    ax = plotting.tangent_gradient(xhat, numpy.array([1.0, 2.0, 4.0]), axes)
    circle = numpy.stack(ax.lines[0].get_data_3d())
    numpy.testing.assert_allclose(circle.sum(0), 0, atol=1e-12)
    numpy.testing.assert_allclose((circle**2).mean(0), 1)
    ends = numpy.stack(ax.lines[-1].get_data_3d())
    passed = ends[:, 1] - xhat
    numpy.testing.assert_allclose([passed.sum(), passed @ xhat], 0, atol=1e-9)


def test_intervals_shows_students_interval_for_every_group():
    values = numpy.array([1.0, 2.0, 3.0, 4.0])
    ax = plotting.intervals({"a": values, "b": values + 1}, ["batch", "layer"])
    numpy.testing.assert_array_equal(ax.lines[0].get_xdata(), values)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    (low, high), *_ = ax.collections[0].get_segments()
    half = 3.1824 * values.std(ddof=1) / 2  # t for 95 % and 3 degrees
    numpy.testing.assert_allclose(
        [low[0], high[0]], [2.5 - half, 2.5 + half], rtol=1e-4
    )


def test_verdicts_says_yes_where_it_holds():
    holds = [[True, False, False], [False, False, True]]
    ax = plotting.verdicts(holds, ["a", "b"], ["x", "y", "z"])
    words = [text.get_text() for text in ax.texts]
    assert words == ["yes", "no", "no", "no", "no", "yes"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    dark = matplotlib.colors.to_rgba(plotting.COLORS["batch"])
    colors = [patch.get_facecolor() == dark for patch in ax.patches]
    assert colors == [True, False, False, False, False, True]


def test_pictures_shows_every_image_with_its_title():
    images = {name: numpy.full((3, 4, 5), 2.0) for name in "abcd"}
    axes = plotting.pictures(images, columns=3)
    assert [ax.get_title() for ax in axes] == list("abcd")
    for ax in axes:
        shown = ax.images[0].get_array()
        assert shown.shape == (4, 5, 3)
        assert shown.max() == 1


def test_error_curves_show_errors_laws_and_what_has_no_logarithm():
    x = numpy.array([1.0, 10.0, 100.0])
    errors = numpy.array([0.0, 1e-3, numpy.nan])
    ax = plotting.error_curves(
        x, {"one": ("batch", errors)}, {"law": ("batch", x**2)}
    )
    law, line = ax.lines
    numpy.testing.assert_array_equal(law.get_ydata(), x**2)
    numpy.testing.assert_array_equal(
        line.get_ydata(), [1e-16, 1e-3, numpy.nan]
    )
    assert [t.get_text() for t in ax.get_legend().texts] == ["one"]


def test_roofline_is_as_high_as_memory_and_arithmetic_allow():
    ax = plotting.roofline(100.0, 10.0, {"norm": ("layer", 1.0, 8.0)})
    roof, point = ax.lines
    x, y = roof.get_data()
    numpy.testing.assert_allclose(y, numpy.minimum(10.0 * x, 100.0))
    assert x[1] == 10.0
    numpy.testing.assert_array_equal(point.get_xydata(), [[1.0, 8.0]])


def test_speed_ratios_show_a_dot_for_what_was_measured():
    ratios = {"a": {"us": 2.0, "them": 0.5}, "b": {"us": 1.5}}
    names = {"us": ("batch", "ours"), "them": ("none", "theirs")}
    ax = plotting.speed_ratios(ratios, names)
    ours, theirs, one = ax.lines
    numpy.testing.assert_array_equal(ours.get_xydata(), [[2.0, 0], [1.5, 1]])
    numpy.testing.assert_array_equal(theirs.get_xydata(), [[0.5, 0]])
    assert list(one.get_xdata()) == [1, 1]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
