"""`mpq store`: what a store holds, where a plan came from, whether all is whole, and what may go."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mpq.cli.console import emit, log, plain
from mpq.cli.options import AsJson
from mpq.errors import MpqError
from mpq.redaction import printable

if TYPE_CHECKING:
    import polars as pl
    from rich.tree import Tree

store_app = typer.Typer(
    no_args_is_help=True,
    help="Look after a store: list it, follow a plan back to its inputs, check every hash, remove what nothing needs.",
)

Url = Annotated[
    str,
    typer.Argument(
        help="A store: an fsspec URL or a local folder, as the `store` of a spec.", metavar="URL"
    ),
]
Urls = Annotated[
    list[str],
    typer.Argument(
        help="Stores: fsspec URLs or local folders, as the `store` of a spec.", metavar="URL..."
    ),
]
Runs = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of runs, as the `out` of a spec (more than once for more; default .work/runs)."
    ),
]

_RUNS = Path(".work/runs")


@store_app.command()
def ls(urls: Urls, runs: Runs = None, json_: AsJson = False) -> None:
    """List the tables of stores, and the runs with how many of their tables the stores hold."""
    from mpq.cli.inventory import entries
    from mpq.store.entries import Store

    tables: list[dict[str, Any]] = []
    for url in urls:
        with log.status(plain(f"listing {url}")):
            tables += [{"store": url, **entry.row()} for entry in entries(Store(url))]
    held = {(row["kind"], row["key"]) for row in tables}
    found = [
        {
            "run": run.name,
            "folder": str(run.folder),
            "model": run.model,
            "plans": len(run.plans),
            "tables": len(run.tables),
            "tables_here": sum((ref.kind, ref.key) in held for ref in run.tables),
        }
        for run in _runs(runs)
    ]
    if json_:
        print(json.dumps({"runs": found, "tables": tables}, indent=1))
        return
    if found:
        emit(_frame(found), False, None, "runs")
    emit(_frame([_short(row, many=len(urls) > 1) for row in tables]), False, None, "tables")


@store_app.command()
def show(
    url: Url,
    what: Annotated[
        str,
        typer.Argument(
            help="A plan's JSON file, or a table's key or its beginning (see `mpq store ls`)."
        ),
    ],
    json_: AsJson = False,
) -> None:
    """Follow a plan or a table back to the inputs it was computed from."""
    from mpq.cli.inventory import by_key, entries, find_key, plan_keys, read_plan, trace_back
    from mpq.store.entries import Store

    with log.status(plain(f"listing {url}")):
        held = by_key(entries(Store(url)))
    if what.endswith(".json") or Path(what).is_file():
        plan, shown = read_plan(Path(what)), set[str]()
        keys = plan_keys(Path(what)).items()
        steps = [(name, trace_back(key, held, shown)) for key, name in keys]
        model = f"{plan.provenance.get('model', 'a model')} ({plan.fingerprint[:12]})"
        title = f"{plan.strategy} for {plan.objective}, τ={plan.tau:g}, of {model}"
        about = {
            "plan": what,
            "strategy": plan.strategy,
            "objective": plan.objective,
            "tau": plan.tau,
            "fingerprint": plan.fingerprint,
        }
    else:
        steps, about = [("", trace_back(find_key(what, held), held))], {}
        title = url
    if json_:
        came_from = [{"name": name, **step.as_json()} for name, step in steps]
        print(json.dumps({**about, "store": url, "came_from": came_from}, indent=1))
        return
    from rich.tree import Tree

    tree = Tree(plain(title), highlight=False)
    for name, step in steps:
        _grow(tree, step, name)
    Console().print(tree)


@store_app.command()
def verify(urls: Urls, json_: AsJson = False) -> None:
    """Read every table and check its hash. Exits with 2 and names what is damaged, if anything is."""
    from mpq.cli.inventory import verify as verify_store
    from mpq.store.entries import Store

    rows: list[dict[str, Any]] = []
    for url in urls:
        with log.status(plain(f"reading {url}")):
            rows += [{"store": url, **entry.row()} for entry in verify_store(Store(url))]
    counts = {
        state: sum(r["state"] == state for r in rows)
        for state in ("whole", "damaged", "unfinished")
    }
    damaged = [r for r in rows if r["state"] == "damaged"]
    if json_:
        print(json.dumps({**counts, "tables": rows}, indent=1))
    else:
        wrong = [
            {"kind": r["kind"], "key": r["key"], "state": r["state"], "what": r["damage"]}
            for r in rows
            if r["state"] != "whole"
        ]
        if wrong:
            emit(_frame(wrong), False, None, "not whole")
        Console().print(", ".join(f"{n} {state}" for state, n in counts.items()), highlight=False)
    if damaged:
        named = ", ".join(f"{r['kind']}/{r['key']}" for r in damaged[:20])
        more = f" and {len(damaged) - 20} more" if len(damaged) > 20 else ""
        raise MpqError(
            f"Damaged: {named}{more}; run their specs again, which computes them anew, or copy them from elsewhere."
        )


@store_app.command()
def gc(
    urls: Urls,
    runs: Runs = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="A plan to keep besides those of the runs (more than once for more)."),
    ] = None,
    older_than: Annotated[
        float,
        typer.Option(
            min=0,
            help="Hours; what was written or used since stays, a run under way has no record yet.",
        ),
    ] = 24.0,
    delete: Annotated[
        bool, typer.Option("--delete", help="Do it; without it this is a dry run.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Remove what no kept run or plan needs: a dry run, unless --delete is given.

    Kept are the tables of every run under --runs, of the plans beside it and of every --plan, with all that they came from.
    """
    from dataclasses import asdict

    from mpq.cli.inventory import entries, plan_keys, remove, unneeded
    from mpq.store.entries import Store

    kept = [key for run in _runs(runs) for key in run.keys]
    kept += [key for path in plan or () for key in plan_keys(path)]
    if not kept:
        raise MpqError(
            "There is no run or plan to keep, so everything would go: give --runs with the folder of runs, or --plan."
        )
    rows: list[dict[str, Any]] = []
    absent: set[str] | None = None
    for url in urls:
        store = Store(url)
        with log.status(plain(f"listing {url}")):
            before = store.now() - older_than * 3600
            waste, missing = unneeded(store, entries(store), kept, before)
        absent = set(missing) if absent is None else absent & set(missing)
        if delete:
            waste = remove(store, waste, before)
        rows += [{"store": url, **asdict(item)} for item in waste]
    summary: dict[str, Any] = {
        "deleted": delete,
        "files": len(rows),
        "bytes": sum(r["bytes"] for r in rows),
        "missing": sorted(absent or ()),
    }
    if json_:
        print(json.dumps({**summary, "waste": rows}, indent=1))
        return
    if rows:
        shown = _frame(rows) if len(urls) > 1 else _frame(rows).drop("store")
        emit(shown, False, None, "not needed")
    done = "removed" if delete else "would be removed (a dry run: --delete does it)"
    Console().print(f"{summary['files']} files, {_size(summary['bytes'])} {done}", highlight=False)
    if absent:
        log.print(
            f"{len(absent)} tables that are kept are in none of the stores: `mpq run` computes them again",
            highlight=False,
        )


