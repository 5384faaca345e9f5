"""`make faults`: damage, broken transfers, kills, several writers and hostile files, each tried, and a table of what became of them.

Every case ends right or in one sentence; none is served as if nothing had been. docs/storage.md has the table.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import polars as pl
import pytest
from object_storage import FaultyProxy, s3_server
from small import DEMO, ROOT, write_checkpoint

from mpq.cli.console import read_frame
from mpq.cli.inventory import entries, read_plan, runs, verify
from mpq.errors import MpqError
from mpq.models.layout import INDEX
from mpq.program.gains import solve_table
from mpq.program.plan import Plan
from mpq.report.runs import read_run, write_run
from mpq.store.entries import Damaged, Store
from mpq.store.tables import table

pytest.importorskip("s3fs")
pytestmark = pytest.mark.faults

FRAME = pl.DataFrame({"op": [f"layer.{i}" for i in range(500)], "gain_s": [0.5] * 500})
OTHER = FRAME.with_columns(gain_s=pl.lit(7.0))
FIGURES: dict[str, Counter[str]] = {}
PAGE = (ROOT / "docs" / "storage.md").read_text(encoding="utf-8")


def count(family: str, outcome: str) -> None:
    """One case more of a family, and what became of it."""
    FIGURES.setdefault(family, Counter())[outcome] += 1


@pytest.fixture(scope="module", autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """The table, printed once all is tried."""
    yield
    lines = ["", "| tried | cases | what became of them |", "|---|---|---|"]
    for family, outcomes in FIGURES.items():
        told = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
        lines.append(f"| {family} | {outcomes.total()} | {told} |")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))
    # what no timing decides
    figures = {line for line in lines if line.startswith(("| damage", "| hostile"))}
    assert figures <= set(PAGE.splitlines()), "docs/storage.md shows other figures"


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real server of the S3 protocol."""
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyProxy]:
    """What stands between the store and the server."""
    proxy = FaultyProxy(s3_port)
    proxy.start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATESTER",
        "AWS_SECRET_ACCESS_KEY": "planted-secret-of-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_ENDPOINT_URL": proxy.url,
        "MPQ_STORE_ATTEMPTS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(proxy: FaultyProxy) -> str:
    """A folder of a bucket of its own."""
    name = f"faults-{random.getrandbits(60):x}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}/mpq"


