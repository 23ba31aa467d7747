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
