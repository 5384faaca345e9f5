"""What fan-out costs: overhead per task of each runner, sensitivity on one and two workers, and a simulated campaign on many devices.

    python bench/fanout.py

Starts a Prefect server and clusters of processes on loopback, and ends them. A task is one of simulated.py's that sleeps for 0 s, so
what is measured is everything around a measurement. Writes fanout.json and fanout.png beside the other results of this device, and the
picture to docs/; the last line is JSON.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure
from record import folder_of, record

sys.path.insert(0, str(Path(__file__).parent.parent))

from deployments.processes import ROOT, Services

TASKS, RUNS = 60, 3
CONFIGURATIONS, DEVICES, CONFIGURATION_S, SPREAD = (
    20_000,
    (64, 1000),
    2.0,
    0.3,
)  # an assumed campaign: 16 prefills of 125 ms each


def summary(values: list[float], digits: int = 4) -> dict[str, float]:
    """The median of some measurements, and the ends of their spread."""
    return {
        "median": round(statistics.median(values), digits),
        "from": round(min(values), digits),
        "to": round(max(values), digits),
    }


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children so far."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(t.user + t.system for t in (p.cpu_times() for p in processes))


@contextmanager
def services() -> Iterator[Services]:
    """Processes on loopback with a Prefect server, which this process talks to as well."""
    with tempfile.TemporaryDirectory() as home, Services(Path(home)) as running:
        os.environ["PREFECT_HOME"] = running.environment["PREFECT_HOME"]
        os.environ["PREFECT_API_URL"] = running.server()
        os.environ["PREFECT_LOGGING_LEVEL"] = "ERROR"
        os.environ["MPQ_CACHE"] = running.environment["MPQ_CACHE"]
        yield running


class Bench:
    """The measurements that need Prefect, in a store of their own each."""

    def __init__(self, running: Services):
        self.running, self.stores = running, 0

    def store(self) -> str:
        """The URL of an empty store."""
        self.stores += 1
        return (self.running.home / f"store-{self.stores}").as_uri()

    def overhead(
        self,
        runner: dict[str, Any],
        on: str = "accelerator",
        devices: int = 1,
        cached: bool = False,
    ) -> dict[str, float]:
        """Seconds of a device's time that a task takes with nothing in it, by RUNS runs of TASKS tasks."""
        from bench.simulated import fan_out
        from mpq.spec import RunnerSpec

        seconds = []
        for _ in range(RUNS):
            store = self.store()
            for _ in range(2 if cached else 1):
                took = fan_out(RunnerSpec(**runner), store, TASKS, on=on)["seconds"]
            seconds.append(took * devices / TASKS)
        print(
            f"{runner or on}{' cached' if cached else ''}: {seconds}", file=sys.stderr, flush=True
        )
        return summary(seconds)

    def cpu(self, address: str) -> dict[str, float]:
        """CPU seconds per task of the processes that there is one of, the flow's, Dask's scheduler, Prefect's server; and of the workers.

        Whatever else the machine does meanwhile, these hardly change; one process does not do more than a second of them in a second.
        """
        from bench.simulated import fan_out
        from mpq.spec import RunnerSpec

        pids = {
            "flow": os.getpid(),
            **{
                n: self.running.processes[n].pid
                for n in ("scheduler", "server", "dask-0", "dask-1")
            },
        }
        here = time.process_time()
        before = {n: cpu_s(p) for n, p in pids.items() if n != "flow"}
        fan_out(RunnerSpec(kind="dask", address=address), self.store(), 2 * TASKS)
        spent = {"flow": time.process_time() - here}
        time.sleep(5)  # the server writes down what it was sent
        spent |= {n: cpu_s(p) - before[n] for n, p in pids.items() if n != "flow"}
        spent["workers, all together"] = spent.pop("dask-0") + spent.pop("dask-1")
        found = {n: round(s / (2 * TASKS), 5) for n, s in spent.items()}
        print(f"CPU: {found}", file=sys.stderr, flush=True)
        return found

    def sensitivity(self, address: str) -> dict[str, float]:
        """Seconds of the demo's sensitivity in eight shards; the first run, in which workers load the model, is not counted."""
        from bench.simulated import sensitivity
        from mpq.spec import load_spec, parse_spec

        spec = load_spec(ROOT / "examples" / "demo.yaml").model_dump(mode="json")
        spec["calibration"] |= {"samples": 32, "batch": 4, "shards": 8}
        spec["runner"] = {"kind": "dask", "address": address}
        seconds = []
        for _ in range(RUNS + 1):
            seconds.append(sensitivity(parse_spec({**spec, "store": self.store()})))
        print(f"sensitivity: {seconds}", file=sys.stderr, flush=True)
        return summary(seconds[1:], 2)


