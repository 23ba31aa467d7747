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
