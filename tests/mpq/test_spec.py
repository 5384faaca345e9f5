"""Specs: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import ROOT

from mpq.errors import MpqError
from mpq.spec import Bound, RunSpec, load_spec, parse_spec

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


def test_bounds() -> None:
    """A value or a list for each bound; a rise of perplexity x is ln(1 + x) nats; an objective's own τ come first."""
    own = {"et": {"formats": ["bf16"]}, "m": {"formats": ["int8"], "taus": [0.5]}}
    given = {"kl": 0.01, "perplexity": "0.5 %", "tau": 0.002}
    spec = parse_spec({**GOOD, "objectives": own, "bound": given})
    assert spec.limits("et") == (Bound(0.002, math.log1p(0.005)),)
    assert spec.limits("m") == (Bound(0.5),)
    again = parse_spec(spec.model_dump(mode="json"))
    assert again.bound == spec.bound
    for shares in (["1 %", "50 %"], ["42.58 %"], ["12.21 %", "66.8 %", "179.2 %"]):
        meant = parse_spec({**GOOD, "bound": {"perplexity": shares}})
        dumped = parse_spec(meant.model_dump(mode="json"))  # as flows are given it
        assert dumped.bound == meant.bound
    several = parse_spec({**GOOD, "bound": {"perplexity": [0.005, "1 %"], "kl": [0.001, 0.1]}})
    assert several.limits("et") == (Bound(kl=0.001), Bound(kl=math.log1p(0.01)))
    signed = parse_spec({**GOOD, "bound": {"tau": 0.002, "signed": True}})
    assert signed.limits("et") == (Bound(0.002, signed=True),)
    assert str(signed.limits("et")[0]) == "τ = 0.002 with signs"
    for bound, more, why in (
        ({"kl": 0.1, "signed": True}, {}, "give tau"),
        ({"tau": 0.1, "signed": True, "robust": 0.9}, {}, "leave one out"),
        ({"tau": 0.1, "signed": True}, {"noise_model": "ulp"}, "set it to actual"),
    ):
        with pytest.raises(MpqError, match=why):
            parse_spec({**GOOD, "bound": bound, **more})
    assert parse_spec(GOOD).limits("et") == (Bound(0.003), Bound(0.01), Bound(0.03))


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
        ({"taus": [0.01, 0.01000001]}, "two τ are 0.01 in six digits"),
        ({"taus": [-1]}, "τ must be above zero, got -1"),
        (
            {"bound": {"kl": 0.01, "robust": 0.95}, "calibration": {"source": "x", "samples": 1}},
            "calibration.samples to 2 or more",
        ),
        ({"taus": [float("nan")]}, "τ must be above zero"),
        ({"model": {"path": "x", "base": "int8"}}, "base format must be fp32, bf16 or fp16"),
        ({"calibration": {"source": "x", "samples": 0}}, "calibration.samples"),
        ({"calibration": {"source": "x", "samples": True}}, "expected a number, not true"),
        ({"calibration": {"source": "x", "length": 10**30}}, "less than or equal to 2147483647"),
        ({"calibration": {"source": ""}}, "calibration.source"),
        ({"taus": [1e200]}, "τ must lie between 1e-12 and 100, got 1e+200"),
        ({"taus": [1e-200]}, "τ must lie between"),
        ({"taus": [float("inf")]}, "τ must be above zero"),
        ({"taus": 0.1}, "a list, such as [a, b]"),
        ({"bound": {}}, "bounds nothing: give kl, perplexity or tau"),
        ({"bound": {"kl": 0}}, "bound.kl.0: a bound must be a number above zero, not 0"),
        ({"bound": {"kl": [0.02, 0.01]}}, "kl must rise from value to value, by 1 % at least"),
        ({"bound": {"perplexity": "x %"}}, "expected a share, such as 0.5 % or 0.005, not 'x %'"),
        ({"bound": {"perplexity": 0.5}}, "0.5 is 50%: write 0.5 %, or 50% if it is meant"),
        ({"bound": {"perplexity": "0.5"}}, "0.5 is 50%: write 0.5 %, or 50% if it is meant"),
        ({"bound": {"kl": "nan", "tau": 0.1}}, "a bound must be a number above zero, not nan"),
        ({"bound": {"kl": "-1"}}, "a bound must be a number above zero, not -1"),
        ({"bound": {"perplexity": "-1 %"}}, "must be a number above zero, not -0.01"),
        ({"bound": {"kl": [0.01, 0.02], "tau": 0.1}}, "kl has 2, tau has 1: give each as many"),
        ({"bound": {"kl": 0.01}, "taus": [0.1]}, "move taus into bound, as tau"),
        ({"bound": {"mse": 1}}, "unknown key bound.mse: expected one of kl, perplexity, tau"),
        ({"name": "../../x"}, "must be a folder's name below `out`"),
        ({"name": "/tmp/x"}, "must be a folder's name below `out`"),
        ({"name": "a/../../x"}, "must be a folder's name below `out`"),
        ({"name": ".."}, "must be a folder's name below `out`"),
        ({"name": "a\0b"}, "name: holds a control character: 'a\\x00b'"),
        ({"name": "\x1b[31mred"}, "holds a control character"),
        ({"calibration": {"source": "a\0.txt"}}, "calibration.source: holds a control character"),
        ({"name": "n" * 300}, "at most 200 bytes"),
        ({"out": "s3://bucket/runs"}, "out: must be a local folder, not s3://bucket/runs"),
        ({"model": {"path": "x", "device": "gpu"}}, "model.device"),
    ],
)
def test_mistakes_are_told(change: dict, message: str) -> None:
    """One sentence that names the key and what was expected there."""
    with pytest.raises(MpqError) as told:
        parse_spec({**GOOD, **change})
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def text_of(data: object) -> str:
    """What load_spec says of a file's content, or "" where it takes it."""
    content = data if isinstance(data, bytes) else str(data).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_bytes(content)
        try:
            load_spec(path)
        except MpqError as error:
            return str(error)
    return ""


