"""Which layer of a model is called, on whose output, and who uses its own.

What a model does cannot be read from the list of its layers: it stands in
``forward``, which is any Python. :func:`look` finds out in two ways. It runs
the model symbolically, with :mod:`torch.fx`, on every path that it may take;
and, where there is an example, it runs the model on that.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError
from torch.nn import Module, Sequential
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Example = Tensor | tuple | list | Mapping | None
"""The arguments of one call: x, (x, ...), {"name": x}, or none known."""


class Call:
    """One call of a layer: on whose output, and who uses its own.

    Attributes:
        layer: the name of the layer.
        source: the call that made its input, or in words where that comes
            from.
        users: the calls that take its output, or words. What only asks for
            the output's shape or dtype is no user.
        rank: the number of axes of its input, or None where it is not known.
    """

    def __init__(self, layer: str, rank: int | None = None) -> None:
        self.layer = layer
        self.rank = rank
        self.source: Call | str = UNKNOWN
        self.users: list[Call | str] = []


UNKNOWN = "an operation that is not a layer"


class Seen(NamedTuple):
    """What is known of a model; modules go by their names."""

    calls: list[Call]
    read: set[str]
    """Modules whose tensors are used elsewhere than in their own call."""
    hidden: dict[str, str]
    """Modules that may be called by code that was not seen: by which."""


def look(model: Module, example: Example = None) -> Seen:
    """Find the calls of a model's layers, on every path that is seen.

    Where the model decides by values, as in ``if x.sum() > 0``, both ways are
    followed; arguments with a default are left out, and also given. A part
    that cannot be traced counts as one step where it is called, and is traced
    by itself. If that fails too, its children are traced, each of which is
    taken to be called as a whole.

    With an example the model also runs on that, without gradients, and the
    children of a part that cannot be traced are seen in this run.

    Args:
        model: a copy of it is run, which has the model's own parameters and
            copies of its buffers.
        example: a tensor, a tuple of arguments, or a dictionary of keyword
            arguments.

    Chapter 4.
    """
    seen = Seen([], set(), {})
    for run in (_trace, partial(_observe, example=example)):
        double = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        with torch.no_grad():
            run(double, seen)
    return seen


def plain(module: Module) -> bool:
    """Whether a module computes as its class in torch.nn or normlib does."""
    methods = [_method(module, n) for n in ("forward", "_conv_forward")]
    return "forward" not in vars(module) and all(
        str(m.__module__).startswith(("torch.nn.", *_OURS))
        for m in methods
        if m is not None
    )


_OURS = ("normlib.modules", "normlib.variants", "normlib.folding")


def _method(module: Module, name: str):
    return inspect.getattr_static(type(module), name, None)


def _leaf(module: Module) -> bool:
    """Whether a call of it is one step, not to be looked into."""
    inside = isinstance(module, Sequential) or _container(module)
    return plain(module) and not inside


def _container(module: Module) -> bool:
    """Whether it only holds others: whoever has it calls them."""
    return _method(module, "forward") is Module.forward


def _parent(module: Module) -> bool:
    return next(module.children(), None) is not None


def _hooked(module: Module) -> bool:
    """Whether others are told of its calls, and may change what they give."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _held(module: Module) -> Iterator[Module]:
    """The modules that a forward has at hand: children, those in lists."""
    for child in module.children():
        if _container(child):
            yield from _held(child)
        else:
            yield child


# By tracing


class _UntraceableError(Exception):
    """Which module cannot be traced, and why; or whether it refuses."""

    def __init__(
        self, module: Module, reason: Exception, reached: list[Module]
    ) -> None:
        said = str(reason).strip().partition("\n")[0]
        short = said if len(said) < 70 else f"{said[:66]} ..."
        super().__init__(f"{type(reason).__name__}: {short}")
        self.module = module
        self.reached = reached
        self.refused = not _by_tracing(reason)


def _by_tracing(reason: Exception) -> bool:
    """Whether a stand-in for a value is to blame, not the model itself.

    The model's own messages may show one too, as ``Proxy(name)``.
    """
    frame = reason.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals["__name__"] if frame else __name__
    return raised_in.startswith(("torch.fx", __name__)) or bool(
        re.search(r"\b(Proxy|Attribute)\b(?!\()", str(reason))
    )


def _trace(model: Module, seen: Seen) -> None:
    """Run the model symbolically, and by itself each part that it cannot."""
    names = {module: name for name, module in model.named_modules()}
    leaves = [module for module in names if _leaf(module)]
    # Hooks are not run: they may keep what they see.
    apart = [m for m in names if _hooked(m) and not _leaf(m)]
    steps, done = {*leaves, *apart}, set(leaves)
    regions = [model, *apart]
    tracer = partial(_Tracer, names, steps)

    def leave_to_children(module, why, reached=()) -> None:
        for child in (*_held(module), *reached):
            seen.hidden[names[child]] = (
                f"{_called(names[module])}, which {why}"
            )
            regions.append(child)

    for leaf in leaves:
        if _parent(leaf):
            leave_to_children(leaf, "is not looked into")
    for region in regions:
        while region not in done:
            try:
                with _Watch(model, seen) as watch:
                    seen.calls.extend(_calls(region, tracer, watch))
                done.add(region)
            except _UntraceableError as error:
                if error.module is region:
                    why = f"cannot be traced ({error})"
                    leave_to_children(region, why, error.reached)
                    done.add(region)
                else:
                    steps.add(error.module)
                    regions.append(error.module)


