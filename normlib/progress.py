"""How far a long computation is, in one line."""

from collections.abc import Iterable


def progress(
    items: Iterable, what: str, unit: str, show: bool | None = None
) -> Iterable:
    """The items, with a progress bar once they take more than two seconds.

    The bar is tqdm's, on standard error, and vanishes at the end. tqdm is no
    requirement of normlib: where it is not installed nothing is shown.

    Args:
        items: to go through.
        what: stands before the bar.
        unit: what the items are, in the plural.
        show: whether to show the bar; by default where standard error is a
            terminal, and so not in a notebook, whose outputs it would change
            from run to run.

    Returns:
        The same items in the same order.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    hide = None if show is None else not show
    return tqdm(
        items, what, delay=2, leave=False, unit=f" {unit}", disable=hide
    )