FILES = {
    "broken": (b"a: [", "cannot be read"),
    "a list": (b"[1]", "is not a spec"),
    "a number": (b"3", "is not a spec"),
    "empty": (b"", "is empty"),
    "comments alone": (b"# nothing\n", "is empty"),
    "binary": (bytes(range(256)), "cannot be read"),
    "deep": (b"[" * 50_000, "nest too deep"),
    "huge": (b"# " + b"x" * 2**20, "larger than 1 MB"),
    "a number of many digits": (b"taus: [" + b"9" * 5000 + b"]", "cannot be read"),
    "an odd integer": (b"a: !!int ''", "cannot be read"),
    "a day that is none": (b"a: 2020-13-45", "cannot be read"),
    "code": (b"a: !!python/object/apply:os.system [ls]", "cannot be read"),
    "itself": (b"&a {model: *a, calibration: *a, objectives: *a}", "spec.yaml: "),
    "a key twice": (b"name: a\nname: b\n", "the key name stands twice, again in line 2"),
    "an inner key twice": (
        b"objectives:\n  et: {formats: [int8]}\n  et: {formats: [bf16]}\n",
        "the key et stands twice, again in line 3",
    ),
    "a key that is a list": (b"? [a]\n: b\n", "cannot be read"),
    "a key that is a number": (b"1: 2", "spec.yaml: "),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_specs(kind: str) -> None:
    """Whatever a file holds, one sentence says that it is no spec, and why."""
    content, words = FILES[kind]
    told = text_of(content)
    assert words in told
    assert told.isprintable()


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there, a folder, and a name that no file can have."""
    with pytest.raises(MpqError, match="No spec at"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(MpqError, match="cannot be read"):
        load_spec(tmp_path)
    with pytest.raises(MpqError, match="cannot be read"):
        load_spec("a\0b")


def test_merge_keys_may_say_it_again() -> None:
    """YAML's `<<` brings defaults, which a key beside it overrides: that is no key that stands twice."""
    text = """
model: &m {path: x, base: fp32}
calibration: {source: t.txt}
objectives: {m: {formats: [int8]}}
"""
    assert not text_of(text)
    assert not text_of(text.replace("{source: t.txt}", "{<<: {source: a}, source: b}"))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_under_any_key_is_taken_or_told(data: st.DataObject) -> None:
    """A spec with one key set to anything at all is a RunSpec or one printable sentence, never another exception."""
    spec = {**GOOD, "model": dict(GOOD["model"]), "calibration": dict(GOOD["calibration"])}
    where = data.draw(st.sampled_from([spec, spec["model"], spec["calibration"]]))
    keys = st.sampled_from([*RunSpec.model_fields, "path", "base", "device", "source", "samples"])
    where[data.draw(keys)] = data.draw(trees)
    try:
        told = repr(type(parse_spec(spec)))
    except MpqError as error:
        told = str(error)
    assert told.isprintable()


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_told(content: bytes) -> None:
    """Bytes at random are no spec: one printable sentence."""
    told = text_of(content)
    assert told
    assert told.isprintable()


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the user's home wherever a path may stand, and is left alone inside a name or a URL."""
    monkeypatch.setenv("HOME", "/home/me")
    spec = parse_spec(
        {
            **GOOD,
            "model": {"path": "~/m", "base": "fp32"},
            "calibration": {"source": "~/t.txt"},
            "store": "~/s",
            "out": "~/o",
        }
    )
    assert (spec.model.path, spec.calibration.source) == ("/home/me/m", "/home/me/t.txt")
    assert (spec.store, spec.out) == ("/home/me/s", "/home/me/o")
    assert parse_spec({**GOOD, "store": "s3://b/~x"}).store == "s3://b/~x"


def test_the_old_name_of_a_bound_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """`bound: mean` was always a median: it is read as that, with one line that says so."""
    with caplog.at_level(logging.WARNING, logger="mpq"):
        spec = parse_spec({**GOOD, "timing": {"bound": "mean"}})
    assert spec.timing.bound == "median"
    assert ["median" in record.message for record in caplog.records] == [True]
