"""`mpq export`: a plan as a checkpoint that an engine serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpq.cli.console import bar, emit, log, plain
from mpq.cli.options import AsJson, Device, Trusted
from mpq.errors import MpqError, require

if TYPE_CHECKING:
    from mpq.models.blocks import Blocks
    from mpq.program.plan import Plan


def export(
    plan: Annotated[Path, typer.Argument(help="A plan's JSON, as `mpq run` writes it.")],
    out: Annotated[
        str,
        typer.Option(
            help="Folder or fsspec URL to write; it appears when it is whole.", metavar="FOLDER"
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="compressed-tensors: a checkpoint for vLLM and transformers; modelopt: one in NVIDIA's form; torchao: one for transformers; mxfp4: gpt-oss's own form, experts in MXFP4; neural-compressor: its settings for Gaudi, no weights; json: ops and formats."
        ),
    ] = "compressed-tensors",
    engine: Annotated[
        str | None,
        typer.Option(
            help="Whose fused layers must be in one format: vllm, sglang, tensorrt-llm; transformers, gaudi: none. The first reader of --to if left out.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint; the one that the plan was made for if left out."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text for the check; the run's own if left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Blocks of tokens to check on.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 128,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Reload the export in a fresh process, and compare it with mpq's own run.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in FOLDER.")
    ] = False,
    device: Device = "auto",
    trusted: Trusted = False,
    json_: AsJson = False,
) -> None:
    """Write a plan as a checkpoint that vLLM and transformers load, and check what they make of it.

    Cut off, the same command goes on where it was.
    """
    from mpq.cli.inventory import read_plan
    from mpq.spec.export import NEEDS

    chosen = read_plan(plan)
    revision = None if model else chosen.provenance.get("revision")
    model = model or chosen.origin("model")
    if not model:
        raise MpqError("The plan does not say which model it belongs to: give --model.")
    if check and to in NEEDS:
        require(NEEDS[to], "the check of an export (or give --no-check)")
    from mpq.devices import found_device
    from mpq.export import WITHOUT_WEIGHTS
    from mpq.export import export as exported
    from mpq.models.checkpoint import fetch

    loads = to not in WITHOUT_WEIGHTS
    device, folder = found_device(device), fetch(model, revision, trusted)
    blocks = _blocks(chosen, folder, text, samples, length, trusted) if check and loads else None
    with bar("export") as progress:
        made = exported(
            chosen,
            folder,
            out,
            to=to,
            engine=engine,
            check=blocks,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trusted,
            progress=progress,
        )
    import polars as pl

    rows = [
        *({"format": name, "ops": count} for name, count in made.formats.items()),
        {"format": f"{made.base} (base)", "ops": made.linears - sum(made.formats.values())},
    ]
    extra: dict[str, Any] = {"folder": made.folder, "to": made.to, "engine": made.engine}
    if loads:
        extra |= {"weight_bytes": made.weight_bytes, "base_weight_bytes": made.base_weight_bytes}
    found = dict(made.check)
    if made.caches:
        extra["caches"] = made.caches
    if made.serve:
        extra["serve"] = made.serve.replace("FOLDER", made.folder)
    if json_:
        extra["check"] = found
    elif found["done"]:
        extra |= {k: v for k, v in found.items() if k.startswith(("loss", "kl"))}
    emit(pl.DataFrame(rows), json_, None, "exported", extra)
    if not found["done"] and not json_:
        log.print("[yellow]not checked:[/]", plain(found["why"]), highlight=False)


def _blocks(
    plan: Plan, folder: Path, text: str | None, samples: int, length: int, trusted: bool
) -> Blocks:
    """Held-out text for the check: --text, or the run's own, read as the run read it."""
    from mpq.method import read_text

    own = {} if text else plan.provenance.get("text") or {}
    source = text or plan.origin("evaluation")
    if not source or source == "tasks":
        raise MpqError("The plan does not say which text to check on: give --text, or --no-check.")
    how = {**own, "samples": samples, "length": length}
    return read_text(folder, source, **how, trust_remote_code=trusted)
