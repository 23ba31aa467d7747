"""Whatever else people do to a layer, ours does what torch.nn's does.

Derivatives of every kind, compilers and tracers, checkpoints, autocast,
tensors that are not plain, copies, and networks of other people's making.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from twins import (
    DTYPES,
    EVERYWHERE,
    LAYERS,
    NAMES,
    TWINS,
    assert_same,
    outcome,
    over,
    where,
    with_backends,
)

import normlib
from normlib import backends
from normlib.testing import assert_close

RUNNING = where(lambda twin: twin.tracks)
KINDS = {name: LAYERS[name] for name in NAMES}
"""One of each layer, for what takes long and does not look at shapes."""
STATELESS = where(lambda twin: not twin.tracks, TWINS)
"""With nothing that a transform could not carry along."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit", "ignore:Mismatch dtype between input and weight"
)


def evaluated(twin):
    """The pairs of a twin that keep no statistics while they run."""
    pairs = [[module.eval() for module in twin.pair(dtype=torch.float64)]]
    return pairs if twin.tracks else [*pairs, twin.pair(dtype=torch.float64)]


# Derivatives.


@over(TWINS)
@with_backends()
def test_second_derivatives(twin):
    for training in (True, False):
        results = []
        for module in twin.pair(dtype=torch.float64):
            module.train(training)
            x, dy = (
                twin.draw(seed, torch.float64).requires_grad_()
                for seed in (0, 1)
            )
            leaves = [x, dy, *module.parameters()]
            first = torch.autograd.grad(
                module(x), leaves[:1] + leaves[2:], dy, create_graph=True
            )
            penalty = sum(g.square().sum() for g in first)
            second = torch.autograd.grad(penalty, leaves, allow_unused=True)
            results.append(
                torch.zeros_like(leaf) if g is None else g
                for g, leaf in zip(second, leaves, strict=True)
            )
        assert_same(*results, laid_out=0)


@pytest.mark.parametrize("n", [1, 2])
@with_backends()
def test_an_image_normalized_and_read_as_tokens(n):
    """Its gradient comes with the channels last, as torch's own misreads."""
    norm = normlib.InstanceNorm2d(4, dtype=torch.float64)
    tokens = torch.nn.LayerNorm(4, dtype=torch.float64)
    x = LAYERS["InstanceNorm2d"].draw(0, torch.float64, shape=(n, 4, 3, 2))

    def f(x):
        return tokens(norm(x).flatten(2).transpose(1, 2)).pow(3)

    assert torch.autograd.gradcheck(f, x.requires_grad_())


@over(LAYERS)
@with_backends()
def test_a_graph_is_gone_after_its_backward_and_may_be_kept(twin):
    ours, _ = twin.pair()
    x = twin.draw().requires_grad_()
    y = ours(x)
    one, two = (
        torch.autograd.grad(y, x, twin.draw(1), retain_graph=keep)
        for keep in (True, False)
    )
    assert_close(one, two, tolerance=0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, twin.draw(1))


@over(LAYERS)
@with_backends()
def test_an_input_changed_before_the_backward_is_noticed(twin):
    """Or does no harm: the formula keeps no more than the centered x."""
    ours, theirs = twin.pair()
    leaf = twin.draw().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(leaf), leaf, twin.draw(1))
    x = leaf * 1
    y = ours(x)
    x.add_(1)
    try:
        (dx,) = torch.autograd.grad(y, leaf, twin.draw(1))
    except RuntimeError as error:
        if "modified by an inplace" not in str(error):
            raise
    else:
        assert_close(dx, expected)


