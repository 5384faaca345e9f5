"""Answers of several tokens: both parts of their time are measured, and their sum is what plans gain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from small import llama_groups, small_config, small_model

from mpq.errors import MpqError
from mpq.program.gains import gains_et
from mpq.program.strategies import choose
from mpq.running.apply import Mixed
from mpq.running.decode import Answers, Decode
from mpq.running.prefill import Prefill
from mpq.spec import RunSpec, TimingSpec, parse_spec
from mpq.store.tables import table
from mpq.timing.answer import base_answer_s, further_of
from mpq.timing.design import anchors, complete, sums
from mpq.timing.gain_model import GainModel
from mpq.timing.measure import measure, measure_ttft, timing_model

CONFIG = small_config("llama", num_key_value_heads=2, max_position_embeddings=128)
GROUPS = llama_groups(2, 16)
LINEARS = {op: kind for op, kind in GROUPS.select("op", "kind").iter_rows() if kind == "linear"}
FIRST = GROUPS.group_by("signature").agg(pl.col("group").min())["group"].implode()
# seconds of one op in the simulated device: of a prefill, and of a token
FIRST_S = {"fp32": 0.8, "int8": 0.5, "bf16": 0.7}
TOKEN_S = {"fp32": 0.02, "int8": 0.072, "bf16": 0.015}
OUTPUT = 101


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which INT8 is 1.6 times as fast at a prompt, and 3.6 times as slow at a token."""

    def ready(of: Mapping[str, float]) -> Callable[..., Callable[[], float]]:
        def forward(self: Prefill, mixed: Mixed, formats: Mapping[str, str]) -> Callable[[], float]:
            steps = getattr(self, "_steps", 1)
            return lambda: steps * sum(of[formats.get(op, "fp32")] for op in LINEARS)

        return forward

    monkeypatch.setattr(Prefill, "ready", ready(FIRST_S))
    monkeypatch.setattr(Decode, "ready", ready(TOKEN_S))


def timed(output: int, *formats: str) -> pl.DataFrame:
    """The timing table of groups whose linears are in one format each, for answers of so many tokens."""
    requests = []
    for (signature,), of in GROUPS.sort("order").group_by("signature", maintain_order=True):
        kinds = of.filter(group=of["group"][0])["kind"]
        requests.append(
            (
                str(signature),
                [tuple(f if k == "linear" else "fp32" for k in kinds) for f in ("fp32", *formats)],
            )
        )
    how: dict[str, Any] = {"base": "fp32", "batch": 2, "length": 16, "repeats": 2}
    return measure(timing_model(CONFIG, "fp32"), GROUPS, requests, output=output, **how)


def planned(timing: pl.DataFrame, bound: str = "median") -> Any:
    """The program's plan by these times, with room for every loss."""
    losses = [
        {
            "op": op,
            "operand": "input",
            "format": f,
            "noise_model": "ulp",
            "n_samples": 1,
            "loss_mse": 1e-9,
            "sensitivity": 0.0,
        }
        for op, f in itertools.product(GROUPS["op"], ("bf16", "int8"))
    ]
    gains = gains_et(GROUPS, timing, table("sensitivity", losses), "fp32", "ulp", bound)
    further = further_of(timing)
    plan, _ = choose(
        "ip_et",
        "et",
        GROUPS,
        gains,
        tau=1.0,
        mean_square_loss=1.0,
        base="fp32",
        base_ttft_s=float(timing["base_ttft_s"].median()),  # type: ignore[arg-type]
        further=further,
    )
    return plan, gains


@pytest.mark.usefixtures("simulated")
def test_a_plan_for_long_answers_differs() -> None:
    """By the prompt's time everything is lowered to INT8; over 101 tokens INT8 loses more than it gained, and BF16 is chosen.
    The plan's predicted times are, part by part, the device's."""
    short, _ = planned(timed(1, "int8", "bf16"))
    assert {short.formats[op] for op in LINEARS} == {"int8"}
    assert (short.output, short.predicted_tpot_s) == (1, None)
    long, gains = planned(timed(OUTPUT, "int8", "bf16"))
    assert {long.formats[op] for op in LINEARS} == {"bf16"}
    n = len(LINEARS)
    assert long.predicted_ttft_s == pytest.approx(n * FIRST_S["bf16"])
    assert (long.base_tpot_s, long.predicted_tpot_s) == pytest.approx((0.02 * n, 0.015 * n))
    assert long.predicted_gain == pytest.approx(n * (0.1 + 100 * 0.005))
    whole = anchors(GROUPS, gains, "fp32")
    times = measure_ttft(
        timing_model(CONFIG, "fp32"), whole, base="fp32", batch=2, length=16, output=OUTPUT
    )
    assert sums(GROUPS, gains, whole, "fp32") == pytest.approx(times["gain_s"].to_list())
    tokens = sums(GROUPS, gains, whole, "fp32", "tpot_gain")
    assert tokens == pytest.approx(times["tpot_gain_s"].to_list())


