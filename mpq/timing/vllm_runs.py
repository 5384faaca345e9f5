"""Runs of configurations inside vLLM: linears exchanged between eager engines, or an engine for each where vLLM compiles.

What is compiled, or captured in a CUDA graph, keeps the linears that it was made with: there a configuration is what its
config.json says from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from mpq.errors import MpqError
from mpq.running.decode import STEPS
from mpq.serving.engine_process import EngineProcess
from mpq.serving.schemes import all_in, check_in_vllm, each_in
from mpq.timing.clock import Clock
from mpq.timing.pairs import Timed
from mpq.timing.session import BLOCK, Ready

BASE, _CONFIGURATION = "base", "configuration"


class Opening(Protocol):
    """Opens an engine of the model in a process under a name, in base or with a `quantization_config`;
    gives what serving/vllm_process.py answers."""

    def __call__(
        self, process: EngineProcess, name: str, quantization: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """See above."""


class Eager:
    """Forwards inside vLLM's eager engines, one in base and one in each of `formats`: a configuration is
    base's with linears of the others in their place (serving/vllm_process.py).

    `asked`: batch, length, output and seed; `device_name`: what times are kept under.
    """

    mode = "vllm eager"
    together = BLOCK

    def __init__(
        self,
        engine: EngineProcess,
        opening: Opening,
        formats: Sequence[str],
        base: str,
        clock: Clock,
        asked: Mapping[str, int],
        device: str,
        device_name: str,
    ):
        self._engine, self._open, self._base, self._clock = engine, opening, base, clock
        self._asked, self._device, self._device_name = dict(asked), device, device_name
        of_base = self._open(engine, BASE)
        # the model's linears as vLLM has them, and which of the checkpoint's each is made of
        self._linears, self._packed = dict.fromkeys(of_base["linears"]), of_base["packed"]
        for name in formats:
            self._open(engine, name, all_in(name))
        self._names = (BASE, *formats)

    def close(self) -> None:
        """Let the engines go."""
        for name in self._names:
            self._engine.ask("close", name=name)

    @property
    def waits(self) -> bool:
        return self._clock.waits

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield

    @contextmanager
    def block(self) -> Iterator[Ready]:
        yield lambda formats: self._timed(self._engine, BASE, self._lowered(formats))

    def _timed(self, engine: EngineProcess, name: str, linears: Mapping[str, str]) -> Timed:
        """A run of the process's engine `name` with these linears exchanged, once it has run."""
        further = self._asked["output"] - 1

        def timed() -> float | tuple[float, float]:
            first_s, *later_s = engine.ask(
                "time",
                name=name,
                linears=linears,
                rows=self._asked["batch"],
                prompt=self._asked["length"],
                output=1 + min(further, STEPS),
                seed=self._asked["seed"],
                clock=self._clock.reads,
            )
            if not later_s:
                return float(first_s)
            return first_s, (later_s[-1] - first_s) / len(later_s) * further

        timed()
        return timed

    def _lowered(self, formats: Mapping[str, str]) -> dict[str, str]:
        """vLLM's lowered linears, each with its format. Raises MpqError for what vLLM cannot run so."""
        found: dict[str, set[str]] = {}
        for op, name in formats.items():
            linear = self._linear_of(op)
            if linear:
                found.setdefault(linear, set()).add(name)
            elif name != self._base:
                raise MpqError(
                    f"vLLM has no linear for {op}: pin it to base, or time with engine torch."
                )
        for linear, names in found.items():
            if len(names) > 1:
                raise MpqError(
                    f"vLLM runs {linear} in one format, the configuration has {' and '.join(sorted(names))} in it: tie its parts."
                )
        return {linear: name for linear, (name,) in found.items() if name != self._base}

    def _linear_of(self, op: str) -> str | None:
        parent, _, child = op.rpartition(".")
        fused = (f"{parent}.{name}" for name, parts in self._packed.items() if child in parts)
        return next((name for name in (*fused, op) if name in self._linears), None)

    def facts(self) -> dict[str, Any]:
        return {
            "device": self._device_name,
            "batch": self._asked["batch"],
            "length": self._asked["length"],
            **({"output": self._asked["output"]} if self._asked["output"] > 1 else {}),
            "clock": self._clock.reads,
            "threads": self._clock.threads,
            "mode": self.mode,
        }

    def check(self, formats: Sequence[str], kind: str) -> None:
        check_in_vllm(formats, kind, self._device)


class Compiled(Eager):
    """Forwards inside engines as vLLM serves by default: base's, and one of its own for the configuration
    that is measured, open that long in the process that `another` gives."""

    mode = "vllm compiled"
    together = 1

    def __init__(
        self,
        another: Callable[[], AbstractContextManager[EngineProcess]],
        engine: EngineProcess,
        opening: Opening,
        *how: Any,
    ):
        super().__init__(engine, opening, (), *how)
        self._another = another

    @contextmanager
    def block(self) -> Iterator[Ready]:
        with ExitStack() as stack:

            def ready(formats: Mapping[str, str]) -> Timed:
                if not (lowered := self._lowered(formats)):
                    return self._timed(self._engine, BASE, {})
                engine = stack.enter_context(self._opened(lowered))
                return self._timed(engine, _CONFIGURATION, {})

            yield ready

    @contextmanager
    def _opened(self, lowered: Mapping[str, str]) -> Iterator[EngineProcess]:
        with self._another() as engine:
            made = self._open(engine, _CONFIGURATION, self._quantization(lowered))
            if wrong := set(made["lowered"]) ^ set(lowered):
                raise MpqError(
                    f"vLLM read another configuration than was meant, of {min(wrong)} first: "
                    "time with compile: false, and please report it."
                )
            yield engine
            engine.ask("close", name=_CONFIGURATION)

    def _quantization(self, lowered: Mapping[str, str]) -> dict[str, Any]:
        """The `quantization_config` with these of vLLM's linears in their formats and all others in base, by
        the checkpoint's names."""
        targets: dict[str, list[str]] = {}
        for linear, name in lowered.items():
            targets.setdefault(name, []).extend(self._parts(linear))
        others = (linear for linear in self._linears if linear not in lowered)
        return each_in(targets, (part for linear in others for part in self._parts(linear)))

    def _parts(self, linear: str) -> list[str]:
        parent, dot, child = linear.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self._packed.get(child, [child])]
