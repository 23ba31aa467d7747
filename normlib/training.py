"""The one training loop of all chapters."""

import math
from dataclasses import dataclass, field

import numpy
import torch
from torch import nn

from normlib.data import Split


@dataclass
class History:
    """What one run of :func:`fit` left behind.

    Attributes:
        loss: training loss of each step, before the step was taken. A run
            that diverged ends with its first loss that is not finite.
        accuracy: share of the test set that is classified correctly at the
            end, in evaluation mode. A network whose scores are NaN names the
            same class for everything, so a diverged run scores about chance.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: float = math.nan

    @property
    def diverged(self) -> bool:
        """Whether the run was stopped by a loss that is not finite."""
        return bool(self.loss) and not math.isfinite(self.loss[-1])

    def steps_to(self, loss: float, window: int = 10) -> int | None:
        """First step at which the loss averaged over a window is reached.

        Args:
            loss: the loss to reach.
            window: number of steps in the average.

        Returns:
            The number of steps taken, or ``None`` where it was never reached.
        """
        for step in range(window, len(self.loss) + 1):
            if numpy.mean(self.loss[step - window : step]) <= loss:
                return step
        return None


def fit(
    model: nn.Module,
    data: Split,
    *,
    lr: float,
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
) -> History:
    """Train a classifier by plain stochastic gradient descent.

    Cross-entropy, no momentum, no weight decay, no schedule: what differs
    between two runs is what their arguments say. Every epoch is shuffled
    anew, and its last batch is dropped where it is not full.

    Args:
        model: maps ``(N, features)`` to ``(N, classes)`` scores; moved to the
            device and changed in place.
        data: the training and the test part.
        lr: learning rate.
        steps: number of steps, fewer only where the loss stops being finite.
        batch_size: examples in a step.
        seed: of the order of the examples.
        device: where to train.

    Returns:
        The losses, and the accuracy on the test part.

    Raises:
        ValueError: where the batch is larger than the training part.

    Chapter 2.
    """
    model.to(device).train()
    x, y, x_test, y_test = _tensors(data, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    history = History()
    for index in _batches(len(x), batch_size, steps, seed):
        loss = nn.functional.cross_entropy(model(x[index]), y[index])
        history.loss.append(loss.item())
        if history.diverged:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    history.accuracy = accuracy(model, x_test, y_test)
    return history


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of examples classified correctly, in evaluation mode.

    Args:
        model: maps ``(N, features)`` to ``(N, classes)`` scores; its mode is
            restored.
        x: the examples.
        y: their labels.

    Returns:
        A share between 0 and 1.

    Chapter 2.
    """
    was_training = model.training
    model.eval()
    share = (model(x).argmax(1) == y).double().mean().item()
    model.train(was_training)
    return share


def _tensors(data: Split, device: str) -> list[torch.Tensor]:
    return [
        torch.as_tensor(
            part,
            dtype=torch.float32 if part.dtype.kind == "f" else torch.int64,
            device=device,
        )
        for part in data
    ]


def _batches(count: int, batch_size: int, steps: int, seed: int):
    if batch_size > count:
        raise ValueError(f"batch_size={batch_size} exceeds {count} examples")
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // batch_size
    for step in range(steps):
        k = step % per_epoch
        if k == 0:
            order = torch.randperm(count, generator=generator)
        yield order[k * batch_size : (k + 1) * batch_size]
