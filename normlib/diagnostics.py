"""What happens inside a network: its landscape, its shifts, its noise.

Each function takes any model and any loss: ``loss_fn(model(x), y)`` for a
batch ``(x, y)``, ``loss_fn(model(x))`` for a batch ``x``; a dictionary x
holds keyword arguments. Tensors are moved to the model. It computes with
copies of the parameters and buffers, in the mode that the model is in, and
leaves behind what it found, also after an exception: parameters, their
``.grad``, buffers, modes, and torch's random state. What is returned lies on
the CPU, in float64. A compiled model runs as it was written; one with a
ScriptModule inside is refused (TypeError). As everywhere in torch.autograd,
no gradient is read through a checkpoint with ``use_reentrant=True``. On a
terminal, what takes long shows a progress bar, where tqdm is installed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlib.progress import progress
from normlib.stats import Moments


class Walk(NamedTuple):
    """What :func:`gradient_walk` met at each step size."""

    step_size: Tensor
    """(S,), as asked for."""
    loss: Tensor
    """(S,), at each point. Its range is the first reading."""
    grad_change: Tensor
    """(S,), the distance of the gradient there from that at the start. It is
    the second reading."""
    beta: float
    """The largest ratio of that to the distance walked, the third reading.
    NaN where nothing was walked; not finite where a gradient is not."""


def gradient_walk(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Tensor | Sequence,
    step_sizes: Sequence[float],
    *,
    names: Sequence[str] | None = None,
) -> Walk:
    """Walk straight along the gradient, and look at loss and gradient.

    At the model's parameters w let ``g = grad L(w)``. For each step size s
    the loss and the gradient are computed anew at ``w - s * g``, on the same
    batch and with the same noise (dropout draws the same units). The norm of
    ``grad L(w - s * g) - g``, and its ratio to the distance ``s * |g|``, are
    l2 norms over all the chosen parameters as one vector.

    Args:
        model: in training mode batch norm follows the batch at every point.
        loss_fn: of the output and what follows x in the batch; one number.
        batch: (x, y), or x.
        step_sizes: in units of the gradient, as a learning rate is; 0 is the
            start.
        names: of the parameters along which to walk and whose gradient is
            read; the others stay. By default all that require a gradient.

    Returns:
        The three readings as a :class:`Walk`.

    Raises:
        ValueError: a name is not that of a parameter that requires a
            gradient; the loss is not one number.

    Santurkar, Tsipras, Ilyas & Madry (2018, section 3.1) walk at each step of
    training, to between 1/2 and 4 times the learning rate. Chapter 3.
    """
    names = _names(model, names)
    start = _state(model)
    _, here = _gradient(model, loss_fn, batch, start, names)
    losses, changes = [], []
    for size in progress(step_sizes, "gradient walk", "steps"):
        moved = {n: start[n] - size * here[n] for n in names}
        loss, there = _gradient(model, loss_fn, batch, start | moved, names)
        losses.append(loss)
        changes.append(_norm(there[n] - here[n] for n in names))
    step_size, loss, change = map(_numbers, (step_sizes, losses, changes))
    distance = step_size.abs() * _norm(here.values())
    ratio = (change / distance)[distance != 0]
    beta = ratio.max().item() if len(ratio) else math.nan
    return Walk(step_size, loss, change, beta)


class GradientShift(NamedTuple):
    """How far the gradients of layers moved, by :func:`gradient_shift`."""

    layers: tuple[str, ...]
    """Their names."""
    distance: Tensor
    """(L,), the l2 norm of G - G'."""
    cosine: Tensor
    """(L,), of the angle between G and G'. NaN where one is zero."""
    norm: Tensor
    """(L,), the l2 norm of G, to which the distance compares."""


