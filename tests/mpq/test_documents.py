"""Files that people hand in, or that lie in a store: whatever is in them, one sentence or damage, never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import FRAME

from mpq.cli.console import read_frame
from mpq.cli.inventory import entries, plan_keys, read_plan, runs, verify
from mpq.cli.show import diff, show
from mpq.documents import parse_json
from mpq.errors import MpqError
from mpq.program.gains import solve_table
from mpq.program.plan import Plan
from mpq.report.runs import read_run, write_run
from mpq.spec import parse_text
from mpq.store.entries import Damaged, Store, TableRef
from mpq.store.tables import table

DEEP = b"[" * 200_000
QUICKLY = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OTHER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../../x", "\ud800", "a\0b", "x" * 5000]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
PROVENANCE = {
    "gains": "0" * 64,
    "model": "m",
    "revision": None,
    "evaluation": "t.txt",
    "text": {"field": "text", "split": "train", "seed": 0, "revision": None},
    "prefill": [4, 256],
    "prices": [{"constraint": "c", "gain_without": 1.0, "kl_without": None}],
    "stored": {"a": "int8"},
    "check": {"text": "t", "rounds": 1, "note": ""},
    "versions": {"mpq": "1"},
}
PLAN = Plan("ip_et", "et", 0.01, "fp32", {"a": "bf16"}, 0, 0, 0, 1, provenance=PROVENANCE)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value within plain data."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at, *(place for k, v in inner for place in places(v, (*at, k)))]


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Plain data with another value at one place; `...` takes it out."""
    if not at:
        return new
    copy = value.copy()
    if len(at) == 1 and new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(copy[at[0]], at[1:], new)
    return copy


def damaged(whole: bytes, draw: st.DataObject) -> bytes:
    """A file as it may arrive: of another kind, empty, cut short, altered, with one value of another type, missing or too deep."""
    how = draw.draw(st.sampled_from(["bytes", "empty", "cut", "flipped", "deep", "value", "gone"]))
    if how == "bytes":
        return draw.draw(st.binary(max_size=64))
    if how == "empty":
        return b""
    if how == "deep":
        return DEEP
    if how in ("cut", "flipped"):
        at = draw.draw(st.integers(0, len(whole) - 1))
        return (
            whole[:at] if how == "cut" else whole[:at] + bytes([whole[at] ^ 0x95]) + whole[at + 1 :]
        )
    data = json.loads(whole)
    at_ = draw.draw(st.sampled_from([p for p in places(data) if p]))
    return json.dumps(changed(data, at_, ... if how == "gone" else draw.draw(OTHER))).encode()


def told(ask: Callable[[], object]) -> None:
    """What is asked ends, or ends in one sentence."""
    with suppress(MpqError):
        ask()


@QUICKLY
@given(draw=st.data())
def test_metadata(draw: st.DataObject, tmp_path: Path) -> None:
    """meta.json: an entry is found or not, listed and verified, whatever is in it; what is served is what was written."""
    store = Store(tmp_path.as_uri())
    ref = store.write_table("gains", "k1", FRAME, upstream=("k0",))
    file = tmp_path / "gains" / "k1" / "meta.json"
    made = {"stage": "gains", "host": "here", "written_unix_s": 1.75e9}
    meta = {**json.loads(file.read_text()), "provenance": made}
    file.write_bytes(damaged(json.dumps(meta).encode(), draw))
    found = store.find("gains", "k1")
    assert found is None or (found.kind, found.key, found.sha256) == ("gains", "k1", ref.sha256)
    (entry,) = verify(store)
    assert (entry.state == "whole") == (found is not None)
    json.dumps([e.row() for e in entries(store)]).encode()


