"""The whole method at the paper's sizes on a GPU, from a bare checkout: partition, timing, gains, programs, and how the plans fare.

    PYTHONPATH=$PWD python3 bench/gpu_campaign.py 1b        Llama-3.2-1B's shape, batch 40 (`make bench-gpu` runs both)
    PYTHONPATH=$PWD python3 bench/gpu_campaign.py 8b        Llama-3.1-8B's shape, batch 10
    PYTHONPATH=$PWD python3 bench/gpu_campaign.py tiny --device cpu      the same program on a CPU in its native formats

Needs no Prefect, no network and no weights: weights are random, whose values decide no time. *Sensitivities are made up* (a
lognormal spread over ops, growing with depth, by seed): they decide which plans are tried, and nothing of what is reported of a plan's
time. The paper names no length: 1024 tokens here. Plans: IP-ET, IP-TT, Random, Prefix under ten budgets, everything in FP8,
everything in base; predicted TTFT is the base's less the sum of the gains, with design.interaction from whole plans
(design.anchors).

A machine that has torch, Triton, transformers, numpy, networkx and matplotlib lacks three packages. Where it has pip and no network,
fetch them elsewhere and carry the folder (58 MB; the second command makes 36 of them, which pip reads all the same):

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \\
        polars==2.1.0 polars-runtime-32==2.1.0 highspy==1.16.0
    for w in .whl/*.whl; do python3 -c "import sys, zipfile as z; a = z.ZipFile(sys.argv[1]); b = z.ZipFile('new', 'w', z.ZIP_LZMA); \\
        [b.writestr(n, a.read(n)) for n in a.namelist()]; b.close()" $w && mv new $w; done

and on that machine, in the checkout:

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD python3 bench/gpu_campaign.py 1b
    PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD python3 bench/gpu_campaign.py 8b

A command takes less than ten minutes (`--minutes`): it stops measuring in time and keeps what it has in bench/results/<device>/ (and in
$OUT, if that is set); with --resume it goes on from there. `--parts` selects from kernels, timing and plans.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_kernels
import numpy as np
import polars as pl
import torch
from gpu_plans import figure, plans, summary
from record import folder_of, recorded
from torch import nn
from transformers import LlamaConfig

from mpq.formats.format import get_format
from mpq.kernels import native_formats
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill, compiled_blocks
from mpq.timing.design import choices_of, design
from mpq.timing.gpu_state import gpu_state
from mpq.timing.measure import measure, timing_model

SIZES: dict[str, tuple[dict[str, Any], int, int]] = {  # the published config.json, batch, length
    "1b": (
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
        40,
        1024,
    ),
    "8b": (
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
        },
        10,
        1024,
    ),
    "tiny": (
        {
            "vocab_size": 131,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        2,
        24,
    ),
}
PARTS = ("kernels", "timing", "plans")
CHUNK, LIMIT = 8, 64  # configurations measured between two writes, and of one signature at most


@dataclass
class Campaign:
    """One model's campaign: what it runs, where its results go, and when it has to stop."""

    size: str
    device: str
    batch: int
    length: int
    repeats: int
    compiled: bool
    resume: bool
    out: Path
    end: float
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        cuda = self.device != "cpu"
        self.base, low = ("bf16", "fp8_e4m3") if cuda else ("fp32", "int8")
        kinds = {"linear": [low], "bgemm": [low if cuda else "bf16"]}
        self.formats = {
            kind: [f for f in names if f in native_formats(self.device, kind)]
            for kind, names in kinds.items()
        }  # type: ignore[arg-type]
        self.config = LlamaConfig(**SIZES[self.size][0], max_position_embeddings=8192)
        self.out.mkdir(parents=True, exist_ok=True)
        self.shape: dict[str, Any] = {
            "base": self.base,
            "batch": self.batch,
            "length": self.length,
            "compiled": self.compiled,
        }

    def say(self, *words: object) -> None:
        """A line of progress with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s]", *words, flush=True)

    def late(self, seconds: float = 0.0) -> bool:
        """Whether what takes `seconds` would end too late."""
        return time.monotonic() + seconds > self.end

    def path(self, name: str) -> Path:
        """A file of results; they carry size and mode in their names."""
        return self.out / f"campaign-{self.size}{'-compiled' if self.compiled else ''}-{name}"

    def earlier(self, name: str) -> pl.DataFrame | None:
        """The table that an earlier command left, if there is one to go on from and it is of the same shape."""
        if not (self.resume and self.path(name).exists()):
            return None
        frame = pl.read_parquet(self.path(name))
        same = frame.height and set(frame.select("batch", "length").rows()) == {
            (self.batch, self.length)
        }
        return frame if same else None

    def model(self) -> nn.Module:
        """Random weights, made where they shall be."""
        with torch.device(self.device):
            return timing_model(self.config, self.base)


def kernels(c: Campaign) -> dict[str, Any]:
    """Part `kernels`: the ceilings, each kernel of a layer beside them; the attention tile that was fastest."""
    base = getattr(torch, get_format(c.base).dtype)
    found = gpu_kernels.ceilings(c.device, base)
    c.say("ceilings", {k: f"{v:.3g}" for k, v in found.items()})
    n = c.config
    q, kv = n.num_attention_heads * n.head_dim, n.num_key_value_heads * n.head_dim
    shapes = {
        "q_proj": (n.hidden_size, q),
        "k_proj": (n.hidden_size, kv),
        "o_proj": (q, n.hidden_size),
        "up_proj": (n.hidden_size, n.intermediate_size),
        "down_proj": (n.intermediate_size, n.hidden_size),
    }
    rows = gpu_kernels.linears(shapes, c.batch * c.length, c.device, base)
    c.say("linears done")
    attention, tile = gpu_kernels.attentions(
        c.batch, c.length, n.num_attention_heads, n.num_key_value_heads, n.head_dim, c.device, base
    )
    frame = gpu_kernels.with_shares(rows + attention, found)
    frame.write_parquet(c.path("kernels.parquet"))
    title = f"Kernels of a {c.size} layer, {c.batch} x {c.length} tokens"
    gpu_kernels.roofline(frame, found, title).savefig(c.path("roofline.png"), dpi=150)
    for row in frame.iter_rows(named=True):
        c.say(
            f"{row['kernel']:18} {row['way']:44} {row['seconds'] * 1e6:9.1f} µs {row['flops'] / 1e12:8.2f} TFLOP/s "
            f"{row['bytes_per_s'] / 1e12:6.2f} TB/s {100 * row['share_of_ceiling']:4.0f} % of the ceiling"
        )
    return {"ceilings": found, "attention_tile": tile, "state": gpu_state(c.device)}


def base_by_mode(c: Campaign, model: nn.Module) -> dict[str, float]:
    """Median TTFT of the base, on a GPU eager, as a graph and compiled: which base is the best one is told, not assumed."""
    found = {}
    ways = (False, True) if c.device != "cpu" else (False,)
    for compiled in ways:
        with compiled_blocks(model, compiled):
            for graph in ways:
                prefill = Prefill(model, c.batch, c.length, compiled=compiled, graph=graph)
                timed = prefill.ready(Mixed(model, base=c.base, backend="native"), {})
                found[prefill.mode] = float(np.median([timed() for _ in range(c.repeats)]))
    c.say("base TTFT (s) by mode", {k: round(v, 4) for k, v in found.items()})
    best = min(found, key=found.__getitem__)
    if ("compiled" in best) != c.compiled:
        c.say(
            f"base is fastest {best}: call again with{'out' * c.compiled} --compile for plans against the best base"
        )
    return found


def choices_by_signature(c: Campaign, groups: pl.DataFrame) -> dict[str, list[tuple[str, ...]]]:
    """Each signature's formats by op."""
    choices: dict[str, list[tuple[str, ...]]] = {}
    for (signature, _), rows in groups.sort("order").group_by(
        ["signature", "group"], maintain_order=True
    ):
        choices.setdefault(str(signature), choices_of(rows, c.formats, c.base))
    return choices


