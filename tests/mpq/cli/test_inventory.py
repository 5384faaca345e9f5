"""What a store holds, where a plan came from, what is damaged and what may go, as `mpq store` tells it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

from mpq.cli.inventory import by_key as index
from mpq.cli.inventory import entries, remove, trace_back, unneeded
from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.program.plan import Plan
from mpq.report.runs import write_run
from mpq.store.entries import Store, TableRef, content_key

FRAME = pl.DataFrame({"op": ["a", "b"], "gain_s": [1.0, 2.5]})


@dataclass(frozen=True)
class Team:
    """A store with a run that is kept, a plan that is kept, and what was left of runs that are not."""

    store: Store
    runs: Path
    plan: Path
    refs: dict[str, TableRef]

    @property
    def folder(self) -> Path:
        """The store's folder on disk."""
        return Path(self.store.url.removeprefix("file://"))


@pytest.fixture
def team(tmp_path: Path) -> Team:
    """groups → sensitivity, timing → gains → plans (of the run); lone gains (of a plan file); old gains (of nothing)."""
    store, refs = Store((tmp_path / "store").as_uri()), {}

    def write(name: str, kind: str, *upstream: str) -> None:
        frame = FRAME.with_columns(name=pl.lit(name))
        refs[name] = store.write_table(
            kind,
            content_key(name),
            frame,
            upstream=tuple(refs[u].key for u in upstream),
            provenance={"stage": name},
        )

    write("groups", "groups")
    write("sensitivity", "sensitivity", "groups")
    write("timing", "timing", "groups")
    write("gains", "gains", "groups", "sensitivity", "timing")
    write("plans", "plans", "gains")
    write("lone timing", "timing", "groups")
    write("lone gains", "gains", "lone timing")
    write("old timing", "timing")
    write("old gains", "gains", "old timing")
    run = tmp_path / "runs" / "nightly"
    (run / "plans").mkdir(parents=True)
    write_run(run, "nightly", {"model": "tiny"}, {"plans": [refs["plans"]]})
    for path, gains in (
        (run / "plans" / "et.json", "gains"),
        (tmp_path / "kept.json", "lone gains"),
    ):
        made = {"gains": refs[gains].key, "sensitivity": refs["sensitivity"].key, "model": "tiny"}
        path.write_text(
            Plan("ip_et", "et", 0.01, "fp32", {"a": "bf16"}, 0, 0, 0, 1, provenance=made).to_json()
        )
    return Team(store, tmp_path / "runs", tmp_path / "kept.json", refs)


def call(*arguments: object) -> Result:
    """`mpq store …`; its stdout is the result, a mistake its exception."""
    return CliRunner().invoke(app, ["store", *map(str, arguments)], env={"COLUMNS": "200"})


def test_ls(team: Team) -> None:
    """Tables and runs, for people and as JSON."""
    told = call("ls", team.store.url, "--runs", team.runs)
    assert told.exit_code == 0, told.exception
    for word in ("nightly", "tiny", "lone timing", team.refs["gains"].key[:12], "whole"):
        assert word in told.stdout
    data = json.loads(call("ls", team.store.url, "--runs", team.runs, "--json").stdout)
    assert {t["key"] for t in data["tables"]} == {r.key for r in team.refs.values()}
    assert [(r["run"], r["plans"], r["tables"], r["tables_here"]) for r in data["runs"]] == [
        ("nightly", 1, 1, 1)
    ]


def test_show_a_plan(team: Team) -> None:
    """From a plan back to groups and timing; each key's way back once."""
    told = call("show", team.store.url, team.runs / "nightly" / "plans" / "et.json")
    assert told.exit_code == 0, told.exception
    for name in ("gains", "sensitivity", "timing", "groups"):
        assert team.refs[name].key[:12] in told.stdout
    assert team.refs["lone timing"].key[:12] not in told.stdout
    data = json.loads(call("show", team.store.url, team.plan, "--json").stdout)
    gains = next(s for s in data["came_from"] if s["name"] == "gains")
    assert gains["came_from"][0]["key"] == team.refs["lone timing"].key
    assert gains["came_from"][0]["came_from"][0]["entries"][0]["stage"] == "groups"


def test_show_a_key(team: Team) -> None:
    """A key's beginning is enough, with or without its kind; none or a missing input is said."""
    key = team.refs["plans"].key
    for text in (key, key[:10], f"plans/{key[:10]}"):
        assert key[:12] in call("show", team.store.url, text).stdout
    for text in ("zzzz", f"gains/{key[:10]}", "gains/"):
        assert isinstance(call("show", team.store.url, text).exception, MpqError)
    (team.folder / "groups" / team.refs["groups"].key / "meta.json").unlink()
    for file in (team.folder / "groups" / team.refs["groups"].key).iterdir():
        file.unlink()
    assert "not in this store" in call("show", team.store.url, key).stdout


