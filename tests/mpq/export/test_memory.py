"""What an export takes of memory: about one shard, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small import ROOT, small_config

from mpq.models.graph import build_on_meta

SHARDS, SHARD = 8, 32 * 2**20
ROOM = 4 * SHARD  # a shard read and written, and what rounding takes; the model has twice that
CHILD = """
import resource, sys
from pathlib import Path
from mpq.export.exporting import export
from mpq.export.skeleton import skeleton
from mpq.models.checkpoint import load_config
from mpq.program.plan import Plan

source, out, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
import mpq.export.shards, mpq.export.expressible, mpq.export.card
model = skeleton(load_config(source))
formats = {op: "int8" for op in model.linears if "mlp" in op}
plan = Plan("ip_m", "m", 0.01, "bf16", formats, 0.0, 0.0, 0.0, 1.0)
data = next(l for l in open("/proc/self/status") if l.startswith("VmData"))
limit = int(data.split()[1]) * 1024 + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(sum(export(plan, source, out).formats.values()))
"""


def test_peak_memory_is_about_a_shard(tmp_path: Path) -> None:
    """Eight shards of 32 MB are exported by a process that may allocate half of the model."""
    source = tmp_path / "model"
    source.mkdir()
    config = small_config(
        "llama", hidden_size=512, intermediate_size=4800, num_hidden_layers=SHARDS
    )
    config.save_pretrained(source)
    shapes = {n: t.shape for n, t in build_on_meta(config).state_dict().items()}
    placed = {}
    for layer in range(SHARDS):
        part = f"layers.{layer}."
        names = [n for n in shapes if part in n or (layer == 0 and ".layers." not in n)]
        tensors = {n: torch.empty(shapes[n]).uniform_(-1, 1) for n in names}
        file = f"model-{layer + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, source / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert sum(f.stat().st_size for f in source.glob("*.safetensors")) > 2 * ROOM
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out"), str(ROOM)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(3 * SHARDS)]
