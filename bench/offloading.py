"""Sensitivity and evaluation of a checkpoint twice as large as the memory that they may take: `python bench/offloading.py`.

A Llama with random weights in FP32, 6.1 GB in shards of 0.4 GB, is measured in three processes of its own: `limited`, which
may take 3 GB, so that mpq finds that it does not fit and reads it layer by layer; `free`, without a limit, so in memory; and
`whole`, under the limit with the spreading taken out, which must fail. The limit is on resident memory, all of it: a
process that is beyond it, mapped pages of files counted although the system could take them back, is ended (it is looked at
every 5 ms; `peak_bytes` is the kernel's own high-water mark). The system's cache of files is not counted: it is everybody's,
and a limited run begins with nothing of the checkpoint in it.

Tables of both runs are compared by content, every bit of it. `--smoke` takes 2 layers and records nothing. Last line: JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from record import record
from safetensors.torch import save_file
from transformers import LlamaConfig

from mpq.evaluation.losses import evaluate_loss, losses
from mpq.loss.sensitivity import measure_sensitivity
from mpq.models import loading
from mpq.models.blocks import Blocks
from mpq.models.graph import trace
from mpq.models.partition import partition
from mpq.models.placement import is_spread

LIMIT, LAYERS, BATCH, LENGTH = 3_000_000_000, 32, 1, 64
FORMATS = ["int8"]


def config_of(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def write_checkpoint(folder: Path, layers: int) -> int:
    """The checkpoint, a shard for two layers, written one by one; returns its bytes of weights."""
    config = config_of(layers)
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = hidden // 2
    of_layer = {
        **{f"self_attn.{x}_proj": (hidden, hidden) for x in "qo"},
        **{f"self_attn.{x}_proj": (kv, hidden) for x in "kv"},
        **{f"mlp.{x}_proj": (inner, hidden) for x in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
    }
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "model-ends.safetensors": {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "lm_head.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
    }
    for k in range(layers):
        shard = shards.setdefault(f"model-{k // 2:02}.safetensors", {})
        shard |= {f"model.layers.{k}.{name}.weight": shape for name, shape in of_layer.items()}
    for file, shapes in shards.items():
        tensors = {
            name: torch.randn(shape, generator=draw) * 0.03 if len(shape) > 1 else torch.ones(shape)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum((folder / file).stat().st_size for file in shards)


def _watch(limit: int) -> None:
    """End the process once more than `limit` bytes of it are resident."""

    def watch() -> None:
        start = time.perf_counter()
        while True:
            if _status("VmRSS") > limit:
                found = {"failed": f"beyond the limit after {time.perf_counter() - start:.1f} s"}
                print(json.dumps({**found, "peak_bytes": _status("VmHWM")}), flush=True)
                os._exit(0)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _measured(folder: Path, how: str, ops: list[tuple[str, str]]) -> dict[str, Any]:
    """One process's work: `free`, `limited` or `whole`, under the limit without spreading."""
    if how != "free":
        _watch(LIMIT)
    if how == "whole":
        loading.spread_of = lambda *_: None  # type: ignore[assignment]
    seconds: dict[str, float] = {}
    tables: dict[str, pl.DataFrame] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    memory = LIMIT if how == "limited" else None
    model = timed("load", lambda: loading.load_model(folder, "fp32", memory=memory))
    blocks = Blocks(np.random.default_rng(0).integers(0, 4096, (BATCH, LENGTH)))
    tables["sensitivity"], tables["loss"] = timed(
        "sensitivity",
        lambda: measure_sensitivity(model, ops, blocks, formats=FORMATS, base="fp32", batch=BATCH),
    )
    base = timed("base_losses", lambda: losses(model, blocks, BATCH))
    plan = {op: "int8" for op, kind in ops if kind == "linear"}
    tables["evaluation"] = timed(
        "evaluation",
        lambda: evaluate_loss(model, plan, blocks, base, base="fp32", seeds=[0], batch=BATCH),
    )
    return {
        "spread": is_spread(model),
        "seconds": seconds,
        "peak_bytes": _status("VmHWM"),
        "tables": {name: _digest(table) for name, table in tables.items()},
    }


def _digest(table: pl.DataFrame) -> str:
    return hashlib.sha256(table.write_json().encode()).hexdigest()


def run(folder: Path, how: str) -> dict[str, Any]:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:  # nothing of it is in the system's cache from before
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--run", str(folder), how]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(how, found, flush=True)
    return found


def main(smoke: bool = False) -> None:
    layers = 2 if smoke else LAYERS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write_checkpoint(folder, layers)
        groups = partition(trace(config_of(layers)))
        ops = [(op.name, op.kind) for group in groups for op in group.ops if op.kind != "other"]
        (folder / "ops.json").write_text(json.dumps(ops))
        runs = {how: run(folder, how) for how in ("limited", "free", "whole")}
    if smoke:
        return
    record(
        "offloading",
        {
            "weight_bytes": weights,
            "limit_bytes": LIMIT,
            "tokens": [BATCH, LENGTH],
            "formats": FORMATS,
            "ops": len(ops),
            "identical": runs["limited"]["tables"] == runs["free"]["tables"],
            "runs": runs,
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        where = Path(sys.argv[2])
        print(
            json.dumps(_measured(where, sys.argv[3], json.loads((where / "ops.json").read_text())))
        )
    else:
        main("--smoke" in sys.argv)