DAMAGE: dict[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda whole, other: b"",
    "cut": lambda whole, other: whole[: len(whole) // 2],
    "a bit flipped": lambda whole, other: whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
    "garbage": lambda whole, other: b"\x00\xff" * 300,
    "another's": lambda whole, other: other,
    "longer": lambda whole, other: whole + b"}",
    "nested too deep": lambda whole, other: b"[" * 100_000,
    "another type": lambda whole, other: b"[1, 2]",
    "a null": lambda whole, other: b"null",
    "mistyped": lambda whole, other: whole.replace(b'"bytes": ', b'"bytes": "x", "b": '),
    "leads elsewhere": lambda whole, other: whole.replace(b'"suffix": "', b'"suffix": "x/../../'),
}


@pytest.mark.parametrize("where", ["a disk", "S3"])
def test_damage(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each damage to each file of an entry: nothing, or the table that was written; verify names it; written again it is whole."""
    store = Store(tmp_path.as_uri() if where == "a disk" else request.getfixturevalue("bucket"))
    fs, root = store._open()
    other = store.write_table("gains", "k2", OTHER)
    for name, damage in [*DAMAGE.items(), ("gone", None)]:
        for file in ("meta.json", "the data"):
            ref = store.write_table("gains", "k1", FRAME)
            here, there = (
                f"{root}/gains/{r.key}/"
                + ("meta.json" if file == "meta.json" else f"{r.sha256}.parquet")
                for r in (ref, other)
            )
            whole = fs.cat_file(here)
            if damage is None:
                fs.rm_file(here)
            elif (new := damage(whole, fs.cat_file(there))) == whole:
                continue
            else:
                fs.pipe_file(here, new)
            found = store.find("gains", "k1")
            if found is not None:
                assert store.read_table(found).equals(FRAME), (name, file)
            if damage is not None:
                (entry,) = (e for e in verify(store) if e.key == "k1")
                assert (entry.state == "whole") == (found is not None), (name, file)
            count(f"damage to {file} on {where}", "noticed" if found is None else "harmless")
            ref = store.write_table("gains", "k1", FRAME)
            assert store.find("gains", "k1") == ref


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("method", ["PUT", "GET"])
@pytest.mark.parametrize(
    "fault", ["500", "503", "403", "skewed", "reset", "truncated", "short", "flipped"]
)
def test_transfers(fault: str, method: str, times: int, bucket: str, proxy: FaultyProxy) -> None:
    """Each fault on the way, once and for good, while an entry is written, found and read."""
    store, ref = Store(bucket), None
    if method == "GET":
        ref = store.write_table("gains", "k1", FRAME)
    proxy.spoil(fault, method, times)
    outcome = "passed over"
    try:
        written = store.write_table("gains", "k1", FRAME) if ref is None else ref
        found = store.find("gains", "k1")
        if found is None:
            outcome = "taken for damage"
        else:
            assert found == written
            assert store.read_table(found).equals(FRAME)
    except MpqError as error:
        outcome = "told in a sentence"
        told = str(error)
        if "planted-secret" in told or "\n" in told:
            pytest.fail(told)
    count(f"answers of S3 spoilt {'once' if times == 1 else 'for good'}", outcome)
    proxy.spoil("", "", 0)
    store.write_table("gains", "k1", FRAME)
    assert store.read_table(store.find("gains", "k1") or pytest.fail("not found")).equals(FRAME)


_WRITER = """
import sys, polars as pl
from mpq.store.entries import Store
store, i = Store(sys.argv[1]), 0
while True:
    frame = pl.DataFrame({"i": [i] * 20000})
    store.write_table("gains", f"k{i % 3}", frame)
    print(i, flush=True)
    i += 1
"""


def test_kills(tmp_path: Path) -> None:
    """kill -9 while entries are written over and over: each is whole, before or after; a rest that is left is nobody's."""
    store, chance = Store(tmp_path.as_uri()), random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, store.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        for _ in range(4):
            writer.stdout.readline()
        time.sleep(chance.random() / 20)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for entry in verify(store):
            assert entry.state == "whole", entry.damage
        for key in ("k0", "k1", "k2"):
            found = store.find("gains", key)
            assert found
            assert store.read_table(found)["i"].n_unique() == 1
        count("kill -9 while writing", "left whole entries alone")


@pytest.mark.parametrize("where", ["a disk", "S3"])
def test_many_at_once(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Four that write one key with four contents, and two that read it meanwhile: always the one or the other, whole."""
    url = tmp_path.as_uri() if where == "a disk" else request.getfixturevalue("bucket")
    frames = [FRAME.with_columns(gain_s=pl.lit(float(i))) for i in range(4)]
    Store(url).write_table("gains", "k1", frames[0])
    seen: list[object] = []

    def write(frame: pl.DataFrame) -> None:
        for _ in range(5):
            Store(url).write_table("gains", "k1", frame)

    def look() -> None:
        for _ in range(10):
            found = Store(url).find("gains", "k1")
            seen.append(found and any(Store(url).read_table(found).equals(f) for f in frames))

    threads = [threading.Thread(target=write, args=(f,)) for f in frames]
    threads += [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 20
    for _ in seen:
        count(f"reads beside four writers on {where}", "whole")


def test_hostile_files(tmp_path: Path) -> None:
    """Plans, records of runs, gains tables and names that people hand in: used as they say, or one sentence."""
    store = Store((tmp_path / "store").as_uri())
    plan = Plan("ip_et", "et", 0.01, "fp32", {"a": "bf16"}, 0, 0, 0, 1).to_json().encode()
    run = tmp_path / "run"
    run.mkdir()
    row = {"group": 0, "configuration": ["fp32"], "gain": 0.0, "loss_mse": 0.0}
    made = store.write_table("gains", "k1", table("gains", [{"objective": "m", **row}]))
    write_run(run, "n", {"model": "m"}, {"gains": [made]})
    gains = json.dumps([row])
    cases: dict[str, tuple[Path, bytes, Callable[[Path], object]]] = {
        "plans": (tmp_path / "plan.json", plan, read_plan),
        "records of runs": (
            run / "run.json",
            (run / "run.json").read_bytes(),
            lambda p: (read_run(p.parent), runs(run)),
        ),
        "gains tables": (
            tmp_path / "gains.json",
            gains.encode(),
            lambda p: solve_table(read_frame(str(p)), 1.0),
        ),
    }
    for family, (file, whole, ask) in cases.items():
        wrong: list[bytes] = [damage(whole, b"{}") for damage in DAMAGE.values()]
        if isinstance(data := json.loads(whole), dict):
            wrong += [
                json.dumps({**data, key: value}).encode()
                for key in data
                for value in (None, [], {}, "\ud800\x1b[2J", -1, 1e308, [[["x"]]])
            ]
        for content in wrong:
            file.write_bytes(content)
            try:
                ask(file)
                count(f"hostile {family}", "used as they say")
            except MpqError as error:
                told = str(error)
                assert "\x1b" not in told
                count(f"hostile {family}", "told in a sentence")
    with pytest.raises(Damaged):
        store.read_table(store.write_bytes("gains", "k3", b"PAR1", "parquet"))
    assert {e.state for e in entries(store)} == {"whole"}


def test_hostile_inputs(tmp_path: Path) -> None:
    """The files of a checkpoint, specs and texts, each damaged in each way: read as they are, or one sentence."""
    from mpq.models.checkpoint import fingerprint
    from mpq.models.loading import load_model
    from mpq.models.text import load_tokenizer, read_blocks
    from mpq.spec import TextSpec, load_spec

    model = write_checkpoint(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, model)
    index = json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}}).encode()
    spec = (ROOT / "examples" / "demo.yaml").read_bytes()
    text = b'{"text": "one and another"}\n' * 9
    checkpoint: Callable[[Path], object] = lambda _: (fingerprint(model), load_model(model, "fp32"))  # noqa: E731
    cases: list[tuple[str, Path, bytes, Callable[[Path], object]]] = [
        *(
            ("checkpoints", model / name, (model / name).read_bytes(), checkpoint)
            for name in ("config.json", "model.safetensors")
        ),
        ("checkpoints", model / INDEX, index, checkpoint),
        *(
            (
                "tokenizers",
                model / name,
                (model / name).read_bytes(),
                lambda _: load_tokenizer(model),
            )
            for name in ("tokenizer.json", "tokenizer_config.json")
        ),
        ("specs", tmp_path / "spec.yaml", spec, load_spec),
        *(
            (
                "texts",
                tmp_path / f"text.{ending}",
                text,
                lambda p: read_blocks(TextSpec(source=str(p), samples=1, length=4), DEMO, 2048),
            )
            for ending in ("jsonl", "txt", "npy", "parquet", "jsonl.gz")
        ),
    ]
    for family, file, whole, ask in cases:
        for damage in DAMAGE.values():
            if (new := damage(whole, b"{}")) == whole:
                continue
            file.write_bytes(new)
            try:
                ask(file)
                count(f"hostile {family}", "used as they say")
            except MpqError as error:
                told = str(error)
                assert not {"\n", "\x1b"} & set(told), told
                count(f"hostile {family}", "told in a sentence")
        if file.name == INDEX:
            file.unlink()
        else:
            file.write_bytes(whole)
