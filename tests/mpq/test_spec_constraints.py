"""What a spec says of constraints: written as people write it, and one sentence for what is wrong."""

from __future__ import annotations

import pytest
from test_spec import GOOD

from mpq.errors import MpqError
from mpq.spec import parse_spec


def test_as_people_write_them() -> None:
    """One format or a list, base by its own word or name, sizes with units; written out, it reads the same."""
    spec = parse_spec(
        {
            **GOOD,
            "engine": "vllm",
            "constraints": {
                "pin": {
                    "lm_head": "base",
                    "*.down_proj": ["base", "INT8"],
                    r"re:.*\.0\..*": "fp32",
                },
                "tie": [["*.q_proj", "*.k_proj"]],
                "bounds": {
                    "effective_bits": 5,
                    "weight_bytes": "20 GiB",
                    "min_share": {"INT8": 0.5},
                },
            },
            "target": {"weight_bytes": "1.5 MB"},
        }
    )
    assert spec.constraints.pin["*.down_proj"] == ("base", "int8")
    assert spec.constraints.pin["lm_head"] == ("base",)
    assert spec.constraints.bounds.weight_bytes == 20 * 2**30
    assert spec.constraints.bounds.min_share == {"int8": 0.5}
    assert spec.target is not None
    assert spec.target.weight_bytes == 1.5e6
    assert parse_spec(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "vlm"}, "engine: "),
        ({"constraints": {"pins": {}}}, "unknown key constraints.pins (did you mean pin?)"),
        ({"constraints": {"pin": {"a": []}}}, "constraints.pin.a"),
        ({"constraints": {"pin": {"a": "int9"}}}, "Unknown format 'int9'"),
        (
            {"constraints": {"pin": {"*.q_proj": ["base", "fp8_e5m2"]}}},
            "*.q_proj is pinned to fp8_e5m2, which no objective measures",
        ),
        ({"constraints": {"pin": {"re:(": "base"}}}, "re:( is no regular expression"),
        ({"constraints": {"pin": {"": "base"}}}, "expected a pattern over op names"),
        ({"constraints": {"tie": [[]]}}, "got an empty one"),
        ({"constraints": {"tie": ["*.q_proj"]}}, "constraints.tie.0"),
        ({"constraints": {"bounds": {"weight_bytes": "20 GiBs"}}}, "such as 20 GiB or 900 MB"),
        ({"constraints": {"bounds": {"weight_bytes": 0}}}, "greater than 0"),
        ({"constraints": {"bounds": {"effective_bits": float("nan")}}}, "effective_bits"),
        (
            {"constraints": {"bounds": {"min_share": {"int8": 2}}}},
            "must lie between 0 and 1, got 2",
        ),
        (
            {"constraints": {"bounds": {"min_share": {"int8": 0.7, "bf16": 0.6}}}},
            "the shares add up to 1.3",
        ),
        (
            {"constraints": {"bounds": {"min_share": {"fp16": 0.7}}}},
            "no objective lowers to fp16",
        ),
        ({"target": {}}, "a target is one of effective_bits, weight_bytes, ttft_ms, got none"),
        (
            {"target": {"effective_bits": 4, "ttft_ms": 3}},
            "got effective_bits and ttft_ms: further ones are constraints.bounds",
        ),
        (
            {"target": {"ttft_ms": 3}, "objectives": {"m": {"formats": ["int8"]}}},
            "target.ttft_ms needs measured times",
        ),
    ],
)
def test_mistakes_are_told(change: dict, message: str) -> None:
    """One sentence that names the key and what was expected there."""
    with pytest.raises(MpqError) as told:
        parse_spec({**GOOD, **change})
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_an_export_needs_an_engine() -> None:
    """A checkpoint for engines is refused where plans keep to no engine's rules, and to a URL with credentials."""
    with pytest.raises(MpqError, match="set engine to vllm or sglang or transformers, not none"):
        parse_spec({**GOOD, "export": {}})
    with pytest.raises(MpqError, match="credentials"):
        parse_spec({**GOOD, "engine": "vllm", "export": {"out": "s3://me:secret@bucket/served"}})
    assert parse_spec({**GOOD, "export": {"to": "json"}}).export


def test_times_of_an_engine_are_of_its_plans() -> None:
    """vLLM's times are for plans that it serves, eager or compiled."""
    vllm = {"timing": {"engine": "vllm"}}
    with pytest.raises(MpqError, match="set engine to vllm, not none"):
        parse_spec({**GOOD, **vllm})
    compiled = {"engine": "vllm", "timing": {"engine": "vllm", "compile": True}}
    assert parse_spec({**GOOD, **compiled}).timing.compile
