"""Keys: what a stage runs through is in its key, read off its imports; what only tells of results is not."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import polars as pl
import pytest
from small import small_spec

from mpq.caches import private_temporary_folder
from mpq.errors import MpqError
from mpq.models.architecture import architecture_key
from mpq.models.checkpoint import fingerprint, load_config, marks
from mpq.store import code
from mpq.store.code import code_version, is_numberless, modules_of
from mpq.store.entries import Store, TableRef
from mpq.tasks import calibration, evaluation, planning, timing
from mpq.tasks.checkpoint import Architecture, Weights, loaded
from mpq.tasks.device import exclusive
from mpq.tasks.stage import Stage, content_of

STAGES = {
    f"{module.__name__}.{name}": stage
    for module in (calibration, timing, planning, evaluation)
    for name, stage in vars(module).items()
    if isinstance(stage, Stage)
}


@contextmanager
def watched() -> Iterator[set[str]]:
    """The project's modules of which some function runs inside."""
    seen: set[str] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_globals.get("__name__", ""))

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        mine = {name for name in seen if name.startswith("mpq.")}
        seen.clear()
        seen |= mine


class Tiny:
    """The inputs of stages for a tiny checkpoint, their tables in a store."""

    def __init__(self, folder: Path):
        self.spec = small_spec(folder)
        self.store = Store(self.spec.store)
        path = Path(self.spec.model.path)
        self.weights = Weights(str(path), fingerprint(path), "fp32", "cpu")
        key = architecture_key(load_config(path))
        from mpq.kernels import device_name

        made = timing.made_with("cpu", device_name("cpu"))
        self.architecture = Architecture(str(path), key, "fp32", "cpu", made)
        groups = calibration.partition.compute(self.architecture, 1, 16)["groups"]
        self.groups = self.store.write_table("groups", "g", groups)
        tokens, suffix = calibration._npy(np.random.default_rng(0).integers(0, 97, (4, 16)))
        self.blocks = self.store.write_bytes("calibration", "c", tokens, suffix)

    def sensitivity(self) -> Mapping[str, Any]:
        """One shard."""
        return calibration.sensitivity_shard.compute(
            self.weights, self.groups, self.blocks, 0, 2, ["int8"], 2, True, False, 1
        )

    def times(self) -> list[pl.DataFrame]:
        """A configuration of the first group, in INT8."""
        first = self.groups_table().sort("order").row(0, named=True)
        ops = self.groups_table().filter(pl.col("group") == first["group"])
        lowered = ["int8" if kind == "linear" else "fp32" for kind in ops["kind"]]
        wanted = {"k": (first["signature"], tuple(lowered))}
        return [
            row
            for _, row in timing.time_configurations.compute(
                self.architecture, self.groups, wanted, self.spec.timing, missing=lambda _: True
            )
        ]

    def groups_table(self) -> pl.DataFrame:
        """The groups table."""
        return self.store.read_table(self.groups)

    def losses(self) -> Mapping[str, Any]:
        """A plan in INT8 on the text."""
        base = evaluation.evaluate_base.compute(self.weights, self.blocks, 2)["base_losses"]
        ref = self.store.write_table("base_losses", "b", base)
        formats = dict.fromkeys(self.groups_table()["op"], "int8")
        return evaluation.evaluate_plan.compute(
            self.weights, formats, self.blocks, ref, 0, 2, "a plan"
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Made once: stages only read it."""
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("stage", "run"),
    [
        (calibration.sensitivity_shard, Tiny.sensitivity),
        (timing.time_configurations, Tiny.times),
        (evaluation.evaluate_plan, Tiny.losses),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_runs_is_in_the_key(tiny: Tiny, stage: Stage, run: Any) -> None:
    """Every module of which a function runs while a stage computes is among those that its key is made of."""
    with watched() as seen:
        run(tiny)
    inside = modules_of(
        stage.compute, "mpq.kernels.cpu" if stage.on == "accelerator" else stage.compute
    )
    assert len(seen) > 3, "something was seen"
    unseen = {name for name in seen if name not in inside and not is_numberless(name)}
    assert {name for name in unseen if not name.startswith("mpq.tasks.")} == set()


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_change_changes_the_key(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another line in any module that a stage runs through gives it another version; one in the report does not,
    unless it writes the report."""
    before, source = code_version(stage.compute), code._source
    for module in sorted(modules_of(stage.compute)):
        monkeypatch.setattr(
            code, "_source", lambda m, changed=module: source(m) + b"#" * (m == changed)
        )
        assert code_version(stage.compute) != before, module
    reports = {m for m in modules_of(stage.compute) if m.startswith(("mpq.report", "mpq.paper"))}
    assert bool(reports) == (stage.name == "report")


def test_times_do_not_depend_on_losses() -> None:
    """Nothing of sensitivity, the program, evaluation or the report is in a timing's key."""
    rooms = {m.split(".")[1] for m in modules_of(timing.time_configurations.compute)}
    assert {"kernels", "running", "timing"} <= rooms
    assert not rooms & {"loss", "program", "evaluation", "report", "paper", "cli", "flows"}


def test_content_not_places(tiny: Tiny, tmp_path: Path) -> None:
    """A checkpoint elsewhere, a table in another store and another batch have the same key; other formats do not."""
    weights = Weights(str(tmp_path), tiny.weights.fingerprint, "fp32", "cpu")
    moved = TableRef(**{**vars(tiny.groups), "store": "memory://x", "key": "other"})
    same = {"groups": tiny.groups, "weights": tiny.weights}
    assert content_of(same) == content_of({"groups": moved, "weights": weights})
    given = {"weights": tiny.weights, "formats": {"a": "int8"}, "blocks": tiny.blocks, "seed": 0}
    free = {"base_losses": tiny.blocks, "batch": 2, "what": "x"}
    stage = evaluation.evaluate_plan
    assert stage.key({**given, **free}) == stage.key({**given, **free, "batch": 9, "what": "y"})
    assert stage.key({**given, **free}) != stage.key({**given, **free, "formats": {"a": "bf16"}})
    assert stage.key({**given, **free}) != stage.key({**given, **free, "seed": 1})


def test_an_exchanged_checkpoint_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    """Weights put in place after the fingerprint was taken are not taken for those it is of."""
    copy = shutil.copytree(tiny.weights.source, tmp_path / "model")
    before = Weights(str(copy), tiny.weights.fingerprint, "fp32", "cpu", marks(copy))
    assert loaded(before) is not None
    loaded.cache_clear()
    os.utime(copy / "model.safetensors", ns=(0, 0))
    with pytest.raises(MpqError, match="changed while they were read"):
        loaded(before)


def test_a_planted_lock_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link where the device's lock should be is one sentence, and what it points to is left alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with exclusive("cpu"):
        (lock,) = private_temporary_folder("devices").iterdir()
    lock.unlink()
    lock.symlink_to(tmp_path / "target")
    with pytest.raises(MpqError, match="take it away"), exclusive("cpu"):
        pass
    assert not (tmp_path / "target").exists()
