"""From a checkpoint to a server: planned by times taken in vLLM, exported, served by `vllm serve`, asked over HTTP.

    python -m deployments.serve_demo [SPEC]

The server listens on loopback alone and is stopped at the end; the checkpoint and logs stay in .work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from deployments.processes import ROOT, Services, free_port, run_out, until
from mpq.errors import MpqError
from mpq.export.record import recorded
from mpq.formats.format import get_format
from mpq.program.plan import Plan
from mpq.serving import Environment, find_environment
from mpq.spec import RunSpec, load_spec, resolved
from mpq.timing.in_vllm import vllm_process
from mpq.timing.pairs import compare, gain_statistics

QUESTION = "def area(width, height):\n    return"
TOKENS = 16  # of an answer, and of those that the time per token is measured over
READY_S = 600.0  # vLLM takes one minute to begin, several on a busy machine
REPEATS = 5
NAMES = ("base", "plan")


@dataclass(frozen=True)
class Times:
    """Seconds: to the first token, and for each further one, of base and of the plan; half the 95 % interval of what is saved."""

    ttft_s: tuple[float, float]
    token_s: tuple[float, float]
    saved_half_s: float


def serve(services: Services, environment: Environment, folder: Path) -> str:
    """`vllm serve` on an export, as its record has it, ready to be asked; returns its address. Raises MpqError where it ends instead."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    options = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "plan",
        "max-model-len": 1024,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 2**28,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    _, _, _, *told = shlex.split(recorded(folder, str(folder)).serve)  # behind vllm serve FOLDER
    switches = ["--enforce-eager", "--no-enable-prefix-caching", *told]
    server = services.start(
        "vllm", str(environment.command), "serve", str(folder), *given, *switches
    )

    def ready() -> bool:
        if server.poll() is not None:
            said = services.log("vllm").strip().splitlines()
            raise MpqError(
                f"vllm serve ended ({said[-1] if said else 'it said nothing'}): its log is {services.home / 'vllm.log'}."
            )
        return bool(httpx.get(f"{address}/health").is_success)

    until("vllm serve", ready, READY_S, 0.5)
    return address


def ask(address: str, prompt: str) -> str:
    """What the served model says next."""
    asked = {"model": "plan", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=READY_S)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def measured(folders: Mapping[str, Path], spec: RunSpec, repeats: int = REPEATS) -> Times:
    """Times of base and of the plan, as they lie in `folders`, in one process of vLLM, one beside the other."""
    part = spec.timing
    threads = part.threads_on(spec.model.device)
    clock = "cpu" if threads == 1 and part.clock != "wall" else "wall"
    with vllm_process(spec.model.device, threads) as engine:
        for name in NAMES:
            engine.ask(
                "open",
                name=name,
                folder=str(folders[name]),
                dtype=get_format(spec.model.base).dtype,
                tokens=part.length + TOKENS,
                rows=part.batch,
                dummy=False,
            )

        def seconds(name: str) -> tuple[float, float]:
            how = {"rows": part.batch, "prompt": part.length, "output": TOKENS, "clock": clock}
            came = engine.ask("time", name=name, linears={}, seed=0, **how)
            return came[0], came[-1] - came[0]

        for name in NAMES:
            seconds(name)
        (found,) = compare(
            lambda: seconds("base"), [lambda: seconds("plan")], repeats, waiting=clock == "wall"
        )
        for name in NAMES:
            engine.ask("close", name=name)
    first, further = (tuple(float(np.median(s)) for s in of) for of in found.parts)
    _, low, high = gain_statistics(*found.parts[0])
    token_s = further[0] / (TOKENS - 1), further[1] / (TOKENS - 1)
    return Times((first[0], first[1]), token_s, (high - low) / 2)


def table_of(plan: Plan, times: Times, prompt: str) -> Table:
    """Base beside the plan: what was predicted, and what vLLM took."""
    table = Table(title=f"in vLLM, {prompt}")
    for column in ("", "base", "plan", "saved"):
        table.add_column(column, justify="left" if not column else "right")

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value * 1e3:.1f} ms"

    predicted = (plan.base_ttft_s, plan.predicted_ttft_s)
    saved = None if None in predicted else plan.base_ttft_s - plan.predicted_ttft_s  # type: ignore[operator]
    table.add_row("time to first token, predicted", *map(ms, (*predicted, saved)))
    taken = times.ttft_s[0] - times.ttft_s[1]
    half = f" ± {times.saved_half_s * 1e3:.1f}"
    table.add_row("measured", *map(ms, times.ttft_s), f"{taken * 1e3:.1f}{half} ms")
    if plan.base_tpot_s is not None and plan.predicted_tpot_s is not None:
        tokens = (plan.base_tpot_s, plan.predicted_tpot_s)
        table.add_row("each further token, predicted", *map(ms, (*tokens, tokens[0] - tokens[1])))
    per_token = times.token_s[0] - times.token_s[1]
    table.add_row("each further token, measured", *map(ms, (*times.token_s, per_token)))
    return table


def answered(spec: RunSpec, checkpoint: Path, home: Path, console: Console) -> str:
    """What the checkpoint says when it is served and asked; the server is stopped, also where that is interrupted."""
    environment = find_environment()
    with Services(home) as services:
        services.environment = environment.variables(spec.timing.threads_on(spec.model.device))
        start = time.perf_counter()
        address = serve(services, environment, checkpoint)
        console.print(
            f"[bold]•[/] vllm serve {checkpoint}: ready after {time.perf_counter() - start:.0f} s at {address}"
        )
        answer = ask(address, QUESTION)
        console.print(
            f"[bold]•[/] asked {QUESTION!r}, answered {answer!r}", highlight=False, markup=True
        )
    return answer


def demonstrate(
    spec: RunSpec, checkpoint: Path, home: Path, console: Console, repeats: int = REPEATS
) -> tuple[str, Times]:
    """Serve the checkpoint that a run of `spec` ended with, ask it, and time it beside its base: the answer, and the times."""
    plan = Plan.from_json((checkpoint / "plan.json").read_text(encoding="utf-8"))
    record = json.loads((checkpoint / "export.json").read_text(encoding="utf-8"))
    console.print(f"[bold]•[/] {plan.name}: {record['formats']} of {record['linears']} linears")
    answer = answered(spec, checkpoint, home, console)
    console.print("[bold]•[/] stopped the server; base and the plan in one process, side by side:")
    times = measured({"base": ROOT / spec.model.path, "plan": checkpoint}, spec, repeats)
    prompt = f"{spec.timing.batch} × {spec.timing.length} tokens, {TOKENS} answered"
    console.print(table_of(plan, times, prompt))
    return answer, times


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path, nargs="?", default=ROOT / "examples" / "serve.yaml")
    path = parser.parse_args().spec
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` ends what was started
    try:
        find_environment()
        spec = load_spec(path)
        if failed := run_out(sys.executable, "-m", "mpq", "run", str(path)):
            sys.exit(failed)
        out = Path(spec.out) / spec.name
        checkpoint = Path(
            spec.export.out if spec.export and spec.export.out else out / "checkpoint"
        )
        demonstrate(resolved(spec), checkpoint, ROOT / ".work" / "serve-demo", Console())
    except MpqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: nothing is left running.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
