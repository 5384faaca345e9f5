"""Other tools' plans in a run's report: sizes and frontiers against what is computed by hand, and tables that are refused."""

from __future__ import annotations

import itertools
import json
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from synthetic import make_groups
from test_pareto import run, run_folder

from mpq.errors import MpqError
from mpq.program.memory import effective_bits, weight_bytes
from mpq.report.beside import Beside, beside
from mpq.report.beside_figure import beside_others
from mpq.store.tables import table

FACTS = {"model": "models/demo", "fingerprint": "af39cabdf57fd430", "base": "bf16"}
GROUPS = make_groups(1).filter(kind="linear")
OPS = GROUPS["op"].to_list()
HEAD = OPS[-1]
COST = {op: 1e-4 * (1 + 2 * n) for n, op in enumerate(OPS)} | {HEAD: 1e-5}  # KL in INT8
PEERS = pl.DataFrame({"tool": ["auto-round", "higgs"], "kl": [1e-3, 2e-3], "bits": [12.0, 9.0]})


def tables_of(**more: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """A run that may put each linear in INT8, whose KL has been measured at twice what was predicted."""
    gains = [
        {
            "objective": "m",
            "group": group,
            "configuration": [f],
            "gain": 1.0 * (f == "int8"),
            "loss_mse": 0.0,
            "kl": COST[op] * (f == "int8"),
            "kl_stderr": 0.0,
        }
        for group, op in enumerate(OPS)
        for f in ("bf16", "int8")
    ]
    ops = pl.Series([[op] for op in OPS for _ in range(2)])
    plan = {"strategy": "ip_m", "objective": "m", "tau": 1.0, "seed": 0}
    lowered = [{**plan, "op": op, "format": "int8" if op == OPS[0] else "bf16"} for op in OPS]
    measured = {"plan_seed": 0, "task": "loss", "metric": "kl", "value": 7e-4, "base_value": 0.0}
    return {
        "groups": GROUPS,
        "gains": table("gains", gains).with_columns(ops=ops),
        "solutions": table("solutions", [{**plan, "kl_scale": 2.0, "kl_bound": 1e-3}]),
        "plans": table("plans", lowered),
        "evaluation": table("evaluation", [{**plan, **measured}]),
        **more,
    }


def every_plan() -> list[dict[str, str]]:
    """All choices of INT8 or base."""
    chosen = itertools.product(("bf16", "int8"), repeat=len(OPS))
    return [dict(zip(OPS, formats, strict=True)) for formats in chosen]


def size_by_hand(count: str, plan: dict[str, str]) -> float:
    """A plan's size as a table's column has it; all linears are of one shape."""
    if count == "bits":
        inner = [f for op, f in plan.items() if op != HEAD]
        return sum(8.0 if f == "int8" else 16.0 for f in inner) / len(inner)
    return (weight_bytes if count == "weight_bytes" else effective_bits)(GROUPS, plan, "bf16")


@pytest.mark.parametrize("count", ["bits", "effective_bits", "weight_bytes"])
def test_the_frontier_in_the_tables_own_count(count: str) -> None:
    """At every size the run's frontier is the smallest KL of all plans, at the measured scale, as the table counts sizes; the
    run's own plan lies at its size by hand."""
    full = size_by_hand(count, dict.fromkeys(OPS, "bf16"))
    sizes = [0.99 * full, 0.7 * full, full]
    peers = pl.DataFrame({"tool": ["a", "b", "b"], "kl": [1e-3, 2e-3, 0.0], count: sizes})
    found = beside(peers, "peers.csv", tables_of(), FACTS)
    assert found.count == count
    every = [
        (size_by_hand(count, p), 2 * sum(COST[op] for op, f in p.items() if f == "int8"))
        for p in every_plan()
    ]
    assert found.frontier.height == len(OPS) + (count != "bits")  # the head's bits are not counted
    for size, kl in found.frontier.iter_rows():
        assert kl == pytest.approx(min(k for s, k in every if s <= size * (1 + 1e-12)))
    for size, own in found.others.select("size", "own_kl").iter_rows():
        assert own == pytest.approx(min(k for s, k in every if s <= size * (1 + 1e-12)))
    lowered = {op: "int8" if op == OPS[0] else "bf16" for op in OPS}
    assert found.measured.rows() == [("ip_m", pytest.approx(size_by_hand(count, lowered)), 7e-4)]


def test_what_the_bench_writes() -> None:
    """The rows of bench/peers/compare.py as they are: those of this checkpoint alone, a panel for each case, every tool with a
    line and a name, the run's own frontier and plans in each."""
    cases = ("BF16/INT8, free", "BF16/INT8, tied")
    rows: list[dict[str, Any]] = [
        {"checkpoint": name, "case": case, "target": bits, "tool": tool, "bits": float(bits)}
        | {"kl": 1e-3 * n / bits, "loss_mse": 1e-6, "perplexity": 10.2, "over": False}
        for name, case in itertools.product(("neox", "demo"), cases)
        for n, tool in enumerate(("mpq", "random", "higgs"), 1)
        for bits in (9, 12)
    ]
    found = beside(pl.DataFrame(rows), "peers.parquet", tables_of(), FACTS)
    assert found.others.height == len(rows) / 2
    assert "by its name alone" in found.matched
    figure = beside_others(found)
    assert [axes.get_title() for axes in figure.axes] == list(cases)
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {
            "this run's frontier, predicted",
            "ip_m, measured",
            "mpq",
            "random",
            "higgs",
        }
        assert list(lines["higgs"].get_ydata()) == pytest.approx([3e-3 / 9, 3e-3 / 12])
        assert axes.get_yscale() == "log"
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 5


def test_no_plan_so_small() -> None:
    """Beside a plan smaller than all that the run's formats give stands none of the run's."""
    found = beside(PEERS.with_columns(bits=pl.Series([5.0, 9.0])), "t.csv", tables_of(), FACTS)
    assert [row["own_kl"] is None for row in found.sheet.rows] == [True, False]


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (PEERS.drop("bits"), r"lacks one of weight_bytes, effective_bits, bits: expected a row"),
        (PEERS.drop("kl", "tool"), "lacks tool and kl"),
        (PEERS.clear(), "has no rows"),
        (PEERS.with_columns(kl=pl.lit("a lot")), "has a lot as kl"),
        (PEERS.with_columns(kl=pl.lit(-0.1)), "has -0.1 as kl: expected nats per token"),
        (PEERS.with_columns(kl=pl.lit(None, pl.Float64)), "has None as kl"),
        (PEERS.with_columns(tool=pl.lit(None, pl.String)), "a plan without a tool"),
        (PEERS.with_columns(bits=pl.lit(1.5e6)), r"has 1500000.0 as bits: .* between 1 and 33"),
        (
            PEERS.rename({"bits": "weight_bytes"}),
            r"has 12.0 as weight_bytes: .* between 262,144 and ",
        ),
        (PEERS.with_columns(checkpoint=pl.lit("neox")), "checkpoint is neox, this run's is demo"),
        (
            PEERS.with_columns(fingerprint=pl.lit("0" * 64)),
            "of another model: its fingerprint is 0",
        ),
        (PEERS.with_columns(base=pl.lit("fp32")), "its base is fp32, this run's is bf16"),
        (PEERS.with_columns(tool=pl.lit(" ")), "a plan without a tool"),
        (PEERS.with_columns(tool=pl.lit(date(2026, 1, 1))), "has Date as tool: expected text"),
        (PEERS.with_columns(case=pl.lit(True)), "has Boolean as case: expected text"),
        (PEERS.with_columns(kl=pl.lit(True)), "has Boolean as kl: expected numbers"),
        (PEERS.with_columns(kl=pl.concat_list("kl")), r"has List\(Float64\) as kl"),
        (
            PEERS.with_columns(fingerprint=pl.Series([FACTS["fingerprint"], None])),
            "has a plan without a fingerprint",
        ),
        (PEERS.with_columns(base=pl.Series(["bf16", None])), "has a plan without a base"),
    ],
)
def test_tables_that_are_refused(frame: pl.DataFrame, told: str) -> None:
    """What is damaged, of other units or of another model gets one sentence that names the file and what was expected."""
    with pytest.raises(MpqError, match=f"peers.csv .*{told}") as refused:
        beside(frame, "peers.csv", tables_of(), FACTS)
    assert "\n" not in str(refused.value)