def gradient_shift(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Tensor | Sequence,
    before: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
) -> GradientShift:
    """Internal covariate shift, as the change of a layer's gradient.

    Between an earlier state of the model and its present one, for each
    layer: G is the gradient of the loss with respect to the layer's
    parameters in the earlier state. G' is the same where everything in front
    of the layer is already in the present state. What the layer was told to
    do is G; what it should do, once those in front of it have moved, is G'.
    The first layer has nothing in front of it, and so no shift.

    The order is the one in which the model holds its parameters
    (``model.named_parameters()``); in a chain it is that of the calls. Both
    gradients are of the same batch, with the same noise, and with the
    earlier state's buffers.

    Args:
        model: in its present state, such as after a step of training.
        loss_fn: of the output and what follows x in the batch; one number.
        batch: (x, y), or x.
        before: the earlier state, as a copy of ``model.state_dict()``.
        layers: names of modules (``model.named_modules()``), each with all
            the parameters in it. By default every module that itself has a
            weight of two or more axes.

    Returns:
        Distance and cosine as a :class:`GradientShift`.

    Raises:
        ValueError: a layer has no parameter that requires a gradient; the
            earlier state lacks a parameter, or has one of another shape.

    Santurkar, Tsipras, Ilyas & Madry (2018, definition 2.1). Chapter 3.
    """
    names, now = _names(model), _state(model)
    old = _earlier(model, before)
    if layers is None:
        layers = [n for n in _layers(model) if _inside(n, names)]
    owned = [_inside(layer, names) for layer in layers]
    if missed := [n for n, o in zip(layers, owned, strict=True) if not o]:
        raise ValueError(
            f"layers {missed} have no parameter that requires a gradient"
        )
    _, start = _gradient(model, loss_fn, batch, old, names)
    rows = []
    for own in progress(owned, "gradient shift", "layers"):
        front = names[: names.index(own[0])]
        mixed = old | {n: now[n] for n in front}
        _, then = _gradient(model, loss_fn, batch, mixed, own)
        product = sum((start[n] * then[n]).double().sum().item() for n in own)
        norms = [_norm(g[n] for n in own) for g in (start, then)]
        distance = _norm(then[n] - start[n] for n in own)
        rows.append((distance, _share(product, math.prod(norms)), norms[0]))
    numbers = _numbers(rows).reshape(-1, 3).unbind(1)
    return GradientShift(tuple(layers), *numbers)


class DistributionShift(NamedTuple):
    """How far the inputs of layers moved, by :func:`distribution_shift`.

    Each has one tensor for each layer, which has one number for each unit.
    """

    layers: tuple[str, ...]
    """Their names."""
    mean: tuple[Tensor, ...]
    """Present mean minus earlier mean."""
    std: tuple[Tensor, ...]
    """The same of the standard deviations."""
    wasserstein: tuple[Tensor, ...]
    """The Wasserstein-1 distance of the two distributions."""
    scale: tuple[Tensor, ...]
    """The earlier standard deviation, to which all compare. It is 0 for a unit
    that is always the same, such as a dead one."""


def distribution_shift(
    model: nn.Module,
    batch: Tensor | Sequence,
    before: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
    axis: int = 1,
) -> DistributionShift:
    """Internal covariate shift, as the drift of the inputs of a layer.

    The same x passes through an earlier state of the model and through its
    present one. For each unit of a layer's input the two samples, over the
    examples and positions, are compared. The Wasserstein-1 distance is the
    mean distance between values of the same rank, ``⟨|sort(a) - sort(b)|⟩``:
    how far the one distribution must be carried to become the other. It is
    never below the shift of the mean. Noise is drawn for each of the two
    passes, as it would be in two steps of training.

    Args:
        model: in its present state.
        batch: x, or (x, y), of which only x is used.
        before: the earlier state, as a copy of ``model.state_dict()``.
        layers: names of modules that the model calls. By default every
            module that itself has a weight of two or more axes.
        axis: of the input on which the units lie: 1 for (N, C, ...), -1 for
            (N, T, D).

    Returns:
        The shifts by layer and unit as a :class:`DistributionShift`.

    Raises:
        ValueError: a layer is not called; the earlier state lacks a
            parameter, or has one of another shape.

    Ioffe & Szegedy (2015) name it; Santurkar, Tsipras, Ilyas & Madry (2018,
    section 2.1) look at it. Chapter 3.
    """
    wanted = _layers(model) if layers is None else tuple(layers)
    states = _earlier(model, before), _state(model)
    with _put_back(model):
        pair = [_inputs(model, batch, s, wanted, axis) for s in states]
    found = tuple(layer for layer in wanted if layer in pair[0])
    if layers is not None and (missed := set(wanted) - set(found)):
        raise ValueError(f"layers {sorted(missed)} are not called")
    rows = [_drift(*(seen[layer] for seen in pair)) for layer in found]
    columns = zip(*rows, strict=True) if rows else [()] * 4
    return DistributionShift(found, *columns)


