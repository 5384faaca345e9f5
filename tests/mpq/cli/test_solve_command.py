"""`mpq solve` on tables made up here: a budget of the loss MSE with rounding's signs."""

from __future__ import annotations

import itertools
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_groups
from typer.testing import CliRunner

from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.program import gains as gains_module
from mpq.program.plan import Plan
from mpq.store.tables import table

GROUPS = make_groups(1).filter(kind="linear").head(4)
OPS = GROUPS["op"].to_list()
DRAW = np.random.default_rng(0)
GAIN = {op: float(n) for n, op in enumerate(OPS, 1)}
EFFECTS = {op: DRAW.normal(0, 1e-3, 3) for op in OPS}
DRIFT = {op: 1e-4 * n for n, op in enumerate(OPS, 1)}
FRESH = {op: 1e-8 * n for n, op in enumerate(OPS, 1)}  # of activations (nats²)
BUDGET = 1e-6


def mse_of(lowered: tuple[str, ...]) -> float:
    """The loss MSE with signs of a plan, as docs/method.md has it."""
    moved = sum((EFFECTS[op] for op in lowered), np.zeros(3)) + sum(DRIFT[op] for op in lowered)
    return float(np.mean(moved**2)) + sum(FRESH[op] for op in lowered)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, str]:
    """The tables as files."""
    of = {"objective": "m", "loss_mse_stderr": 0.0, "kl_stderr": 0.0}
    gains = [
        {**of, "group": n, "configuration": [f], "gain": GAIN[op] * low}
        | {"loss_mse": BUDGET * low, "kl": DRIFT[op] * low}
        for n, op in enumerate(OPS)
        for f, low in (("bf16", 0), ("int8", 1))
    ]
    sensitivity = [
        {"op": op, "operand": operand, "format": "int8", "noise_model": "actual", "n_samples": 3}
        | {"loss_mse": FRESH[op] if operand == "input" else 1e-6, "loss_mse_stderr": 0.0}
        | {"sensitivity": 1.0, "kl": DRIFT[op] / 2, "kl_stderr": 0.0}
        for op in OPS
        for operand in ("input", "weight")
    ]
    effects = [
        {"op": op, "format": "int8", "sample": i, "effect": float(v)}
        for op in OPS
        for i, v in enumerate(EFFECTS[op])
    ]
    loss = {"n_samples": 3, "mean_square_loss": 4.0, "mean_loss": 2.0}
    made = {
        "gains": table("gains", gains).with_columns(
            ops=pl.Series([[o] for o in OPS for _ in "bi"])
        ),
        "sensitivity": table("sensitivity", sensitivity),
        "effects": table("effects", effects),
        "groups": GROUPS,
        "loss": table("loss", [loss]),
    }
    for name, frame in made.items():
        frame.write_parquet(tmp_path / f"{name}.parquet")
    return {name: str(tmp_path / f"{name}.parquet") for name in made}


