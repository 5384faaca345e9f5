"""The report in a real browser: it opens offline from a file, fetches nothing, works on a phone, sorts and hands out CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from synthetic import (
    BASE,
    add_accuracy,
    add_attention,
    make_run,
    with_intervals,
    with_uniform,
)

from deployments.browser import CHROMIUM, Browser
from mpq.paper.figures import write_figures
from mpq.paper.page import appendix
from mpq.report.page import write_report

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found: install Debian's package chromium"
)
RUN = add_attention(add_accuracy(with_uniform(with_intervals(make_run(layers=4)))))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests."""
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file:// address of a whole report, alone in its folder."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(
        write_report(
            RUN,
            "A run",
            {"base": BASE, "model": "a/very/long/path/of-a-model-that-does-not-break-the-line" * 3},
            appendix(RUN, BASE),
        )
    )
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_and_fetches_nothing(
    browser: Browser, page: str, width: int, dark: bool
) -> None:
    """One request, for the page itself; no error in the console; nothing wider than the window; every figure visible."""
    browser.open(page, width, dark)
    fits = "[document.documentElement.scrollWidth, innerWidth, document.body.scrollWidth]"
    scroll, inner, body = browser.run(fits)
    assert inner == width
    assert max(scroll, body) <= width
    drawn = browser.run(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width * s.getBoundingClientRect().height)"
    )
    # the paper's ten; frontier, formats, predicted, groups, accuracy
    assert len(drawn) == 10 + 3 + 3 + 2 + 1 + 4
    assert min(drawn) > 10_000
    assert [r["request"]["url"] for r in browser.seen("Network.requestWillBeSent")] == [page]
    assert not browser.seen("Runtime.exceptionThrown")
    assert not [
        e
        for e in browser.seen("Runtime.consoleAPICalled")
        if e["type"] in ("error", "warning", "assert")
    ]
    assert not [
        e for e in browser.seen("Log.entryAdded") if e["entry"]["level"] in ("error", "warning")
    ]
    assert (
        browser.run("document.querySelectorAll('script[src], link, img, iframe, object').length")
        == 0
    )


def test_the_first_screen_answers(browser: Browser, page: str) -> None:
    """At 1280 × 900 the plan to run and its baselines are in view before any picture; the change of
    perplexity is in view in both tables, without scrolling sideways."""
    browser.open(page, 1280)
    table = browser.run("document.getElementById('choice').getBoundingClientRect().bottom")
    picture = browser.run("document.querySelector('svg').getBoundingClientRect().top")
    assert table < 600 < picture + 100
    for name in ("choice", "results"):
        left, right = browser.run(
            f"(() => {{ const h = document.querySelector('#{name} th[data-k=perplexity_change]');"
            "return [h.getBoundingClientRect().right, h.closest('.scroll').getBoundingClientRect().right] })()"
        )
        assert left <= right <= 1280


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_in_figures_stands_out(browser: Browser, page: str, dark: bool) -> None:
    """Text and axes take the page's colour: a contrast of 7 or more to its background, except labels on coloured boxes."""
    browser.open(page, dark=dark)
    ratio = browser.run("""(() => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const page = light(getComputedStyle(document.body).backgroundColor);
      const texts = [...document.querySelectorAll('svg:not([aria-label*="groups of one layer"]) text')];
      return Math.min(...texts.map(t => light(getComputedStyle(t).fill)).map(l => (Math.max(l, page) + .05) / (Math.min(l, page) + .05)));
    })()""")
    assert ratio >= 7


@pytest.mark.parametrize(
    ("table", "column"), [("results", 7), ("table-1", 2), ("results", 0), ("accuracy", 5)]
)
def test_sorting(browser: Browser, page: str, table: str, column: int) -> None:
    """A click on a heading sorts up, a second down, by numbers where they are numbers, what is missing last."""
    browser.open(page)
    values = f"[...document.getElementById('{table}').tBodies[0].rows].map(r => (r.cells[{column}].dataset.v ?? r.cells[{column}].textContent))"
    click = f"document.getElementById('{table}').tHead.rows[0].cells[{column}].querySelector('button').click()"

    def sorted_as(texts: list[str], down: bool) -> list[str]:
        numbers = all(
            not t or t.replace(".", "").replace("-", "").replace("e", "").isdigit() for t in texts
        )
        there = sorted(
            [t for t in texts if t], key=(lambda t: float(t)) if numbers else None, reverse=down
        )  # type: ignore[arg-type]
        return there + [t for t in texts if not t]

    before = browser.run(values)
    assert len(before) > 3
    for down in (False, True):
        browser.run(click)
        assert browser.run(values) == sorted_as(before, down)
    assert (
        browser.run(
            f"document.getElementById('{table}').querySelector('[aria-sort]').getAttribute('aria-sort')"
        )
        == "descending"
    )


def test_csv_is_the_table(browser: Browser, page: str) -> None:
    """The button hands out a data: link with all rows and the unrounded values."""
    browser.open(page)
    link = browser.run("""(() => {
      let found = null; HTMLAnchorElement.prototype.click = function () { found = [this.download, this.href]; };
      document.querySelector('.csv[data-for="table-1"]').click(); return found; })()""")
    assert link[0] == "table-1.csv"
    assert link[1].startswith("data:text/csv")
    rows = list(csv.DictReader(io.StringIO(unquote(link[1].partition(",")[2]))))
    assert len(rows) == 9 + 3
    assert abs(float(rows[0]["lambada_openai_perplexity"]) - 2.4) < 1e-9


def test_figures_as_files(browser: Browser, tmp_path: Path) -> None:
    """A figure's SVG opens by itself, in light and dark, with nothing fetched."""
    write_figures(RUN, tmp_path, BASE)
    for number, dark in (("1", False), ("5", False), ("5", True)):
        address = (tmp_path / f"figure_{number}.svg").as_uri()
        browser.open(address, dark=dark)
        assert browser.run("document.documentElement.getBoundingClientRect().width") > 300
        assert browser.run("getComputedStyle(document.documentElement).backgroundColor") == (
            "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
        )
        assert [r["request"]["url"] for r in browser.seen("Network.requestWillBeSent")] == [address]
