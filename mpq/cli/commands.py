"""The command line: thin commands. Data goes to stdout, what happens on the way to stderr; a mistake exits with 2."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import polars as pl
import typer
from rich.markup import escape

from mpq import __version__
from mpq.cli import shown
from mpq.cli.console import (
    SUFFIXES,
    bar,
    emit,
    emit_results,
    log,
    lowered_and_base,
    report_file,
    writable,
    write_file,
    write_frame,
)
from mpq.cli.store import store_app
from mpq.errors import MpqError, is_out_of_memory
from mpq.spec import RunSpec

app = typer.Typer(
    name="mpq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose, layer by layer, the numerical format in which a language model runs: as fast (or as small) as possible "
    "while the error of its loss stays under a bound that you set. Start with `mpq run SPEC.yaml`.",
)
app.add_typer(store_app, name="store")

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, local folder or fsspec URL of a checkpoint in Hugging Face layout."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        callback=writable,
        help="Write the table to FILE: .parquet, .json or .csv.",
        metavar="FILE",
    ),
]
Base = Annotated[
    str,
    typer.Option(help="Format that the model runs in when nothing is lowered: fp32, bf16 or fp16."),
]
Formats = Annotated[
    str, typer.Option(help="Formats to lower to, separated by commas (see `mpq formats`).")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub id.")]


def main() -> None:
    """Run the CLI; a user's mistake is one sentence on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except MpqError as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(
            "There is not enough memory for that: lower the batch or the length (of a spec's text, of its timing)."
        )


