"""Plans as Neural Compressor's settings for Gaudi: read by the tool's own code where it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_export import checkpoint, linears, plan_of

from mpq.errors import MpqError
from mpq.export.exporting import check_exportable, export

FOLDER = Path(os.environ.get("MPQ_NEURAL_COMPRESSOR", ".work/peers/neural-compressor")).resolve()
LAYER = "model.layers.0."
FORMATS = {
    f"{LAYER}self_attn.q_proj": "fp8_e4m3",
    f"{LAYER}self_attn.qk_matmul": "fp8_e4m3",
    f"{LAYER}self_attn.av_matmul": "bf16",
    f"{LAYER}mlp.up_proj": "fp8_e4m3",
    "model.layers.1.self_attn.av_matmul": "fp8_e4m3",
}
MODULES = {
    f"{LAYER}self_attn.q_proj",
    f"{LAYER}self_attn.matmul_qk",
    f"{LAYER}mlp.up_proj",
    "model.layers.1.self_attn.matmul_av",
}
# which of the modules the tool would quantize; on a CPU it has another table of classes and runs in QDQ mode alone
_CHOSEN = """
import json, sys
from neural_compressor.torch.quantization import FP8Config
from neural_compressor.torch.algorithms.fp8_quant._quant_common.quant_config import Fp8cfg
from neural_compressor.torch.algorithms.fp8_quant._core.utils import should_quantize
modules = json.loads(sys.argv[1])
for file in sys.argv[2:]:
    said = FP8Config.from_json_file(file)
    assert said.quantize and said.fp8_config == "E4M3" and said.hp_dtype == "bf16", said.to_dict()
    config = Fp8cfg.parse({**json.load(open(file)), "use_qdq": True})
    config.cfg["mod_dict"] = {kind: kind.lower() for kind in modules.values()}
    print(json.dumps([n for n, kind in modules.items() if should_quantize(config, kind, n)]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in BF16."""
    return checkpoint(tmp_path_factory.mktemp("gaudi") / "model", "llama", torch.bfloat16)


def test_modules_in_fp8_are_named(source: Path, tmp_path: Path) -> None:
    """Linears by their names, attention's products by optimum-habana's, in settings to measure and to quantize; no weights."""
    made = export(
        plan_of(source, FORMATS, "bf16"), source, tmp_path / "out", to="neural-compressor"
    )
    assert made.engine == "gaudi"
    assert set(made.files) == {"maxabs_measure.json", "maxabs_quant.json", "plan.json"}
    for file, mode in (("maxabs_measure.json", "MEASURE"), ("maxabs_quant.json", "QUANTIZE")):
        said = json.loads((tmp_path / "out" / file).read_text())
        assert said["mode"] == mode
        assert {name.removesuffix("$") for name in said["allowlist"]["names"]} == MODULES


def test_what_gaudi_does_not_run(source: Path, tmp_path: Path) -> None:
    """Other formats and bases, and a product that is no module there: named, each."""
    op = f"{LAYER}mlp.up_proj"
    for formats, base, said in (
        ({op: "fp8_e5m2"}, "bf16", "up_proj runs in fp8_e5m2 .*make the plan with fp8_e4m3"),
        ({op: "fp8_e4m3"}, "fp32", "base is fp32: make the plan with base bf16"),
        ({f"{LAYER}mlp.none": "fp8_e4m3"}, "bf16", "mlp.none, which is no nn.Linear"),
    ):
        with pytest.raises(MpqError, match=said):
            export(plan_of(source, formats, base), source, tmp_path / "a", to="neural-compressor")
    neox = checkpoint(tmp_path / "neox", "gpt_neox", torch.bfloat16)
    product = {"gpt_neox.layers.0.attention.qk_matmul": "fp8_e4m3"}
    with pytest.raises(MpqError, match="no module for it in gpt_neox: pin"):
        check_exportable(product, "bf16", neox, "gaudi", to="neural-compressor")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(
    not (FOLDER / "neural_compressor").exists(),
    reason="no Neural Compressor: make peers, or set MPQ_NEURAL_COMPRESSOR",
)
def test_the_tool_reads_them(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neural Compressor's own FP8Config reads the file, and of all modules of Gaudi's model its own matching of names takes the
    plan's, no more and no fewer: layer 10 is not layer 1, neither KV cache nor fused attention goes along, and a plan that
    lowers nothing takes none."""
    for name, formats in (("out", FORMATS), ("none", {})):
        export(plan_of(source, formats, "bf16"), source, tmp_path / name, to="neural-compressor")
    modules = dict.fromkeys(linears(source, "bf16"), "Linear")
    for layer in ("0", "1", "10"):
        attention = f"model.layers.{layer}.self_attn."
        modules |= {f"{attention}{p}": "Matmul" for p in ("matmul_qk", "matmul_av")}
        modules |= {f"{attention}{p}": "KVCache" for p in ("k_cache", "v_cache")}
        modules[f"{attention}fused_scaled_dot_product_attention"] = "ModuleFusedSDPA"
        modules[f"{attention}q_proj"] = modules[f"model.layers.{layer}.mlp.up_proj_2"] = "Linear"
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    files = [str(tmp_path / name / "maxabs_quant.json") for name in ("out", "none")]
    done = subprocess.run(
        [sys.executable, "-c", _CHOSEN, json.dumps(modules), *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    of_plan, of_nothing = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert (set(of_plan), of_nothing) == (MODULES, [])
