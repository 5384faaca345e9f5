"""Models larger than the memory that they may take: what they compute, and what of them is in memory when."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import write_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from mpq import devices
from mpq.errors import MpqError
from mpq.evaluation.losses import evaluate_loss, losses
from mpq.loss.sensitivity import measure_sensitivity
from mpq.models import loading, placement
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.loading import load_model
from mpq.models.partition import partition
from mpq.models.placement import Spread, device_of, is_spread
from mpq.running.apply import Mixed

BLOCKS = Blocks(np.random.default_rng(0).integers(0, 97, (4, 12)))


def _weights(model: nn.Module) -> list[str]:
    """The weights that are in memory."""
    return [name for name, p in model.named_parameters() if p.device.type != "meta"]


def _ops(folder: Path) -> list[tuple[str, str]]:
    ops = [(o.name, o.kind) for g in partition(trace(load_config(folder))) for o in g.ops]
    return [(name, kind) for name, kind in ops if kind != "other"]


def _measured(model: nn.Module, ops: list[tuple[str, str]], base: str) -> list[object]:
    how = {"base": base, "batch": 2}
    tables = measure_sensitivity(model, ops, BLOCKS, formats=["fp8_e4m3"], **how)
    plan, of_base = dict.fromkeys((name for name, _ in ops), "int8"), losses(model, BLOCKS, 2)
    evaluated = evaluate_loss(model, plan, BLOCKS, of_base, seeds=[0], **how)
    return [table.write_json() for table in (*tables, evaluated)]


@pytest.mark.parametrize(
    ("model_type", "base"),
    [
        ("llama", "bf16"),  # stored in FP32, head tied to the embedding
        ("qwen2_moe", "fp32"),  # experts that are stacked while they are loaded
        ("gpt_oss", "bf16"),  # sinks, which a backward pass reads
    ],
)
def test_weights_from_disk_give_the_same_bit_for_bit(
    model_type: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sensitivity and evaluation do not depend on where weights lie, and afterwards none of them is left in memory."""
    folder = write_checkpoint(tmp_path / "m", model_type=model_type)
    whole, spread = load_model(folder, base), load_model(folder, base, memory=1000)
    assert not is_spread(whole)
    assert is_spread(spread)
    assert "stay on disk" in caplog.text
    assert not _weights(spread)
    ops = _ops(folder)
    assert _measured(spread, ops, base) == _measured(whole, ops, base)
    assert not _weights(spread)