def test_a_run_without_kl() -> None:
    """A run whose gains have no KL cannot be compared, and says so."""
    gains = tables_of()["gains"].drop("kl", "kl_stderr")
    with pytest.raises(MpqError, match="no KL, by which plans"):
        beside(PEERS, "peers.csv", tables_of(gains=gains), FACTS)


def test_between_the_points_of_the_frontier() -> None:
    """Where there are more Pareto-optimal plans than points, other tools' plans still stand beside the run's best of their size:
    ten ops of unlike sizes and costs, against every one of their 1024 plans."""
    groups = GROUPS.head(1).select(pl.all().repeat_by(10).explode())
    ops = [f"model.layers.{i}.mlp.up_proj" for i in range(10)]
    parameters = [1000 * 2**i + 37 * i for i in range(10)]
    cost = [1e-6 * (p + 500 * (i % 3)) for i, p in enumerate(parameters)]
    groups = groups.with_columns(
        op=pl.Series(ops), parameters=pl.Series(parameters), order=pl.Series(range(10))
    )
    gains = [
        {"objective": "m", "group": i, "configuration": [f], "gain": 1.0 * (f == "int8")}
        | {"loss_mse": 0.0, "kl": cost[i] * (f == "int8"), "kl_stderr": 0.0}
        for i in range(10)
        for f in ("bf16", "int8")
    ]
    of = {"groups": groups, "gains": table("gains", gains)}
    of["gains"] = of["gains"].with_columns(ops=pl.Series([[op] for op in ops for _ in range(2)]))
    every = [
        (
            sum(p * (8 if low else 16) for p, low in zip(parameters, plan, strict=True)),
            2 * sum(c for c, low in zip(cost, plan, strict=True) if low),
        )
        for plan in itertools.product((False, True), repeat=10)
    ]
    bits = [sum(parameters) * b for b in (8.31, 9.77, 11.4, 12.93, 15.2)]
    sizes = [b / sum(parameters) for b in bits]
    peers = pl.DataFrame({"tool": "a", "kl": 1e-3, "bits": sizes})
    found = beside(peers, "t.csv", tables_of(**of), FACTS)
    least = [min(kl for size, kl in every if size <= b) for b in bits]
    assert found.others["own_kl"].to_list() == pytest.approx(least)
    by_points = [found.frontier.filter(pl.col("size") <= s)["kl"].min() for s in sizes]
    assert by_points != pytest.approx(least), "the points alone do not tell it"


