"""A process of vLLM, asked by lines of JSON (vllm_process.py), and what it says before it ends."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from mpq.errors import MpqError
from mpq.serving.environment import Environment

_SCRIPT = Path(__file__).with_name("vllm_process.py")
_PATIENCE_S = 20.0  # for an end that was asked for


class EngineDied(MpqError):
    """The engine's process has ended without an answer."""


class EngineProcess:
    """vLLM's engines in one process. Used with `with`: at its end the process is gone.

    `threads` are those of a CPU's kernels; vLLM's own number if left out.
    """

    def __init__(self, environment: Environment, threads: int | None = None):
        self.environment = environment
        self._log = tempfile.TemporaryFile(prefix="mpq-vllm-")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [str(environment.python), "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment.variables(threads),
            text=True,
        )

    def ask(self, what: str, **how: Any) -> Any:
        """The answer to one request.

        Raises MpqError for what vLLM refuses, with its last line, and EngineDied where the process ends meanwhile.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died(what) from None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died(what)
        answer = json.loads(line)
        if "error" in answer:
            raise MpqError(
                f"vLLM {self.environment.version} could not {what} ({answer['error'][:500]})."
            )
        return answer["done"]

    def _died(self, what: str) -> EngineDied:
        code = self._process.wait()
        said = [line for line in self.said().splitlines() if line.strip()]
        last = said[-1].strip()[:300] if said else "it said nothing"
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return EngineDied(
            f"vLLM's process ended when it was asked to {what} ({how}; its last line: {last})."
        )

    def said(self) -> str:
        """What vLLM printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End the process: by the end of its input, or else for good."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except OSError:  # what was left to be written
                    continue
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def kill(self) -> None:
        """End the process at once, whatever it is at."""
        self._process.kill()
        self.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close() if kind is None else self.kill()
