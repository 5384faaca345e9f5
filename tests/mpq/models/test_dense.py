"""Checkpoints that are published quantized are read as the values that their codes and scales stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from ml_dtypes import float4_e2m1fn
from safetensors.torch import load_file, save_file
from small import MIXTURES, small_model
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.loading import load_model
from mpq.models.stored import stored_formats

# of a weight (C, K): the tensors that a method stores, by the ends of their names, and the values that they stand for
Stored: TypeAlias = tuple[dict[str, Tensor], Tensor]
Writer: TypeAlias = Callable[[Tensor], Stored]
_HIGH, _WIDE = 20, 16  # the last block of a column is no whole one


def _blocks(weight: Tensor) -> Stored:
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // _HIGH), -(-columns // _WIDE)) / 64 + 1e-3
    codes = (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn)
    dense = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            dense[r, c] = codes[r, c].float() * scale[r // _HIGH, c // _WIDE]
    return {"weight": codes, "weight_scale_inv": scale}, dense


def _tensor(weight: Tensor) -> Stored:
    codes, scale = weight.to(torch.float8_e4m3fn), torch.tensor(0.75)
    more = {"input_scale": torch.tensor(0.5)}
    return {"weight": codes, "weight_scale": scale, **more}, codes.float() * 0.75


def _rows(weight: Tensor) -> Stored:
    codes, scale = weight.to(torch.float8_e4m3fn), torch.rand(len(weight), 1) + 0.5
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _e2m1(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Random codes packed as two a byte, the first one low, and their values as ml_dtypes has them."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    values = torch.from_numpy(codes.numpy().view(float4_e2m1fn).astype("float32"))
    return codes[..., 0::2] | (codes[..., 1::2] << 4), values


def _nvfp4(weight: Tensor) -> Stored:
    packed, values = _e2m1(weight.shape)
    scale = (torch.rand(len(weight), weight.shape[1] // 16) + 0.1).to(torch.float8_e4m3fn)
    dense = (values.unflatten(-1, (-1, 16)) * scale.float()[..., None] * 0.25).flatten(-2)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.25)}, dense


def _mxfp4(weight: Tensor) -> Stored:
    experts, inputs, outputs = weight.shape
    packed, values = _e2m1(torch.Size((experts, outputs, inputs // 32, 32)))
    exponents = torch.randint(120, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
    dense = values * 2.0 ** (exponents.float() - 127)[..., None]
    return {"_blocks": packed, "_scales": exponents}, dense.flatten(-2).mT.contiguous()


def _words(codes: Tensor, order: list[int] | None = None) -> Tensor:
    """Rows of 4-bit codes, eight to a word of 32 bits; `order` says which column goes to which place."""
    found = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        found |= codes[:, (order[place] if order else place) :: 8] << (4 * place)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def _grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (K, C), zeros and scales (groups of 16 inputs, C), and the values that they stand for, (C, K)."""
    outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(1, 16, (inputs // 16, outputs))
    scales = (torch.rand(inputs // 16, outputs) / 8 + 0.01).half()
    each = [(codes[k] - zeros[k // 16]) * scales[k // 16].float() for k in range(inputs)]
    return codes, zeros, scales, torch.stack(each, -1)


def _gptq(weight: Tensor) -> Stored:
    codes, zeros, scales, dense = _grouped(weight)
    order = torch.arange(len(codes), dtype=torch.int32) // 16
    packed = {"qweight": _words(codes.T).T.contiguous(), "qzeros": _words(zeros - 1)}
    return {**packed, "scales": scales, "g_idx": order}, dense


def _awq(weight: Tensor) -> Stored:
    codes, zeros, scales, dense = _grouped(weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's packing_utils.py: AWQ_ORDER
    return {
        "qweight": _words(codes, order),
        "qzeros": _words(zeros, order),
        "scales": scales,
    }, dense


def _shifted(weight: Tensor) -> Stored:
    codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
    zeros = torch.randint(-20, 20, (len(weight), 1), dtype=torch.int8)
    scale = torch.rand(len(weight), 1) / 256
    more = {"weight_scale": scale, "weight_zero_point": zeros}
    return {"weight": codes, **more}, (codes.float() - zeros) * scale


_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
_GROUPS = {"group_0": {"format": "int-quantized", "targets": ["Linear"], "weights": _INT8}}
_CT = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": _GROUPS}
_FP8 = {"quant_method": "fp8", "weight_block_size": [_HIGH, _WIDE]}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
CASES: list[tuple[str, str, Writer, dict[str, Any]]] = [
    ("DeepSeek's FP8", "deepseek_v3", _blocks, _FP8),
    ("ModelOpt's FP8", "mixtral", _tensor, {"quant_algo": "FP8"}),
    ("ModelOpt's NVFP4", "llama", _nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    ("FBGEMM's FP8", "llama", _rows, {"quant_method": "fbgemm_fp8"}),
    ("gpt-oss's MXFP4", "gpt_oss", _mxfp4, {"quant_method": "mxfp4"}),
    ("INT8 with zero points", "qwen3_moe", _shifted, _CT),
    ("GPTQ", "llama", _gptq, _GPTQ),
    ("AWQ", "llama", _awq, {"quant_method": "awq", "bits": 4, "group_size": 16}),
]


def published(
    folder: Path, model_type: str, write: Writer, section: dict[str, Any]
) -> tuple[Path, Path]:
    """A checkpoint stored by `write`, and one of the values that it stands for."""
    dense = folder / "dense"
    more = {"num_key_value_heads": 2, **MIXTURES.get(model_type, {}), "intermediate_size": 64}
    small_model(model_type, **more).save_pretrained(dense)
    quantized = shutil.copytree(dense, folder / "quantized")
    file, stored, values = "model.safetensors", {}, {}
    torch.manual_seed(0)
    for name, tensor in load_file(dense / file).items():
        values[name] = tensor
        quantizes = ("_proj" in name or ".experts." in name) and "bias" not in name
        if quantizes and tensor.ndim == (3 if model_type == "gpt_oss" else 2):
            parts, values[name] = write(tensor)
            stem = name.removesuffix("weight")
            stored |= {f"{stem}{end}": part for end, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, quantized / file, {"format": "pt"})
    save_file(values, dense / file, {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return quantized, dense


@pytest.mark.parametrize(
    ("model_type", "write", "section"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_codes_and_scales_are_values(
    model_type: str, write: Writer, section: dict[str, Any], tmp_path: Path
) -> None:
    """The model of a quantized checkpoint has the weights, and so the loss, of the one that holds its values; it is what
    transformers calls not quantized."""
    quantized, dense = published(tmp_path, model_type, write, section)
    tokens = torch.randint(0, 97, (2, 16))
    for base in ("fp32", "bf16"):
        found, want = load_model(quantized, base), load_model(dense, base)
        for (name, weight), wanted in zip(found.named_parameters(), want.parameters(), strict=True):
            assert torch.equal(weight, wanted), name
        loss = [m(tokens, labels=tokens).loss for m in (found, want)]
        assert torch.equal(*loss)
    assert not hasattr(load_config(quantized), "quantization_config")


def test_what_is_stored_in_which_format(tmp_path: Path) -> None:
    """Ops whose weights a checkpoint stores quantized, all experts of a layer one, are known by the model's names."""
    quantized, dense = published(tmp_path, "deepseek_v3", _blocks, _FP8)
    found = stored_formats(quantized, load_config(quantized))
    ops = {op for op in trace(load_config(dense)).ops.values() if op.kind in ("linear", "experts")}
    assert found == {op.name: "fp8_e4m3" for op in ops if op.name != "lm_head"}
    assert stored_formats(dense, load_config(dense)) == {}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"quant_method": "bitsandbytes"}, "by bitsandbytes.*model.dequantize"),
        ({**_GPTQ, "bits": 3}, "by GPTQ with 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by AWQ as gemv"),
        ({**_CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse as sparse-24"),
        ({**_CT, "transform_config": {"config_groups": {}}}, "with rotated weights"),
        ({**_FP8, "weight_block_size": [4, 4]}, r"with scales \["),
    ],
)
def test_what_cannot_be_read_is_named(section: dict[str, Any], told: str, tmp_path: Path) -> None:
    """A layout that mpq has no reader for is called by its name, with what to do."""
    quantized, _ = published(tmp_path, "llama", _blocks, section)
    with pytest.raises(MpqError, match=f"quantized already.*{told}"):
        load_model(quantized, "fp32")


def _scaled_inputs(weight: Tensor) -> Stored:
    stored, dense = _nvfp4(weight)
    return {**stored, "pre_quant_scale": torch.rand(weight.shape[1]) + 0.5}, dense


def _as_many_blocks_as_rows(weight: Tensor) -> Stored:
    codes, scale = weight.to(torch.float8_e4m3fn), torch.rand(len(weight) // 2, 2)
    return {"weight": codes, "weight_scale": scale}, codes.float()


@pytest.mark.parametrize(
    ("write", "section", "told"),
    [
        (_scaled_inputs, {"quant_algo": "NVFP4_AWQ"}, "inputs that are scaled"),
        (_as_many_blocks_as_rows, {"quant_method": "fbgemm_fp8"}, r"with scales \["),
    ],
)
def test_other_values_are_refused(
    write: Writer, section: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Weights that are divided by their inputs' scale, and scales of blocks that are as many as rows, are no values to read."""
    quantized, _ = published(tmp_path, "llama", write, section)
    with pytest.raises(MpqError, match=f"quantized already.*{told}"):
        load_model(quantized, "fp32")
