"""Cost of sensitivity against a plain training step's forward and backward, in one run, interleaved.

    python bench/sensitivity.py

For two sizes of Llama on the CPU and four formats: seconds (median of interleaved rounds) and peak memory (each in a
process of its own, less what the loaded model takes, plus its weights), of the pass for the loss, the pass for KL, and
both through one forward; and seconds of the first layer's KL, which is run (first_layer.py): on at most 2048 tokens, which are
all here, however long the calibration is. The plain step is transformers' own: SDPA attention, gradients on every parameter. `--smoke`
takes one round of the small size and records nothing. Last line: JSON.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.loss.cross_entropy import sample_losses
from mpq.loss.first_layer import with_first_layer
from mpq.loss.sensitivity import Measure, measure_sensitivity
from mpq.models.blocks import Blocks
from mpq.models.graph import trace
from mpq.models.partition import partition

SIZES = {
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "medium": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}
BATCH, LENGTH, ROUNDS = 8, 256, 7
FORMATS = ["bf16", "fp8_e4m3", "fp8_e5m2", "int8"]
PASSES: dict[str, tuple[Measure, ...]] = {"loss": ("loss",), "kl": ("kl",), "both": ("loss", "kl")}


def model_of(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **SIZES[size])
    ).eval()


def plain_step(model: LlamaForCausalLM, blocks: Blocks) -> None:
    model.requires_grad_(True)
    for tokens in blocks.batches(BATCH):
        sample_losses(model, tokens).sum().backward()
        model.zero_grad(set_to_none=True)


def ours(
    model: LlamaForCausalLM, blocks: Blocks, ops: list[tuple[str, str]], measures: Sequence[Measure]
) -> None:
    model.requires_grad_(False)
    how = {"formats": FORMATS, "base": "fp32", "batch": BATCH, "measures": measures}
    measure_sensitivity(model, ops, blocks, **how, first_layer=False)


def seconds_of(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_bytes(size: str, which: str) -> int:
    """Peak resident memory of one step, `plain` or one of PASSES, above that of the loaded model, in a process of its own."""
    command = [sys.executable, __file__, "--peak", size, which]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def _peak(size: str, which: str) -> None:
    model = model_of(size)
    ops = [(op.name, op.kind) for group in partition(trace(model.config)) for op in group.ops]
    blocks = Blocks(np.random.default_rng(0).integers(0, 2048, (BATCH, LENGTH)))
    before = _high_water()
    plain_step(model, blocks) if which == "plain" else ours(model, blocks, ops, PASSES[which])
    print(_high_water() - before)


def _high_water() -> int:
    """Peak resident bytes of this program alone: getrusage's peak would begin with that of the process it was forked from."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def measured(size: str, rounds: int) -> dict[str, Any]:
    model = model_of(size)
    ops = [(op.name, op.kind) for group in partition(trace(model.config)) for op in group.ops]
    blocks = Blocks(np.random.default_rng(0).integers(0, 2048, (BATCH, LENGTH)))
    steps: dict[str, Callable[[], None]] = {"plain": partial(plain_step, model, blocks)}
    steps |= {name: partial(ours, model, blocks, ops, of) for name, of in PASSES.items()}
    table, _ = measure_sensitivity(model, ops, blocks, formats=FORMATS, base="fp32", batch=BATCH)
    steps["first_layer"] = partial(with_first_layer, table, model, blocks, BATCH)
    for step in steps.values():
        step()
    times = [{name: seconds_of(step) for name, step in steps.items()} for _ in range(rounds)]
    weights = sum(p.numel() * 4 for p in model.parameters())
    peaks = {name: peak_bytes(size, name) + weights for name in ("plain", *PASSES)}
    found: dict[str, Any] = {
        "size": size,
        "parameters": weights // 4,
        "plain_s": float(np.median([t["plain"] for t in times])),
        "plain_peak_bytes": peaks["plain"],
    }
    for name in (*PASSES, "first_layer"):
        ratios = [t[name] / t["plain"] for t in times]
        found[name] = {
            "seconds": float(np.median([t[name] for t in times])),
            "time_ratio": float(np.median(ratios)),
            "time_ratio_range": [min(ratios), max(ratios)],
        }
        if name in peaks:
            peak = {"peak_bytes": peaks[name], "peak_ratio": peaks[name] / peaks["plain"]}
            found[name] |= peak
    return found


def main(smoke: bool = False) -> None:
    results = []
    for size in ["small"] if smoke else SIZES:
        results.append(measured(size, 1 if smoke else ROUNDS))
        print(results[-1], flush=True)
    if not smoke:
        facts = {"tokens": [BATCH, LENGTH], "rounds": ROUNDS, "formats": FORMATS}
        record("sensitivity", {**facts, "sizes": results})


if __name__ == "__main__":
    _peak(*sys.argv[2:]) if sys.argv[1:2] == ["--peak"] else main("--smoke" in sys.argv)
