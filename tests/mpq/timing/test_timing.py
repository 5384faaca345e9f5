"""The timing table of a real small model (no wall times)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoConfig

from mpq.errors import MpqError
from mpq.kernels import int8_attention
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill
from mpq.store.tables import SCHEMAS, table, validate
from mpq.timing.clock import clock_of
from mpq.timing.machine import Interval
from mpq.timing.measure import measure, measure_ttft, timing_model
from mpq.timing.pairs import Pairs, Timed
from mpq.timing.session import TRIES

CONFIG = AutoConfig.for_model(
    "llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=101,
)


OPS = {"qkv": ("q_proj", "k_proj", "v_proj", "qk_matmul", "av_matmul"), "o": ("o_proj",)}


def groups() -> pl.DataFrame:
    """The attention groups of the model above, written by hand: two instances of each of two signatures."""
    rows: list[dict[str, object]] = []
    for layer in range(2):
        for place, (signature, ops) in enumerate(OPS.items()):
            for op in ops:
                kind = "bgemm" if "matmul" in op else "linear"
                rows.append(
                    {
                        "group": 2 * layer + place,
                        "order": len(rows),
                        "op": f"model.layers.{layer}.self_attn.{op}",
                        "kind": kind,
                        "signature": signature,
                        "in_features": 64,
                        "out_features": 64,
                        "macs": 1,
                        "parameters": 1,
                        "heads": 4,
                        "kv_heads": 2,
                    }
                )
    return table("groups", rows)


@pytest.mark.parametrize("method", ["signature", "group"])
def test_the_timing_table(method: Any) -> None:
    """A row a configuration in the order asked for, in the schema, free of nulls and NaN, base-only with gain 0; the model is left as it was."""
    model = timing_model(CONFIG, "fp32")
    tokens = torch.arange(6)[None]
    before = model(tokens).logits
    requests = [
        ("qkv", [("fp32",) * 5, ("bf16",) * 5, ("int8", "fp32", "fp32", "fp32", "bf16")]),
        ("o", [("bf16",)]),
    ]
    ticks: list[tuple[int, int]] = []
    frame = measure(
        model,
        groups(),
        requests,
        base="fp32",
        batch=2,
        length=8,
        repeats=3,
        method=method,
        progress=lambda *t: ticks.append(t),
    )
    assert (
        dict(frame.drop("measured_unix_s", "waited_share").drop("clock_mhz", strict=False).schema)
        == SCHEMAS["timing"]
    )
    assert frame["configuration"].to_list() == [list(c) for _, cs in requests for c in cs]
    assert frame["instances"].to_list() == [2 if method == "signature" else 1] * 4
    assert frame["group"].to_list() == [0, 0, 0, 1]
    assert frame.row(0, named=True)["gain_s"] == 0
    assert frame.row(0, named=True)["ttft_s"] == frame.row(0, named=True)["base_ttft_s"] > 0
    floats = frame.select(pl.col(pl.Float64))
    assert floats.null_count().sum_horizontal().item() == 0
    assert np.isfinite(floats.to_numpy()).all()
    assert ticks == [(n, 4) for n in range(1, 5)]
    assert torch.equal(model(tokens).logits, before)


def test_all_groups_of_a_signature_are_switched_and_the_gain_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With forwards that gain 1 s for each lowered op, a signature of two groups of one op gains 1 s an instance, by either method."""

    class FakePrefill(Prefill):
        def ready(self, mixed: Mixed, formats: Mapping[str, str]) -> Timed:
            return lambda: 10.0 - len(formats)

    monkeypatch.setattr("mpq.running.decode.Prefill", FakePrefill)
    for method, ttft in (("signature", 8.0), ("group", 9.0)):
        row = measure(
            timing_model(CONFIG, "fp32"),
            groups(),
            [("o", [("bf16",)])],
            base="fp32",
            batch=1,
            length=4,
            repeats=3,
            method=method,
        ).row(0, named=True)  # type: ignore[arg-type]
        assert row["ttft_s"] == ttft
        assert (row["base_ttft_s"], row["gain_s"], row["gain_ci_low_s"]) == (10.0, 1.0, 1.0)


