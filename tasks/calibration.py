"""From a checkpoint to what it may cost to lower each op: load, partition, sensitivity by shards, their sum."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from mpq.models.blocks import Blocks
from mpq.spec import FROM_TASKS, CalibrationSpec, EvaluationSpec
from mpq.store.entries import Store, TableRef
from mpq.tasks.checkpoint import Architecture, Weights, configuration, loaded
from mpq.tasks.device import exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, read, stage


def blocks_of(ref: TableRef) -> Blocks:
    """The token blocks behind a reference."""
    return Blocks(np.load(io.BytesIO(Store(ref.store).read_bytes(ref)), allow_pickle=False))


def _npy(array: np.ndarray) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue(), "npy"


def _loaded_from(
    folder: str, calibration: CalibrationSpec, evaluation: EvaluationSpec, trusted: bool = False
) -> Any:
    """Tokenizer and configuration, the texts and tasks by their content, and how they are drawn; no places."""
    from mpq.evaluation.task_data import data_key, harness_version
    from mpq.models.checkpoint import fingerprint_of
    from mpq.models.layout import TOKENIZER_FILES
    from mpq.models.text import source_key

    how = {
        "source",
        "data_dir",
        "batch",
        "shards",
        "checkpoint_activations",
        "labels",
        "seeds",
        "ttft_repeats",
    }
    texts = [
        (text.model_dump(mode="json", exclude=how), text.source == FROM_TASKS or source_key(text))
        for text in (calibration, evaluation)
    ]
    tasks = evaluation.tasks
    data = (data_key(tasks, evaluation.data_dir), harness_version()) if tasks else None
    return fingerprint_of(Path(folder), TOKENIZER_FILES), texts, data


@stage(
    "model",
    "calibration",
    "evaluation_text",
    "check_text",
    "drawn",
    name="load model",
    key=_loaded_from,
    reads_files=True,
)
def load_model(
    folder: str, calibration: CalibrationSpec, evaluation: EvaluationSpec, trusted: bool = False
) -> Output:
    """Facts of the checkpoint, the blocks of tokens to calibrate and to evaluate on, and which ones were drawn."""
    from mpq.evaluation.sampling import draw
    from mpq.models.checkpoint import load_config

    config = load_config(Path(folder), trusted)
    vocabulary = config.get_text_config().vocab_size
    drawn = draw(Path(folder), vocabulary, calibration, evaluation, trusted)
    facts = {
        "model_type": config.model_type,
        "vocabulary": vocabulary,
        "request_tokens": dict(drawn.request_tokens),
    }
    return {
        "model": (json.dumps(facts).encode(), "json"),
        "calibration": _npy(drawn.calibration.tokens),
        "evaluation_text": _npy(drawn.evaluation.tokens),
        "check_text": _npy(drawn.check.tokens),
        "drawn": drawn.table,
    }


tracing = threading.RLock()  # torch.export is not made for two threads of one process


@stage("groups", key=lambda architecture, batch, length: (architecture.key, batch, length))
def partition(architecture: Architecture, batch: int, length: int) -> Output:
    """The groups table of the architecture: no weights are read, and a fine-tune costs nothing."""
    from mpq.models.graph import trace
    from mpq.models.partition import groups_table
    from mpq.models.partition import partition as partition_graph

    with tracing:
        graph = trace(configuration(architecture))
    return {"groups": groups_table(partition_graph(graph), batch, length)}


def _shard_alone(
    weights: Weights,
    groups: TableRef,
    blocks: TableRef,
    shard: int,
    shards: int,
    formats: list[str],
    base_term: bool,
    labels: int,
    **_: Any,
) -> Any:
    """The shard's own tokens, not their place among others: a new shard adds to the old ones."""
    return weights, groups, blocks_of(blocks).shards(shards)[shard].key, formats, base_term, labels


@stage(
    "sensitivity", "loss", "effects", name="sensitivity", on="workers", key=_shard_alone, retries=1
)
def sensitivity_shard(
    weights: Weights,
    groups: TableRef,
    blocks: TableRef,
    shard: int,
    shards: int,
    formats: list[str],
    batch: int,
    base_term: bool,
    checkpoint_activations: bool,
    labels: int,
) -> Output:
    """Sensitivity of every op over one shard of the calibration blocks."""
    from mpq.loss.sensitivity import measure

    part = blocks_of(blocks).shards(shards)[shard]
    label = f"sensitivity {shard + 1}/{shards}"
    with exclusive(weights.device, alone=False), tracked(label) as progress:
        found = measure(
            loaded(weights),
            measured_ops(groups),
            part,
            formats=formats,
            base=weights.base,
            batch=batch,
            base_term=base_term,
            checkpoint_activations=checkpoint_activations,
            labels=labels,
            first_layer=False,  # that of the text, not of each of its shards
            progress=progress,
        )
    return found._asdict()


def measured_ops(groups: TableRef) -> list[tuple[str, str]]:
    """(name, kind) of the ops that can be lowered; products of other kinds stay in base."""
    rows = read(groups).select("op", "kind").iter_rows()
    return [(op, kind) for op, kind in rows if kind != "other"]


@stage("sensitivity", "loss", "effects", name="merge shards")
def merge_shards(
    sensitivities: list[TableRef], losses: list[TableRef], effects: list[TableRef]
) -> Output:
    """The shards' sums as one table, and their samples in one."""
    from mpq.loss.effects import joined
    from mpq.loss.sensitivity import merge

    of_losses = [read(x) for x in losses]
    sensitivity, loss = merge([read(s) for s in sensitivities], of_losses)
    joint = joined([read(e) for e in effects], of_losses)
    return {"sensitivity": sensitivity, "loss": loss, "effects": joint}


def _what_runs(weights: Weights, sensitivity: TableRef, blocks: TableRef, **_: Any) -> Any:
    return weights, sensitivity, blocks


@stage("sensitivity", name="first layer", on="workers", key=_what_runs, retries=1)
def first_layer(weights: Weights, sensitivity: TableRef, blocks: TableRef, batch: int) -> Output:
    """The table with the KL of the first layer's attention as run, which sums get wrong."""
    from mpq.loss.first_layer import with_first_layer

    with exclusive(weights.device, alone=False):
        whole = with_first_layer(read(sensitivity), loaded(weights), blocks_of(blocks), batch)
    return {"sensitivity": whole}
