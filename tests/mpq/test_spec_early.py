"""What is told of a spec before anything slow starts, and that nothing right is ever refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from small import DEMO, ROOT

from mpq.errors import MpqError
from mpq.spec import check_early, load_spec, parse_spec, resolved
from mpq.spec.run import ModelSpec


def spec_with(folder: Path, text: str = "", **calibration: object) -> dict:
    """A spec whose model is a folder with a config.json, and whose calibration text is a file there."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "text.txt").write_text(text)
    return {
        "model": {"path": str(folder / "model"), "base": "fp32", "device": "cpu"},
        "calibration": {
            "source": str(folder / "text.txt"),
            "samples": 2,
            "length": 8,
            **calibration,
        },
        "objectives": {"m": {"formats": ["int8"]}},
        "out": str(folder / "out"),
    }


def told(spec: dict) -> str:
    """What check_early says, "" where it says nothing."""
    try:
        check_early(parse_spec(spec))
    except MpqError as error:
        return str(error)
    return ""


def test_what_is_wrong_is_told_early(tmp_path: Path) -> None:
    """A missing model, text or folder of tasks, an output that cannot be, a GPU that is not there."""
    good = spec_with(tmp_path, "words " * 100)
    assert not told(good)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "plans").touch()
    np.save(tmp_path / "rows.npy", np.zeros((1, 8), np.int64))
    np.save(tmp_path / "short.npy", np.zeros((5, 7), np.int64))
    text = good["calibration"]
    wrong = {
        "No checkpoint at ./nope": {"model": {**good["model"], "path": "./nope"}},
        "has no config.json": {"model": {**good["model"], "path": str(tmp_path)}},
        "There is no cuda:99 here": {"model": {**good["model"], "device": "cuda:99"}},
        "No text at nope.jsonl": {"calibration": {**text, "source": "nope.jsonl"}},
        "No text at ./nope": {"evaluation": {"source": "./nope"}},
        "file is no folder": {"out": str(tmp_path / "file" / "below")},
        "/proc is not yours to write to": {"out": "/proc/nothing/runs"},  # whoever asks
        "plans is no folder": {"out": str(tmp_path), "name": "taken"},
        "No checkpoint at": {"model": {**good["model"], "path": str(tmp_path / "file")}},
        "holds at most 1 blocks of 8 tokens, 2 were asked for": {
            "calibration": {**text, "source": str(tmp_path / "rows.npy")}
        },
        "empty or shorter than one block": {
            "calibration": {**text, "source": str(tmp_path / "short.npy")}
        },
    }
    for words, change in wrong.items():
        assert words in told({**good, **change}), words


def test_too_little_text_is_told_and_no_more(tmp_path: Path) -> None:
    """A text of n characters of ASCII has n tokens at most; where tokens may be as many as asked for, nothing is said."""
    assert "empty or shorter" in told(spec_with(tmp_path, ""))
    assert "empty or shorter" in told(spec_with(tmp_path, "   \n"))
    assert "holds at most 1 blocks" in told(spec_with(tmp_path, "a" * 12))
    assert not told(spec_with(tmp_path, "a" * 16))
    assert not told(spec_with(tmp_path, "a" * 14)), "begin and end may be tokens as well"
    assert not told(spec_with(tmp_path, "\ufdfa" * 2)), "one character may become eighteen"
    assert not told(spec_with(tmp_path, "a" * 12, field="messages")), "a template adds tokens"


def test_what_only_others_can_tell_is_left_to_them(tmp_path: Path) -> None:
    """Hub ids, URLs, ids of datasets, arrays that are none: no word, no look at the network."""
    good = spec_with(tmp_path, "words " * 100)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    for change in (
        {"model": {**good["model"], "path": "org/model"}},
        {"model": {**good["model"], "path": "gpt2"}},
        {"model": {**good["model"], "path": "s3://bucket/model"}},
        {"calibration": {**good["calibration"], "source": "org/data"}},
        {"calibration": {**good["calibration"], "source": f"{tmp_path / 'model'}:configuration"}},
        {"calibration": {**good["calibration"], "source": "s3://bucket/text.txt"}},
        {"calibration": {**good["calibration"], "source": str(tmp_path / "broken.npy")}},
    ):
        assert not told({**good, **change}), change