def timing(c: Campaign, model: nn.Module, groups: pl.DataFrame) -> pl.DataFrame:
    """Part `timing`: every configuration of every signature that has not been measured, in chunks, each written when it is done."""
    done, name = c.earlier("timing.parquet"), "timing.parquet"
    seen = (
        set()
        if done is None
        else {(s, tuple(f)) for s, f in done.select("signature", "configuration").iter_rows()}
    )
    wanted = [
        (s, f)
        for s, choice in choices_by_signature(c, groups).items()
        for f in design(choice, LIMIT)
        if (s, f) not in seen
    ]
    random.Random(0).shuffle(wanted)
    place = {s: i for i, s in enumerate(groups["signature"].unique(maintain_order=True))}
    wanted.sort(
        key=lambda w: (place[w[0]], set(w[1]) != {c.base})
    )  # base first: plans can be made of what there is
    c.say(f"{len(wanted)} configurations to measure, {len(seen)} measured earlier")
    slowest = 0.0
    while wanted and not (done is not None and c.late(slowest)):
        signature, start = wanted[0][0], time.monotonic()
        chunk = [f for s, f in wanted[:CHUNK] if s == signature]
        wanted = wanted[len(chunk) :]
        rows = measure(model, groups, [(signature, chunk)], repeats=c.repeats, **c.shape)
        rows = rows.with_columns(pl.col("order_measured") + (0 if done is None else done.height))
        done = rows if done is None else pl.concat([done, rows], how="diagonal_relaxed")
        done.write_parquet(c.path(name))
        slowest = max(slowest, time.monotonic() - start)
        best = rows.sort("gain_s")[-1].row(0, named=True)
        c.say(
            f"{len(wanted)} left; of {best['instances']} x {signature[:40]} the best gains "
            f"{1e3 * best['gain_s'] * best['instances']:.2f} ms of {1e3 * best['base_ttft_s']:.1f}: {', '.join(best['configuration'])}"
        )
    if wanted:
        c.say(f"out of time with {len(wanted)} configurations unmeasured: call again with --resume")
    assert done is not None
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="of kernels, timing, plans; by commas"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="each block through torch.compile, in a graph on CUDA",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the timings of an earlier command"
    )
    parser.add_argument(
        "--out", type=Path, help="the folder of results; bench/results/<device> if left out"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="stop measuring after this time")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts {asked.parts}: expected some of {', '.join(PARTS)}")
    if asked.device != "cpu" and "fp8_e4m3" not in native_formats(asked.device):
        parser.error(
            f"{asked.device} has no FP8 (needs an NVIDIA GPU of compute capability 8.9 or newer): try tiny --device cpu"
        )
    _, batch, length = SIZES[asked.size]
    end = time.monotonic() + 60 * asked.minutes
    c = Campaign(
        asked.size,
        asked.device,
        asked.batch or batch,
        asked.length or length,
        asked.repeats,
        asked.compile,
        asked.resume,
        asked.out or folder_of(asked.device),
        end,
    )
    kept = c.path("summary.json")
    result: dict[str, Any] = (
        json.loads(kept.read_text())["result"] if c.resume and kept.exists() else {}
    )
    result |= {
        **c.shape,
        "size": c.size,
        "repeats": c.repeats,
        "formats": c.formats,
        "sensitivities": "made up",
    }
    if "kernels" in parts:
        result["kernels"] = kernels(c)
    elif tile := result.get("kernels", {}).get("attention_tile"):
        from mpq.kernels import flash

        flash.TILES[max(64, 2 ** math.ceil(math.log2(c.config.head_dim)))] = tuple(tile)
    frame, timed = pl.DataFrame(), None
    if {"timing", "plans"} & set(parts):
        groups = groups_table(partition(trace(c.config)), c.batch, c.length)
        c.say(
            f"{groups.height} ops in {groups['group'].n_unique()} groups of {groups['signature'].n_unique()} signatures"
        )
        model = c.model()
        c.say(
            f"model made, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters in {c.base}"
        )
        result["base_ttft_s_by_mode"] = base_by_mode(c, model)
        timed = timing(c, model, groups) if "timing" in parts else c.earlier("timing.parquet")
        if "plans" in parts and timed is not None:
            frame = plans(c, model, groups, timed)
    if not frame.is_empty():
        figure(frame, f"{c.size}, {c.batch} x {c.length} tokens").savefig(
            c.path("plans.png"), dpi=150
        )
    result |= summary(timed, frame)
    text = recorded("gpu_campaign", result, c.device)
    kept.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    if os.environ.get("OUT"):
        for path in c.out.glob(c.path("*").name):
            shutil.copy(path, os.environ["OUT"])
    print(json.dumps(text))


if __name__ == "__main__":
    main()