class Profile(NamedTuple):
    """A network layer by layer, in the order of the calls.

    One entry for each call: a layer that is called twice has two.
    """

    layers: tuple[str, ...]
    """Names of the modules."""
    kinds: tuple[str, ...]
    """Their classes."""
    mean: Tensor
    """(L,), of all values of the output."""
    std: Tensor
    """(L,), their standard deviation."""
    flat: Tensor
    """(L,), the share of values at which an activation function has a slope of
    less than 0.05, as a dead ReLU has, or a saturated sigmoid. NaN for what
    is no activation function of torch.nn."""
    gradient: Tensor
    """(L,), the l2 norm of the loss's gradient with respect to the output. NaN
    where there is none."""
    weight_gradient: Tensor
    """(L,), the same with respect to the layer's own parameters."""


def layer_profile(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Tensor | Sequence,
    *,
    layers: Sequence[str] | None = None,
) -> Profile:
    """Activations and gradients by layer, of one forward and backward pass.

    Args:
        model: in the mode in which it is to be seen.
        loss_fn: of the output and what follows x in the batch; one number.
        batch: (x, y), or x.
        layers: names of modules; of several outputs the first tensor counts.
            By default every module that has no others inside.

    Returns:
        Statistics and norms as a :class:`Profile`.

    Raises:
        ValueError: there is no module of that name.

    Glorot & Bengio (2010) look at networks in this way. Chapter 3.
    """
    modules = dict(model.named_modules())
    wanted = _leaves(model) if layers is None else tuple(layers)
    if missed := set(wanted) - set(modules):
        raise ValueError(f"the model has no modules {sorted(missed)}")
    watched, state, names = _Watched(), _state(model), _names(model)
    with _hooked(h for n in wanted for h in watched.register(n, modules[n])):
        _, grads = _gradient(model, loss_fn, batch, state, names)
    called = tuple(row["layer"] for row in watched.rows)
    kinds = tuple(type(modules[name]).__name__ for name in called)
    own = [[n for n in _own(modules[c], c) if n in grads] for c in called]
    weight = [_norm(grads[n] for n in o) if o else math.nan for o in own]
    read = ("mean", "std", "flat", "gradient")
    columns = [[row[key] for row in watched.rows] for key in read]
    return Profile(called, kinds, *map(_numbers, [*columns, weight]))


class ScaleInvariance(NamedTuple):
    """How far parameters are from scale invariance; 0 is invariant.

    One entry for each tensor of parameters.
    """

    names: tuple[str, ...]
    """Of the parameters."""
    cosine: Tensor
    """(P,), of the angle between w and the gradient; 0 where one is zero."""
    gradient: Tensor
    """(P,), ``|c * grad(c * w) - grad(w)| / |grad(w)|``."""
    loss: Tensor
    """(P,), ``|L(c * w) - L(w)| / |L(w)|``."""

    def invariant(self, tolerance: float = 1e-3) -> tuple[str, ...]:
        """Names of the parameters whose three numbers are all within it.

        The default leaves room for the eps of a norm, which breaks the
        invariance a little, and for float32.
        """
        worst = torch.stack([self.cosine.abs(), self.gradient, self.loss])
        within = (worst <= tolerance).all(0).tolist()
        return tuple(n for n, w in zip(self.names, within, strict=True) if w)


