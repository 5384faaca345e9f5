"""Figures 1 to 9, Table 1 and the report's findings, on a synthetic run whose numbers are known."""

from __future__ import annotations

import math
import re
import statistics
import xml.etree.ElementTree
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from synthetic import (
    BASE,
    BASE_TTFT,
    LOWER,
    TASKS,
    TAUS,
    add_accuracy,
    add_attention,
    make_run,
    with_uniform,
)

from mpq.errors import MpqError
from mpq.paper.attention_gain import attention_gains, fit
from mpq.paper.figures import paper_figures, write_figures
from mpq.paper.page import appendix
from mpq.paper.table_1 import markdown, table_1
from mpq.report.accuracy import AVERAGE, differences
from mpq.report.findings import find
from mpq.report.page import write_report

RUN = add_attention(add_accuracy(make_run(layers=4)))
NUMBERS = ["1", "2", "3a", "3b", "4", "5", "6", "7", "8", "9"]


@cache
def drawings() -> dict[str, Any]:
    """The run's figures by their numbers."""
    return {d.number: d for d in paper_figures(RUN, BASE)}


def test_every_figure_is_drawn_with_units_on_its_axes() -> None:
    """A whole run has them all, in order; what is measured has a label with a unit, and every strategy of its objective."""
    assert list(drawings()) == NUMBERS
    for number, drawn in drawings().items():
        assert drawn.figure is not None, drawn.why
        if number in ("2", "6"):
            continue
        for axes in drawn.figure.axes:
            assert re.search(r"\((ms|nats²|MB|points|%|billion BF16 MACs)\)$", axes.get_xlabel())
    for number, own in (("4", "ip_et"), ("5", "ip_et"), ("8", "ip_tt"), ("9", "ip_m")):
        figure = drawings()[number].figure
        assert figure is not None
        labels = figure.axes[0].get_legend_handles_labels()[1]
        assert {own, "random", "prefix"} <= set(labels)


def test_figure_5_draws_the_means() -> None:
    """The integer program's points of figure 5: TTFT, mean accuracy difference over tasks and seeds, found again by hand."""
    figure = drawings()["5"].figure
    assert figure is not None
    drawn = next(c for c in figure.axes[0].containers if c.get_label() == "ip_et").lines[0]
    rows = [
        r
        for r in RUN["evaluation"].iter_rows(named=True)
        if r["strategy"] == "ip_et" and r["objective"] == "et"
    ]
    for tau, x, y in zip(TAUS, drawn.get_xdata(), drawn.get_ydata(), strict=True):
        acc = [
            100 * (r["value"] - r["base_value"])
            for r in rows
            if r["tau"] == tau and r["metric"] == "acc"
        ]
        assert y == pytest.approx(statistics.mean(acc))
        (of,) = [r for r in rows if r["tau"] == tau and r["metric"] == "ttft_s"]
        assert x == pytest.approx(1e3 * BASE_TTFT * of["value"] / of["base_value"]), (
            "at the speed of timing"
        )


def test_figure_9_is_memory_that_remains() -> None:
    """More is lowered, less memory is left: x is base weights minus the gain, in MB."""
    figure = drawings()["9"].figure
    assert figure is not None
    drawn = next(c for c in figure.axes[0].containers if c.get_label() == "ip_m").lines[0]
    weights = 2 * RUN["groups"]["parameters"].sum()
    gains = RUN["solutions"].filter(pl.col("strategy") == "ip_m").sort("tau")["predicted_gain"]
    assert list(drawn.get_xdata()) == pytest.approx([(weights - g) / 1e6 for g in gains])