def test_only_the_last_position_reaches_the_head() -> None:
    """The forward that is timed asks for the logits of the last token alone, as engines do."""
    model = timing_model(CONFIG, "fp32")
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))
    measure_ttft(model, [{"lm_head": "bf16"}], base="fp32", batch=3, length=8, repeats=2)
    assert set(shapes) == {(3, 1, 64)}


def test_whole_plans() -> None:
    """A row a plan with finite times, in order."""
    plans = [
        {"lm_head": "bf16"},
        {
            "model.layers.0.self_attn.qk_matmul": "bf16",
            "model.layers.0.self_attn.av_matmul": "bf16",
        },
    ]
    frame = measure_ttft(
        timing_model(CONFIG, "fp32"), plans, base="fp32", batch=1, length=8, repeats=3
    )
    assert frame.height == 2
    assert np.isfinite(
        frame.select(
            "ttft_s", "base_ttft_s", "gain_s", "gain_ci_low_s", "gain_ci_high_s"
        ).to_numpy()
    ).all()


def test_what_cannot_be_timed_is_refused_before_anything_runs() -> None:
    """Formats without a kernel, unknown signatures and configurations of the wrong length are MpqErrors; no forward runs."""
    model = timing_model(CONFIG, "fp32")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    for requests, message in (
        ([("o", [("bf16",)]), ("o", [("fp8_e4m3",)])], "can run fp32, bf16, int8"),
        ([("qkv", [("fp32", "fp32", "fp32", "fp8_e4m3", "fp32")])], "native bgemm in fp8_e4m3"),
        ([("mlp", [("bf16",)])], "No group has the signature 'mlp'"),
        ([("o", [("bf16", "bf16")])], "2 formats"),
        ([("o", [("int9",)])], "Unknown format"),
    ):
        with pytest.raises(MpqError, match=message):
            measure(model, groups(), requests, base="fp32", batch=1, length=4, repeats=2)


def test_the_timing_model_is_finite_and_in_base() -> None:
    """Random weights give finite logits in the base dtype, without a checkpoint."""
    model = timing_model(CONFIG, "bf16")
    out = model(torch.arange(12)[None]).logits
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())
    assert float(out.float().std()) > 0


def test_a_masked_language_model_is_timed_too() -> None:
    """BERT has no cache and no logits_to_keep to ask for; its random model runs and a linear of it is lowered."""
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    plan = {
        "bert.encoder.layer.0.attention.self.query": "int8",
        "bert.encoder.layer.0.attention.self.qk_matmul": "bf16",
    }
    frame = measure_ttft(
        timing_model(config, "fp32"), [plan], base="fp32", batch=1, length=8, repeats=2
    )
    assert float(frame["ttft_s"].item()) > 0


def compared(
    monkeypatch: pytest.MonkeyPatch,
    slowness: Callable[[int], float],
    gain_s: float = 0.02,
    also: bool = False,
    clock: Any = "wall",
) -> tuple[pl.DataFrame, int]:
    """A timing table on a machine that is `slowness(k)` times slower in its k-th block of one, and how many blocks it took."""
    made = 0

    def compared(
        base: Timed, configs: Sequence[Timed], repeats: int, seed: int, **how: Any
    ) -> list[Pairs]:
        nonlocal made
        slow = slowness(made)
        made += 1
        seconds = np.full(repeats, 0.1 * slow), np.full(repeats, (0.1 - gain_s) * slow)
        return [Pairs(*seconds, 0.0, Interval(0.0, 0.0, np.nan)) for _ in configs]

    timing = import_module("mpq.timing.session")
    monkeypatch.setattr(timing, "compare", compared)
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)
    monkeypatch.setattr(import_module("mpq.timing.measure")._Torch, "together", 1)
    every = [("o", [("bf16",), ("int8",), *([("bf16",)] if also else [])])]
    model = timing_model(CONFIG, "fp32")
    shape: dict[str, Any] = {"base": "fp32", "batch": 1, "length": 8}
    return measure(model, groups(), every, repeats=3, clock=clock, **shape), made


