"""Times taken inside vLLM: base and configurations as it runs them, in one process, without weights.

An engine in base and one in each format are made from a config.json alone, with made-up weights; a configuration is base's
engine with linears of the others in its place (serving/vllm_process.py). One run answers `batch` prompts of `length` random tokens
with one token each: the time to first token, the engine's own scheduling and sampling included. Where an answer has several tokens,
some of those after the first are timed, and count for all.
"""

from __future__ import annotations

import atexit
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.kernels import device_name
from mpq.running.decode import STEPS
from mpq.serving.engine_process import EngineDied, EngineProcess
from mpq.serving.environment import find_environment
from mpq.serving.schemes import EXPORTED, ON_CPU, all_in
from mpq.store.tables import table
from mpq.timing.clock import Clock, Wanted, clock_of
from mpq.timing.pairs import Timed
from mpq.timing.session import Progress, Ready, Request, plan_rows, rows_of

_BASE = "base"


def vllm_device_name(device: str = "cpu", threads: int | None = None) -> str:
    """The device with the engine's version, as its times are kept under. Raises MpqError where there is no vLLM."""
    return f"{device_name(device, threads)}, vLLM {find_environment().version}"


def formats_in_vllm(kind: str, device: str = "cpu") -> tuple[str, ...]:
    """The formats beside base that products of a kind can be timed in: linears alone have schemes."""
    if kind != "linear":
        return ()
    return ON_CPU if device == "cpu" else EXPORTED


def runs_in_vllm(
    formats: Mapping[str, str], kinds: Mapping[str, str], base: str, device: str = "cpu"
) -> bool:
    """Whether a plan (op → format; op → kind) lowers nothing that vLLM has no scheme for."""
    return all(f == base or f in formats_in_vllm(kinds[op], device) for op, f in formats.items())


class _Vllm:
    """Forwards inside vLLM. `linears` are the model's as vLLM has them, `packed` which of the checkpoint's each is made of."""

    def __init__(
        self,
        engine: EngineProcess,
        linears: Sequence[str],
        packed: Mapping[str, Sequence[str]],
        base: str,
        clock: Clock,
        device: str,
        asked: Mapping[str, int],
    ):
        self._engine, self._base, self._clock, self._device = engine, base, clock, device
        self._linears, self._packed, self._asked = frozenset(linears), packed, dict(asked)

    @property
    def waits(self) -> bool:
        return self._clock.waits

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield

    @contextmanager
    def block(self) -> Iterator[Ready]:
        yield self._ready

    def _ready(self, formats: Mapping[str, str]) -> Timed:
        exchanged = self._exchanged(formats)

        further = self._asked["output"] - 1

        def timed() -> float | tuple[float, float]:
            first_s, *later_s = self._engine.ask(
                "time",
                name=_BASE,
                linears=exchanged,
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

    def _exchanged(self, formats: Mapping[str, str]) -> dict[str, str]:
        """vLLM's linear to the engine that it is taken from. Raises MpqError for what vLLM cannot run so."""
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
            "device": vllm_device_name(self._device, self._clock.threads),
            "batch": self._asked["batch"],
            "length": self._asked["length"],
            **({"output": self._asked["output"]} if self._asked["output"] > 1 else {}),
            "clock": self._clock.reads,
            "threads": self._clock.threads,
            "mode": "vllm eager",
        }

    def check(self, formats: Sequence[str], kind: str) -> None:
        _check_formats(formats, kind)


def _check_formats(formats: Sequence[str], kind: str) -> None:
    if foreign := [f for f in formats if f not in formats_in_vllm(kind)]:
        can = " and ".join(formats_in_vllm(kind)) or "base alone"
        raise MpqError(f"vLLM runs no {kind} in {foreign[0]}: expected {can}.")


_idle: dict[
    int | None, EngineProcess
] = {}  # by threads; kept, since importing vLLM takes longer than many a stage


@contextmanager
def vllm_process(device: str, threads: int | None) -> Iterator[EngineProcess]:
    """A process of vLLM: on a CPU the one that was used before, on a GPU a new one, which holds no memory there afterwards."""
    environment = find_environment()
    engine = _idle.pop(threads, None)
    if engine and engine.environment != environment:
        engine.close()
        engine = None
    engine = engine or EngineProcess(environment, threads)
    try:
        yield engine
    except BaseException:  # perhaps in the middle of an answer
        engine.kill()
        raise
    if device == "cpu" and threads not in _idle:
        _idle[threads] = engine
    else:
        engine.close()


