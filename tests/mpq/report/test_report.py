"""The report's page and its figures, of a synthetic run whose numbers are known."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from html.parser import HTMLParser

import polars as pl
import pytest
from synthetic import (
    BASE,
    TAUS,
    add_accuracy,
    make_groups,
    make_run,
    with_intervals,
    with_uniform,
)

from mpq.report import figures
from mpq.report.maps import format_map
from mpq.report.page import REPORTED, Appendix, write_report
from mpq.report.results import plan_results, results_table
from mpq.report.sheets import Sheet
from mpq.report.style import to_svg
from mpq.report.summary import summarize
from mpq.store.tables import SCHEMAS, table

FACTS = {"model": "examples/<demo> & co", "base": BASE, "device": "a test", "noise model": "ulp"}


RUN, SMALL = with_intervals(make_run()), with_intervals(make_run(layers=2, seeds=1))


# drawing is what takes time: one objective where that is enough
ONE = {
    name: frame.filter(pl.col("objective") == "et") if "objective" in frame.columns else frame
    for name, frame in SMALL.items()
}


def test_ten_thousand_groups_are_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 2500 layers gives a page of less than 5 MB, which says what of it is left out."""
    monkeypatch.setattr("synthetic.TAUS", TAUS[:1])
    run = make_run(layers=2500, seeds=1)
    text = write_report({**run, "sensitivity": run["sensitivity"].head(9000)}, "large", FACTS)
    page = _Page(text)
    assert run["groups"]["group"].n_unique() == 10_001
    assert len(page.rows["groups"]) == 1 + 1000
    assert "The first 1000 of 10001" in text
    assert "one of 20 is drawn" in text
    assert len(text.encode()) < 5e6


@pytest.fixture(scope="module")
def html() -> str:
    return write_report(RUN, "A <test> run", FACTS)


