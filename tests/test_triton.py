"""The Triton kernels: on a GPU, or on the CPU by Triton's interpreter.

Without a GPU one test runs this file, and the table of norms, once more in a
process of its own in which Triton interprets; and every kernel is compiled
for a GPU that is not there.
"""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from devices import DEVICES

from normlib import backends, blocks
from normlib.axes import View
from normlib.backends import eager, fused
from normlib.backends import triton as backend
from normlib.testing import assert_close

SHARED = 232_448
"""Bytes of shared memory that a program of sm_90 may have."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]

on_kernels = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else DEVICES[1:]
)


class Case(NamedTuple):
    family: str
    shape: tuple[int, ...]
    view: View
    over_batch: bool = False
    centered: bool = True
    last: bool = False
    small: bool = False
    """Whether the tiles are made so small that several are needed."""

    @property
    def kind(self):
        return {"over_batch": self.over_batch, "centered": self.centered}


CASES = {
    "layer": Case("_TRAILING", (5, 40), View(5, 1, 40, 1)),
    "layer, one row": Case("_TRAILING", (1, 33), View(1, 1, 33, 1)),
    "layer, many rows": Case(
        "_TRAILING", (90, 8), View(90, 1, 8, 1), small=True
    ),
    "rms": Case("_TRAILING", (3, 2, 20), View(6, 1, 20, 1), centered=False),
    "layer, long": Case("_LONG", (3, 150), View(3, 1, 150, 1), small=True),
    "rms, long": Case(
        "_LONG", (3, 128), View(3, 1, 128, 1), False, False, small=True
    ),
    "group": Case("_PLANES", (2, 6, 5, 5), View(2, 3, 2, 25)),
    "instance": Case("_PLANES", (3, 2, 4, 7), View(3, 2, 1, 28)),
    "group, long": Case(
        "_CHANNELS", (2, 6, 5, 9), View(2, 3, 2, 45), small=True
    ),
    "group, last": Case(
        "_CHANNELS", (2, 6, 5, 3), View(2, 2, 3, 15), last=True
    ),
    "batch": Case("_CHANNELS", (4, 6, 5, 5), View(4, 6, 1, 25), True),
    "batch, split": Case(
        "_CHANNELS", (5, 3, 5, 9), View(5, 3, 1, 45), True, small=1
    ),
    "batch, even": Case(
        "_CHANNELS", (3, 3, 8, 8), View(3, 3, 1, 64), True, small=1
    ),
    "batch, dense": Case("_CHANNELS", (37, 6), View(37, 6, 1, 1), True),
    "batch, last": Case(
        "_CHANNELS", (4, 6, 5, 5), View(4, 6, 1, 25), True, last=True
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, monkeypatch):
    if request.param.small:
        monkeypatch.setattr(backend, "TILE", 32)
        monkeypatch.setattr(backend, "FEW", 32)
        monkeypatch.setattr(backend, "LONG_BLOCK", 32)
    return request.param


def draw(case, device, dtype=torch.float32, mean=0.5):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    size = case.view.G * case.view.K
    x = (normal(*case.shape) + mean).to(device, dtype)
    dy = normal(*case.shape).to(device, dtype)
    if case.last:
        x, dy = (
            t.contiguous(memory_format=torch.channels_last) for t in (x, dy)
        )
    weight, bias = (normal(size).to(device) for _ in range(2))
    return x, weight, bias, dy


def run(case, x, weight, bias, dy, needs=(True, True, True)):
    y, mean, var, kept = backend.forward(
        x, case.view, weight, bias, 1e-3, **case.kind
    )
    scale = weight if needs[0] else None
    grads = backend.backward(dy, x, case.view, scale, kept, needs, **case.kind)
    return y, mean, var, *grads


EXTRAS = {
    "relu": (False, "relu"),
    "silu": (False, "silu"),
    "add": (True, None),
    "add, silu": (True, "silu"),
}


def run_fused(case, call, residual, dtotal, activation):
    """y, the sum, dx, dweight and dbias by the kernels, all in one."""
    x, weight, bias, dy = call
    total = None if residual is None else torch.empty_like(x)
    extras = fused.Extras(activation, residual, total)
    kind = case.kind
    y, _, _, kept = backend.forward(
        *(x, case.view, weight, bias, 1e-3), **kind, extras=extras
    )
    x = x if total is None else total
    extras = fused.Extras(activation, dtotal=dtotal, bias=bias)
    needs = True, True, True
    grads = backend.backward(
        *(dy, x, case.view, weight, kept, needs), **kind, extras=extras
    )
    return y, total, *grads


def fused_exactly(case, call, residual, dtotal, activation):
    """The same in float64, by the formula and autograd."""
    x, weight, bias, dy = (t.double().requires_grad_() for t in call)
    total = x if residual is None else (call[0] + residual).double()
    total = total.detach().requires_grad_()
    z, _ = eager.normalize(
        *(total, case.view, weight, bias, 1e-3), **case.kind
    )
    y = eager.activate(z, activation)
    grads = torch.autograd.grad(y, (total, weight, bias), dy.detach())
    if dtotal is not None:
        grads = (grads[0] + dtotal.double(), *grads[1:])
    return y, total, *grads


def assert_same(a, b):
    """Equal; on a GPU, where variants round otherwise, nearly so."""
    if a is None or b is None:
        assert a is b
    elif a.is_cuda:
        assert_close(a, b, tolerance=1e-6)
    else:
        assert torch.equal(a, b)


def exactly(case, x, weight, bias, dy):
    x, weight, bias, dy = (t.double() for t in (x, weight, bias, dy))
    y, found = eager.normalize(x, case.view, weight, bias, 1e-3, **case.kind)
    grads = eager.backward(
        *(dy, x, case.view, weight, 1e-3, (True, True, True)), **case.kind
    )
    return y, found, *grads


@on_kernels
@pytest.mark.parametrize(
    ("dtype", "mean"),
    [
        (torch.float32, 0.5),
        (torch.float32, 1e4),
        (torch.bfloat16, 0.5),
        (torch.float16, 0.5),
    ],
    ids=str,
)
def test_every_family_agrees_with_the_formula(case, device, dtype, mean):
    call = draw(case, device, dtype, mean)
    assert backend._family(call[0], case.view, case.over_batch) is getattr(
        backend, case.family
    )
    y, mean, var, *grads = run(case, *call)
    y_, found, *exact = exactly(case, *call)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-2
    assert y.dtype == dtype
    assert y.stride() == call[0].stride()
    assert_close(y.double(), y_, tolerance=tolerance)
    for got, wanted in zip(grads, exact, strict=True):
        got = got.double().reshape(wanted.shape)
        assert_close(got, wanted, tolerance=tolerance)
    if case.over_batch:  # for the running statistics
        assert_close(mean.double(), found.mean.flatten(), tolerance=1e-6)
        assert_close(var.double(), found.var.flatten(), tolerance=2e-6)


def beside(case, adds, device, dtype, mean=0.5):
    """x, weight, bias and dy; a residual and its gradient, or None twice."""
    call = draw(case, device, dtype, mean)
    if not adds:
        return call, None, None
    if case.family not in ("_TRAILING", "_LONG"):
        pytest.skip("only rows with a weight for each column add")
    return call, call[0].flip(0) - mean, call[3].flip(0)


@on_kernels
@pytest.mark.parametrize(
    ("adds", "activation"), EXTRAS.values(), ids=EXTRAS.keys()
)
@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float32, 1e4), (torch.float16, 0.5)], ids=str
)
def test_every_family_takes_its_neighbors_along(
    case, device, dtype, mean, adds, activation
):
    call, *more = beside(case, adds, device, dtype, mean)
    if activation == "relu":  # which side of 0 it is, rounding decides
        z = fused_exactly(case, call, *more, None)[0]
        call[3][z.abs() < 1e-2] = 0
    y, total, *grads = run_fused(case, call, *more, activation)
    exact, total_, *exact_grads = fused_exactly(case, call, *more, activation)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert y.dtype == dtype
    assert y.stride() == call[0].stride()
    assert_close(y.double(), exact, tolerance=tolerance)
    if adds:
        assert torch.equal(total.double(), total_)
    for got, wanted in zip(grads, exact_grads, strict=True):
        got = got.double().reshape(wanted.shape)
        assert_close(got, wanted, tolerance=tolerance)


@on_kernels
def test_far_from_zero_they_lose_no_digits(case, device):
    """Torch's own kernels are off by about 1e-3 there."""
    x, weight, bias, dy = draw(case, device, mean=1e4)
    y, *_ = run(case, x, weight, bias, dy)
    exact, *_ = exactly(case, x, weight, bias, dy)
    assert (y.double() - exact).abs().max() < 1e-5


