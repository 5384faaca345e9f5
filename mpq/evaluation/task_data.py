"""lm-evaluation-harness tasks with their datasets: from the hub as the harness does, or from local files.

Only where a dataset comes from may change, never a task's logic: with `data_dir` a task reads
`<data_dir>/<task>/<split>.jsonl` (or .parquet) of the hub dataset's schema, and nothing is asked of the network. Splits
that the folder lacks, other than the evaluated one, count as not there.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

from mpq.errors import MpqError


@dataclass(frozen=True)
class Tasks:
    """Harness tasks with their datasets read, ready to be evaluated any number of times: name → the harness's task."""

    loaded: Mapping[str, Any]
    files: Mapping[str, Path] = field(
        default_factory=dict
    )  # the evaluated split's file, where one was given

    def documents(self, name: str) -> int:
        """How many documents the task evaluates."""
        return len(self.loaded[name].eval_docs)


@contextmanager
def open_tasks(names: Sequence[str], data_dir: str | Path | None = None) -> Iterator[Tasks]:
    """The named harness tasks (groups and tags of tasks too, where the hub is the source), their datasets read.

    With `data_dir` Hugging Face's clients are offline for as long as the context lasts. Raises MpqError for a name that
    the harness does not know, and for a dataset that is missing, unreadable, or lacks a column that its task asks for.
    """
    if not names:
        raise MpqError("No task to evaluate: name at least one, such as hellaswag.")
    manager = _manager(tuple(names))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = (
                f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
            )
            raise MpqError(f"lm-evaluation-harness has no task {name}: {hint}")
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if data_dir is None:
            loaded: dict[str, Any] = {}
            for name in names:
                loaded |= _load(manager, name, name, None)
            opened = Tasks(loaded)
        else:
            stack.enter_context(_offline())
            aside = stack.enter_context(tempfile.TemporaryDirectory(prefix="mpq-tasks-"))
            parts = {
                name: _local(manager, name, Path(data_dir) / name, aside)
                for name in dict.fromkeys(names)
            }
            opened = Tasks(
                {n: t for n, (t, _) in parts.items()}, {n: f for n, (_, f) in parts.items()}
            )
        for name, task in opened.loaded.items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise MpqError(
                    f"Task {name} runs code that the model writes, or wants pictures or sound: mpq evaluates text only."
                )
        yield opened


def data_key(names: Sequence[str], data_dir: str | Path | None) -> str:
    """A hash of the datasets' content: of the local files', or of datasets' own fingerprints of what the hub has now.

    The harness takes the hub's current revision where a task's own file names none. Raises MpqError where a dataset of the
    hub's cannot be had.
    """
    digest = hashlib.sha256(repr(sorted(names)).encode())
    if data_dir:
        for name in sorted(names):
            for path in filter(Path.is_file, sorted((Path(data_dir) / name).glob("*"))):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    elif names:
        with open_tasks(names) as opened:
            for name, task in sorted(opened.loaded.items()):
                digest.update(f"{name}: {_fingerprints(task)}".encode())
    return digest.hexdigest()


def _fingerprints(task: Any) -> list[tuple[str, str]]:
    """Split → fingerprint of a task's dataset; of a split that a task's own code made, the hash of its rows."""
    return [
        (
            split,
            getattr(rows, "_fingerprint", None)
            or hashlib.sha256(repr(list(rows)).encode()).hexdigest(),
        )
        for split, rows in sorted(dict(task.dataset).items())
    ]


def harness_version() -> str:
    """lm-evaluation-harness's version, part of a score's key. Raises MpqError where it is not installed."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise MpqError(
            "Harness tasks need lm-evaluation-harness, which is not installed: pip install 'mpq[eval]'."
        ) from None


@functools.cache
def _manager(names: tuple[str, ...]) -> Any:
    """The harness's index with these names in it, or all of it where that says who is who.

    To index all 14,000 files takes ten seconds; those beside the single tasks that are named take none.
    """
    try:
        with quiet():
            from lm_eval.tasks import TaskManager

            few = TaskManager(include_defaults=False, include_path=_folders(names))
            return few if set(names) <= set(few.all_subtasks) else _every_task()
    except ImportError as error:
        raise MpqError(
            f"Tasks need lm-evaluation-harness ({error}): pip install 'mpq[eval]'."
        ) from None


@functools.cache
def _every_task() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _folders(names: Sequence[str]) -> list[str]:
    """The harness's folders with the files that define these tasks; none for a name that no or several files define."""
    import lm_eval.tasks

    any_of = "|".join(map(re.escape, names))
    defines = re.compile(rf"^task:\s*[\"']?({any_of})[\"']?\s*$".encode(), re.MULTILINE)
    found: dict[bytes, list[str]] = {}
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        for name in defines.findall(path.read_bytes()):
            found.setdefault(name, []).append(str(path.parent))
    return sorted({each[0] for each in found.values() if len(each) == 1})