@pytest.mark.parametrize("written", [10**400, -(10**400), True, float("inf"), float("nan")])
def test_a_time_that_no_clock_has(written: float, tmp_path: Path) -> None:
    """JSON has integers that no float holds: the entry is found, and marked as used."""
    store = Store(tmp_path.as_uri())
    store.write_table("gains", "k1", FRAME)
    file = tmp_path / "gains" / "k1" / "meta.json"
    made = {"stage": "gains", "written_unix_s": written}
    file.write_text(json.dumps({**json.loads(file.read_text()), "provenance": made}))
    assert store.find("gains", "k1") is not None
    assert json.loads(file.read_text())["used_unix_s"] > 1.7e9


@pytest.mark.parametrize("store", ["\ud800", "a\0b"])
def test_a_store_that_is_no_path(store: str) -> None:
    """JSON's strings may be no path: a reference to such a store is none."""
    fields = {"kind": "gains", "key": "k", "sha256": "0" * 64, "bytes": 1, "rows": 1}
    assert TableRef.of(fields).store == ""
    with pytest.raises(ValueError, match="store is"):
        TableRef.of(fields, store=store)


def test_gains_of_128_bits() -> None:
    """Integers that NumPy has not are no gains."""
    rows = {"group": [0], "configuration": [["fp32"]], "gain": [-(2**63) - 1], "loss_mse": [0.0]}
    with pytest.raises(MpqError, match="column gain as Int128: expected numbers"):
        solve_table(pl.DataFrame(rows, schema_overrides={"gain": pl.Int128}), 0.1)


@QUICKLY
@given(draw=st.data())
def test_plans(draw: st.DataObject, tmp_path: Path) -> None:
    """A plan's JSON: a plan whose fields are of their types, or one sentence."""
    file = tmp_path / "plan.json"
    file.write_bytes(damaged(PLAN.to_json().encode(), draw))

    def ask() -> None:
        plan = read_plan(file)
        assert all(isinstance(v, str) for v in plan.formats.values())
        assert isinstance(plan.tau, float | int)
        assert plan.share_lowered <= 1
        plan_keys(file)
        show(file, json_=True)
        show(file)
        diff(file, file)
        own = plan.provenance.get("text") or {}
        parse_text(**{**own, "source": plan.provenance.get("evaluation") or "x"})

    told(ask)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("formats", ["a"]),
        ("formats", {"a": 3}),
        ("provenance", ["x"]),
        ("provenance", {"model": 3}),
        ("provenance", {"prefill": [4, 0]}),
        ("provenance", {"text": {"source": "x"}}),
        ("provenance", {"prices": [{"constraint": "a"}]}),
        ("provenance", {"stored": {"a": 1}}),
        ("tau", "0.01"),
        ("base", None),
        ("seed", 1.5),
        ("more", 1),
        ("provenance", {"text": {"source": "t"}}),
        ("provenance", {"prefill": [0, 16]}),
        ("provenance", {"prices": [{}]}),
        ("provenance", {"stored": ["a"]}),
    ],
)
def test_a_plan_of_other_types(field: str, value: Any) -> None:
    """The sentence names the field, and does not repeat what is in it."""
    text = json.dumps({**json.loads(PLAN.to_json()), field: value})
    named = next(iter(value)) if isinstance(value, dict) and field == "provenance" else field
    with pytest.raises(MpqError, match=rf"^Not a plan: .*\({named}.*\)\.$"):
        Plan.from_json(text)
    assert Plan.from_json(PLAN.to_json()) == PLAN


@QUICKLY
@given(draw=st.data())
def test_records_of_runs(draw: st.DataObject, tmp_path: Path) -> None:
    """run.json: the run's tables, or one sentence, for a report and for the listing of a store."""
    store = Store((tmp_path / "store").as_uri())
    frame = table("loss", [{"n_samples": 1, "mean_square_loss": 4.0, "mean_loss": 2.0}])
    refs = [store.write_table("loss", "k1", frame), store.write_table("loss", "k2", frame)]
    write_run(tmp_path, "nightly", {"model": "tiny"}, {"loss": refs})
    file = tmp_path / "run.json"
    file.write_bytes(damaged(file.read_bytes(), draw))
    told(lambda: read_run(tmp_path))
    told(lambda: [(run.name, run.model, run.keys) for run in runs(tmp_path)])


