"""Tiny checkpoints of several architectures, and plans for them, to be exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import small_model

from mpq.export import reload
from mpq.models.checkpoint import fingerprint
from mpq.models.loading import load_model
from mpq.program.plan import Plan

MORE: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
    "gpt_neox": {"use_parallel_residual": True, "tie_word_embeddings": False},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


def checkpoint(
    at: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **how: object
) -> Path:
    """A tiny checkpoint of the architecture, its biases drawn as well."""
    model = small_model(kind, **{**MORE.get(kind, {}), **how})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.2)
    model.to(dtype).save_pretrained(at)
    return at


def plan_of(source: Path, formats: Mapping[str, str], base: str = "fp32") -> Plan:
    """A plan for the checkpoint with these formats, all predictions made up."""
    return Plan(
        strategy="ip_m",
        objective="m",
        tau=0.01,
        base=base,
        formats=dict(formats),
        predicted_loss_mse=1e-4,
        budget=1e-3,
        predicted_gain=1e3,
        mean_square_loss=16.0,
        fingerprint=fingerprint(source),
        provenance={"model": "org/tiny", "gains": "abc"},
    )


def linears(source: Path, base: str = "fp32") -> list[str]:
    """The model's linears, head included."""
    return [
        n for n, m in load_model(source, base).named_modules() if isinstance(m, torch.nn.Linear)
    ]


def mixed(ops: list[str]) -> dict[str, str]:
    """Attention in INT8, the rest of each layer in FP8, everything outside of layers in base."""
    return {
        op: "fp32" if ".layers." not in op else "int8" if "att" in op else "fp8_e4m3" for op in ops
    }


def reloaded(request: Mapping[str, Any], work: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """What mpq.export.check has a fresh process do, which takes five seconds to import what it needs, in this one."""
    asked, answer, out = (work / name for name in ("asked.json", "answer.json", "out.npy"))
    asked.write_text(json.dumps({**request, "out": str(out), "answer": str(answer)}))
    reload.main(asked)
    found = json.loads(answer.read_text())
    return np.load(out), found["differing"], found["caches_unread"]
