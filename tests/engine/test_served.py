"""What vLLM makes of exported checkpoints: it answers as transformers does, within what rounding does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from small import DEMO
from small_export import checkpoint, linears, plan_of

from mpq.errors import MpqError
from mpq.export.exporting import export
from mpq.export.reload import loaded_model, log_probabilities
from mpq.method import read_text
from mpq.models.experts import dispatched, products_of
from mpq.models.loading import load_model
from mpq.running.apply import apply_plan
from mpq.serving import EngineProcess

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "phi3": {},
    "qwen3_moe": {"head_dim": 32, **EXPERTS},
}
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 128))


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of each token that has one before it, (N, T − 1): the base model's in mpq, and the export's in two engines."""

    base: np.ndarray
    transformers: np.ndarray
    vllm: np.ndarray

    @property
    def rounding(self) -> float:
        """How far rounding moves a log-probability, root mean square (nats)."""
        return float(np.sqrt(np.mean((self.transformers - self.base) ** 2)))

    @property
    def apart(self) -> float:
        """How far the engines are apart, root mean square (nats)."""
        return float(np.sqrt(np.mean((self.vllm - self.transformers) ** 2)))

    @property
    def means_apart(self) -> float:
        """How far their mean negative log-likelihoods are (nats)."""
        return abs(float(np.mean(self.vllm - self.transformers)))


def of_next(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """The model's log-probability of each token that has one before it."""
    with torch.inference_mode():
        every = log_probabilities(model, torch.from_numpy(tokens)).numpy()
    return np.take_along_axis(every, tokens[:, 1:, None], -1)[..., 0]


def of_vllm(
    engine: EngineProcess,
    folder: Path,
    tokens: np.ndarray,
    dtype: str = "float32",
    **more: object,
) -> np.ndarray:
    """The same from vLLM."""
    how = {
        "dtype": dtype,
        "tokens": tokens.shape[1] + 2,
        "rows": len(tokens),
        "dummy": False,
        **more,
    }
    engine.ask("open", name="one", folder=str(folder), **how)
    try:
        return np.array(engine.ask("log_probabilities", name="one", tokens=tokens.tolist()))
    finally:
        engine.ask("close", name="one")


def answers(
    vllm: EngineProcess,
    source: Path,
    out: Path,
    formats: Mapping[str, str],
    tokens: np.ndarray = TOKENS,
    **how: str,
) -> Answers:
    """The formats exported, and what each makes of the export."""
    export(plan_of(source, formats), source, out, **how)  # type: ignore[arg-type]
    return Answers(
        of_next(load_model(source, "fp32"), tokens),
        of_next(loaded_model(out, "fp32"), tokens),
        of_vllm(vllm, out, tokens),
    )


def formats_of(kind: str, ops: list[str]) -> dict[str, str]:
    """All linears of the layers in one format; or attention in INT8, the first layer's MLP in FP8, and the others in base."""
    inside = [op for op in ops if ".layers." in op]
    if kind != "mixed":
        return dict.fromkeys(inside, kind)
    of = {True: "int8", False: "fp8_e4m3"}
    return {op: of["attn" in op] for op in inside if "attn" in op or ".layers.0." in op}


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3", "mixed"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_vllm_answers_as_transformers_does(
    tmp_path: Path, engine: EngineProcess, architecture: str, kind: str
) -> None:
    """INT8, FP8, and both beside base: five architectures load, and differ by no more than rounding moves.

    INT8 is not exact: transformers' scales are other ones (amax / 127.5), and oneDNN's sums saturate without VNNI. Two
    roundings that know nothing of each other are √2 times as far apart as each is from base.
    """
    source = checkpoint(tmp_path / "model", architecture, **SHAPE, **ARCHITECTURES[architecture])
    found = answers(engine, source, tmp_path / "out", formats_of(kind, linears(source)))
    assert found.apart <= (0.15 if kind == "fp8_e4m3" else 1.5) * found.rounding
    assert found.means_apart <= 4 * found.rounding / np.sqrt(found.vllm.size)


def test_vllm_answers_with_four_bits(tmp_path: Path, engine: EngineProcess) -> None:
    """W4A8, the one scheme of four bits that vLLM has a kernel for on any CPU: no further apart than two roundings of INT8
    activations, which are a small part of what four bits do."""
    source = checkpoint(tmp_path / "model", "llama", **SHAPE, **ARCHITECTURES["llama"])
    found = answers(engine, source, tmp_path / "out", formats_of("w4a8", linears(source)))
    assert found.apart <= 0.5 * found.rounding
    assert found.means_apart <= 4 * found.rounding / np.sqrt(found.vllm.size)


