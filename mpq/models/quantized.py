"""Checkpoints whose weights are quantized already: told from the configuration, and from the files where it is silent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.models.layout import opened

_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "native FP8",
    "modelopt": "ModelOpt",
    "mlx": "MLX",
    "mxfp4": "MXFP4",
    "torchao": "torchao",
}
# what is read as the values that its codes and scales stand for (dense.py)
READABLE = (
    *("fp8", "mxfp8", "fbgemm_fp8", "modelopt", "mxfp4", "compressed-tensors", "gptq", "awq"),
)
_WHAT_TO_DO = {
    "bitsandbytes": "load it in transformers with bitsandbytes, and save it after model.dequantize()",
}
# scales, zero points and packed weights under the names that quantizers give them
_OF_QUANTIZERS = re.compile(
    r"(^|[._])((weight|input|output|activation|[qkv]|proj)_scale(_inv|_2)?|scales|scale_inv|qweight|qzeros"
    r"|g_idx|(weight_|input_)?zero_point|weight_packed|absmax|quant_map|SCB)$|\.quant_state\.|\.biases$"
)
_WIDE = ("F64", "F32", "F16", "BF16")


def section_of(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """What a checkpoint says about how its weights are quantized, empty where it does not.

    `config` is the content of config.json; ModelOpt writes hf_quant_config.json beside it, MLX the key `quantization`.
    """
    for part in (config, config.get("text_config")):
        said = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(said, dict) and said:
            return said
    if isinstance(config.get("quantization"), dict):
        return {"quant_method": "mlx", **config["quantization"]}
    if folder and (folder / "hf_quant_config.json").is_file():
        try:
            beside = json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8-sig"))
            said = dict(beside["quantization"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {"quant_method": "unnamed"}  # what else is the file there for
        return {"quant_method": "modelopt", **said} if said.get("quant_algo") else {}
    return {}


def method_of(config: Mapping[str, Any], folder: Path | None = None) -> str:
    """How a checkpoint's weights are quantized (`gptq`, `fp8`, ...), "" where it does not say that they are."""
    said = section_of(config, folder)
    if not said:
        return ""
    # what older checkpoints leave out: ModelOpt's, and bitsandbytes', which transformers tells likewise
    marks = {
        "quant_algo": "modelopt",
        "load_in_8bit": "bitsandbytes",
        "load_in_4bit": "bitsandbytes",
    }
    told = next((method for mark, method in marks.items() if said.get(mark)), "unnamed")
    method = str(said.get("quant_method") or told)
    return "modelopt" if method.startswith("modelopt") else method.lower()


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """Raise MpqError, saying by what, where the weights are quantized in a way that cannot be read here."""
    method = method_of(config, folder)
    if method and method not in READABLE:
        raise already_quantized(
            folder,
            f"by {_NAMES.get(method, method)}"
            if method != "unnamed"
            else "in a way that is not named",
            _WHAT_TO_DO.get(method, ""),
        )


def already_quantized(folder: Path, how: str, what_to_do: str = "") -> MpqError:
    """The sentence about a checkpoint that is quantized in a way that cannot be read."""
    what_to_do = what_to_do or "give the checkpoint that it was made from"
    return MpqError(
        f"The weights in {folder} are quantized already, {how}, which mpq cannot turn back into fp32, bf16 or fp16: {what_to_do}."
    )


def is_narrow(part: Any) -> bool:
    """Whether safetensors' slice of a tensor is a matrix of 8 bits or fewer, or of packed ones.

    Masks that old checkpoints keep in bytes are called `bias`.
    """
    return part.get_dtype() not in (*_WIDE, "I64", "BOOL") and len(part.get_shape()) > 1


def refuse_narrow(files: Iterable[Path], folder: Path) -> None:
    """Raise MpqError for weights of 8 bits or fewer in the files of a checkpoint that names no quantization.

    Loaded as they are, without their scales, they would be another model's.
    """
    for file in files:
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(key)
                if is_narrow(part):
                    raise already_quantized(folder, f"{key} is stored as {part.get_dtype()}")


def refuse_left_over(keys: Iterable[str], folder: Path) -> None:
    """Raise MpqError where the loader had no place for a quantizer's tensor, such as a weight's scale."""
    if scales := sorted(key for key in keys if _OF_QUANTIZERS.search(key)):
        raise already_quantized(folder, f"as {scales[0]} among them tells")
