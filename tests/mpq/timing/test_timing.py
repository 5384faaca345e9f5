"""Statistics on synthetic timings, interleaving on a fake clock, and the table of a real small model (no wall times)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoConfig

from mpq.errors import MpqError
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill
from mpq.store.tables import SCHEMAS, table
from mpq.timing.machine import Interval, Reading
from mpq.timing.measure import TRIES, measure, measure_ttft, timing_model
from mpq.timing.pairs import Pairs, Timed, gain_statistics, interleave, undisturbed

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


CALM = Reading(ticks=0, stolen=0, waited_s=0.0, clock_mhz=np.nan)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes time: the fake machine's times are its own, whatever the real one is doing."""
    monkeypatch.setattr("mpq.timing.pairs.reading", lambda: CALM)


class Machine:
    """A fake machine: a forward takes base or configured seconds, times a drift, plus a spike now and then."""

    def __init__(self, base_s: float, config_s: float, drift: float = 0.0, spike_every: int = 0):
        self.seconds, self.drift, self.spike_every = (base_s, config_s), drift, spike_every
        self.order = list[int]()

    def run(self, which: int) -> float:
        assert not gc.isenabled()
        self.order.append(which)
        n = len(self.order)
        return self.seconds[which] * (1 + self.drift * n) + (
            100.0 if self.spike_every and n % self.spike_every == 0 else 0.0
        )

    @property
    def both(self) -> tuple[Timed, Timed]:
        """Base and configuration, as interleave takes them."""
        return partial(self.run, 0), partial(self.run, 1)


@pytest.mark.usefixtures("quiet")
def test_pairs_hold_one_of_each_in_random_order() -> None:
    """Every pair has a base and a configuration, both orders equally often, and the seed repeats them."""
    machines = [Machine(3.0, 2.0) for _ in range(2)]
    pairs = [interleave(*m.both, 20, seed=4) for m in machines]
    order = np.array(machines[0].order).reshape(20, 2)
    assert (order.sum(1) == 1).all()
    assert order[:, 0].sum() == 10
    assert len(set(order[::2, 0])) == 2
    assert machines[0].order == machines[1].order
    np.testing.assert_allclose(pairs[0].base_s, 3.0)
    np.testing.assert_allclose(pairs[0].config_s, 2.0)
    assert gc.isenabled()
    assert pairs[0].beside.steal_share == 0


@pytest.mark.usefixtures("quiet")
def test_drift_and_spikes_leave_the_gain() -> None:
    """With base and configuration equal, a machine that slows down threefold and stalls every seventh run shows no gain."""
    machine = Machine(1.0, 1.0, drift=0.05, spike_every=7)
    pairs = interleave(*machine.both, 21, seed=0)
    gain, low, high = gain_statistics(pairs.base_s, pairs.config_s)
    assert abs(gain) <= 0.06
    assert low <= 0 <= high
    machine = Machine(1.0, 0.5, drift=0.01, spike_every=7)
    pairs = interleave(*machine.both, 21, seed=0)
    gain, low, high = gain_statistics(pairs.base_s, pairs.config_s)
    assert 0.5 < gain < 0.72
    assert low > 0


@pytest.mark.usefixtures("quiet")
def test_a_target_stops_early_or_at_the_cap() -> None:
    """Steady timings stop at the repeats asked for; timings that never settle stop at the cap."""
    steady = Machine(1.0, 0.9)
    assert len(interleave(*steady.both, 5, target=0.01).base_s) == 5
    wild = Machine(1.0, 0.9, spike_every=3)
    pairs = interleave(*wild.both, 5, target=0.01, cap=12)
    assert len(pairs.base_s) + pairs.disturbed == 12


@pytest.mark.usefixtures("quiet")
def test_disturbed_pairs_are_measured_again() -> None:
    """A stall now and then is left out and made up for; a gain of half the time, on a drifting machine, is no disturbance."""
    machine = Machine(1.0, 0.5, drift=0.0005, spike_every=9)
    pairs = interleave(*machine.both, 15)
    assert len(pairs.base_s) == 15
    assert pairs.disturbed >= 2
    assert max(pairs.base_s.max(), pairs.config_s.max()) < 2
    steady = Machine(1.0, 0.5)
    assert interleave(*steady.both, 15).disturbed == 0


