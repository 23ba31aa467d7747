"""Each check passes what is right, and names what is wrong.

The answers are in ``answers``, a module for each chapter: ``RIGHT`` has one
for each exercise. Those of ``ALSO_RIGHT`` and ``WRONG`` have a name,
``SAID`` is what a wrong one must hear, ``OPEN`` what is not yet an answer.
"""

import math
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from answers import chapter_02, chapter_05, chapter_09

from normlib import exercises
from normlib.exercises import check, passes

CHAPTERS = [import_module(f"answers.{name}") for name in exercises._CHAPTERS]


def of_all(table):
    """A table of all chapters."""
    return {k: v for m in CHAPTERS for k, v in getattr(m, table, {}).items()}


def listed(table):
    """(exercise, name) for each answer of a table."""
    return [(k, name) for k, named in of_all(table).items() for name in named]


RIGHT, WRONG, SAID = map(of_all, ("RIGHT", "WRONG", "SAID"))


@pytest.fixture
def heard(capsys):
    """What is said of an answer."""

    def hear(name, answer, **options):
        check(name, answer, **options)
        return capsys.readouterr().out

    return hear


def test_every_exercise_has_right_and_wrong_answers():
    with pytest.raises(KeyError, match="no exercise 'ch1'; there are: ch1-"):
        check("ch1", None)
    assert set(exercises._exercises) == set(RIGHT) == set(WRONG)
    assert set(listed("SAID")) <= set(listed("WRONG"))


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_answer_passes(name, heard):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert heard(name, RIGHT[name]) == f"right: {name}\n"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "other"), listed("ALSO_RIGHT"))
def test_another_right_answer_passes(name, other):
    assert passes(name, of_all("ALSO_RIGHT")[name][other])


DIVIDES = [  # wrong answers of chapter 1 that divide by nothing
    pytest.mark.filterwarnings(f"ignore:{warned}:RuntimeWarning")
    for warned in ("invalid value", "divide by zero")
]


@pytest.mark.parametrize(
    ("name", "slip"),
    [
        pytest.param(*each, marks=DIVIDES * each[0].startswith("ch1-"))
        for each in listed("WRONG")
    ],
)
def test_a_usual_wrong_answer_fails_and_hears_why(name, slip, heard):
    verdict = heard(name, WRONG[name][slip])
    said = SAID.get(name, {}).get(slip, "")
    colon = "" if said.startswith("raised") else ":"
    assert verdict.startswith(f"wrong: {name}{colon} ")
    assert said in verdict
    assert verdict.count("\n") == 1


THREE_HINTS = {"ch1-standardize", "ch1-largest-rate", "ch1-leak"}


@pytest.mark.parametrize("name", RIGHT)
def test_an_exercise_can_stay_open_and_has_its_hints(name, heard):
    verdict = heard(name, None, hint=2)
    assert verdict.startswith(f"open:  {name}")
    count = 3 if name in THREE_HINTS else 2
    assert f"Hint 2 of {count}" in verdict


@pytest.mark.parametrize(("name", "answer"), of_all("OPEN").items())
def test_what_is_not_written_yet_is_open(name, answer, heard):
    assert heard(name, answer).startswith(f"open:  {name}")


@pytest.mark.parametrize("name", [k for k, v in RIGHT.items() if callable(v)])
def test_an_answer_that_raises_is_wrong_and_named(name, heard):
    verdict = heard(name, lambda *args, **constants: 1 / 0)
    assert verdict.startswith(f"wrong: {name} raised ZeroDivisionError")


def test_a_nan_is_wrong():
    assert not passes("ch2-repair", lambda x, *rest: x * np.nan)


def test_a_message_shows_the_values(heard):
    verdict = heard("ch2-keras", chapter_02.ported(momentum=lambda p: p))
    assert "running mean after a batch: expected" in verdict
    assert "momentum=0.99" in verdict


def test_a_message_says_which_norms_are_not_yet_right(heard):
    verdict = heard("ch5-blind", chapter_05.BLIND | {(1,): set("ABE")})
    assert "over (1,), 1 of the letters" in verdict
    assert "(3,)" not in verdict


def test_a_message_shows_digits_that_differ(heard):
    verdict = heard("ch5-axes", chapter_05.norm(eps=0.0))
    numbers = re.search(r"expected (\S+), got (\S+)", verdict)
    assert numbers[1] != numbers[2]


def test_a_message_says_what_the_law_says_there(heard):
    answer = chapter_09.powers() | {"float32": 2.0**24}
    verdict = heard("ch9-offset", answer)
    assert f"an error of {2.0**24:.2g}, and" in verdict
    assert "float64" not in verdict


def test_a_message_says_where_the_running_mean_came_to_rest(heard):
    verdict = heard("ch9-stall", chapter_09.stall(keep=False))
    assert "momentum 0.01" in verdict
    reached = float(verdict.split()[-1])
    assert math.isclose(reached, 0.8047, abs_tol=1e-3)
