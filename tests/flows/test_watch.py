"""Watching for checkpoints: found by content, done once, compared, through restarts and overlap."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import preloaded
import pytest
from prefect.client.orchestration import get_client
from small import ROOT, own_prefect, short, small_model, write_checkpoint

from deployments.processes import until
from mpq.errors import MpqError
from mpq.flows import watch as module
from mpq.flows.calibrate import calibrate
from mpq.flows.campaign import campaign
from mpq.flows.records import Claim, Records
from mpq.flows.watch import watch
from mpq.models.checkpoint import fingerprint
from mpq.models.discovery import checkpoints, settled
from mpq.program.changes import compare, moves
from mpq.program.plan import Plan
from mpq.redaction import HIDDEN
from mpq.spec import RunSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to drop checkpoints in."""
    return tmp_path / "checkpoints"


def plan(formats: dict[str, str], gain: float) -> Plan:
    """A plan with two ops."""
    return Plan("ip_tt", "tt", 0.01, "bf16", formats, 0.5 * gain, 1.0, gain, 4.0)


def test_moves_and_differences() -> None:
    """Ops whose format differs, also where a plan leaves one out; gains and losses beside each other."""
    before, after = plan({"a": "bf16", "b": "int8"}, 1.0), plan({"a": "fp8_e4m3"}, 3.0)
    assert moves(before, after) == {"a": ("bf16", "fp8_e4m3"), "b": ("int8", "bf16")}
    (change,) = compare([before], [after])
    assert change.row()["gain_difference"] == 2.0
    assert change.row()["predicted_loss_mse_difference"] == 1.0
    assert change.row()["ops_moved"] == 2
    assert compare([], [after]) == []


def test_what_is_found(folder: Path, tmp_path: Path) -> None:
    """Sub-folders with a config.json, a folder that is one itself, a hub id; memory as a remote URL; mistakes."""
    import fsspec

    write_checkpoint(folder / "one")
    (folder / "notes").mkdir()
    assert [f.path for f in checkpoints([str(folder)])] == [str(folder / "one")]
    assert [f.path for f in checkpoints([str(folder / "one"), str(folder), "org/name"])] == [
        str(folder / "one"),
        "org/name",
    ]
    assert [f.path for f in checkpoints([folder.as_uri()])] == [(folder / "one").as_uri()]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/watched/far/config.json", b"{}")
    (far,) = checkpoints(["memory://watched"])
    assert far.path == "memory:///watched/far"
    for wrong in ("./nowhere", "memory://not-there"):
        with pytest.raises(MpqError, match=r"watch|listed"):
            checkpoints([wrong])


def test_a_growing_checkpoint_waits(folder: Path) -> None:
    """Files that change while they are looked at are not calibrated yet."""
    write_checkpoint(folder / "one")
    with ThreadPoolExecutor() as pool:
        looking = pool.submit(settled, [str(folder)], 1.0)
        time.sleep(0.3)
        (folder / "one" / "more.safetensors").write_bytes(b"x")
        whole, growing = looking.result()
    assert (whole, [f.path for f in growing]) == ([], [str(folder / "one")])


def test_each_checkpoint_once_and_compared(folder: Path, spec: RunSpec, tmp_path: Path) -> None:
    """A first, a copy of it, a fine-tune: calibrated, known, calibrated with timing re-used and changes told."""
    write_checkpoint(folder / "one")
    (first,) = watch([str(folder)], spec, settle_s=0)
    assert first["status"] == "calibrated"
    assert first["changes"] == []
    shutil.copytree(folder / "one", folder / "a-copy")
    assert {row["status"] for row in watch([str(folder)], spec, settle_s=0)} == {"known"}
    write_checkpoint(folder / "two", seed=1)
    rows = {Path(row["checkpoint"]).name: row for row in watch([str(folder)], spec, settle_s=0)}
    second = rows["two"]
    assert second["status"] == "calibrated"
    assert second["compared_with"] == first["name"]
    cached = {name for name, tasks, hits, _ in second["stages"] if hits == tasks}
    assert {"partition", "timing"} <= cached
    plans = [
        Plan.from_json(p.read_text())
        for p in (tmp_path / "out" / first["name"] / "plans").glob("*.json")
    ]
    assert len(second["changes"]) == len(plans)
    assert all(
        row["predicted_loss_mse_difference"] != 0 for row in second["changes"] if row["ops_moved"]
    )
    shutil.rmtree(
        tmp_path / "store" / "plan_files"
    )  # the plans are gone: the record does not count any more
    assert {row["status"] for row in watch([str(folder)], spec, settle_s=0)} == {
        "calibrated",
        "known",
    }


def test_a_broken_checkpoint_leaves_the_others(folder: Path, spec: RunSpec) -> None:
    """The whole ones are calibrated, then the run fails and names the broken one."""
    spec = short(spec)
    write_checkpoint(folder / "a-broken")
    weights = folder / "a-broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_checkpoint(folder / "whole")
    with pytest.raises(MpqError, match=r"1 of 2 checkpoints failed.*a-broken"):
        watch([str(folder)], spec, settle_s=0)
    shutil.rmtree(folder / "a-broken")
    assert [row["status"] for row in watch([str(folder)], spec, settle_s=0)] == ["known"]