def test_a_ring_of_inputs_ends(team: Team) -> None:
    """Damaged metadata may name each other; the way back still ends."""
    a, b = content_key("a"), content_key("b")
    team.store.write_table("gains", a, FRAME, upstream=(b,))
    team.store.write_table("gains", b, FRAME, upstream=(a,))
    assert trace_back(a, index(entries(team.store))).came_from[0].came_from[0].shown_above


@pytest.mark.parametrize("damage", ["same size", "gone", "meta", "meta of another"])
def test_verify_names_the_damaged(team: Team, damage: str) -> None:
    """Every kind of damage is found, named, and the exit is a mistake's; whole stores pass."""
    assert call("verify", team.store.url).exit_code == 0
    ref = team.refs["timing"]
    folder = team.folder / ref.kind / ref.key
    data = folder / f"{ref.sha256}.parquet"
    if damage == "same size":
        content = data.read_bytes()
        data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "gone":
        data.unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        other = team.refs["gains"]
        (folder / "meta.json").write_bytes(
            (team.folder / other.kind / other.key / "meta.json").read_bytes()
        )
    told = call("verify", team.store.url, "--json")
    assert isinstance(told.exception, MpqError)
    assert f"timing/{ref.key}" in str(told.exception)
    data_told = json.loads(told.stdout)
    assert (data_told["damaged"], data_told["whole"]) == (1, 8)


def test_gc_is_a_dry_run(team: Team) -> None:
    """Without --delete nothing goes; what is named is what nothing needs."""
    before = set(team.folder.rglob("*"))
    told = json.loads(
        call(
            "gc",
            team.store.url,
            "--runs",
            team.runs,
            "--plan",
            team.plan,
            "--older-than",
            0,
            "--json",
        ).stdout
    )
    assert set(team.folder.rglob("*")) == before
    assert not told["deleted"]
    assert {w["path"].split("/")[1] for w in told["waste"]} == {
        team.refs["old gains"].key,
        team.refs["old timing"].key,
    }
    assert told["files"] == 4


def test_gc_deletes(team: Team) -> None:
    """--delete removes it; what plan and run came from stays whole; a stranger's file stays; a second time nothing is left."""
    stranger = team.folder / "notes" / "of" / "ours.txt"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("keep")
    done = call(
        "gc",
        team.store.url,
        "--runs",
        team.runs,
        "--plan",
        team.plan,
        "--older-than",
        0,
        "--delete",
    )
    assert done.exit_code == 0, done.exception
    assert stranger.exists()
    for name, ref in team.refs.items():
        assert (team.store.find(ref.kind, ref.key) is None) == name.startswith("old")
    assert call("verify", team.store.url).exit_code == 0
    again = call(
        "gc",
        team.store.url,
        "--runs",
        team.runs,
        "--plan",
        team.plan,
        "--older-than",
        0,
        "--delete",
        "--json",
    )
    assert json.loads(again.stdout)["files"] == 0


def test_gc_keeps_what_is_young(team: Team) -> None:
    """A run under way has no record yet: by default nothing of the last day goes, nor what it came from."""
    told = json.loads(call("gc", team.store.url, "--runs", team.runs, "--json").stdout)
    assert told["files"] == 0
    long_ago = time.time() - 3e5
    for path in team.folder.rglob("*.*"):
        if team.refs["old gains"].key not in str(path):
            os.utime(path, (long_ago, long_ago))
    told = json.loads(call("gc", team.store.url, "--runs", team.runs, "--json").stdout)
    assert {w["path"].split("/")[1] for w in told["waste"]} == {
        team.refs["lone gains"].key,
        team.refs["lone timing"].key,
    }


def test_gc_takes_what_a_kill_left(team: Team) -> None:
    """Data without metadata, data that a second writer replaced, and halves of writes go, from kept entries too."""
    kept, unfinished = team.refs["gains"], content_key("killed")
    team.store.write_table(kept.kind, kept.key, FRAME.head(1), upstream=kept.upstream)
    (team.folder / kept.kind / kept.key / f"{'0' * 64}.parquet.{'a' * 32}.part").write_bytes(
        b"half"
    )
    team.store.write_table("gains", unfinished, FRAME)
    (team.folder / "gains" / unfinished / "meta.json").unlink()
    waste, missing = unneeded(
        team.store, entries(team.store), [team.refs["plans"].key], time.time() + 1
    )
    assert not missing
    found = {w.why for w in waste if kept.key in w.path or unfinished in w.path}
    assert found == {"superseded", "left over", "unfinished"}
    assert not [w for w in waste if w.path.endswith("meta.json") and kept.key in w.path]