@over(STATELESS | RUNNING)
@with_backends()
def test_functorch_transforms(twin):
    x, dx = (twin.draw(seed, torch.float64) for seed in (0, 1))

    def everything(module):
        state = dict(module.named_parameters())

        def loss(state, x):
            return functional_call(module, state, (x,)).pow(3).sum()

        slope = grad(loss, argnums=1)
        return [
            *grad(loss)(state, x).values(),
            slope(state, x),
            jacrev(module)(x),
            vmap(module)(torch.stack([x, dx, x - dx])),
            vmap(module, in_dims=-1, out_dims=1)(torch.stack([x, dx], -1)),
            vmap(slope, (None, 0))(state, torch.stack([x, dx])),
            jvp(module, (x,), (dx,))[1],
            jvp(lambda x: slope(state, x), (x,), (dx,))[1],
        ]

    for ours, theirs in evaluated(twin):
        assert_close(everything(ours), everything(theirs))


@over(RUNNING)
@with_backends()
def test_running_statistics_go_in_and_out_of_a_transform(twin):
    """As an ensemble is trained: parameters and buffers are arguments."""
    x = twin.draw(0, torch.float64, shape=(2, *twin.shape))
    results = []
    for module in twin.pair(dtype=torch.float64):
        state = dict(module.named_parameters())
        buffers = {k: v.clone() for k, v in module.named_buffers()}
        many = {k: torch.stack([v, v]) for k, v in buffers.items()}

        def loss(state, buffers, x, module=module):
            buffers = {k: v.clone() for k, v in buffers.items()}
            y = functional_call(module, (state, buffers), (x,))
            return y.pow(3).sum(), buffers

        for slope, given in (
            (grad(loss, has_aux=True), (state, buffers, x[0])),
            (
                vmap(grad(loss, has_aux=True), (None, 0, 0)),
                (state, many, x),
            ),
        ):
            slopes, moved = slope(*given)
            results.append([*slopes.values(), *moved.values()])
    assert_close(results[:2], results[2:])


@over(where(lambda t: len(t.shape) in (4, 5) and t.name != "GroupNorm"))
@with_backends()
def test_vmap_over_channels_last(twin):
    """Which torch's group norm does not take."""
    if twin.single:
        return
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    x = torch.stack(
        [
            twin.draw(seed).to(memory_format=last[len(twin.shape)])
            for seed in (0, 1)
        ]
    )
    ours, theirs = (m.eval() for m in twin.pair())
    assert_close(vmap(ours)(x), vmap(theirs)(x))


@over(RUNNING)
@with_backends()
def test_vmap_over_running_statistics_is_refused_not_silent(twin):
    """One buffer cannot hold the statistics of many batches."""
    x = twin.draw(shape=(2, *twin.shape))
    for module in twin.pair():
        with pytest.raises((RuntimeError, ValueError)):
            vmap(module)(x)


@over(STATELESS | RUNNING)
@with_backends()
def test_forward_mode(twin):
    x, dx = (twin.draw(seed, torch.float64) for seed in (0, 1))

    def tangent(module):
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, dx))
            return forward_ad.unpack_dual(y).tangent

    for ours, theirs in evaluated(twin):
        assert_close(tangent(ours), tangent(theirs))


@over(LAYERS)
@with_backends()
def test_a_batch_of_gradients(twin):
    x = twin.draw(0, torch.float64).requires_grad_()
    stack = twin.draw(1, torch.float64, shape=(3, *twin.shape))
    results = []
    for module in twin.pair(dtype=torch.float64):
        leaves = [x, *module.parameters()]
        results.append(
            torch.autograd.grad(
                module(x), leaves, stack, is_grads_batched=True
            )
        )
    assert_close(*results)


# Compilers and tracers.


