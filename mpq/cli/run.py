"""The whole pipeline from a spec, the paper's evaluation from one, and the report of what either left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpq.cli.console import (
    SUFFIXES,
    emit,
    emit_results,
    log,
    report_file,
    writable,
    write_file,
    write_frame,
)
from mpq.cli.options import AsJson, Store, Verbose
from mpq.errors import MpqError, require

if TYPE_CHECKING:
    from mpq.report.beside import Beside
    from mpq.report.results import Tables
    from mpq.spec import RunSpec


def run(
    spec: Annotated[
        Path,
        typer.Argument(
            help="A run's YAML file: model, calibration, objectives, τ (`mpq init` writes one; docs/spec.md has every key)."
        ),
    ],
    store: Store = None,
    check_weights: Annotated[
        bool,
        typer.Option(
            "--check-weights", help="Read all weights to hash them, whatever is known of them."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable, help="Write the results table to FILE as well.", metavar="FILE"
        ),
    ] = None,
    verbose: Verbose = False,
    json_: AsJson = False,
) -> None:
    """Do it all: a checkpoint in; plans, their evaluation and a report out. A second run re-uses what is done."""
    checked = _checked(spec, store)
    if check_weights:
        model = checked.model.model_copy(update={"check_weights": True})
        checked = checked.model_copy(update={"model": model})
    from mpq.flows.server import prefect_api

    with prefect_api(verbose) as ready:  # it starts while this imports torch
        checked = _placed(checked)
        from mpq.flows.terminal import run_in_terminal

        results, where = run_in_terminal(checked, log, ready)
        emit_results(results, json_, out, where)


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
    store: Store = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable,
            help="Write Table 1 (with --dry-run: the forecast) to FILE as well.",
            metavar="FILE",
        ),
    ] = None,
    verbose: Verbose = False,
    json_: AsJson = False,
) -> None:
    """Repeat the paper's evaluation: every strategy, τ, seed and task; figures 1 to 9 and Table 1.

    Says beforehand what it costs. Cut off and started again it goes on where it was.
    """
    checked = _checked(spec, store)
    from mpq.flows.server import prefect_api

    with prefect_api(verbose) as ready:
        checked = _placed(checked)
        from mpq.flows.terminal import reproduce_in_terminal
        from mpq.paper.table_1 import for_people

        frame, where = reproduce_in_terminal(checked, log, ready, dry_run)
        title, shown = ("forecast", None) if dry_run else ("table_1", for_people(frame))
        emit(frame, json_, out, title, where, shown)


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
    beside: Annotated[
        str | None,
        typer.Option(
            help="A table of other tools' plans of this checkpoint, to be drawn beside the run's: tool, kl, and weight_bytes, "
            "effective_bits or bits (docs/peers.md).",
            metavar="FILE",
        ),
    ] = None,
    json_: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=report_file,
            help="Where to write: .html, .png (the frontier, or the picture of --beside), or a table's .parquet, .json, .csv; RUN/report.html if left out.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Write the HTML report of a finished run again, from its tables alone."""
    from mpq.report.results import results_table
    from mpq.report.runs import read_run

    if beside and out and out.suffix in SUFFIXES:
        raise MpqError(f"--beside is drawn, --out {out} a table: give .html or .png.")
    record, tables = read_run(run)
    others = _others(beside, tables, record["facts"]) if beside else None
    if out and out.suffix in SUFFIXES:
        write_frame(results_table(tables), out)
    elif out and out.suffix == ".png" and others:
        from mpq.report.beside_figure import beside_others
        from mpq.report.style import to_png

        write_file(out, to_png(beside_others(others)))
    elif out and out.suffix == ".png":
        from mpq.report.figures import frontier_png

        write_file(out, frontier_png(tables))
    else:
        from mpq.report.page import write_report

        out = out or run / "report.html"
        appendix = None
        if record["facts"].get("appendix") == "paper":  # a run of `mpq reproduce`
            from mpq.paper.page import appendix as of_paper

            appendix = of_paper(tables, record["facts"].get("base", ""))
        page = write_report(tables, record["name"], record["facts"], appendix, others)
        write_file(out, page.encode())
    extra: dict[str, object] = {"written": str(out)}
    if figures:
        from mpq.paper.figures import write_figures

        left_out = write_figures(tables, figures, record["facts"].get("base", ""))
        extra |= {"figures": str(figures), "left out": " ".join(left_out) or "nothing"}
    emit_results(results_table(tables), json_, None, extra)


def _others(file: str, tables: Tables, facts: Mapping[str, str]) -> Beside:
    """The plans of other tools in a file, beside the run's."""
    from mpq.cli.console import read_frame
    from mpq.report.beside import beside

    return beside(read_frame(file), file, tables, facts)


def _checked(path: Path, store: str | None) -> RunSpec:
    """The spec, with another store where one is given."""
    from mpq.spec import check_early, load_spec, parse_spec

    spec = load_spec(path)
    if store:
        spec = parse_spec({**spec.model_dump(mode="json"), "store": store}, "--store")
    check_early(spec)
    require("prefect", "mpq run")
    require("matplotlib", "a run's report")
    return spec


def _placed(spec: RunSpec) -> RunSpec:
    """The spec on the device that it will run on: asking for one takes torch."""
    from mpq.spec import resolved

    return resolved(spec) if spec.runner.kind == "local" else spec
