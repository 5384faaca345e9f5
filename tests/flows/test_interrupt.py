"""A run that is interrupted ends at once, leaves nothing behind, and goes on when it is started again."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import preloaded
import psutil
import pytest
import yaml
from small import ROOT, own_prefect, small_spec
from test_kill import UNDRAWN

# a shell's background jobs ignore SIGINT and hand that on: the tests may run in one
# here Polars is imported before a run sets its handlers; elsewhere after, and then has a signal restart the wait that it comes in
HEEDED = """
import signal
set_handler = signal.signal
set_handler(signal.SIGINT, signal.default_int_handler)
signal.signal = lambda *how: (set_handler(*how), signal.siginterrupt(how[0], False))[0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec whose store and Prefect database the tests share, so that each run finds what the one before has stored."""
    folder = tmp_path_factory.mktemp("interrupted")
    data = small_spec(folder).model_dump(mode="json")
    del data["objectives"]["et"]  # nothing is timed: a timing would wait for those of other tests
    (folder / "spec.yaml").write_text(yaml.safe_dump(data))
    return folder


@contextmanager
def started(folder: Path) -> Iterator[preloaded.Process]:
    """`mpq run` in a session of its own, which has ended when the context does."""
    run = preloaded.Process(
        ["-c", HEEDED + UNDRAWN, "run", str(folder / "spec.yaml")],
        ROOT,
        own_prefect(folder / "home"),
        folder / "run.log",
    )
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def ended(folder: Path, **environment: str) -> tuple[int, str]:
    """`mpq run` to its end, begun with nothing imported, as a person's is: its exit code, and what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", UNDRAWN, "run", str(folder / "spec.yaml")],
        cwd=ROOT,
        env={**own_prefect(folder / "home"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return run.returncode, run.stdout


def children_once_stored(run: preloaded.Process, folder: Path, kind: str) -> list[psutil.Process]:
    """Wait until the run is under way and a table of this kind is stored; the processes that it has started."""
    deadline = time.monotonic() + 280
    # while a run before this one was cleaning up, its flow may have stored more than it was waited for
    while states(folder)[-1:] != ["RUNNING"] or not list(
        (folder / "store" / kind).glob("*/meta.json")
    ):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(run.pid).children(recursive=True)


def states(folder: Path) -> list[str]:
    """What Prefect says of the runs, the oldest first."""
    with closing(sqlite3.connect(folder / "home" / "prefect.db")) as database:
        rows = database.execute("select state_type from flow_run order by created").fetchall()
    return [row[0] for row in rows]


@contextmanager
def heard(number: signal.Signals) -> Iterator[None]:
    """What is started does not ignore the signal, though the tests may (nohup make test)."""
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(number, before)


# in this order: each goes on from what the one before has left
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, "model"),
        (signal.SIGHUP, "gains"),
        (signal.SIGKILL, "plan_losses"),
    ],
)
def test_a_signal_ends_the_run(folder: Path, number: signal.Signals, kind: str) -> None:
    """The exit code is the signal's, one sentence says how to go on, no process is left, Prefect knows that it ended.

    SIGTERM goes the same way, see below.
    """
    with heard(number), started(folder) as run:
        children = children_once_stored(run, folder, kind)
        assert children, "not even a Prefect server"
        os.kill(run.pid, number)
        output, _ = run.communicate(timeout=30)
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left
    assert not (folder / "store" / "report").exists(), "it went on to its end"
    if number is signal.SIGKILL:
        assert run.returncode == -number, output
        return
    assert run.returncode == 128 + number, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("Interrupted: run the same command again to go on, "), output
    assert (folder / "store").as_uri() in last
    assert "Traceback" not in output
    assert states(folder)[-1] == "CANCELLED"


def test_it_goes_on(folder: Path) -> None:
    """The run after those that were interrupted finds what they have stored, ends well and leaves no server."""
    stored = {p: p.stat().st_mtime_ns for p in (folder / "store").rglob("meta.json")}
    with started(folder) as run:
        output, _ = run.communicate(timeout=280)
    assert run.returncode == 0, output
    assert re.search(r"load model +1 task +cached", output), output
    assert all(p.stat().st_mtime_ns == at for p, at in stored.items())
    assert states(folder)[-1] == "COMPLETED"
    assert not servers_of(folder)


def servers_of(folder: Path) -> list[int]:
    """Processes that keep Prefect's records in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == str(folder / "home"):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def test_logs_reach_the_server(folder: Path) -> None:
    """What the stages said is in Prefect's database, though the terminal showed none of it; progress is kept by stage."""
    with closing(sqlite3.connect(folder / "home" / "prefect.db")) as database:
        messages = [m for (m,) in database.execute("select message from log")]
        unnamed = database.execute("select count(*) from artifact where key is null").fetchone()[0]
    assert any(m.startswith("partition: 0 of 1 tasks cached") for m in messages)
    assert any("computing" in m for m in messages)
    assert unnamed == 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "http://127.0.0.1:9/api"),
        ({"PREFECT_HOME": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_no_server(folder: Path, environment: dict[str, str], expected: str) -> None:
    """A server that is not there, a home that cannot be written to: exit code 2 and one sentence."""
    code, output = ended(folder, **environment)
    assert code == 2, output
    assert expected in output
    assert output.startswith("Error: "), output
    assert len(output.strip().splitlines()) == 1, output


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that cannot be opened: the sentence has the server's own reason, and the server has ended."""
    from mpq.errors import MpqError
    from mpq.flows.server import Server

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////proc/none.db")
    server = Server()
    with pytest.raises(MpqError, match="unable to open database file"):
        server.wait()
    server.stop()


PARENT = """
import os, sys, time
os.environ["PREFECT_HOME"] = sys.argv[1]
from mpq.flows.server import Server
server = Server()
print(server._process.pid, flush=True)
time.sleep(600)
"""


def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    """kill -9 of the parent, before the server is up: the server ends too, without a signal of its own."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout
    server = psutil.Process(int(parent.stdout.readline()))
    assert os.getsid(server.pid) == server.pid, "a terminal's Ctrl-C would reach it"
    parent.kill()
    parent.wait()
    server.wait(timeout=60)


BUSY = """
import signal, subprocess, sys, tempfile, threading, time
from mpq.flows.interruption import interruptible, when_interrupted
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
with (
    interruptible(),
    when_interrupted(lambda: 1 / 0),
    when_interrupted(lambda: "2 stages are stored"),
):
    child = subprocess.Popen(["sleep", "600"])
    folder = tempfile.TemporaryDirectory()
    threading.Thread(target=time.sleep, args=(600,)).start()
    print(child.pid, folder.name, flush=True)
    threading.Event().wait()
"""


def test_all_is_cleaned_up(tmp_path: Path) -> None:
    """A busy thread, a step that fails: children and temporary folders go all the same; an ignored SIGHUP stays ignored."""
    run = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    pid, temporary = run.stdout.readline().split()
    child = psutil.Process(int(pid))
    assert Path(temporary).is_dir()
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGTERM, told
    assert told == ("Interrupted: run the same command again to go on, 2 stages are stored.\n")
    assert not Path(temporary).exists()
    child.wait(30)