def scale_invariance(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Tensor | Sequence,
    *,
    factor: float = 2.0,
    names: Sequence[str] | None = None,
) -> ScaleInvariance:
    """Whether the loss depends on a tensor of parameters' direction only.

    Where ``L(c * w) = L(w)`` for every c > 0, as for the weights in front of
    batch norm, the gradient is orthogonal to w, and shrinks as w grows:
    ``<w, grad(w)> = 0`` and ``grad(c * w) = grad(w) / c``. Each tensor is
    scaled by itself, the others stay. The three equations are checked at the
    model's parameters, on one batch, with the same noise.

    A gradient that is zero but for rounding, beside that of all parameters,
    counts as zero: so it is for a bias in front of batch norm.

    Args:
        model: in training mode, for batch norm to follow the batch.
        loss_fn: of the output and what follows x in the batch; one number.
        batch: (x, y), or x.
        factor: c, above 0 and not 1.
        names: of the parameters; by default all that require a gradient.

    Returns:
        By how much each equation fails, as a :class:`ScaleInvariance`.

    Raises:
        ValueError: a factor of 1, or not above 0; an unknown name.

    van Laarhoven (2017); Arora, Li & Lyu (2019, lemma 2.4). Chapter 3.
    """
    if not 0 < factor < math.inf or factor == 1:
        raise ValueError(f"factor={factor} must be above 0 and not 1")
    names, start = _names(model, names), _state(model)
    loss, grads = _gradient(model, loss_fn, batch, start, _names(model))
    whole = _norm(grads.values())
    rows = []
    for name in progress(names, "scale invariance", "parameters"):
        w, g = start[name], grads[name]
        scaled = start | {name: factor * w}
        there, after = _gradient(model, loss_fn, batch, scaled, [name])
        zero = 1e3 * torch.finfo(g.dtype).eps * whole
        length, change = _norm([g]), _norm([factor * after[name] - g])
        product = (w * g).double().sum().item() if length > zero else 0.0
        cosine = _share(product, _norm([w]) * length) if product else 0.0
        still = max(length, change) <= zero
        relative = 0.0 if still else _share(change, length)
        rows.append((cosine, relative, _share(abs(there - loss), abs(loss))))
    numbers = _numbers(rows).reshape(-1, 3).unbind(1)
    return ScaleInvariance(tuple(names), *numbers)


class GradientNoise(NamedTuple):
    """How the gradient of a mini-batch scatters, by :func:`gradient_noise`.

    One entry for each batch size B.
    """

    batch_size: Tensor
    """(S,)."""
    variance: Tensor
    """(S,), the mean square distance of a mini-batch's gradient g from its
    expectation, ``E|g - E g|^2``. Where the examples do not see each other it
    is the trace of the covariance of one example's gradient, over B."""
    square: Tensor
    """(S,), ``|E g|^2``. Batch norm changes it with B, too."""
    scale: Tensor
    """(S,), ``B * variance / square``, the simple noise scale. It is the batch
    size at which noise and signal are alike, and infinite where the draws do
    not tell the signal from zero."""


def gradient_noise(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Tensor | Sequence,
    batch_sizes: Sequence[int],
    *,
    draws: int = 32,
    seed: int = 0,
) -> GradientNoise:
    """The noise of the gradient by batch size.

    For each size mini-batches are drawn from the examples of ``batch``, with
    replacement. Variance and square are estimated without bias: with the
    mean gradient m of K draws and their unbiased variance v (summed over the
    parameters), by v and ``|m|^2 - v / K``. The noise of dropout and the like
    is drawn for each mini-batch and counts.

    Args:
        model: in the mode of interest.
        loss_fn: of the output and what follows x in the batch: a mean over
            the examples, one number.
        batch: (x, y), or x: tensors whose first axis is that of the examples.
        batch_sizes: the sizes, at least 1.
        draws: mini-batches of each size, at least 2.
        seed: of the choice of the examples.

    Returns:
        Variance, square and noise scale as a :class:`GradientNoise`.

    Raises:
        ValueError: fewer than 2 draws, or a batch size below 1.

    McCandlish, Kaplan, Amodei & the OpenAI Dota Team (2018, section 2.2).
    Chapter 3.
    """
    if draws < 2 or min(batch_sizes, default=1) < 1:
        raise ValueError(
            "draws must be at least 2 and a batch size at least 1, "
            f"but got draws={draws} and batch_sizes={list(batch_sizes)}"
        )
    parts = [torch.as_tensor(part) for part in _parts(batch)]
    names, state = _names(model), _state(model)
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in batch_sizes for _ in range(draws)]
    found: dict[int, Moments] = {}
    with _put_back(model):
        for k, size in enumerate(progress(sizes, "gradient noise", "draws")):
            index = torch.randint(len(parts[0]), (size,), generator=generator)
            drawn = [part[index.to(part.device)] for part in parts]
            _, grads = _gradient(
                model, loss_fn, drawn, state, names, same_noise=False
            )
            g = torch.cat([grads[n].double().flatten() for n in names])
            one = Moments(1, g, torch.zeros_like(g))
            row = k // draws
            found[row] = found[row].merge(one) if row in found else one
    rows = []
    for size, seen in zip(batch_sizes, found.values(), strict=True):
        variance = seen.unbiased_var.sum().item()
        square = _norm([seen.mean]) ** 2 - variance / draws
        scale = size * variance / square if square > 0 else math.inf
        rows.append((size, variance, square, scale))
    return GradientNoise(*_numbers(rows).reshape(-1, 4).unbind(1))


