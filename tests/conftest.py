"""What holds for every test."""

import sys

import pytest

from normlib import backends


@pytest.fixture(autouse=True)
def forgetful_compiler():
    """Let no test meet what torch.compile remembers of another.

    It counts the shapes that it has compiled a function for, and after a few
    leaves that function alone: one that models share, such as the forward of
    Sequential, would no longer be compiled for anybody.
    """
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(params=[*backends.available(), "default"])
def backend(request, monkeypatch):
    """Each backend forced, and the choice as it is made for large inputs."""
    monkeypatch.setattr(backends, "LEAST", 0)
    if request.param == "default":
        yield None
        return
    with backends.use_backend(request.param):
        yield request.param
