"""The full-size experiments of chapters 3 and 6, and what they left.

``python -m benchmarks.reproduce --data DIR --device cuda`` from the root of a
checkout needs torch, numpy and CIFAR-10 in DIR. Every run that is finished is
written down; the same command goes on where the last one stopped. The
protocol is in benchmarks/README.md.
"""

import contextlib
import copy
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normlib
from benchmarks.provenance import (
    ROOT,
    asked,
    name_of,
    options,
    provenance,
    write,
)
from normlib import data, diagnostics, models, variants

OUT = ROOT / "_build" / "records"


def lp(p):
    """The norm of Santurkar et al.: the Lp norm taken before the shift."""
    return partial(variants.LpBatchNorm, p=p, before_shift=True)


NORMS = {
    "none": None,
    "batch norm": normlib.BatchNorm,
    "noisy batch norm": variants.NoisyBatchNorm,
    "L1": lp(1),
    "L2": lp(2),
    "Linf": lp(math.inf),
    "group norm": lambda c: normlib.GroupNorm(min(32, c // 2), c),
}

FULL = {
    "seeds": 3,
    # Santurkar et al. (2018), section 2 and appendix A.
    "vgg": {
        "model": "full",
        "steps": 15_000,
        "batch_size": 128,
        "lr": 0.1,
        "marks": 30,
        "accuracy_on": 10_000,
        "reach": [0.5, 4.0],
    },
    "deep-linear": {
        "depth": 25,
        "width": 10,
        "examples": 1_000,
        "steps": 10_000,
        "lr": 1e-6,
        "marks": 12,
        "reach": [0.01, 30.0],
    },
    "learning-rates": {
        "model": "full",
        "steps": 2_000,
        "batch_size": 128,
        "lr": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
        "marks": 4,
        "accuracy_on": 10_000,
    },
    # Wu & He (2018), table 2: the learning rate in step with the batch.
    "batch-sizes": {
        "model": "full",
        "images": 100_000,
        "batch_size": [32, 16, 8, 4, 2],
        "lr_at_32": 0.1,
        "marks": 10,
        "accuracy_on": 10_000,
    },
}
"""What is run. A list is run through; the steps of "batch-sizes" follow from
the images."""

QUICK = {
    "seeds": 1,
    "vgg": FULL["vgg"]
    | {"model": "small", "steps": 60, "batch_size": 64}
    | {"marks": 2, "accuracy_on": 500},
    "deep-linear": FULL["deep-linear"]
    | {"examples": 100, "steps": 100, "lr": 1e-5, "marks": 2},
    "learning-rates": FULL["learning-rates"]
    | {"model": "small", "steps": 30, "batch_size": 64, "lr": [0.01, 1.0]}
    | {"marks": 2, "accuracy_on": 500},
    "batch-sizes": FULL["batch-sizes"]
    | {"model": "small", "images": 512, "batch_size": [32, 2]}
    | {"marks": 2, "accuracy_on": 500},
}


class Run(NamedTuple):
    """One training run: what, with which norm, from which seed."""

    experiment: str
    variant: str
    seed: int
    settings: dict

    @property
    def title(self):
        """What tells it from the others."""
        s = self.settings
        where = {
            "learning-rates": f", learning rate {s.get('lr')}",
            "batch-sizes": f", batch {s.get('batch_size')}",
        }.get(self.experiment, "")
        return f"{self.experiment}: {self.variant}{where}, seed {self.seed}"


def runs(scale) -> Iterator[Run]:
    """All runs, the most important first."""
    yield from named("vgg", ("none", "batch norm", "noisy batch norm"), scale)
    yield from named("deep-linear", ("none", "batch norm"), scale)
    told, seeds = scale["learning-rates"], range(scale["seeds"])
    for seed, lr in itertools.product(seeds, told["lr"]):
        for norm in ("none", "batch norm"):
            yield Run("learning-rates", norm, seed, told | {"lr": lr})
    yield from named("vgg", ("L1", "L2", "Linf"), scale)
    told = scale["batch-sizes"]
    for seed, size in itertools.product(seeds, told["batch_size"]):
        more = {
            "batch_size": size,
            "steps": told["images"] // size,
            "lr": told["lr_at_32"] * size / 32,
        }
        for norm in ("batch norm", "group norm"):
            yield Run("batch-sizes", norm, seed, told | more)
    yield from named("deep-linear", ("L1",), scale)


def named(experiment, norms, scale) -> Iterator[Run]:
    """Runs of an experiment that differ in norm and seed."""
    for seed, norm in itertools.product(range(scale["seeds"]), norms):
        yield Run(experiment, norm, seed, scale[experiment])


# Data


class Images(NamedTuple):
    """Pixels (n, 3, 32, 32) in uint8 and labels, on the device."""

    x: Tensor
    y: Tensor
    mean: Tensor
    std: Tensor

    def batch(self, index):
        """Images of mean 0 and variance 1 in each color, channels last."""
        x = (self.x[index].float() - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)


class Lab(NamedTuple):
    """Where and how runs are made."""

    train: Images
    test: Images
    device: str
    dtype: torch.dtype
    graph: bool

    def autocast(self):
        """The dtype of training and testing; measurements are in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # A cache of the weights' casts would be part of a graph.
        return torch.autocast(
            self.device, dtype=self.dtype, cache_enabled=False
        )


def load(folder, quick) -> tuple[data.Split, str]:
    """CIFAR-10, or for a trial without it a substitute; and its name."""
    if folder is not None:
        split, name = data.cifar10(folder), "CIFAR-10"
    elif quick:
        split, name = synthetic(), "synthetic"
    else:
        sys.exit(
            "normlib: say where CIFAR-10 is, with --data DIR. To get it "
            f"(162 MB):\n  curl -L {data.CIFAR10} | tar xz -C DIR"
        )
    if quick:
        x, y, x_test, y_test = split
        split = data.Split(x[:2000], y[:2000], x_test[:500], y_test[:500])
    return split, name


def synthetic(train=2_000, test=500, seed=0) -> data.Split:
    """Images in the layout of CIFAR-10: ten blurred patterns, and noise."""
    rng = numpy.random.default_rng(seed)
    small = rng.normal(size=(10, 3, 4, 4)) * 12
    patterns = small.repeat(8, 2).repeat(8, 3)
    y = rng.integers(0, 10, train + test)
    x = patterns[y] + rng.normal(size=(train + test, 3, 32, 32)) * 60 + 120
    x = x.clip(0, 255).astype(numpy.uint8)
    return data.Split(x[:train], y[:train], x[train:], y[train:])


def on_device(split, device) -> tuple[Images, Images]:
    """Both parts, with the statistics of the first training images."""
    x, y, x_test, y_test = (
        torch.as_tensor(numpy.ascontiguousarray(part)).to(device)
        for part in split
    )
    sample = x[:10_000].double()
    mean = sample.mean((0, 2, 3)).float().reshape(3, 1, 1)
    std = sample.std((0, 2, 3)).float().reshape(3, 1, 1)
    return Images(x, y, mean, std), Images(x_test, y_test, mean, std)


def described(split, name) -> dict:
    """What the record says of the data."""
    pixels = numpy.ascontiguousarray(split.x_train)
    return {
        "name": name,
        "train": len(split.y_train),
        "test": len(split.y_test),
        "crc32": f"{zlib.crc32(pixels):08x}",
    }


# Training


class Eager:
    """A step of plain gradient descent; called with a batch's index."""

    def __init__(self, model, loss_of, lr):
        self.loss_of = loss_of
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def __call__(self, index):
        """Take the step, and return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(index)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Graph:
    """The same step, recorded as a CUDA graph and played again.

    A step is some two hundred short kernels: without a graph the GPU waits
    for Python. Recording takes some steps, and leaves the model changed.

    Raises:
        RuntimeError: it cannot be recorded. CUDA's generator of random
            numbers is then of no more use to the process.
    """

    def __init__(self, model, loss_of, lr, index):
        step = Eager(model, loss_of, lr)
        self.index = index.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step(self.index)
        torch.cuda.current_stream().wait_stream(aside)
        step.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss = loss_of(self.index)
            loss.backward()
            step.optimizer.step()
        self.loss = loss.detach()

    def __call__(self, index):
        """Take the step, and return the loss before it."""
        self.index.copy_(index)
        self.graph.replay()
        return self.loss


class NoGraph(Exception):
    """A step could not be recorded as a CUDA graph."""


def stepper(model, loss_of, lr, index, graph) -> Callable[[Tensor], Tensor]:
    """A graph if asked for, else one kernel after another."""
    if not graph:
        return Eager(model, loss_of, lr)
    before = copy.deepcopy(model.state_dict())
    try:
        step = Graph(model, loss_of, lr, index)
    except RuntimeError as error:
        raise NoGraph(str(error)) from error
    model.load_state_dict(before)
    return step


def shuffled(count, size, steps, seed) -> Tensor:
    """Indices of each step's batch, (steps, size): epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // size
    epochs = [
        torch.randperm(count, generator=generator)[: per_epoch * size]
        for _ in range(math.ceil(steps / per_epoch))
    ]
    return torch.cat(epochs).reshape(-1, size)[:steps]


def marks(steps, count) -> list[int]:
    """Steps at which to look: the first, the last, and more early ones."""
    return sorted({round(steps * (i / count) ** 2) for i in range(count + 1)})


def descend(run, step, order, look) -> list[float]:
    """Take all steps, and look before some of them and after the last.

    Returns:
        The losses, which end with the first one that is not finite.
    """
    looks = marks(len(order), run.settings["marks"])
    losses = torch.zeros(len(order), device=order.device)
    devices = [torch.cuda.current_device()] if order.is_cuda else []
    torch.manual_seed(run.seed)
    for t in range(len(order) + 1):
        if t in looks:
            if not losses[:t].isfinite().all():
                break
            tell(f"{run.title}, step {t:,} of {len(order):,}")
            with torch.random.fork_rng(devices):  # looking draws noise, too
                look(t)
        if t < len(order):
            losses[t] = step(order[t])
    losses = losses[:t].tolist()
    stop = diverged_at(losses)
    return losses if stop is None else losses[: stop + 1]


def diverged_at(losses) -> int | None:
    """The first step whose loss is not finite."""
    steps = (t for t, loss in enumerate(losses) if not math.isfinite(loss))
    return next(steps, None)


def tell(line) -> None:
    """Show on a terminal what is going on, over what was shown before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[Knormlib: {line}", end="", file=sys.stderr, flush=True)


def curve(losses, points=100) -> dict:
    """The mean loss of stretches of steps."""
    width = max(1, math.ceil(len(losses) / points))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return {"every": width, "mean": [statistics.fmean(p) for p in parts]}


# Measurements


@torch.no_grad()
def accuracy(model, images, count, lab) -> float:
    """Share of the first images classified correctly, in evaluation."""
    model.eval()
    right, count = 0, min(count, len(images.y))
    for index in torch.arange(count, device=lab.device).split(1000):
        with lab.autocast():
            scores = model(images.batch(index))
        right += (scores.argmax(1) == images.y[index]).sum().item()
    model.train()
    return right / count


def landscape(model, loss_fn, batch, lr, reach) -> dict:
    """Range of the loss, change of the gradient, and beta along a walk."""
    sizes = numpy.geomspace(*reach, 8) * lr
    walk = diagnostics.gradient_walk(model, loss_fn, batch, sizes.tolist())
    return {
        "loss_low": walk.loss.min().item(),
        "loss_high": walk.loss.max().item(),
        "grad_change_low": walk.grad_change.min().item(),
        "grad_change_high": walk.grad_change.max().item(),
        "beta": walk.beta,
    }


def covariate_shift(model, loss_fn, batch, lr) -> dict:
    """Both readings, by layer, over the step that training would take."""
    probe = copy.deepcopy(model)
    before = copy.deepcopy(probe.state_dict())
    Eager(probe, lambda _: loss_fn(probe(batch[0]), batch[1]), lr)(None)
    gradient = diagnostics.gradient_shift(probe, loss_fn, batch, before)
    drift = diagnostics.distribution_shift(probe, batch, before)
    return {
        "distance": gradient.distance.tolist(),
        "cosine": gradient.cosine.tolist(),
        "norm": gradient.norm.tolist(),
        "wasserstein": in_deviations(drift.wasserstein, drift.scale),
        "mean_shift": in_deviations(drift.mean, drift.scale),
    }


def in_deviations(shifts, scales) -> list[float]:
    """The median of each layer's units, in their standard deviations."""
    found = []
    for shift, scale in zip(shifts, scales, strict=True):
        share = (shift.abs() / scale)[scale > 0]
        found.append(share.median().item() if len(share) else math.nan)
    return found


# Experiments


def train_vgg(run, lab, deep) -> dict:
    """A VGG network on CIFAR-10, looked at now and then.

    Args:
        run: with its settings.
        lab: data and device.
        deep: whether to look at landscape and covariate shift, too.
    """
    told, lr, rows = run.settings, run.settings["lr"], []
    model = models.vgg(told["model"], norm=NORMS[run.variant], seed=run.seed)
    model.to(lab.device, memory_format=torch.channels_last)
    order = shuffled(
        len(lab.train.y), told["batch_size"], told["steps"], run.seed
    ).to(lab.device)

    def loss_of(index):
        with lab.autocast():
            scores = model(lab.train.batch(index))
        return cross_entropy(scores.float(), lab.train.y[index])

    def look(t):
        on_train = accuracy(model, lab.train, told["accuracy_on"], lab)
        on_test = accuracy(model, lab.test, len(lab.test.y), lab)
        rows.append(
            {"step": t, "train_accuracy": on_train, "test_accuracy": on_test}
        )
        if deep:
            index = order[t % len(order)]
            batch = lab.train.batch(index), lab.train.y[index]
            walk = landscape(model, cross_entropy, batch, lr, told["reach"])
            shift = covariate_shift(model, cross_entropy, batch, lr)
            rows[-1] |= {"landscape": walk, "shift": shift}

    step = stepper(model, loss_of, lr, order[0], lab.graph)
    losses = descend(run, step, order, look)
    return finished(model, losses, rows, step)


def squares(output, target) -> Tensor:
    """The sum of the squared errors."""
    return (output - target).square().sum()


def train_deep_linear(run, lab) -> dict:
    """A deep linear network, by gradient descent on all examples."""
    told, lr, rows = run.settings, run.settings["lr"], []
    model = models.deep_linear(
        told["depth"], told["width"], norm=NORMS[run.variant], seed=run.seed
    ).to(lab.device)
    generator = torch.Generator().manual_seed(run.seed)
    x, a = (
        torch.randn(n, told["width"], generator=generator).to(lab.device)
        for n in (told["examples"], told["width"])
    )
    batch = x, x @ a.T

    def look(t):
        walk = landscape(model, squares, batch, lr, told["reach"])
        shift = covariate_shift(model, squares, batch, lr)
        rows.append({"step": t, "landscape": walk, "shift": shift})

    def loss_of(_):
        return squares(model(batch[0]), batch[1])

    order = torch.zeros(told["steps"], 1, device=lab.device)
    step = stepper(model, loss_of, lr, order[0], lab.graph)
    losses = descend(run, step, order, look)
    return finished(model, losses, rows, step)


def finished(model, losses, rows, step) -> dict:
    """What is kept of a run."""
    return {
        "layers": [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ],
        "diverged_at": diverged_at(losses),
        "graph": isinstance(step, Graph),
        "loss": curve(losses),
        "marks": rows,
    }


def perform(run, lab) -> dict:
    """Make a run, and return its part of the record."""
    start = time.perf_counter()
    if run.experiment == "deep-linear":
        found = train_deep_linear(run, lab)
    else:
        found = train_vgg(run, lab, deep=run.experiment == "vgg")
    seconds = time.perf_counter() - start
    return plain({**run._asdict(), "seconds": seconds, **found})


def plain(value):
    """As JSON has it: 4 digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


# The record


def begun(out, about, settings) -> tuple[pathlib.Path, dict]:
    """The record to go on with, or a new one, and its path."""
    same = ("kind", "device", "torch", "commit")
    kind = about["kind"]
    for path in sorted(out.glob(f"reproduce-{kind}-*.json"), reverse=True):
        record = json.loads(path.read_text("utf-8"))
        old = record["provenance"]
        if record["settings"] == settings and all(
            old[key] == about[key] for key in same
        ):
            old["dirty"] = old["dirty"] or about["dirty"]
            return path, record
    path = out / name_of(about)
    if path.exists():
        sys.exit(
            f"normlib: {path} has runs of another commit, device or setting. "
            "Move it away, or choose another folder with --out."
        )
    return path, {"provenance": about, "settings": settings, "runs": []}


def as_text(record) -> str:
    """The record as JSON, a line for each run."""
    runs = ",\n".join(map(json.dumps, record["runs"]))
    head = json.dumps({**record, "runs": []}, indent=1)
    return head.replace('"runs": []', f'"runs": [\n{runs}\n]') + "\n"


def same_run(run, found) -> bool:
    """Whether a run is the one that the record has found."""
    return plain(run._asdict()) == {key: found[key] for key in run._fields}


def expected(run, record) -> float:
    """Seconds that a run may take, by those that are most like it."""
    done = record["runs"]
    like = [r for r in done if r["experiment"] == run.experiment]
    alike = [r for r in like if r["variant"] == run.variant]
    return 1.1 * max((r["seconds"] for r in alike or like or done), default=0)


def summary(record) -> str:
    """The record as text, a line for each kind of run."""
    groups: dict[str, list] = {}
    for found in record["runs"]:
        run = Run(*(found[key] for key in Run._fields))
        title = run.title.rpartition(", seed")[0]
        groups.setdefault(title, []).append(found)
    width = max(map(len, groups), default=0)
    return "\n".join(
        f"{title:{width}}  {outcome(found)}" for title, found in groups.items()
    )


def outcome(runs) -> str:
    """Lowest and highest of what runs came to, as text."""
    told = [f"{len(runs)} runs" if len(runs) > 1 else "1 run"]
    if diverged := sum(run["diverged_at"] is not None for run in runs):
        told.append(f"{diverged} diverged")
    runs = [run for run in runs if run["diverged_at"] is None]
    told.append(between("loss", [run["loss"]["mean"][-1] for run in runs]))
    for key in ("train_accuracy", "test_accuracy"):
        last = [run["marks"][-1] for run in runs]
        told.append(between(key, [row[key] for row in last if key in row]))
    return ", ".join(filter(None, told))


def between(name, values) -> str:
    """Lowest and highest, as text."""
    if not values:
        return ""
    low, high = min(values), max(values)
    told = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return f"{name.replace('_', ' ')} {told}"


def parser():
    """The options of the command."""
    found = options(__doc__, OUT)
    add = found.add_argument
    add("--data", type=pathlib.Path, help="the folder with CIFAR-10")
    add("--only", default="", help="runs whose title contains this")
    add("--quick", action="store_true", help="a trial of minutes")
    add("--budget", type=float, default=math.inf, help="seconds to fill")
    add("--dtype", choices=("bfloat16", "float32"), help="of training")
    add("--eager", action="store_true", help="without CUDA graphs")
    return found


def prepared(told) -> tuple[Lab, dict]:
    """Where and how runs are made, and what the record says of it."""
    cuda = told.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    dtype = told.dtype or ("bfloat16" if cuda else "float32")
    split, name = load(told.data, told.quick)
    lab = Lab(
        *on_device(split, told.device),
        told.device,
        getattr(torch, dtype),
        cuda and not told.eager,
    )
    settings = {
        "quick": told.quick,
        "data": described(split, name),
        "dtype": dtype,
        "channels_last": True,
        "scale": QUICK if told.quick else FULL,
    }
    return lab, plain(settings)


def again(*more) -> int:
    """Run the command anew with more options; return its status."""
    module = [sys.executable, "-m", "benchmarks.reproduce"]
    return subprocess.run([*module, *sys.argv[1:], *more]).returncode


def main():
    """Make the runs that are missing, write each down, and sum them up."""
    begin = time.perf_counter()
    told = asked(parser())
    if told.quick and told.device == "cpu":
        torch.set_num_threads(1)  # small networks gain nothing from more
    lab, settings = prepared(told)
    about = provenance("benchmarks.reproduce", told.device, told.commit)
    path, record = begun(told.out, about, settings)
    wanted = [
        run
        for run in runs(QUICK if told.quick else FULL)
        if told.only in run.title
    ]
    missing = [
        run
        for run in wanted
        if not any(same_run(run, found) for found in record["runs"])
    ]
    done = len(wanted) - len(missing)
    print(f"normlib: {done} of {len(wanted)} runs are done", flush=True)
    for run in missing:
        left = told.budget - (time.perf_counter() - begin)
        if left < expected(run, record):
            print(f"normlib: no time for the rest; next is {run.title}")
            break
        try:
            found = perform(run, lab)
        except NoGraph as error:
            print(f"normlib: no CUDA graph: {error}", flush=True)
            sys.exit(again("--eager", "--budget", f"{left:.0f}"))
        record["runs"].append(found)
        write(path, as_text(record))
        tell("")
        line = f"{run.title}: {outcome([found])}, {found['seconds']:.3g} s"
        print(line, flush=True)
    print(f"\n{summary(record)}")
    print(f"normlib: recorded in {path}")


if __name__ == "__main__":
    main()
