"""A small machine that runs block programs, and watches them.

A kernel in Triton is a function that many *programs* run, each on its own
block of the data. This machine runs such a function in NumPy, on any
computer: the kernel is written in Triton's words (``tl.load``, ``tl.sum``,
...), and the machine takes the place of Triton. It is slow and strict. It
counts every byte that is read and written, and it raises where a GPU would go
on with wrong numbers: where a program reads or writes beside its tensor, and
where two programs write to one place. What a masked load does not fill, and
on a GPU may be anything, is NaN here.

Chapter 10.
"""

import types
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy
import torch

SECTOR = 32
"""Bytes that a GPU's memory delivers together, wanted or not."""


class Traffic(NamedTuple):
    """What the programs of one launch moved."""

    programs: int
    """How many ran."""
    read: int
    """Bytes that they asked for."""
    written: int
    """Bytes that they wrote."""
    fetched: int
    """Bytes that the memory moved, in whole sectors of 32 bytes; each counts
    once for a load or store of a block."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def launch(
    kernel: Callable,
    grid: tuple[int, ...],
    *args: torch.Tensor | numpy.ndarray | float | None,
    **constants: object,
) -> Traffic:
    """Run a kernel for every program of a grid, one after the other.

    Args:
        kernel: a function whose global name ``tl`` means
            ``triton.language`` or :data:`language`; ``triton.jit`` of it will
            do as well. What it calls may be of the same kind.
        grid: how many programs, in up to three directions.
        args: the kernel's arguments. Tensors and arrays, contiguous and on
            the CPU, are passed as pointers, and written to in place.
        constants: its compile-time arguments; ``num_warps`` and
            ``num_stages`` are left out.

    Returns:
        What was moved.

    Raises:
        IndexError: a program reads or writes outside of a tensor.
        RuntimeError: two programs write to the same value.
        ValueError: a tensor is not contiguous, or of a dtype that NumPy does
            not have; a block's size is not a power of two.
    """
    given = [_pointer(arg) for arg in args]
    pointers = [p for p in given if isinstance(p, _Pointer)]
    for name in ("num_warps", "num_stages"):
        constants.pop(name, None)
    run = _translated(kernel)
    count = 0
    for at in product(*(range(size) for size in reversed(grid))):
        language.place = (*reversed(at), 0, 0)[:3], (*grid, 1, 1)[:3], count
        run(*given, **constants)
        count += 1
    tolls = [p.buffer.toll for p in pointers]
    read, written, fetched = (sum(t[i] for t in tolls) for i in range(3))
    return Traffic(count, read, written, fetched)


class _Buffer:
    """A tensor as memory: who wrote where, and how many bytes were moved."""

    def __init__(self, data):
        self.data = data
        self.writer = numpy.full(data.size, -1)
        self.toll = [0, 0, 0]

    def pay(self, kind, at):
        self.toll[kind] += at.size * self.data.itemsize
        sectors = numpy.unique(at * self.data.itemsize // SECTOR)
        self.toll[2] += sectors.size * SECTOR

    def check(self, at, verb):
        outside = at[(at < 0) | (at >= self.data.size)]
        if outside.size:
            raise IndexError(
                f"program {language.place[2]} {verb} value {outside[0]} of a "
                f"tensor with {self.data.size}: a mask is missing or wrong"
            )

    def claim(self, at):
        me = language.place[2]
        others = self.writer[at]
        clash = (others >= 0) & (others != me)
        if clash.any():
            raise RuntimeError(
                f"programs {others[clash][0]} and {me} both write value "
                f"{at[clash][0]}: chance decides which one stays"
            )
        self.writer[at] = me


class _Type(NamedTuple):
    element_ty: numpy.dtype


class _Pointer:
    """A buffer and where in it: one place, or a block of places."""

    __array_ufunc__ = None  # so that a block plus a pointer is a pointer

    def __init__(self, buffer, at=0):
        self.buffer = buffer
        self.at = at

    @property
    def dtype(self):
        return _Type(self.buffer.data.dtype)

    def __add__(self, steps):
        return _Pointer(self.buffer, self.at + steps)

    __radd__ = __add__


class _Block(numpy.ndarray):
    """Values in a program's registers; a number is a block of none."""

    def to(self, dtype):
        return self.astype(dtype)

    # In Triton `a += b` gives the name a to a new block.
    def __iadd__(self, other):
        return self + other

    def __isub__(self, other):
        return self - other

    def __imul__(self, other):
        return self * other

    def __itruediv__(self, other):
        return self / other


