"""A demo's first step, `mpq run`, on a terminal of its own: Ctrl-C ends both, and who was interrupted says so once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from io import FileIO

import psutil
import pytest
from small import ROOT

DEMO = """
import signal, sys
from deployments.processes import run_out
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    sys.exit(run_out(sys.executable, "-c", sys.argv[1]))
except KeyboardInterrupt:
    print("stopped: nothing is left running.", file=sys.stderr)
    sys.exit(130)
"""
# cleans up for longer than subprocess.run leaves a child after Ctrl-C
RUN = """
import subprocess, threading, time
from mpq.flows.interruption import interruptible, when_interrupted
with interruptible(), when_interrupted(lambda: time.sleep(1) or "2 stages are stored"):
    print("left:", subprocess.Popen(["sleep", "600"]).pid, flush=True)
    threading.Event().wait()
"""
# is still importing
EARLY = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("left:", os.getpid(), flush=True)
time.sleep(600)
"""
SAID = "Interrupted: run the same command again to go on, 2 stages are stored."


@pytest.mark.parametrize(
    ("step", "pressed", "sentence", "code"),
    [
        (RUN, "\x03", SAID, 130),
        (RUN, "\x03\x03", SAID, 130),
        (RUN, "kill", SAID, 143),
        (EARLY, "\x03", "stopped: nothing is left running.", 130),
    ],
)
def test_ctrl_c_ends_both(step: str, pressed: str, sentence: str, code: int) -> None:
    """Ctrl-C on the terminal, once or twice, and a signal to the demo alone: one sentence, its exit code, no process left."""
    ours, terminal = pty.openpty()
    demo = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-c", DEMO, step],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    with os.fdopen(ours, "rb+", buffering=0) as screen:
        shown = screen.readline()
        started = psutil.Process(int(shown.split()[-1]))
        if pressed == "kill":
            demo.terminate()
        else:
            screen.write(pressed.encode())
        assert demo.wait(60) == code, shown
        started.wait(10)
        shown += b"".join(iter(lambda: read(screen), b""))
    said = shown.decode().replace("^C", "").split("\r\n")[1:]
    assert [line for line in said if line] == [sentence]


def read(screen: FileIO) -> bytes:
    """What is on the terminal; nothing once all that had it open are gone."""
    try:
        return os.read(screen.fileno(), 4096)
    except OSError:
        return b""
