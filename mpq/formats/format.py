"""Numerical formats: what each can hold, what it costs, and how much noise rounding to it adds.

A format is data. Floats are described by the OCP/IEEE parameters from which every code point follows;
integers are uniform and symmetric. `mantissa_bits` counts explicit bits only (BF16 has 7).

Noise models, the variance of the rounding error of one element u (method.md, "Noise per format"):

- `paper`   u² 2^(-2m) / 12                  floats (eq. 18)
- `ulp`     (2^(floor(log2|u|) - m))² / 12   floats: the real rounding step; 0.54 of `paper` over a binade
- integers  Δ² / 12, Δ = amax / maximum at the granularity of the kernel, under either name
- `actual`  (Q(u) − u)², the error that rounding makes at the kernel's own scales; no variance, and any format
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpq.errors import MpqError

NoiseModel = Literal["paper", "ulp", "actual"]
NOISE_MODELS: tuple[NoiseModel, ...] = ("paper", "ulp", "actual")


@dataclass(frozen=True)
class Format:
    """One numerical format.

    `mac_time` is the theoretical time of one multiply-accumulate in BF16 MACs (method.md, IP-TT);
    `maximum` is the largest finite magnitude; `min_normal_exponent` the exponent of the smallest normal.
    Bits are those of one stored element, scales not included.
    """

    name: str
    kind: Literal["float", "int"]
    bits: int
    mantissa_bits: int
    exponent_bits: int
    min_normal_exponent: int
    maximum: float
    mac_time: float
    dtype: str  # the name of the torch dtype that stores it
    source: str

    @property
    def bytes(self) -> float:
        """Bytes of one stored element."""
        return self.bits / 8

    @property
    def needs_scale(self) -> bool:
        """Whether tensors are scaled into the format's range before rounding (all 8-bit formats)."""
        return self.bits <= 8

    @property
    def relative_variance(self) -> float:
        """Variance of the relative rounding error, 2^(-2m)/12 (eq. 18). Floats only."""
        return 2.0 ** (-2 * self.mantissa_bits) / 12


_IEEE = "IEEE 754-2019, table 3.5"
_OCP = "OCP 8-bit Floating Point Specification (OFP8) 1.0, table 2"
_RATE = "; MAC time: dense rates in the NVIDIA H100 and Intel Gaudi 2 datasheets"

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "fp32", "float", 32, 23, 8, -126, 3.4028234663852886e38, 2.0, "float32", _IEEE + _RATE
        ),
        Format(
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
        ),
        Format("fp16", "float", 16, 10, 5, -14, 65504.0, 1.0, "float16", _IEEE + _RATE),
        Format("fp8_e4m3", "float", 8, 3, 4, -6, 448.0, 0.5, "float8_e4m3fn", _OCP + _RATE),
        Format("fp8_e5m2", "float", 8, 2, 5, -14, 57344.0, 0.5, "float8_e5m2", _OCP + _RATE),
        Format(
            "int8",
            "int",
            8,
            0,
            0,
            0,
            127.0,
            0.5,
            "int8",
            "two's complement, symmetric: -127..127" + _RATE,
        ),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`; case and `-` against `_` do not matter (`FP8-E4M3` is `fp8_e4m3`).

    Raises MpqError for a name that is not registered.
    """
    key = str(name).strip().lower().replace("-", "_")
    if key not in FORMATS:
        raise MpqError(
            f"Unknown format {name!r}: expected one of {', '.join(FORMATS)} (see `mpq formats`)."
        )
    return FORMATS[key]
