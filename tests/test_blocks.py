"""The block machine: it runs kernels as Triton does, and watches them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from normlib import blocks
from normlib.axes import View
from normlib.backends import eager
from normlib.backends import triton as backend
from normlib.testing import assert_close

tl = blocks.language


def double(x_ptr, y_ptr, size, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = None
    if MASKED:
        mask = at < size
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=mask), mask=mask)


def into_one(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


def column_sums(x_ptr, y_ptr, rows, columns):
    column = tl.program_id(0)
    total = 0.0
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        total += tl.load(x_ptr + row * columns + column).to(tl.float32)
    tl.store(y_ptr + tl.program_id(1) * columns + column, total)


def widths(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(y_ptr + tl.arange(0, 4), (x + 1e-5).to(y_ptr.dtype.element_ty))


def test_every_program_takes_its_block():
    x, y = torch.arange(10.0), torch.zeros(10)
    moved = blocks.launch(double, (3,), x, y, 10, BLOCK=4, MASKED=True)
    assert torch.equal(y, 2 * x)
    assert moved[:3] == (3, 40, 40)


def test_a_missing_mask_is_found():
    x = y = torch.zeros(10)
    with pytest.raises(IndexError, match=r"program 2 reads value 10 of .* 10"):
        blocks.launch(double, (3,), x, y, 10, BLOCK=4, MASKED=False)


def test_two_programs_on_one_value_are_found():
    with pytest.raises(
        RuntimeError, match="programs 0 and 1 both write value 0"
    ):
        blocks.launch(into_one, (2,), torch.zeros(2), torch.zeros(1))


def test_a_grid_has_directions_and_loops_run_over_rows():
    x = torch.arange(15.0).view(5, 3)
    y = torch.zeros(2, 3)
    blocks.launch(column_sums, (3, 2), x, y, 5, 3)
    assert torch.equal(y, torch.stack([x[::2].sum(0), x[1::2].sum(0)]))


def count_up(x_ptr, y_ptr, size):
    at = tl.program_id(0)
    first = at
    at += tl.num_programs(0)
    seen = tl.arange(0, 4)
    seen *= 2
    x = tl.load(seen + first * 4 + x_ptr, mask=seen < size)
    tl.store(y_ptr + first, tl.sum(tl.rsqrt(x), 0))


def test_a_block_is_never_changed_in_place_nor_filled_by_chance():
    x, y = torch.full((12,), 4.0), torch.zeros(2)
    blocks.launch(count_up, (2,), x, y, 8)
    assert y.tolist() == [2.0, 2.0]
    blocks.launch(count_up, (2,), x, y, 6)
    assert y.isnan().all()


def test_whole_sectors_are_fetched():
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)

    def strided(x_ptr, y_ptr, stride):
        at = tl.arange(0, 8) * stride
        tl.store(y_ptr + at, tl.load(x_ptr + at))

    assert blocks.launch(strided, (1,), x, y, 1).fetched == 2 * 32
    assert blocks.launch(strided, (1,), x, y, 8).fetched == 2 * 8 * 32


def test_numbers_keep_the_dtype_of_the_memory():
    x, y = np.ones(4, np.float32), np.zeros(4, np.float16)
    blocks.launch(widths, (1,), x, y)
    assert (y == np.float16(1.00001)).all()


def test_what_it_cannot_take_is_refused():
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"contiguous.*\(1, 4\)"):
        blocks.launch(into_one, (1,), x.T, x)
    with pytest.raises(ValueError, match="bfloat16"):
        blocks.launch(into_one, (1,), x.bfloat16(), x)
    with pytest.raises(ValueError, match=r"contiguous array.*\(4, 16\)"):
        blocks.launch(into_one, (1,), x.numpy().T, x)
    with pytest.raises(ValueError, match="power of two, got 3"):
        blocks.launch(double, (1,), x, x, 16, BLOCK=3, MASKED=True)


CALLS = {
    "layer": ((5, 40), View(5, 1, 40, 1), False),
    "group": ((2, 6, 5, 5), View(2, 3, 2, 25), False),
    "batch": ((4, 6, 5, 5), View(4, 6, 1, 25), True),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_runs_the_kernels_of_the_package(name, monkeypatch):
    pytest.importorskip("triton")
    shape, view, over_batch = CALLS[name]
    monkeypatch.setattr(backend, "_launch", blocks.launch)
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=g) for _ in range(2))
    w, b = (torch.randn(view.G * view.K, generator=g) for _ in range(2))
    kind = {"over_batch": over_batch, "centered": True}
    y, _, _, kept = backend.forward(x, view, w, b, 1e-5, **kind)
    grads = backend.backward(dy, x, view, w, kept, (True,) * 3, **kind)
    exact, _ = eager.normalize(x, view, w, b, 1e-5, **kind)
    assert_close(y, exact)
    exact = eager.backward(dy, x, view, w, 1e-5, (True,) * 3, **kind)
    for got, wanted in zip(grads, exact, strict=True):
        assert_close(got.reshape(wanted.shape), wanted)


def test_it_needs_no_triton():
    code = "import sys, normlib.blocks; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
