"""A plan and a checkpoint in, a folder that an engine loads out: all of the export in order."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from mpq.caches import private_folder
from mpq.errors import MpqError, require
from mpq.export.elsewhere import Elsewhere, is_elsewhere, local_path
from mpq.export.engines import check_engine
from mpq.export.folder import RECORD, Aside, Asked, alone, check_target, told
from mpq.export.record import Exported, recorded, write_record
from mpq.models.blocks import Blocks
from mpq.program.plan import Plan
from mpq.spec.export import NEEDS, READERS, Target

TARGETS: tuple[Target, ...] = get_args(Target)
WITHOUT_WEIGHTS = ("neural-compressor", "json")  # nothing to load, nothing to be checked


def export(
    plan: Plan,
    source: Path,
    out: str | Path,
    *,
    to: str = "compressed-tensors",
    engine: str | None = None,
    check: Blocks | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    shard_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    key: str = "",
    asked: Asked = Asked(),
) -> Exported:
    """Write `plan` on the checkpoint in the folder `source` as a folder `out`, which appears when it is whole and right.

    `engine` is the one that will read it, the first reader of `to` if left out (spec/export.py). With `check`, blocks of held-out
    text, a checkpoint is reloaded in transformers by a fresh process and compared with mpq's own run of the plan (check.py). Cut
    off, the same call goes on where it was. Raises MpqError, before anything is written, for a plan of another model, what the
    target or the engine cannot express, an `out` that is not empty, and too little room; afterwards, with no `out` left behind,
    where the disk fills up or the check fails. An `out` that is a URL of another place gets what was made and checked here
    (elsewhere.py).
    """
    engine = reader_of(to, engine)
    if is_elsewhere(out):
        from mpq.export.writing import digest
        from mpq.models.checkpoint import fingerprint

        Elsewhere(str(out)).check_target(overwrite, asked)
        checked, of = check is not None, fingerprint(source)
        local = private_folder("exports") / digest(
            [plan.to_json(), of, to, engine, checked, key, str(out)]
        )
        if not (local / RECORD).is_file():  # else an earlier upload of it was cut off
            how: dict[str, Any] = {"check": check, "device": device, "progress": progress}
            how |= {"trust_remote_code": trust_remote_code, "shard_bytes": shard_bytes}
            export(plan, source, local, to=to, engine=engine, overwrite=True, key=key, **how)
        Elsewhere(str(out)).send(local)
        made = recorded(local, str(out))
        shutil.rmtree(local)
        return made
    out = local_path(out)
    check_target(out, source, overwrite, asked)
    if to in WITHOUT_WEIGHTS:
        return _without_weights(plan, source, out, to, engine, trust_remote_code, key)
    from mpq.export.writing import Writing

    if check is not None:
        _require_reader(to)
    writing = Writing(plan.formats, plan.base, source, to, engine, trust_remote_code, shard_bytes)
    with alone(out), told(out):
        return writing.run(plan, out, check, device, key, progress)


def reader_of(to: str, engine: str | None = None) -> str:
    """The engine that an export to `to` is for, its first reader where none is named. Raises MpqError for what is not known, and
    for an engine that does not read it."""
    readers = READERS.get(to)  # type: ignore[call-overload]
    if readers is None:
        raise MpqError(f"Unknown target {to!r}: expected one of {', '.join(TARGETS)}.")
    if engine is None:
        return str(readers[0]) if readers else "none"
    if readers and engine not in readers:
        check_engine(engine)
        others = " or ".join(f"to {name}" for name, of in READERS.items() if engine in of)
        raise MpqError(
            f"{engine} does not read what is exported to {to}: export it for {', '.join(readers)}, or {others}."
        )
    return engine


def check_exportable(
    formats: Mapping[str, str],
    base: str,
    source: Path,
    engine: str,
    trust_remote_code: bool = False,
    to: str = "compressed-tensors",
) -> None:
    """Raise MpqError where a plan of these formats (op → format) could not be exported for the engine: nothing is written."""
    reader_of(to, engine)
    if to == "json":
        return
    if to == "neural-compressor":
        _settings(formats, base, source, trust_remote_code)
        return
    from mpq.export.writing import Writing

    _require_reader(to)
    Writing(formats, base, source, to, engine, trust_remote_code)


def check_caches(formats: Mapping[str, str], source: Path, trust_remote_code: bool = False) -> None:
    """Raise MpqError where the caches that `formats` (op → format) lower are such as no export of
    the checkpoint in the folder `source` can have, whichever plan is made with them."""
    from mpq.export.cache import caches_of
    from mpq.export.writing import LAYOUTS, read_source

    to, engine = "compressed-tensors", "vllm"  # alone have caches by layer
    layout = LAYOUTS[to]
    _, model = read_source(source, trust_remote_code, layout.as_is)
    caches_of(formats, model, to, engine, bool(layout.cache))


def _require_reader(to: str) -> None:
    if to in NEEDS:
        require(NEEDS[to], "the check of an export")


def _without_weights(
    plan: Plan, source: Path, out: Path, to: str, engine: str, trust_remote_code: bool, key: str
) -> Exported:
    """The plan for other tools: `plan.json` as mpq reads it, and what the tool reads."""
    linears = len(plan.formats)
    if to == "json":
        files = {"formats.json": _formats(plan)}
        why = "there is nothing to load in JSON"
    else:
        from mpq.models.checkpoint import fingerprint

        plan.check_model(fingerprint(source))
        files = _settings(plan.formats, plan.base, source, trust_remote_code)
        why = "settings have no weights to load: Neural Compressor rounds them on the device"
    files["plan.json"] = plan.to_json()
    with alone(out), told(out):
        aside = Aside(out, to)
        aside.begin()
        for name, text in files.items():
            (aside.folder / name).write_text(text, encoding="utf-8")
        made = Exported(
            folder=str(out),
            to=to,
            engine=engine,
            base=plan.base,
            formats=dict(Counter(plan.lowered.values())),
            linears=linears,
            weight_bytes=0,
            base_weight_bytes=0,
            plan=plan.name,
            fingerprint=plan.fingerprint,
            check={"done": False, "why": why},
            files={n: hashlib.sha256(t.encode()).hexdigest() for n, t in files.items()},
            key=key,
        )
        write_record(made, aside.folder)
        aside.finish()
        return made


def _settings(
    formats: Mapping[str, str], base: str, source: Path, trust_remote_code: bool
) -> dict[str, str]:
    """Neural Compressor's, for the model in the folder `source`."""
    from mpq.export.neural_compressor import settings
    from mpq.export.writing import read_source

    config, model = read_source(source, trust_remote_code)
    return settings(formats, base, model, str(config.get("model_type")))


def _formats(plan: Plan) -> str:
    told = {"base": plan.base, "fingerprint": plan.fingerprint, "formats": dict(plan.formats)}
    return json.dumps(told, indent=1)