def test_attention_gains_and_their_fit() -> None:
    """All 31 lowered configurations; the sum is of the ops' own gains, MACs are half of what is lowered, the fit least squares."""
    rows = attention_gains(RUN["groups"], RUN["timing"], BASE)
    assert rows.height == 31
    whole = rows.row(by_predicate=pl.col("lowered") == 5, named=True)
    assert whole["sum_s"] == pytest.approx(7.5e-4)
    ops = RUN["groups"].filter(pl.col("group") == 0)
    assert whole["macs"] == pytest.approx(0.5 * ops["macs"].sum())
    x, y = rows["macs"].to_numpy(), rows["gain_s"].to_numpy()
    scale, bias, r2 = fit(x, y)
    slope, intercept = np.polyfit(x, y, 1)
    assert (scale, bias) == (pytest.approx(slope), pytest.approx(intercept))
    assert r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_attention_that_was_not_timed_alone() -> None:
    """Configurations whose ops were not timed one at a time have no sum, and are left out."""
    no_k = RUN["timing"].filter(pl.col("configuration") != [BASE, LOWER[0], BASE, BASE, BASE])
    rows = attention_gains(RUN["groups"], no_k, BASE)
    assert rows.height == 15
    assert all(c[1] == BASE for c in rows["configuration"])


def test_table_1_is_the_mean_over_tau_of_means_and_deviations() -> None:
    """Random's HellaSwag cell and the average column, computed again from the rows of both draws."""
    table = table_1(RUN)
    assert table.select("objective", "strategy").rows()[:3] == [
        ("et", "ip_et"),
        ("et", "random"),
        ("et", "prefix"),
    ]
    row = table.row(
        by_predicate=(pl.col("objective") == "et") & (pl.col("strategy") == "random"), named=True
    )
    of = differences(RUN).filter(
        (pl.col("objective") == "et")
        & (pl.col("strategy") == "random")
        & (pl.col("metric") == "acc")
    )
    at = [
        of.filter((pl.col("task") == "hellaswag") & (pl.col("tau") == tau))["difference"].to_list()
        for tau in TAUS
    ]
    assert row["hellaswag_acc"] == pytest.approx(statistics.mean(map(statistics.mean, at)))
    assert row["hellaswag_acc_std"] == pytest.approx(statistics.mean(map(statistics.stdev, at)))
    assert (row["taus"], row["repeats"]) == (len(TAUS), 8)
    assert row[f"{AVERAGE}_acc"] == pytest.approx(statistics.mean(row[f"{t}_acc"] for t in TASKS))
    assert row[f"{AVERAGE}_acc_std"] == pytest.approx(
        statistics.mean(row[f"{t}_acc_std"] for t in TASKS)
    )
    assert row["lambada_openai_perplexity"] == pytest.approx(9 * 0.6)


def test_table_1_compares_the_same_tau() -> None:
    """A strategy that lacks a τ takes it from the others' means as well."""
    lacks = (
        (pl.col("strategy") == "prefix")
        & (pl.col("objective") == "et")
        & (pl.col("tau") == TAUS[-1])
        & (pl.col("task") != "loss")
    )
    table = table_1({**RUN, "evaluation": RUN["evaluation"].filter(~lacks)})
    assert table.filter(pl.col("objective") == "et")["taus"].unique().to_list() == [4]
    assert table.filter(pl.col("objective") == "m")["taus"].unique().to_list() == [5]


def test_markdown_marks_the_best() -> None:
    """The winner of every objective is bold, whether more is better (accuracy) or less (perplexity)."""
    lines = markdown(table_1(RUN)).splitlines()
    own = [line for line in lines if "| ip_" in line]
    assert len(own) == 3
    assert all(line.count("**") == 2 * 6 for line in own)
    assert "averaged over the 5 τ" in lines[-1]


