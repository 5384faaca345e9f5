"""`mpq eval`: what a plan really does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpq.cli.console import bar, emit
from mpq.cli.options import AsJson, Device, Out, Trusted
from mpq.errors import MpqError

if TYPE_CHECKING:
    import polars as pl
    from torch import nn

    from mpq.program.plan import Plan

log = logging.getLogger("mpq")


def evaluate(
    plan: Annotated[Path, typer.Argument(help="A plan's JSON, as `mpq run` writes it.")],
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint; the one that the plan was made for if left out."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text; the run's own if left out.")
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="JSONL key or dataset column of the text; the run's own if left out."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Blocks of tokens to evaluate on.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Blocks per pass.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Perturbations of the scales.")] = 3,
    ttft_repeats: Annotated[
        int,
        typer.Option(
            min=0, help="Interleaved pairs for TTFT, at the run's prefill; 0 to leave it out."
        ),
    ] = 11,
    device: Device = "auto",
    trusted: Trusted = False,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Run a model under a plan, with real quantization: loss MSE, drift and perplexity against base, per seed.

    And TTFT beside base's, where the device has kernels for all of the plan's formats.
    """
    from mpq.cli.inventory import read_plan
    from mpq.spec import FROM_TASKS

    chosen = read_plan(plan)
    of = chosen.provenance
    # how the run read its own text, and which revision of its own model
    own = {} if text else of.get("text") or {}
    own |= {"field": field} if field else {}
    revision = None if model else of.get("revision")
    model, text = model or chosen.origin("model"), text or chosen.origin("evaluation")
    if not model or not text:
        raise MpqError(
            "The plan does not say which model and text it belongs to: give --model and --text."
        )
    if text == FROM_TASKS:
        raise MpqError("The plan's run was evaluated on documents of its tasks: give --text.")
    from mpq.devices import found_device
    from mpq.method import evaluate_plan, read_text
    from mpq.models.checkpoint import fetch, fingerprint, load_config
    from mpq.models.loading import load_model
    from mpq.models.placement import is_spread

    device, folder = found_device(device), fetch(model, revision, trusted)
    chosen.check_model(fingerprint(folder))
    blocks = read_text(
        folder,
        text,
        **{**own, "samples": samples, "length": length, "batch": batch},
        trust_remote_code=trusted,
    )
    loaded = load_model(folder, chosen.base, device, trusted)
    with bar("evaluation") as progress:
        frame = evaluate_plan(loaded, chosen, blocks, seeds, batch, progress)
    extra: dict[str, object] = {"predicted_loss_mse": chosen.predicted_loss_mse}
    if ttft_repeats and is_spread(loaded):
        log.warning("TTFT is left out: bringing weights that do not fit %s would be timed.", device)
    elif ttft_repeats:
        rows, tokens = of.get("prefill") or (4, 256)
        frame, native = _with_ttft(
            frame, loaded, load_config(folder, trusted), chosen, device, rows, tokens, ttft_repeats
        )
        extra |= native
    emit(frame, json_, out, "evaluation", extra)


def _with_ttft(
    frame: pl.DataFrame,
    model: nn.Module,
    config: Any,
    plan: Plan,
    device: str,
    batch: int,
    length: int,
    repeats: int,
) -> tuple[pl.DataFrame, Mapping[str, object]]:
    """The evaluation with TTFT (s) beside it, and what was predicted of that; as it is where the device lacks a kernel."""
    import polars as pl

    from mpq.kernels import runs_natively
    from mpq.running.apply import kind_of

    kinds = {op: kind_of(model, op) or "other" for op in plan.formats}
    if not runs_natively(plan.formats, kinds, plan.base, device):
        return frame, {}
    from mpq.method import groups_of
    from mpq.timing.measure import measure_ttft

    with bar("TTFT") as progress:
        seconds = measure_ttft(
            model,
            [plan.formats],
            base=plan.base,
            batch=batch,
            length=length,
            groups=groups_of(config, batch, length),
            repeats=repeats,
            progress=progress,
        )
    timed = {
        "seed": 0,
        "metric": "ttft_s",
        "value": seconds["ttft_s"][0],
        "base_value": seconds["base_ttft_s"][0],
    }
    return pl.concat([frame, pl.DataFrame([timed], schema=frame.schema)]), {
        "predicted_ttft_s": plan.predicted_ttft_s,
        "predicted_of_base_s": plan.base_ttft_s,
        "prefill": f"{batch} × {length} tokens",
    }
