"""The options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpq.cli.console import writable

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
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda or cuda:N; auto: the first GPU where there is one, else cpu."),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub id.")]
Trusted = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that the checkpoint brings along: read it first.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of what is drawn at random.")]
Store = Annotated[str | None, typer.Option(help="Another store than the spec's.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")]
