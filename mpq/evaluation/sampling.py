"""Which text calibrates and which evaluates, drawn by seed and recorded: blocks of a text, or documents of harness tasks.

With the source `tasks` a share of every evaluated task's documents calibrates (20 % in arXiv 2505.13060), and the loss is
evaluated on the others; the tasks themselves are scored on all of their documents whatever calibrates.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mpq.errors import MpqError
from mpq.evaluation.task_data import Tasks, open_tasks, quiet
from mpq.models.blocks import Blocks
from mpq.models.text import Drawn, draw_blocks, load_tokenizer, tokenized
from mpq.spec import FROM_TASKS, CalibrationSpec, EvaluationSpec, TextSpec
from mpq.store.tables import table

CHECKED_ON = "bounds checked on"


@dataclass(frozen=True)
class TaskDraw:
    """Documents drawn of each task: indices into the evaluated split (ascending), their texts, and the texts as blocks,
    each of which begins with `begins`; `left` are the blocks next in order, as many again where there are."""

    indices: Mapping[str, tuple[int, ...]]
    texts: Mapping[str, tuple[str, ...]]
    blocks: Blocks
    begins: str
    left: Blocks


@dataclass(frozen=True)
class Draw:
    """What a run calibrates and evaluates on, and what plans are checked on before they are delivered: as many blocks of the
    evaluation's text again, which neither calibrate nor evaluate; where not that many are left, the evaluation's own.

    `table` records it: part (calibration, evaluation of the loss, check, tasks scored), source, unit (block or document), the
    index of each one drawn and out of how many; what each block begins with, and how many of the source's rows held no text.
    `request_tokens` are the tokens that one scoring of each task runs the model on.
    """

    calibration: Blocks
    evaluation: Blocks
    check: Blocks
    table: pl.DataFrame
    request_tokens: Mapping[str, int]


def draw(
    folder: Path,
    vocabulary: int,
    calibration: CalibrationSpec,
    evaluation: EvaluationSpec,
    trust_remote_code: bool = False,
) -> Draw:
    """Draw the blocks to calibrate and to evaluate on, and record which. Raises MpqError where there is too little."""
    rows: list[dict[str, object]] = []
    found: dict[str, Blocks] = {}
    of_text: dict[str, Drawn] = {}
    parts: dict[str, TextSpec] = {"calibration": calibration, "evaluation": evaluation}
    for part, spec in parts.items():
        if spec.source != FROM_TASKS:
            of_text[part] = draw_blocks(spec, folder, vocabulary, trust_remote_code)
            found[part] = of_text[part].blocks
            rows += _recorded(part, spec.source, of_text[part], of_text[part].indices)
    if "evaluation" in of_text:
        used = of_text["evaluation"].indices
        if _same_text(calibration, evaluation):
            used = np.concatenate([used, of_text["calibration"].indices])
        indices = _unused(of_text["evaluation"], used)
        found["check"] = Blocks(of_text["evaluation"].rows[indices])
        rows += _recorded("check", evaluation.source, of_text["evaluation"], indices)
    tokens: dict[str, int] = {}
    if evaluation.tasks:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        with open_tasks(evaluation.tasks, evaluation.data_dir) as tasks:
            drawn = {
                part: draw_documents(
                    tokenizer,
                    tasks,
                    length=spec.length,
                    seed=calibration.seed,
                    share=calibration.share,
                    samples=spec.samples,
                    rest=part == "evaluation",
                )
                for part, spec in parts.items()
                if spec.source == FROM_TASKS
            }
            found |= {part: of.blocks for part, of in drawn.items()}
            if "evaluation" in drawn:
                left, whole = drawn["evaluation"].left, drawn["evaluation"].blocks
                found["check"] = left if len(left.tokens) == len(whole.tokens) else whole
            scored = {
                name: range(min(tasks.documents(name), evaluation.task_limit or math.inf))  # type: ignore[arg-type]
                for name in tasks.loaded
            }
            tokens = {
                name: _request_tokens(tokenizer, task, scored[name])
                for name, task in tasks.loaded.items()
            }
            every: list[tuple[str, Mapping[str, Sequence[int]]]] = [
                (part, of.indices) for part, of in drawn.items()
            ]
            for part, of_tasks in (*every, ("tasks", scored)):
                begins = drawn[part].begins if part in drawn else ""
                rows += [
                    {
                        "begins": begins,
                        "skipped": 0,
                        "part": part,
                        "source": name,
                        "unit": "document",
                        "index": i,
                        "of": tasks.documents(name),
                    }
                    for name, indices in of_tasks.items()
                    for i in indices
                ]
    beside = pl.DataFrame(rows, schema={"begins": pl.String, "skipped": pl.Int64})
    frame = table("drawn", [{k: v for k, v in row.items() if k not in beside} for row in rows])
    return Draw(**found, table=frame.hstack(beside), request_tokens=tokens)


def _recorded(part: str, source: str, drawn: Drawn, indices: np.ndarray) -> list[dict[str, object]]:
    of = {"part": part, "source": source, "unit": "block", "of": drawn.of}
    of |= {"begins": drawn.begins, "skipped": drawn.skipped}
    return [{**of, "index": int(i)} for i in indices]


def _same_text(one: TextSpec, other: TextSpec) -> bool:
    """Whether the blocks of both are numbered alike."""
    text = {"source", "length", "field", "split", "revision"}
    return one.model_dump(include=text) == other.model_dump(include=text)


def _unused(drawn: Drawn, used: np.ndarray) -> np.ndarray:
    """The next blocks of a text, as many as were drawn; those drawn where not so many are left."""
    left = drawn.order[~np.isin(drawn.order, used)][: len(drawn.indices)]
    return left if len(left) == len(drawn.indices) else drawn.indices


def in_words(drawn: pl.DataFrame) -> dict[str, str]:
    """What was drawn, for people: part → `20 of 100 documents of piqa, …; each block begins with <bos>`."""
    names = {
        "calibration": "calibration",
        "evaluation": "loss evaluated on",
        "check": CHECKED_ON,
        "tasks": "tasks scored on",
    }
    told: dict[str, list[str]] = {}
    counted = drawn.group_by("part", "source", "unit", maintain_order=True).agg(
        pl.len(), pl.col("of").first()
    )
    for part, source, unit, count, of in counted.iter_rows():
        told.setdefault(names[part], []).append(f"{count} of {of} {unit}s of {source}")
    words = {part: ", ".join(parts) for part, parts in told.items()}
    of_part = [set(drawn.filter(part=part)["index"]) for part in ("check", "evaluation")]
    if CHECKED_ON in words and of_part[0] & of_part[1]:
        words[CHECKED_ON] += ", the evaluation's own, since no others are left"
    if "begins" in drawn.columns:
        for part, begins, skipped in drawn.select("part", "begins", "skipped").unique().iter_rows():
            words[names[part]] += f"; each block begins with {begins}" if begins else ""
            words[names[part]] += f"; {skipped} rows without text left out" if skipped else ""
    return words


def draw_documents(
    tokenizer: Any,
    tasks: Tasks,
    *,
    length: int,
    seed: int,
    share: float = 0.2,
    samples: int | None = None,
    rest: bool = False,
) -> TaskDraw:
    """Draw `share` of every task's documents (rounded up), reproducibly by `seed` and the task's name alone; or the `rest`.

    A document's text is its prompt followed by the right answer, as the harness joins them. The texts of all tasks are
    tokenized and cut into blocks of `length` tokens (text.tokenized), of which the first `samples` in an order drawn by
    seed are kept (all where None). Raises MpqError where they fill no block.
    """
    indices = {name: _draw(name, tasks.documents(name), share, seed, rest) for name in tasks.loaded}
    texts = {name: tuple(_texts(task, indices[name])) for name, task in tasks.loaded.items()}
    stream = tokenized(tokenizer, (text for name in texts for text in texts[name]))
    rows = stream.blocks(length)
    whole = len(rows)
    if whole < (samples or 1):
        what = (
            f"The documents of {', '.join(texts)} that do not calibrate"
            if rest
            else f"{share:.0%} of {', '.join(texts)}"
        )
        raise MpqError(
            f"{what} hold {whole} blocks of {length} tokens, {samples or 1} were asked for: "
            "lower samples or length, or give more documents."
        )
    order = np.random.default_rng(seed).permutation(whole)
    kept = order[:samples]
    left = Blocks(rows[order[len(kept) : 2 * len(kept)]])
    begins = "".join(tokenizer.convert_ids_to_tokens(list(stream.prefix)))
    return TaskDraw(indices, texts, Blocks(rows[kept]), begins, left)


def _draw(name: str, documents: int, share: float, seed: int, rest: bool) -> tuple[int, ...]:
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(documents)
    count = math.ceil(share * documents)
    return tuple(sorted(int(i) for i in (order[count:] if rest else order[:count])))


def _requests(task: Any, indices: Sequence[int]) -> list[Any]:
    """The requests that the harness would make for some documents."""
    with quiet():
        task.build_all_requests(samples=list(indices))
    return list(task.instances)


def _request_tokens(tokenizer: Any, task: Any, indices: Sequence[int]) -> int:
    texts = [
        "".join(a for a in instance.args if isinstance(a, str))
        for instance in _requests(task, indices)
    ]
    return sum(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]) if texts else 0


def _texts(task: Any, indices: Sequence[int]) -> Iterator[str]:
    """Prompt and right answer of each document, taken from the requests that the harness would make."""
    requests: dict[int, list[Any]] = {}
    for instance in _requests(task, indices):
        requests.setdefault(instance.doc_id, []).append(instance)
    for of_document in requests.values():
        of_document.sort(key=lambda instance: instance.idx)
        doc, first = of_document[0].doc, of_document[0]
        if first.request_type == "loglikelihood":
            right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            if isinstance(right, list):
                right = right[0]
            yield "".join(
                of_document[right if len(of_document) > 1 and isinstance(right, int) else 0].args
            )
        elif first.request_type == "generate_until":
            right = task.doc_to_target(doc)
            yield f"{first.args[0]}{task.config.target_delimiter}{right[0] if isinstance(right, list) else right}"
        else:
            yield first.args[0]
