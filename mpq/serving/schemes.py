"""Schemes in compressed-tensors' words, as engines read them.

The key names and values are those of compressed-tensors 0.20 (QuantizationConfig, QuantizationScheme, QuantizationArgs), which the
tests read them back with. Each group has its own `format`: vLLM finds no scheme without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpq.errors import MpqError
from mpq.formats.format import Format
from mpq.formats.scheme import SCHEMES, Scheme, with_fitted

# what a file can hold: schemes with a scale, but no E5M2, which has no preset there
EXPORTED = tuple(
    s.name
    for s in SCHEMES.values()
    if s.weights.needs_scale and s.weights.exponent_bits != 5 and not s.cache
)
# of these, what an engine reads a layer's experts in. vLLM 0.32, compressed_tensors_moe.py: get_moe_method. transformers reads
# weights alone, integers where they are packed
# (integrations/compressed_tensors.py, 5.23), and leaves out the tensor's scale of NVFP4.
OF_EXPERTS = {
    "vllm": EXPORTED,
    "sglang": ("int8", "fp8_e4m3"),
    "transformers": (
        *with_fitted(
            *("int8", "fp8_e4m3", "mxfp4", "w4a8", "w8a16", "w4a16", "w4a16_g32", "mxfp4a16")
        ),
    ),
}
# of these, what vLLM 0.32 has a kernel for on any CPU (docs/engines.md: run)
ON_CPU = with_fitted("int8", "fp8_e4m3", "w4a8")


def formats_in_vllm(kind: str, device: str = "cpu") -> tuple[str, ...]:
    """The formats beside base that vLLM runs products of a kind in: linears alone have schemes."""
    if kind != "linear":
        return ()
    return ON_CPU if device == "cpu" else EXPORTED


def runs_in_vllm(
    formats: Mapping[str, str], kinds: Mapping[str, str], base: str, device: str = "cpu"
) -> bool:
    """Whether a plan (op → format; op → kind) lowers nothing that vLLM has no scheme for."""
    return all(f == base or f in formats_in_vllm(kinds[op], device) for op, f in formats.items())


def check_in_vllm(formats: Iterable[str], kind: str, device: str = "cpu") -> None:
    """Raise MpqError for formats that vLLM runs no product of this kind in."""
    known = formats_in_vllm(kind, device)
    if foreign := [f for f in formats if f not in known]:
        can = " and ".join(known) or "base alone"
        raise MpqError(f"vLLM runs no {kind} in {foreign[0]}: expected {can}.")


def stored_as(scheme: Scheme) -> str:
    """compressed-tensors' name of how a scheme's weights are stored. A 4-bit integer beside activations has a byte: the
    engine packs it (vLLM 0.32, compressed_tensors_w4a8_int)."""
    weights = scheme.weights
    if weights.kind == "int":
        return "pack-quantized" if scheme.activations is None else "int-quantized"
    if weights.bits == 4:
        return f"{'nvfp4' if weights.scale == 'e4m3' else 'mxfp4'}-pack-quantized"
    return "mxfp8-quantized" if weights.scale == "e8m0" else "float-quantized"


def scheme_group(name: str, targets: Iterable[str]) -> dict[str, Any]:
    """A group of `config_groups` in the scheme `name`: its targets by module name, or `Linear` for all."""
    scheme = SCHEMES[name]
    return {
        "format": stored_as(scheme),
        "targets": list(targets),
        "weights": {**_arguments(scheme.weights, "channel"), "dynamic": False},
        "input_activations": scheme.activations and _of_activations(scheme.activations),
        "output_activations": None,
    }


def _of_activations(fmt: Format) -> dict[str, Any]:
    if fmt.scale == "e4m3":  # the tensor's scale is in the file, the blocks' are found as they come
        return {**_arguments(fmt, "token"), "dynamic": "local", "observer": "static_minmax"}
    return {**_arguments(fmt, "token"), "dynamic": True}


def _arguments(fmt: Format, of_row: str) -> dict[str, Any]:
    """QuantizationArgs of a format; `of_row` is what a scale for each row is called."""
    found: dict[str, Any] = {"num_bits": fmt.bits, "type": fmt.kind, "symmetric": True}
    rows, columns = fmt.block
    if not fmt.by_blocks:
        found["strategy"] = of_row
    elif rows > 1:
        found |= {"strategy": "block", "block_structure": [rows, columns]}
    else:
        strategy = "tensor_group" if fmt.scale == "e4m3" else "group"
        found |= {"strategy": strategy, "group_size": columns}
    if dtype := {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}.get(fmt.scale):
        found |= {"scale_dtype": dtype, "zp_dtype": dtype}
    return found


# a model's head, experts and routers, by the names that most have for them
_NEVER_LOWERED = ("lm_head", "re:.*[.]experts[.].*", "re:.*[.]gate$", "re:.*[.]router$")


def section(targets: Mapping[str, Sequence[str]], ignore: Iterable[str]) -> dict[str, Any]:
    """A `quantization_config`: a group for each scheme that has targets, in EXPORTED's order; modules in `ignore` stay in base."""
    groups = {
        f"group_{number}": scheme_group(name, targets[name])
        for number, name in enumerate(name for name in EXPORTED if targets.get(name))
    }
    formats = {group["format"] for group in groups.values()} or {"dense"}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }


def all_in(name: str) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears are all in the scheme `name`, its head and experts in base."""
    return section({name: ["Linear"]}, _NEVER_LOWERED)


def each_in(targets: Mapping[str, Sequence[str]], others: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model with linears in schemes (scheme → their names) and all `others` in base."""
    return section(targets, (*others, *_NEVER_LOWERED))
