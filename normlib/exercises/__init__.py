"""Checks of the exercises: property tests with hints, and no answers.

Each chapter has a module here. A check is a function of the reader's answer
that raises :class:`AssertionError` (what is wrong, and the values that show
it) or returns. :func:`check` runs it and prints one line.
"""

from collections.abc import Callable
from importlib import import_module

_CHAPTERS = (
    "chapter_01",
    "chapter_02",
    "chapter_03",
    "chapter_04",
    "chapter_05",
    "chapter_06",
    "chapter_09",
    "chapter_10",
)
_exercises: dict[str, tuple[Callable, tuple[str, ...]]] = {}


def exercise(name: str, *hints: str) -> Callable[[Callable], Callable]:
    """Register a check under the exercise's name, with hints in order."""

    def register(function: Callable) -> Callable:
        _exercises[name] = (function, hints)
        return function

    return register


def check(name: str, answer, *, hint: int = 0) -> None:
    """Say whether an answer is right; where it is not, what shows it.

    Prints one line and never raises for a wrong answer, so that a notebook
    with open exercises runs to its end.

    Args:
        name: the exercise, such as ``"ch1-standardize"``.
        answer: what the exercise asks for: a function or a value.
        hint: also print this hint (1 is the first).

    Raises:
        KeyError: no exercise has this name.
    """
    function, hints = _find(name)
    print(_verdict(name, function, answer))
    if hint:
        if not 1 <= hint <= len(hints):
            print(f"  {name} has {len(hints)} hints; asked for {hint}.")
        else:
            print(f"  Hint {hint} of {len(hints)}: {hints[hint - 1]}")


def passes(name: str, answer) -> bool:
    """Whether an answer is right, without a word: for tests and solutions."""
    function, _ = _find(name)
    return _verdict(name, function, answer).startswith("right")


def _verdict(name: str, function: Callable, answer) -> str:
    if answer is None or answer is ...:
        return f"open:  {name} waits for your answer."
    try:
        function(answer)
    except NotImplementedError:
        return f"open:  {name} waits for your answer."
    except AssertionError as error:
        return f"wrong: {name}: {error}"
    except Exception as error:
        return f"wrong: {name} raised {type(error).__name__}: {error}"
    return f"right: {name}"


def _find(name: str) -> tuple[Callable, tuple[str, ...]]:
    for chapter in _CHAPTERS:
        import_module(f"{__name__}.{chapter}")
    if name not in _exercises:
        known = ", ".join(sorted(_exercises))
        raise KeyError(f"no exercise {name!r}; there are: {known}")
    return _exercises[name]
