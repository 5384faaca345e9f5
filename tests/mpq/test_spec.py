"""Specs: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small import ROOT

from mpq.errors import MpqError
from mpq.spec import TimingSpec, load_spec, parse_spec

GOOD = {
    "model": {"path": "some/model", "base": "FP32"},
    "calibration": {"source": "text.txt"},
    "objectives": {"et": {"formats": ["BF16", "INT8"]}, "m": {"formats": ["FP8-E4M3"]}},
}


def test_names_are_normalised() -> None:
    """Formats may be written as people write them; τ are sorted."""
    spec = parse_spec({**GOOD, "taus": [0.1, 0.01, 0.1]})
    assert spec.model.base == "fp32"
    assert spec.formats == ("bf16", "int8", "fp8_e4m3")
    assert spec.taus == (0.01, 0.1)


def test_examples_are_valid() -> None:
    """Every YAML file in examples is a spec."""
    for path in (ROOT / "examples").glob("*.yaml"):
        load_spec(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "unknown key modle (did you mean model?): expected one of name, model"),
        (
            {"calibration": {"source": "x", "sampels": 1}},
            "unknown key calibration.sampels (did you mean samples?): expected one of source, samples",
        ),
        ({"calibration": {}}, "calibration.source is missing"),
        (
            {"objectives": {"et": {"formats": ["int9"]}}},
            "Unknown format 'int9': expected one of fp32",
        ),
        ({"objectives": {"et": {"formats": ["fp32"]}}}, "lists the base format fp32"),
        ({"objectives": {"speed": {"formats": ["bf16"]}}}, "objectives.speed"),
        ({"objectives": {}}, "objectives"),
        ({"taus": [0.1, 0]}, "τ must be above zero, got 0"),
        ({"taus": [-1]}, "τ must be above zero, got -1"),
        ({"taus": [float("nan")]}, "τ must be above zero"),
        ({"model": {"path": "x", "base": "int8"}}, "base format must be fp32, bf16 or fp16"),
        ({"calibration": {"source": "x", "samples": 0}}, "calibration.samples"),
    ],
)
def test_mistakes_are_told(change: dict, message: str) -> None:
    """One sentence that names the key and what was expected there."""
    with pytest.raises(MpqError) as told:
        parse_spec({**GOOD, **change})
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_files_that_are_no_specs(tmp_path: Path) -> None:
    """A missing file, broken YAML and a list are each told."""
    with pytest.raises(MpqError, match="No spec at"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(MpqError, match="cannot be read"):
        load_spec(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump([1]))
    with pytest.raises(MpqError, match="is not a spec"):
        load_spec(tmp_path / "b.yaml")


def test_the_old_name_of_a_bound_is_read() -> None:
    """`timing.bound: mean` was always the median of the pairs: it is read, and called so."""
    assert TimingSpec.model_validate({"bound": "mean"}).bound == "median"
    assert TimingSpec().bound == "pooled"
