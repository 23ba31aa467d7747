"""The devices that the tests run on."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some versions call the name an old one
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no CUDA device"
            ),
        ],
    ),
]

over_devices = pytest.mark.parametrize("device", DEVICES)
over_dtypes = pytest.mark.parametrize(
    ("dtype", "mean"),
    [
        (torch.float64, 1e4),
        (torch.float32, 0.5),
        (torch.float32, 1e4),
        (torch.bfloat16, 0.5),  # 16 bits hold no values far from zero
        (torch.float16, 0.5),
    ],
    ids=str,
)
