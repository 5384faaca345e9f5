"""auto-round's AutoScheme (auto-round 0.16): its scores once, its dynamic program for each target, on the task's count of bits.
Runs in `make peers`' environment of it.

Schemes have a scale a channel and, for activations, one a token, as in mpq; ties are its `shared_layers`.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

# scores that another checkpoint of this name left behind must not be taken for this one's
os.environ["AR_AUTO_SCHEME_CACHE"] = tempfile.mkdtemp()

import numpy as np
import torch
from auto_round.auto_scheme import delta_loss
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from task import BITS, Plan, Task, answer
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
INT8 = PRESET_SCHEMES["INT8"]
SCHEMES = {
    "int8": INT8,
    "fp8_e4m3": QuantizationScheme.from_dict(
        {**asdict(INT8), "data_type": "fp", "act_data_type": "fp"}
    ),
    "nvfp4": PRESET_SCHEMES["NVFP4"],
    "base": PRESET_SCHEMES["BF16"],
}


class Found(Exception):
    """The scores, once it has them: what its program would be given."""


def score(task: Task) -> dict[str, list[list[Any]]]:
    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(task.tokens))
    names = [*task.formats, "base"]
    scheme = AutoScheme(
        avg_bits=max(task.targets),
        options=[SCHEMES[name] for name in names],
        shared_layers=task.ties or None,
        batch_size=BATCH,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        ignore_scale_zp_bits=True,
    )
    batches = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens.split(BATCH)]
    delta_loss.get_dataloader = lambda *_, **__: batches

    def program(scores: dict[str, list[list[Any]]], *_: Any, **__: Any) -> None:
        raise Found(scores)

    own = delta_loss.choose_bits_per_layer_with_path
    delta_loss.choose_bits_per_layer_with_path = program
    try:
        GenScheme(
            scheme,
            model,
            list(task.ops),
            {},
            dataset="given",
            device_map="cpu",
            tokenizer=AutoTokenizer.from_pretrained(Path(task.checkpoint)),
            enable_torch_compile=False,
        ).get_layer_config()
    except Found as found:
        scores: dict[str, list[list[Any]]] = found.args[0]
    finally:
        delta_loss.choose_bits_per_layer_with_path = own
    return {
        layer: [
            [i, int(BITS[names[i]] * sum(task.ops[op] for op in ops)), loss, ops]
            for i, _, loss, ops in options
        ]
        for layer, options in scores.items()
    }


def solve(task: Task, scores: dict[str, list[list[Any]]], target: float) -> Plan:
    limit = int(target * sum(task.ops.values()))
    _, path = delta_loss.choose_bits_per_layer_with_path(scores, limit)
    names = [*task.formats, "base"]
    return {op: names[i] for ops, i in path for op in ops}


if __name__ == "__main__":
    answer(score, solve)
