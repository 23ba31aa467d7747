"""The data of the chapters: scikit-learn's bundled sets, nothing downloaded.

Needs scikit-learn (``pip install "normlib[course]"``).
"""

from typing import NamedTuple

import numpy
from sklearn import datasets
from sklearn.model_selection import train_test_split


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
    """
    return _table(datasets.load_breast_cancer())


def wine() -> Table:
    """178 wines, 13 chemical features, three cultivars (0, 1, 2)."""
    return _table(datasets.load_wine())


def digits() -> Table:
    """1797 handwritten digits, 64 pixels (8 by 8) scaled to [0, 1]."""
    table = _table(datasets.load_digits())
    return table._replace(x=table.x / 16.0)


def sample_images(every: int = 6) -> dict[str, numpy.ndarray]:
    """Two photographs, ``temple`` and ``flower``, made small.

    Args:
        every: how many pixels become one, in both directions (their mean).

    Returns:
        Name to pixels in [0, 1], shape (3, H, W), float64.

    Chapter 5.
    """
    found = datasets.load_sample_images()
    images = dict(zip(("temple", "flower"), found.images, strict=True))
    return {name: _shrunk(image, every) for name, image in images.items()}


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


def split(table: Table, test_size: float = 0.25, seed: int = 0) -> Split:
    """Cut a table into a training and a test part, stratified by class.

    Args:
        table: the examples.
        test_size: share of the examples in the test part.
        seed: of the shuffle.

    Returns:
        The four arrays as a :class:`Split`.
    """
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
