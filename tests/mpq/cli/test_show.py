"""`mpq show` and `mpq diff`: a plan on one screen, and what another does differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpq.cli.main import app
from mpq.cli.show import map_of
from mpq.errors import MpqError
from mpq.program.plan import Plan

LAYERS = 12
ROLES = ("self_attn.q_proj", "mlp.down_proj")
PRICE = {"constraint": "tie q k v", "gain_without": 2e-3, "loss_mse_without": 1e-6}
PLAN = Plan(
    strategy="ip_et",
    objective="et",
    tau=0.01,
    base="bf16",
    formats={
        **{
            f"model.layers.{i}.{role}": "int8" if i % 2 else "bf16"
            for i in reversed(range(LAYERS))
            for role in ROLES
        },
        "lm_head": "fp8_e4m3",
    },
    predicted_loss_mse=2e-6,
    budget=3e-6,
    predicted_gain=1.5e-3,
    predicted_gain_error=1e-4,
    mean_square_loss=4.0,
    effective_bits=12.25,
    weight_bytes=1e6,
    engine="vllm",
    provenance={"prices": [PRICE], "stored": {"lm_head": "fp8_e4m3"}},
)
OTHER = replace(
    PLAN, formats={**PLAN.formats, "lm_head": "bf16"}, predicted_gain=1e-3, effective_bits=13.0
)


def run(*arguments: object) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two plans that differ in the head."""
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, plan in zip(paths, (PLAN, OTHER), strict=True):
        path.write_text(plan.to_json())
    return paths


def test_a_map_has_layers_in_their_order() -> None:
    """A letter a layer, by number and not by text; base is a dot."""
    assert map_of(PLAN) == {**dict.fromkeys(ROLES, "·I" * 6), "lm_head": "8"}


def test_layers_keep_their_places() -> None:
    """In a hybrid model a layer without a role leaves a blank: the place in a line is the layer's number."""
    formats = {
        "model.layers.0.linear_attn.out_proj": "int8",
        "model.layers.1.self_attn.q_proj": "int8",
        "model.layers.2.linear_attn.out_proj": "bf16",
        "model.layers.3.self_attn.q_proj": "int8",
    }
    assert map_of(replace(PLAN, formats=formats)) == {
        "linear_attn.out_proj": "I ·",
        "self_attn.q_proj": " I I",
    }


def test_show_is_one_screen(files: tuple[Path, Path]) -> None:
    """80 × 24: the map, the gain with its interval, loss, τ, bits, engine, and what each constraint costs."""
    shown = run("show", files[0])
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 30
    for words in (
        "·I·I·I·I·I·I",
        "I int8",
        "8 fp8_e4m3",
        "gain, ms: 1.5",
        "interval: 0.1",
        "1 ops in fp8_e4m3: base",
    ):
        assert words in shown
    for words in ("tau: 0.01", "effective bits: 12.25", "engine: vllm", "tie q k v", "2.00e-06"):
        assert words in shown
    told = json.loads(run("show", files[0], "--json"))
    assert told["formats"] == PLAN.formats
    assert told["prices"] == [PRICE]
    assert told["predicted gain, ms"] == pytest.approx(1.5)


def test_a_time_that_cannot_be_is_doubted(tmp_path: Path) -> None:
    """A plan that promises what no device does says so on its screen; one that does not, says nothing."""
    for predicted, doubted in ((2.7e-3, True), (0.6, False)):
        plan = replace(PLAN, base_ttft_s=0.929, predicted_ttft_s=predicted)
        (tmp_path / "p.json").write_text(plan.to_json())
        assert ("TTFT of 2.7 ms cannot be: base takes 929" in run("show", tmp_path / "p.json")) is (
            doubted
        )


def test_diff_tells_what_moved(files: tuple[Path, Path]) -> None:
    """The op that moved, and gain and bits before and after; what is alike is left out."""
    shown = run("diff", *files)
    assert "lm_head" in shown
    assert "effective bits: 12.25 → 13" in shown
    assert "tau" not in shown
    told = json.loads(run("diff", *files, "--json"))
    assert told["moved"] == [{"op": "lm_head", "before": "fp8_e4m3", "after": "bf16"}]
    assert told["predicted gain, ms"] == pytest.approx([1.5, 1.0])
    assert json.loads(run("diff", files[0], files[0], "--json"))["moved"] == []


def test_an_objective_of_others(tmp_path: Path) -> None:
    """A plan for an objective that this version does not know is shown as far as it is known, its prices too."""
    file = tmp_path / "a.json"
    file.write_text(replace(PLAN, objective="energy").to_json())
    assert "tie q k v" in run("show", file)


def test_files_that_are_no_plans(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A file that is not there, one that is no plan, and a plan of another model."""
    with pytest.raises(MpqError, match="cannot be read"):
        run("show", tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(MpqError, match="Not a plan"):
        run("show", tmp_path / "text.json")
    strange = tmp_path / "strange.json"
    strange.write_text(replace(PLAN, formats={"h.0.fc": "int8"}).to_json())
    with pytest.raises(MpqError, match="no op in common"):
        run("diff", files[0], strange)