class _Page(HTMLParser):
    """Collects headings, resource references, ids and table rows; complains of tags that do not nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.headings: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.table = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [
            found[a] or "" for a in ("src", "href", "xlink:href", "srcset", "action") if a in found
        ]
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "table":
            self.table = found["id"] or ""
            self.rows[self.table] = []
        if tag == "tr":
            self.rows[self.table].append([])
        if tag in ("td", "th"):
            self.rows[self.table][-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if "td" in self.stack or "th" in self.stack:
            self.rows[self.table][-1][-1] += data
        elif "h2" in self.stack:
            self.headings[-1] += data


def test_page_parses_and_has_every_section(html: str) -> None:
    """The page nests, opens with what to run, has pictures before numbers and tables, and escapes
    what it is told."""
    page = _Page(html)
    assert [h.split(":")[0] for h in page.headings] == [
        "Run this plan",
        "Frontier",
        "Formats",
        "Predicted and measured",
        "Groups",
        "What the numbers say",
        "Tables",
        "This run",
    ]
    assert html.count("<svg") == 3 + 3 + 2 + 1  # frontier, map, predicted, groups; no tasks
    told = summarize(RUN)
    assert told.warnings
    assert all(w.replace("'", "&#39;") in html for w in [*told.warnings, *told.sentences])
    assert "A &lt;test&gt; run" in html
    assert "examples/&lt;demo&gt; &amp; co" in html


def test_the_price_of_each_constraint(html: str) -> None:
    """A constrained run tells what each plan would gain without each constraint, dearest first; others tell nothing of it."""
    assert "prices" not in _Page(html).rows
    tau, both = TAUS[0], {"loss_mse": 1e-6, "loss_mse_without": 2e-6, "kl": 1e-3}
    made = [
        {"constraint": name, "gain": 0.01, "gain_without": gain, "kl_without": 2e-3, **both}
        for name, gain in (("pin head", 0.011), ("tie q k v", 0.015))
    ]
    named = {"strategy": "ip_et", "objective": "et", "tau": tau}
    run = {**ONE, "prices": pl.DataFrame([{**named, **row} for row in made])}
    rows = _Page(write_report(run, "constrained", FACTS)).rows["prices"]
    assert [row[3:7] for row in rows[1:]] == [
        ["tie q k v", "10 ms", "15 ms", "+50.00 %"],
        ["pin head", "10 ms", "11 ms", "+10.00 %"],
    ]
    assert rows[1][2] == f"τ = {tau:g}"


def test_page_fetches_nothing(html: str) -> None:
    """No reference leaves the page, and each one inside it finds its id; ids of the figures do not collide."""
    page = _Page(html)
    urls = page.references + re.findall(r"url\(\s*['\"]?([^)'\"]+)", html)
    assert urls
    assert all(u.startswith("#") for u in urls)
    assert "@import" not in html
    assert "http" not in re.sub(r"<td.*?</td>", "", html)
    assert len(set(page.ids)) == len(page.ids)
    assert {u[1:] for u in urls} <= set(page.ids)


def test_every_plan_is_in_the_table(html: str) -> None:
    """Each strategy, objective and τ has its row, with – where no time was measured."""
    rows = _Page(html).rows["results"][1:]
    expected = RUN["solutions"].select("strategy", "objective", "tau").unique()
    assert {(r[0], r[1], float(r[2])) for r in rows} == set(expected.iter_rows())
    assert all((r[3] == "–") == (r[4] == "–") == (r[1] != "et") for r in rows)
    assert all(r[4].endswith(" ± 0.2") == (r[1] == "et") for r in rows)
    assert len(_Page(html).rows["groups"]) == 1 + 65


@pytest.mark.parametrize("missing", REPORTED)
def test_a_missing_table_is_told(missing: str) -> None:
    """Without any one of the tables, left out or empty, the report comes and says which it lacks."""
    run = {name: frame for name, frame in ONE.items() if name != missing}
    if REPORTED.index(missing) % 2:
        run[missing] = pl.DataFrame(schema=SCHEMAS[missing])
    page = write_report(run, "partial", {})
    assert page.count("Left out") == 1
    assert f"no rows in {missing}." in page
    _Page(page)


def test_an_empty_run_is_told() -> None:
    """No tables at all: one line says what is missing, and nothing fails."""
    page = write_report({}, "nothing", {})
    assert ", ".join(REPORTED) in page
    assert "No plan was solved or evaluated" in page
    assert results_table({}).height == 0
    assert figures.frontier_png({})[:4] == b"\x89PNG"


def test_plans_that_were_not_timed() -> None:
    """A run with formats that are not native has no TTFT: the frontier falls back on the predicted one."""
    run = {
        **RUN,
        "timing": RUN["timing"].clear(),
        "evaluation": make_run()["evaluation"].filter(pl.col("metric") != "ttft_s"),
    }
    page = write_report(run, "emulated", FACTS)
    assert "no rows in timing" in page
    assert "TTFT, predicted (ms)" in page
    summary = summarize(run)
    assert summary.best is not None
    assert summary.best.outline.ttft_s is None
    assert "saved by prediction, not measured" in summary.sentences[0]
    assert summary.ttft_error is None
    assert not any(s.gain.measured for s in summary.standings)


def test_axes_have_units() -> None:
    """Each axis of the quantitative figures has a label with its unit."""
    results, plans = results_table(RUN), plan_results(RUN)
    drawn = [figures.frontier(results, o) for o in ("et", "tt", "m")] + [
        figures.predicted_against_measured(plans, w) for w in ("loss", "ttft")
    ]
    for figure in drawn:
        for axes in figure.axes:
            for label in (axes.get_xlabel(), axes.get_ylabel()):
                assert re.search(r"\((ms|nats²|MB|billion BF16 MACs)\)$", label)
    assert drawn[0].axes[0].get_yscale() == "log"
    assert {line.get_label() for line in drawn[0].axes[0].lines} == {
        "ip_et",
        "random",
        "prefix",
        "base model",
    }


@pytest.mark.parametrize(("layers", "roles"), [(0, 1), (1, 10), (16, 10), (80, 10)])
def test_map_has_a_cell_for_each_op(layers: int, roles: int) -> None:
    """The map of a model of any depth draws every op of every plan once, in its format's colour."""
    groups = make_groups(layers)
    ops = groups["op"].to_list()
    rows = [
        {
            "strategy": "ip_m",
            "objective": "m",
            "tau": tau,
            "seed": 0,
            "op": op,
            "format": "int8" if i % 3 else BASE,
        }
        for tau in (0.1, 0.2)
        for i, op in enumerate(ops)
    ]
    figure = format_map(table("plans", rows), groups, "ip_m", BASE)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert sum(len(p.get_path().vertices) // 5 for p in axes.patches) == len(ops)
        assert len(axes.get_yticks()) == roles
    assert to_svg(figure, "x-").startswith("<svg")


def test_figures_on_threads_are_the_same() -> None:
    """Figures drawn at the same time on several threads come out as alone, and leave matplotlib's settings alone."""
    import matplotlib

    before, results, out = matplotlib.rcParams["svg.fonttype"], results_table(RUN), {}

    def draw(i: int) -> None:
        out[i] = to_svg(figures.frontier(results, "et"), "a-")

    draw(-1)
    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(out.values())) == 1
    assert len(out) == 5
    assert matplotlib.rcParams["svg.fonttype"] == before


