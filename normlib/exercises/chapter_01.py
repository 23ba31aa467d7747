"""Checks of chapter 1: normalizing the inputs of logistic regression."""

import numpy

from normlib.exercises import exercise

_GENERATOR = 20


def _draws(count):
    return [numpy.random.default_rng(_GENERATOR + i) for i in range(count)]


def _table(generator, rows, columns):
    """Random correlated columns of very different means and spreads."""
    x = generator.normal(size=(rows, columns))
    x = x @ generator.normal(size=(columns, columns))
    scale = 10.0 ** generator.integers(-3, 4, size=columns)
    return x * scale + generator.normal(size=columns) * scale * 5


def _near(actual, expected, what, tolerance=1e-6):
    actual = numpy.asarray(actual, dtype=numpy.float64)
    expected = numpy.asarray(expected, dtype=numpy.float64)
    assert actual.shape == expected.shape, (
        f"{what} has shape {actual.shape}, expected {expected.shape}"
    )
    assert numpy.isfinite(actual).all(), f"{what} holds NaN or infinity"
    gap = numpy.abs(actual - expected)
    if gap.size and gap.max() > tolerance * max(1, numpy.abs(expected).max()):
        at = tuple(int(i) for i in numpy.argwhere(gap == gap.max())[0])
        raise AssertionError(
            f"{what} at {at} is {actual[at]:.6g}, expected {expected[at]:.6g}"
        )


def _pair(answer, what):
    got = type(answer).__name__
    assert isinstance(answer, (tuple, list)), (
        f"expected two values, {what}; got {got}"
    )
    assert len(answer) == 2, f"expected two values, {what}; got {len(answer)}"
    return answer


@exercise(
    "ch1-standardize",
    "Which rows may the mean and the standard deviation see?",
    "A constant column has the standard deviation 0. What number can stand "
    "in for it, so that the column becomes 0?",
    "The mean of 0.1, 0.1, ... is not exactly 0.1 in floating point, so the "
    "computed standard deviation is about 1e-17, not 0. Compare it with the "
    "size of the column's numbers.",
)
def standardize(answer):
    """``standardize(x_train, x_test)`` by the training rows only."""
    for generator in _draws(5):
        train, test = _table(generator, 40, 4), _table(generator, 3, 4)
        mean, std = train.mean(0), train.std(0)
        z_train, z_test = _pair(
            answer(train.copy(), test.copy()), "z_train and z_test"
        )
        _near(z_train, (train - mean) / std, "z_train")
        _near(z_test, (test - mean) / std, "z_test")
    for constant in (0.0, 7.0, 0.1, -1e6 / 3):
        train = numpy.column_stack(
            [numpy.full(41, constant), numpy.arange(41.0)]
        )
        test = numpy.array([[constant, 1.0], [constant + 2, 2.0]])
        with numpy.errstate(all="ignore"):
            z_train, z_test = answer(train.copy(), test.copy())
        what = f"the column of 41 times {constant:g}"
        _near(z_train[:, 0], numpy.zeros(41), what)
        _near(z_test[:, 0], [0.0, 2.0], f"z_test beside {what}")


@exercise(
    "ch1-largest-rate",
    "Along an eigenvector with eigenvalue h, a step multiplies the distance "
    "to the minimum by 1 - rate * h. When is that between -1 and 1?",
    "The steepest direction breaks first: it is the largest eigenvalue that "
    "counts, and not the largest entry of the matrix.",
    "numpy.linalg.eigvalsh returns the eigenvalues of a symmetric matrix, "
    "the largest last.",
)
def largest_rate(answer):
    """``largest_rate(hessian)``: beyond it gradient descent diverges."""
    for generator in _draws(5):
        a = generator.normal(size=(12, 3)) + generator.normal(size=3)
        hessian = a.T @ a / 48
        top = numpy.linalg.eigvalsh(hessian)[-1]
        rate = float(answer(hessian.copy()))
        assert rate > 0, f"a learning rate is positive, got {rate:.6g}"
        for factor, stays in ((0.99, True), (1.01, False)):
            growth = abs(1 - factor * rate * top)
            assert (growth <= 1) == stays, (
                f"at {factor} times your rate ({rate:.4g}) the steepest "
                f"direction is multiplied by {growth:.4g} a step: it should "
                f"{'shrink' if stays else 'grow'}"
            )


