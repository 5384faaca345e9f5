"""The first layer's KL, run and differentiated, against what running these ops alone does to a model's predictions."""

from __future__ import annotations

import copy
import logging

import numpy as np
import polars as pl
import pytest
import torch
from small import MIXTURES, small_model

from mpq.evaluation.losses import divergences
from mpq.loss import first_layer, measure, merge
from mpq.loss.first_layer import with_first_layer
from mpq.models.blocks import Blocks
from mpq.running.apply import kind_of

# of few ids: each comes again many times
BLOCKS = Blocks(np.random.default_rng(0).integers(0, 12, (6, 40)))
FORMATS = ("fp8_e4m3", "int8")
ATTENTION = "model.layers.0.self_attn"
LINEARS = [f"{ATTENTION}.{x}_proj" for x in "qkv"]
PRODUCTS = [f"{ATTENTION}.{x}_matmul" for x in ("qk", "av")]
OTHERS = [f"{ATTENTION}.o_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def llama(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers, sure of something, as a trained model is."""
    model = small_model("llama", dtype=dtype, num_key_value_heads=2)
    model.lm_head.weight.mul_(4)
    return model


def summed(model: torch.nn.Module, ops: list[str], base: str = "fp32") -> pl.DataFrame:
    """The sensitivity table by sums alone."""
    kinds = [(op, str(kind_of(model, op))) for op in ops]
    how = {"formats": FORMATS, "base": base, "batch": 2, "measures": ("kl",)}
    return measure(model, kinds, BLOCKS, **how, first_layer=False).sensitivity


def kl_of(table: pl.DataFrame, ops: list[str], name: str) -> float:
    """The KL that the table gives ops in a format together."""
    rows = table.filter(pl.col("op").is_in(ops), format=name, noise_model="actual")
    return float(rows["kl"].sum())


def test_is_what_these_ops_do_to_the_predictions() -> None:
    """q, k and v in a format cost what is measured with them alone lowered, and so do both products; the sums, which are kept,
    said less. All else is as it was summed."""
    model = llama()
    table = summed(model, [*LINEARS, *PRODUCTS, *OTHERS])
    found = with_first_layer(table, model, BLOCKS, batch=2)
    low = {}
    for ops in (LINEARS, PRODUCTS):
        for name in FORMATS:
            alone = divergences(model, dict.fromkeys(ops, name), BLOCKS, base="fp32")
            assert kl_of(found, ops, name) == pytest.approx(alone.mean(), rel=1e-3)
            low[ops[0], name] = kl_of(table, ops, name) / alone.mean()
            rows = found.filter(pl.col("op").is_in(ops), format=name, noise_model="actual")
            error = alone.std(ddof=1) / np.sqrt(len(alone)) / alone.mean()
            assert (rows["kl_stderr"] / rows["kl"]).to_list() == pytest.approx([error] * len(rows))
    assert low[LINEARS[0], "fp8_e4m3"] < 0.85, "tokens of one id err alike"
    ran = pl.col("op").is_in([*LINEARS, *PRODUCTS]) & pl.col("format").is_in(FORMATS)
    ran &= pl.col("noise_model") == "actual"
    assert found.filter(~ran).equals(table.filter(~ran))
    assert found.filter(ran)["kl_summed"].equals(table.filter(ran)["kl"].alias("kl_summed"))
    shares = [t.filter(ran, format="int8", operand="weight")["kl"] for t in (found, table)]
    assert (shares[0] / shares[1]).n_unique() <= 3, "rows keep their shares of the sum"


def test_beside_a_base_in_sixteen_bits() -> None:
    """With a BF16 base, where running an op alone moves every later rounding as well, the KL is by tangents about that of the
    same weights in FP32, and not what a run gives; in FP64 they are within a tenth of FP32's run."""
    model = llama(torch.bfloat16)
    exact = llama()
    exact.load_state_dict(model.state_dict())
    ops = [*LINEARS, *PRODUCTS, *OTHERS]
    in_bf16 = with_first_layer(summed(model, ops, "bf16"), model, BLOCKS)
    in_fp64 = with_first_layer(summed(exact, ops), copy.deepcopy(exact).double(), BLOCKS)
    for part in (LINEARS, PRODUCTS):
        plan = dict.fromkeys(part, "int8")
        alone = divergences(exact, plan, BLOCKS, base="fp32").mean()
        assert kl_of(in_fp64, part, "int8") == pytest.approx(alone, rel=0.1)
        assert kl_of(in_bf16, part, "int8") == pytest.approx(alone, rel=0.3)
        assert divergences(model, plan, BLOCKS, base="bf16").mean() > 1.5 * alone


def test_small_errors_beside_fp16() -> None:
    """FP16 holds nothing below 6e-8: errors that an output projection makes as small as 1e-9 nats still come out right."""
    model = llama(torch.float16)
    model.model.layers[0].self_attn.o_proj.weight.mul_(1e-4)
    exact = llama()
    exact.load_state_dict(model.state_dict())
    table = summed(exact, [*LINEARS, *OTHERS])
    found = with_first_layer(table, model, BLOCKS)
    in_fp64 = with_first_layer(table, copy.deepcopy(exact).double(), BLOCKS)
    kl = kl_of(in_fp64, LINEARS, "int8")
    assert 0 < kl < 1e-9
    assert kl_of(found, LINEARS, "int8") == pytest.approx(kl, rel=0.2)


@pytest.mark.parametrize(
    ("architecture", "more", "attention"),
    [
        ("llama", {}, LINEARS),
        # its MLP reads ids too, beside attention, and mixes no tokens
        ("gpt_neox", {}, ["gpt_neox.layers.0.attention.query_key_value"]),
        ("gpt2", {}, []),  # learned positions
    ],
)
def test_which_ops_it_is_of(
    architecture: str, more: dict[str, object], attention: list[str]
) -> None:
    """The linears of the first layer that read ids alone, in a module that mixes tokens."""
    model = small_model(architecture, **more)
    linears = [n for n, m in model.named_modules() if kind_of(model, n) == "linear"]
    found = with_first_layer(summed(model, linears), model, BLOCKS)
    assert set(found.drop_nulls("kl_summed")["op"]) == set(attention)


def test_a_mixture_of_experts_in_sixteen_bits(caplog: pytest.LogCaptureFixture) -> None:
    """Grouped products have no forward derivative: experts run one by one, and q, k and v get the KL of the same weights in
    FP32, where they run as they round."""
    model = small_model("qwen3_moe", dtype=torch.bfloat16, **MIXTURES["qwen3_moe"])
    exact = small_model("qwen3_moe", **MIXTURES["qwen3_moe"])
    exact.load_state_dict(model.state_dict())
    table = summed(exact, LINEARS + OTHERS[:1])
    run = kl_of(with_first_layer(table, exact, BLOCKS), LINEARS, "int8")
    in_bf16 = with_first_layer(summed(model, LINEARS + OTHERS[:1], "bf16"), model, BLOCKS)
    assert "stays as it was summed" not in caplog.text
    assert in_bf16["kl_summed"].null_count() < in_bf16.height
    assert kl_of(in_bf16, LINEARS, "int8") == pytest.approx(run, rel=0.4)


def test_text_without_a_token_twice() -> None:
    """Where no token comes again nothing tells what reads ids alone, and nothing adds up: the sums stay."""
    model, once = llama(), Blocks(np.arange(80).reshape(2, 40))
    table = summed(model, LINEARS + OTHERS)
    assert with_first_layer(table, model, once, batch=2).equals(table)


def test_what_torch_cannot_differentiate_stays_summed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operation without a forward derivative is told, and the table comes back as it was."""

    def refuses(*of: object) -> None:
        raise NotImplementedError("Trying to use forward AD with scan that does not support it")

    model = llama(torch.bfloat16)
    table = summed(model, LINEARS + OTHERS, "bf16")
    monkeypatch.setattr(first_layer, "_quadratic", refuses)
    with caplog.at_level(logging.WARNING, "mpq"):
        assert with_first_layer(table, model, BLOCKS).equals(table)
    assert "first layer's KL stays as it was summed" in caplog.text
    assert "with scan" in caplog.text


def test_of_a_whole_measurement_and_of_parts() -> None:
    """`measure` has it unless it is asked for sums, and tables of parts of a text can be merged with it and without."""
    model = llama()
    how = {"formats": FORMATS, "base": "fp32", "batch": 2}
    ops = [(op, "linear") for op in LINEARS + OTHERS]
    whole = measure(model, ops, BLOCKS, **how)
    assert kl_of(whole.sensitivity, LINEARS, "int8") > kl_of(
        summed(model, LINEARS + OTHERS), LINEARS, "int8"
    )
    parts = [measure(model, ops, Blocks(BLOCKS.tokens[i : i + 3]), **how) for i in (0, 3)]
    merged = merge([p.sensitivity for p in parts], [p.loss for p in parts])[0]
    means = [kl_of(p.sensitivity, LINEARS, "int8") for p in parts]
    assert kl_of(merged, LINEARS, "int8") == pytest.approx(np.mean(means))
    assert merged.filter(op=LINEARS[0], format="int8")["kl_summed"].null_count() < 6
