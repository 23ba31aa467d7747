"""Every normalization is one formula over a different set of axes.

Layers with the constructors, keys and errors of torch.nn:
:class:`BatchNorm1d`, :class:`BatchNorm2d` and :class:`BatchNorm3d`, and
:class:`BatchNorm` for any rank; :class:`InstanceNorm1d`,
:class:`InstanceNorm2d`, :class:`InstanceNorm3d`, :class:`GroupNorm`,
:class:`LayerNorm`, :class:`RMSNorm`. With the residual addition before
them: :class:`AddLayerNorm`, :class:`AddRMSNorm`; with the activation behind
any of them: :class:`NormActivation`. The same as functions:
:mod:`normlib.functional`. The mathematics in NumPy, with the gradients by
hand: :mod:`normlib.reference`. What torch.nn has not:
:mod:`normlib.variants`. Batch norm at test time: :mod:`normlib.inference`.
From torch.nn and other libraries, and back: :mod:`normlib.convert`.
"""

from normlib import (
    axes,
    backends,
    convert,
    functional,
    inference,
    reference,
    stats,
    variants,
)
from normlib.backends import use_backend
from normlib.modules import (
    AddLayerNorm,
    AddRMSNorm,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    NormActivation,
    RMSNorm,
)

__version__ = "0.1.0"

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "NormActivation",
    "RMSNorm",
    "axes",
    "backends",
    "convert",
    "functional",
    "inference",
    "reference",
    "stats",
    "use_backend",
    "variants",
]
