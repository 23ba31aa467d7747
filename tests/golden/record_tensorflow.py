"""Record what TensorFlow and Keras compute, for tests/test_tensorflow.py.

TensorFlow is no dependency of this project. To record again, in a fresh
environment of its own:

    pip install tensorflow-cpu
    python tests/golden/record_tensorflow.py
"""

import json
import pathlib
from datetime import UTC, datetime

import keras
import numpy
import tensorflow as tf

SHAPES = {"dense": ((7, 5), [0]), "image": ((3, 4, 5, 6), [0, 1, 2])}


def case(shape, axes, seed):
    """One input, what tf.nn and a Keras layer make of it."""
    rng = numpy.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, shape)
    offset, scale = rng.normal(size=(2, shape[-1]))
    mean, variance = tf.nn.moments(tf.constant(x), axes)
    kept = tf.nn.moments(tf.constant(x), axes, keepdims=True)
    y = tf.nn.batch_normalization(
        tf.constant(x), mean, variance, offset, scale, 1e-3
    )
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer.build(shape)
    layer.gamma.assign(scale)
    layer.beta.assign(offset)
    trained = layer(x, training=True)
    evaluated = layer(x, training=False)
    arrays = {
        "x": x,
        "offset": offset,
        "scale": scale,
        "mean": mean,
        "variance": variance,
        "y": y,
        "keras_training": trained,
        "keras_moving_mean": layer.moving_mean,
        "keras_moving_variance": layer.moving_variance,
        "keras_evaluation": evaluated,
    }
    record = {k: numpy.asarray(v).tolist() for k, v in arrays.items()}
    return record | {
        "axes": axes,
        "variance_epsilon": 1e-3,
        "keepdims_shape": list(kept[0].shape),
        "keras_momentum": layer.momentum,
        "keras_epsilon": layer.epsilon,
    }


if __name__ == "__main__":
    origin = {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": numpy.__version__,
        "dtype": "float64",
        "date": datetime.now(UTC).date().isoformat(),
        "script": "tests/golden/record_tensorflow.py",
    }
    cases = {
        name: case(shape, axes, seed)
        for seed, (name, (shape, axes)) in enumerate(SHAPES.items())
    }
    path = pathlib.Path(__file__).with_name("tensorflow.json")
    path.write_text(json.dumps({"origin": origin, "cases": cases}) + "\n")
    print(path, origin)