def building() -> dict[str, Any]:
    """Seconds to build a model with random weights, and the demo's TTFT."""
    from timing import LLAMA_1B

    from mpq.models.checkpoint import load_config
    from mpq.timing.measure import base_ttft, timing_model

    def seconds(build: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        made = build()
        return round(time.perf_counter() - start, 3), made

    config = load_config(ROOT / "examples" / "demo")
    demo_s, model = seconds(lambda: timing_model(config, "fp32"))
    ttft_s = base_ttft(model, "fp32", 4, 256)
    llama_s, _ = seconds(lambda: timing_model(LLAMA_1B, "bf16"))
    return {"demo": demo_s, "Llama-3.2-1B": llama_s, "demo_ttft_s": round(ttft_s, 4)}


def simulation(
    task_s: float, central_s: float, build_s: float
) -> tuple[Figure, list[dict[str, Any]]]:
    """Campaigns over slices of every size, as a picture; and those of one configuration a task and of the chosen slices, in numbers."""
    from mpq.timing.slices import TaskCost, simulate, slice_size

    cost = TaskCost(build_s, CONFIGURATION_S, task_s, 1 / central_s)
    sizes = sorted(
        {max(1, round(1.25**k)) for k in range(45) if 1.25**k <= CONFIGURATIONS / min(DEVICES)}
    )
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes, rows = figure.add_subplot(), []
    for devices, colour in zip(DEVICES, ("#0072b2", "#d55e00"), strict=True):
        runs = {s: simulate(CONFIGURATIONS, devices, s, cost, SPREAD) for s in sizes}
        axes.plot(
            sizes,
            [r.seconds / 60 for r in runs.values()],
            color=colour,
            label=f"{devices:,} devices",
        )
        axes.axhline(
            CONFIGURATIONS * CONFIGURATION_S / devices / 60,
            color=colour,
            linestyle=":",
            linewidth=1,
        )
        chosen = slice_size(CONFIGURATIONS, devices, cost)
        for size in (1, chosen):
            run = simulate(CONFIGURATIONS, devices, size, cost, SPREAD)
            rows.append(
                {
                    "devices": devices,
                    "slice": size,
                    "minutes": round(run.seconds / 60, 2),
                    "measuring": round(run.measuring, 3),
                    "scheduler": round(run.scheduler, 3),
                }
            )
        axes.plot([chosen], [rows[-1]["minutes"]], "o", color=colour, label=f"chosen: {chosen}")
    axes.plot(
        sizes,
        [CONFIGURATIONS / s * central_s / 60 for s in sizes],
        "--",
        color="#444",
        linewidth=1,
        label="handing out alone",
    )
    axes.set(
        xscale="log", yscale="log", xlabel="configurations per task", ylabel="campaign (minutes)"
    )
    axes.set_ylim(bottom=CONFIGURATIONS * CONFIGURATION_S / max(DEVICES) / 60 / 3)
    axes.set_title(
        f"{CONFIGURATIONS:,} configurations of {CONFIGURATION_S:g} s; dotted: nothing but measuring",
        fontsize=10,
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return figure, rows


def main() -> None:
    load = os.getloadavg()[0]
    with services() as running:
        bench = Bench(running)
        result: dict[str, Any] = {
            "tasks": TASKS,
            "runs": RUNS,
            "load_average_before": round(load, 1),
        }
        task_s = result["task_s"] = {}
        task_s["threads"] = bench.overhead({}, "flow")
        task_s["cached"] = bench.overhead({}, "flow", cached=True)
        address = running.dask(workers=1)
        dask = {"kind": "dask", "address": address}
        bench.overhead(dask)  # the worker's imports
        task_s["dask, 1 worker"] = bench.overhead(dask)
        sensitivity = {"1 worker": bench.sensitivity(address)}
        running.dask_worker(address, "dask-1")
        bench.overhead(dask)
        task_s["dask, 2 workers"] = bench.overhead(dask, devices=2)
        sensitivity["2 workers"] = bench.sensitivity(address)
        cpu = bench.cpu(address)
        for name in ("dask-0", "dask-1"):
            running.kill(name)
        if find_spec("prefect_ray"):
            ray = {"kind": "ray", "address": running.ray(workers=1)}
            bench.overhead(ray)
            task_s["ray, 1 node"] = bench.overhead(ray)
            result["ray"] = version("ray")
        else:
            print("ray is not installed: left out", file=sys.stderr)
        result |= {"cpu_s_per_task": cpu, "sensitivity_s": sensitivity}
    ratio = sensitivity["1 worker"]["median"] / sensitivity["2 workers"]["median"]
    result["sensitivity_speedup"] = round(ratio, 2)
    result["build_s"] = building()
    # of CPU seconds, which the rest of the machine hardly changes
    central_s = max(cpu[n] for n in ("flow", "scheduler", "server"))
    figure, result["simulation"] = simulation(
        cpu["workers, all together"], central_s, result["build_s"]["Llama-3.2-1B"]
    )
    result["assumed"] = {
        "configurations": CONFIGURATIONS,
        "configuration_s": CONFIGURATION_S,
        "spread": SPREAD,
    }
    for path in (folder_of() / "fanout.png", ROOT / "docs" / "fan-out.png"):
        figure.savefig(path, dpi=150)
    result["load_average_after"] = round(os.getloadavg()[0], 1)
    record("fanout", result)


if __name__ == "__main__":
    main()
