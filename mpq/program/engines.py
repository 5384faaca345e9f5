"""What engines can serve, as data: which ops take one format, which formats they have, what stays in base.

Every rule says where it is from: an engine that was run, or its own documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpq.errors import MpqError
from mpq.formats.scheme import SCHEMES, of_cache, with_fitted
from mpq.serving.fused import FUSED, Fused
from mpq.serving.schemes import OF_EXPERTS

if TYPE_CHECKING:
    from mpq.kernels import Kind
    from mpq.spec import EngineName

KINDS: tuple[Kind, ...] = ("linear", "experts", "bgemm")  # of ops whose format can be chosen


@dataclass(frozen=True)
class Rule:
    """A constraint on ops that match one of `patterns` and are of one of `kinds`.

    With `formats` the ops may take these alone (`base`: the base format, whichever that is); without,
    it is a tie: the matches within a layer take one format. An engine's rule has a `source`, and may
    match nothing; a user's has none.
    """

    name: str
    patterns: tuple[str, ...]
    formats: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = KINDS
    source: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine: its rules, and the formats that it runs linears in beside base (None: whatever there is)."""

    name: str
    rules: tuple[Rule, ...] = ()
    formats: tuple[str, ...] | None = None
    source: str = ""


_HEAD = "its quantized layers are linears of the blocks; the head is listed in `ignore`"
_EXPERTS = "one scheme for all experts of a layer"
_ATTENTION = "has no scheme for one product of attention: FP8 there comes with the KV cache"
CACHES = of_cache(SCHEMES)
_HEADS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out")


def _fusing(engine: str, source: str = "", caches: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """The rules of an engine that merges q, k, v and gate, up, and runs attention as one kernel; `source` where it says so, if
    not as vLLM does. Of a layer's cache it has the schemes `caches`."""

    def tie(label: str, *patterns: str, why: str) -> Rule:
        return Rule(f"{engine}: tie {label}", patterns, source=why)

    def fused(layer: Fused) -> Rule:
        why = source or f"multiplies them in one product ({layer.source})"
        return tie(layer.label, *(f"*.{part}" for part in layer.parts), why=why)

    def base(
        label: str, *patterns: str, kinds: tuple[str, ...], why: str, or_: tuple[str, ...] = ()
    ) -> Rule:
        formats = ("base", *or_)
        return Rule(f"{engine}: {label} in {' or '.join(formats)}", patterns, formats, kinds, why)

    return (
        *map(fused, FUSED),
        tie("experts", "*.experts.*", why=_EXPERTS),
        Rule(
            f"{engine}: experts in base or what is written of them",
            ("*",),
            ("base", *OF_EXPERTS.get(engine, OF_EXPERTS["sglang"])),
            ("experts",),
            "mpq export writes experts in these alone (mpq/serving/schemes.py)",
        ),
        base("the head", *_HEADS, kinds=("linear",), why=_HEAD),
        base("attention's products", "*", kinds=("bgemm",), why=_ATTENTION, or_=caches),
    )


_COMPRESSED = with_fitted(
    *("int8", "fp8_e4m3", "fp8_block", "mxfp8", "mxfp4", "nvfp4"),
    *("w4a8", "w8a16", "w4a16", "w4a16_g32", "nvfp4a16", "mxfp4a16"),
)
_SIMULATED = "compressed-tensors 0.20 simulates rounding of linears; products have no scheme there"
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("none"),
        Engine(
            "vllm",
            _fusing("vllm", caches=CACHES),
            (*_COMPRESSED, *CACHES),
            "vLLM 0.32 run on a CPU: INT8, FP8-E4M3 and W4A8 load and answer; on a GPU compute "
            "capability 75 (INT8, NVFP4, MXFP8, W4A16, W8A16), 80 (MXFP4) or 89 (FP8) and more; no E5M2 "
            "scheme, and what is not quantized runs in the engine's one dtype; the cache of each layer in FP8 or base "
            "(model_executor/layers/attention/attention.py: kv_cache_dtype_skip_layers)",
        ),
        Engine(
            "tensorrt-llm",
            _fusing("tensorrt-llm", "modelopt's MIXED_PRECISION refuses two formats in one layer"),
            with_fitted("fp8_e4m3", "fp8_block", "mxfp8", "nvfp4", "nvfp4a16"),
            "hf_quant_config.json has FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, NVFP4 and W4A16_NVFP4, "
            "and no INT8",
        ),
        Engine(
            "sglang",
            _fusing("sglang", "merges the same products as vLLM, by the same checkpoint format"),
            ("int8", "fp8_e4m3"),
            "reads compressed-tensors, W8A8 INT8 and FP8-E4M3",
        ),
        Engine(
            "gaudi",
            (),
            ("fp8_e4m3",),
            "the paper (Sec. 3): Gaudi 2, BF16 and FP8-E4M3, linears and BGEMMs by name",
        ),
        Engine(
            "transformers",
            (
                Rule(
                    "transformers: attention's products in base",
                    ("*",),
                    ("base",),
                    ("bgemm",),
                    _SIMULATED,
                ),
                Rule(
                    "transformers: experts in base or fp8_e4m3",
                    ("*",),
                    ("base", "fp8_e4m3"),
                    ("experts",),
                    "transformers 5.23, integrations/compressed_tensors.py: one group for all experts of a model, and "
                    "experts in base pass by it where it is FP8 alone",
                ),
            ),
            _COMPRESSED,
            "transformers 5.23 run with compressed-tensors 0.20: each op by its own name",
        ),
    )
}


# what a scheme of the cache is, whatever runs it: a tie within each layer
CACHE = Rule(
    "the cache of a layer",
    ("*.qk_matmul", "*.av_matmul"),
    None,
    ("bgemm",),
    "keys and values of a layer lie in one cache, of one format",
)


def check_formats(engine: EngineName, formats: tuple[str, ...]) -> None:
    """Raise MpqError, naming what can be, for a format to lower to that the engine has no scheme for."""
    can = ENGINES[engine].formats
    if can is not None and (unknown := [f for f in formats if f not in can]):
        raise MpqError(
            f"{engine} cannot run {unknown[0]} beside the base format: lower to {' or '.join(can)}, "
            "or choose another engine."
        )