def test_what_is_measured_lowers_weights_alone() -> None:
    """A plan that lowers attention's products as well is left out: its KL is of them too, which no size here counts."""
    tables = tables_of()
    product = {"strategy": "ip_m", "objective": "m", "tau": 1.0, "seed": 0, "format": "int8"}
    more = table("plans", [{**product, "op": "model.layers.0.self_attn.qk_matmul"}])
    found = beside(PEERS, "t.csv", tables | {"plans": pl.concat([tables["plans"], more])}, FACTS)
    assert found.measured.is_empty()


def test_plans_of_chance_and_of_no_kl_are_not_drawn() -> None:
    """Random's plans are no choice of the run's, and a KL of zero has no place on a log axis."""
    tables = tables_of()
    for change in ({"strategy": pl.lit("random")}, {"value": pl.lit(0.0)}):
        of = {
            name: frame.with_columns(**{k: v for k, v in change.items() if k in frame.columns})
            for name, frame in tables.items()
        }
        assert beside(PEERS, "t.csv", of, FACTS).measured.is_empty()


def test_base_is_sixteen_bits_whatever_it_runs_in() -> None:
    """In FP32 the model counts as 16 bits a weight in `bits`, as the tools count what they leave alone."""
    tables = tables_of()
    for name, column in (("gains", "configuration"), ("plans", "format")):
        text = pl.element() if column == "configuration" else pl.col(column)
        new = text.replace("bf16", "fp32")
        frame = tables[name]
        of = pl.col(column).list.eval(new) if column == "configuration" else new.alias(column)
        tables[name] = frame.with_columns(of)
    found = beside(PEERS, "t.csv", tables, FACTS | {"base": "fp32"})
    assert found.frontier["size"].max() == pytest.approx(16.0)


def test_names_with_what_a_picture_reads_as_a_formula(tmp_path: Path) -> None:
    """A tool called `a$b{$` and one that begins with _ are drawn and named as they are called; sizes in bytes are in MB there
    and in the table."""
    size = size_by_hand("weight_bytes", dict.fromkeys(OPS, "int8"))
    rows = {"tool": ["a$b{$", "_b"], "case": ["$x", None], "kl": [1e-3, 2e-3]}
    peers = pl.DataFrame(rows | {"weight_bytes": [size, size]})
    found = beside(peers, "t.csv", tables_of(), FACTS)
    figure = beside_others(found)
    figure.savefig(tmp_path / "t.svg")
    drawn = (tmp_path / "t.svg").read_text()
    assert "a$b{$" in drawn
    named = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert "_b" in named, "what begins so is left out of legends otherwise"
    others = [x for axes in figure.axes for line in axes.lines[-2:] for x in line.get_xdata()]
    assert others == [size / 1e6] * 2
    assert [row["shown"] for row in found.sheet.rows] == [size / 1e6] * 2


def test_matched_by_content() -> None:
    """A fingerprint decides whatever the checkpoint is called, and nothing has to be added to that."""
    named = PEERS.with_columns(
        fingerprint=pl.lit(FACTS["fingerprint"] + "0" * 48), checkpoint=pl.lit("another name")
    )
    found = beside(named, "t.csv", tables_of(), FACTS)
    assert (found.others.height, found.matched) == (2, "")
    unnamed: Beside = beside(PEERS, "t.csv", tables_of(), FACTS)
    assert "names no checkpoint" in unnamed.matched


def test_the_command(tmp_path: Path) -> None:
    """`mpq report RUN --beside FILE` writes a page with the section, its table and its picture, or the picture; no table."""
    folder = run_folder(tmp_path, model="models/demo")
    file, page, picture = (tmp_path / name for name in ("peers.json", "page.html", "page.png"))
    file.write_text(json.dumps(PEERS.to_dicts()))
    run("report", folder, "--beside", file, "--out", page)
    text = page.read_text()
    assert "Beside other tools" in text
    assert 'id="beside"' in text
    assert ">higgs</text>" in text
    assert "it names no checkpoint" in text
    run("report", folder, "--out", page)
    assert "Beside other tools" not in page.read_text()
    run("report", folder, "--beside", file, "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(MpqError, match="--beside is drawn"):
        run("report", folder, "--beside", file, "--out", tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()