# States


def _state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, without their history."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{name or 'the model'!r} is a ScriptModule, which would go "
                "on with its own parameters: give the module it was made of"
            )
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in state.items()}


def _earlier(model: nn.Module, before: Mapping[str, Tensor]):
    """The state in which what `before` holds has its values."""
    state = _state(model)
    for name, _ in model.named_parameters():
        if name not in before:
            raise ValueError(f"the earlier state lacks {name!r}")
    for name in state.keys() & before.keys():
        shapes = tuple(before[name].shape), tuple(state[name].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name!r} has shape {shapes[0]} in the earlier state and "
                f"{shapes[1]} in the model"
            )
        state[name] = before[name].detach().to(state[name].device)
    return state


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restore modes, torch's random state, and generators of the modules."""
    modes = [(module, module.training) for module in model.modules()]
    generators = [
        (value, value.get_state())
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    devices = {t.device for t in _state(model).values() if t.is_cuda}
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for generator, state in generators:
            generator.set_state(state)


# Passes


def _parts(batch) -> list:
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


class _Lent(nn.Module):
    """A model, and what is done with it while a state is lent to it.

    The backward pass, too: checkpoints run the model again in it, and a loss
    may look at the parameters.
    """

    def __init__(self, model: nn.Module, work: Callable) -> None:
        super().__init__()
        self.model, self.work = model, work

    def forward(self):
        return self.work()


def _lend(model: nn.Module, state: dict[str, Tensor], work: Callable):
    """What work() returns while the model is in a state."""
    lent = {f"model.{name}": tensor for name, tensor in state.items()}
    # Code that was compiled without the hooks would not call them.
    with torch.compiler.set_stance("force_eager"):
        return functional_call(_Lent(model, work), lent, ())


def _call(model: nn.Module, device: torch.device, batch) -> tuple:
    """The output of the model, and what follows x in the batch."""
    x, *rest = (_to(device, part) for part in _parts(batch))
    return (model(**x) if isinstance(x, Mapping) else model(x)), *rest


def _device(state: dict[str, Tensor]) -> torch.device:
    return next(iter(state.values())).device


def _to(device: torch.device, part):
    if isinstance(part, Mapping):
        return {name: _to(device, value) for name, value in part.items()}
    return part.to(device) if isinstance(part, Tensor) else part


def _gradient(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch,
    state: dict[str, Tensor],
    names: Sequence[str],
    same_noise: bool = True,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient in a state, with respect to the named parameters.

    Called again, it draws the same noise, unless told otherwise.
    """
    aside = _put_back(model) if same_noise else nullcontext()
    with aside, torch.inference_mode(False), torch.enable_grad():
        state = {name: tensor.clone() for name, tensor in state.items()}
        leaves = [state[name].requires_grad_() for name in names]

        def work():
            loss = loss_fn(*_call(model, _device(state), batch))
            return loss, _gradients(loss, leaves)

        loss, grads = _lend(model, state, work)
    return loss.item(), dict(zip(names, grads, strict=True))


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of one number, dense; zero where it depends on nothing."""
    if loss.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, not one number"
        )
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [g.to_dense() if g.is_sparse else g for g in grads]


class _Watched:
    """What hooks see of modules: a row for each call of one."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self._flat: list[float] = []  # of the calls that have not returned

    def register(self, name: str, module: nn.Module) -> list:
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(partial(self._after, name)),
        ]

    def _before(self, module, args, kwargs) -> None:
        # Now, because an activation function may overwrite its input.
        self._flat.append(_flat(module, [*args, *kwargs.values()]))

    def _after(self, name, module, inputs, output) -> None:
        flat, output = self._flat.pop(), _first_tensor(output)
        if output is None:
            return
        values = Moments.of(output.detach().double().flatten(), [0])
        row = {"layer": name, "flat": flat, "gradient": math.nan}
        row["mean"], row["std"] = values.mean.item(), values.var.sqrt().item()
        self.rows.append(row)
        if output.requires_grad:
            output.register_hook(lambda g: row.update(gradient=_norm([g])))


@contextmanager
def _hooked(handles) -> Iterator[None]:
    """Remove the hooks at the end, also where one could not be made."""
    hung = []
    try:
        hung.extend(handles)
        yield
    finally:
        for handle in hung:
            handle.remove()


def _inputs(model, batch, state, layers, axis) -> dict[str, Tensor]:
    """What each layer is given, as (units, values)."""
    seen: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())
    if missed := set(layers) - set(modules):
        raise ValueError(f"the model has no modules {sorted(missed)}")

    def look(name):
        def hook(module, args, kwargs):
            x = _first_tensor([*args, *kwargs.values()])
            if x is not None:
                units = x.detach().double().movedim(axis, 0).flatten(1)
                seen.setdefault(name, []).append(units)

        return hook

    state = {name: tensor.clone() for name, tensor in state.items()}
    with (
        torch.no_grad(),
        _hooked(
            modules[name].register_forward_pre_hook(
                look(name), with_kwargs=True
            )
            for name in layers
        ),
    ):
        _lend(model, state, lambda: _call(model, _device(state), batch))
    return {name: torch.cat(parts, 1) for name, parts in seen.items()}


# Names


def _names(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """The parameters that require a gradient, or those asked for."""
    able = [n for n, p in model.named_parameters() if p.requires_grad]
    if not able:
        raise ValueError("the model has no parameter that requires a gradient")
    if missed := set(names or ()) - set(able):
        raise ValueError(
            f"{sorted(missed)} are not among the parameters that require a "
            f"gradient: {', '.join(able)}"
        )
    return able if names is None else list(names)


def _own(module: nn.Module, layer: str) -> list[str]:
    """Full names of the parameters of a module itself.

    What a parametrization has made of a weight is the module's own.
    """
    prefix = f"{layer}." if layer else ""
    return [
        prefix + name
        for name, _ in module.named_parameters()
        if "." not in name or name.startswith("parametrizations.")
    ]


def _layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that have a weight of two axes or more."""
    wide = {n for n, p in model.named_parameters() if p.dim() > 1}
    return tuple(
        layer
        for layer, module in model.named_modules()
        if "parametrizations" not in layer and wide & {*_own(module, layer)}
    )


def _leaves(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that have no others inside."""
    return tuple(
        layer
        for layer, module in model.named_modules()
        if "parametrizations" not in layer
        and {n for n, _ in module.named_children()} <= {"parametrizations"}
    )


def _inside(layer: str, names: Sequence[str]) -> list[str]:
    """Those of the parameters that are inside a layer."""
    return [n for n in names if n.startswith(f"{layer}." if layer else "")]


# Numbers

FLAT = 0.05
"""Slope under which an activation function counts as flat."""

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid),
    *(nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
)


def _flat(module: nn.Module, inputs) -> float:
    """The share of the inputs at which an activation function is flat."""
    if not isinstance(module, _ELEMENTWISE):
        return math.nan
    with torch.enable_grad():
        x = inputs[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(module.forward(x.clone()).sum(), x)
    return (slope.abs() < FLAT).double().mean().item()


def _drift(old: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    """Shift of mean and standard deviation, distance, earlier deviation."""
    a, b = (Moments.of(x, [1]) for x in (old, new))
    stds = [m.var.sqrt().squeeze(1) for m in (a, b)]
    gap = (new.sort(1).values - old.sort(1).values).abs()
    shift = (b.mean - a.mean).squeeze(1)
    told = shift, stds[1] - stds[0], gap.mean(1), stds[0]
    return tuple(t.cpu() for t in told)


def _first_tensor(values) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    if isinstance(values, (tuple, list)):
        return next((v for v in values if isinstance(v, Tensor)), None)
    return None


def _norm(tensors) -> float:
    """The l2 norm of some tensors as one vector."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return math.hypot(*(norm.item() for norm in norms))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _numbers(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