def solved(tables: dict[str, str], *arguments: object) -> str:
    """What `mpq solve` prints."""
    command = ["solve", "--gains", tables["gains"], "--budget", BUDGET, *arguments]
    done = CliRunner().invoke(app, [str(a) for a in command])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_a_budget_with_signs(
    tables: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The plan gains most of all sixteen whose loss MSE with signs keeps the budget, more than the sum over operands
    allows; its file says what it is bounded by; that three samples are few is told."""
    every = itertools.chain(*(itertools.combinations(OPS, n) for n in range(5)))
    best = max((p for p in every if mse_of(p) <= BUDGET), key=lambda p: sum(GAIN[op] for op in p))
    assert len(best) > 1, "effects that cancel"
    of_signs = [v for n in ("groups", "sensitivity", "effects") for v in (f"--{n}", tables[n])]
    file = tmp_path / "plan.json"
    with caplog.at_level(logging.WARNING, "mpq"):
        out = ("--plan", file, "--loss", tables["loss"], "--json")
        told = json.loads(solved(tables, "--signed", "--base", "bf16", *of_signs, *out))
    assert "3 calibration samples for 4 decisions" in caplog.text
    assert told["gain"] == sum(GAIN[op] for op in best)
    chosen = [row["ops"][0] for row in told["chosen"] if row["configuration"] == ["int8"]]
    plan = Plan.from_json(file.read_text())
    assert sorted(plan.lowered) == sorted(chosen) == sorted(best)
    assert plan.signed
    assert plan.predicted_loss_mse == pytest.approx(mse_of(best))
    assert json.loads(solved(tables, "--json"))["gain"] == max(GAIN.values()), "of the sum, one op"


@pytest.mark.parametrize("signed", [False, True])
def test_a_plan_is_solved_once(
    tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signed: bool
) -> None:
    """The plan in the file is the solution that is printed, not another one of the same program."""
    name, calls = "solve_signed" if signed else "solve", list[object]()
    solver = getattr(gains_module, name)
    monkeypatch.setattr(gains_module, name, lambda *a, **k: calls.append(a) or solver(*a, **k))
    needed = ("groups", "loss", *(("sensitivity", "effects") if signed else ()))
    of = [v for n in needed for v in (f"--{n}", tables[n])] + ["--signed"] * signed
    file = tmp_path / "plan.json"
    told = json.loads(solved(tables, "--plan", file, "--base", "bf16", *of, "--json"))
    assert len(calls) == 1
    plan = Plan.from_json(file.read_text())
    assert (plan.predicted_gain, plan.budget) == (told["gain"], pytest.approx(BUDGET))
    chosen = [row["ops"][0] for row in told["chosen"] if row["configuration"] == ["int8"]]
    assert sorted(plan.lowered) == sorted(chosen)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--signed",), "--signed needs --groups, --base, --sensitivity and --effects"),
        (
            ("--sensitivity", "s.parquet"),
            "--sensitivity and --effects are read with --signed alone",
        ),
        (("--effects", "e.parquet"), "--sensitivity and --effects are read with --signed alone"),
        (("--signed", "--cost", "kl"), "--signed is of the loss MSE, --cost kl of the KL"),
    ],
)
def test_mistakes(tables: dict[str, str], arguments: tuple[str, ...], told: str) -> None:
    """What it needs and what it does not go with is one sentence."""
    with pytest.raises(MpqError, match=told):
        solved(tables, *arguments)


VALUES: list[Any] = [None, 0, -1, 3, 2**62, 1e308, float("nan"), float("inf"), "", "x", True]
VALUES += [[], ["x"], ["int8", "int8"], {"a": 1}]


def altered(frame: pl.DataFrame, draw: st.DataObject) -> pl.DataFrame:
    """A table as somebody may hand it in: of no rows, fewer or more, without a column, or with another value in one."""
    how = draw.draw(st.sampled_from(["empty", "half", "twice", "gone", "first", "all", "all"]))
    if how in ("empty", "half", "twice"):
        rows = {"empty": frame.clear(), "half": frame.head(max(1, frame.height // 2))}
        return rows.get(how, pl.concat([frame, frame]))
    column = draw.draw(st.sampled_from(frame.columns))
    if how == "gone":
        return frame.drop(column)
    value = draw.draw(st.sampled_from(VALUES))
    kept = [] if how == "all" else frame[column].to_list()[1:]
    with suppress(TypeError, pl.exceptions.PolarsError):  # values that no column holds together
        new = pl.Series(column, [value] * (frame.height - len(kept)) + kept, strict=False)
        return frame.with_columns(new) if new.dtype != pl.Object else frame
    return frame


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draw=st.data(), signed=st.booleans())
def test_any_tables_are_used_or_told(
    draw: st.DataObject, signed: bool, tables: dict[str, str]
) -> None:
    """Whatever is in one of the tables, there is a plan that can be read again, or one sentence."""
    name = draw.draw(st.sampled_from(list(tables)))
    frame, file = pl.read_parquet(tables[name]), Path(tables["loss"]).with_name("plan.json")
    more = [v for n in tables if n != "gains" for v in (f"--{n}", tables[n])]
    if not signed:
        more = more[-4:]
    altered(frame, draw).write_parquet(tables[name])
    file.unlink(missing_ok=True)
    told = ""
    try:
        solved(tables, *more, *(["--signed"] if signed else []), "--base", "bf16", "--plan", file)
        Plan.from_json(file.read_text())
    except MpqError as error:
        told = str(error)
    finally:
        frame.write_parquet(tables[name])
    assert told.isprintable()


@pytest.mark.parametrize(
    ("name", "column", "value", "told"),
    [
        ("groups", "op", None, "groups table has a row without a value in op"),
        ("groups", "op", "twice", "groups table has a row twice"),
        ("groups", "order", 3, "two ops of one order"),
        ("gains", "ops", ["a", "b"], "1 formats for group 0, which has 2 ops"),
        ("groups", "parameters", None, "without a value in parameters"),
        ("groups", "in_features", 0, "a linear without in_features or out_features"),
        ("gains", "loss_mse", None, "gains table .*loss_mse"),
        ("gains", "group", -1, "a configuration of a group twice"),
        ("loss", "mean_square_loss", 0.0, "mean_square_loss above zero"),
        ("loss", "mean_square_loss", float("nan"), "mean_square_loss that no measurement gives"),
        ("loss", "mean_square_loss", ..., "loss table has no rows"),
        ("sensitivity", "operand", None, "without a value in operand"),
        ("effects", "sample", -1, "in sample: expected 0 or more"),
        ("effects", "sample", 2**40, "effects table is not of the 3 samples"),
        ("effects", "effect", float("inf"), "without a value in effect"),
    ],
)
def test_tables_of_other_values(
    name: str, column: str, value: object, told: str, tables: dict[str, str], tmp_path: Path
) -> None:
    """A plan is not made of a table that lacks values, has rows twice, or is another model's: one sentence names the column."""
    frame = pl.read_parquet(tables[name])
    changed = frame.clear() if value is ... else frame.with_columns(pl.lit(value).alias(column))
    changed.write_parquet(tables[name])
    plan = ("--plan", tmp_path / "plan.json", "--loss", tables["loss"])
    of = ("--groups", tables["groups"], "--base", "bf16")
    signs = ("--sensitivity", tables["sensitivity"], "--effects", tables["effects"])
    with pytest.raises(MpqError, match=told):
        solved(
            tables,
            *plan,
            *of,
            *(("--signed", *signs) if name in ("effects", "sensitivity") else ()),
        )
    assert not (tmp_path / "plan.json").exists()


def test_rows_of_a_group_that_name_other_ops(tables: dict[str, str], tmp_path: Path) -> None:
    """Which ops a group's formats are of is said alike by all of its rows, or a plan could be of others: it is not made."""
    frame = pl.read_parquet(tables["gains"])
    plan = ("--plan", tmp_path / "plan.json", "--loss", tables["loss"])
    of = ("--groups", tables["groups"], "--base", "bf16")
    for ops, told in (("another", "other ops in other rows"), (None, "without a value in ops")):
        first = pl.int_range(pl.len()) == 0
        other = pl.concat_list(pl.lit(ops, pl.String))
        frame.with_columns(ops=pl.when(first).then(other).otherwise("ops")).write_parquet(
            tables["gains"]
        )
        with pytest.raises(MpqError, match=told):
            solved(tables, *plan, *of)


def test_one_file_for_two_tables() -> None:
    """`mpq sensitivity` refuses to write its effects over its sensitivities, before it loads anything."""
    command = ["sensitivity", "nowhere", "--calibration", "t.txt", "--out", "s.parquet"]
    done = CliRunner().invoke(app, [*command, "--effects", "./s.parquet"])
    assert "--effects and --out both name" in str(done.exception)
