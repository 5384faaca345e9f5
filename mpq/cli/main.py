"""The command `mpq`. Data goes to stdout, what happens on the way to stderr; a mistake exits with 2."""

from __future__ import annotations

import errno
import gc
import io
import logging
import signal
import sys
from typing import Annotated

import typer

from mpq import __version__
from mpq.cli import evaluate, export, frontier, init, method, run, show
from mpq.cli.console import log, plain
from mpq.cli.store import store_app
from mpq.errors import EXTRAS, MpqError, is_out_of_memory, missing_extra
from mpq.redaction import printable, redact

app = typer.Typer(
    name="mpq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose, layer by layer, the numerical format in which a language model runs: as fast (or as small) as possible "
    "while the error of its loss stays under a bound that you set. Start with `mpq init MODEL`, then `mpq run SPEC.yaml`.",
)

INTERRUPTED = 128 + signal.SIGINT


class _Plain(logging.Formatter):
    """Log lines as a terminal may be given them: names in them are other people's, as in sentences (errors.py)."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without what would steer the terminal and without credentials."""
        return printable(redact(super().format(record)))


def main() -> None:
    """Run the CLI; a user's mistake is one sentence on stderr and exit code 2."""
    # what torch and transformers bring stays: looking for garbage takes a sixth of the time that they load
    gc.set_threshold(50_000, 20, 50)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that knows ASCII alone is shown escapes
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # which typer does not tell
            log.print("Interrupted.")
        raise
    except KeyboardInterrupt:  # before typer listens
        log.print("Interrupted.")
        sys.exit(INTERRUPTED)
    except MpqError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module not in EXTRAS:
            raise
        _fail(str(missing_extra(module)))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _fail(f"No file can be called {str(error.filename)[:60]}…: the name is too long.")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(
            "There is not enough memory for that: lower the batch or the length (of a spec's text, of its timing)."
        )


def _fail(sentence: str) -> None:
    log.print("[bold red]Error:[/]", plain(sentence), soft_wrap=True, highlight=False)
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


app.command()(init.init)
app.command()(run.run)
app.command()(run.report)
app.command()(run.reproduce)
app.command()(frontier.frontier)
app.command()(method.formats)
app.command()(method.partition)
app.command()(method.sensitivity)
app.command()(method.time)
app.command()(method.solve)
app.command("eval")(evaluate.evaluate)
app.command()(export.export)
app.command()(show.show)
app.command()(show.diff)
app.add_typer(store_app, name="store")
