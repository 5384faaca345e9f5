"""docs/formats.md, the table of schemes, written from the registry: `python -m mpq.formats.page FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from mpq.formats.scheme import table_of_schemes

_HEAD = """# Formats

<!-- written by `make docs` from mpq/formats/scheme.py: change it there -->

What an op may run in, by the names that specs, plans and tables have. A scheme says how weights are stored and how
activations are; attention's products, whose operands are both activations, take those whose operands are alike with one scale
a row, or a scheme of the cache that keeps K and V (`fp8_kv`). `mpq formats` lists the same.

- *scale for*: the rows and columns of elements that share a scale; *row* is an output channel of a weight, a token of
  activations. E8M0 scales are powers of two, E4M3 scales are shares of one scale of the whole tensor, a power of
  two: a token rounds alike whatever is beside it in a batch.
- *bits*: effective bits of a weight, its share of a block's scale counted. Plans' `effective_bits` and `weight_bytes` count
  a row's scale too.
- *MAC time*: theoretical, in multiply-accumulates of BF16; of base where activations stay there.
- *file*: the preset of compressed-tensors that an export is; without one, its nearest of the same kind with other groups.
- *…_mse*: each scale of the weights is fitted to its block's squared error, some of the largest values cut, where others
  keep the largest whole. Slower to make (seventeen scales are tried), the same size and speed, read alike by engines.
- *Δ²/12 or ulp*: the noise models `ulp` and `paper` are of schemes alike with a scale a row; all others need `actual`.

`fp8_kv` is one decision for a layer: K and V are rounded as they go into the cache, K after its rotation, and read back to base, in
which Q and P stay. A scale a tensor, in the file, cannot follow what comes: it is a power of two, which a float's rounding does
not feel, and leaves values 8 to 16 times the largest that was measured; what is larger yet is cut. It gains bytes of the cache
(objective `m`; `workload` says of how many tokens), no multiply-accumulates.

Blocks along rows need inputs that are whole blocks wide: an op whose are not stays in base, which a run tells.

| scheme | weights | scale for | stored as | activations | bits | MAC time | file | source |
|---|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The page as Markdown."""
    return _HEAD + "".join(f"| {' | '.join(_row(row))} |\n" for row in table_of_schemes())


def _row(row: dict[str, object]) -> list[str]:
    element = (
        f"E{row['exponent_bits']}M{row['mantissa_bits']}"
        if row["kind"] == "float"
        else f"INT{row['bits']}"
    )
    time = "base" if row["mac_time"] is None else f"{row['mac_time']:g}"
    cells = (element, row["block"], str(row["scale"]).upper(), row["activations"])
    bits = f"{row['effective_bits']:g}"
    return [
        f"`{row['name']}`",
        *(str(cell or "–") for cell in (*cells, bits, time, row["preset"], row["source"])),
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