def test_what_must_be_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key that needs an extra names it, before anything is computed; without that key nothing is asked."""
    monkeypatch.setattr("mpq.errors.find_spec", lambda name: None)
    good = spec_with(tmp_path, "words " * 100)
    assert not told(good)
    dask = {"kind": "dask", "address": "tcp://scheduler:8786"}
    for extra, change in {
        "gurobi": {"solver": "gurobi"},
        "datasets": {"calibration": {**good["calibration"], "source": "org/data"}},
        "eval": {"evaluation": {**good["calibration"], "tasks": ["piqa"]}},
        "dask": {"runner": dask},
    }.items():
        assert f"pip install 'mpq[{extra}]'" in told({**good, **change}), extra


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_of_others_is_told(tmp_path: Path) -> None:
    """`out` below a folder that this user may not write to."""
    (tmp_path / "theirs").mkdir(mode=0o555)
    good = spec_with(tmp_path, "words " * 100)
    assert "is not yours" in told({**good, "out": str(tmp_path / "theirs" / "runs")})


def test_examples_pass_and_torch_is_not_loaded() -> None:
    """The demo is right, and said to be so without the second that torch takes."""
    code = (
        "import sys\nfrom mpq.spec import check_early, load_spec\n"
        "check_early(load_spec('examples/demo.yaml'))\n"
        "print(sorted({'torch', 'transformers', 'polars', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_auto_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the first GPU where torch sees one, else the CPU; a device that is named stays, and so does the rest."""
    import torch

    spec = parse_spec(
        {
            "model": {"path": str(DEMO), "base": "fp32"},
            "calibration": {"source": "t.txt"},
            "objectives": {"m": {"formats": ["int8"]}},
        }
    )
    assert spec.model.device == "auto"
    for there, device in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        named = resolved(spec)
        assert named.model.device == device
        assert resolved(named) is named
        assert named.model_copy(update={"model": spec.model}) == spec
    assert resolved(spec, lambda device: f"{device}-of-a-worker").model.device == "auto-of-a-worker"


def test_the_demos_work_is_counted() -> None:
    """The demo: 13 plans an objective (3 bounds × 3 strategies, 2 formats × 2 uniform ones), two seeds each, base once; to be
    checked 2 anchors and 4 rounds of 3 plans an objective."""
    from mpq.spec import estimate

    work = estimate(load_spec(ROOT / "examples" / "demo.yaml"))
    assert work.plans == {"et": 13, "tt": 13, "m": 13}
    assert (work.shards, work.seeds, work.evaluations, work.timed) == (4, 2, 79, 13)
    assert str(work) == (
        "4 calibration shards, 39 plans × 2 seeds, at most 79 evaluations of the loss, at most 42 plans checked before delivery, "
        "at most 13 plans timed"
    )
    sweep = estimate(load_spec(ROOT / "examples" / "reproduce.yaml"))
    assert sweep.task_evaluations == sweep.evaluations * 4, "four tasks"


def test_the_page_of_keys_is_the_real_one() -> None:
    """docs/spec.md is what `make docs` would write now, and has every key."""
    from mpq.spec.page import page

    assert (ROOT / "docs" / "spec.md").read_text(encoding="utf-8") == page(), "run `make docs`"
    for key in ("`name`", "`model.device`", "`timing.bound`", "`objectives.<objective>.taus`"):
        assert f"| {key} |" in page()


@pytest.mark.parametrize("memory", [float("inf"), "1e400", float("nan"), 0])
def test_memory_is_a_number_of_gb(memory: object) -> None:
    """What no number of bytes is made of is refused with the spec, not while weights are loaded."""
    with pytest.raises(ValidationError, match="memory_gb"):
        ModelSpec.model_validate({"path": "m", "memory_gb": memory})
