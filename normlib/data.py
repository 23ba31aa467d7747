"""The data of the chapters: scikit-learn's bundled sets, nothing downloaded.

They need scikit-learn (``pip install "normlib[course]"``). The full-size
experiments read CIFAR-10 from a folder, with NumPy alone.
"""

import pathlib
from typing import NamedTuple

import numpy


class Table(NamedTuple):
    """Examples ``x`` (n, features) in float64 and labels ``y`` (n,)."""

    x: numpy.ndarray
    y: numpy.ndarray
    feature_names: list[str]
    class_names: list[str]


class Split(NamedTuple):
    """A table cut in two, each class in the same proportion on both sides."""

    x_train: numpy.ndarray
    y_train: numpy.ndarray
    x_test: numpy.ndarray
    y_test: numpy.ndarray


def breast_cancer() -> Table:
    """569 tumors, 30 measured features, malignant (0) or benign (1).

    The features' standard deviations span five orders of magnitude: 0.003
    for ``fractal dimension error`` to 569 for ``worst area``.

    Street, Wolberg & Mangasarian (1993). Chapter 1.
    """
    return _table(_bundled("breast_cancer"))


def wine() -> Table:
    """178 wines, 13 chemical features, three cultivars (0, 1, 2).

    Aeberhard & Forina (1992). Chapter 1.
    """
    return _table(_bundled("wine"))


def digits() -> Table:
    """1797 handwritten digits, 64 pixels (8 by 8) scaled to [0, 1].

    Alpaydin & Kaynak (1998). Chapter 2.
    """
    table = _table(_bundled("digits"))
    return table._replace(x=table.x / 16.0)


def sample_images(every: int = 6) -> dict[str, numpy.ndarray]:
    """Two photographs, ``temple`` and ``flower``, made small.

    Args:
        every: how many pixels become one, in both directions (their mean).

    Returns:
        Name to pixels in [0, 1], shape (3, H, W), float64.

    Chapter 5.
    """
    found = _bundled("sample_images")
    images = dict(zip(("temple", "flower"), found.images, strict=True))
    return {name: _shrunk(image, every) for name, image in images.items()}


def _bundled(name: str):
    """One of scikit-learn's sets; it is imported only where it is needed."""
    from sklearn import datasets

    return getattr(datasets, f"load_{name}")()


def _shrunk(image: numpy.ndarray, every: int) -> numpy.ndarray:
    h, w = (size // every for size in image.shape[:2])
    blocks = image[: h * every, : w * every].reshape(h, every, w, every, 3)
    return blocks.mean((1, 3)).transpose(2, 0, 1) / 255


def read_slowly(part: Split, share: float, times: int, seed: int = 0) -> Split:
    """Digits as sequences of rows, some of which are read slowly.

    A slow digit shows each of its 8 rows several times, so its sequence is
    longer; the others are padded with zeros behind their end. A ninth
    feature is 1 while the sequence runs.

    Args:
        part: of the digits, 64 features.
        share: of slow digits in the training part. In the test part all are
            slow.
        times: how often a slow digit shows a row.
        seed: of the choice of the slow ones.

    Returns:
        The split with x of shape (n, 8 * times, 9).

    Chapter 5.
    """
    generator = numpy.random.default_rng(seed)
    slow = generator.random(len(part.x_train)) < share
    train = numpy.where(
        slow[:, None, None],
        _as_rows(part.x_train, times, 8 * times),
        _as_rows(part.x_train, 1, 8 * times),
    )
    test = _as_rows(part.x_test, times, 8 * times)
    return part._replace(x_train=train, x_test=test)


def _as_rows(x: numpy.ndarray, times: int, length: int) -> numpy.ndarray:
    rows = x.reshape(-1, 8, 8).repeat(times, axis=1)
    padded = numpy.zeros((len(x), length, 9))
    padded[:, : 8 * times, :8] = rows
    padded[:, : 8 * times, 8] = 1
    return padded


CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_FOLDER = "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


def cifar10(folder: str | pathlib.Path) -> Split:
    """The 60,000 images of CIFAR-10, from its published binary files.

    A file is a row of records: 1 byte that is the label, 0 to 9, and 3,072
    that are the pixels: red, green, blue, each row by row.

    Args:
        folder: the one in which the archive was unpacked, or
            ``cifar-10-batches-bin`` itself.

    Returns:
        x of shape (n, 3, 32, 32), uint8, and y in int64: 50,000 for training
        and 10,000 to test.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ValueError: a file does not consist of such records.

    Krizhevsky (2009). Chapter 3.
    """
    parts = [_records(pathlib.Path(folder), name) for name in _TRAIN]
    train, test = (
        numpy.concatenate(parts),
        _records(pathlib.Path(folder), "test_batch.bin"),
    )
    x, y = zip(*map(_pixels_and_labels, (train, test)), strict=True)
    return Split(x[0], y[0], x[1], y[1])


def _records(folder: pathlib.Path, name: str) -> numpy.ndarray:
    found = [p for p in (folder / _FOLDER / name, folder / name) if p.exists()]
    if not found:
        raise FileNotFoundError(
            f"{folder / _FOLDER / name} is missing. Get CIFAR-10 (162 MB) by\n"
            f"  curl -L {CIFAR10} | tar xz -C {folder}"
        )
    records = numpy.fromfile(found[0], numpy.uint8)
    if len(records) == 0 or len(records) % 3073:
        raise ValueError(
            f"{found[0]} has {len(records)} bytes: not a multiple of 3073"
        )
    records = records.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(
            f"{found[0]} has a label of {records[:, 0].max()}, above 9"
        )
    return records


def _pixels_and_labels(records: numpy.ndarray):
    pixels = records[:, 1:].reshape(-1, 3, 32, 32)
    return pixels, records[:, 0].astype(numpy.int64)


def split(table: Table, test_size: float = 0.25, seed: int = 0) -> Split:
    """Cut a table into a training and a test part, stratified by class.

    Args:
        table: the examples.
        test_size: share of the examples in the test part.
        seed: of the shuffle.

    Returns:
        The four arrays as a :class:`Split`.

    Chapter 1.
    """
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(
        table.x,
        table.y,
        test_size=test_size,
        random_state=seed,
        stratify=table.y,
    )
    return Split(x_train, y_train, x_test, y_test)


def _table(bunch) -> Table:
    return Table(
        numpy.asarray(bunch.data, dtype=numpy.float64),
        numpy.asarray(bunch.target),
        [str(name) for name in bunch.feature_names],
        [str(name) for name in bunch.target_names],
    )
