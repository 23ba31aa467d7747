import pytest

from normlib import axes
from normlib.axes import View, channel_view, stat_axes, trailing_view


def test_a_channel_is_a_group_of_its_own_by_default():
    assert channel_view((8, 6, 4, 5)) == View(8, 6, 1, 20)


def test_groups_cut_the_channels():
    assert channel_view((8, 6, 4, 5), 2) == View(8, 2, 3, 20)


def test_a_dense_layer_has_one_position():
    assert channel_view((8, 6)) == View(8, 6, 1, 1)


def test_trailing_axes_are_the_channels_of_one_group():
    assert trailing_view((2, 3, 4, 5), (4, 5)) == View(6, 1, 20, 1)


@pytest.mark.parametrize("groups", [4, 5, 0, -1])
def test_groups_must_divide_the_channels(groups):
    with pytest.raises(ValueError, match=f"num_channels=6.*{groups}"):
        channel_view((2, 6, 3), groups)


def test_one_axis_has_no_channels():
    with pytest.raises(ValueError, match=r"at least 2 axes.*\(3,\)"):
        channel_view((3,))


@pytest.mark.parametrize("normalized", [(4,), (), (2, 3, 5, 1), (1, 2, 3, 5)])
def test_the_shape_must_end_in_the_normalized_shape(normalized):
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\)"):
        trailing_view((2, 3, 5), normalized)


def test_an_empty_axis_makes_an_empty_view():
    assert channel_view((0, 3, 0)) == View(0, 3, 1, 0)


@pytest.mark.parametrize(
    ("over_batch", "expected"), [(True, (0, 2, 3)), (False, (2, 3))]
)
def test_only_batch_norm_averages_over_instances(over_batch, expected):
    assert stat_axes(over_batch) == expected


def test_count_is_the_number_of_values_behind_a_statistic():
    view = View(8, 2, 3, 20)
    assert view.count(over_batch=True) == 8 * 3 * 20
    assert view.count(over_batch=False) == 3 * 20


def test_the_docstring_shows_the_table():
    for name, row in axes.TABLE.items():
        line = next(
            line for line in axes.__doc__.splitlines() if line.startswith(name)
        )
        yes = {"yes": True, "no": False}
        *_, over_batch, centered = line.split()
        assert yes[over_batch] == row.over_batch
        assert yes[centered] == row.centered
