"""What the chapters say of their data."""

import numpy

from normlib import data


def test_small_photographs_are_means_of_blocks():
    large, small = data.sample_images(1), data.sample_images(6)
    assert list(small) == ["temple", "flower"]
    for name, image in small.items():
        assert image.shape == (3, 427 // 6, 640 // 6)
        assert 0 <= image.min() < image.max() <= 1
        block = large[name][:, 12:18, 6:12]
        numpy.testing.assert_allclose(image[:, 2, 1], block.mean((1, 2)))


def test_slow_digits_show_each_row_several_times_and_the_others_once():
    digits = data.split(data.digits())
    slow = data.read_slowly(digits, share=0.3, times=3)
    assert slow.x_train.shape == (len(digits.x_train), 24, 9)
    length = slow.x_train[:, :, 8].sum(1)
    assert set(length) == {8, 24}
    assert 0.25 < (length == 24).mean() < 0.35
    for index in (length.argmin(), length.argmax()):
        times = int(length[index]) // 8
        rows = digits.x_train[index].reshape(8, 8).repeat(times, axis=0)
        sequence = slow.x_train[index]
        numpy.testing.assert_array_equal(sequence[: 8 * times, :8], rows)
        assert (sequence[8 * times :] == 0).all()
    assert (slow.x_test[:, :, 8] == 1).all()
    numpy.testing.assert_array_equal(slow.y_test, digits.y_test)


def test_which_digits_are_slow_follows_the_seed():
    digits = data.split(data.digits())
    first, again, other = (
        data.read_slowly(digits, 0.3, 2, seed=seed).x_train[:, -1, 8]
        for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()