@QUICKLY
@given(draw=st.data(), suffix=st.sampled_from(["parquet", "json", "csv"]))
def test_tables_of_gains(draw: st.DataObject, suffix: str, tmp_path: Path) -> None:
    """A table for `mpq solve`, in each of its formats: a solution, or one sentence."""
    frame = pl.DataFrame(
        {
            "objective": ["et"] * 4,
            "group": [0, 0, 1, 1],
            "configuration": [["fp32"], ["bf16"], ["fp32"], ["bf16"]],
            "gain": [0.0, 1.0, 0.0, 2.0],
            "loss_mse": [0.0, 0.1, 0.0, 0.2],
        }
    )
    file = tmp_path / f"gains.{suffix}"
    if suffix == "parquet":
        frame.write_parquet(file)
    elif suffix == "json":
        frame.write_json(file)
    else:
        frame.with_columns(pl.col("configuration").list.join(" ")).write_csv(file)
    whole = file.read_bytes()
    if suffix == "json":
        file.write_bytes(damaged(whole, draw))
    else:
        at = draw.draw(st.integers(0, len(whole) - 1))
        new = draw.draw(st.binary(max_size=3))
        tail = draw.draw(st.sampled_from([whole[at + len(new) :], whole[at:], b""]))
        file.write_bytes(whole[:at] + new + tail)

    def ask() -> None:
        chosen, solution = solve_table(read_frame(str(file)), 0.2)
        assert chosen.height == len(solution.chosen)

    told(ask)


@QUICKLY
@given(
    column=st.sampled_from(["objective", "group", "configuration", "gain", "loss_mse"]),
    values=st.lists(OTHER, min_size=1, max_size=3),
)
def test_gains_of_other_types(column: str, values: list[Any]) -> None:
    """A column of other types, of nulls, of numbers that are none."""
    given_ = {
        "objective": ["et"],
        "group": [0],
        "configuration": [["fp32"]],
        "gain": [0.0],
        "loss_mse": [0.0],
    }
    rows = {k: v * len(values) for k, v in given_.items()}
    try:
        frame = pl.DataFrame({**rows, column: pl.Series(values, strict=False)})
    except (TypeError, OverflowError, UnicodeError, pl.exceptions.PolarsError):
        return
    if frame[column].dtype != pl.Object:  # no file holds Python's own
        told(lambda: solve_table(frame, 0.1))


@pytest.mark.parametrize(
    "text",
    [DEEP, b'{"a":' * 100_000, b"\xff", b"", b"9" * 10_000, b"{'a': 1}", b'{"a": 1, "a": 2}'],
)
def test_json_that_is_none(text: bytes) -> None:
    """One short line, also where Python would end in a RecursionError."""
    with pytest.raises(ValueError, match=r"^[^\n]{1,200}$"):
        parse_json(text)


def test_a_reference_leads_nowhere_else() -> None:
    """A kind or key that would lead out of the store is no reference."""
    good = {"kind": "gains", "key": "k", "sha256": "0" * 64, "bytes": 1, "rows": 1}
    assert TableRef.of(good).key == "k"
    for bad in ({"kind": "../x"}, {"key": "a/b"}, {"key": ".."}, {"key": "a\nb"}, {"store": None}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TableRef.of({**good, **bad})


def test_parts_that_do_not_fit_are_a_sentence(tmp_path: Path) -> None:
    """Tables of a run whose columns cannot be put under each other."""
    store = Store((tmp_path / "store").as_uri())
    refs = [
        store.write_table("gains", "k1", FRAME),
        store.write_table("gains", "k2", FRAME.with_columns(gain_s=pl.lit([1, 2]))),
    ]
    write_run(tmp_path, "nightly", {}, {"gains": refs})
    with pytest.raises(MpqError, match="do not fit"):
        read_run(tmp_path)
    with pytest.raises(Damaged):
        store.read_table(store.write_bytes("gains", "k3", b"none", "parquet"))