@exercise(
    "ch1-leak",
    "Follow each number that is computed from more than one row: which rows "
    "does it see?",
    "There are two leaks. The second one reads the labels of the test rows.",
    "Cut first: x[train] and y[train] decide mean, std and columns; x[test] "
    "only follows.",
)
def leak(answer):
    """``prepare(x, y, train, test)``: nothing of the test rows leaks."""
    for generator in _draws(5):
        x = _table(generator, 30, 6)
        y = generator.integers(0, 2, size=30)
        order = generator.permutation(30)
        train, test = order[:20], order[20:]

        def run(x, y, train=train, test=test):
            z = _pair(
                answer(x.copy(), y.copy(), train, test), "z_train and z_test"
            )
            return [numpy.asarray(part, dtype=numpy.float64) for part in z]

        z_train, z_test = run(x, y)
        changed = x.copy()
        changed[test[0]] = 1e3 * (1 + numpy.abs(x).max(0))
        other_train, other_test = run(changed, y)
        _near(other_train, z_train, "z_train, after one test row was changed,")
        _near(
            other_test[1:],
            z_test[1:],
            "another test row, after one test row was changed,",
        )
        flipped = y.copy()
        flipped[test] = 1 - flipped[test]
        other_train, other_test = run(x, flipped)
        what = "after the test labels were flipped,"
        _near(other_train, z_train, f"z_train, {what}")
        _near(other_test, z_test, f"z_test, {what}")
        columns = _selected(x[train], y[train])
        mean, std = x[train].mean(0), x[train].std(0)
        z = ((x - mean) / std)[:, columns]
        _near(z_train, z[train], "z_train")
        _near(z_test, z[test], "z_test")


def _selected(x, y, keep=2):
    z = (x - x.mean(0)) / x.std(0)
    score = numpy.abs(z.T @ (y - y.mean()))
    return numpy.argsort(-score)[:keep]


@exercise(
    "ch1-original-units",
    "Write the logit with z = (x - mean) / std put in, and collect what "
    "multiplies each x.",
    "What is left, and multiplies no x, belongs to the bias.",
)
def original_units(answer):
    """``original_units(w, b, mean, std)``: the same model on raw inputs."""
    for generator in _draws(5):
        x = _table(generator, 20, 4)
        mean, std = x.mean(0), x.std(0)
        w, b = generator.normal(size=4), generator.normal()
        w_raw, b_raw = _pair(
            answer(w.copy(), float(b), mean.copy(), std.copy()),
            "weights and bias",
        )
        w_raw = numpy.asarray(w_raw, dtype=numpy.float64)
        assert w_raw.shape == (4,), (
            f"the weights have shape {w_raw.shape}, expected (4,)"
        )
        expected = (x - mean) / std @ w + b
        _near(x @ w_raw + float(b_raw), expected, "the logit of a row")


@exercise(
    "ch1-whiten",
    "Center first. Then rotate to the axes of the covariance: its "
    "eigenvectors, from numpy.linalg.eigh.",
    "Along an eigenvector with eigenvalue h the variance is h. By what must "
    "the coordinate be divided so that its variance is 1?",
)
def whiten(answer):
    """``whiten(x)``: uncorrelated columns of variance 1, an affine map."""
    for generator in _draws(5):
        x = generator.normal(size=(50, 3)) @ generator.normal(size=(3, 3))
        x = x * [0.1, 1, 10] + [5, -3, 1]
        white = numpy.asarray(answer(x.copy()), dtype=numpy.float64)
        _near(white.mean(0), numpy.zeros(3), "the mean of the columns")
        _near(
            white.T @ white / 50, numpy.eye(3), "the covariance of the columns"
        )
        ones = numpy.column_stack([x, numpy.ones(50)])
        fit = ones @ numpy.linalg.lstsq(ones, white, rcond=None)[0]
        _near(white, fit, "an output, as an affine map of its row,")