def test_the_report_needs_no_torch() -> None:
    """Neither torch nor pyplot nor the paper's room is loaded to write a report."""
    code = (
        "import sys; from mpq.report.page import write_report; write_report({}, 't', {}); "
        "print([m for m in ('torch', 'matplotlib.pyplot', 'mpq.paper') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_uniform_plans_are_points_and_rows(html: str) -> None:
    """Everything in one format: a row in each table, a point without a line in the frontier, a
    sentence of the summary; who is ahead at a τ does not know them."""
    run = with_uniform(RUN)
    page = write_report(run, "uniform", FACTS)
    rows = _Page(page).rows
    assert [r[0] for r in rows["choice"][1:]] == [
        "base model",
        "this plan",
        "all in int8",
        "all in int8 but the head",
    ]
    assert [r[-1] for r in rows["choice"][1:]] == ["–", "yes", "no", "no"]
    assert {r[0] for r in rows["results"]} > {"uniform_int8", "uniform_int8_but_head"}
    lines = figures.frontier(results_table(run), "et").axes[0].lines
    drawn = {line.get_label(): line for line in lines}
    assert drawn["all int8"].get_linestyle() == "None"
    assert list(drawn["all int8"].get_xdata()) == pytest.approx([11.0])
    told = next(s for s in summarize(run).sentences if s.startswith("Everything in one format"))
    assert "uniform_int8 11 ms of 20, perplexity +5.00 %;" in told
    before, after = summarize(RUN), summarize(run)
    assert after.standings == before.standings
    assert len(after.over_bound) == len(before.over_bound)
    assert html.count("all in int8") == 0


def test_an_appendix_stands_at_the_end() -> None:
    """Another room's pictures and tables come after everything else, with one line on what it lacks."""
    sheet = Sheet("more", "More.", [("A", "a", "count")], [{"a": 12345}])
    extra = Appendix("More of it", [("A picture", "<svg></svg>")], [sheet], "Left out: nothing.")
    page = _Page(write_report(ONE, "with more", FACTS, extra))
    assert page.headings[-1] == "More of it"
    assert page.rows["more"] == [["A"], ["12,345"]]


def test_accuracy_is_told_where_tasks_were_evaluated(html: str) -> None:
    """A run with tasks has pictures and a table of accuracy; one without has no such section."""
    page = _Page(write_report(add_accuracy(ONE), "tasks", FACTS))
    assert any(h.startswith("Accuracy") for h in page.headings)
    assert len(page.rows["accuracy"]) == 1 + 3 * 5 * (4 + 1 + 1)
    assert "Accuracy" not in html


def test_the_page_stays_small() -> None:
    """A report of 80 layers, three objectives and uniform plans is under 5 MB."""
    assert len(write_report(with_uniform(make_run(layers=80, seeds=1)), "deep", FACTS)) < 5e6
