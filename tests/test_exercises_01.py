"""The checks of chapter 1 pass what is right and catch what is often wrong."""

import numpy
import pytest

from normlib.exercises import check, passes


def scale_of(x):
    std = x.std(0)
    tiny = 10 * numpy.finfo(x.dtype).eps * numpy.abs(x).max(0)
    return numpy.where(std <= tiny, 1.0, std)


def standardize(train, test):
    mean, scale = train.mean(0), scale_of(train)
    return (train - mean) / scale, (test - mean) / scale


def prepare(x, y, train, test, keep=2):
    z_train, z_test = standardize(x[train], x[test])
    score = numpy.abs(z_train.T @ (y[train] - y[train].mean()))
    best = numpy.argsort(-score)[:keep]
    return z_train[:, best], z_test[:, best]


def prepare_by_all_labels(x, y, train, test, keep=2):
    z_train, z_test = standardize(x[train], x[test])
    z = (x - x.mean(0)) / x.std(0)
    best = numpy.argsort(-numpy.abs(z.T @ (y - y.mean())))[:keep]
    return z_train[:, best], z_test[:, best]


def prepare_by_all_rows(x, y, train, test, keep=2):
    z = (x - x.mean(0)) / x.std(0)
    score = numpy.abs(z[train].T @ (y[train] - y[train].mean()))
    best = numpy.argsort(-score)[:keep]
    return z[train][:, best], z[test][:, best]


def whiten(x):
    x = x - x.mean(0)
    values, vectors = numpy.linalg.eigh(x.T @ x / len(x))
    return x @ vectors / numpy.sqrt(values)


def whiten_by_eigenvalues(x):
    x = x - x.mean(0)
    values, vectors = numpy.linalg.eigh(x.T @ x / len(x))
    return x @ vectors / values


def orthonormal_noise(x):
    q = numpy.random.default_rng(0).normal(size=x.shape)
    return whiten(q)


RIGHT = {
    "ch1-standardize": standardize,
    "ch1-largest-rate": lambda h: 2 / numpy.linalg.eigvalsh(h)[-1],
    "ch1-leak": prepare,
    "ch1-original-units": lambda w, b, mean, std: (
        w / std,
        b - (w / std) @ mean,
    ),
    "ch1-whiten": whiten,
}

WRONG = [
    (
        "ch1-standardize",
        lambda a, b: ((a - a.mean(0)) / a.var(0), (b - a.mean(0)) / a.var(0)),
        "z_train at",
    ),
    (
        "ch1-standardize",
        lambda a, b: ((a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)),
        "z_test at",
    ),
    (
        "ch1-standardize",
        lambda a, b: ((a - a.mean(0)) / a.std(0), (b - a.mean(0)) / a.std(0)),
        "NaN or infinity",
    ),
    (
        "ch1-standardize",
        lambda a, b: tuple(
            (x - a.mean(0)) / numpy.where(a.std(0) == 0, 1, a.std(0))
            for x in (a, b)
        ),
        "41 times 0.1",
    ),
    ("ch1-standardize", lambda a, b: a, "expected two values"),
    (
        "ch1-largest-rate",
        lambda h: 1 / numpy.linalg.eigvalsh(h)[-1],
        "it should grow",
    ),
    ("ch1-largest-rate", lambda h: 2 / h.diagonal().max(), "it should shrink"),
    (
        "ch1-largest-rate",
        lambda h: 2 / numpy.linalg.eigvalsh(h)[0],
        "it should shrink",
    ),
    ("ch1-largest-rate", lambda h: -1.0, "positive"),
    ("ch1-leak", prepare_by_all_rows, "after one test row was changed"),
    ("ch1-leak", prepare_by_all_labels, "z_train"),
    (
        "ch1-leak",
        lambda x, y, train, test: (
            prepare(x, y, train, test)[0],
            standardize(x[test], x[test])[0][:, :2],
        ),
        "another test row",
    ),
    ("ch1-leak", lambda x, y, train, test: (x[train], x[test]), "z_train has"),
    (
        "ch1-original-units",
        lambda w, b, mean, std: (w / std, b),
        "logit of a row",
    ),
    (
        "ch1-original-units",
        lambda w, b, mean, std: (w * std, b - w @ mean),
        "logit of a row",
    ),
    ("ch1-original-units", lambda w, b, mean, std: (w[:2], b), "(2,)"),
    ("ch1-whiten", lambda x: (x - x.mean(0)) / x.std(0), "covariance"),
    ("ch1-whiten", whiten_by_eigenvalues, "covariance"),
    ("ch1-whiten", lambda x: whiten(x) + 1, "mean"),
    ("ch1-whiten", orthonormal_noise, "affine map"),
]


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_the_right_answer_passes(name):
    assert passes(name, RIGHT[name])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "answer", "said"),
    WRONG,
    ids=[f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)],
)
def test_a_usual_wrong_answer_fails_and_hears_why(name, answer, said, capsys):
    check(name, answer)
    heard = capsys.readouterr().out
    assert heard.startswith(f"wrong: {name}: ")
    assert said in heard
    assert heard.count("\n") == 1


def test_whitening_may_rotate_back():
    def zca(x):
        x = x - x.mean(0)
        values, vectors = numpy.linalg.eigh(x.T @ x / len(x))
        return x @ vectors / numpy.sqrt(values) @ vectors.T

    assert passes("ch1-whiten", zca)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_every_exercise_has_two_hints_and_can_stay_open(name, capsys):
    check(name, None, hint=2)
    heard = capsys.readouterr().out
    assert heard.startswith(f"open:  {name}")
    assert "Hint 2 of" in heard


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_an_answer_that_raises_is_wrong_and_named(name, capsys):
    check(name, lambda *args: 1 / 0)
    assert "raised ZeroDivisionError" in capsys.readouterr().out
