"""Small models for the tests, and a run of one: real architectures from configurations, weights drawn by seed."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mpq.models.graph import trace
from mpq.models.partition import Group, groups_table, partition
from mpq.spec import RunSpec, parse_spec

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
DATABASE = Path()  # an empty Prefect database, once tests/flows has made one
API = ""  # the address of the tests' own Prefect server, once tests/flows has started one

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

_ROUTED = {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
#: configurations of tiny mixtures of experts: plain, with a shared expert, transposed with biases and interleaved gates, latent attention
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {
        **_ROUTED,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {**_ROUTED, "num_experts": 4, "moe_intermediate_size": 24},
    "gpt_oss": {
        **_ROUTED,
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def small_config(model_type: str, **more: object) -> AutoConfig:
    """A tiny configuration of the architecture, two layers of hidden size 32."""
    return AutoConfig.for_model(model_type, **{**SMALL, **more})


@cache
def _llama_parts() -> tuple[Group, ...]:
    return partition(trace(small_config("llama", num_key_value_heads=2)))


def llama_groups(batch: int = 1, length: int = 1024) -> pl.DataFrame:
    """The groups table of a tiny Llama with two heads for keys, traced once for all tests."""
    return groups_table(_llama_parts(), batch, length)


def small_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **more: object
) -> torch.nn.Module:
    """A tiny model of the architecture with weights large enough for its loss to depend on them."""
    torch.manual_seed(seed)
    model = (
        AutoModelForCausalLM.from_config(small_config(model_type, **more))
        .to(dtype)
        .eval()
        .requires_grad_(False)
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)
    return model


def write_checkpoint(folder: Path, seed: int = 0, model_type: str = "llama") -> Path:
    """A tiny checkpoint without a tokenizer: a Llama, tied and with grouped-query attention, or one of the mixtures."""
    more = MIXTURES.get(model_type, {"num_key_value_heads": 2, "tie_word_embeddings": True})
    small_model(model_type, seed=seed, **more).save_pretrained(folder)
    return folder


def small_spec(folder: Path) -> RunSpec:
    """A run that takes seconds: two layers of hidden size 32, two shards, one native and one emulated format."""
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 97, (24, 16)))
    text = {"source": str(folder / "tokens.npy"), "samples": 8, "length": 16, "batch": 4}
    return parse_spec(
        {
            "name": "tiny",
            "model": {
                "path": str(write_checkpoint(folder / "model")),
                "base": "fp32",
                "device": "cpu",
            },
            "calibration": {**text, "shards": 2},
            "evaluation": {**text, "seed": 1, "seeds": 1, "ttft_repeats": 3},
            "timing": {
                "batch": 2,
                "length": 16,
                "repeats": 2,
                "slice": None,
                "limit": 16,
                "target": None,
            },
            "objectives": {
                "et": {"formats": ["bf16"], "strategies": ["ip"]},
                "m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]},
            },
            "taus": [0.001, 0.01],
            "store": (folder / "store").as_uri(),
            "out": str(folder / "out"),
        }
    )


def short(spec: RunSpec) -> RunSpec:
    """The run without what is timed, and with one plan: eleven tasks in place of twenty."""
    return spec.model_copy(update={"objectives": {"m": spec.objectives["m"]}, "taus": (0.01,)})


def own_prefect(home: Path, server: bool = True) -> dict[str, str]:
    """The environment of a process that keeps its Prefect results under `home`.

    It starts a server of its own there, for which it has all the time it needs; without `server` it asks the tests' one.
    """
    if server and not home.exists():
        home.mkdir(parents=True)
        shutil.copy(DATABASE, home / "prefect.db")  # Prefect takes seconds to make an empty one
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        **({} if server else {"PREFECT_API_URL": API}),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
