"""What vLLM makes of a cache in FP8, layer by layer: what mpq's own run of the plan does, but that on a CPU it cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import DEMO
from small_export import plan_of
from test_served import Answers, of_next, of_vllm
from torch import Tensor

from mpq.errors import MpqError
from mpq.export.exporting import export
from mpq.method import read_text
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.loading import load_model
from mpq.running.apply import apply_plan
from mpq.serving import EngineProcess

ATTENTIONS = [f"model.layers.{i}.self_attn" for i in range(4)]
LACKS = "FP8 KV cache on CPU requires x86 with AVX-512"


class Cut(AttentionHandler):
    """K and V with the mantissa bits that E4M3 has no room for taken off, as vLLM 0.32 does on a CPU (csrc/cpu/cpu_attn_fp8.hpp)."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.scales = float(key), float(value)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = (cut(x / s) * s for x, s in zip((key, value), self.scales, strict=True))
        return query, key, value


def cut(x: Tensor) -> Tensor:
    """`x` towards zero in E4M3, whose steps are an eighth of the binade, from 2^-6 on."""
    step = torch.exp2(torch.floor(torch.log2(x.abs())).clamp(min=-6) - 3)
    return torch.trunc(x / step) * step


def test_vllm_caches_as_the_plan_has_it(tmp_path: Path, engine: EngineProcess) -> None:
    """Two of four layers in FP8, the others excepted by the server's switch, and all four without it: vLLM's log-probabilities are
    those of K and V that are cut at the file's scales in these layers, so that the loss is mpq's within chance, and not base's."""
    text = read_text(DEMO, str(DEMO / "heldout.txt"), samples=3, length=256)
    tokens = np.ascontiguousarray(text.tokens, np.int64)
    model, folder = load_model(DEMO, "fp32"), tmp_path / "out"
    made = export(plan_of(DEMO, cached([1, 2])), DEMO, folder, check=text)
    assert made.check["passed"]
    assert made.check["kl_plan_reloaded"] < 0.01 * made.check["kl_base_plan"]
    assert made.serve == "vllm serve FOLDER --dtype float32 --kv-cache-dtype-skip-layers 0 3"
    scales, base = load_file(folder / "model.safetensors"), of_next(model, tokens)
    for layers, skipped in (([1, 2], ["0", "3"]), ([0, 1, 2, 3], [])):
        names = [ATTENTIONS[i] for i in layers]
        handlers = {n: Cut(scales[f"{n}.k_scale"], scales[f"{n}.v_scale"]) for n in names}
        with intercept(model, handlers):
            as_cut = of_next(model, tokens)
        with apply_plan(model, cached(layers), base="fp32"):
            planned = of_next(model, tokens)
        try:
            found = of_vllm(engine, folder, tokens, skipped=skipped)
        except MpqError as why:
            if LACKS not in str(why):
                raise
            pytest.skip(f"{why}")
        answered, of_plan = Answers(base, as_cut, found), Answers(base, planned, found)
        assert answered.rounding > 0.05
        assert answered.apart <= 0.05 * answered.rounding
        assert of_plan.means_apart <= 4 * of_plan.rounding / np.sqrt(base.size)
        # cut, an error has up to twice the size of a rounded one
        assert 1.2 < answered.rounding / of_plan.rounding < 2.5


def cached(layers: list[int]) -> dict[str, str]:
    """A plan with the cache of these layers in FP8."""
    return {f"{ATTENTIONS[i]}.{x}_matmul": "fp8_kv" for i in layers for x in ("qk", "av")}
