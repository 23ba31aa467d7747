"""What the chapters say of their data."""

import subprocess
import sys

import numpy
import pytest

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


FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def records(tmp_path):
    """Two images in each file, and the folder they are in."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    drawn = generator.integers(0, 256, (6, 2, 3073), dtype=numpy.uint8)
    drawn[:, :, 0] %= 10
    for name, part in zip(FILES, drawn, strict=True):
        part.tofile(folder / name)
    return drawn, folder


def test_cifar10_is_read_record_by_record(records):
    drawn, folder = records
    for where in (folder, folder.parent, str(folder)):
        found = data.cifar10(where)
        assert found.x_train.shape == (10, 3, 32, 32)
        assert found.x_test.shape == (2, 3, 32, 32)
        assert found.x_train.dtype == numpy.uint8
        assert found.y_train.dtype == numpy.int64
        numpy.testing.assert_array_equal(
            found.y_train, drawn[:5, :, 0].ravel()
        )
        # The second file's first image: green, row 3, column 5.
        pixel = drawn[1, 0, 1 + 1024 + 3 * 32 + 5]
        assert found.x_train[2, 1, 3, 5] == pixel
        assert found.y_test[1] == drawn[5, 1, 0]


def test_where_cifar10_is_missing_the_error_says_how_to_get_it(records):
    _, folder = records
    (folder / "data_batch_3.bin").unlink()
    told = r"data_batch_3.bin is missing.*\n.*curl .*cifar-10-binary.tar.gz"
    with pytest.raises(FileNotFoundError, match=told):
        data.cifar10(folder.parent)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\0" * 3072, "3072 bytes: not a multiple of 3073"),
        (b"", "0 bytes"),
        (b"\x0b" + b"\0" * 3072, "label of 11"),
    ],
)
def test_a_file_that_is_not_cifar10_is_refused(records, content, told):
    _, folder = records
    (folder / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        data.cifar10(folder)


def test_cifar10_needs_no_scikit_learn():
    code = (
        "import sys; from normlib import data, training; "
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