def _runs(folders: list[Path] | None) -> list[Any]:
    from mpq.cli.inventory import runs

    given = folders or ([_RUNS] if _RUNS.is_dir() else [])
    return [run for folder in given for run in runs(folder)]


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(rows, infer_schema_length=None)


def _short(row: dict[str, Any], many: bool) -> dict[str, Any]:
    """A listing's row for people: the beginning of the key, times as dates, the store where there are several."""
    return {
        **({"store": row["store"]} if many else {}),
        "kind": row["kind"],
        "key": row["key"][:12],
        "rows": row["rows"],
        "size": _size(row["bytes"]),
        "written": _date(row["written_unix_s"]),
        "stage": row["stage"],
        "state": row["damage"] or row["state"],
    }


def _grow(tree: Tree, step: Any, name: str = "") -> None:
    """Add a step of the way back, and all behind it, to a tree."""
    parts = [Text.assemble((printable(name), "bold"), ":")] if name else []
    if step.entries:
        kinds = plain(", ".join(e.kind for e in step.entries))
        kinds.stylize("" if name else "bold")
        row = step.entries[0].row()
        size = _size(sum(e.bytes for e in step.entries))
        told = [row["stage"], size, row["host"], _date(row["written_unix_s"])]
        made = plain(", ".join(str(t) for t in told if t))
        made.stylize("dim")
        parts += [kinds, Text(step.key[:12]), made]
        parts += [Text(str(plain(e.damage)), "red") for e in step.entries if e.damage]
    else:
        parts += [Text("not in this store", "red"), Text(step.key[:12])]
    if step.shown_above:
        parts.append(Text("(above)"))
    branch = tree.add(Text(" ").join(parts))
    for behind in step.came_from:
        _grow(branch, behind)


def _date(unix_s: float | None) -> str | None:
    return datetime.fromtimestamp(unix_s).isoformat(" ", "minutes") if unix_s else None


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
