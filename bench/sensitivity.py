"""Cost of sensitivity against a plain training step's forward and backward, in one run, interleaved.

    python bench/sensitivity.py

For two sizes of Llama on the CPU: seconds (median of pairs) and peak memory (each in a process of its own, less what the
loaded model takes, plus its weights). The plain step is transformers' own: SDPA attention, gradients on every parameter. Last line: JSON.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from record import record
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.loss.cross_entropy import sample_losses
from mpq.loss.sensitivity import measure_sensitivity
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
BATCH, LENGTH, PAIRS = 8, 256, 7
FORMATS = ["bf16", "fp8_e4m3", "int8"]


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


def ours(model: LlamaForCausalLM, blocks: Blocks, ops: list[tuple[str, str]]) -> None:
    model.requires_grad_(False)
    measure_sensitivity(model, ops, blocks, formats=FORMATS, base="fp32", batch=BATCH)


def peak_bytes(size: str, which: str) -> int:
    """Peak resident memory of one step above that of the loaded model, in a process of its own."""
    command = [sys.executable, __file__, "--peak", size, which]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def _peak(size: str, which: str) -> None:
    model = model_of(size)
    ops = [(op.name, op.kind) for group in partition(trace(model.config)) for op in group.ops]
    blocks = Blocks(np.random.default_rng(0).integers(0, 2048, (BATCH, LENGTH)))
    before = _high_water()
    ours(model, blocks, ops) if which == "ours" else plain_step(model, blocks)
    print(_high_water() - before)


def _high_water() -> int:
    """Peak resident bytes of this program alone: getrusage's peak would begin with that of the process it was forked from."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def main() -> None:
    results = []
    for size in SIZES:
        model = model_of(size)
        ops = [(op.name, op.kind) for group in partition(trace(model.config)) for op in group.ops]
        blocks = Blocks(np.random.default_rng(0).integers(0, 2048, (BATCH, LENGTH)))
        ours(model, blocks, ops)
        plain_step(model, blocks)
        ratios, seconds = [], []
        for _ in range(PAIRS):
            start = time.perf_counter()
            plain_step(model, blocks)
            middle = time.perf_counter()
            ours(model, blocks, ops)
            end = time.perf_counter()
            ratios.append((end - middle) / (middle - start))
            seconds.append((middle - start, end - middle))
        weights = sum(p.numel() * 4 for p in model.parameters())
        plain, sensitivity = peak_bytes(size, "plain"), peak_bytes(size, "ours")
        results.append(
            {
                "size": size,
                "parameters": weights // 4,
                "plain_s": float(np.median([s[0] for s in seconds])),
                "sensitivity_s": float(np.median([s[1] for s in seconds])),
                "time_ratio": float(np.median(ratios)),
                "time_ratio_range": [min(ratios), max(ratios)],
                "plain_peak_bytes": plain + weights,
                "sensitivity_peak_bytes": sensitivity + weights,
                "peak_ratio": (sensitivity + weights) / (plain + weights),
            }
        )
        print(results[-1], flush=True)
    record("sensitivity", {"tokens": [BATCH, LENGTH], "pairs": PAIRS, "sizes": results})


if __name__ == "__main__":
    _peak(*sys.argv[2:]) if sys.argv[1:2] == ["--peak"] else main()
