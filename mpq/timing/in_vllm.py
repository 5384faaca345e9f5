"""Times taken inside vLLM: base and configurations as it runs them, in one process, without weights.

Engines are made from a config.json alone, with made-up weights; which of them a configuration is: vllm_runs.py. One run answers
`batch` prompts of `length` random tokens with one token each: the time to first token, the engine's own scheduling and sampling
included. Where an answer has several tokens, some of those after the first are timed, and count for all.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import polars as pl

from mpq.caches import private_folder
from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.kernels import device_name
from mpq.running.decode import STEPS
from mpq.serving.engine_process import EngineDied, EngineProcess
from mpq.serving.environment import find_environment
from mpq.serving.schemes import check_in_vllm
from mpq.store.tables import table
from mpq.timing.clock import Clock, Wanted, clock_of
from mpq.timing.session import Progress, Request, plan_rows, rows_of
from mpq.timing.vllm_runs import Compiled, Eager


def vllm_device_name(device: str = "cpu", threads: int | None = None) -> str:
    """The device with the engine's version, as its times are kept under. Raises MpqError where there is no vLLM."""
    return f"{device_name(device, threads)}, vLLM {find_environment().version}"


# by threads; kept, since importing vLLM takes longer than many a stage
_idle: dict[int | None, EngineProcess] = {}


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
    compiled: bool,
) -> Iterator[Eager]:
    """Engines of the model in config.json, to be run in `formats`."""
    check_in_vllm(formats, "linear", device)
    dtype = get_format(base).dtype
    said = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
    with vllm_process(device, clock.threads) as engine:

        def opening(
            process: EngineProcess, name: str, quantization: Mapping[str, Any] | None = None
        ) -> dict[str, Any]:
            more = {"quantization_config": quantization} if quantization else {}
            made: dict[str, Any] = process.ask(
                "open",
                name=name,
                folder=str(_folder({**said, "dtype": dtype, **more})),
                dtype=dtype,
                tokens=asked["length"] + min(asked["output"], 1 + STEPS),
                rows=asked["batch"],
                dummy=True,
                compiled=compiled,
            )
            return made

        def another() -> AbstractContextManager[EngineProcess]:
            # vLLM 0.32 has one workspace a process (v1/worker/workspace.py): a second engine there
            # replaces the one that the first one's CUDA graphs were captured with
            return nullcontext(engine) if device == "cpu" else vllm_process(device, clock.threads)

        how = base, clock, asked, device, vllm_device_name(device, clock.threads)
        if compiled:
            runner: Eager = Compiled(another, engine, opening, *how)
        else:
            runner = Eager(engine, opening, formats, *how)
        yield runner
        runner.close()


def _folder(config: Mapping[str, Any]) -> Path:
    """A folder with this config.json alone, called after its content: what vLLM has compiled for it is found
    again under its path, in mpq's cache."""
    text = json.dumps(config)
    folder = private_folder("vllm") / "models" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not (to := folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"config.{os.getpid()}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(to)
    return folder


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
    compiled: bool = False,
    wanted: Callable[[int], bool] | None = None,
    **how: Any,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """As measure.measure_each, inside vLLM: `config` is the content of config.json. `compiled`: as vLLM serves by default, with an
    engine for each configuration.

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
            with _engines(config, lowered, base, read, device, asked_for, compiled) as runner:
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
    if lost:
        place, said = next(iter(lost.items()))
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
    compiled: bool = False,
    progress: Progress | None = None,
    **how: Any,
) -> pl.DataFrame:
    """As measure.measure_ttft, inside vLLM: `config` is the content of config.json. `compiled`: as in measure_each_in_vllm."""
    if not plans:
        return table("timing", [])
    lowered = sorted({f for plan in plans for f in plan.values()} - {base})
    read = clock_of(device.partition(":")[0], threads, clock, graph=False)
    asked = {"batch": batch, "length": length, "output": output, "seed": seed}
    with _engines(config, lowered, base, read, device, asked, compiled) as runner:
        return plan_rows(runner, plans, seed=seed, progress=progress, **how)
