"""A run that ends with a checkpoint: the plan to run, exported once, and again only where it has to be."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from small import short, small_spec

from mpq.errors import MpqError
from mpq.flows.calibrate import aimed_at, calibrate
from mpq.program.plan import Plan
from mpq.spec import RunSpec, parse_spec

pytestmark = pytest.mark.usefixtures("reloaded_here")


def served(folder: Path, **export: object) -> RunSpec:
    """The short run of the small model for vLLM, by memory, in INT8 and FP8, which ends with a checkpoint."""
    data = short(small_spec(folder)).model_dump(mode="json")
    data["objectives"]["m"]["formats"] = ["int8", "fp8_e4m3"]
    return parse_spec({**data, "engine": "vllm", "export": export})


def test_a_run_ends_with_a_checkpoint(tmp_path: Path) -> None:
    """The plan to run is exported and checked; a second run finds it, a damaged or missing one is written again."""
    spec = served(tmp_path)
    result = calibrate(spec)
    out = Path(result["out"]["checkpoint"])
    assert out == Path(spec.out) / "tiny" / "checkpoint"
    record = json.loads((out / "export.json").read_text())
    assert record["check"]["passed"]
    assert record["plan"] == Path(result["out"]["plan"]).stem
    plan = Plan.from_json((out / "plan.json").read_text())
    assert plan.provenance["model"] == spec.model.path
    assert result["stages"][-1][:3] == ("export", 1, 0)
    assert calibrate(spec)["stages"][-1][:3] == ("export", 1, 1)
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert calibrate(spec)["stages"][-1][:3] == ("export", 1, 0)
    assert weights.read_bytes() == whole


def test_other_targets(tmp_path: Path) -> None:
    """The same run ends with ModelOpt's form, checked, or with settings for Gaudi that have attention's products, which its
    engine lets plans lower; each engine's rules are the program's."""
    plain = served(tmp_path).model_dump(mode="json")
    plain["model"]["base"] = "bf16"
    plain["objectives"]["m"]["formats"] = ["fp8_e4m3"]
    spec = parse_spec({**plain, "export": {"to": "modelopt"}})
    out = Path(calibrate(spec)["out"]["checkpoint"])
    record = json.loads((out / "export.json").read_text())
    assert (record["to"], record["check"]["passed"]) == ("modelopt", True)
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
    tt = {"formats": ["fp8_e4m3"], "strategies": ["ip"]}
    gaudi = {"engine": "gaudi", "objectives": {"tt": tt}, "export": {"to": "neural-compressor"}}
    out = Path(calibrate(parse_spec({**plain, **gaudi}))["out"]["checkpoint"])
    named = json.loads((out / "maxabs_quant.json").read_text())["allowlist"]["names"]
    assert any(name.endswith("matmul_qk$") for name in named)


def test_another_plan_by_name(tmp_path: Path) -> None:
    """A plan that is named is exported; one in a given folder is not written over unless the spec says so."""
    out = str(tmp_path / "here")
    spec = served(tmp_path, out=out, plan="m-ip_m-tau0.01", to="json")
    assert calibrate(spec)["out"]["checkpoint"] == out
    other = served(tmp_path, out=out, plan="m-ip_m-tau0.02", to="json")
    other = other.model_copy(update={"taus": (0.02,)})
    with pytest.raises(MpqError, match=r"export.out .*not empty: .* export.overwrite: true"):
        calibrate(other)
    assert other.export
    replacing = other.export.model_copy(update={"overwrite": True})
    calibrate(other.model_copy(update={"export": replacing}))
    assert json.loads(Path(out, "export.json").read_text())["plan"] == "m-ip_m-tau0.02"


def test_a_checkpoint_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL gets the checkpoint once; a run that finds it there sends nothing, one without it makes it again."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/served"
    spec, memory = served(tmp_path, out=url), fsspec.filesystem("memory")
    result = calibrate(spec)
    assert result["out"]["checkpoint"] == url
    assert json.loads(memory.cat_file(f"{url}/export.json"))["check"]["passed"]
    assert calibrate(spec)["stages"][-1][:3] == ("export", 1, 1)
    memory.rm_file(f"{url}/model.safetensors")
    assert calibrate(served(tmp_path, out=url, overwrite=True))["stages"][-1][:3] == (
        "export",
        1,
        0,
    )
    assert memory.exists(f"{url}/model.safetensors")
    memory.rm(url, recursive=True)


def test_each_checkpoint_has_a_folder(tmp_path: Path) -> None:
    """A run for another checkpoint, as watch makes them, exports below the given folder."""
    spec = served(tmp_path, out=str(tmp_path / "served"))
    aimed = aimed_at(spec, str(tmp_path / "newer")).export
    assert aimed
    assert aimed.out == str(tmp_path / "served" / "tiny-newer")


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"plan": "et-ip_et-tau0.01"}, "makes no plan et-ip_et-tau0.01: .* m-ip_m-tau0.01"),
        ({"out": "{}/full"}, "not empty"),
        ({"out": "{}/model"}, "where the checkpoint itself lies"),
    ],
)
def test_what_cannot_end_so_is_told_first(
    tmp_path: Path, export: dict[str, str], message: str
) -> None:
    """A plan that is not made, a folder of somebody's, the checkpoint's own: before sensitivity."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    spec = served(tmp_path, **{k: v.format(tmp_path) for k, v in export.items()})
    with pytest.raises(MpqError, match=message):
        calibrate(spec)
    assert not (tmp_path / "store" / "sensitivity").exists()


def test_what_the_file_cannot_say_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op that the plan may lower and the file cannot express is named before sensitivity."""
    from mpq.export import expressible

    monkeypatch.setattr(expressible, "EXPORTED", ("int8",))
    with pytest.raises(MpqError, match="runs in fp8_e4m3 in this plan"):
        calibrate(served(tmp_path))
    assert not (tmp_path / "store" / "sensitivity").exists()