def _block(values):
    return numpy.asarray(values).view(_Block)


class _Language:
    """The words of ``triton.language`` that the norms need."""

    float16, float32, float64 = numpy.float16, numpy.float32, numpy.float64
    int32, int64 = numpy.int32, numpy.int64
    constexpr = object

    def __init__(self):
        self.place = ((0, 0, 0), (1, 1, 1), 0)
        self.math = self

    def program_id(self, axis):
        return _block(self.place[0][axis])

    def num_programs(self, axis):
        return _block(self.place[1][axis])

    def range(self, *ends, num_stages=None):
        return map(_block, range(*ends))

    def arange(self, start, end):
        size = end - start
        if size & (size - 1) or size < 1:
            raise ValueError(
                f"the size of a block is a power of two, got {size}"
            )
        return _block(numpy.arange(start, end))

    def zeros(self, shape, dtype):
        return _block(numpy.zeros(shape, dtype))

    def load(self, pointer, mask=None, other=None):
        buffer, at, wanted = _lanes(pointer, mask)
        buffer.check(at[wanted], "reads")
        buffer.pay(0, at[wanted])
        if other is None:  # on a GPU it may be anything
            other = numpy.nan if buffer.data.dtype.kind == "f" else 0
        values = numpy.full(at.shape, other, buffer.data.dtype)
        values[wanted] = buffer.data[at[wanted]]
        return _block(values)

    def store(self, pointer, value, mask=None):
        buffer, at, wanted = _lanes(pointer, mask)
        buffer.check(at[wanted], "writes")
        buffer.claim(at[wanted])
        buffer.pay(1, at[wanted])
        buffer.data[at[wanted]] = numpy.broadcast_to(value, at.shape)[wanted]

    def sum(self, x, axis=None, keep_dims=False):
        return _block(numpy.sum(x, axis, keepdims=keep_dims))

    def max(self, x, axis=None, keep_dims=False):
        return _block(numpy.max(x, axis, keepdims=keep_dims))

    def where(self, condition, x, y):
        found = numpy.where(condition, x, y)
        given = [v.dtype for v in (x, y) if isinstance(v, numpy.ndarray)]
        return _block(found.astype(numpy.result_type(*given or [found])))

    def cdiv(self, a, b):
        return -(-a // b)

    def rsqrt(self, x):
        return _block(1 / numpy.sqrt(x))

    def _elementwise(function):
        return lambda self, *values: _block(function(*values))

    sqrt, exp, abs = map(_elementwise, (numpy.sqrt, numpy.exp, numpy.abs))
    minimum, maximum = map(_elementwise, (numpy.minimum, numpy.maximum))


language = _Language()
"""What ``tl`` means on this machine."""


def _lanes(pointer, mask):
    at = numpy.asarray(pointer.at)
    shape = numpy.broadcast_shapes(at.shape, numpy.shape(mask))
    at = numpy.broadcast_to(at, shape)
    wanted = numpy.broadcast_to(True if mask is None else mask, shape)
    return pointer.buffer, at, wanted


def _pointer(arg):
    if isinstance(arg, torch.Tensor):
        if not arg.is_contiguous() or arg.dtype == torch.bfloat16:
            raise ValueError(
                "expected a contiguous tensor of a dtype that NumPy has, got "
                f"strides {arg.stride()}, {arg.dtype}"
            )
        arg = arg.detach().numpy()
    if isinstance(arg, numpy.ndarray):
        if not arg.flags.c_contiguous:
            raise ValueError(
                f"expected a contiguous array, got strides {arg.strides}"
            )
        return _Pointer(_Buffer(arg.reshape(-1)))
    return arg


def _translated(kernel):
    """The kernel with this machine in the place of Triton."""
    function = getattr(kernel, "fn", kernel)
    world = {
        name: _translated(value) if hasattr(value, "fn") else value
        for name, value in function.__globals__.items()
        if not isinstance(value, type) and name in function.__code__.co_names
    }
    world["tl"] = language
    world["range"] = language.range
    world["__builtins__"] = __builtins__
    return types.FunctionType(
        function.__code__,
        world,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