@on_kernels
def test_only_what_is_wanted_is_computed(case, device):
    x, weight, bias, dy = draw(case, device)
    full = run(case, x, weight, bias, dy)[3:]
    for i in range(1, 8):
        needs = tuple(bool(i >> k & 1) for k in range(3))
        got = run(case, x, weight, bias, dy, needs)[3:]
        for wanted, a, b in zip(needs, got, full, strict=True):
            assert (a is not None) == wanted
            assert_same(a, b if wanted else None)


@on_kernels
def test_a_run_repeats_to_the_last_bit(case, device):
    call = draw(case, device)
    for a, b in zip(run(case, *call), run(case, *call), strict=True):
        assert a is b is None or torch.equal(a, b)


@on_kernels
def test_without_weight_and_bias(case, device):
    x, _, _, dy = draw(case, device)
    ones = torch.ones(case.view.G * case.view.K, device=device)
    with_ones = run(case, x, ones, ones * 0, dy)
    without = run(case, x, None, None, dy)
    for a, b in zip(without, with_ones, strict=True):
        assert_same(a, b)


@on_kernels
def test_a_gradient_may_lie_otherwise_in_memory(case, device):
    x, weight, bias, dy = draw(case, device)
    odd = torch.stack([dy, dy], -1)[..., 0]
    assert odd.stride() != dy.stride()
    expected = run(case, x, weight, bias, dy)[3:]
    for a, b in zip(
        run(case, x, weight, bias, odd)[3:], expected, strict=True
    ):
        assert torch.equal(a, b)