def _local(manager: Any, name: str, folder: Path, cache_folder: str) -> tuple[Any, Path]:
    """The task reading the files in `folder`, and the file of its evaluated split. Nothing but the data's place changes."""
    if name not in manager.all_subtasks:
        raise MpqError(
            f"{name} is a group of the harness's tasks: with data_dir, name the single tasks of it."
        )
    config = manager.task_index[name].cfg
    keys = {
        key: config[key]
        for key in ("test_split", "validation_split", "training_split", "fewshot_split")
        if config.get(key)
    }
    found = {split: path for split in keys.values() if (path := _file(folder, split))}
    evaluated = keys.get("test_split") or keys.get("validation_split")
    if evaluated is None:
        raise MpqError(f"The harness's task {name} brings its own data: leave data_dir out for it.")
    if evaluated not in found:
        raise MpqError(
            f"{folder / evaluated}.jsonl is missing: task {name} evaluates that split (.jsonl or .parquet)."
        )
    kind = found[evaluated].suffix
    if odd := [path for path in found.values() if path.suffix != kind]:
        raise MpqError(
            f"{odd[0]} is no {kind} file as {found[evaluated].name} is: give all splits of a task in one kind."
        )
    columns = {path: _columns(path) for path in found.values()}
    for path, of_split in columns.items():
        if lacking := sorted(
            set().union(*columns.values()) - of_split
        ):  # datasets wants the same of all splits
            raise MpqError(
                f"{path} lacks the column {lacking[0]} that task {name} asks for: give the columns of the hub's dataset."
            )
    changed = {
        "task": name,
        "dataset_path": "json" if kind == ".jsonl" else "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {s: str(p) for s, p in found.items()},
            "cache_dir": cache_folder,
        },
        **{key: None for key, split in keys.items() if split not in found},
    }
    # the harness takes a known task with some keys changed as a member of a group
    missing = sorted(_asked(config) - columns[found[evaluated]])
    loaded = _load(manager, {"group": "local", "task": [changed]}, name, found[evaluated], missing)
    return loaded[name], found[evaluated]


def _file(folder: Path, split: str) -> Path | None:
    return next(
        (path for kind in ("jsonl", "parquet") if (path := folder / f"{split}.{kind}").is_file()),
        None,
    )


def _columns(path: Path) -> set[str]:
    """A split's columns. Refuses what would come out as an empty or half-empty dataset: every row has those of the first."""
    if path.suffix != ".jsonl":
        return set(pl.read_parquet_schema(path))
    columns: set[str] | None = None
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                columns = set(row) if columns is None else columns
                if lacking := sorted(columns - row.keys()):
                    raise MpqError(
                        f"{path}, line {number}, lacks the column {lacking[0]} that the first line has."
                    )
    except MpqError:
        raise
    except (ValueError, AttributeError, TypeError, OSError):
        raise MpqError(
            f"{path} is not JSONL: expected one JSON object of the dataset's columns on each line."
        ) from None
    if columns is None:
        raise MpqError(f"{path} holds no documents: expected one JSON object on each line.")
    return columns


def _asked(config: Mapping[str, Any]) -> set[str]:
    """The columns that a task's templates name, as far as no code of the task makes others of them."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    templates = [config.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    asked: set[str] = set()
    for template in () if config.get("process_docs") else templates:
        with suppress(TemplateSyntaxError):
            asked |= (
                meta.find_undeclared_variables(Environment().parse(template))
                if isinstance(template, str)
                else set()
            )
    return asked


def _load(
    manager: Any, wanted: Any, name: str, file: Path | None, missing: Sequence[str] = ()
) -> dict[str, Any]:
    """The harness's tasks for one name or changed configuration; it reads the dataset and tries the first document.

    `missing` are columns that the file lacks, told where that was the mistake.
    """
    try:
        tasks: dict[str, Any] = manager.load([wanted])["tasks"]
        if file:  # the harness looks at the first document alone
            for task in tasks.values():
                task.build_all_requests()
    except Exception as error:  # whatever datasets, jinja and the tasks' own code raise
        raise _unusable(name, file, missing, error) from error
    return tasks


def _unusable(name: str, file: Path | None, missing: Sequence[str], error: Exception) -> MpqError:
    """The mistake behind what the harness or its tasks' code raised over a dataset."""
    reason = (str(error).strip().splitlines() or [""])[0]
    lacking = next(iter(missing), None)
    if isinstance(error, KeyError):
        lacking = str(error.args[0]) if error.args else ""
    elif type(error).__name__ == "UndefinedError" and reason.endswith("is undefined"):
        lacking = reason.split("'")[1]
    if file and lacking:
        return MpqError(
            f"{file} lacks the column {lacking} that task {name} asks for: give the columns of the hub's dataset."
        )
    if file:
        return MpqError(
            f"Task {name} cannot use {file} ({type(error).__name__}: {reason}): compare with the hub's dataset."
        )
    return MpqError(
        f"The harness could not evaluate task {name} ({type(error).__name__}: {reason}): check the network and the dataset, or "
        "give its files in data_dir."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's log lines and progress bars, which would run across the console's own."""
    import datasets
    import tqdm
    import tqdm.std

    logger, shown = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bars = datasets.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    plain = tqdm.std.tqdm.__init__
    silent = functools.wraps(plain)(
        lambda self, *args, **more: plain(self, *args, **{**more, "disable": True})
    )
    tqdm.std.tqdm.__init__ = silent  # the harness has no switch for all of its bars
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__ = plain
        logger.setLevel(shown)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's clients ask nothing of the network: their switches are read from the environment once, at import."""
    import datasets.config
    import huggingface_hub.constants

    switches: list[tuple[Any, str]] = [
        (module, name)
        for module in (datasets.config, huggingface_hub.constants)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
        if hasattr(module, name)
    ]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
