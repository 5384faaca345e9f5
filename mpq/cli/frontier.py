"""`mpq frontier`: every Pareto-optimal plan of a finished run, and any of them as a plan."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Literal

import typer

from mpq.cli.console import SUFFIXES, emit, write_file, write_frame
from mpq.cli.options import AsJson
from mpq.errors import MpqError


def frontier(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, as `mpq run` writes it (it holds run.json).")
    ],
    objective: Annotated[
        Literal["et", "tt", "m"] | None,
        typer.Option(help="What is gained; the run's first objective if left out."),
    ] = None,
    cost: Annotated[
        Literal["kl", "loss_mse"] | None,
        typer.Option(help="Against what; KL where the run has it, else the loss MSE."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, max=100_000, help="Plans at most.")] = 200,
    plan: Annotated[
        int | None, typer.Option(help="Write this point's plan to --out, as `mpq eval` reads it.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the frontier: .png or .svg.", metavar="FILE")
    ] = None,
    json_: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write the table to FILE (.parquet, .json, .csv), or with --plan the plan.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Show every Pareto-optimal plan of a run, each with what one more op would cost; or write one of them."""
    import polars as pl

    from mpq.cli.inventory import read_plan
    from mpq.report.pareto import pareto_of, plan_at, table_of_points
    from mpq.report.results import OBJECTIVES, base_of, table_of
    from mpq.report.runs import bounds_of, read_run
    from mpq.store.handed_in import handed_in

    if plan is not None and (out is None or out.suffix != ".json"):
        raise MpqError("--plan needs --out FILE.json: where the plan shall go.")
    if plan is None and out is not None and out.suffix not in SUFFIXES:
        raise MpqError(f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)}.")
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise MpqError(f"--picture {picture}: expected a name that ends in .png or .svg.")
    record, tables = read_run(run)
    facts = record["facts"]
    bounds = bounds_of(facts)
    found = pareto_of(
        tables,
        base_of(tables, facts),
        objective=objective,
        cost=cost,
        points=points,
        bounds=bounds,
    )
    frame = table_of_points(found)
    extra: dict[str, object] = {"objective": found.objective, "cost": found.cost}
    extra |= {"KL scale": found.scale.value} if found.cost == "kl" else {}
    if picture:
        from mpq.report.pareto_figure import picture as drawn

        stream = io.BytesIO()
        drawn(found).savefig(stream, format=picture.suffix[1:], dpi=150)
        write_file(picture, stream.getvalue())
        extra["picture"] = str(picture)
    if plan is not None and out:
        folder = (run if run.is_dir() else run.parent) / "plans"
        plans = [read_plan(file) for file in sorted(folder.glob(f"{found.objective}-*.json"))]
        like = min(plans, key=lambda p: p.kl_scale, default=None)  # the scale of results.scale_of
        loss = float(handed_in("loss", table_of(tables, "loss"))["mean_square_loss"][0])
        made = plan_at(found, plan, loss, like)
        write_file(out, made.to_json().encode())
        extra["plan"] = str(out)
    elif out:
        write_frame(frame, out)
    unit = OBJECTIVES[found.objective]
    shown = frame.select(
        "point",
        (pl.col("gain") * unit.scale).round_sig_figs(5).alias(unit.unit),
        pl.col(found.cost).round_sig_figs(3).alias("KL" if found.cost == "kl" else "loss MSE"),
        pl.when("certified").then(pl.lit("yes")).otherwise(pl.lit("–")).alias("optimal"),
        pl.col("ops_lowered").alias("ops"),
        pl.col("next").alias("one more op"),
        pl.col("next_cost").round_sig_figs(2).alias("costs"),
    )
    emit(frame, json_, None, "frontier", extra, shown)