def test_a_busy_machine_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison while base is far slower than it was is made again; a machine that stays busy is asked TRIES times, no more."""
    frame, made = compared(monkeypatch, lambda k: 3.0 if k == 1 else 1.0)
    assert (frame["base_ttft_s"].to_list(), made) == ([0.1, 0.1], 3)
    frame, made = compared(monkeypatch, lambda k: 3.0 if k else 1.0)
    assert (sorted(frame["base_ttft_s"]), made) == (pytest.approx([0.1, 0.3]), 1 + TRIES)
    frame, made = compared(monkeypatch, lambda k: 3.0 if k else 1.0, also=True)
    assert made == 2 + TRIES, "what has been waited for in vain is the machine's speed"
    frame, made = compared(monkeypatch, lambda k: 1.0 + 0.01 * k)
    assert made == 2, "drift is no trouble: each block has its own base"
    frame, made = compared(monkeypatch, lambda k: 3.0 if k == 1 else 1.0, clock="cpu")
    assert made == 2, "CPU seconds do not count the waiting"


def test_what_is_no_gain_for_sure_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`significant` where the interval excludes zero; when each row was measured is in the table."""
    frame, _ = compared(monkeypatch, lambda k: 1.0)
    assert frame["significant"].to_list() == [True, True]
    assert frame.sort("order_measured")["measured_unix_s"].is_sorted()
    frame, _ = compared(monkeypatch, lambda k: 1.0, gain_s=0.0)
    assert frame["significant"].to_list() == [False, False]


def test_the_clock_and_its_threads_are_recorded() -> None:
    """By default one thread and its CPU seconds, told in the device's name; torch's threads are as before. Others as asked."""
    before = torch.get_num_threads()
    model = timing_model(CONFIG, "fp32")
    during: list[int] = []
    model.register_forward_pre_hook(lambda *_: during.append(torch.get_num_threads()))
    for asked, told in (
        ({}, ("cpu", 1)),
        ({"threads": 2}, ("wall", 2)),
        ({"threads": 1, "clock": "wall"}, ("wall", 1)),
    ):
        during.clear()
        how: dict[str, Any] = {"base": "fp32", "batch": 1, "length": 8, "repeats": 2, **asked}
        frame = measure(model, groups(), [("o", [("bf16",)])], **how)
        plan = measure_ttft(model, [{"lm_head": "bf16"}], **how)
        for row in (frame.row(0, named=True), plan.row(0, named=True)):
            assert (row["clock"], row["threads"]) == told
            assert f", {told[1]} thread" in row["device"]
        assert set(during) == {told[1]}
        assert torch.get_num_threads() == before
    with pytest.raises(MpqError, match="clock wall or auto, or threads 1"):
        measure(
            model, groups(), [], base="fp32", batch=1, length=8, repeats=2, threads=2, clock="cpu"
        )


def test_one_thread_does_all_the_work_that_its_clock_counts() -> None:
    """With one thread torch's and our own kernels run on the thread that asks: its CPU seconds are the whole process's."""
    model = timing_model(CONFIG, "fp32")
    plan = {
        f"model.layers.0.self_attn.{op}": "int8"
        for op in ("q_proj", *(("qk_matmul", "av_matmul") if int8_attention.available() else ()))
    }
    with clock_of("cpu").held():
        mixed = Mixed(model, base="fp32", backend="native")
        timed = Prefill(model, 8, 256, now=time.thread_time).ready(mixed, plan)
        every = time.process_time()
        own = sum(timed() for _ in range(20))
        every = time.process_time() - every
    mixed.clear()
    assert own > 0.7 * every


def test_tables_of_earlier_versions_are_read() -> None:
    """`measured` was the order, no repeats a prediction, and clocks were wall time's or a graph's events."""
    old = {c: v for c, v in SCHEMAS["timing"].items() if c not in ("predicted", "clock", "threads")}
    row = dict.fromkeys(old) | {"repeats": 0, "mode": "graph", "order_measured": 5}
    frame = pl.DataFrame([row, row | {"repeats": 7, "mode": "eager"}], schema=old)
    got = validate("timing", frame.rename({"order_measured": "measured"}))
    assert got.select("order_measured", "predicted", "clock", "threads").rows() == [
        (5, True, "events", None),
        (5, False, "wall", None),
    ]
    assert list(got.columns) == list(SCHEMAS["timing"])
