"""The built pages, as a reader's browser meets them.

They are served from ``_build/html`` on 127.0.0.1. Without a browser, or
without built pages, these tests are skipped, unless NORMLIB_REQUIRE_BROWSER
is set: then they fail.
"""

import html.parser
import os
import pathlib
import re
import threading
import urllib.parse

import pytest

from tools import browser, serve

pytestmark = pytest.mark.browser

PAGES = serve.PAGES
NAMES = sorted(
    path.relative_to(PAGES).as_posix()
    for path in PAGES.rglob("*.html")
    if not path.is_relative_to(PAGES / "_static")
)
READ = [n for n in NAMES if n.split("/")[0] in ("chapters", "appendix")] + [
    "intro.html"
]
# What the theme tells every page's console, and nothing else.
CHATTER = ("[PST]: ", "[togglebutton]: ")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}

# Elements that reach out of the screen and stand in no box that scrolls.
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  const clipped = node => {
    for (let box = node.parentElement; box; box = box.parentElement) {
      const style = getComputedStyle(box);
      if (style.overflowX !== 'visible') return true;
      if (style.position === 'fixed') return true;
    }
    return false;
  };
  const found = [];
  for (const node of document.querySelectorAll('main *')) {
    if (node.closest('.bd-sidebar-secondary')) continue;
    const place = node.getBoundingClientRect();
    if (place.width && place.right > width + 1 && !clipped(node))
      found.push(node.tagName + '.' + node.className + ' ' +
                 Math.round(place.right));
  }
  const page = document.documentElement.scrollWidth;
  if (page > width) found.push('the page itself: ' + page);
  return found;
}"""

# Equations in the source of the page, and what MathJax made of them.
EQUATIONS = """async () => {
  const written = document.querySelectorAll('.math').length;
  if (!written) return {written, rendered: 0, errors: [], unread: []};
  await MathJax.startup.promise;
  const errors = [...document.querySelectorAll(
    'mjx-merror, [data-mjx-error]')].map(node => node.textContent);
  const unread = [...document.querySelectorAll('.math')].filter(
    node => !node.querySelector('mjx-container')).map(
    node => node.textContent);
  const rendered = document.querySelectorAll('mjx-container').length;
  return {written, rendered, errors, unread};
}"""

# The contrast of the article's own text with what lies behind it.
CONTRAST = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v =>
    v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let box = node; box; box = box.parentElement) {
      const colour = numbers(getComputedStyle(box).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const text = document.querySelectorAll(
    '.bd-article p, .bd-article li, .bd-article td, .bd-article pre, ' +
    '.bd-article figcaption, .bd-article .caption-text');
  let worst = [99, ''];
  for (const node of text) {
    if (!node.textContent.trim() || !node.offsetWidth) continue;
    const a = light(numbers(getComputedStyle(node).color));
    const b = light(behind(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.textContent.slice(0, 60)];
  }
  return worst;
}"""