def test_overlapping_watches(folder: Path, spec: RunSpec) -> None:
    """Two at once: one calibrates, the other sees that; another architecture is no predecessor."""
    spec = short(spec)
    write_checkpoint(folder / "one")
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(copy_context().run, watch, [str(folder)], spec, settle_s=0)
            for _ in range(2)
        ]
        statuses = sorted(future.result()[0]["status"] for future in both)
    assert statuses[0] == "calibrated"
    assert statuses[1] in ("in progress in another run", "known")
    small_model("llama", hidden_size=48, num_key_value_heads=2).save_pretrained(folder / "other")
    rows = {Path(row["checkpoint"]).name: row for row in watch([str(folder)], spec, settle_s=0)}
    assert (rows["other"]["status"], rows["other"]["compared_with"]) == ("calibrated", "")


def test_a_watch_that_was_killed(folder: Path, spec: RunSpec, tmp_path: Path) -> None:
    """kill -9 in the middle of a calibration: the checkpoint is claimed until the lease ends, then calibrated from where it was."""
    spec = short(spec)
    write_checkpoint(folder / "one")
    code = (
        "import sys; from mpq.flows.watch import watch; from mpq.spec import load_spec; "
        "watch([sys.argv[1]], load_spec(sys.argv[2]), settle_s=0, lease_s=20)"
    )
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    process = preloaded.Process(
        ["-c", code, str(folder), str(file)],
        ROOT,
        own_prefect(tmp_path / "home", server=False),
        tmp_path / "watch.log",
    )
    stored = tmp_path / "store" / "sensitivity"
    until(
        "a shard's table or the watch's end",
        lambda: process.poll() is not None or list(stored.glob("*/meta.json")),
        240,
    )
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # whoever looks says how old a claim may be
    assert [row["status"] for row in watch([str(folder)], spec, settle_s=0, lease_s=600)] == [
        "in progress in another run"
    ]
    key = Records(spec).key(fingerprint(folder / "one"))
    until("the lease's end", lambda: not Claim(spec.store, key, "me", 5)._other_is_alive(), 60)
    (row,) = watch([str(folder)], spec, settle_s=0, lease_s=5)
    assert row["status"] == "calibrated"
    stages = {name: (tasks, hits) for name, tasks, hits, _ in row["stages"]}
    assert stages["partition"] == (1, 1)
    assert stages["sensitivity"][1] >= 1


def test_claims(tmp_path: Path) -> None:
    """One holder at a time; what a dead one held is free after its lease, what was released at once."""
    store = (tmp_path / "store").as_uri()
    with Claim(store, "k", "a", 60) as a, Claim(store, "k", "b", 60) as b:
        assert (a.held, b.held) == (True, False)
    with Claim(store, "k", "b", 60) as b:
        assert b.held
    dead = Claim(store, "k", "c", 60)
    dead._write()  # as one that was killed leaves it
    with Claim(store, "k", "d", 60) as d:
        assert not d.held
    with Claim(store, "k", "d", 0) as d:
        assert d.held


def test_records_are_of_content(spec: RunSpec, tmp_path: Path) -> None:
    """Names and places make no other record, another τ does, and another text under the same name."""
    key = Records(spec).key("f")
    assert Records(spec.model_copy(update={"name": "other", "out": "/elsewhere"})).key("f") == key
    part = spec.timing
    same = {"prompt": part.length, "output": part.output, "batch": part.batch}
    written_so = RunSpec.model_validate({**spec.model_dump(), "workload": same})
    assert Records(written_so).key("f") == key
    assert Records(spec.model_copy(update={"taus": (0.5,)})).key("f") != key
    assert json.dumps(Records(spec).done("f")) == "null"
    text = spec.calibration.model_copy(update={"source": str(tmp_path / "text.txt")})
    reading, keys = spec.model_copy(update={"calibration": text}), set()
    for content in ("one", "other", "one"):
        Path(text.source).write_text(content)
        keys.add(Records(reading).key("f"))
    assert len(keys) == 2


def recorded() -> list[dict[str, Any]]:
    """Every flow run with its parameters, and their logs, as Prefect's server has them."""
    with get_client(sync_client=True) as client:
        return [run.model_dump() for run in client.read_flow_runs()]


def test_credentials_in_a_checkpoint_are_refused(spec: RunSpec) -> None:
    """A URL with a password is refused by every flow that takes one, and neither told nor recorded by Prefect."""
    url = "s3://AKIATESTER:wJalrPlantedSecret@127.0.0.1:9/team/model"
    signed = "https://127.0.0.1:9/team/model?sig=wJalrPlantedSecret"
    before = len(recorded())
    for call in (
        lambda: watch([url], spec),
        lambda: calibrate(spec, checkpoint=url),
        lambda: calibrate(spec, checkpoint=signed),
        lambda: campaign(spec.model, ["bf16"], store=url),
        lambda: calibrate(spec.model_copy(update={"store": url})),
    ):
        with pytest.raises(MpqError, match="carries credentials") as caught:
            call()
        assert "wJalrPlantedSecret" not in str(caught.value)
    assert len(recorded()) == before + 5
    assert "wJalrPlantedSecret" not in json.dumps(recorded(), default=str)
    assert f"s3://{HIDDEN}@127.0.0.1:9/team/model" in json.dumps(recorded(), default=str)


def test_a_checkpoint_exchanged_under_way_is_not_recorded(
    spec: RunSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that saw another content than the one that was found leaves no record, and the watch says so."""
    found = fingerprint(write_checkpoint(folder / "one"))
    seen = {
        "fingerprint": "another",
        "architecture": "a",
        "plan_files": [],
        "out": {},
        "stages": [],
    }
    monkeypatch.setattr(module, "calibrate", lambda spec: seen)
    with pytest.raises(MpqError, match="changed while it was calibrated"):
        watch([str(folder)], spec, settle_s=0)
    assert Records(spec).done(found) is None