@pytest.mark.usefixtures("simulated")
def test_the_table_has_both_parts() -> None:
    """Columns are added for answers alone, and gain_s is the first token's gain and that of the hundred after it."""
    one, many = timed(1, "int8"), timed(OUTPUT, "int8")
    added = ["base_tpot_s", "output", "tpot_gain_s", "tpot_s", "ttft_gain_s"]
    assert sorted(set(many.columns) - set(one.columns)) == added
    found = many["ttft_gain_s"] + 100 * many["tpot_gain_s"]
    np.testing.assert_allclose(many["gain_s"], found, atol=1e-12)
    lowered = many.filter(pl.col("gain_s") != 0)
    assert (lowered["ttft_gain_s"] > 0).all()
    assert (lowered["gain_s"] < 0).all()
    assert base_answer_s(many) == pytest.approx(len(LINEARS) * (0.8 + 100 * 0.02))


@pytest.mark.usefixtures("simulated")
def test_unmeasured_configurations_are_predicted_part_by_part() -> None:
    """Of an attention group with single changes measured, others' gains are sums, in both parts; the plan takes them."""
    timing = timed(OUTPUT, "int8", "bf16")
    signature = GROUPS.filter(op="model.layers.0.mlp.gate_proj")["signature"][0]
    options = {
        s: [("fp32", "int8", "bf16") if k == "linear" else ("fp32",) for k in of["kind"]]
        for (s,), of in GROUPS.filter(pl.col("group").is_in(FIRST)).group_by("signature")
    }
    full = complete(timing, options, "fp32")
    rows = full.filter(pl.col("signature") == signature, "predicted")
    assert rows.height == 6
    tokens, first = rows["tpot_gain_s"], rows["ttft_gain_s"]
    np.testing.assert_allclose(rows["gain_s"], first + 100 * tokens, rtol=1e-9)
    np.testing.assert_allclose(rows["tpot_s"], rows["base_tpot_s"] - rows["instances"] * tokens)
    assert full["pooled_tpot_gain_s"].null_count() == 0
    plan, _ = planned(full, "pooled")
    of_group = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up"))
    assert {plan.formats[op] for op in of_group} == {"bf16"}


def test_parts_of_a_pooled_gain_add_up() -> None:
    """What a gain model says of two parts is together what it says of their sum, measured or not."""
    choices = [("base", "low")] * 3
    every = list(itertools.product(*choices))
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, len(every)))
    model = GainModel.fit(choices, every[:6], (one + other)[:6].tolist(), [0.1] * 6)
    parts = model.parts(every, one[:6].tolist()) + model.parts(every, other[:6].tolist())
    np.testing.assert_allclose(parts, model.predict(every)[0], atol=1e-12)


def test_a_step_is_the_token_after_the_prompt() -> None:
    """Each step of a run computes what a forward over the prompt and that token does, and leaves the cache as it was."""
    model = small_model("llama", num_key_value_heads=2)
    decode = Decode(model, 2, 16, steps=3)
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda *at: seen.append(at[2].logits[:, -1]))
    try:
        run = decode.ready(Mixed(model, base="fp32", backend="native"), {})
        assert run() > 0
    finally:
        hook.remove()
    tokens = torch.cat([decode._tokens, decode._token], dim=1)
    expected = model(tokens).logits[:, -1]
    assert len(seen) == 6
    for logits in seen:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_in_int8_answers_too() -> None:
    """Native kernels for attention's products run on single tokens; few tokens are all timed, many by eight."""
    model = small_model("llama", num_key_value_heads=2)
    lowered = {
        op: "int8" for op, kind in GROUPS.select("op", "kind").iter_rows() if kind != "other"
    }
    mixed = Mixed(model, base="fp32", backend="native")
    for output, steps in ((3, 2), (50, 8)):
        answers = Answers(model, 1, 16, output)
        assert answers._decode is not None
        assert answers._decode._steps == steps
        first_s, rest_s = answers.ready(mixed, lowered)()  # type: ignore[misc]
        assert min(first_s, rest_s) > 0
    mixed.clear()


def test_a_model_without_a_cache_is_refused() -> None:
    """A masked language model answers with no further tokens: one sentence says so."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(MpqError, match=r"keeps no cache .* set workload.output to 1"):
        Answers(BertForMaskedLM(config).eval(), 1, 8, 4)


def spec(**more: Any) -> RunSpec:
    """A spec with these keys."""
    text = {"source": "t.txt"}
    least = {
        "model": {"path": "m"},
        "calibration": text,
        "objectives": {"m": {"formats": ["int8"]}},
    }
    return parse_spec({**least, **more})


def test_a_workload_in_the_spec() -> None:
    """`workload` is another way to write what timing says, survives a round trip, and may not contradict it."""
    asked = spec(workload={"prompt": 1024, "output": 128, "batch": 8}, timing={"repeats": 5})
    timing = asked.timing
    assert (timing.length, timing.output, timing.batch, timing.repeats) == (1024, 128, 8, 5)
    assert RunSpec.model_validate(asked.model_dump(mode="json")) == asked
    assert spec(workload={"output": 9}, timing={"length": 40}).timing.length == 40
    with pytest.raises(MpqError, match=r"workload.prompt is 64, timing.length 32: take one"):
        spec(workload={"prompt": 64}, timing={"length": 32})
    assert "output" not in TimingSpec().model_dump()  # and so in no key
    assert TimingSpec(output=2).model_dump()["output"] == 2
