"""The small table that tests of the store keep in it."""

from __future__ import annotations

import polars as pl

FRAME = pl.DataFrame({"op": ["a", "b"], "gain_s": [1.0, 2.5]})