@atexit.register
def _close() -> None:
    while _idle:
        _idle.popitem()[1].close()


@contextmanager
def _engines(
    config: Mapping[str, Any],
    formats: Sequence[str],
    base: str,
    clock: Clock,
    device: str,
    asked: Mapping[str, int],
) -> Iterator[_Vllm]:
    """Engines of the model in config.json, one in base and one in each of `formats`."""
    _check_formats(formats, "linear")
    dtype = get_format(base).dtype
    with (
        vllm_process(device, clock.threads) as engine,
        tempfile.TemporaryDirectory(prefix="mpq-vllm-") as folder,
    ):
        made: dict[str, Any] = {}
        for name in (_BASE, *formats):
            of = Path(folder) / name
            of.mkdir()
            said = {
                k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")
            }
            said |= {"dtype": dtype}
            if name != _BASE:
                said |= {"quantization_config": all_in(name)}
            (of / "config.json").write_text(json.dumps(said), encoding="utf-8")
            made[name] = engine.ask(
                "open",
                name=name,
                folder=str(of),
                dtype=dtype,
                tokens=asked["length"] + min(asked["output"], 1 + STEPS),
                rows=asked["batch"],
                dummy=True,
            )
        of_base = made[_BASE]
        yield _Vllm(engine, of_base["linears"], of_base["packed"], base, clock, device, asked)
        for name in made:
            engine.ask("close", name=name)


def measure_each_in_vllm(
    config: Mapping[str, Any],
    groups: pl.DataFrame,
    requests: Sequence[Request],
    *,
    base: str,
    batch: int,
    length: int,
    output: int = 1,
    device: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
    clock: Wanted = "auto",
    wanted: Callable[[int], bool] | None = None,
    **how: Any,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """As measure.measure_each, inside vLLM: `config` is the content of config.json.

    Where the engine's process ends while a block is measured, what is left is measured one configuration at a time, each time
    in a new process where it has to be; a configuration at which it ends once more is lost, and no other. Raises MpqError,
    after everything else was measured, for those that were lost.
    """
    every = [(s, tuple(c)) for s, configurations in requests for c in configurations]
    lowered = sorted({f for _, c in every for f in c} - {base})
    read = clock_of(device.partition(":")[0], threads, clock, graph=False)
    asked_for = {"batch": batch, "length": length, "output": output, "seed": seed}
    left, lost, alone = list(range(len(every))), dict[int, str](), False
    done = set[int]()
    while left:
        opened = False
        try:
            with _engines(config, lowered, base, read, device, asked_for) as runner:
                opened = True
                while left:
                    asked = left[:1] if alone else left
                    requested = [(every[place][0], [every[place][1]]) for place in asked]
                    still = _of_these(wanted, asked)
                    for at, row in rows_of(
                        runner, groups, requested, base=base, seed=seed, wanted=still, **how
                    ):
                        yield asked[at], row
                        done.add(asked[at])
                    left = left[len(asked) :]
        except EngineDied as why:
            left = [place for place in left if place not in done]
            if not (opened and left):
                raise
            if alone:
                lost[left.pop(0)] = str(why)
            alone = True
    for place, said in lost.items():
        signature, configuration = every[place]
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise MpqError(
            f"{signature} in {', '.join(configuration)}{more} could not be timed ({said}); all others were, and are kept."
        )


def _of_these(
    wanted: Callable[[int], bool] | None, places: Sequence[int]
) -> Callable[[int], bool] | None:
    """`wanted`, asked by the place among `places`."""
    return None if wanted is None else lambda at: wanted(places[at])


def measure_ttft_in_vllm(
    config: Mapping[str, Any],
    plans: Sequence[Mapping[str, str]],
    *,
    base: str,
    batch: int,
    length: int,
    output: int = 1,
    device: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
    clock: Wanted = "auto",
    progress: Progress | None = None,
    **how: Any,
) -> pl.DataFrame:
    """As measure.measure_ttft, inside vLLM: `config` is the content of config.json."""
    if not plans:
        return table("timing", [])
    lowered = sorted({f for plan in plans for f in plan.values()} - {base})
    read = clock_of(device.partition(":")[0], threads, clock, graph=False)
    asked = {"batch": batch, "length": length, "output": output, "seed": seed}
    with _engines(config, lowered, base, read, device, asked) as runner:
        return plan_rows(runner, plans, seed=seed, progress=progress, **how)
