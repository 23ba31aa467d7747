"""Answers to the exercises of chapter 1, right and wrong."""

import numpy


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


def zca(x):
    x = x - x.mean(0)
    values, vectors = numpy.linalg.eigh(x.T @ x / len(x))
    return x @ vectors / numpy.sqrt(values) @ vectors.T


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

ALSO_RIGHT = {"ch1-whiten": {"rotated back": zca}}

WRONG = {
    "ch1-standardize": {
        "divided by the variance": lambda a, b: (
            (a - a.mean(0)) / a.var(0),
            (b - a.mean(0)) / a.var(0),
        ),
        "the test part by itself": lambda a, b: (
            (a - a.mean(0)) / a.std(0),
            (b - b.mean(0)) / b.std(0),
        ),
        "a constant column": lambda a, b: (
            (a - a.mean(0)) / a.std(0),
            (b - a.mean(0)) / a.std(0),
        ),
        "a column that is nearly constant": lambda a, b: tuple(
            (x - a.mean(0)) / numpy.where(a.std(0) == 0, 1, a.std(0))
            for x in (a, b)
        ),
        "one array": lambda a, b: a,
    },
    "ch1-largest-rate": {
        "half of it": lambda h: 1 / numpy.linalg.eigvalsh(h)[-1],
        "the diagonal alone": lambda h: 2 / h.diagonal().max(),
        "the flat direction": lambda h: 2 / numpy.linalg.eigvalsh(h)[0],
        "negative": lambda h: -1.0,
    },
    "ch1-leak": {
        "statistics of all rows": prepare_by_all_rows,
        "labels of all rows": prepare_by_all_labels,
        "the test part by itself": lambda x, y, train, test: (
            prepare(x, y, train, test)[0],
            standardize(x[test], x[test])[0][:, :2],
        ),
        "nothing prepared": lambda x, y, train, test: (x[train], x[test]),
    },
    "ch1-original-units": {
        "the bias as it was": lambda w, b, mean, std: (w / std, b),
        "the other way": lambda w, b, mean, std: (w * std, b - w @ mean),
        "some weights": lambda w, b, mean, std: (w[:2], b),
    },
    "ch1-whiten": {
        "standardized": lambda x: (x - x.mean(0)) / x.std(0),
        "divided by the eigenvalues": whiten_by_eigenvalues,
        "not centered": lambda x: whiten(x) + 1,
        "white noise": orthonormal_noise,
    },
}

SAID = {
    "ch1-standardize": {
        "divided by the variance": "z_train at",
        "the test part by itself": "z_test at",
        "a constant column": "NaN or infinity",
        "a column that is nearly constant": "41 times 0.1",
        "one array": "expected two values",
    },
    "ch1-largest-rate": {
        "half of it": "it should grow",
        "the diagonal alone": "it should shrink",
        "the flat direction": "it should shrink",
        "negative": "positive",
    },
    "ch1-leak": {
        "statistics of all rows": "after one test row was changed",
        "labels of all rows": "z_train",
        "the test part by itself": "another test row",
        "nothing prepared": "z_train has",
    },
    "ch1-original-units": {
        "the bias as it was": "logit of a row",
        "the other way": "logit of a row",
        "some weights": "(2,)",
    },
    "ch1-whiten": {
        "standardized": "covariance",
        "divided by the eigenvalues": "covariance",
        "not centered": "mean",
        "white noise": "affine map",
    },
}
