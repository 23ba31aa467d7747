"""Small networks of the chapters, with slots for norms and activations.

What they have in common:

- ``norm`` makes the layer of a slot from its number of channels, so
  ``norm=normlib.BatchNorm1d`` fills every slot of :func:`mlp`, and ``None``
  leaves them empty.
- ``act`` makes an activation.
- ``place`` puts the norm ``"before"`` its activation or ``"after"`` it.
- ``init`` fills a weight; it is called as ``init(weight, generator=...)``.
  Biases start at zero.
- ``seed`` is that of the weights. They depend on it alone: two networks that
  differ only in their slots start from the same weights.

A linear layer or convolution directly followed by a norm has no bias. Behind
batch norm it would do nothing, and the norm's own takes its place. Behind a
norm over the features it would be a parameter in its own right, and behind
RMS norm, which has no bias either, a hidden unit is left without one.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

Norm = Callable[[int], nn.Module] | None
"""Channels to a layer; ``None`` for no layer."""


def mlp(
    sizes: list[int],
    *,
    norm: Norm = None,
    act: Callable[[], nn.Module] = nn.ReLU,
    place: str = "before",
    init: Callable[..., torch.Tensor] = nn.init.kaiming_normal_,
    seed: int = 0,
) -> nn.Sequential:
    """Build a multilayer perceptron: linear, norm, activation, repeated.

    Args:
        sizes: features of the input, of each hidden layer, and of the output,
            such as ``[64] + 8 * [64] + [10]``. The output layer has neither
            norm nor activation.
        norm: of the slots, see :mod:`normlib.models`.
        act: of the slots.
        place: of the norm.
        init: of the weights.
        seed: of the weights.

    Returns:
        The network, from ``(N, sizes[0])`` to ``(N, sizes[-1])``.

    Raises:
        ValueError: where ``place`` is neither of its two values.

    Chapter 2.
    """
    layers: list[nn.Module] = []
    for fan_in, width in pairwise(sizes[:-1]):
        linear = nn.Linear(fan_in, width, bias=_keeps_bias(norm, place))
        layers += _block(linear, width, norm, act, place)
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    return _initialize(nn.Sequential(*layers), init, seed)


def cnn(
    channels: list[int],
    *,
    norm: Norm = None,
    act: Callable[[], nn.Module] = nn.ReLU,
    place: str = "before",
    init: Callable[..., torch.Tensor] = nn.init.kaiming_normal_,
    seed: int = 0,
) -> nn.Sequential:
    """Build a convolutional network for the 8 by 8 digits.

    Convolutions of 3 by 3 pixels, the second of them with stride 2, each
    followed by norm and activation; then the mean over the positions and a
    linear layer.

    Args:
        channels: of each convolution's output, such as ``[16, 32, 32]``.
        norm: of the slots, see :mod:`normlib.models`.
        act: of the slots.
        place: of the norm.
        init: of the weights.
        seed: of the weights.

    Returns:
        The network, from ``(N, 64)`` pixels to ``(N, 10)`` scores.

    Raises:
        ValueError: where ``place`` is neither of its two values.

    Chapter 2.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    fan_in = 1
    for i, width in enumerate(channels):
        conv = nn.Conv2d(
            fan_in,
            width,
            3,
            stride=2 if i == 1 else 1,
            padding=1,
            bias=_keeps_bias(norm, place),
        )
        layers += _block(conv, width, norm, act, place)
        fan_in = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, 10)]
    return _initialize(nn.Sequential(*layers), init, seed)