def _calls(region: Module, tracer, watch) -> list[Call]:
    """All calls in a region: its optional arguments left out, then given.

    A region may insist on them; and given, they may be past tracing.
    """
    try:
        parameters = inspect.signature(region.forward).parameters.values()
    except ValueError as error:
        raise _UntraceableError(region, error, []) from error
    optional = any(p.default is not p.empty for p in parameters)
    try:
        calls = _paths(region, tracer, watch, given=False)
    except _UntraceableError as error:
        if not (optional and error.refused and error.module is region):
            raise
        return _paths(region, tracer, watch, given=True)
    if optional:
        try:
            calls += _paths(region, tracer, watch, given=True)
        except _UntraceableError as error:
            if error.module is not region:
                raise
    return calls


def _paths(region: Module, tracer, watch, given: bool) -> list[Call]:
    """The same for every sequence of answers to what a region asks.

    An answer on which the region itself raises an error leads nowhere.
    """
    found, failure, pending = [], None, [()]
    for answers in pending:
        run = tracer(given, answers)
        try:
            found.append(run.calls(run.trace(region), watch))
        except Exception as error:
            # A module may be empty, and then it is false.
            inner = run.failed is not None
            module = run.failed if inner else region
            failure = _UntraceableError(module, error, run.reached)
            if inner or not (failure.refused and run.asked):
                raise failure from error
        new = range(len(answers), len(run.asked))
        pending += [(*run.asked[:i], False) for i in new]
        if len(pending) > _MOST:
            reason = TraceError(f"more than {_MOST} paths")
            raise _UntraceableError(region, reason, run.reached)
    if not found:
        raise failure
    return [call for calls in found for call in calls]


_MOST = 32
"""Paths through a module that are followed, and decisions on each."""


class Proxy(fx.Proxy):
    """Stands for a value, and does not let the model change it unseen."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise TraceError(f"an assignment to {name!r} of a Proxy")
        super().__setattr__(name, value)


class _Tracer(fx.Tracer):
    """Symbolic run of a module, with answers to what it asks of values.

    Args:
        names: of all modules.
        steps: the modules that are not looked into.
        given: whether arguments with a default are given.
        answers: to the first questions in turn; to the rest, yes.
    """

    def __init__(self, names, steps, given, answers) -> None:
        super().__init__()
        self.names, self.steps = names, steps
        self.given, self.answers = given, answers
        self.asked: list[bool] = []
        self.made: dict[fx.Node, Call] = {}
        self.depth = 0
        self.reached: list[Module] = []
        self.failed: Module | None = None

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """The function to run, and a placeholder for each argument."""
        args, kwargs = [], {}
        forward = self.root.forward
        for p in inspect.signature(forward).parameters.values():
            left_out = p.default is not p.empty and not self.given
            if left_out or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            value = self.create_proxy("placeholder", p.name, (), {})
            if p.kind is p.KEYWORD_ONLY:
                kwargs[p.name] = value
            else:
                args.append(value)

        def run(*args):
            return forward(*args, **kwargs)

        return run, args

    def call_module(self, m, forward, args, kwargs):
        """A node for a step; the others run.

        What a forward puts together itself, such as a slice of a Sequential,
        is a part of that forward.
        """
        part = m in self.submodule_paths
        if part and not self.depth:
            self.reached.append(m)
        if m in self.steps:
            path = self.path_of_module(m)
            proxy = self.create_proxy("call_module", path, args, kwargs)
            self.made[proxy.node] = Call(self.names[m])
            return proxy
        self.depth += part
        try:
            return forward(*args, **kwargs)
        except Exception:
            if part and self.failed is None:
                self.failed = m
            raise
        finally:
            self.depth -= part

    def proxy(self, node):
        """What stands for the value of a node."""
        return Proxy(node, self)

    def to_bool(self, obj):
        """The next answer."""
        if self.depth:
            raise TraceError("a part of the model decides by values")
        if len(self.asked) == _MOST:
            raise TraceError(f"more than {_MOST} decisions by values")
        known = self.answers[len(self.asked) :]
        self.asked.append(known[0] if known else True)
        return self.asked[-1]

    def calls(self, graph: fx.Graph, watch) -> list[Call]:
        """What the graph tells of the steps."""
        for node, call in self.made.items():
            inputs = node.all_input_nodes
            if inputs:
                call.source = self._who(inputs[0])
            call.users = [self._who(n) for n in node.users if not _looks(n)]
        for name, value in _kept(self.root, self.names):
            if isinstance(value, fx.Proxy) and value.node in self.made:
                self.made[value.node].users.append(name)
        for node in graph.find_nodes(op="get_attr"):
            if not all(map(_looks, node.users)):
                watch.use("", attrgetter(node.target)(self.root))
        return [*self.made.values()]

    def _who(self, node: fx.Node) -> Call | str:
        if node.op == "placeholder":
            return f"the input {node.target}"
        if node.op == "output":
            return "the output"
        return self.made.get(node, _title(node.target))


def _title(function: Any) -> str:
    """A function, or the name of a method, in words."""
    return f"{getattr(function, '__name__', function)}()"


def _looks(node: fx.Node) -> bool:
    """Whether it only asks for what any layer's output tells alike."""
    if node.op == "call_method":
        return node.target in _QUESTIONS
    return node.target is getattr and node.args[1] in _ASPECTS