@on_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_statistic(case, device, value):
    x, weight, bias, _ = draw(case, device)
    bad = x.clone(memory_format=torch.preserve_format)
    bad[(0,) * x.dim()] = value
    args = (case.view, weight, bias, 1e-3)
    y = backend.forward(bad, *args, **case.kind)[0]
    formula = eager.normalize(bad, *args, **case.kind)[0]
    finite = formula.isfinite()
    assert torch.equal(y.isfinite(), finite)
    assert_close(y[finite], formula[finite])


@on_kernels
def test_as_a_backend_it_gives_second_derivatives(case, device):
    x, weight, bias, dy = draw(case, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = []
    for name in ("triton", "eager"):
        module = backends.BACKENDS[name]
        y, _ = module.normalize(
            *(x, case.view, weight, bias, 1e-3),
            **case.kind,
            moments=False,
        )
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        found.append([y, *first, *torch.autograd.grad(loss, leaves[:2])])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, tolerance=1e-4)


@on_kernels
def test_a_grid_has_so_many_instances(device):
    """Of channels last: their axis of CUDA's grid ends at 65,535."""
    for n, served in ((65_535, True), (65_536, False)):
        x = torch.zeros(n, 2, 1, 2, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        kind = {"over_batch": False, "centered": True}
        view = View(n, 2, 1, 2)
        assert backend.supports(x, view, None, None, **kind) == served
        kind["over_batch"] = True
        assert backend.supports(x, view, None, None, **kind)


def test_it_serves_a_gpu_only():
    if INTERPRETED or torch.cuda.is_available():
        assert "triton" in backends.available()
    else:
        assert "triton" not in backends.available()
        with pytest.raises(ValueError, match="'triton' is not available"):
            backends.use_backend("triton").__enter__()


def test_importing_normlib_imports_no_triton():
    code = (
        "import sys, normlib; from normlib import backends; "
        "backends.available(); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU")
def test_the_interpreter_runs_this_file_and_the_table_of_norms():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:nbval"),
            *("-o", "addopts=", "-p", "no:cacheprovider"),
            *("tests/test_triton.py", "tests/test_functional.py"),
            *("tests/test_fused_forms.py", "tests/test_tiles.py"),
            *("-k", "test_triton or triton or test_tiles"),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# Counted by the machine of chapter 10


@pytest.mark.skipif(INTERPRETED, reason="another machine")
@pytest.mark.parametrize(
    ("family", "adds", "activation", "forward", "backward"),
    [
        ("_TRAILING", False, None, 2, 3),
        ("_TRAILING", True, None, 4, 4),
        ("_TRAILING", False, "silu", 2, 3),
        ("_TRAILING", True, "relu", 4, 4),
        ("_PLANES", False, "silu", 2, 3),
        ("_LONG", False, None, 3, 5),
        ("_LONG", True, None, 6, 6),
        ("_CHANNELS", False, None, 3, 5),
        ("_CHANNELS", False, "relu", 3, 5),
    ],
)
def test_the_passes_are_counted(
    family, adds, activation, forward, backward, monkeypatch
):
    """Long rows are read again: from a cache, which this machine has not."""
    case = {
        "_TRAILING": Case(family, (64, 256), View(64, 1, 256, 1)),
        "_LONG": Case(family, (64, 256), View(64, 1, 256, 1)),
        "_PLANES": Case(family, (8, 16, 128), View(8, 4, 4, 128)),
        "_CHANNELS": Case(family, (16, 4, 256), View(16, 4, 1, 256), True),
    }[family]
    if family == "_LONG":
        monkeypatch.setattr(backend, "TILE", 128)
        monkeypatch.setattr(backend, "LONG_BLOCK", 128)
    (x, _, _, dy), residual, dtotal = beside(case, adds, "cpu", torch.float32)
    chosen = backend._family(x, case.view, case.over_batch)
    assert chosen is getattr(backend, family)
    moved = []

    def counted(*args, **constants):
        moved.append(blocks.launch(*args, **constants).moved)

    monkeypatch.setattr(backend, "_launch", counted)
    total = torch.empty_like(x) if adds else None
    extras = fused.Extras(activation, residual, total)
    parameters = None, None, 1e-3
    *_, kept = backend.forward(
        *(x, case.view, *parameters), **case.kind, extras=extras
    )
    assert sum(moved) / x.nbytes == pytest.approx(forward, abs=0.1)
    moved.clear()
    extras = fused.Extras(activation, dtotal=dtotal)
    needs = True, False, False
    backend.backward(
        *(dy, x if total is None else total, case.view, None, kept, needs),
        **case.kind,
        extras=extras,
    )
    assert sum(moved) / x.nbytes == pytest.approx(backward, abs=0.1)


# Compiled for a GPU that is not there


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's compiler is for Linux"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_compiles_for_a_hopper_gpu(case, dtype, monkeypatch):
    compiled = []
    monkeypatch.setattr(backend, "_launch", compiler(compiled))
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: 132)
    run(case, *draw(case, "cpu", dtype))
    assert len(compiled) >= 2
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's compiler is for Linux"
)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_every_fused_kernel_compiles_for_a_hopper_gpu(
    case, activation, monkeypatch
):
    compiled = []
    monkeypatch.setattr(backend, "_launch", compiler(compiled))
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: 132)
    adds = case.family in ("_TRAILING", "_LONG")
    call, *more = beside(case, adds, "cpu", torch.bfloat16)
    run_fused(case, call, *more, activation)
    assert len(compiled) >= 2
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED


def compiler(compiled):
    """A stand-in for a launch that compiles the kernel for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        int: "i32",
        float: "fp32",
    }

    def launch(kernel, grid, *args, num_warps, **constants):
        types = {}
        for name, value in zip(kernel.arg_names, args, strict=False):
            if value is None or (isinstance(value, int) and value == 1):
                constants[name] = value  # as the launcher does
                continue
            of = (
                value.dtype if isinstance(value, torch.Tensor) else type(value)
            )
            types[name] = names[of]
        types.update(dict.fromkeys(constants, "constexpr"))
        source = ASTSource(
            fn=kernel,
            signature={name: types[name] for name in kernel.arg_names},
            constexprs=constants,
        )
        target = GPUTarget("cuda", 90, 32)
        options = {"num_warps": num_warps}
        compiled.append(triton.compile(source, target=target, options=options))

    return launch
