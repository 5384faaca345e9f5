"""What a plan's weights take: bytes of the linears and of all experts, scales counted, and bits a weight; and what the cache
of keys and values does."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from mpq.formats.format import SCALE_BITS, Format
from mpq.formats.scheme import get_scheme

SCALE_BYTES = 4  # FP32, one for each output channel (of each expert) of a weight that is scaled
STORED = ("linear", "experts")  # kinds of ops that have weights
# linears that make K and V of a latent, which is what is cached in their place (DeepSeek's multi-head latent attention)
_OF_LATENT = "kv_b_proj"
# the linear that is missing where a layer makes no keys and reads those of another (Gemma 3n's last layers): what the other's cache
# loses it loses, which neither a measurement nor a run sees here
_OF_QUERIES, _OF_KEYS = "q_proj", "k_proj"


@dataclass(frozen=True)
class Requests:
    """What is in the cache at once: `batch` requests of `tokens` tokens each, prompt and answer."""

    batch: int
    tokens: int


def keeping(attentions: Iterable[str], modules: Collection[str]) -> tuple[str, ...]:
    """Those of the attentions of a model with these modules, all by name, whose K and V are what a
    server keeps of each token, for their layer alone: not those that have a latent kept in its
    place, and none where one reads the keys of another."""
    names = tuple(attentions)
    with_queries = [name for name in names if f"{name}.{_OF_QUERIES}" in modules]
    if any(f"{name}.{_OF_KEYS}" not in modules for name in with_queries):
        return ()
    return tuple(name for name in names if f"{name}.{_OF_LATENT}" not in modules)


def cached(groups: pl.DataFrame) -> frozenset[str]:
    """The ops of a groups table whose second operand is the K or V of an attention that is
    `keeping` them."""
    linears = set(groups.filter(pl.col("kind") == "linear")["op"])
    products = groups.filter(pl.col("kind") == "bgemm")["op"].to_list()
    owners = {op: op.rpartition(".")[0] for op in products}
    kept = set(keeping(owners.values(), linears))
    return frozenset(op for op, owner in owners.items() if owner in kept)


def cache_bytes_of(op: Mapping[str, Any], name: str, base: str, requests: Requests) -> float:
    """Bytes of the K or V that a product of attention (a row of the groups table) reads, all requests together, where it runs in
    a scheme; at most a sliding attention's window of each. Schemes that are none of the cache leave it in base."""
    tokens = min(requests.tokens, op.get("window") or requests.tokens)
    width = max(op["in_features"], op["out_features"])  # of a head, the other one is 0
    scheme = get_scheme(name)
    stored = scheme if scheme.cache else get_scheme(base)
    return float(requests.batch * tokens * op["kv_heads"] * width * stored.bytes)


def bytes_of(op: Mapping[str, Any], name: str, base: str) -> float:
    """Bytes that a linear, or a layer's experts (a row of the groups table), takes in a format, scales counted.

    A weight that is tied to the embedding is the embedding's, and counts nothing in base; lowered, its copy counts.
    """
    if op["kind"] not in STORED:
        return 0.0
    if name == base and op.get("tied"):
        return 0.0
    weights = get_scheme(name).weights
    return float(weights.bits / 8 * op["parameters"] + _scale_bytes(op, weights))


def with_bytes(ops: pl.DataFrame, base: str) -> pl.DataFrame:
    """Rows of the groups table with a column `format` ("" for none), and a column `bytes` beside it: bytes_of, 0 for no format.

    A model has thousands of ops and tens of shapes: each is counted once.
    """
    shape = [c for c in ops.columns if c not in ("group", "order", "op", "signature")]
    shapes = ops.select(shape).unique()
    each = [
        bytes_of(row, row["format"], base) if row["format"] else 0.0
        for row in shapes.iter_rows(named=True)
    ]
    counted = shapes.with_columns(bytes=pl.Series(each, dtype=pl.Float64))
    return ops.join(counted, on=shape, nulls_equal=True)


def _scale_bytes(op: Mapping[str, Any], weights: Format) -> float:
    """Bytes of the scales of an op's weights: one for each row, or for each block, the last of which may be short.

    Each expert is a weight of its own.
    """
    rows, columns = int(op["out_features"]), int(op["in_features"])
    experts = int(op["parameters"]) // (rows * columns)
    if not weights.needs_scale:
        return 0.0
    if not weights.by_blocks:
        return float(SCALE_BYTES * experts * rows)
    high, wide = weights.block
    blocks = math.ceil(rows / high) * math.ceil(columns / wide)
    of_tensor = SCALE_BYTES if weights.scale == "e4m3" else 0
    return experts * (blocks * SCALE_BITS[weights.scale] / 8 + of_tensor)


def weight_bytes(groups: pl.DataFrame, formats: Mapping[str, str], base: str) -> float:
    """Bytes of all linears and experts under a plan (op → format); those that it does not name are in base."""
    return math.fsum(
        bytes_of(op, formats.get(op["op"], base), base) for op in groups.iter_rows(named=True)
    )


def weights_of(groups: pl.DataFrame) -> int:
    """How many weights the linears and experts have of their own: what is tied to the embedding is not counted."""
    stored = groups.filter(pl.col("kind").is_in(STORED))
    own = stored.filter(~pl.col("tied").fill_null(False)) if "tied" in stored.columns else stored
    return int(own["parameters"].sum())


def effective_bits(groups: pl.DataFrame, formats: Mapping[str, str], base: str) -> float:
    """Mean bits a weight under a plan, over all linears and experts: 8 · weight_bytes / their own weights."""
    return 8 * weight_bytes(groups, formats, base) / max(1, weights_of(groups))


def bytes_of_rows(
    groups: pl.DataFrame, rows: Iterable[tuple[list[str], list[str]]], base: str
) -> tuple[list[float], float]:
    """For each (ops, configuration) the bytes of its weights, and the bytes in base of those that no row has."""
    ops = {op["op"]: op for op in groups.iter_rows(named=True)}
    decided, sums = set[str](), []
    for members, configuration in rows:
        decided.update(members)
        sums.append(
            math.fsum(
                bytes_of(ops[op], f, base) for op, f in zip(members, configuration, strict=True)
            )
        )
    return sums, math.fsum(
        bytes_of(op, base, base) for name, op in ops.items() if name not in decided
    )
