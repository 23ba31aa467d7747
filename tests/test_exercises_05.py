"""Each check of chapter 5 passes what is right and names what is wrong."""

import re

import numpy as np
import pytest

from normlib.exercises import check, passes


def norm(unbatched="", uncentered=("rms",), swapped=False, eps=1e-5):
    """The five norms by their axes, with room for slips."""

    def answer(x, kind, groups=1):
        n, c = x.shape[:2]
        cut = {"batch": c, "instance": c, "group": groups}.get(kind, 1)
        if swapped and kind == "group":
            cut = c // groups
        y = x.reshape(n, cut, -1)
        axes = (0, 2) if kind == "batch" and kind != unbatched else (2,)
        if kind not in uncentered:
            y = y - y.mean(axes, keepdims=True)
        square = (y**2).mean(axes, keepdims=True)
        return (y / np.sqrt(square + eps)).reshape(x.shape)

    return answer


def masked(of=lambda x, mask: x[mask], keep_filler=False):
    def answer(x, mask):
        tokens = of(x, mask).reshape(-1, x.shape[-1])
        y = (x - tokens.mean(0)) / np.sqrt(tokens.var(0) + 1e-5)
        return y if keep_filler else np.where(mask[..., None], y, 0)

    return answer


def last(view, axes):
    def answer(x, groups, eps):
        y = x.reshape(view(*x.shape, groups))
        mean, var = y.mean(axes, keepdims=True), y.var(axes, keepdims=True)
        return ((y - mean) / np.sqrt(var + eps)).reshape(x.shape)

    return answer


def by_groups(n, h, w, c, g):
    return n, h * w, g, c // g


def rms_backward(centered=False, power=1, rows=0):
    def answer(dy, x, weight, eps):
        rstd = 1 / np.sqrt((x**2).mean(1, keepdims=True) + eps)
        xhat, g = x * rstd, dy * weight
        dx = g - xhat * (g * xhat).mean(1, keepdims=True)
        if centered:
            dx = dx - g.mean(1, keepdims=True)
        return rstd**power * dx, (dy * xhat).sum(rows)

    return answer


BLIND = {(1,): set("ABEF"), (0, 1): set("EF"), (3,): set("ABCDF")}

RIGHT = {
    "ch5-axes": norm(),
    "ch5-masked": masked(),
    "ch5-channels-last": last(by_groups, (1, 3)),
    "ch5-rms-backward": rms_backward(),
    "ch5-blind": BLIND,
}

WRONG = {
    "ch5-axes": {
        "batch norm within a sample": norm(unbatched="batch"),
        "rms centered": norm(uncentered=()),
        "layer norm not centered": norm(uncentered=("rms", "layer")),
        "channels in a group for groups": norm(swapped=True),
    },
    "ch5-masked": {
        "filler in the statistics": masked(of=lambda x, mask: x),
        "filler normalized too": masked(keep_filler=True),
        "first sequence only": masked(of=lambda x, mask: x[0][mask[0]]),
    },
    "ch5-channels-last": {
        "stripes of the image": last(lambda n, h, w, c, g: (n, g, -1), 2),
        "each position": last(by_groups, 3),
        "over the batch": last(by_groups, (0, 1, 3)),
        "every g-th channel": last(
            lambda n, h, w, c, g: (n, h * w, c // g, g), (1, 2)
        ),
    },
    "ch5-rms-backward": {
        "layer norm's": rms_backward(centered=True),
        "rstd forgotten": rms_backward(power=0),
        "dweight over the entries": rms_backward(rows=1),
        "dx only": lambda *args: rms_backward()(*args)[0],
    },
    "ch5-blind": {
        "one letter too many": BLIND | {(3,): set("ABCDEF")},
        "one letter missing": BLIND | {(1,): set("ABE")},
        "a norm missing": {(1,): set("ABEF")},
        "a list": [set("ABEF"), set("EF"), set("ABCDF")],
        "one left open": BLIND | {(1,): None},
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_answer_passes(name):
    assert passes(name, RIGHT[name])


@pytest.mark.parametrize(
    ("name", "slip"),
    [(n, slip) for n, slips in WRONG.items() for slip in slips],
)
def test_a_typical_slip_is_found_and_named(name, slip, capsys):
    assert not passes(name, WRONG[name][slip])
    check(name, WRONG[name][slip])
    verdict = capsys.readouterr().out
    assert verdict.startswith(f"wrong: {name}: ")


@pytest.mark.parametrize("name", RIGHT)
def test_there_are_two_hints(name, capsys):
    check(name, None, hint=2)
    assert "Hint 2 of 2" in capsys.readouterr().out


def test_a_message_says_how_much_filler_there_was(capsys):
    check("ch5-masked", masked(of=lambda x, mask: x))
    assert "padded to 5 with 0" in capsys.readouterr().out


def test_a_message_says_which_norms_are_not_yet_right(capsys):
    check("ch5-blind", BLIND | {(1,): set("ABE")})
    message = capsys.readouterr().out
    assert "over (1,), 1 of the letters" in message
    assert "(3,)" not in message


def test_two_gradients_may_come_in_a_list():
    def answer(*args):
        return list(rms_backward()(*args))

    assert passes("ch5-rms-backward", answer)


def test_a_message_shows_digits_that_differ(capsys):
    check("ch5-axes", norm(eps=0.0))
    numbers = re.search(r"expected (\S+), got (\S+)", capsys.readouterr().out)
    assert numbers[1] != numbers[2]
