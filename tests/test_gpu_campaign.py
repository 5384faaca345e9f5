"""The campaign for a GPU machine, on a CPU: all of it but CUDA's own kernels, with no package that such a machine lacks."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from small import ROOT

# what mpq needs elsewhere and a machine with torch and transformers alone has not; polars and highspy are carried (the script's docstring)
LACKED = (
    "prefect",
    "pydantic",
    "fastapi",
    "sqlalchemy",
    "gurobipy",
    "datasets",
    "tenacity",
    "lm_eval",
    "distributed",
    "s3fs",
)
BARE = """
import runpy, sys
class Lacked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {lacked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Lacked())
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def run(*arguments: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The campaign in a process of its own, from a bare checkout."""
    argv = [str(ROOT / "bench" / "gpu_campaign.py"), *arguments, "--out", str(out)]
    paths = f"{ROOT}:{ROOT / 'bench'}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-c", BARE.format(lacked=LACKED, argv=argv)],
        env=os.environ | {"PYTHONPATH": paths} | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_here(patch: pytest.MonkeyPatch, *arguments: str, out: Path) -> None:
    """The campaign in this process, which has the large packages imported."""
    script = ROOT / "bench" / "gpu_campaign.py"
    patch.syspath_prepend(str(script.parent))
    patch.setattr(sys, "argv", [str(script), *arguments, "--out", str(out)])
    runpy.run_path(str(script), run_name="__main__")


def test_the_campaign_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of time, one chunk is measured and kept, no plan is made of it, and the output says how to go on; a second command
    goes on from there: kernels, timing and plans at ten budgets give tables, figures and a summary, in $OUT too."""
    tiny = ("tiny", "--device", "cpu", "--repeats", "2")
    late = ("--parts", "timing,plans", "--minutes", "0")
    run_here(monkeypatch, *tiny, *late, out=tmp_path)
    assert "call again with --resume" in capsys.readouterr().out
    assert not (tmp_path / "campaign-tiny-plans.parquet").exists()
    kept = pl.read_parquet(tmp_path / "campaign-tiny-timing.parquet")

    (tmp_path / "out").mkdir()
    told = run(*tiny, "--resume", out=tmp_path, OUT=str(tmp_path / "out"))
    assert told.returncode == 0, told.stderr
    count = f"{42 - kept.height} configurations to measure, {kept.height} measured earlier"
    assert count in told.stdout
    result = json.loads(told.stdout.splitlines()[-1])["result"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"campaign-tiny-{n}"
        for n in (
            "kernels.parquet",
            "plans.parquet",
            "plans.png",
            "roofline.png",
            "summary.json",
            "timing.parquet",
        )
    }
    timing, plans = (
        pl.read_parquet(tmp_path / f"campaign-tiny-{n}.parquet") for n in ("timing", "plans")
    )
    assert timing.head(kept.height).equals(kept), "what was there has been measured again"
    assert timing.height == result["configurations_measured"] == 32 + 2 + 4 + 2 + 2
    assert timing.select("signature", "configuration").n_unique() == timing.height
    assert plans.height == 2 + 4 * 10
    assert set(plans["strategy"]) == {
        "ip_et",
        "ip_tt",
        "random",
        "prefix",
        "all base",
        "all lowered",
    }
    for row in plans.filter(~pl.col("strategy").is_in(["all base", "all lowered"])).iter_rows(
        named=True
    ):
        assert row["loss_mse"] <= row["tau"] ** 2 * 2.5**2 * (1 + 1e-9)
        assert row["ttft_s"] > 0
    kernels = pl.read_parquet(tmp_path / "campaign-tiny-kernels.parquet")
    assert {"base: SDPA", "int8", "bf16", "base"} == set(kernels["way"])
    assert (kernels["share_of_ceiling"] > 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_fp8_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for CUDA where there is none, one sentence says what is needed and what can be run instead."""
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "1b", out=tmp_path)
    assert ended.value.code == 2
    assert "cuda has no FP8" in capsys.readouterr().err.splitlines()[-1]


def test_every_way_of_a_kernel_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's kernels, on Triton's interpreter where there is no GPU: each linear, tile and product is timed, its error told."""
    pytest.importorskip("triton", reason="Triton comes for Linux on x86-64 alone")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu_kernels

    from mpq.kernels import cuda, flash

    formats: dict[str, Any] = {
        "linear": ("fp32", "bf16", "fp8_e4m3"),
        "bgemm": ("fp32", "bf16", "fp8_e4m3"),
    }
    monkeypatch.setattr(gpu_kernels, "native_formats", lambda device, kind="linear": formats[kind])
    monkeypatch.setattr(gpu_kernels, "native_kernels", lambda device: cuda)
    monkeypatch.setattr(gpu_kernels, "REPLAYS", 1)
    monkeypatch.setitem(gpu_kernels.TILES, 64, [(64, 64, 4, 2), (128, 64, 4, 2)])
    monkeypatch.setitem(flash.TILES, 64, flash.TILES[64])
    rows = gpu_kernels.linears({"o_proj": (40, 24)}, 70, "cpu", torch.bfloat16)
    attention, tile = gpu_kernels.attentions(1, 70, 4, 2, 16, "cpu", torch.bfloat16)
    assert tile in gpu_kernels.TILES[64]
    found = {"bytes_per_s": 1e9, "base_flops": 1e9, "fp8_flops": 2e9}
    frame = gpu_kernels.with_shares(rows + attention, found)
    assert frame.height == 5 + 1 + 1 + 2 + 3 + 2
    errors = frame.filter(pl.col("error").is_not_null())
    low = pl.col("way").str.contains("fp8")
    assert errors.filter(low)["error"].is_between(1e-3, 0.08).all()
    assert (errors.filter(~low)["error"] < 1e-2).all()
    gpu_kernels.roofline(frame, found, "kernels")
