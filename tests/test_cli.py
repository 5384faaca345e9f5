"""The command line as a user meets it: data on stdout, one sentence and exit code 2 for a mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from small import ROOT, write_checkpoint

from mpq.cli import main as cli
from mpq.errors import MpqError
from mpq.program.plan import Plan
from mpq.report.runs import write_run


@dataclass
class Done:
    """What a command left: its exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def mpq(*arguments: object) -> Done:
    """Run `mpq` as its entry point does, in this process: loading torch in each would take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mpq", *map(str, arguments)])
        patch.setenv("COLUMNS", "80")
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and, beside it, tokens."""
    folder = write_checkpoint(tmp_path_factory.mktemp("cli") / "model")
    np.save(folder.parent / "tokens.npy", np.random.default_rng(0).integers(0, 97, (8, 16)))
    return folder


def test_formats_as_json() -> None:
    """`--json` prints data alone on stdout."""
    done = mpq("formats", "--json")
    assert done.returncode == 0
    names = {f["name"] for f in json.loads(done.stdout)}
    assert names > {"fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "nvfp4", "w4a16"}


def test_partition_writes_parquet(checkpoint: Path, tmp_path: Path) -> None:
    """`--out FILE.parquet` holds the groups table; people see it in 80 characters."""
    done = mpq("partition", checkpoint, "--out", tmp_path / "g.parquet")
    assert done.returncode == 0, done.stderr
    frame = pl.read_parquet(tmp_path / "g.parquet")
    assert frame.columns[:4] == ["group", "order", "op", "kind"]
    shown = done.stdout.splitlines()
    assert max(map(len, shown)) <= 80
    assert ["1", "model.layers.0.self_attn.o_proj", "32", "→", "32"] in [
        line.split()[:5] for line in shown
    ]


def test_sensitivity_time_and_solve(checkpoint: Path, tmp_path: Path) -> None:
    """The stages one by one, each from what the one before wrote."""
    tokens = checkpoint.parent / "tokens.npy"
    done = mpq(
        "sensitivity",
        checkpoint,
        "--calibration",
        tokens,
        "--samples",
        4,
        "--length",
        16,
        "--out",
        tmp_path / "s.json",
        "--effects",
        tmp_path / "effects.parquet",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"]["n_samples"] == 4
    assert pl.read_parquet(tmp_path / "effects.parquet")["sample"].unique().to_list() == [*range(4)]
    small = ("--formats", "bf16", "--batch", 1, "--length", 8, "--repeats", 2, "--limit", 8)
    on = ("--device", "cpu", "--threads", 2)
    shown = mpq("time", checkpoint, *small, *on, "--out", tmp_path / "t.parquet")
    assert shown.returncode == 0, shown.stderr
    assert pl.read_parquet(tmp_path / "t.parquet")["device"][0].endswith("2 threads")
    assert set(pl.read_parquet(tmp_path / "t.parquet")["configuration"].list.first()) <= {
        "fp32",
        "bf16",
    }
    assert max(map(len, shown.stdout.splitlines())) <= 80
    words = [line.split()[:5] for line in shown.stdout.splitlines()]
    assert ["gate_proj", "up_proj", "2", "bf16", "·"] in words, (
        "op names and formats in one line, base as a dot"
    )
    assert "base TTFT (ms): " in shown.stdout
    gains = pl.DataFrame(
        {
            "objective": "et",
            "group": [0, 0, 1, 1],
            "configuration": [["fp32"], ["bf16"]] * 2,
            "gain": [0.0, 1.0, 0.0, 3.0],
            "loss_mse": [0.0, 2e-9, 0.0, 3e-9],
            "kl": [0.0, 0.01, 0.0, 0.02],
        }
    )
    gains.write_parquet(tmp_path / "gains.parquet")
    solved = mpq("solve", "--gains", tmp_path / "gains.parquet", "--budget", "4e-9", "--json")
    assert solved.returncode == 0, solved.stderr
    answer = json.loads(solved.stdout)
    assert [row["configuration"] for row in answer["chosen"]] == [["fp32"], ["bf16"]]
    assert answer["gain"] == 3.0
    bounded = ("--cost", "kl", "--budget", "0.015", "--json")
    answer = json.loads(mpq("solve", "--gains", tmp_path / "gains.parquet", *bounded).stdout)
    assert [row["configuration"] for row in answer["chosen"]] == [["bf16"], ["fp32"]]


def test_help_teaches() -> None:
    """Every command says in its help what it does and takes."""
    for command in (
        "run",
        "init",
        "partition",
        "sensitivity",
        "time",
        "solve",
        "eval",
        "report",
        "reproduce",
        "formats",
        "frontier",
    ):
        done = mpq(command, "--help")
        assert done.returncode == 0
        assert len(done.stdout) > 300, command


MISTAKES = {
    "missing checkpoint": (["partition", "./nope"], "No checkpoint at ./nope"),
    "a prefill beyond all measure": (
        ["partition", "{model}", "--length", "10000000000"],
        "10,000,000,000 tokens has more multiply",
    ),
    "no base": (["time", "{model}", "--base", ""], "Unknown format ''"),
    "base of 8 bits": (
        ["time", "{model}", "--base", "int8"],
        "must be fp32, bf16 or fp16, not int8",
    ),
    "two bases": (["time", "{model}", "--base", "bf16,fp16"], "Unknown format 'bf16,fp16'"),
    "comma too many": (["time", "{model}", "--formats", "bf16,"], "has an empty name"),
    "base alone": (
        ["sensitivity", "{model}", "--calibration", "nope.txt", "--formats", "fp32"],
        "nothing to lower to",
    ),
    "no such device": (
        ["sensitivity", "{model}", "--calibration", "nope.txt", "--device", "gpu"],
        "Unknown device 'gpu'",
    ),
    "no GPU": (
        ["sensitivity", "{model}", "--calibration", "nope.txt", "--device", "cuda:99"],
        "There is no cuda:99 here",
    ),
    "no GPU to time on": (["time", "{model}", "--device", "cuda:99"], "There is no cuda:99 here"),
    "a clock of one thread": (
        ["time", "{model}", "--device", "cpu", "--clock", "cpu", "--threads", "2"],
        "expected clock wall or auto, or threads 1",
    ),
    "a report that is none": (
        ["report", "nope", "--out", "report.txt"],
        "expected a name that ends in .html, .png",
    ),
    "unknown format": (["time", "{model}", "--formats", "int9"], "Unknown format 'int9'"),
    "format that is not native": (["time", "{model}", "--formats", "fp8_e4m3"], "native"),
    "empty calibration": (
        ["sensitivity", "{model}", "--calibration", "{empty}", "--length", "16"],
        "empty",
    ),
    "missing calibration": (
        ["sensitivity", "{model}", "--calibration", "nope.txt"],
        "No text at nope.txt",
    ),
    "missing gains": (
        ["solve", "--gains", "nope.parquet", "--budget", "1"],
        "No table at nope.parquet",
    ),
    "damaged gains": (
        ["solve", "--gains", "{damaged}", "--budget", "1"],
        "cannot be read as a table",
    ),
    "impossible budget": (["solve", "--gains", "{gains}", "--budget", "1e-30"], "budget"),
    "budget below zero": (["solve", "--gains", "{gains}", "--budget", "-1"], "budget"),
    "unknown solver": (
        ["solve", "--gains", "{gains}", "--budget", "1", "--solver", "cbc"],
        "Invalid value for '--solver'",
    ),
    "misspelt key": (["run", "{spec}"], "unknown key calibratoin"),
    "missing spec": (["run", "nope.yaml"], "No spec at nope.yaml"),
    "a plan for another model": (
        ["eval", "{plan}", "--model", "{model}", "--text", "{tokens}"],
        "was made for a model with fingerprint",
    ),
    "no plan": (["eval", "{spec}"], "Not a plan"),
    "figures into a place that cannot be written": (
        ["report", "{run}", "--figures", "{taken}/figures"],
        "The figures cannot be written to",
    ),
    "no run": (["report", "nope"], "No run at nope"),
    "unknown suffix": (["formats", "--out", "x.xlsx"], "expected a name that ends in .parquet"),
    # said before anything is measured: the model, which is none, is not even looked at
    "unknown suffix of what takes long": (
        ["time", "no/such/model", "--out", "x.xlsx"],
        "expected a name that ends in .parquet",
    ),
    "no folder for what takes long": (
        ["sensitivity", "no/such/model", "--calibration", "x.txt", "--out", "no/such/t.csv"],
        "no/such is no folder",
    ),
    "a folder in the place of what takes long": (
        ["time", "no/such/model", "--out", "{folder}"],
        "it is there, and no file of yours",
    ),
    "a folder of the system's": (
        ["time", "no/such/model", "--out", "/proc/t.csv"],
        "/proc is not yours to write to",
    ),
    "a name that no file can have": (["report", "x" * 300], "the name is too long"),
    "documents of tasks alone": (["eval", "{of_tasks}", "--model", "{model}"], "give --text"),
    "usage": (["partition"], "Missing argument"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, checkpoint: Path, tmp_path: Path) -> None:
    """Exit code 2, nothing on stdout, no traceback."""
    arguments, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").touch()
    np.save(tmp_path / "empty.npy", np.empty((0, 16), np.int64))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "spec.yaml").write_text("model: {path: x}\ncalibratoin: {source: y}\n")
    rows = {
        "group": [0, 0],
        "configuration": ["a", "b"],
        "gain": [1.0, 2.0],
        "loss_mse": [1e-9, 2e-9],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "gains.csv")
    plan = Plan(
        "ip_m",
        "m",
        0.1,
        "fp32",
        {"model.layers.0.mlp.up_proj": "int8"},
        0.0,
        0.0,
        0.0,
        1.0,
        fingerprint="f" * 64,
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    of_tasks = replace(plan, fingerprint="", provenance={"evaluation": "tasks"})
    (tmp_path / "of_tasks.json").write_text(of_tasks.to_json())
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "taken").write_text("a file in the folder's place")
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", "empty", {}, {})
    places = {
        "run": tmp_path / "run",
        "taken": tmp_path / "taken",
        "folder": tmp_path / "folder.json",
        "of_tasks": tmp_path / "of_tasks.json",
        "plan": tmp_path / "plan.json",
        "tokens": checkpoint.parent / "tokens.npy",
        "model": checkpoint,
        "empty": tmp_path / "empty.npy",
        "damaged": tmp_path / "damaged.parquet",
        "spec": tmp_path / "spec.yaml",
        "gains": tmp_path / "gains.csv",
    }
    done = mpq(*(a.format(**places) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_the_documented_cli_is_the_real_one(tmp_path: Path) -> None:
    """docs/cli.md is what `make docs` would write now."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "mpq.cli.main",
        "utils",
        "docs",
        "--name",
        "mpq",
        "--output",
        tmp_path / "cli.md",
    ]
    subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "TERMINAL_WIDTH": "100"},
    )
    assert (tmp_path / "cli.md").read_text() == (ROOT / "docs" / "cli.md").read_text(), (
        "run `make docs`"
    )


def test_too_little_memory_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's own refusal of a tensor that no memory holds; other errors of the program stay what they are."""
    for make, told in (
        (lambda: torch.empty(2**50, dtype=torch.uint8), SystemExit),
        (lambda: torch.empty(2) @ torch.empty(3), RuntimeError),
    ):
        monkeypatch.setattr(cli, "app", make)
        with pytest.raises(told) as caught:
            cli.main()
    assert "not enough memory for that: lower the batch" in " ".join(
        capsys.readouterr().err.split()
    )
    assert "size" in str(caught.value)


def test_what_an_extra_would_bring_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without Prefect, and whatever else is missing while a command runs; a module that is no extra stays a bug."""

    def without(name: str) -> object:
        return None if name == "prefect" else object()

    monkeypatch.setattr("mpq.errors.find_spec", without)
    done = mpq("run", ROOT / "examples" / "demo.yaml")
    assert done.returncode == 2
    assert "pip install 'mpq[pipeline]'" in " ".join(done.stderr.split())

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli, "app", lambda: missing("datasets.arrow"))
    assert "pip install 'mpq[datasets]'" in " ".join(mpq().stderr.split())
    monkeypatch.setattr(cli, "app", lambda: missing("mpq.nothing"))
    with pytest.raises(ModuleNotFoundError):
        mpq()


def test_mistakes_in_a_spec_are_told_before_anything_slow(tmp_path: Path) -> None:
    """In a process of its own: the text is missing, and neither torch nor Prefect was loaded to say so."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "model: {path: some/model}\ncalibration: {source: ./none.txt}\nobjectives: {m: {formats: [int8]}}\n"
        f"out: {tmp_path / 'out'}\n"
    )
    code = (
        "import sys, mpq.cli.main\n"
        "try:\n    mpq.cli.main.main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'prefect', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", spec], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "No text at ./none.txt" in " ".join(done.stderr.split())
    assert done.stdout == "[]\n"


def test_without_formats_all_that_are_native_are_timed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mpq time` needs no formats: they are the device's own, base left out; nothing is timed here."""
    asked = []

    def times_of(config: object, formats: list[str], base: str, device: str, **how: object) -> None:
        asked.append((formats, base, device))
        raise MpqError("enough")

    monkeypatch.setattr("mpq.method.times_of", times_of)
    for base in ("fp32", "bf16"):
        assert "enough" in mpq("time", checkpoint, "--device", "cpu", "--base", base).stderr
    assert asked == [(["bf16", "int8"], "fp32", "cpu"), (["int8"], "bf16", "cpu")]
