"""How commands speak: tables for people or as JSON, files by suffix, progress on stderr."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from mpq.documents import parse_json
from mpq.errors import MpqError, first_line
from mpq.folders import unwritable
from mpq.redaction import printable

if TYPE_CHECKING:  # polars takes as long to load as all of `mpq --help` may
    import polars as pl

log = Console(stderr=True)
SUFFIXES = (".parquet", ".json", ".csv")  # of tables


def emit(
    frame: pl.DataFrame,
    as_json: bool,
    out: Path | None,
    title: str,
    extra: dict[str, Any] | None = None,
    shown_as: pl.DataFrame | None = None,
) -> None:
    """Print a table for people, or as JSON (`extra` beside it under its own keys), and write it where `--out` says.

    People are shown `shown_as` where it is given: the table in fewer, shorter columns (shown.py).
    """
    if out:
        write_frame(frame, out)
    if as_json:
        rows = json.loads(frame.write_json())
        print(json.dumps({**extra, title: rows} if extra else rows, indent=1))
        return
    from rich import box
    from rich.table import Table

    shown = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    told = frame if shown_as is None else shown_as
    for column, kind in told.schema.items():
        side: Literal["left", "right"] = "right" if kind.is_numeric() else "left"
        shown.add_column(plain(column), justify=side, overflow="fold")
    for row in told.head(200).iter_rows():
        shown.add_row(*(plain(_cell(v)) for v in row))
    Console().print(shown)
    if told.height > 200:
        log.print(f"… {told.height - 200} rows more: use --json or --out")
    for name, value in (extra or {}).items():
        text = _cell(value)
        # a path stays in one line, to be copied
        Console().print(plain(f"{name}: {text}"), highlight=False, soft_wrap=" " not in text)


def plain(text: str) -> Text:
    """The text as it is: no markup, and what a terminal would obey (escapes, NUL) written out."""
    return Text(printable(text))


def emit_results(
    results: pl.DataFrame, as_json: bool, out: Path | None, extra: Mapping[str, Any]
) -> None:
    """`emit` a run's results table, and say on stderr which predicted times cannot be, and where the machine changed speed."""
    from mpq.cli import shown
    from mpq.timing.drift import drift_of
    from mpq.timing.plausible import doubts

    emit(results, as_json, out, "results", dict(extra), shown.results(results))
    changed = drift_of(results)
    for note in (*doubts(results), *([changed] if changed else [])):
        log.print("[yellow]note:[/]", plain(note), highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)


def the_base(name: str) -> str:
    """The base format's own name. Raises MpqError where a model runs in none such throughout."""
    from mpq.formats.scheme import get_scheme

    base = get_scheme(name)
    if base.weights.needs_scale:
        raise MpqError(
            f"The base format must be fp32, bf16 or fp16, not {base.name}: no model runs in that throughout."
        )
    return base.name


def lowered_and_base(formats: str, base: str) -> tuple[list[str], str]:
    """The formats to lower to, named with commas between them, and the base.

    Raises MpqError where a name is unknown or empty, the base is none that a model runs in throughout, or nothing is
    left to lower to.
    """
    from mpq.formats.scheme import get_scheme

    if "" in map(str.strip, formats.split(",")):
        raise MpqError(
            f"--formats {formats!r} has an empty name: expected names with commas between them, such as bf16,int8."
        )
    names, of = [get_scheme(f).name for f in formats.split(",")], the_base(base)
    if not set(names) - {of}:
        raise MpqError(
            f"--formats {formats} is the base alone, nothing to lower to: name another format (see `mpq formats`)."
        )
    return names, of


def writable(option: typer.CallbackParam, out: Path | None) -> Path | None:
    """The file that an option names, or None. Raises MpqError where a table cannot go there: asked before hours of measuring,
    not after."""
    return _writable(out, SUFFIXES, option.opts[0])


def report_file(option: typer.CallbackParam, out: Path | None) -> Path | None:
    """`writable`, for what may be a page or a picture as well."""
    return _writable(out, (".html", ".png", *SUFFIXES), option.opts[0])


def _writable(out: Path | None, suffixes: tuple[str, ...], option: str) -> Path | None:
    if out is not None and out.suffix not in suffixes:
        raise MpqError(f"{option} {out}: expected a name that ends in {', '.join(suffixes)}.")
    if out is not None and (why := unwritable(out.parent)):
        raise MpqError(f"{option} {out} cannot be written: {out.parent} {why}.")
    if out is not None and os.path.lexists(out) and not (out.is_file() and os.access(out, os.W_OK)):
        raise MpqError(f"{option} {out} cannot be written: it is there, and no file of yours.")
    return out


def write_frame(frame: pl.DataFrame, out: Path) -> None:
    """Write a table as Parquet, JSON or CSV by suffix. Raises MpqError for another suffix or a folder that is not there."""
    _writable(out, SUFFIXES, "--out")
    writers: dict[str, Callable[[Path], Any]] = {
        ".parquet": frame.write_parquet,
        ".json": frame.write_json,
        ".csv": lambda path: _flat(frame).write_csv(path),
    }
    try:
        writers[out.suffix](out)
    except OSError as error:
        raise MpqError(f"--out {out} cannot be written ({error}).") from None


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """The table with lists of names as text, which is all that CSV holds."""
    import polars as pl

    return frame.with_columns(pl.col(pl.List(pl.String)).list.join(" "))


def write_file(out: Path, content: bytes) -> None:
    """Write a file. Raises MpqError for a folder that is not there or cannot be written."""
    try:
        out.write_bytes(content)
    except OSError as error:
        raise MpqError(f"--out {out} cannot be written ({error}).") from None


def read_frame(path: str) -> pl.DataFrame:
    """A table from a Parquet, JSON or CSV file or fsspec URL. Raises MpqError where it is none."""
    import polars as pl

    from mpq.store.transport import read_file

    readers: dict[str, Callable[[Any], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".json": pl.read_json,
        ".csv": pl.read_csv,
    }
    suffix = Path(path).suffix
    if suffix not in readers:
        raise MpqError(f"{path}: expected a table that ends in {', '.join(readers)}.")
    try:
        data = read_file(path, "table")
        if suffix == ".json":
            parse_json(data)  # polars may end the process at what is nested too deep
        return readers[suffix](io.BytesIO(data))
    except FileNotFoundError:
        raise MpqError(f"No table at {path}.") from None
    except (ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        if isinstance(error, MpqError):
            raise
        raise MpqError(
            f"{path} cannot be read as a table ({first_line(error)}): it is damaged or of another kind."
        ) from None


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(console=log, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