def _fail(sentence: str) -> None:
    log.print(f"[bold red]Error:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    sys.exit(2)


def _version(show: bool) -> None:
    if show:
        print(f"mpq {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def formats(json_: AsJson = False, out: Out = None) -> None:
    """List the formats: bits, range, rounding noise, theoretical time of a multiply-accumulate."""
    from dataclasses import asdict

    from mpq.formats.format import FORMATS

    keep = ["name", "kind", "bits", "exponent_bits", "mantissa_bits", "maximum", "mac_time"]
    keep += ["source"] if json_ or out else []
    emit(
        pl.DataFrame([{k: asdict(f)[k] for k in keep} for f in FORMATS.values()]),
        json_,
        out,
        "formats",
    )


@app.command()
def partition(
    model: Model,
    batch: Annotated[
        int, typer.Option(min=1, help="Rows of the prefill that MACs are counted for.")
    ] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 1024,
    revision: Revision = None,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Cut the model into sequential groups of matrix products. Reads the configuration alone, no weights."""
    from mpq.models.checkpoint import fetch, load_config
    from mpq.models.graph import trace
    from mpq.models.partition import groups_table
    from mpq.models.partition import partition as partition_graph

    with log.status("tracing"):
        frame = groups_table(
            partition_graph(trace(load_config(fetch(model, revision)))), batch, length
        )
    emit(frame, json_, out, "groups", shown_as=shown.groups(frame))


@app.command()
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
    formats: Formats = "bf16,fp8_e4m3,int8",
    base: Base = "fp32",
    device: Device = "cpu",
    seed: int = 0,
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
    revision: Revision = None,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Measure how much rounding each operand of each product would move the loss (nats²)."""
    names, base = lowered_and_base(formats, base)
    from mpq.devices import check_device
    from mpq.models.checkpoint import fetch, load_config, load_model
    from mpq.models.text import read_blocks
    from mpq.spec import TextSpec

    check_device(device)
    folder = fetch(model, revision)
    config = load_config(folder)
    text = TextSpec(
        source=calibration,
        samples=samples,
        length=length,
        batch=batch,
        seed=seed,
        field=field,
        split=split,
    )
    blocks = read_blocks(text, folder, config.get_text_config().vocab_size)
    from mpq.loss.sensitivity import measure_sensitivity
    from mpq.models.graph import (
        trace,  # after what a mistake may be in: transformers takes seconds to load its models
    )
    from mpq.models.partition import partition as partition_graph

    ops = [
        (op.name, op.kind)
        for group in partition_graph(trace(config))
        for op in group.ops
        if op.kind != "other"
    ]
    with bar("sensitivity") as progress:
        frame, loss = measure_sensitivity(
            load_model(folder, base, device),
            ops,
            blocks,
            formats=names,
            base=base,
            batch=batch,
            base_term=base_term,
            checkpoint_activations=checkpoint_activations,
            progress=progress,
        )
    emit(
        frame,
        json_,
        out,
        "sensitivity",
        {"loss": loss.row(0, named=True)} if json_ else None,
        shown.sensitivity(frame, base),
    )


@app.command()
def time(
    model: Model,
    formats: Formats = "bf16,int8",
    base: Base = "fp32",
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the prefill.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 256,
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
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Time the model's blocks through torch.compile, once for each configuration of a signature.",
        ),
    ] = False,
    seed: int = 0,
    revision: Revision = None,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Measure the time to first token gained by each configuration of each group, on this device's native kernels."""
    names, base = lowered_and_base(formats, base)
    from mpq.kernels import check_native, native_formats
    from mpq.models.checkpoint import fetch, load_config
    from mpq.timing.design import choices_of, design

    check_native(names, device)
    config = load_config(fetch(model, revision))
    from mpq.models.graph import trace
    from mpq.models.partition import groups_table
    from mpq.models.partition import partition as partition_graph
    from mpq.timing.measure import measure, timing_model

    groups = groups_table(partition_graph(trace(config)), batch, length)
    native = {k: [f for f in names if f in native_formats(device, k)] for k in ("linear", "bgemm")}
    requests = []
    for (signature,), rows in groups.sort("order").group_by(["signature"], maintain_order=True):
        first = rows.filter(pl.col("group") == rows["group"].min())
        requests.append((signature, design(choices_of(first, native, base), limit, seed)))
    with bar("timing") as progress:
        frame = measure(
            timing_model(config, base).to(device),
            groups,
            requests,
            base=base,
            batch=batch,
            length=length,
            repeats=repeats,
            method=method,
            seed=seed,
            target=target or None,
            cap=cap,
            compiled=compile,
            progress=progress,
        )
    facts = {
        "device": frame["device"][0],
        "base TTFT (ms)": float(frame["base_ttft_s"].median()) * 1e3,  # type: ignore[arg-type]
    }
    emit(frame, json_, out, "timing", None if json_ else facts, shown.timing(frame, base))


@app.command()
def solve(
    gains: Annotated[
        str,
        typer.Option(
            help="A gains table: objective, group, configuration, gain, loss_mse (.parquet, .json, .csv)."
        ),
    ],
    budget: Annotated[
        float,
        typer.Option(help="Bound on the plan's loss MSE, in the units of loss_mse (τ² E[g²])."),
    ],
    solver: Annotated[
        Literal["auto", "highs", "gurobi"],
        typer.Option(help="auto: Gurobi where its licence serves, else HiGHS."),
    ] = "auto",
    objective: Annotated[
        str | None, typer.Option(help="Which objective, where the table holds several.")
    ] = None,
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Choose one configuration for each group: the largest gain whose loss MSE stays within the budget."""
    from dataclasses import asdict

    from mpq.cli.console import read_frame
    from mpq.program.gains import solve_table

    frame = read_frame(gains)
    if objective:
        frame = frame.filter(pl.col("objective") == objective)
    chosen, solution = solve_table(frame, budget, solver=solver)
    summary = {k: v for k, v in asdict(solution).items() if k != "chosen"}
    emit(chosen, json_, out, "chosen", {**summary, "budget": budget})


@app.command("eval")
def evaluate(
    plan: Annotated[Path, typer.Argument(help="A plan's JSON, as `mpq run` writes it.")],
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint; the one that the plan was made for if left out."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text; the run's own if left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1)] = 64,
    length: Annotated[int, typer.Option(min=2)] = 256,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Perturbations of the scales.")] = 3,
    ttft_repeats: Annotated[
        int,
        typer.Option(
            min=0, help="Interleaved pairs for TTFT, at the run's prefill; 0 to leave it out."
        ),
    ] = 11,
    device: Device = "cpu",
    json_: AsJson = False,
    out: Out = None,
) -> None:
    """Run a model under a plan, with real quantization: loss MSE, drift and perplexity against base, per seed.

    And TTFT beside base's, where the device has kernels for all of the plan's formats.
    """
    from mpq.program.plan import Plan

    try:
        chosen = Plan.from_json(plan.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MpqError(
            f"The plan {plan} cannot be read ({error}): expected the JSON that `mpq run` writes."
        ) from None
    model, text = (
        model or chosen.provenance.get("model"),
        text or chosen.provenance.get("evaluation"),
    )
    if not model or not text:
        raise MpqError(
            "The plan does not say which model and text it belongs to: give --model and --text."
        )
    from mpq.devices import check_device
    from mpq.models.checkpoint import fetch, fingerprint, load_config, load_model
    from mpq.models.text import read_blocks
    from mpq.spec import TextSpec

    check_device(device)
    folder = fetch(model)
    chosen.check_model(fingerprint(folder))
    config = load_config(folder)
    vocabulary = config.get_text_config().vocab_size
    blocks = read_blocks(
        TextSpec(source=text, samples=samples, length=length, batch=batch), folder, vocabulary
    )
    from mpq.evaluation.losses import evaluate_loss, losses
    from mpq.kernels import runs_natively

    loaded = load_model(folder, chosen.base, device)
    with bar("evaluation") as progress:
        base_losses = losses(loaded, blocks, batch)
        frame = evaluate_loss(
            loaded,
            chosen.formats,
            blocks,
            base_losses,
            base=chosen.base,
            seeds=range(seeds),
            batch=batch,
            progress=progress,
        )
    extra: dict[str, object] = {"predicted_loss_mse": chosen.predicted_loss_mse}
    kinds = {
        op: "bgemm" if op.endswith(("qk_matmul", "av_matmul")) else "linear"
        for op in chosen.formats
    }
    if ttft_repeats and runs_natively(chosen.formats, kinds, chosen.base, device):
        from mpq.models.graph import trace
        from mpq.models.partition import groups_table
        from mpq.models.partition import partition as partition_graph
        from mpq.timing.measure import measure_ttft

        rows, tokens = chosen.provenance.get("prefill") or (4, 256)
        groups = groups_table(partition_graph(trace(config)), rows, tokens)
        with bar("TTFT") as progress:
            seconds = measure_ttft(
                loaded,
                [chosen.formats],
                base=chosen.base,
                batch=rows,
                length=tokens,
                groups=groups,
                repeats=ttft_repeats,
                progress=progress,
            )
        timed = {
            "seed": 0,
            "metric": "ttft_s",
            "value": seconds["ttft_s"][0],
            "base_value": seconds["base_ttft_s"][0],
        }
        frame = pl.concat([frame, pl.DataFrame([timed], schema=frame.schema)])
        extra |= {
            "predicted_ttft_s": chosen.predicted_ttft_s,
            "predicted_of_base_s": chosen.base_ttft_s,
            "prefill": f"{rows} × {tokens} tokens",
        }
    emit(frame, json_, out, "evaluation", extra)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, as `mpq run` writes it (it holds run.json).")
    ],
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Write figures 1 to 9 (SVG, PNG) and Table 1 (CSV, Markdown) here as well.",
            metavar="FOLDER",
        ),
    ] = None,
    json_: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=report_file,
            help="Where to write: .html, .png (the frontier), or a table's .parquet, .json, .csv; RUN/report.html if left out.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Write the HTML report of a finished run again, from its tables alone."""
    from mpq.report.page import write_report
    from mpq.report.results import results_table
    from mpq.report.runs import read_run

    record, tables = read_run(run)
    if out and out.suffix in SUFFIXES:
        write_frame(results_table(tables), out)
    elif out and out.suffix == ".png":
        from mpq.report.figures import frontier_png

        write_file(out, frontier_png(tables))
    else:
        out = out or run / "report.html"
        write_file(out, write_report(tables, record["name"], record["facts"]).encode())
    extra: dict[str, object] = {"written": str(out)}
    if figures:
        from mpq.paper.figures import write_figures

        left_out = write_figures(tables, figures, record["facts"].get("base", ""))
        extra |= {"figures": str(figures), "left out": " ".join(left_out) or "nothing"}
    emit_results(results_table(tables), json_, None, extra)


@app.command()
def run(
    spec: Annotated[
        Path,
        typer.Argument(
            help="A run's YAML file: model, calibration, objectives, τ (see examples/demo.yaml)."
        ),
    ],
    store: Annotated[str | None, typer.Option(help="Another store than the spec's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable, help="Write the results table to FILE as well.", metavar="FILE"
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Do it all: a checkpoint in; plans, their evaluation and a report out. A second run re-uses what is done."""
    checked = _spec_for(spec, store)
    from mpq.flows.server import prefect_api

    with prefect_api(verbose) as ready:  # it starts while this imports torch
        from mpq.flows.terminal import run_in_terminal

        results, where = run_in_terminal(checked, log, ready)
        emit_results(results, json_, out, where)


@app.command()
def reproduce(
    spec: Annotated[
        Path,
        typer.Argument(
            help="The sweep's YAML file: as for run, with draws of random, seeds and tasks (see examples/reproduce.yaml)."
        ),
    ],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say how many evaluations are to do and about how long they take, and stop.",
        ),
    ] = False,
    store: Annotated[str | None, typer.Option(help="Another store than the spec's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable,
            help="Write Table 1 (with --dry-run: the forecast) to FILE as well.",
            metavar="FILE",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Repeat the paper's evaluation: every strategy, τ, seed and task; figures 1 to 9 and Table 1.

    Says beforehand what it costs. Cut off and started again it goes on where it was.
    """
    checked = _spec_for(spec, store)
    from mpq.flows.server import prefect_api

    with prefect_api(verbose) as ready:
        from mpq.flows.terminal import reproduce_in_terminal
        from mpq.report.accuracy import for_people

        frame, where = reproduce_in_terminal(checked, log, ready, dry_run)
        emit(
            frame,
            json_,
            out,
            "forecast" if dry_run else "table_1",
            where,
            None if dry_run else for_people(frame),
        )


def _spec_for(path: Path, store: str | None) -> RunSpec:
    """The checked spec, with another store where one is given."""
    from mpq.spec import load_spec, parse_spec

    checked = load_spec(path)
    return (
        parse_spec({**checked.model_dump(mode="json"), "store": store}, "--store")
        if store
        else checked
    )