@over(KINDS | {"cumulative": TWINS["BatchNorm1d cumulative"]})
@with_backends("default", "eager")
def test_compiled_without_a_graph_break(twin):
    pair = twin.pair()
    compiled = torch.compile(pair[0], fullgraph=True, backend="aot_eager")
    x, dy = twin.draw(), twin.draw(1)
    for training in (True, False) if twin.tracks else (True,):
        for module in pair:
            module.train(training)
        results = (outcome(module, x, dy) for module in (compiled, pair[1]))
        assert_same(*results, laid_out=0)


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "LayerNorm"])
def test_compiled_for_batches_of_any_size(name):
    twin = LAYERS[name]
    ours, theirs = twin.pair()
    compiled = torch.compile(
        ours, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (3, 7, 2):
        x, dy = (
            twin.draw(seed, shape=(n, *twin.shape[1:])) for seed in (0, 1)
        )
        results = [outcome(module, x, dy) for module in (compiled, theirs)]
        assert_same(*results, laid_out=0)


@pytest.mark.parametrize("name", ["LayerNorm", "InstanceNorm1d"])
def test_one_graph_serves_small_and_large_calls(name, monkeypatch):
    """The size that a fast path asks for leaves no guard behind."""
    twin = LAYERS[name]
    monkeypatch.setattr(backends, "LEAST", 8 * len(twin.draw().flatten()))
    graphs = []

    def noting(graph, inputs):
        graphs[-1] += 1
        return graph

    for module in twin.pair():
        torch._dynamo.reset()
        graphs.append(0)
        compiled = torch.compile(module, backend=noting, dynamic=True)
        for n in (7, 100):  # no other axis has as many
            compiled(twin.draw(shape=(n, *twin.shape[1:])))
    assert graphs[0] == graphs[1]


@over(KINDS)
@pytest.mark.parametrize("training", [True, False])
@with_backends("default", "eager")
def test_exported_with_a_dynamic_batch(twin, training):
    if not training and not twin.tracks:
        return
    ours, theirs = (m.train(training) for m in twin.pair())
    program = torch.export.export(
        ours,
        (twin.draw(),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
    )
    module = program.module()
    for n in (2, 9):
        x = twin.draw(n, shape=(n, *twin.shape[1:]))
        assert_close(module(x), theirs(x))
    assert_close(list(module.buffers()), list(theirs.buffers()))


@over(KINDS)
@with_backends()
def test_traced_into_a_graph_of_torchs_operations(twin):
    from torch.fx.experimental.proxy_tensor import make_fx

    ours, theirs = (m.eval() for m in twin.pair())
    x, other = twin.draw(), twin.draw(1)
    with torch.no_grad():
        graph = make_fx(lambda x: ours(x))(x)
    assert_close(graph(other), theirs(other))
    for node in graph.graph.nodes:
        assert "normlib" not in str(node.target)


@over(KINDS)
@pytest.mark.parametrize("training", [True, False])
@with_backends()
def test_a_jit_trace(twin, training):
    pair = [m.train(training) for m in twin.pair()]
    x, other = twin.draw(), twin.draw(1)
    with warnings.catch_warnings():
        # torch's own layers make Python numbers of sizes too.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = [torch.jit.trace(m, (x,), check_trace=False) for m in pair]
    assert_close(*(module(other) for module in traced))
    assert_close(*(list(module.buffers()) for module in pair))


@over(KINDS)
@with_backends("default", EVERYWHERE)
def test_a_jit_trace_holds_no_size_that_torchs_does_not(twin):
    """Nothing of the batch that it was traced with remains."""
    pair = [m.eval() for m in twin.pair()]
    other = twin.draw(1, shape=(9, *twin.shape[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        ours, theirs = (
            torch.jit.trace(m, (twin.draw(),), check_trace=False) for m in pair
        )
    assert_close(ours(other), theirs(other))
    assert_close(ours(other), pair[1](other))


# Checkpoints and hooks.


def step(module, x, dy, run=None):
    """As outcome, by ``backward``, and by another way to call the module."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = (run or module)(x)
    y.backward(dy)
    gradients = [p.grad for p in module.parameters()]
    return [y.detach(), x.grad, *gradients, *module.buffers()]


@over(LAYERS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_backends()
def test_checkpointing_computes_the_same_again(twin, reentrant, dtype):
    """And moves running statistics again, as torch.nn's do.

    By default it stops as soon as all that was saved is there again, which
    may be before a layer comes to moving them.
    """
    x, dy = twin.draw(0, dtype), twin.draw(1, dtype)
    for early in (False, True):
        results = []
        for module in twin.pair(dtype=dtype):

            def run(x, module=module):
                return checkpoint(module, x, use_reentrant=reentrant)

            with set_checkpoint_early_stop(early):
                found = step(module, x, dy, run)
            kept = 2 + len(list(module.parameters())) if early else None
            results.append(found[:kept])
        assert_same(*results)


@over(LAYERS)
@with_backends()
def test_saved_tensors_go_through_hooks(twin):
    x, dy = twin.draw(), twin.draw(1)
    ours, theirs = twin.pair()
    packed = []

    def pack(t):
        packed.append(t)
        return t.clone()

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
            return ours(x)

    assert_same(step(ours, x, dy, run), step(theirs, x, dy))
    assert packed


@over(LAYERS)
@with_backends(EVERYWHERE, "cpu", "eager")
def test_saved_tensors_come_back_in_another_layout(twin):
    """Which torch's own group and layer norm misread."""
    x, dy = twin.draw(), twin.draw(1)
    ours, theirs = twin.pair()
    expected = step(theirs, x, dy)

    def pack(t):
        return t.movedim(0, -1).contiguous() if t.dim() else t

    def unpack(t):
        return t.movedim(-1, 0) if t.dim() else t

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return ours(x)

    assert_same(step(ours, x, dy, run), expected, laid_out=0)


@over(LAYERS)
@with_backends()
def test_module_hooks_see_the_call(twin):
    ours, _ = twin.pair()
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    ours.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    ours.register_full_backward_hook(
        lambda m, dx, dy: seen.append(dx[0].shape)
    )
    outcome(ours, twin.draw(), twin.draw(1))
    assert seen == 3 * [torch.Size(twin.shape)]


@over(LAYERS)
@with_backends()
def test_without_a_graph_there_is_none(twin):
    ours, theirs = twin.pair()
    x = twin.draw().requires_grad_()
    with torch.no_grad():
        y = ours(x)
    assert y.grad_fn is None
    assert not y.requires_grad
    assert_close(y, theirs(x))
    with torch.inference_mode():
        a, b = ours(x), theirs(x)
    assert a.is_inference() == b.is_inference()
    assert_close(a, b)


@over(LAYERS)
@with_backends()
def test_parameters_may_need_no_gradient_at_all(twin):
    pair = [module.requires_grad_(False) for module in twin.pair()]
    for module in pair:
        assert not module(twin.draw()).requires_grad
    x, dy = twin.draw(), twin.draw(1)
    assert_same(*(outcome(module, x, dy) for module in pair))


# Other dtypes, devices and kinds of tensors.


@over(LAYERS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@with_backends()
def test_under_autocast_the_dtype_is_torchs(twin, dtype):
    x, dy = twin.draw(0, dtype), twin.draw(1)
    results = []
    for module in twin.pair():
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            cast = y.dtype
        leaves = [x, *module.parameters()]
        dx = torch.autograd.grad(y, leaves, dy.to(cast))
        results.append([y.detach(), *dx, *module.buffers()])
    rough = None if dtype == torch.float32 else 1e-2
    assert_same(*results, rough, laid_out=0)


@over(LAYERS)
@with_backends("default", EVERYWHERE, "eager")
def test_on_the_meta_device_shapes_pass_and_nothing_is_computed(twin):
    ours, theirs = (
        twin.make(lib, device="meta") for lib in (normlib, torch.nn)
    )
    x = twin.draw(device="meta")
    for a, b in zip(
        (ours(x), *ours.state_dict().values()),
        (theirs(x), *theirs.state_dict().values()),
        strict=True,
    ):
        assert a.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    real = ours.to_empty(device="cpu")
    real.reset_parameters()
    assert_close(real(twin.draw()), twin.make(torch.nn)(twin.draw()))
    with torch.device("meta"):
        state = twin.make(normlib).state_dict()
    assert all(t.is_meta for t in state.values())


@over(LAYERS)
@with_backends("default", EVERYWHERE, "eager")
def test_on_fake_tensors(twin):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(twin.shape, requires_grad=True)
        for library in (normlib, torch.nn):
            y = twin.make(library)(x)
            assert type(y) is FakeTensor
            assert y.shape == x.shape
            (dx,) = torch.autograd.grad(y, x, torch.empty(twin.shape))
            assert dx.shape == x.shape


class Named(torch.Tensor):
    """A subclass that notes the functions it meets."""

    met: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.met.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs)


@over(LAYERS)
@with_backends("default", EVERYWHERE)
def test_a_subclass_meets_torchs_own_function(twin):
    x = twin.draw()
    ours, theirs = twin.pair()
    Named.met.clear()
    y = ours(x.as_subclass(Named))
    assert isinstance(y, Named)
    assert Named.met.count(twin.function) == 1
    assert_close(y.as_subclass(torch.Tensor), theirs(x))


@over(LAYERS)
@with_backends("default", EVERYWHERE)
def test_a_subclass_as_the_weight_meets_it_too(twin):
    ours, theirs = twin.pair()
    expected = theirs(twin.draw())
    weight = ours.weight.detach().as_subclass(Named)
    ours.weight = torch.nn.Parameter(weight)
    assert isinstance(ours.weight, Named)
    Named.met.clear()
    y = ours(twin.draw())
    assert isinstance(y, Named)
    assert_close(y.detach().as_subclass(torch.Tensor), expected)


@over(LAYERS)
@with_backends()
def test_a_mode_sees_the_call(twin):
    class Noting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    results = []
    for module in twin.pair():
        seen = []
        with Noting():
            results.append(module(twin.draw()))
        assert seen
    assert_close(*results)


@over(KINDS)
@with_backends("default", EVERYWHERE)
def test_a_dispatch_mode_sees_torchs_own_operations(twin):
    """One that counts operations finds as many as in torch's layer."""

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    for module in twin.pair():
        seen.append([])
        with Noting():
            module(twin.draw()).sum().backward()
    assert sorted(seen[0]) == sorted(seen[1])


@over(LAYERS)
@with_backends()
def test_a_conjugate_view_and_a_negative_one(twin):
    """Tensors whose values are not what lies in memory."""
    complex_ = torch.complex(twin.draw(), twin.draw(1))
    x = complex_.conj().imag  # lazily negated
    assert x.is_neg()
    ours, theirs = twin.pair()
    assert_close(ours(x), theirs(x))


@over(LAYERS)
@with_backends()
def test_a_parameter_as_input(twin):
    ours, theirs = twin.pair()
    x = torch.nn.Parameter(twin.draw())
    assert_close(ours(x), theirs(x))


@over(TWINS)
def test_pickled_copied_and_saved(twin):
    ours, _ = twin.pair()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(buffer, weights_only=False),
    ]
    expected = outcome(ours, twin.draw(), twin.draw(1))
    for module in copies:
        assert repr(module) == repr(ours)
        found = outcome(module, twin.draw(), twin.draw(1))
        assert_close(found, expected, tolerance=0.0)


@over(TWINS)
def test_moved_and_cast_with_its_model(twin):
    for cast in (torch.nn.Module.double, torch.nn.Module.bfloat16):
        ours, theirs = (cast(torch.nn.Sequential(m)) for m in twin.pair())
        expected = theirs.state_dict()
        for key, value in ours.state_dict().items():
            assert value.dtype == expected[key].dtype
            assert_close(value, expected[key])


# In other people's networks.


class Residual(torch.nn.Module):
    """Two blocks of convolution, norm and ReLU with a sum, and a head."""

    def __init__(self, norm, last=False):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 4, 3)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(4, 4, 3, padding=1, bias=False),
                norm(4),
                torch.nn.ReLU(inplace=True),
                torch.nn.Conv2d(4, 4, 3, padding=1, bias=False),
                norm(4),
            )
            for _ in range(2)
        )
        self.head = torch.nn.Linear(4, 5)
        if last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            out = block(x)
            out += x
            x = torch.relu_(out)
        return self.head(x.mean((2, 3)))


class Recurrent(torch.nn.Module):
    """An LSTM cell whose gates and cell are layer-normalized."""

    def __init__(self, norm):
        super().__init__()
        self.x, self.h = torch.nn.Linear(8, 24), torch.nn.Linear(6, 24)
        self.gates, self.cell = norm(24), norm(6)
        self.head = torch.nn.Linear(6, 5)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 6)
        for t in x.squeeze(1).unbind(1):
            gates = self.gates(self.x(t) + self.h(h)).chunk(4, 1)
            i, f, o = (g.sigmoid() for g in gates[:3])
            c = self.cell(f * c + i * gates[3].tanh())
            h = o * c.tanh()
        return self.head(h)


