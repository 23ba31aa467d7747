"""Every normalization is the same formula over a different set of axes.

See the input as four axes **(N, G, K, M)**: N instances, G groups, K channels
in a group, M positions in a channel. The mean and the variance are taken over
K and M, and by batch normalization over N as well:

============= ============ == ==== ===== ========== ========
norm          N            G  K    M     over_batch centered
============= ============ == ==== ===== ========== ========
batch_norm    N            C  1    H·W   yes        yes
instance_norm N            C  1    H·W   no         yes
group_norm    N            G  C/G  H·W   no         yes
layer_norm    leading axes 1  D    1     no         yes
rms_norm      leading axes 1  D    1     no         no
============= ============ == ==== ===== ========== ========

Weight and bias have one entry for each (group, channel): shape (G, K).
Nothing here touches data: a view is four integers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class View(NamedTuple):
    """The sizes of the four axes: instances, groups, channels, positions."""

    N: int
    G: int
    K: int
    M: int

    def count(self, over_batch: bool) -> int:
        """How many values share one mean and one variance."""
        return (self.N if over_batch else 1) * self.K * self.M


def channel_view(shape: Sequence[int], num_groups: int | None = None) -> View:
    """See (N, C, ...) as (N, G, K, M), channels cut into groups.

    Args:
        shape: of the input, with at least two axes.
        num_groups: G, a divisor of C. Neighbouring channels form a group.
            By default each channel is a group of its own (G = C, K = 1).

    Returns:
        ``View(N, G, C // G, M)`` with M the product of the positions, 1 where
        there are none.

    Raises:
        ValueError: fewer than two axes, or G does not divide C.
    """
    if len(shape) < 2:
        raise ValueError(
            f"expected at least 2 axes (N, C, ...), got shape {tuple(shape)}"
        )
    n, c, *positions = shape
    g = c if num_groups is None else num_groups
    if num_groups is not None and (g <= 0 or c % g):
        raise ValueError(
            f"num_channels={c} is not divisible by num_groups={g}"
        )
    k = 1 if num_groups is None else c // g
    return View(n, g, k, _product(positions))


def trailing_view(
    shape: Sequence[int], normalized_shape: Sequence[int]
) -> View:
    """See (..., D) as (N, 1, D, 1), where D may be several axes.

    Args:
        shape: of the input.
        normalized_shape: its last axes, which share a mean and a variance.

    Returns:
        ``View(N, 1, D, 1)`` with N and D the products of the two parts.

    Raises:
        ValueError: the shape does not end in ``normalized_shape``, or that
            is empty.
    """
    split = len(shape) - len(normalized_shape)
    if not normalized_shape or tuple(shape[split:]) != tuple(normalized_shape):
        raise ValueError(
            f"expected a shape that ends in {tuple(normalized_shape)}, "
            f"got {tuple(shape)}"
        )
    return View(_product(shape[:split]), 1, _product(shape[split:]), 1)


def stat_axes(over_batch: bool) -> tuple[int, ...]:
    """The axes of (N, G, K, M) over which mean and variance are taken."""
    return (0, 2, 3) if over_batch else (2, 3)


class Norm(NamedTuple):
    """A row of the table: how to see the input, and what to do with it."""

    view: Callable[..., View]
    over_batch: bool
    centered: bool


TABLE = {
    "batch_norm": Norm(channel_view, over_batch=True, centered=True),
    "instance_norm": Norm(channel_view, over_batch=False, centered=True),
    "group_norm": Norm(channel_view, over_batch=False, centered=True),
    "layer_norm": Norm(trailing_view, over_batch=False, centered=True),
    "rms_norm": Norm(trailing_view, over_batch=False, centered=False),
}
"""The table of the module's docstring, for code to read. The view of
``group_norm`` takes ``num_groups``; ``trailing_view`` takes the normalized
shape."""


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result = result * size
    return result
