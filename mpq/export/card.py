"""The model card of an exported checkpoint: what it is, what was predicted of it, what was found, how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mpq import __version__
from mpq.export.engines import ENGINES
from mpq.formats.scheme import get_scheme
from mpq.program.plan import Plan
from mpq.spec.export import NEEDS

_UNITS = {"et": "s per prefill", "tt": "BF16 MACs", "m": "bytes"}


def model_card(
    plan: Plan, lowered: Mapping[str, str], linears: int, engine: str, record: Mapping[str, Any]
) -> str:
    """README.md for the checkpoint, with the metadata that the Hugging Face hub reads in front."""
    of = str(plan.provenance.get("model") or "the checkpoint that the plan was made for")
    counts = Counter(lowered.values())
    held = (
        ", ".join(f"{n} of {linears} linears in {f}" for f, n in counts.items())
        or "no linear lowered"
    )
    rows = [
        ("lowered", held),
        *_caches(record),
        ("all else", plan.base),
        (
            "weights",
            f"{record['weight_bytes'] / 1e6:.1f} MB, in {plan.base} {record['base_weight_bytes'] / 1e6:.1f} MB",
        ),
        *_bounds(plan),
        ("predicted loss MSE", f"{plan.predicted_loss_mse:.3g} nats²"),
        ("predicted gain", f"{plan.predicted_gain:.4g} {_UNITS.get(plan.objective, '')}".strip()),
    ]
    if plan.predicted_ttft_s is not None and plan.base_ttft_s is not None:
        rows.append(
            (
                "predicted time to first token",
                f"{plan.predicted_ttft_s * 1e3:.1f} ms, base {plan.base_ttft_s * 1e3:.1f} ms (on the machine that the plan was made on)",
            )
        )
    if plan.predicted_tpot_s is not None and plan.base_tpot_s is not None:
        each = f"{plan.predicted_tpot_s * 1e3:.1f} ms, base {plan.base_tpot_s * 1e3:.1f} ms"
        rows.append(
            ("predicted time per further token", f"{each} (answers of {plan.output} tokens)")
        )
    found = record["check"]
    if found.get("done"):
        how = ", caches in base" if found["caches_unread"] else ""
        rows += [
            (
                f"loss on held-out text{how}",
                f"{found['loss_reloaded']:.4f} nats a token reloaded, {found['loss_plan']:.4f} in mpq, base {found['loss_base']:.4f}",
            ),
            (f"KL from base{how}", f"{found['kl_base_reloaded']:.3g} nats a token"),
        ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    named = [*counts, *(name for name in record["caches"] if name != "base")]
    schemes = "\n".join(f"- `{name}`: {get_scheme(name).in_words}" for name in named)
    fused = f"The checkpoint keeps to the fused layers of {engine}. " if ENGINES[engine] else ""
    served = ""
    if engine == "vllm":
        served = f"\n```console\n$ {record['serve']}\n```\n"
    elif engine == "transformers":
        needed = NEEDS.get(record["to"], "").replace("_", "-")
        where = f" where {needed} is installed" if needed else ""
        served = f"\n`AutoModelForCausalLM.from_pretrained(FOLDER)` loads it{where}.\n"
    made = {k: v for k, v in plan.provenance.items() if k not in ("model", "folder", "versions")}
    return f"""---
library_name: transformers
tags: [{record["to"]}, mpq]
---

# {of.rstrip("/").rpartition("/")[2]}, in mixed precision

Made by [mpq](https://arxiv.org/abs/2505.13060) {__version__} from {of} (fingerprint {plan.fingerprint[:16] or "not recorded"}):
plan `{plan.name}`, strategy {plan.strategy} for objective {plan.objective}.

| | |
|---|---|
{table}

Elements and what shares a scale, a row being an output channel of a weight or a token of activations:

{schemes or "- nothing is lowered"}

{fused}`export.json` has the check's numbers and the files' SHA-256.
{served}
## How it was made

{_lines({**made, "versions": plan.provenance.get("versions", {})}) or "The plan does not say."}
"""


def _bounds(plan: Plan) -> list[tuple[str, str]]:
    """What bounds the plan, and the KL that is predicted and was measured of it."""
    rows = []
    if plan.budget is not None:
        bound = f"{plan.budget:.3g} nats² (τ = {plan.tau:g})"
        rows.append(("bound on the loss MSE", bound))
    for what, kl in (
        ("bound on the KL divergence", plan.kl_bound),
        ("predicted KL divergence", plan.predicted_kl),
        ("KL divergence measured before delivery", plan.checked_kl),
    ):
        if kl is not None:
            rows.append((what, f"{kl:.3g} nats a token"))
    return rows


def _caches(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """In which layers the cache of keys and values is lowered; those in base have to be named to the server."""
    of = record["caches"]
    return [
        (
            "cache of keys and values",
            f"{len(of[name])} of {sum(map(len, of.values()))} layers in {name}",
        )
        for name in of
        if name != "base"
    ]


def _lines(of: Mapping[str, Any]) -> str:
    told = {k: v for k, v in of.items() if v not in (None, "", {}, [])}
    return "\n".join(f"- {name}: `{value}`" for name, value in told.items())
