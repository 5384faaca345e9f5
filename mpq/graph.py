"""The model as a graph of operations: traced from its configuration, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OpKind = Literal["linear", "bgemm", "other"]


@dataclass(frozen=True)
class Op:
    """One matrix product.

    `name` is the fully qualified module name; attention's products are `<attention>.qk_matmul` and
    `<attention>.av_matmul`. A linear is (tokens, in_features) x (in_features, out_features); a bgemm is, per
    batch row and head, (T, in) x (in, out) where T x T scores make one of the two the sequence length:
    qk has in_features = head_dim, av has out_features = head_dim. `kind` is `other` for a product that
    mpq can name but not lower (an expert's grouped product, say); it stays in base and is reported.
    """

    name: str
    kind: OpKind
    in_features: int
    out_features: int
    heads: int = 0  # query heads of a bgemm
    kv_heads: int = 0  # heads of K and V before repetition
    parameters: int = 0