_ASPECTS = ("device", "dtype", "is_cuda", "ndim", "requires_grad", "shape")
_QUESTIONS = ("dim", "is_floating_point", "numel", "size")
_LOOKS = {
    *(getattr(Tensor, name).__get__ for name in _ASPECTS),
    *(getattr(Tensor, name) for name in _QUESTIONS),
}


# By running


class _Watch(TorchFunctionMode):
    """Notes which tensors functions are called on.

    Of the modules' own tensors it notes in ``seen.read`` whose they are; of
    those in ``made``, in the call that made them, who uses them.
    """

    def __init__(self, model: Module, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.own = {
            name: {*map(id, _own(module))}
            for name, module in model.named_modules()
        }
        self.owner = {i: name for name, ids in self.own.items() for i in ids}
        self.made: dict[int, tuple[Tensor, Call]] = {}
        self.inside = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.inside and func not in _LOOKS:
            self.use(_title(func), (args, kwargs))
        return func(*args, **kwargs)

    def use(self, user: Call | str, values: Any) -> None:
        """Note that a user takes some values, nested in any way."""
        for value in tree_leaves(values):
            if id(value) in self.made:
                self.made[id(value)][1].users.append(user)
            if id(value) in self.owner:
                self.seen.read.add(self.owner[id(value)])

    def enter(self, name: str, module, args, kwargs) -> None:
        """Before a call of a layer: a forward pre-hook."""
        if not self.inside:
            values = tree_leaves((args, kwargs))
            x = next((v for v in values if isinstance(v, Tensor)), None)
            call = Call(name, None if x is None else x.dim())
            if id(x) in self.made:
                call.source = self.made[id(x)][1]
            self.use(call, values)
            if self.own[name] != {*map(id, _own(module))}:
                self.seen.read.add(name)  # functional_call lent it others
            self.seen.calls.append(call)
        self.inside += 1

    def leave(self, module, args, output) -> None:
        """After it: a forward hook."""
        self.inside -= 1
        if not self.inside and isinstance(output, Tensor):
            # Held, so that no other tensor gets its id.
            self.made[id(output)] = output, self.seen.calls[-1]

    def hear(self, name: str, module, args, kwargs, output) -> None:
        """After a call that others are told of: a forward hook."""
        if not self.inside:
            self.use(name, [*_leaves((args, kwargs, output))])


class _WatchBelow(TorchDispatchMode):
    """Notes the same of what no function in Python shows, as scripts, vmap."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.watch.inside:
            self.watch.use(_title(func.overloadpacket), (args, kwargs))
        return func(*args, **kwargs)


def _own(module: Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _leaves(value: Any, met: set[int] | None = None) -> Iterator[Any]:
    """What is nested in a value, in the attributes of its objects too."""
    met = set() if met is None else met
    for leaf in tree_leaves(value):
        yield leaf
        whole = isinstance(leaf, (Tensor, Module, fx.Proxy)) or callable(leaf)
        if not whole and id(leaf) not in met and hasattr(leaf, "__dict__"):
            met.add(id(leaf))
            yield from _leaves({**vars(leaf)}, met)


def _kept(model: Module, names) -> Iterator[tuple[str, Any]]:
    """What the modules keep in attributes of their own, and where."""
    met: set[int] = set()
    for module in model.modules():
        attributes = {
            key: value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        for value in _leaves(attributes, met):
            yield f"an attribute of {_called(names[module])}", value


def _called(name: str) -> str:
    return repr(name) if name else "the model"


def _observe(model: Module, seen: Seen, example: Example) -> None:
    """Run the model on an example; note its calls and where tensors go."""
    if example is None:
        return
    watch = _Watch(model, seen)
    for name, module in model.named_modules():
        if _leaf(module) and not _parent(module):
            module.register_forward_pre_hook(
                partial(watch.enter, name), with_kwargs=True
            )
            module.register_forward_hook(watch.leave)
        elif _hooked(module):
            module.register_forward_hook(
                partial(watch.hear, f"a hook of {_called(name)}"),
                with_kwargs=True,
            )
    if isinstance(example, Mapping):
        args, kwargs = (), example
    else:
        single = isinstance(example, Tensor)
        args, kwargs = ((example,) if single else tuple(example)), {}
    with watch, _WatchBelow(watch):
        output = model(*args, **kwargs)
    watch.use("the output", [*_leaves(output)])
    names = {module: name for name, module in model.named_modules()}
    for name, value in _kept(model, names):
        if id(value) in watch.made:
            watch.use(name, value)
    seen.hidden.clear()  # this run has shown what tracing could not
