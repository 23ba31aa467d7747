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