def test_what_the_machine_did_meanwhile_decides_which_pairs_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hypervisor that takes half the cores during the third pair: that pair, as fast as all others, is measured again."""
    steady, made = Machine(1.0, 0.5), iter(range(100))
    taken = [0, 0, 0, 50, *[50] * 96]  # after each pair, of 100 ticks a pair
    monkeypatch.setattr(
        "mpq.timing.pairs.reading", lambda: Reading(100 * (k := next(made)), taken[k], 0.0, np.nan)
    )
    pairs = interleave(*steady.both, 8)
    assert (pairs.disturbed, len(pairs.base_s), next(made)) == (1, 8, 1 + 9)
    assert pairs.beside.steal_share == pytest.approx(50 / 900)


def test_a_pair_beside_others_is_left_out_and_half_is_always_kept() -> None:
    """A pair during which the machine was not calm goes; where it never was, nothing does."""
    even, calm = np.ones(6), np.array([True, True, False, True, True, True])
    assert undisturbed(even, even, calm).tolist() == calm.tolist()
    assert undisturbed(even, even, np.zeros(6, dtype=bool)).all()


def test_gain_is_the_median_difference() -> None:
    """By hand: differences 1, 1, 9 have median 1; equal differences have an interval of no width."""
    assert gain_statistics(np.array([2.0, 3.0, 10.0]), np.array([1.0, 2.0, 1.0]))[0] == 1.0
    assert gain_statistics(np.full(7, 2.0), np.full(7, 1.5)) == (0.5, 0.5, 0.5)


def test_the_interval_covers_the_true_gain() -> None:
    """Over 300 synthetic measurements of 15 pairs, noisy and with spikes, the 95 % interval holds the truth 90 times in 100 or more."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        drift = np.linspace(0, 0.5, 15)
        base = (
            1.0
            + drift
            + rng.normal(0, 0.05, 15)
            + rng.exponential(1.0, 15) * (rng.random(15) < 0.1)
        )
        config = (
            0.8
            + drift
            + rng.normal(0, 0.05, 15)
            + rng.exponential(1.0, 15) * (rng.random(15) < 0.1)
        )
        _, low, high = gain_statistics(base, config, seed=trial)
        covered += low <= 0.2 <= high
    assert covered >= 270


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
    import mpq.timing.measure as timing

    class FakePrefill(Prefill):
        def ready(self, mixed: Mixed, formats: Mapping[str, str]) -> Timed:
            return lambda: 10.0 - len(formats)

    monkeypatch.setattr(timing, "Prefill", FakePrefill)
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
) -> tuple[pl.DataFrame, int]:
    """A timing table on a machine that is `slowness(k)` times slower in its k-th comparison, and how many it took."""
    made = 0

    def interleaved(base: Timed, config: Timed, repeats: int, seed: int, **how: Any) -> Pairs:
        nonlocal made
        slow = slowness(made)
        made += 1
        return Pairs(
            np.full(repeats, 0.1 * slow),
            np.full(repeats, (0.1 - gain_s) * slow),
            0.0,
            Interval(0.0, 0.0, np.nan),
        )

    monkeypatch.setattr("mpq.timing.measure.interleave", interleaved)
    monkeypatch.setattr("mpq.timing.measure.PAUSE_S", 0.0)
    every = [("o", [("bf16",), ("int8",), *([("bf16",)] if also else [])])]
    return measure(
        timing_model(CONFIG, "fp32"), groups(), every, base="fp32", batch=1, length=8, repeats=3
    ), made


def test_a_busy_machine_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison while base is far slower than it was is made again; a machine that stays busy is asked TRIES times, no more."""
    frame, made = compared(monkeypatch, lambda k: 3.0 if k == 1 else 1.0)
    assert (frame["base_ttft_s"].to_list(), made) == ([0.1, 0.1], 3)
    frame, made = compared(monkeypatch, lambda k: 3.0 if k else 1.0)
    assert (sorted(frame["base_ttft_s"]), made) == (pytest.approx([0.1, 0.3]), 1 + TRIES)
    frame, made = compared(monkeypatch, lambda k: 3.0 if k else 1.0, also=True)
    assert made == 2 + TRIES, "what has been waited for in vain is the machine's speed"
    frame, made = compared(monkeypatch, lambda k: 1.0 + 0.01 * k)
    assert made == 2, "drift is no trouble: each comparison has its own base"


def test_what_is_no_gain_for_sure_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`significant` where the interval excludes zero; when each row was measured is in the table."""
    frame, _ = compared(monkeypatch, lambda k: 1.0)
    assert frame["significant"].to_list() == [True, True]
    assert frame.sort("measured")["measured_unix_s"].is_sorted()
    frame, _ = compared(monkeypatch, lambda k: 1.0, gain_s=0.0)
    assert frame["significant"].to_list() == [False, False]
