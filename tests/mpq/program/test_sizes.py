"""Models of the largest sizes: ten thousand groups, and 94 layers of 128 experts each, from tables to a plan and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import make_groups, make_run

from mpq.loss.unseen import tokens_of, with_tokens
from mpq.method import gains_of
from mpq.program.plan import Plan
from mpq.program.strategies import choose
from mpq.store.entries import Store
from mpq.store.tables import table

_LOSSES = (("fp8_e4m3", 1e-11), ("int8", 0.6e-11))  # nats² of an op, times its own factor


def test_ten_thousand_groups_are_solved_and_stored(tmp_path: Path) -> None:
    """The plan of 22,501 ops keeps its bound, worked out from the sensitivities, and the store gives back what it took."""
    groups = make_groups(2500)
    ops = groups["op"].to_list()
    loss = {(op, f): (1 + i % 97) * scale for i, op in enumerate(ops) for f, scale in _LOSSES}
    rows = [
        {
            "op": op,
            "operand": "input",
            "format": f,
            "noise_model": "actual",
            "n_samples": 1,
            "loss_mse": value,
            "sensitivity": 1.0,
        }
        for (op, f), value in loss.items()
    ]
    gains = gains_of("m", groups, table("sensitivity", rows), ["fp8_e4m3", "int8"], "bf16")
    plan, facts = choose("ip_m", "m", groups, gains, tau=1e-3, mean_square_loss=1.0, base="bf16")
    predicted = sum(loss.get((op, f), 0.0) for op, f in plan.formats.items())
    assert predicted == pytest.approx(facts["predicted_loss_mse"])
    assert 0.99e-6 < predicted <= 1e-6
    assert Plan.from_json(plan.to_json()).formats == plan.formats
    store = Store(tmp_path.as_uri())
    ref = store.write_table("gains", "0" * 64, gains)
    assert store.read_table(ref).equals(gains)


def test_tokens_of_every_expert_are_kept(tmp_path: Path) -> None:
    """94 layers × 128 experts: the store gives back how many tokens each expert of each op got."""
    sensitivity = make_run(layers=94, seeds=1)["sensitivity"].head(3000)
    names = sensitivity["op"].unique(maintain_order=True)
    tokens = {op: [(i * 7 + e) % 11 for e in range(128)] for i, op in enumerate(names)}
    whole = with_tokens(sensitivity, tokens)
    store = Store(tmp_path.as_uri())
    again = store.read_table(store.write_table("sensitivity", "1" * 64, whole))
    assert tokens_of(again) == tokens
