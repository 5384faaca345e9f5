"""The steps of the method one by one, each a table: formats, groups, sensitivity, times, the program's choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpq.cli.console import bar, emit, log, lowered_and_base, the_base, writable, write_frame
from mpq.cli.options import AsJson, Base, Device, Model, Out, Revision, Seed, Trusted
from mpq.errors import MpqError

if TYPE_CHECKING:
    import polars as pl

    from mpq.program.signed import SignedLoss, Terms

_SHOWN = ("name", "kind", "bits", "effective_bits", "block", "activations", "mac_time")
_FORMATS = "Formats to lower to, separated by commas (see `mpq formats`)"


def formats(json_: AsJson = False, out: Out = None) -> None:
    """List the formats: of weights bits, range and what shares a scale, of activations theirs, and a multiply-accumulate's time."""
    import polars as pl

    from mpq.formats.scheme import table_of_schemes

    rows = table_of_schemes()
    kept = rows if json_ or out else [{k: v for k, v in row.items() if k in _SHOWN} for row in rows]
    emit(pl.DataFrame(kept, infer_schema_length=None), json_, out, "formats")


def partition(
    model: Model,
    batch: Annotated[
        int, typer.Option(min=1, help="Rows of the prefill that MACs are counted for.")
    ] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 1024,
    revision: Revision = None,
    trusted: Trusted = False,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Cut the model into sequential groups of matrix products. Reads the configuration alone, no weights."""
    from mpq.cli import shown
    from mpq.method import groups_of
    from mpq.models.checkpoint import fetch, load_config

    with log.status("tracing"):
        frame = groups_of(load_config(fetch(model, revision, trusted), trusted), batch, length)
    emit(frame, json_, out, "groups", shown_as=shown.groups(frame))


def sensitivity(
    model: Model,
    calibration: Annotated[
        str,
        typer.Option(
            help="Text file, JSONL, .npy token array, fsspec URL, or a Hugging Face dataset id."
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Blocks of tokens to calibrate on.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Blocks per pass.")] = 8,
    formats: Annotated[str, typer.Option(help=_FORMATS + ".")] = "bf16,fp8_e4m3,int8",
    base: Base = "fp32",
    device: Device = "auto",
    seed: Seed = 0,
    field: Annotated[str, typer.Option(help="JSONL key or dataset column of the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute activations to save memory.")
    ] = False,
    base_term: Annotated[
        bool,
        typer.Option(
            help="Subtract the base format's own noise (--no-base-term: the paper's form)."
        ),
    ] = True,
    effects: Annotated[
        Path | None,
        typer.Option(
            callback=writable,
            help="Write the effects table to FILE as well, which `mpq solve --signed` needs.",
            metavar="FILE",
        ),
    ] = None,
    revision: Revision = None,
    trusted: Trusted = False,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Measure how much rounding each operand of each product would move the loss (nats²)."""
    names, base = lowered_and_base(formats, base)
    if effects and out and effects.resolve() == out.resolve():
        raise MpqError(
            f"--effects and --out both name {out}: one table would overwrite the other; give two files."
        )
    from mpq.cli import shown
    from mpq.devices import found_device
    from mpq.method import groups_of, losses_of, read_text
    from mpq.models.checkpoint import fetch, load_config
    from mpq.models.loading import load_model

    device, folder = found_device(device), fetch(model, revision, trusted)
    blocks = read_text(
        folder,
        calibration,
        samples=samples,
        length=length,
        batch=batch,
        seed=seed,
        field=field,
        split=split,
        trust_remote_code=trusted,
    )
    groups = groups_of(load_config(folder, trusted))
    with bar("sensitivity") as progress:
        found = losses_of(
            load_model(folder, base, device, trusted),
            groups,
            blocks,
            names,
            base,
            batch=batch,
            base_term=base_term,
            checkpoint_activations=checkpoint_activations,
            progress=progress,
        )
    if effects:
        write_frame(found.effects, effects)
    extra = {"loss": found.loss.row(0, named=True)} if json_ else None
    shown_as = shown.sensitivity(found.sensitivity, base)
    emit(found.sensitivity, json_, out, "sensitivity", extra, shown_as)


def time(
    model: Model,
    formats: Annotated[
        str | None, typer.Option(help=_FORMATS + "; all that the device runs natively if left out.")
    ] = None,
    base: Base = "fp32",
    device: Device = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the prefill.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 256,
    output: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of an answer. 1: time to first token; else the whole answer's counts.",
        ),
    ] = 1,
    repeats: Annotated[
        int, typer.Option(min=2, help="Interleaved pairs of base and configuration.")
    ] = 5,
    target: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Repeat until gains are known to ± this share of TTFT."),
    ] = None,
    cap: Annotated[
        int | None,
        typer.Option(min=2, help="Pairs at most: 2 × repeats, or 4 × with a target, if left out."),
    ] = None,
    method: Annotated[
        Literal["signature", "group"],
        typer.Option(
            help="signature: all groups of a signature at once; group: one group (the paper)."
        ),
    ] = "signature",
    limit: Annotated[
        int,
        typer.Option(
            min=8,
            help="Configurations of a signature to measure: all where it has no more, else each change of one op and random ones.",
        ),
    ] = 64,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of a CPU's kernels; 1 if left out."),
    ] = None,
    clock: Annotated[
        Literal["auto", "wall", "cpu"],
        typer.Option(help="auto: the CPU seconds of one thread; with several, and on a GPU, time."),
    ] = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Time the model's blocks through torch.compile, once for each configuration of a signature.",
        ),
    ] = False,
    seed: Seed = 0,
    revision: Revision = None,
    trusted: Trusted = False,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Measure the time to first token, or of whole answers, gained by each configuration of each group, on this device's native kernels."""
    names, base = lowered_and_base(formats, base) if formats is not None else ([], the_base(base))
    from mpq.cli import shown
    from mpq.devices import found_device
    from mpq.formats.scheme import get_scheme
    from mpq.kernels import check_native, native_formats
    from mpq.method import times_of
    from mpq.models.checkpoint import fetch, load_config

    device = found_device(device)
    if not names:
        # weights alone gain where tokens follow the first, beside BF16
        alone = output > 1 and base == "bf16"
        lower = (f for f in native_formats(device) if f not in ("fp32", base))
        names = [f for f in lower if alone or get_scheme(f).activations]
    check_native(names, device)
    config = load_config(fetch(model, revision, trusted), trusted)
    with bar("timing") as progress:
        frame = times_of(
            config,
            names,
            base,
            device,
            batch=batch,
            length=length,
            limit=limit,
            output=output,
            seed=seed,
            repeats=repeats,
            method=method,
            target=target or None,
            cap=cap,
            threads=threads,
            clock=clock,
            compiled=compile,
            progress=progress,
        )
    facts = {
        "device": frame["device"][0],
        "base TTFT (ms)": float(frame["base_ttft_s"].median()) * 1e3,  # type: ignore[arg-type]
    }
    emit(frame, json_, out, "timing", None if json_ else facts, shown.timing(frame, base))


