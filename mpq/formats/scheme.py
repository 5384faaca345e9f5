"""What an op runs in: how its weights are stored, and how its activations are.

A scheme is data, like a format. The formats with one scale for a row are schemes of their own name, in which both
operands are stored alike; attention's products, whose operands are all activations, run in these, or read K and V
from a cache that is stored in a format of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mpq.formats.format import BLOCKED, FORMATS, OF_TENSOR, Format, registered

_CT = "compressed-tensors 0.20, PRESET_SCHEMES"
Operand = Literal["input", "weight", "lhs", "rhs"]


@dataclass(frozen=True)
class Scheme:
    """One scheme. Without `activations` these stay in base, and the product is computed there.

    `preset` is what compressed-tensors calls it, "" where it has no name for it. A scheme of the `cache` is none of weights:
    `weights` is what K and V are stored in, and both are read back to base, in which Q and P stay.
    """

    name: str
    weights: Format
    activations: Format | None
    preset: str
    source: str
    cache: bool = False

    @property
    def bits(self) -> float:
        """Effective bits of a weight: its own, and its share of its block's scale. A whole row's scale is not counted."""
        return 8 * self.weights.bytes

    @property
    def bytes(self) -> float:
        """Effective bytes of a weight."""
        return self.weights.bytes

    @property
    def mac_time(self) -> float | None:
        """Theoretical time of a multiply-accumulate in BF16 MACs; None where it is base's."""
        return None if self.activations is None else self.activations.mac_time

    @property
    def alike(self) -> bool:
        """Whether both operands are stored alike, a scale a row: what attention's products can run in too."""
        return self.weights is self.activations and not self.weights.by_blocks

    def rounds(self, operand: Operand) -> Format | None:
        """What it rounds an operand of a product to; None where it leaves that in base, or is no scheme of such a product.

        `input` and `weight` are those of a linear; attention's products have K or V as `rhs`, Q or P as `lhs`.
        """
        if operand in ("lhs", "rhs"):
            return self.weights if self.alike or (self.cache and operand == "rhs") else None
        if self.cache:
            return None
        return self.weights if operand == "weight" else self.activations

    @property
    def in_words(self) -> str:
        """`weights E2M1, 1 x 16; activations E2M1, 1 x 16`: elements, and what shares a scale."""
        if self.cache:
            return f"K and V {_operand(self.weights)}, read back to base"
        activations = "in base" if self.activations is None else _operand(self.activations)
        return f"weights {_operand(self.weights)}; activations {activations}"

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of its operands."""
        return (self.weights,) if self.activations is None else (self.weights, self.activations)


_PLAIN = {"int8": "W8A8", "fp8_e4m3": "FP8_DYNAMIC"}
_MXFP8, _MXFP4, _NVFP4 = BLOCKED["mxfp8"], BLOCKED["mxfp4"], BLOCKED["nvfp4"]
_INT8, _INT4 = FORMATS["int8"], BLOCKED["int4_128"]

_MAX: dict[str, Scheme] = {
    s.name: s
    for s in (
        *(Scheme(f.name, f, f, _PLAIN.get(f.name, ""), f.source) for f in FORMATS.values()),
        Scheme(
            "fp8_block",
            BLOCKED["fp8_e4m3_128x128"],
            BLOCKED["fp8_e4m3_128"],
            "FP8_BLOCK",
            f"DeepSeek-V3 (arXiv 2412.19437), Sec. 3.3.2; {_CT}",
        ),
        Scheme("mxfp8", _MXFP8, _MXFP8, "MXFP8", f"OCP MX 1.0; {_CT}"),
        Scheme("mxfp4", _MXFP4, _MXFP4, "MXFP4", f"OCP MX 1.0; {_CT}"),
        Scheme("nvfp4", _NVFP4, _NVFP4, "NVFP4", _CT),
        Scheme("w4a8", _INT4, _INT8, "W4A8", _CT),
        Scheme("w8a16", _INT8, None, "", "a scale a channel, where W8A16 has groups of 128"),
        Scheme("w4a16", _INT4, None, "W4A16", _CT),
        Scheme("w4a16_g32", BLOCKED["int4_32"], None, "", "W4A16 with groups of 32"),
        Scheme("nvfp4a16", _NVFP4, None, "NVFP4A16", _CT),
        Scheme("mxfp4a16", _MXFP4, None, "MXFP4A16", _CT),
        Scheme(
            "fp8_kv",
            OF_TENSOR,
            None,
            "",
            "compressed-tensors' kv_cache_scheme; vLLM 0.32, layers/quantization/kv_cache.py",
            cache=True,
        ),
    )
}


def _fitted(scheme: Scheme) -> Scheme:
    """The scheme with weights' scales of the least squared error: to an engine the same, since scales are in the file."""
    own = replace(scheme.weights, name=f"{scheme.weights.name}_mse", fit="mse")
    source = f"{scheme.name}, the scales of weights fitted"
    return replace(scheme, name=f"{scheme.name}_mse", weights=own, source=source)


SCHEMES: dict[str, Scheme] = {
    **_MAX,
    **{f"{s.name}_mse": _fitted(s) for s in _MAX.values() if s.weights.bits == 4},
}


def with_fitted(*names: str) -> tuple[str, ...]:
    """The schemes, and those of them with fitted scales: what reads the former reads the latter."""
    return (*names, *(f"{name}_mse" for name in names if f"{name}_mse" in SCHEMES))


def get_scheme(name: str) -> Scheme:
    """The scheme called `name`, as people write it. Raises MpqError for a name that is not there."""
    return registered(name, SCHEMES)


def of_kind(kind: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the schemes that ops of a kind (linear, experts, bgemm) can run in."""
    products = kind == "bgemm"
    return tuple(n for n in names if get_scheme(n).rounds("rhs" if products else "weight"))


def of_cache(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the schemes that are of the cache of K and V."""
    return tuple(n for n in names if get_scheme(n).cache)


def mac_time(name: str, base: str) -> float:
    """Theoretical time of a multiply-accumulate of a scheme beside a base, in BF16 MACs."""
    own = get_scheme(name).mac_time
    return float(get_scheme(base).mac_time or 0.0) if own is None else own


def table_of_schemes() -> list[dict[str, object]]:
    """The schemes as rows: name, what weights are (kind … scale), effective bits, activations, MAC time, preset, source."""
    return [
        {
            "name": s.name,
            "kind": s.weights.kind,
            "bits": s.weights.bits,
            "exponent_bits": s.weights.exponent_bits,
            "mantissa_bits": s.weights.mantissa_bits,
            "maximum": s.weights.maximum,
            "effective_bits": round(s.bits, 4),
            "block": _block(s.weights),
            "scale": s.weights.scale if s.weights.needs_scale else "",
            "activations": _activations(s),
            "mac_time": s.mac_time,
            "preset": s.preset,
            "source": s.source,
        }
        for s in SCHEMES.values()
    ]


def _activations(scheme: Scheme) -> str:
    if scheme.cache:
        return "K and V alone"
    return "base" if scheme.activations is None else _operand(scheme.activations)


def _block(fmt: Format) -> str:
    rows, columns = fmt.block
    if not fmt.needs_scale:
        return ""
    if fmt.of_tensor:
        return "tensor"
    return "row" if not fmt.by_blocks else f"{rows} x {columns}"


def _operand(fmt: Format) -> str:
    """An element and what shares its scale, `E4M3, 1 x 128`."""
    element = (
        f"E{fmt.exponent_bits}M{fmt.mantissa_bits}" if fmt.kind == "float" else f"INT{fmt.bits}"
    )
    return ", ".join(part for part in (element, _block(fmt)) if part)
