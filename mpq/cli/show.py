"""`mpq show` and `mpq diff`: a plan on one screen, and what another one does differently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpq.cli.console import emit
from mpq.cli.options import AsJson
from mpq.errors import MpqError

if TYPE_CHECKING:
    from mpq.program.plan import Plan

# of each format, one to stand for it in a map of many layers; base is a dot
LETTERS = {
    "fp32": "F",
    "bf16": "B",
    "fp16": "H",
    "fp8_e4m3": "8",
    "fp8_e5m2": "5",
    "int8": "I",
    "fp8_kv": "K",
}
_File = Annotated[
    Path, typer.Argument(help="A plan's JSON, as `mpq run` and `mpq solve` write it.")
]
_UNITS = {"et": ("ms", 1e3), "tt": ("BF16 MACs", 1.0), "m": ("bytes", 1.0)}


def show(plan: _File, json_: AsJson = False) -> None:
    """Show a plan: formats by role and layer, what it gains and costs, and the price of each constraint."""
    import polars as pl

    from mpq.cli.inventory import read_plan

    chosen = read_plan(plan)
    prices = chosen.provenance.get("prices") or []
    rows = [{"role": role, "layers": line} for role, line in map_of(chosen).items()]
    facts = _facts(chosen)
    if json_:
        whole = {**facts, "formats": chosen.formats, "map": rows, "prices": prices}
        print(json.dumps(whole, indent=1))
        return
    known = {**{name: letter for letter, name in _letters(chosen).items()}, chosen.base: "·"}
    told = {name: value for name, value in facts.items() if value is not None}
    legend = {"formats": ", ".join(f"{letter} {name}" for name, letter in known.items())}
    emit(pl.DataFrame(rows), False, None, chosen.name, legend | told)
    if prices:
        unit, factor = _UNITS.get(chosen.objective, ("", 1.0))
        costs = {"kl_without": "KL without", "loss_mse_without": "loss MSE without"}
        priced = [c for c in costs if any(price.get(c) is not None for price in prices)]
        table = pl.DataFrame(prices).select(
            "constraint",
            (pl.col("gain_without") * factor).alias(f"gain without, {unit}"),
            *(pl.col(c).alias(costs[c]) for c in priced),
        )
        emit(table, False, None, "price of each constraint")


def diff(before: _File, after: _File, json_: AsJson = False) -> None:
    """Show which ops two plans put in different formats, and what that does to gain, loss and size."""
    import polars as pl

    from mpq.cli.inventory import read_plan
    from mpq.program.changes import moves

    old, new = read_plan(before), read_plan(after)
    if old.formats and new.formats and not set(old.formats) & set(new.formats):
        raise MpqError(
            f"{before} and {after} have no op in common: expected two plans of one architecture."
        )
    moved = [{"op": op, "before": was, "after": now} for op, (was, now) in moves(old, new).items()]
    one, other = _facts(old), _facts(new)
    facts: dict[str, Any] = {"ops moved": len(moved)}
    for name in dict.fromkeys((*one, *other)):
        was, now = one.get(name), other.get(name)
        if json_ or (was != now and not (was is None and now is None)):
            facts[name] = [was, now] if json_ else f"{_said(was)} → {_said(now)}"
    schema = {"op": pl.String, "before": pl.String, "after": pl.String}
    emit(pl.DataFrame(moved, schema=schema), json_, None, "moved", facts)


def map_of(plan: Plan) -> dict[str, str]:
    """Role → a letter for each layer in order, a dot for base, a blank where a layer has no such op (hybrid models); an op
    outside the layers is a role of its own."""
    letters = {name: letter for letter, name in _letters(plan).items()}
    roles: dict[str, dict[int, str]] = {}
    for op, name in plan.formats.items():
        found = re.search(r"(?:^|\.)(\d+)\.", op)
        layer, role = (int(found[1]), op[found.end() :]) if found else (0, op)
        roles.setdefault(role, {})[layer] = letters.get(name, "·")
    return {
        role: "".join(of.get(layer, " ") for layer in range(max(of) + 1))
        for role, of in roles.items()
    }


def _letters(plan: Plan) -> dict[str, str]:
    """Letter → format, for what the plan lowers to; a format without one of its own gets a free one."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(plan.lowered.values()):
        free = (c for c in (LETTERS.get(name, name[0].upper()), *"ABCDEGJKLMN") if c not in found)
        found[next(free)] = name
    return found


def _facts(plan: Plan) -> dict[str, Any]:
    """What is told of a plan, units in the names; None where it does not say."""
    from mpq.program.plan import stored_in_words
    from mpq.timing.plausible import TPOT, implausible

    of = plan.formats.values(), plan.base
    doubts = (
        implausible(plan.predicted_ttft_s, plan.base_ttft_s, *of),
        implausible(plan.predicted_tpot_s, plan.base_tpot_s, *of, TPOT),
    )
    unit, factor = _UNITS.get(plan.objective, ("", 1.0))
    error = plan.predicted_gain_error
    return {
        "objective": plan.objective,
        "strategy": plan.strategy,
        "engine": plan.engine,
        "tau": plan.tau if plan.budget is not None else None,
        f"predicted gain, {unit}": plan.predicted_gain * factor,
        "± half its 95 % interval": None if error is None else error * factor,
        "predicted KL, nats per token": plan.predicted_kl,
        "± of KL": plan.predicted_kl_error,
        "KL bound": plan.kl_bound,
        "KL measured before delivery": plan.checked_kl,
        "± as measured": plan.checked_kl_error,
        "predicted loss change over many texts, nats": plan.predicted_loss_change,
        "predicted loss MSE, nats²": plan.predicted_loss_mse,
        "± of loss MSE": plan.predicted_loss_mse_error,
        "predicted loss MSE with signs and drift, nats²": plan.predicted_signed_mse,
        "what τ bounds": "loss MSE with signs and drift" if plan.signed else None,
        "budget, nats²": plan.budget,
        "chance that a bound is broken": plan.risk,
        "predicted TTFT, ms": _ms(plan.predicted_ttft_s),
        "base TTFT, ms": _ms(plan.base_ttft_s),
        "tokens of an answer, whose time is gained": plan.output if plan.output > 1 else None,
        "predicted time per further token, ms": _ms(plan.predicted_tpot_s),
        "base time per further token, ms": _ms(plan.base_tpot_s),
        "to doubt": " ".join(filter(None, doubts)) or None,
        "ops lowered, %": 100 * plan.share_lowered,
        "effective bits": plan.effective_bits,
        "weight bytes": plan.weight_bytes,
        "cache bytes": plan.cache_bytes,
        "cache bytes in base": plan.base_cache_bytes,
        "stored quantized": stored_in_words(plan.provenance.get("stored") or {}) or None,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _said(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
