"""ModelOpt's AutoQuantize (nvidia-modelopt 0.47), by gradient or by KL divergence: `auto_quantize` once, solved for each target
as `get_auto_quantize_config` does. Runs in `make peers`' environment of it.

NVFP4 has no kernel of its own for a CPU: `nvfp4` stands in, the same rounding. Weights have a scale a channel and activations one a token, as in mpq; what rounds is then mpq's alone. With ties it groups
q, k, v and gate, up as shipped; without, its rules for these are taken away.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.quantization import algorithms, tensor_quant
from task import Plan, Task, answer
from transformers import AutoModelForCausalLM

BATCH = 4
NAMES = {
    "NONE": "base",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8_e4m3",
    "NVFP4_DEFAULT_CFG": "nvfp4",
}


def nvfp4(inputs: torch.Tensor, block_size: int, amax: torch.Tensor, *_: Any) -> torch.Tensor:
    """Blocks of a row rounded to E2M1, a block's scale to E4M3 under one of the whole tensor."""
    blocks = inputs.float().unflatten(-1, (-1, block_size))
    whole = (amax.amax() / (6 * 448)).clamp(min=1e-30)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (largest / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    scaled = (blocks / scale.clamp(min=1e-30)).clamp(-6, 6)
    size = scaled.abs()
    step = 0.5 + 0.5 * (size >= 2) + 1.0 * (size >= 4)  # E2M1 has 0, 0.5 … 2, 3, 4, 6
    return ((scaled / step).round() * step * scale).flatten(-2).to(inputs.dtype)


def formats(task: Task) -> list[dict[str, Any]]:
    """Its configurations of the task's formats."""
    fp8 = mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG
    int8 = copy.deepcopy(fp8)
    for entry in int8["quant_cfg"]:
        if "num_bits" in (entry.get("cfg") or {}):
            entry["cfg"]["num_bits"] = 8
    configurations = {"fp8_e4m3": fp8, "int8": int8, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
    return [configurations[name] for name in task.formats]


def score(task: Task) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32)
    tensor_quant.dynamic_block_quantize_op = nvfp4
    if not task.ties:
        for searcher in (
            algorithms.AutoQuantizeGradientSearcher,
            algorithms.AutoQuantizeKLDivSearcher,
        ):
            searcher.quant_grouping_rules = []
    tokens = torch.from_numpy(np.load(task.tokens))
    batches = [{"input_ids": t, "labels": t} for t in tokens.split(BATCH)]
    by_kl = sys.argv[3] == "modelopt-kl"
    if by_kl:  # its log-softmax is compiled and asks for a process group
        algorithms._get_log_softmax_dist = lambda x, group: torch.log_softmax(x.float(), -1)
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": max(task.targets)},
        quantization_formats=formats(task),
        data_loader=batches,
        forward_step=lambda m, b: m(**b).logits if by_kl else m(**b),
        loss_func=None if by_kl else (lambda out, b: out.loss),
        disabled_layers=["*lm_head*", "*embed*"],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="kl_div" if by_kl else "gradient",
    )
    # the head is not decided, and does not count
    decided = {
        name: of
        for name, of in state["candidate_stats"].items()
        if set(of["module_names"]) <= task.ops.keys()
    }
    return {**state, "candidate_stats": decided, "cost_denominator": None}


def solve(task: Task, state: dict[str, Any], target: float) -> Plan:
    recipes = algorithms._resolve_best_recipe(state, {"effective_bits": target})
    plan = dict.fromkeys(task.ops, "base")
    for group, recipe in recipes.items():
        for op in state["candidate_stats"][group]["module_names"]:
            name = str(recipe).partition("(")[0]
            plan[op] = NAMES.get(name, "int8")  # a configuration of one's own has a number
    return plan


if __name__ == "__main__":
    answer(score, solve)
