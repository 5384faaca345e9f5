"""From a checkpoint to what it may cost to lower each op: load, partition, sensitivity by shards, their sum."""

from __future__ import annotations

import io
import json
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mpq.spec import CalibrationSpec, EvaluationSpec
from mpq.store.entries import Store, TableRef
from mpq.tasks.checkpoint import at_hand
from mpq.tasks.device import exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, read, stage


@lru_cache(maxsize=1)
def model_of(folder: str, fingerprint: str, base: str, device: str) -> Any:
    """The loaded model, kept for the next task in this process that asks for the same content."""
    from mpq.models.checkpoint import load_model

    return load_model(at_hand(folder, fingerprint), base, device)


def blocks_of(ref: TableRef) -> Any:
    """The token blocks behind a reference."""
    from mpq.models.blocks import Blocks

    return Blocks(np.load(io.BytesIO(Store(ref.store).read_bytes(ref)), allow_pickle=False))


def _npy(array: np.ndarray) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue(), "npy"


@stage("model", "calibration", "evaluation_text", "drawn")
def load_model(folder: str, calibration: CalibrationSpec, evaluation: EvaluationSpec) -> Output:
    """Facts of the checkpoint, the blocks of tokens to calibrate and to evaluate on, and which ones were drawn."""
    from mpq.evaluation.draw import draw
    from mpq.models.checkpoint import load_config
    from mpq.models.partition import architecture_key

    config = load_config(Path(folder))
    vocabulary = config.get_text_config().vocab_size
    drawn = draw(Path(folder), vocabulary, calibration, evaluation)
    facts = {
        "architecture": architecture_key(config),
        "model_type": config.model_type,
        "vocabulary": vocabulary,
        "request_tokens": dict(drawn.request_tokens),
    }
    return {
        "model": (json.dumps(facts).encode(), "json"),
        "calibration": _npy(drawn.calibration.tokens),
        "evaluation_text": _npy(drawn.evaluation.tokens),
        "drawn": drawn.table,
    }


tracing = threading.RLock()  # torch.export is not made for two threads of one process


@stage("groups")
def partition(folder: str, batch: int, length: int) -> Output:
    """The groups table of the architecture; no weights are read."""
    from mpq.models.checkpoint import load_config
    from mpq.models.graph import trace
    from mpq.models.partition import groups_table
    from mpq.models.partition import partition as partition_graph

    with tracing:
        graph = trace(load_config(Path(folder)))
    return {"groups": groups_table(partition_graph(graph), batch, length)}


@stage("sensitivity", "loss", retries=1)
def sensitivity_shard(
    model: dict[str, str],
    groups: TableRef,
    blocks: TableRef,
    shard: int,
    shards: int,
    formats: list[str],
    batch: int,
    base_term: bool,
    checkpoint_activations: bool,
) -> Output:
    """Sensitivity of every op over one shard of the calibration blocks."""
    from mpq.loss.sensitivity import measure_sensitivity

    part = blocks_of(blocks).shards(shards)[shard]
    with (
        exclusive(model["device"], alone=False),
        tracked(f"sensitivity {shard + 1}/{shards}") as progress,
    ):
        sensitivity, loss = measure_sensitivity(
            model_of(**model),
            measured_ops(groups),
            part,
            formats=formats,
            base=model["base"],
            batch=batch,
            base_term=base_term,
            checkpoint_activations=checkpoint_activations,
            progress=progress,
        )
    return {"sensitivity": sensitivity, "loss": loss}


def measured_ops(groups: TableRef) -> list[tuple[str, str]]:
    """(name, kind) of the ops that can be lowered; products of other kinds stay in base."""
    return [
        (r["op"], r["kind"])
        for r in read(groups).iter_rows(named=True)
        if r["kind"] in ("linear", "bgemm")
    ]


@stage("sensitivity", "loss")
def merge_shards(sensitivities: list[TableRef], losses: list[TableRef]) -> Output:
    """The shards' sums as one table."""
    from mpq.loss.sensitivity import merge

    sensitivity, loss = merge([read(s) for s in sensitivities], [read(x) for x in losses])
    return {"sensitivity": sensitivity, "loss": loss}
