"""What is exchanged while a stage reads it is noticed before anything is stored: keys are of what was there before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.logging import disable_run_logger
from small import ROOT, write_checkpoint

from mpq.errors import MpqError
from mpq.evaluation.task_data import data_key
from mpq.models.architecture import architecture_key
from mpq.models.checkpoint import fingerprint, load_config, marks
from mpq.spec import CalibrationSpec, EvaluationSpec
from mpq.store.entries import Store
from mpq.tasks import calibration, evaluation
from mpq.tasks.checkpoint import Architecture, Weights
from mpq.tasks.stage import Stage


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint of the test's own."""
    return write_checkpoint(tmp_path / "model")


def run(stage: Stage, store: Store, inputs: dict[str, Any]) -> Any:
    """The stage's task, without Prefect."""
    with disable_run_logger():
        return stage.task.fn(stage.key(inputs), store.url, stage.name, inputs)


def between(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[], None]) -> None:
    """Let `change` happen right after the function called `name` has read what it reads."""
    module, _, function = name.rpartition(".")
    reads = getattr(__import__(module, fromlist=[function]), function)

    def changed(*given: Any, **more: Any) -> Any:
        found = reads(*given, **more)
        change()
        return found

    monkeypatch.setattr(name, changed)


def test_text(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text in the file's place once the key is taken is one sentence, and nothing is stored under that key."""
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.zeros((4, 8), np.int64))
    part = {"source": str(tokens), "samples": 2, "length": 8}
    inputs = {
        "folder": str(checkpoint),
        "calibration": CalibrationSpec(**part),
        "evaluation": EvaluationSpec(**part),
    }
    store = Store((tmp_path / "store").as_uri())
    exchange = lambda: np.save(tokens, np.ones((4, 8), np.int64))  # noqa: E731
    between(monkeypatch, "mpq.evaluation.sampling.draw", exchange)
    with pytest.raises(MpqError, match="load model reads changed while it was read"):
        run(calibration.load_model, store, inputs)
    assert not store.files()
    assert run(calibration.load_model, store, inputs)["calibration"].rows == 0


def test_weights(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model's weights are pages of its files: written over while it runs, nothing is stored."""
    store = Store((tmp_path / "store").as_uri())
    blocks = store.write_bytes("calibration", "c", *calibration._npy(np.arange(32).reshape(2, 16)))
    weights = Weights(str(checkpoint), fingerprint(checkpoint), "fp32", "cpu", marks(checkpoint))
    inputs = {"weights": weights, "blocks": blocks, "batch": 2}

    def exchange() -> None:
        with (checkpoint / "model.safetensors").open("r+b") as stream:
            stream.seek(-64, 2)
            stream.write(bytes(64))

    between(monkeypatch, "mpq.evaluation.losses.losses", exchange)
    with pytest.raises(MpqError, match="changed while they were read"):
        run(evaluation.evaluate_base, store, inputs)
    assert {path.split("/")[0] for path in store.files()} == {"calibration"}


def test_configuration(checkpoint: Path) -> None:
    """A config.json of another architecture is not partitioned, or timed, under the first one's key."""
    key = architecture_key(load_config(checkpoint))
    architecture = Architecture(str(checkpoint), key, "fp32", "cpu", ("a cpu",))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "sliding_window": 4}))
    with pytest.raises(MpqError, match=r"config\.json of .* has changed since the run began"):
        calibration.partition.compute(architecture, 1, 16)


def test_documents_of_tasks(tmp_path: Path) -> None:
    """A task's files of another content than the key was taken of are not scored; a folder beside them is no file."""
    data = tmp_path / "tasks"
    shutil.copytree(ROOT / "examples" / "tasks" / "piqa", data / "piqa")
    (data / "piqa" / ".cache").mkdir()
    key = data_key(["piqa"], data)
    assert evaluation._opened("piqa", str(data), key).documents("piqa") == 100
    evaluation._opened.cache_clear()
    rows = (data / "piqa" / "validation.jsonl").read_text().splitlines(keepends=True)
    (data / "piqa" / "validation.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(MpqError, match=r"files of task piqa .* changed since the run began"):
        evaluation._opened("piqa", str(data), key)