def test_findings_tell_who_wins() -> None:
    """Clear leads are told as such, at every τ; with noise above the lead they are not."""
    found = find(RUN)
    et = [c for c in found.comparisons if c.quantity == AVERAGE and c.objective == "et"]
    assert [(c.other, c.better, c.clearly, c.clear) for c in et] == [
        ("random", 5, 5, True),
        ("prefix", 5, 5, True),
    ]
    assert [c.difference for c in et] == pytest.approx([3, 4.8], abs=0.3)
    assert any(
        s.startswith("Accuracy averaged over tasks and τ, time to first token: ip_et is ")
        for s in found.sentences
    )
    noisy = find(add_accuracy(make_run(layers=2), noise=400))
    assert not all(c.clear for c in noisy.comparisons if c.quantity in TASKS)
    one = find(add_accuracy(make_run(layers=2, seeds=1), seeds=1))
    lone = next(c for c in one.comparisons if c.other == "prefix" and c.quantity == AVERAGE)
    assert lone.error is None
    assert not lone.clear
    assert any("no standard error" in s for s in one.sentences)


def test_questions_are_part_of_the_error() -> None:
    """The paired error over documents is added in quadrature: with a large one no lead is clear."""
    evaluation = RUN["evaluation"]
    error = evaluation.filter(pl.col("metric") == "acc").with_columns(
        metric=pl.lit("acc_diff_stderr"), value=0.5, base_value=0.0
    )
    found = find({**RUN, "evaluation": pl.concat([evaluation, error])})
    bare = {(c.objective, c.other, c.quantity): c.error for c in find(RUN).comparisons}
    for c in found.comparisons:
        if c.quantity in TASKS:
            alone = bare[c.objective, c.other, c.quantity]
            assert alone is not None
            assert c.error == pytest.approx(
                math.hypot(alone, *[50 / len(TASKS) ** 0.5 if c.quantity == AVERAGE else 50] * 2)
            )
            assert not c.clear


def test_a_plan_that_lowers_nothing_weighs_nothing() -> None:
    """A τ at which one draw has no loss is left out of the mean ratio for every strategy: what is told fits how often it is better."""
    nothing = (
        (pl.col("metric") == "loss_mse")
        & (pl.col("strategy") == "random")
        & (pl.col("plan_seed") == 1)
        & (pl.col("tau") == TAUS[0])
    )
    value = pl.when(nothing).then(0.0).otherwise("value")
    found = find({**RUN, "evaluation": RUN["evaluation"].with_columns(value=value)}).comparisons
    fewer = find(
        {**RUN, "evaluation": RUN["evaluation"].filter(pl.col("tau") != TAUS[0])}
    ).comparisons
    assert [c for c in found if c.quantity == "loss_mse"] == [
        c for c in fewer if c.quantity == "loss_mse"
    ]


def test_additivity_is_checked() -> None:
    """Quantiles of measured / predicted, and no warning where both hold."""
    found = find(RUN)
    loss, *each, ttft, gain = found.additivity
    assert (loss.quantity, loss.plans, ttft.quantity, ttft.plans, gain.plans) == (
        "loss MSE",
        60,
        "TTFT",
        20,
        20,
    )
    assert [(a.quantity, a.objective, a.plans) for a in each] == [
        ("loss MSE", o, 20) for o in ("et", "tt", "m")
    ]
    assert 0.7 < loss.low < loss.median < loss.high < 1.25
    assert ttft.error < 0.05
    assert not found.warnings


@pytest.mark.parametrize(
    ("metric", "factor", "words"),
    [("loss_mse", 3.0, "does not add up over ops"), ("ttft_s", 1.2, "do not add up over groups")],
)
def test_a_broken_assumption_is_told(metric: str, factor: float, words: str) -> None:
    """Measured loss MSE three times as predicted, or TTFT a fifth longer: a warning comes by itself."""
    value = (
        pl.when(pl.col("metric") == metric)
        .then(pl.col("value") * factor)
        .otherwise(pl.col("value"))
    )
    run = {**RUN, "evaluation": RUN["evaluation"].with_columns(value=value)}
    told = find(run).warnings
    assert told
    assert all(words in w for w in told)


