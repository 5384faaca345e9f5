"""Numerical formats: what an element can be, which elements share a scale, and how much noise rounding adds.

A format is data. Floats are described by the OCP/IEEE parameters from which every code point follows;
integers are uniform. `mantissa_bits` counts explicit bits only (BF16 has 7). What an op runs in is a pair
of formats, one for its weights and one for its activations: scheme.py.

Noise models, the variance of the rounding error of one element u (method.md, "Noise per format"):

- `paper`   u² 2^(-2m) / 12                  floats (eq. 18)
- `ulp`     (2^(floor(log2|u|) - m))² / 12   floats: the real rounding step; 0.54 of `paper` over a binade
- integers  Δ² / 12, Δ = amax / maximum at the granularity of the kernel, under either name
- `actual`  (Q(u) − u)², the error that rounding makes at the kernel's own scales; no variance, and any format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from mpq.errors import MpqError

NoiseModel = Literal["paper", "ulp", "actual"]
Scale = Literal["fp32", "bf16", "e8m0", "e4m3"]
Fit = Literal["max", "mse"]
SCALE_BITS: dict[Scale, int] = {"fp32": 32, "bf16": 16, "e8m0": 8, "e4m3": 8}
NOISE_MODELS: tuple[NoiseModel, ...] = ("paper", "ulp", "actual")


@dataclass(frozen=True)
class Format:
    """One way of storing numbers.

    `mac_time` is the theoretical time of one multiply-accumulate in BF16 MACs (method.md, IP-TT);
    `maximum` is the largest value; `min_normal_exponent` the exponent of the smallest normal.
    Bits are those of one element, scales not included.

    `block` is the rows and columns of elements that share a scale; 0 columns are all of the row, 0
    rows all of the tensor. A scale maps the largest magnitude of its block onto `full_scale`, and is stored as `scale` says:

        fp32, bf16  the quotient, rounded to that
        e8m0        a power of two (OCP MX 1.0, 5.1; the next one where the largest would saturate)
        e4m3        a share of one scale of the whole tensor, a power of two under which the largest is 224 to 448 (NVFP4)

    `fit` says what a scale is made for: max, that nothing is cut; mse, the least squared error of its
    block, of some scales that cut its largest values (quantize.scale_of). It is for weights, which are rounded once.
    """

    name: str
    kind: Literal["float", "int"]
    bits: int
    mantissa_bits: int
    exponent_bits: int
    min_normal_exponent: int
    maximum: float
    mac_time: float
    dtype: str  # the name of the torch dtype that stores it; of a 4-bit float, one that holds its values
    source: str
    minimum: float | None = None  # the most negative value, where it is not -maximum
    full_scale: float | None = None  # maximum, where it says nothing
    block: tuple[int, int] = (1, 0)
    scale: Scale = "fp32"
    fit: Fit = "max"

    @property
    def bytes(self) -> float:
        """Bytes of one element and its share of its block's scale; a whole row's scale is not counted."""
        shared = math.prod(self.block)
        return (self.bits + (SCALE_BITS[self.scale] / shared if shared else 0.0)) / 8

    @property
    def needs_scale(self) -> bool:
        """Whether tensors are scaled into the format's range before rounding (all of 8 bits and fewer)."""
        return self.bits <= 8

    @property
    def by_blocks(self) -> bool:
        """Whether less, or more, than one row shares a scale."""
        return self.block not in ((1, 0), (0, 0))

    @property
    def of_tensor(self) -> bool:
        """Whether the whole tensor has one scale."""
        return self.block == (0, 0)

    @property
    def lowest(self) -> float:
        """The most negative value."""
        return -self.maximum if self.minimum is None else self.minimum

    @property
    def top(self) -> float:
        """What a scale maps the largest magnitude of its block onto."""
        return self.full_scale or self.maximum

    @property
    def relative_variance(self) -> float:
        """Variance of the relative rounding error, 2^(-2m)/12 (eq. 18). Floats only."""
        return 2.0 ** (-2 * self.mantissa_bits) / 12


