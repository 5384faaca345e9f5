"""The checkpoint that a run ends with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpq.models.blocks import Blocks
from mpq.program.plan import Plan
from mpq.spec import EngineName
from mpq.store.entries import TableRef
from mpq.tasks.calibration import blocks_of
from mpq.tasks.checkpoint import Weights
from mpq.tasks.device import exclusive
from mpq.tasks.stage import folder

SAMPLES, LENGTH = 8, 128  # of the text that the reloaded checkpoint is compared on, at most


def _there(key: str, out: str, **_: Any) -> bool:
    from mpq.export import Elsewhere, holds, is_elsewhere, local_path

    if is_elsewhere(out):
        return bool(Elsewhere(out).record().get("key") == key)
    return holds(local_path(out), key)


@folder(_there, name="export", free=["source", "out", "overwrite", "provenance", "trusted"])
def export_plan(
    key: str,
    weights: Weights,
    source: str,
    plan: dict[str, Any],
    provenance: dict[str, Any],
    to: str,
    engine: EngineName,
    text: TableRef,
    out: str,
    overwrite: bool,
    trusted: bool,
) -> None:
    """The plan on the checkpoint in the folder `source` as a folder `out`, reloaded and compared before it is there.

    `provenance` is the plan's, with where things lie. Raises what mpq.export.export raises.
    """
    from mpq.export import export
    from mpq.export.folder import Asked

    blocks = Blocks(blocks_of(text).tokens[:SAMPLES, :LENGTH])
    with exclusive(weights.device, alone=False):
        export(
            replace(Plan(**plan), provenance=provenance),
            Path(source),
            out,
            to=to,
            engine=engine,
            check=blocks,
            overwrite=overwrite,
            device=weights.device,
            trust_remote_code=trusted,
            key=key,
            asked=Asked("export.out", "export.overwrite: true"),
        )