def missing(reason):
    """Skip, or fail where a browser is required."""
    if os.environ.get("NORMLIB_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def built():
    if not (PAGES / "index.html").exists():
        missing("the pages are not built: `make book`")


@pytest.fixture(scope="module")
def address(built):
    with serve.server(0) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if path is None:
        missing("no browser: `python -m tools.browser`")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright()
    with playwright as started:
        running = started.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield running
        running.close()


class Visit:
    """A page in a browser, and everything that it complained about."""

    def __init__(self, chromium, address):
        self.address, self.complaints = address, []
        self.context = chromium.new_context(viewport=DESK)
        self.page = self.context.new_page()
        self.page.on("console", self.console)
        self.page.on("pageerror", lambda e: self.complain(f"error: {e}"))
        self.page.on("request", self.request)
        self.page.on("requestfailed", lambda r: self.complain(f"no {r.url}"))
        self.page.on("response", self.response)

    def complain(self, words):
        self.complaints.append(words)

    def console(self, message):
        if not message.text.startswith(CHATTER):
            self.complain(f"console {message.type}: {message.text}")

    def request(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.complain(f"asks {request.url}")

    def response(self, response):
        if response.status >= 400:
            self.complain(f"{response.status} {response.url}")

    def open(self, name):
        self.page.goto(f"{self.address}/{name}", wait_until="networkidle")
        return self.page


@pytest.fixture
def visit(chromium, address):
    visits = []

    def start(name):
        visits.append(Visit(chromium, address))
        return visits[-1].open(name)

    yield start
    for one in visits:
        one.context.close()


@pytest.fixture(scope="module", params=NAMES)
def any_page(request, chromium, address):
    """One visit to each page, the search and the index too."""
    one = Visit(chromium, address)
    one.open(request.param)
    yield one
    one.context.close()


@pytest.fixture(scope="module", params=READ)
def visited(request, chromium, address):
    """One visit to each page that is read."""
    one = Visit(chromium, address)
    one.open(request.param)
    one.page.evaluate(EQUATIONS)
    yield one.page
    one.context.close()


@pytest.fixture(params=["light", "dark"])
def page(request, visited):
    """A page in the reader's light or dark mode."""
    visited.emulate_media(color_scheme=request.param)
    visited.locator(f"html[data-theme={request.param}]").wait_for()
    yield visited
    visited.set_viewport_size(DESK)


def test_the_pages_are_built(built):
    assert len(READ) > 1


def test_the_first_page_finds_its_icon(built):
    """It only redirects and names none, so browsers ask the root for it."""
    assert (PAGES / "favicon.ico").is_file()


def test_a_page_asks_only_its_own_server_and_complains_of_nothing(any_page):
    assert any_page.complaints == []


def test_every_equation_is_rendered(visited):
    found = visited.evaluate(EQUATIONS)
    assert found["errors"] == []
    assert found["unread"] == []
    assert found["rendered"] >= found["written"]


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size(PHONE)
    assert page.evaluate(TOO_WIDE) == []


def test_text_stands_out_from_what_is_behind_it(page):
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, text


def test_every_image_is_shown_and_described(visited):
    told = visited.evaluate(
        "() => [...document.querySelectorAll('.bd-article img')].map("
        "i => [i.src, i.alt, i.complete && i.naturalWidth > 0])"
    )
    for source, words, loaded in told:
        assert words, source
        assert loaded, source


def test_the_claims_that_a_cell_settles_are_in_sight(visited):
    badges = visited.locator(".claim-badge").all()
    assert all(badge.is_visible() for badge in badges)


def test_search_finds_a_page_and_marks_the_way_there(visit):
    page = visit("search.html?q=standardization")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    assert found.count() > 0


def test_the_chapters_can_be_launched_and_downloaded(visit):
    page = visit("chapters/01_logistic_normalization.html")
    links = page.eval_on_selector_all("a", "all => all.map(a => a.href)")
    assert any("colab.research.google.com" in link for link in links)
    assert any("mybinder.org" in link for link in links)
    assert any(link.endswith(".ipynb") for link in links)


def test_a_reader_gets_from_page_to_page(visit):
    page = visit("intro.html")
    seen = []
    while page.locator("a.right-next").count():
        page.locator("a.right-next").click()
        page.wait_for_load_state("networkidle")
        seen.append(urllib.parse.urlparse(page.url).path.lstrip("/"))
    assert sorted(seen) == sorted(set(READ) - {"intro.html"})


def test_the_contours_react_to_their_sliders(visit):
    page = visit("chapters/01_logistic_normalization.html")
    figure = page.locator(".normlib-contours")
    message, path = figure.locator(".nc-message"), figure.locator(".nc-path")
    before = path.get_attribute("points")

    figure.locator(".nc-rate").fill("2.1")
    assert message.get_attribute("data-state") == "bad"
    assert path.get_attribute("points") != before

    figure.locator(".nc-best").click()
    assert message.get_attribute("data-state") != "bad"
    steps = message.inner_text()
    figure.locator(".nc-notch").fill("50")
    figure.locator(".nc-best").click()
    assert message.inner_text() != steps

    figure.locator(".nc-reset").click()
    assert path.get_attribute("points") == before


def test_the_cube_lights_what_shares_a_mean(visit):
    page = visit("chapters/05_bn_ln_in_gn.html")
    cube = page.locator(".normlib-cube")
    lit, facts = cube.locator("rect.on"), cube.locator(".nk-facts")
    assert lit.count() == 12

    cube.get_by_role("button", name="Group", exact=True).click()
    cube.get_by_role("button", name="3", exact=True).click()
    assert lit.count() == 8
    assert "2 neighboring channels" in facts.inner_text()
    cube.get_by_role("button", name="Instance").click()
    assert lit.count() == 4
    assert not cube.locator(".nk-groups").is_visible()

    cube.locator("rect[data-i='40']").click()
    where = cube.locator(".nk-where")
    assert where.inner_text() == "Sample 2, channel 5, position 1"
    cube.locator(".nk-sheets").press("ArrowRight")
    cube.locator(".nk-sheets").press("ArrowUp")
    cube.locator(".nk-sheets").press("PageDown")
    assert where.inner_text() == "Sample 3, channel 6, position 4"
    assert lit.count() == 4


def test_the_running_average_follows_momentum_and_the_pointer(visit):
    page = visit("chapters/04_test_time.html")
    figure = page.locator(".normlib-running")
    path, bars = figure.locator(".nr-past"), figure.locator(".nr-bars rect")
    told, step = figure.locator(".nr-told"), figure.locator(".nr-step")
    before, drawn = path.get_attribute("points"), bars.count()
    written = told.inner_text()

    # The script draws again what Python drew.
    step.fill("31")
    assert bars.count() == drawn + 1
    step.fill("30")
    assert path.get_attribute("points") == before
    assert told.inner_text() == written

    figure.get_by_role("button", name="0.01, Keras' default").click()
    assert figure.locator(".nr-decay").inner_text() == "0.99"
    assert "The start, 0, still makes up 74 % of it" in told.inner_text()
    debias = figure.get_by_role("button", name="Take the start out")
    debias.click()
    assert debias.get_attribute("aria-pressed") == "true"
    assert "The start makes up nothing of it" in told.inner_text()

    picture = figure.locator("svg")
    place = picture.bounding_box()
    scale = place["width"] / 480
    picture.click(position={"x": (26 + 5.5 * 60) * scale, "y": 40})
    assert step.input_value() == "60"
    assert "After batch 60" in told.inner_text()
    step.press("ArrowLeft")
    assert "After batch 59" in told.inner_text()

    figure.get_by_role("button", name="Reset").click()
    assert path.get_attribute("points") == before
    assert told.inner_text() == written


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.startswith("chapters/")]
)
def test_a_chapter_has_the_number_of_its_file(built, name):
    number = int(pathlib.Path(name).name[:2])
    text = (PAGES / name).read_text("utf-8")
    heading = r'<h\d><span class="section-number">(\d+)\.'
    assert set(re.findall(heading, text)) == {str(number)}
    caption = r'caption-number">Fig\. (\d+)\.'
    assert set(re.findall(caption, text)) == {str(number)}