_IEEE = "IEEE 754-2019, table 3.5"
_OCP = "OCP 8-bit Floating Point Specification (OFP8) 1.0, table 2"
_MX = "OCP Microscaling Formats (MX) 1.0, table 5"
_RATE = "; MAC time: dense rates in the NVIDIA H100 and Intel Gaudi 2 datasheets"
_BLACKWELL = "; MAC time: dense rates in the NVIDIA B200 datasheet"
_TWO = "two's complement, symmetric: -127..127" + _RATE

_FP32 = Format(
    "fp32", "float", 32, 23, 8, -126, 3.4028234663852886e38, 2.0, "float32", _IEEE + _RATE
)
_BF16 = Format(
    "bf16",
    "float",
    16,
    7,
    8,
    -126,
    3.3895313892515355e38,
    1.0,
    "bfloat16",
    "bfloat16: FP32 cut to 16 bits" + _RATE,
)
_FP16 = Format("fp16", "float", 16, 10, 5, -14, 65504.0, 1.0, "float16", _IEEE + _RATE)
_E4M3 = Format("fp8_e4m3", "float", 8, 3, 4, -6, 448.0, 0.5, "float8_e4m3fn", _OCP + _RATE)
_E5M2 = Format("fp8_e5m2", "float", 8, 2, 5, -14, 57344.0, 0.5, "float8_e5m2", _OCP + _RATE)
_INT8 = Format("int8", "int", 8, 0, 0, 0, 127.0, 0.5, "int8", _TWO)
_E2M1 = Format("fp4_e2m1", "float", 4, 1, 2, 0, 6.0, 0.25, "float32", _MX + _BLACKWELL)
# all sixteen codes, the largest magnitude half a step beyond 7, as compressed-tensors has it: the steps
# are 7 % smaller than with -7..7, for one positive value of a block that is cut by half a step
_INT4 = Format(
    "int4",
    "int",
    4,
    0,
    0,
    0,
    7.0,
    0.5,
    "int8",
    "two's complement: -8..7",
    minimum=-8.0,
    full_scale=7.5,
)

# what operands are stored in, by name; a name's end is what shares a scale
FORMATS: dict[str, Format] = {f.name: f for f in (_FP32, _BF16, _FP16, _E4M3, _E5M2, _INT8)}
BLOCKED: dict[str, Format] = {
    f.name: f
    for f in (
        replace(_E4M3, name="fp8_e4m3_128x128", block=(128, 128)),
        replace(_E4M3, name="fp8_e4m3_128", block=(1, 128)),
        replace(_E4M3, name="mxfp8", block=(1, 32), scale="e8m0", source=_MX + _BLACKWELL),
        replace(_E2M1, name="mxfp4", block=(1, 32), scale="e8m0"),
        replace(_E2M1, name="nvfp4", block=(1, 16), scale="e4m3"),
        replace(_INT4, name="int4_128", block=(1, 128), scale="bf16"),
        replace(_INT4, name="int4_32", block=(1, 32), scale="bf16"),
    )
}
# one scale for the whole tensor, fixed before its values come: three binades above the largest that was seen
# are left for larger ones, which a float's rounding does not feel
OF_TENSOR = replace(
    _E4M3, name="fp8_e4m3_tensor", block=(0, 0), scale="e8m0", full_scale=_E4M3.maximum / 8
)


T = TypeVar("T")


def registered(name: str, among: Mapping[str, T]) -> T:
    """What is called `name`; case and `-` against `_` do not matter (`FP8-E4M3` is `fp8_e4m3`).

    Raises MpqError for a name that is not there.
    """
    key = str(name).strip().lower().replace("-", "_")
    if key not in among:
        raise MpqError(
            f"Unknown format {name!r}: expected one of {', '.join(among)} (see `mpq formats`)."
        )
    return among[key]


def get_format(name: str) -> Format:
    """The format with a scale a row, or none, called `name`. Raises MpqError for a name that is not there."""
    return registered(name, FORMATS)