@pytest.mark.parametrize(
    ("architecture", "kind", "lacks", "share"),
    [
        (
            "qwen3_moe",
            "int8",
            "No Int8 MoE backend",
            4,
        ),  # BF16's own rounding does as much, or more
        ("qwen3_moe", "fp8_e4m3", "Unsupported FP8 MoE backend", 4),
        ("qwen3_moe", "w4a16_g32", "No WNA16 MoE backend", 0.5),
        ("mixtral", "w4a16_g32", "No WNA16 MoE backend", 0.5),
        ("granitemoe", "w4a16_g32", "No WNA16 MoE backend", 0.5),  # of one tensor in the source
    ],
)
def test_vllm_answers_with_lowered_experts(
    tmp_path: Path,
    engine: EngineProcess,
    architecture: str,
    kind: str,
    lacks: str,
    share: float,
) -> None:
    """Experts under the checkpoint's names, named by a pattern: vLLM takes their format for the layer's, and answers as mpq's run
    of the plan does where it has a kernel for them, which on a CPU asks for AMX, or AMD Zen with zentorch; else it says so."""
    shape = {**SHAPE, **ARCHITECTURES["qwen3_moe"], "num_local_experts": 4}
    shape |= {"attention_multiplier": 0.2, "logits_scaling": 6.0}  # Granite's
    source = checkpoint(tmp_path / "model", architecture, dtype=torch.bfloat16, **shape)
    model = load_model(source, "bf16")
    formats = {
        f"{name}.{product}": kind
        for name, module in model.named_modules()
        if dispatched(module)
        for product in products_of(module)
    }
    assert len(formats) == 4
    export(plan_of(source, formats, "bf16"), source, tmp_path / "out")
    try:
        found = of_vllm(engine, tmp_path / "out", TOKENS, "bfloat16")
    except MpqError as why:
        if lacks not in str(why):
            raise
        pytest.skip(f"{why}")
    base = of_next(model, TOKENS)
    with apply_plan(model, formats, base="bf16"):
        plan = of_next(model, TOKENS)
    answered = Answers(base, plan, found)
    assert answered.apart <= share * answered.rounding
    assert answered.means_apart <= 4 * answered.rounding / np.sqrt(found.size)


def test_vllm_finds_linears_that_transformers_calls_otherwise(
    tmp_path: Path, engine: EngineProcess
) -> None:
    """Hunyuan-3's shared experts are `shared_mlp` in its checkpoints and in vLLM, `shared_experts` in transformers: the export has
    the checkpoint's names, which both load."""
    more = {**ARCHITECTURES["qwen3_moe"], "mlp_layer_types": ["dense", "sparse"]}
    more |= {"num_shared_experts": 1, "eos_token_id": 1}
    source = checkpoint(tmp_path / "model", "hy_v3", **{**SHAPE, **more})
    config = json.loads((source / "config.json").read_text())
    config |= {"first_k_dense_replace": 1, "expert_hidden_dim": 64}  # what vLLM asks for
    config |= {"qk_norm": True, "route_norm": True}
    (source / "config.json").write_text(json.dumps(config))
    formats = formats_of("int8", [op for op in linears(source) if op.split(".")[-1] != "gate"])
    assert any("shared_experts" in op for op in formats)
    found = answers(engine, source, tmp_path / "out", formats)
    assert found.apart <= 1.5 * found.rounding
    assert found.means_apart <= 4 * found.rounding / np.sqrt(found.vllm.size)


def test_a_trained_model_keeps_its_loss(tmp_path: Path, engine: EngineProcess) -> None:
    """The demo checkpoint in INT8, FP8 and base: vLLM's mean loss on held-out text is transformers' within 0.005 nats."""
    text = read_text(DEMO, str(DEMO / "heldout.txt"), samples=3, length=256)
    tokens = np.ascontiguousarray(text.tokens, np.int64)
    found = answers(engine, DEMO, tmp_path / "out", formats_of("mixed", linears(DEMO)), tokens)
    assert 1 < -found.base.mean() < 3
    assert found.means_apart < 0.005


def test_what_vllm_answers_wrongly_is_refused(tmp_path: Path, engine: EngineProcess) -> None:
    """q and v in INT8, k in FP8: the exporter refuses that for vLLM, which loads it, answers, and is wrong by far.

    Where this fails because vLLM agrees with transformers or refuses the folder, vLLM compares the parts of a fused layer now:
    then take its layers out of mpq/serving/fused.py.
    """
    text = read_text(DEMO, str(DEMO / "heldout.txt"), samples=3, length=256)
    tokens = np.ascontiguousarray(text.tokens, np.int64)
    of = {"q_proj": "int8", "k_proj": "fp8_e4m3", "v_proj": "int8"}
    formats = {op: of.get(op.rpartition(".")[2], "int8") for op in linears(DEMO) if "layers" in op}
    with pytest.raises(MpqError, match="vllm multiplies q_proj, k_proj, v_proj"):
        export(plan_of(DEMO, formats), DEMO, tmp_path / "refused")
    found = answers(engine, DEMO, tmp_path / "out", formats, tokens, engine="transformers")
    assert abs(found.transformers.mean() - found.base.mean()) < 0.01
    assert found.transformers.mean() - found.vllm.mean() > 0.2
