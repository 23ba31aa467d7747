"""The interactive figure stands alone, and says what the mathematics says."""

import math
import re
from html.parser import HTMLParser

import pytest

from normlib.explore import LossContours

VOID = {"input", "br", "img"}


class Tags(HTMLParser):
    """Collects attributes and text; fails where a tag is left open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.seen if name == tag]


def html(**kwargs):
    return LossContours(**kwargs)._repr_html_()


def test_the_same_arguments_give_the_same_bytes():
    assert html() == html()
    assert html(condition_number=4) != html()


def test_nothing_is_requested_from_anywhere():
    page = html()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(", page)
    assert not re.search(r"\s(?:src|href)=", page)


def test_two_on_a_page_share_no_id():
    tags = Tags(html())
    assert [a["id"] for _, a in tags.seen if "id" in a] == []


def test_no_placeholder_is_left_and_every_tag_is_closed():
    assert "@" not in html()
    Tags(html())


def test_both_sliders_and_the_picture_have_names():
    tags = Tags(html())
    sliders = tags.all("input")
    assert [s["type"] for s in sliders] == ["range", "range"]
    assert all(s["aria-label"] and s["aria-valuetext"] for s in sliders)
    assert tags.all("svg")[0]["aria-label"]
    assert [b["type"] for b in tags.all("button")] == ["button", "button"]
    assert "noscript" in [name for name, _ in tags.seen]


def test_the_first_picture_needs_no_script():
    tags = Tags(html(condition_number=25, rate=1.8))
    points = tags.all("polyline")[0]["points"].split()
    assert points[0] == "-215.0,-90.3"
    assert points[1] == f"{-215 * (1 - 1.8 / 25):.1f},{90.3 * 0.8:.1f}"
    assert len(tags.all("circle")) == len(points) == 201
    stretch = [float(e["rx"]) / float(e["ry"]) for e in tags.all("ellipse")]
    assert stretch[0] == pytest.approx(5, abs=0.01)  # square root of 25


@pytest.mark.parametrize(
    ("kappa", "rate", "factor"),
    [(100, 1.0, 1 - 1 / 100), (25, 50 / 26, 24 / 26), (10, 0.5, 1 - 0.05)],
)
def test_the_flat_direction_decides_the_number_of_steps(kappa, rate, factor):
    steps = LossContours(kappa, rate).steps_to(0.01)
    assert steps == pytest.approx(math.log(0.01) / math.log(factor), rel=0.04)


def test_a_round_valley_takes_one_step():
    assert LossContours(1, 1.0).steps_to() == 1
    assert "After 1 step, 1 %" in html(condition_number=1, rate=1)


def test_above_two_over_l_it_diverges_and_says_so():
    assert LossContours(25, 2.1).steps_to() is None
    page = html(rate=2.1)
    assert "Diverges: the rate is above 2/L" in page
    assert "steep direction by 1.10." in page
    assert 'data-state="bad"' in page
    assert "On the edge" in html(rate=2.0)
    assert 'data-state="good"' in html(rate=1.99)


@pytest.mark.parametrize("kappa", [0.5, 2000])
def test_condition_number_out_of_range(kappa):
    with pytest.raises(ValueError, match=rf"\[1, 1000\], got {kappa}"):
        LossContours(condition_number=kappa)


@pytest.mark.parametrize("rate", [0.0, 2.5])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=rf"\[0.05, 2.2\], got {rate}"):
        LossContours(rate=rate)


def test_repr_names_the_setting():
    assert repr(LossContours()) == (
        "LossContours(condition_number=25, rate=1.8)"
    )