def test_quantized_weights_are_decoded_to_disk(tmp_path: Path) -> None:
    """A checkpoint in native FP8 that is spread is what it is in memory, its head tied to its embedding as well."""
    folder, codes = write_checkpoint(tmp_path / "m"), {}
    for name, weight in load_file(folder / "model.safetensors").items():
        scale = weight.abs().max() / 448
        linear = name.endswith("_proj.weight")
        codes[name] = (weight / scale).to(torch.float8_e4m3fn) if linear else weight
        codes |= {f"{name}_scale_inv": scale.reshape(1, 1)} if linear else {}
    save_file(codes, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    tokens = torch.arange(20)[None]
    spread = load_model(folder, "bf16", memory=1000)
    assert not _weights(spread)
    assert torch.equal(spread(tokens).logits, load_model(folder, "bf16")(tokens).logits)


def test_some_in_memory_and_some_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where accelerate keeps a part at hand, hooks are nested otherwise: the numbers are the same, the part stays."""
    folder = write_checkpoint(tmp_path / "m")
    whole = load_model(folder, "fp32")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    part = Spread({"device_map": places}, "part of it")
    monkeypatch.setattr(loading, "spread_of", lambda *_: part)
    spread = load_model(folder, "fp32")
    kept = _weights(spread)
    assert is_spread(spread)
    assert 0 < len(kept) < len(list(whole.parameters()))
    ops = _ops(folder)
    assert _measured(spread, ops, "fp32") == _measured(whole, ops, "fp32")
    assert _weights(spread) == kept


def test_backward_holds_the_weights_of_one_layer(tmp_path: Path) -> None:
    """While a layer runs, in either pass, no other layer's weights are in its modules or held by the graph."""
    folder = write_checkpoint(tmp_path / "m")
    model = load_model(folder, "fp32", memory=1000)
    gates = [model.get_submodule(f"model.layers.{k}.mlp.gate_proj") for k in (0, 1)]
    brought: list[list[weakref.ref[torch.Tensor]]] = [[], []]
    runs: list[int] = []

    def noted(layer: int, x: torch.Tensor) -> torch.Tensor:
        runs.append(layer)
        assert not any(ref() is not None for ref in brought[1 - layer])
        assert all(f"layers.{layer}." in name for name in _weights(model) if "layers" in name)
        weight = gates[layer].weight
        brought[layer].append(weakref.ref(weight))
        return nn.functional.linear(x, weight)

    ops = [(f"model.layers.{k}.mlp.down_proj", "linear") for k in (0, 1)]
    with ExitStack() as stack:
        for k in (0, 1):
            stack.enter_context(placement.with_forward(gates[k], partial(noted, k)))
        how = {"formats": ["int8"], "base": "fp32", "batch": 4, "first_layer": False}
        measure_sensitivity(model, ops, BLOCKS, **how)
    # whether it is causal, forward and backward; then one forward and two backward passes
    assert runs == [0, 1, 1, 0, 0, 1, 1, 0, 1, 0]


def test_what_would_be_timed_must_be_at_hand(tmp_path: Path) -> None:
    """Native kernels of weights that come and go would be timed with their way: refused in a sentence."""
    model = load_model(write_checkpoint(tmp_path / "m"), "fp32", memory=1000)
    assert device_of(model) == torch.device("cpu")
    with pytest.raises(MpqError, match="too small for them"):
        Mixed(model, base="fp32", backend="native")


def test_the_base_model_is_transformers_own(tmp_path: Path) -> None:
    """In BF16 the logits are those of transformers: what is no weight, rotary frequencies, keeps its precision."""
    folder, tokens = write_checkpoint(tmp_path / "m"), torch.arange(60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for memory in (None, 1000):
        assert torch.equal(
            load_model(folder, "bf16", memory=memory)(tokens).logits, theirs(tokens).logits
        )


def test_offloaded_files_go_with_their_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacked experts lie in the user's cache as long as their model lives; what a killed process left goes first."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "m", model_type="mixtral")
    with placement.offload_folder() as (left, _):
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
        stale = Path(left).parent / f"{int(dead.stdout)}-x"
        stale.mkdir()
    model = load_model(folder, "fp32", memory=1000)
    offloaded = tmp_path / "cache" / "offloaded"
    assert [f.name.partition("-")[0] for f in offloaded.iterdir()] == [str(os.getpid())]
    assert any(offloaded.rglob("*.safetensors"))
    del model
    gc.collect()
    assert not list(offloaded.iterdir())


def test_free_memory_is_within_every_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free is what the strictest of cgroups (of both versions) and the process's own limits leaves."""
    monkeypatch.setattr(devices, "_CGROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    without = devices.free_memory()
    for folder, limit, used in (
        (tmp_path, "memory.max", "anon 100\nfile 1000000000\n"),
        (tmp_path / "memory", "memory.limit_in_bytes", "cache 5\ntotal_rss 100\n"),
    ):
        (folder / limit).write_text("1000\n")
        (folder / "memory.stat").write_text(used)
        assert devices.free_memory() == 900
        assert devices.memory_limit() == 1000
        (folder / limit).write_text("max\n" if limit == "memory.max" else f"{2**63 - 4096}\n")
        assert devices.free_memory() > 900
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = devices._entry(Path("/proc/self/status"), "VmData:") * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**28, hard))
    try:
        assert 0 < devices.free_memory() <= 2**28 < without
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_weights_are_counted_in_the_base_format(tmp_path: Path) -> None:
    """Whether a model fits is asked of its weights in the base format, however they are stored."""
    folder = write_checkpoint(tmp_path / "m")
    elements = sum(p.numel() for p in load_model(folder, "fp32").parameters())
    files = [folder / "model.safetensors"]
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        fits = elements * size * 2
        needed = placement.bytes_of(files, dtype)
        assert placement.spread_of(needed, "cpu", fits) is None
        assert placement.spread_of(needed, "cpu", fits - 1) is not None
    shutil.rmtree(folder)
