"""Record what Keras, TensorFlow and flax do, for tests/test_convert.py.

None of them is a dependency of this project. To record again, in a fresh
environment of its own:

    pip install tensorflow-cpu flax "jax[cpu]"
    python tests/golden/record_conventions.py

Every layer starts from drawn weights, sees two batches in training, and then
the first batch once more in evaluation.
"""

import inspect
import json
import pathlib
from datetime import UTC, datetime

import flax
import flax.linen
import jax
import keras
import numpy
import tensorflow as tf

SHAPES = {"dense": (5, 3), "image": (2, 3, 2, 4)}
BATCH_NORM = {
    "defaults": {},
    "other numbers": {"momentum": 0.8, "epsilon": 0.05},
    "no scale": {"scale": False},
    "no center": {"center": False},
    "neither": {"scale": False, "center": False},
    "channels first": {"axis": 1},
    "frozen": {"trainable": False},
}
KERAS_NAMES = ["gamma", "beta", "moving_mean", "moving_variance"]
OTHERS = {
    "LayerNorm": ("LayerNormalization", {}),
    "GroupNorm": ("GroupNormalization", {"groups": 3}),
    "RMSNorm": ("RMSNormalization", {}),
}


def draws(seed, shape, channels):
    """Two batches, and a scale, a shift, a mean and a variance."""
    rng = numpy.random.default_rng(seed)
    batches = [rng.normal(1.0 + i, 2.0 - i, shape) for i in range(2)]
    scale, shift, mean = rng.normal(size=(3, channels))
    return batches, [scale, shift, mean, rng.uniform(0.5, 2.0, channels)]


def listed(value):
    """Return the same with lists in the place of arrays."""
    if isinstance(value, dict):
        return {key: listed(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [listed(v) for v in value]
    if hasattr(value, "__array__"):
        return numpy.asarray(value).tolist()
    return value


def keras_batch_norm(seed, shape, arguments):
    """Train and evaluate a Keras layer; its config and weights."""
    layer = keras.layers.BatchNormalization(dtype="float64", **arguments)
    layer.build(shape)
    batches, start = draws(seed, shape, shape[layer.axis])
    drawn = dict(zip(KERAS_NAMES, start, strict=True))
    layer.set_weights([drawn[weight.name] for weight in layer.weights])
    before = layer.get_weights()
    return {
        "config": layer.get_config(),
        "names": [weight.name for weight in layer.weights],
        "batches": batches,
        "before": before,
        "training": [layer(x, training=True) for x in batches],
        "after": layer.get_weights(),
        "evaluation": layer(batches[0], training=False),
    }


def flax_batch_norm(seed, shape, arguments):
    """Train and evaluate a flax layer; its fields and variables."""
    renamed = {"scale": "use_scale", "center": "use_bias"}
    fields = {renamed.get(key, key): v for key, v in arguments.items()}
    layer = flax.linen.BatchNorm(param_dtype=numpy.float64, **fields)
    batches, start = draws(seed, shape, shape[layer.axis])
    drawn = dict(zip(["scale", "bias", "mean", "var"], start, strict=True))
    fresh = layer.init(jax.random.key(0), batches[0], use_running_average=True)
    before = {
        kind: {name: drawn[name] for name in values}
        for kind, values in fresh.items()
    }
    after, training = before, []
    for x in batches:
        y, state = layer.apply(
            after, x, use_running_average=False, mutable=["batch_stats"]
        )
        training.append(y)
        after = {**after, **state}
    return {
        "fields": {
            key: getattr(layer, key)
            for key in ("axis", "momentum", "epsilon", "use_scale", "use_bias")
        },
        "batches": batches,
        "before": before,
        "training": training,
        "after": after,
        "evaluation": layer.apply(after, batches[0], use_running_average=True),
    }


def fused_batch_norm(seed, shape):
    """One step of TensorFlow's kernel for images (float32 only)."""
    (x, _), start = draws(seed, shape, shape[-1])
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
        *(tf.constant(v, tf.float32) for v in (x, *start)),
        epsilon=1e-3,
        exponential_avg_factor=0.1,
    )
    return {
        "x": x,
        "start": start,
        "epsilon": 1e-3,
        "exponential_avg_factor": 0.1,
        "y": y,
        "mean": mean,
        "variance": variance,
    }


def other_norm(name, seed, shape):
    """What Keras' and flax' layer of this kind make of one batch."""
    keras_name, arguments = OTHERS[name]
    (x, _), (scale, shift, *_) = draws(seed, shape, shape[-1])
    layer = getattr(keras.layers, keras_name)(dtype="float64", **arguments)
    layer.build(shape)
    layer.set_weights([scale, shift][: len(layer.weights)])
    groups = {f"num_{key}": v for key, v in arguments.items()}
    linen = getattr(flax.linen, name)(param_dtype=numpy.float64, **groups)
    names = linen.init(jax.random.key(0), x)["params"]
    drawn = {"scale": scale, "bias": shift}
    params = {key: drawn[key] for key in names}
    return {
        "groups": arguments.get("groups"),
        "x": x,
        "scale": scale,
        "bias": shift if "bias" in names else None,
        "keras": {"epsilon": layer.epsilon, "y": layer(x)},
        "flax": {
            "epsilon": linen.epsilon,
            "y": linen.apply({"params": params}, x),
        },
    }


def defaults():
    """Read the defaults from the constructors' own signatures."""

    def of(function, *names):
        parameters = inspect.signature(function).parameters
        return {n: parameters[n].default for n in names if n in parameters}

    batch = ("axis", "momentum", "epsilon")
    fused = tf.compat.v1.nn.fused_batch_norm
    found = {
        "tensorflow": {
            "fused": of(fused, "epsilon", "exponential_avg_factor")
        },
        "keras": {"BatchNorm": of(keras.layers.BatchNormalization, *batch)},
        "flax": {"BatchNorm": of(flax.linen.BatchNorm, *batch)},
    }
    for name, (keras_name, _) in OTHERS.items():
        found["keras"][name] = of(getattr(keras.layers, keras_name), "epsilon")
        found["flax"][name] = of(getattr(flax.linen, name), "epsilon")
    found["flax"]["InstanceNorm"] = of(flax.linen.InstanceNorm, "epsilon")
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    cases = [
        (f"{where}, {what}", seed, shape, arguments)
        for seed, (where, shape) in enumerate(SHAPES.items())
        for what, arguments in BATCH_NORM.items()
        if where == "image" or what == "defaults"
    ]
    record = {
        "origin": {
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "flax": flax.__version__,
            "jax": jax.__version__,
            "numpy": numpy.__version__,
            "dtype": "float64; float32 for fused_batch_norm",
            "date": datetime.now(UTC).date().isoformat(),
            "script": "tests/golden/record_conventions.py",
        },
        "defaults": defaults(),
        "keras": {n: keras_batch_norm(*case) for n, *case in cases},
        "flax": {
            n: flax_batch_norm(*case)
            for n, *case in cases
            if "frozen" not in n
        },
        "fused": fused_batch_norm(2, SHAPES["image"]),
        "others": {n: other_norm(n, 3, (2, 3, 6)) for n in OTHERS},
    }
    path = pathlib.Path(__file__).with_name("conventions.json")
    path.write_text(json.dumps(listed(record)) + "\n")
    print(path, record["origin"])