VGG = {
    "full": (
        *(64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"),
        *(512, 512, "pool"),
    ),
    "small": (16, "pool", 32, "pool", 64, 64, "pool"),
}
"""Widths of the convolutions of :func:`vgg`, and where the image is halved.
``"full"`` is configuration A of Simonyan & Zisserman (2015): 8 convolutions,
9.2 million parameters. ``"small"`` has 4, and 71 thousand parameters."""


def vgg(
    size: str = "full",
    *,
    norm: Norm = None,
    act: Callable[[], nn.Module] = nn.ReLU,
    place: str = "before",
    init: Callable[..., torch.Tensor] = nn.init.xavier_normal_,
    seed: int = 0,
) -> nn.Sequential:
    """Build a VGG network for the 32 by 32 images of CIFAR-10.

    Convolutions of 3 by 3 pixels, each followed by norm and activation, and
    the largest of each 2 by 2 pixels where the image is halved; then one
    linear layer, in place of the three of the original, which was made for
    images of 224 by 224.

    Args:
        size: a key of :data:`VGG`.
        norm: of the slots, see :mod:`normlib.models`.
        act: of the slots.
        place: of the norm.
        init: of the weights.
        seed: of the weights.

    Returns:
        The network, from ``(N, 3, 32, 32)`` to ``(N, 10)`` scores.

    Raises:
        ValueError: an unknown size or place.

    Simonyan & Zisserman (2015). Chapter 3.
    """
    if size not in VGG:
        raise ValueError(f"size={size!r} is none of {', '.join(VGG)}")
    layers: list[nn.Module] = []
    fan_in, side = 3, 32
    for width in VGG[size]:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            side //= 2
            continue
        bias = _keeps_bias(norm, place)
        conv = nn.Conv2d(fan_in, width, 3, padding=1, bias=bias)
        layers += _block(conv, width, norm, act, place)
        fan_in = width
    layers += [nn.Flatten(), nn.Linear(fan_in * side**2, 10)]
    return _initialize(nn.Sequential(*layers), init, seed)


def deep_linear(
    depth: int = 25,
    width: int = 10,
    *,
    norm: Norm = None,
    init: Callable[..., torch.Tensor] = nn.init.xavier_normal_,
    seed: int = 0,
) -> nn.Sequential:
    """Build a deep linear network: a product of square matrices.

    ``W_depth ... W_2 W_1 x``, without biases or activations. With a norm
    there is one after each matrix but the last, and the network is linear no
    more.

    Args:
        depth: number of matrices.
        width: of each.
        norm: of the slots, see :mod:`normlib.models`.
        init: of the weights.
        seed: of the weights.

    Returns:
        The network, from ``(N, width)`` to ``(N, width)``.

    Santurkar, Tsipras, Ilyas & Madry (2018, section 2.2). Chapter 3.
    """
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(width, width, bias=False))
        if norm is not None and i < depth - 1:
            layers.append(norm(width))
    return _initialize(nn.Sequential(*layers), init, seed)


def resnet(
    widths: list[int],
    blocks: int = 1,
    *,
    norm: Norm = None,
    act: Callable[[], nn.Module] = nn.ReLU,
    channels: int = 3,
    classes: int = 10,
    init: Callable[..., torch.Tensor] = nn.init.kaiming_normal_,
    seed: int = 0,
) -> nn.Sequential:
    """Build a residual network for small images.

    A convolution of 3 by 3 pixels with norm and activation; stages of
    residual blocks, of which each but the first stage halves the image; then
    the mean over the positions and a linear layer. ``widths=[16, 32, 64]``
    with 3 blocks is the ResNet-20 of the paper, but for the shortcuts between
    stages, which are convolutions here.

    Args:
        widths: channels of each stage.
        blocks: in each stage.
        norm: of the slots, see :mod:`normlib.models`.
        act: of the slots.
        channels: of the image.
        classes: number of scores.
        init: of the weights.
        seed: of the weights.

    Returns:
        The network, from ``(N, channels, H, W)`` to ``(N, classes)`` scores.

    He, Zhang, Ren & Sun (2016, section 4.2). Chapter 4.
    """
    bias = _keeps_bias(norm, "before")
    first = nn.Conv2d(channels, widths[0], 3, padding=1, bias=bias)
    layers = _block(first, widths[0], norm, act, "before")
    fan_in = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            stride = 2 if i > 0 and j == 0 else 1
            layers.append(Residual(fan_in, width, stride, norm=norm, act=act))
            fan_in = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers.append(nn.Linear(fan_in, classes))
    return _initialize(nn.Sequential(*layers), init, seed)


