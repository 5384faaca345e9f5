"""The report and its figures, on a synthetic run whose numbers are known."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import threading
from html.parser import HTMLParser
from typing import Any

import polars as pl
import pytest
from synthetic import BASE, BASE_TTFT, TAUS, make_groups, make_run

from mpq.errors import MpqError
from mpq.report import figures
from mpq.report.page import REPORTED, write_report
from mpq.report.results import plan_results, results_table
from mpq.report.summary import summarize
from mpq.store.tables import SCHEMAS, table

FACTS = {"model": "examples/<demo> & co", "base": BASE, "device": "a test", "noise model": "ulp"}
RUN, SMALL = make_run(), make_run(layers=2, seeds=1)


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
    """The page nests, names all its sections and escapes what it is told."""
    page = _Page(html)
    starts = [
        "Summary",
        "Frontier",
        "Accuracy",
        "Predicted",
        "Results",
        "Formats",
        "Groups",
        "Timing",
        "Sensitivity",
    ]
    assert [h.split(":")[0].split()[0] for h in page.headings] == starts
    assert (
        html.count("<svg") == (3 + 1) + 3 + (3 + 1) + 1
    )  # frontier, predicted, map, groups; no tasks, no attention
    assert "A &lt;test&gt; run" in html
    assert "examples/&lt;demo&gt; &amp; co" in html


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
    assert all((r[8] == "–") == (r[1] != "et") for r in rows)
    assert len(_Page(html).rows["groups"]) == 1 + 65


def test_results_are_means_over_seeds() -> None:
    """Predicted and measured values of one random row, computed again by hand from the rows of both draws."""
    row = results_table(RUN).row(
        by_predicate=(pl.col("objective") == "et")
        & (pl.col("strategy") == "random")
        & (pl.col("tau") == 0.002),
        named=True,
    )

    def of(name: str, **equal: object) -> list[dict[str, Any]]:
        wanted = {"objective": "et", "strategy": "random", "tau": 0.002, **equal}
        return [
            r for r in RUN[name].iter_rows(named=True) if all(r[k] == v for k, v in wanted.items())
        ]

    losses = [r["value"] for r in of("evaluation", metric="loss_mse")]
    assert row["seeds"] == len(losses) == 4
    assert row["measured_loss_mse"] == pytest.approx(statistics.mean(losses))
    assert row["measured_loss_mse_std"] == pytest.approx(statistics.stdev(losses))
    assert row["predicted_loss_mse"] == pytest.approx(
        statistics.mean(r["predicted_loss_mse"] for r in of("solutions"))
    )
    assert row["measured_ttft_s"] == pytest.approx(
        statistics.mean(r["value"] for r in of("evaluation", metric="ttft_s"))
    )
    assert row["base_ttft_s"] == pytest.approx(
        statistics.mean(r["base_value"] for r in of("evaluation", metric="ttft_s"))
    )
    assert plan_results(RUN).height == 3 * 4 * 5


def test_summary_agrees_with_the_numbers() -> None:
    """Winners, the fastest plan, the median errors and the plans over their bound, each found another way."""
    summary = summarize(RUN)
    plans: dict[tuple[object, ...], dict[str, Any]] = {}
    for s in RUN["solutions"].iter_rows(named=True):
        plans[s["strategy"], s["objective"], s["tau"], s["seed"]] = {**s, "mse": [], "ttft_s": None}
    for e in RUN["evaluation"].iter_rows(named=True):
        plan = plans[e["strategy"], e["objective"], e["tau"], e["plan_seed"]]
        if e["metric"] == "loss_mse":
            plan["mse"].append(e["value"])
        elif e["metric"] == "ttft_s":
            # times are compared at the speed that the machine had while configurations were timed
            speed = BASE_TTFT / e["base_value"]
            plan["ttft_s"], plan["base"], plan["carried"] = (
                e["value"],
                e["base_value"],
                e["value"] * speed,
            )
    mse = {k: statistics.mean(p["mse"]) for k, p in plans.items()}
    assert summary.loss_error == pytest.approx(
        statistics.median(abs(p["predicted_loss_mse"] / mse[k] - 1) for k, p in plans.items())
    )
    timed = [p for p in plans.values() if p["ttft_s"]]
    assert summary.ttft_error == pytest.approx(
        statistics.median(abs(p["predicted_ttft_s"] / p["carried"] - 1) for p in timed)
    )
    assert len(summary.over_bound) == sum(mse[k] > p["budget"] for k, p in plans.items())
    assert summary.best is not None
    assert summary.best["measured_ttft_s"] == min(p["ttft_s"] for p in timed)
    assert len(summary.winners) == 3 * len(TAUS)
    first = {w.tau: w for w in summary.winners if w.objective == "et"}
    for tau in TAUS:
        ip = plans["ip_et", "et", tau, 0]
        assert first[tau].strategies == ("ip_et",)
        assert first[tau].gain == pytest.approx(BASE_TTFT - ip["carried"])
        assert first[tau].share == pytest.approx(1 - ip["ttft_s"] / ip["base"])
    assert not summary.out_of_range
    assert f"{first[0.008].share:.1%} less" in " ".join(summary.sentences)


def test_warns_where_the_prediction_fails() -> None:
    """A plan measured at three times its prediction, and one at a third, are named in a warning."""
    of_plan = (pl.col("strategy") == "ip_tt") & (pl.col("metric") == "loss_mse")
    factor = (
        pl.when(of_plan & (pl.col("tau") == 0.002))
        .then(3.0)
        .when(of_plan & (pl.col("tau") == 0.004))
        .then(1 / 3)
        .otherwise(1.0)
    )
    run = {**RUN, "evaluation": RUN["evaluation"].with_columns(pl.col("value") * factor)}
    summary = summarize(run)
    assert {(r["strategy"], r["tau"]) for r in summary.out_of_range} == {
        ("ip_tt", 0.002),
        ("ip_tt", 0.004),
    }
    assert any("ip_tt at τ = 0.002" in w and "ip_tt at τ = 0.004" in w for w in summary.warnings)
    assert any("above the bound" in w and "ip_tt at τ = 0.002" in w for w in summary.warnings)


def test_equal_plans_win_together() -> None:
    """Strategies with the same measured time share the first place, and a gain below zero is no win."""
    same = pl.when(pl.col("metric") == "ttft_s").then(pl.lit(0.021)).otherwise(pl.col("value"))
    base = pl.when(pl.col("metric") == "ttft_s").then(pl.lit(0.020)).otherwise(pl.col("base_value"))
    summary = summarize(
        {**RUN, "evaluation": RUN["evaluation"].with_columns(value=same, base_value=base)}
    )
    winner = next(w for w in summary.winners if w.objective == "et")
    assert set(winner.strategies) == {"ip_et", "random", "prefix"}
    assert "nothing gains" in summary.sentences[0]
    assert any("more" in s for s in summary.sentences)


@pytest.mark.parametrize("missing", REPORTED)
def test_a_missing_table_is_told(missing: str) -> None:
    """Without any one of the tables, left out or empty, the report still comes and says which it lacks."""
    run = {name: frame for name, frame in SMALL.items() if name != missing}
    page = write_report(run, "partial", {})
    assert page == write_report(
        {**run, missing: pl.DataFrame(schema=SCHEMAS[missing])}, "partial", {}
    )
    assert re.search(rf"no rows in {missing};", page)
    _Page(page)


def test_an_empty_run_is_told() -> None:
    """No tables at all: every section says what is missing, and nothing fails."""
    page = write_report({}, "nothing", {})
    assert ", ".join(REPORTED) in page
    assert page.count('class="none"') >= 8
    assert results_table({}).height == 0
    assert figures.frontier_png({})[:4] == b"\x89PNG"


def test_plans_that_were_not_timed() -> None:
    """A run with formats that are not native has no TTFT: the frontier falls back on the predicted one."""
    run = {
        **RUN,
        "timing": RUN["timing"].clear(),
        "evaluation": RUN["evaluation"].filter(pl.col("metric") != "ttft_s"),
    }
    page = write_report(run, "emulated", FACTS)
    assert "Nothing was timed" in page
    assert "TTFT, predicted (ms)" in page
    summary = summarize(run)
    assert summary.best is None
    assert summary.ttft_error is None
    assert not any(w.measured for w in summary.winners)


def test_a_table_without_its_columns_is_refused() -> None:
    """A table from something else is named, with what it lacks."""
    with pytest.raises(MpqError, match="solutions table lacks"):
        results_table({"solutions": pl.DataFrame({"strategy": ["ip_et"]})})


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
    figure = figures.format_map(table("plans", rows), groups, "ip_m", BASE)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert sum(len(p.get_path().vertices) // 5 for p in axes.patches) == len(ops)
        assert len(axes.get_yticks()) == roles
    assert figures.to_svg(figure, "x-").startswith("<svg")


def test_figures_on_threads_are_the_same() -> None:
    """Figures drawn at the same time on several threads come out as alone, and leave matplotlib's settings alone."""
    import matplotlib

    before, results, out = matplotlib.rcParams["svg.fonttype"], results_table(RUN), {}

    def draw(i: int) -> None:
        out[i] = figures.to_svg(figures.frontier(results, "et"), "a-")

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
    """Neither torch nor pyplot is loaded to write a report."""
    code = "import sys; from mpq.report.page import write_report; write_report({}, 't', {}); print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