def solve(
    gains: Annotated[
        str,
        typer.Option(
            help="A gains table: objective, group, configuration, gain, loss_mse or kl (.parquet, .json, .csv)."
        ),
    ],
    budget: Annotated[
        float,
        typer.Option(
            help="Bound on the plan's loss MSE, in the units of loss_mse (τ² E[g²]); with --cost kl on its KL."
        ),
    ],
    cost: Annotated[
        Literal["loss_mse", "kl"],
        typer.Option(help="Which column of the table the budget bounds."),
    ] = "loss_mse",
    solver: Annotated[
        Literal["auto", "highs", "gurobi"],
        typer.Option(help="auto: Gurobi where its licence serves, else HiGHS."),
    ] = "auto",
    objective: Annotated[
        str | None, typer.Option(help="Which objective, where the table holds several.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="Write the plan to FILE, as `mpq eval` reads it; needs --groups, --loss and --base.",
            metavar="FILE",
        ),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="The groups table that the gains are of (`mpq partition`).")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="The one-row table beside the sensitivities, for the plan's τ."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base format of the gains.")] = None,
    signed: Annotated[
        bool,
        typer.Option(
            "--signed",
            help="The budget bounds the loss MSE with the signs of weights' rounding, and the drift (docs/method.md); "
            "needs --groups, --base, --sensitivity and --effects.",
        ),
    ] = False,
    sensitivity: Annotated[
        str | None, typer.Option(help="With --signed: the sensitivity table.")
    ] = None,
    effects: Annotated[
        str | None,
        typer.Option(help="With --signed: the effects table (`mpq sensitivity --effects`)."),
    ] = None,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Choose one configuration for each group: the largest gain whose loss MSE, or KL, stays within the budget."""
    from dataclasses import asdict

    import polars as pl

    from mpq.cli.console import read_frame, write_file
    from mpq.program.gains import solve_table

    if plan and not (groups and loss and base):
        raise MpqError(
            "--plan needs --groups, --loss and --base: a plan names ops, its τ and what it leaves alone."
        )
    if not signed and (sensitivity or effects):
        raise MpqError(
            "--sensitivity and --effects are read with --signed alone: add it, or leave them out."
        )
    if signed and cost == "kl":
        raise MpqError("--signed is of the loss MSE, --cost kl of the KL: leave one of them out.")
    frame, signs, terms = read_frame(gains), None, None
    if objective:
        frame = frame.filter(pl.col("objective") == objective)
    if signed:
        signs, terms = _with_signs(frame, groups, base, sensitivity, effects)
    chosen, solution = solve_table(frame, {cost: budget}, solver, terms=terms)
    summary = {k: v for k, v in asdict(solution).items() if k != "chosen"}
    if plan and groups and loss and base:
        from mpq.method import plan_of

        of, drawn = read_frame(groups), read_frame(loss)
        made = plan_of(solution, of, frame, drawn, budget, the_base(base), cost, signs)
        write_file(plan, made.to_json().encode())
        summary["plan"] = str(plan)
    emit(chosen, json_, out, "chosen", {**summary, "budget": budget})


def _with_signs(
    gains: pl.DataFrame,
    groups: str | None,
    base: str | None,
    sensitivity: str | None,
    effects: str | None,
) -> tuple[SignedLoss, Terms]:
    """The loss MSE with rounding's signs, of plans and of the rows of a gains table; the tables are files."""
    if not (groups and base and sensitivity and effects):
        raise MpqError(
            "--signed needs --groups, --base, --sensitivity and --effects: the loss MSE with signs is computed from them."
        )
    from mpq.cli.console import read_frame
    from mpq.method import with_signs
    from mpq.program.gains import fitting
    from mpq.program.signed import choices_of
    from mpq.store.handed_in import handed_in

    of = handed_in("groups", read_frame(groups))
    gains = fitting(handed_in("gains", gains), of)
    found = with_signs(gains, read_frame(sensitivity), read_frame(effects), the_base(base))
    return found, found.terms(choices_of(of, gains))