class Residual(nn.Module):
    """A residual block: ``act(norm(conv(act(norm(conv(x))))) + shortcut(x))``.

    The shortcut is x itself, or a convolution of one pixel with a norm where
    width or size change.

    Args:
        fan_in: channels of the input.
        width: channels of the output.
        stride: of the first convolution, and of the shortcut.
        norm: of the slots, see :mod:`normlib.models`.
        act: of the slots.

    He, Zhang, Ren & Sun (2016). Chapter 4.
    """

    def __init__(
        self,
        fan_in: int,
        width: int,
        stride: int = 1,
        *,
        norm: Norm = None,
        act: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        bias = _keeps_bias(norm, "before")
        norm = norm or (lambda _: nn.Identity())
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=bias)
        self.norm1 = norm(width)
        self.act1 = act()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.norm2 = norm(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != width:
            self.shortcut.append(
                nn.Conv2d(fan_in, width, 1, stride, bias=bias)
            )
            self.shortcut.append(norm(width))
        self.act2 = act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H / stride, W / stride) of (N, fan_in, H, W)."""
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.act2(y + self.shortcut(x))


class Recurrent(nn.Module):
    """Read a sequence step by step, with a norm inside the recurrence.

    ``h = tanh(norm(U x_t + W h))``; when the sequence has ended the state
    stays, and a linear layer makes scores of it.

    The input is ``(N, T, features + 1)``: the last feature is 1 while the
    sequence runs and 0 behind its end, where the others are padding.

    Args:
        features: of a step, without that last one.
        width: of the state.
        classes: number of scores.
        norm: of the slots, see :mod:`normlib.models`.
        steps: how many layers the slot holds: step t has its own layer while
            t is below this number, and later steps share the last.
        masked: whether a layer sees only the sequences that still run. In
            training, a step at which a single one runs is left as it is.
        seed: of the weights.

    Chapter 5.
    """

    def __init__(
        self,
        features: int,
        width: int,
        classes: int,
        *,
        norm: Norm = None,
        steps: int = 1,
        masked: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.inward = nn.Linear(features, width)
        self.onward = nn.Linear(width, width, bias=False)
        self.outward = nn.Linear(width, classes)
        norm = norm or (lambda _: nn.Identity())
        self.norms = nn.ModuleList(norm(width) for _ in range(steps))
        self.masked = masked
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.inward, self.onward, self.outward):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of (N, T, features + 1)."""
        running = x[..., -1] > 0
        h = x.new_zeros(len(x), self.onward.in_features)
        for t, z in enumerate(self.inward(x[..., :-1]).unbind(1)):
            z = self._normalized(z + self.onward(h), running[:, t], t)
            h = torch.where(running[:, t, None], torch.tanh(z), h)
        return self.outward(h)

    def _normalized(self, z, running, t: int) -> torch.Tensor:
        norm = self.norms[min(t, len(self.norms) - 1)]
        if not self.masked:
            return norm(z)
        index = running.nonzero().squeeze(1)
        if len(index) < 1 + self.training:
            return z
        return z.index_copy(0, index, norm(z[index]))


def _keeps_bias(norm: Norm, place: str) -> bool:
    return norm is None or place == "after"


def _block(layer, width, norm, act, place) -> list[nn.Module]:
    if place not in ("before", "after"):
        raise ValueError(f"place={place!r} is neither 'before' nor 'after'")
    if norm is None:
        return [layer, act()]
    if place == "before":
        return [layer, norm(width), act()]
    return [layer, act(), norm(width)]


def _initialize(model: nn.Sequential, init, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            init(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