def test_gc_keeps_what_watch_remembers(team: Team) -> None:
    """Records of watched checkpoints stay, with the tables behind their plans, or every checkpoint would be calibrated again."""
    lone = team.refs["lone gains"]
    team.store.write_bytes(
        "watched", content_key("a checkpoint"), b"{}", "json", upstream=(lone.key,)
    )
    waste, _ = unneeded(team.store, entries(team.store), [team.refs["plans"].key], time.time() + 1)
    assert waste
    assert not [w for w in waste if w.path.startswith("watched") or lone.key in w.path]


def test_gc_refuses_to_guess(team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to keep, a record that cannot be read, damage on the way back, a store that is none: a sentence, nothing goes."""
    monkeypatch.chdir(tmp_path)
    before = set(team.folder.rglob("*"))
    mistakes = [
        call("gc", team.store.url, "--delete", "--older-than", 0),
        call("gc", tmp_path / "no", "--runs", team.runs),
    ]
    meta = team.folder / "gains" / team.refs["gains"].key / "meta.json"
    whole = meta.read_text()
    meta.write_text("{")
    mistakes.append(call("gc", team.store.url, "--runs", team.runs, "--older-than", 0, "--delete"))
    meta.write_text(whole)
    (team.runs / "nightly" / "run.json").write_text("{")
    mistakes.append(call("gc", team.store.url, "--runs", team.runs, "--older-than", 0, "--delete"))
    assert all(isinstance(m.exception, MpqError) for m in mistakes), [m.exception for m in mistakes]
    assert set(team.folder.rglob("*")) == before


def test_gc_sees_what_is_used_meanwhile(team: Team) -> None:
    """What a run found since the listing stays whole, meta.json and data: it was marked as used."""
    old, key = team.refs["old gains"], team.refs["old gains"].key
    before = time.time() - 3600
    for path in team.folder.rglob("*.*"):
        os.utime(path, (before - 1e5, before - 1e5))
    waste, _ = unneeded(team.store, entries(team.store), [team.refs["plans"].key], before)
    assert {w.path.split("/")[1] for w in waste} >= {key, team.refs["old timing"].key}
    meta = team.folder / old.kind / key / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "provenance": {}}))
    os.utime(meta, (before - 1e5, before - 1e5))
    assert team.store.find(old.kind, key) == old
    gone = remove(team.store, waste, before)
    assert team.store.find(old.kind, key) == old
    assert team.refs["old timing"].key in {w.path.split("/")[1] for w in gone}


def test_gc_goes_by_the_stores_clock(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is days ahead does not take what was written just now for old."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 1e6)
    told = json.loads(call("gc", team.store.url, "--runs", team.runs, "--json").stdout)
    assert told["files"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100000,
        "[]",
        "7",
        '{"kind": 5}',
        '{"provenance": 3, "upstream": 4}',
        '{"sha256": "\\ud800"}',
        "\x00",
        "",
    ],
)
def test_one_bad_metadata_file_does_not_stop_the_others(team: Team, text: str) -> None:
    """verify and ls name the one entry as damaged, whatever lies in its metadata file, and tell of the others."""
    ref = team.refs["timing"]
    (team.folder / ref.kind / ref.key / "meta.json").write_text(text)
    told = call("verify", team.store.url, "--json")
    assert isinstance(told.exception, MpqError)
    counted = json.loads(told.stdout)
    assert (counted["damaged"], counted["whole"]) == (1, 8)
    assert call("ls", team.store.url).exit_code == 0


def test_names_do_not_steer_the_terminal(team: Team) -> None:
    """Escape sequences, markup, NULs and halves of surrogate pairs in an entry's provenance are shown, not obeyed."""
    bad = "\x1b[2J [/red] [bold]x\x00\ud800\u202e"
    ref = team.refs["plans"]
    meta = team.folder / ref.kind / ref.key / "meta.json"
    made = {"stage": bad, "host": bad, "written_unix_s": "yesterday"}
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "provenance": made}))
    for told in (
        call("ls", team.store.url),
        call("show", team.store.url, f"plans/{ref.key}"),
        call("show", team.store.url, f"plans/{ref.key}", "--json"),
    ):
        assert told.exit_code == 0, told.exception
        assert "[/red]" in "".join(told.stdout.split())
        assert not set(told.stdout) & set("\x1b\x00\ud800\u202e")