class Attending(torch.nn.Module):
    """torch's encoder layer, with its norms replaced."""

    def __init__(self, norm, first=False):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=True, norm_first=first
        )
        self.layer.norm1, self.layer.norm2 = norm(8), norm(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(x.squeeze(1)).mean(1))


NETWORKS = {
    "batch norm": lambda lib: Residual(lib.BatchNorm2d),
    "batch norm, channels last": lambda lib: Residual(lib.BatchNorm2d, True),
    "cumulative batch norm": lambda lib: Residual(
        lambda c: lib.BatchNorm2d(c, momentum=None)
    ),
    "group norm": lambda lib: Residual(lambda c: lib.GroupNorm(2, c)),
    "group norm, channels last": lambda lib: Residual(
        lambda c: lib.GroupNorm(2, c), True
    ),
    "instance norm": lambda lib: Residual(
        lambda c: lib.InstanceNorm2d(c, affine=True)
    ),
    "instance norm that tracks": lambda lib: Residual(
        lambda c: lib.InstanceNorm2d(c, track_running_stats=True), True
    ),
    "layer norm in an LSTM": lambda lib: Recurrent(lib.LayerNorm),
    "RMS norm in an LSTM": lambda lib: Recurrent(lib.RMSNorm),
    "layer norm in a transformer": lambda lib: Attending(lib.LayerNorm),
    "layer norm first": lambda lib: Attending(lib.LayerNorm, True),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
@with_backends()
def test_it_serves_in_a_network_that_trains(network):
    """The same seed, the same data: the same losses, step after step."""
    losses = []
    for library in (normlib, torch.nn):
        torch.manual_seed(0)
        model = network(library).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = LAYERS["LayerNorm"].draw(0, torch.float64, shape=(16, 1, 8, 8))
        y = torch.arange(16) % 5
        steps = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses.append([*steps, model(x).square().mean().item()])
    assert losses[0][5] < losses[0][0]
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_found_by_those_who_look_for_them(name):
    """Weight decay is often left out for what has one axis, or this name."""
    ours, theirs = next(
        twin for twin in LAYERS.values() if twin.name == name
    ).pair()
    shapes = [
        [(key, p.ndim, p.requires_grad) for key, p in m.named_parameters()]
        for m in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert type(ours).__name__ == type(theirs).__name__
    assert isinstance(ours, torch.nn.Module)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 40_000)], ids=str)
def test_a_cumulative_average_counts_a_checkpointed_batch_once(shape):
    """Its recomputation is broken off after the statistics have moved."""
    plain = normlib.BatchNorm1d(3, momentum=None)
    saving = normlib.BatchNorm1d(3, momentum=None)
    for step in range(3):
        x = (torch.randn(shape) + step).requires_grad_()
        plain(x)
        checkpoint(saving, x, use_reentrant=False).sum().backward()
    assert saving.num_batches_tracked == 3
    assert_close(list(saving.buffers()), list(plain.buffers()))
