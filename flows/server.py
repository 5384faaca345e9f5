"""A Prefect server of a run's own, for as long as the run lives.

Prefect's own temporary server gets a terminal's Ctrl-C before the run does, and outlives a run that is killed. This one
is in a session of its own, and its standard input is a pipe that only the run holds open: once the run has ended, however
it did, the pipe is closed and the server ends. It listens on a socket that the run has opened, so no port is taken and
nothing is asked before it answers. This module imports no Prefect by itself, so that the server starts while the run is
still importing.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mpq.errors import MpqError, first_line
from mpq.flows.interruption import interruptible

START_S = 240.0  # a busy machine imports Prefect's server in half a minute, and makes a database in another
END_S = 5.0


@contextmanager
def prefect_api(verbose: bool = False) -> Iterator[Callable[[], None]]:
    """Within, flows find a Prefect server: the configured one, or one of this run's own. Signals end the run.

    Yields a function to call before the first flow: it waits until the server answers, and raises MpqError in one
    sentence where none does.
    """
    for name, value in {
        "PREFECT_HOME": str(Path(".work/prefect").absolute()),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }.items():
        os.environ.setdefault(name, value)
    with interruptible(), ExitStack() as stack:
        own = None
        if url := os.environ.get("PREFECT_API_URL"):
            check(url)
        else:
            own = Server()
            stack.callback(own.stop)

        def ready() -> None:
            from prefect.settings import PREFECT_API_URL

            # its logs go to the server either way
            logging.getLogger("prefect").propagate = verbose
            if not own:
                return
            if url := PREFECT_API_URL.value():  # a profile names a server too
                check(url)
                return
            own.wait()
            stack.enter_context(_served_by(own.api))

        yield ready


class Server:
    """A Prefect server on a free port of loopback, its database where the settings say (in PREFECT_HOME).

    Raises MpqError where PREFECT_HOME cannot be written to.
    """

    def __init__(self) -> None:
        home = Path(os.environ["PREFECT_HOME"])
        try:
            home.mkdir(parents=True, exist_ok=True)
            self._said = tempfile.TemporaryFile(dir=home)  # noqa: SIM115
        except OSError as error:
            raise MpqError(
                f"Prefect keeps its records in {home}, which cannot be written to ({error.strerror}): "
                "run mpq in a folder of yours, or set PREFECT_HOME to one."
            ) from None
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(listening.fileno())],
                stdin=subprocess.PIPE,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[listening.fileno()],
                start_new_session=True,
                env={
                    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
                    **os.environ,
                    "PREFECT_UI_ENABLED": "0",
                    "PREFECT__SERVER_EPHEMERAL": "1",  # the few services that a run needs
                    "PREFECT__SERVER_FINAL": "1",
                },
            )

    def wait(self, limit_s: float = START_S) -> None:
        """Wait until it answers. Raises MpqError where it ended instead, or still does not after `limit_s` seconds."""
        import httpx

        try:
            httpx.get(f"{self.api}/health", timeout=limit_s).raise_for_status()
        except httpx.HTTPError as error:
            reason = f"did not answer within {limit_s:g} s"
            if not isinstance(error, httpx.TimeoutException):
                self._said.seek(0)
                told = self._said.read().decode(errors="replace")
                reasons = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", told, re.MULTILINE)
                reason = f"did not start ({reasons[-1] if reasons else first_line(error)})"
            raise MpqError(
                f"Prefect's server for this run {reason}: see what it says to `prefect server start`, then set "
                f"PREFECT_API_URL to that server, or another PREFECT_HOME (now {os.environ['PREFECT_HOME']})."
            ) from None

    def stop(self) -> None:
        """End it: in good order within seconds, else at once."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check(url: str) -> None:
    """Ask the configured server whether it is there. Raises MpqError where it is not."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise MpqError(
                f"Prefect's server at {url} (PREFECT_API_URL) cannot be reached ({error}): start it, "
                "or unset PREFECT_API_URL to have one started for the run."
            )


@contextmanager
def _served_by(api: str) -> Iterator[None]:
    """Prefect uses this server in every thread, and has sent it all that there is to say when the context ends."""
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY
    from prefect.settings import temporary_settings as settings

    # a heartbeat is for a server that outlives the run, and costs a second at its end
    with (
        settings({PREFECT_API_URL: api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        _temporary_global_settings_context(get_settings_context()),
    ):
        try:
            yield
        finally:
            APILogWorker.drain_all(timeout=END_S)
            EventsWorker.drain_all(timeout=END_S)


def main(listening: int) -> None:
    """The server's own process, on an open socket; it ends once standard input has closed."""

    def end_with_the_run() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # uvicorn ends in good order
        time.sleep(END_S)
        os._exit(1)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    gc.set_threshold(50_000, 20, 50)  # as mpq.cli.main has it
    import uvicorn
    from prefect.server.api.server import create_app

    config = uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listening)])


if __name__ == "__main__":
    main(int(sys.argv[1]))