def test_a_claim_leads_to_its_cell_and_back(visit):
    page = visit("appendix/claims.html")
    link = page.locator("table.ledger a.reference").first
    number = link.inner_text()
    link.click()
    page.wait_for_url(f"**#claim-{number}")
    assert page.locator(f"#claim-{number}").is_visible()
    page.locator(".claim-badge a", has_text=number).click()
    page.wait_for_url(f"**#ledger-{number}")


class Links(html.parser.HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.anchors |= {told.get("id"), told.get("name")}
        for key in ("href", "src"):
            if told.get(key) and tag != "base":
                self.links.append(told[key])


@pytest.fixture(scope="module")
def pages(built):
    return {name: Links((PAGES / name).read_text("utf-8")) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_page_leads_somewhere(pages, name):
    dead = []
    for link in pages[name].links:
        parts = urllib.parse.urlparse(link)
        if parts.scheme or parts.netloc:
            continue
        path = urllib.parse.unquote(parts.path)
        target = (PAGES / name).parent / path if path else PAGES / name
        key = os.path.relpath(target, PAGES)
        alive = pathlib.Path(target).exists()
        if alive and parts.fragment and key in pages:
            anchor = urllib.parse.unquote(parts.fragment)
            alive = anchor in pages[key].anchors
        if not alive:
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("name", NAMES)
def test_no_link_holds_a_placeholder(pages, name):
    assert [link for link in pages[name].links if "$" in link] == []