def test_the_objective_that_breaks_is_named() -> None:
    """Where one objective's plans alone leave the prediction, the warning names it; equal plans count once."""
    value = (
        pl.when((pl.col("metric") == "loss_mse") & (pl.col("objective") == "m"))
        .then(3 * pl.col("value"))
        .otherwise("value")
    )
    found = find({**RUN, "evaluation": RUN["evaluation"].with_columns(value=value)})
    assert ["in the plans for m" in w for w in found.warnings] == [True]
    twice = {
        k: pl.concat([t, t.with_columns(tau=-pl.col("tau"))])
        if k in ("solutions", "evaluation")
        else t
        for k, t in RUN.items()
    }
    assert [a.plans for a in find(twice).additivity] == [a.plans for a in find(RUN).additivity]


def test_files_are_written(tmp_path: Path) -> None:
    """Every figure as a well-formed SVG of its own and as a PNG, Table 1 as CSV and Markdown."""
    assert write_figures(RUN, tmp_path / "new" / "figures", BASE) == []
    folder = tmp_path / "new" / "figures"
    expected = {f"figure_{n}.{suffix}" for n in NUMBERS for suffix in ("svg", "png")} | {
        "table_1.csv",
        "table_1.md",
    }
    assert {p.name for p in folder.iterdir()} == expected
    for path in folder.glob("*.svg"):
        assert xml.etree.ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in path.read_text()
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in folder.glob("*.png"))
    assert pl.read_csv(folder / "table_1.csv").height == 9


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    """A run without tasks, or with no tables at all, leaves figures out and says which and why;
    the appendix says so in one line."""
    run = make_run(layers=2)
    told = write_figures(run, tmp_path, BASE)
    assert [t.split(" is ")[0] for t in told] == [
        "Figure 1",
        "Figure 5",
        "Figure 7",
        "Figure 8",
        "Figure 9",
        "Table 1",
    ]
    extra = appendix(run, BASE)
    assert extra.left_out == (
        "Left out: figure 1 (the timing table has no attention group with its ops timed one at a "
        "time); figure 5, figure 7, figure 8, figure 9, Table 1 (no task's accuracy was evaluated)."
    )
    assert [c.split(".")[0] for c, _ in extra.figures] == [
        f"Figure {n}" for n in ("2", "3a", "3b", "4", "6")
    ]
    page = write_report(run, "no tasks", {"base": BASE}, extra)
    assert page.count("Left out: figure 1") == 1
    assert page.count("Figure 4. ") == 2  # caption, and the picture's own label
    assert len(write_figures({}, tmp_path / "none")) == len(NUMBERS) + 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in the folder's place is named in one sentence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(MpqError, match="cannot be written"):
        write_figures(RUN, tmp_path / "file")


def test_uniform_plans_are_in_table_1_and_change_no_mean() -> None:
    """They have a row each, of their one τ, never bold; the other strategies' rows stay as they were."""
    plain = add_accuracy(make_run(layers=2))
    both = add_accuracy(with_uniform(make_run(layers=2)))
    tasks = both["evaluation"].filter(pl.col("metric").is_in(["acc", "perplexity"]))
    own = tasks.filter(pl.col("strategy").str.starts_with("uniform") & (pl.col("task") != "loss"))
    run = {**plain, "evaluation": pl.concat([plain["evaluation"], own])}
    table = table_1(run)
    kept = table.filter(~pl.col("strategy").str.starts_with("uniform"))
    assert kept.equals(table_1(plain))
    uniform = table.filter(pl.col("strategy").str.starts_with("uniform"))
    assert uniform.select("objective", "strategy", "taus").rows() == [
        ("et", "uniform_int8", 1),
        ("et", "uniform_int8_but_head", 1),
        ("m", "uniform_int8", 1),
    ]
    lines = markdown(table).splitlines()
    assert not any("**" in line for line in lines if "uniform" in line)
    assert "averaged over the 5 τ" in lines[-1]
    assert "Uniform plans are of one τ each." in lines[-1]
    assert find(run).comparisons == find(plain).comparisons
