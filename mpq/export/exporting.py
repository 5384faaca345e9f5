"""A plan and a checkpoint in, a folder that an engine loads out: all of the export in order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mpq.caches import private_folder
from mpq.errors import MpqError, require
from mpq.export.elsewhere import Elsewhere, is_elsewhere, local_path
from mpq.export.folder import (
    RECORD,
    Aside,
    Asked,
    alone,
    check_room,
    check_target,
    copy_beside,
    told,
)
from mpq.formats.format import get_format
from mpq.models.blocks import Blocks
from mpq.program.plan import Plan

if TYPE_CHECKING:
    from mpq.export.shards import Shard, Shares
    from mpq.export.skeleton import Skeleton

log = logging.getLogger("mpq")

Target: TypeAlias = Literal["compressed-tensors", "modelopt", "json"]
TARGETS: tuple[Target, ...] = ("compressed-tensors", "modelopt", "json")
_OF_SOURCE = ("dtype", "torch_dtype", "quantization_config")  # in config.json: said anew
_VERSION = 1  # of what is written: shards of another are not taken over
_NO_CHECK = {"done": False, "why": "it was not asked for (--no-check)"}


@dataclass(frozen=True)
class Exported:
    """What was exported: `formats` counts the lowered linears by format, `check` is what reloading it found.

    `key` is what the caller calls its content, "" where it calls it nothing.
    `weight_bytes` are those of the exported tensors, `base_weight_bytes` of the same model all in its base format.
    """

    folder: str
    to: str
    engine: str
    base: str
    formats: Mapping[str, int]
    linears: int
    weight_bytes: int
    base_weight_bytes: int
    plan: str
    fingerprint: str
    check: Mapping[str, Any]
    files: Mapping[str, str]
    notes: tuple[str, ...] = ()
    key: str = ""


def export(
    plan: Plan,
    source: Path,
    out: str | Path,
    *,
    to: str = "compressed-tensors",
    engine: str = "vllm",
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

    With `check`, blocks of held-out text, the export is reloaded in transformers by a fresh process and compared with
    mpq's own run of the plan (check.py). Cut off, the same call goes on where it was. Raises MpqError, before anything
    is written, for a plan of another model, what the target or the engine cannot express, an `out` that is not empty, and
    too little room; afterwards, with no `out` left behind, where the disk fills up or the check fails. An `out` that is a URL of
    another place gets what was made and checked here (elsewhere.py).
    """
    if to not in TARGETS:
        raise MpqError(f"Unknown target {to!r}: expected one of {', '.join(TARGETS)}.")
    if is_elsewhere(out):
        from mpq.models.checkpoint import fingerprint

        Elsewhere(str(out)).check_target(overwrite, asked)
        content = [
            plan.to_json(),
            fingerprint(source),
            to,
            engine,
            check is not None,
            key,
            str(out),
        ]
        local = private_folder("exports") / _digest(content)
        if not (local / RECORD).is_file():  # else an earlier upload of it was cut off
            how: dict[str, Any] = {"check": check, "device": device, "progress": progress}
            how |= {"trust_remote_code": trust_remote_code, "shard_bytes": shard_bytes}
            export(plan, source, local, to=to, engine=engine, overwrite=True, key=key, **how)
        Elsewhere(str(out)).send(local)
        made = _recorded(local, str(out))
        shutil.rmtree(local)
        return made
    out = local_path(out)
    check_target(out, source, overwrite, asked)
    if to == "json":
        return _export_json(plan, out, engine, key)
    if check is not None and to == "compressed-tensors":
        require("compressed_tensors", "the check of an export")
    work = _Work(plan, source, out, engine, trust_remote_code, shard_bytes, key, to)
    with alone(out), told(out):
        return work.run(check, device, progress)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _recorded(folder: Path, out: str) -> Exported:
    """What export.json in `folder` says, of the export at `out`."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    fields = {f.name: record[f.name] for f in dataclasses.fields(Exported) if f.name in record}
    return Exported(**{**fields, "folder": out, "notes": tuple(record["notes"])})


def check_exportable(
    formats: Mapping[str, str],
    base: str,
    source: Path,
    engine: str,
    trust_remote_code: bool = False,
    to: str = "compressed-tensors",
) -> None:
    """Raise MpqError where a plan of these formats (op → format) could not be exported for the engine: nothing is written."""
    if to == "compressed-tensors":
        require("compressed_tensors", "the check of an export")
    _expressed(formats, base, source, engine, trust_remote_code, to=to)


def _expressed(
    formats: Mapping[str, str],
    base: str,
    source: Path,
    engine: str,
    trust_remote_code: bool,
    shard_bytes: int | None = None,
    to: str = "compressed-tensors",
) -> tuple[dict[str, Any], Skeleton, dict[str, str], tuple[Shard, ...]]:
    """The source's config.json and names, its lowered linears, and the shards that they go to."""
    from mpq.export import modelopt
    from mpq.export.expressible import lowered_linears
    from mpq.export.shards import SHARD_BYTES, shards_of
    from mpq.export.skeleton import skeleton
    from mpq.models.checkpoint import load_config
    from mpq.models.layout import read_config, weight_files
    from mpq.models.quantized import method_of, refuse_narrow

    config = read_config(source)
    loaded = load_config(source, trust_remote_code)
    if not method_of(config, source):
        refuse_narrow(weight_files(source), source)
    model = skeleton(loaded)
    if to == "modelopt":
        modelopt.check_held(
            {op: f for op, f in formats.items() if f != base and not op.endswith("_matmul")},
            *(base, model, engine),
        )
    lowered = lowered_linears(formats, base, model, engine)
    if to == "compressed-tensors" and engine == "tensorrt-llm":
        raise MpqError(
            "tensorrt-llm does not read compressed-tensors: export to modelopt, or for another engine."
        )
    return (
        config,
        model,
        lowered,
        shards_of(source, model, lowered, base, shard_bytes or SHARD_BYTES),
    )


class _Work:
    """One export to compressed-tensors or modelopt: all that can be refused is refused while it is made."""

    def __init__(
        self,
        plan: Plan,
        source: Path,
        out: Path,
        engine: str,
        trust_remote_code: bool,
        shard_bytes: int | None,
        key: str,
        to: str,
    ):
        from mpq.models.checkpoint import fingerprint, marks

        self.plan, self.source, self.out, self.engine = plan, source, out, engine
        self.trusted, self.key, self.to = trust_remote_code, key, to
        self.config, self.model, self.lowered, self.shards = _expressed(
            plan.formats, plan.base, source, engine, trust_remote_code, shard_bytes, to
        )
        self.marks = marks(source)
        self.fingerprint = fingerprint(source)
        plan.check_model(self.fingerprint)

    def run(
        self,
        check: Blocks | None,
        device: str,
        progress: Callable[[int, int], None] | None,
    ) -> Exported:
        from mpq.export import modelopt
        from mpq.export.ranges import shares_of
        from mpq.export.shards import write_index, write_shard
        from mpq.models.checkpoint import check_unchanged

        shares = shares_of(
            *(self.shards, self.source, self.lowered, self.plan.base, self.engine),
            *(check, device, self.trusted),
        )
        aside = Aside(self.out, self._key(shares))
        check_room(self.out, self._missing(aside) + self._room_of(check))
        aside.begin()
        for done, shard in enumerate(self.shards):
            aside.shard(shard.file, self._writer(shard, write_shard, shares))
            if progress:
                progress(done + 1, len(self.shards))
        check_unchanged(self.source, self.marks)
        renamed = {"name_of": modelopt.name_of} if self.to == "modelopt" else {}
        write_index(self.shards, aside.folder, **renamed)
        if self.to == "modelopt" and self.lowered:
            beside = json.dumps(modelopt.quantization(self.lowered, self.model), indent=4)
            (aside.folder / modelopt.CONFIG).write_text(beside, encoding="utf-8")
        config = json.dumps(self._config(), indent=2)
        (aside.folder / "config.json").write_text(config + "\n", encoding="utf-8")
        copy_beside(self.source, aside.folder, code=bool(self.config.get("auto_map")))
        found = self._checked(aside.folder, check, device) if check is not None else _NO_CHECK
        made = self._exported(found, aside.digests)
        self._describe(made, aside.folder)
        if found.get("done") and not found["passed"]:
            raise _wrong(found, aside.folder)
        aside.finish()
        return made

    def _experts(self) -> list[str]:
        return [op for op in self.lowered if op in self.model.expert_ops]

    def _key(self, shares: Mapping[str, Shares]) -> str:
        """What decides the shards' content."""
        content = [
            _VERSION,
            self.fingerprint,
            self.plan.base,
            self.lowered,
            [asdict(shard) for shard in self.shards],
            shares,
        ]
        return _digest([*content, self.to] if self.to == "modelopt" else content)

    def _missing(self, aside: Aside) -> int:
        there = sum(f.stat().st_size for f in aside.folder.glob("*.safetensors"))
        return max(0, sum(shard.bytes for shard in self.shards) - there)

    def _room_of(self, check: Blocks | None) -> int:
        """Bytes of the log-probabilities that the check keeps for a while, and a little for the files beside."""
        if check is None:
            return 2**20
        samples, length = check.tokens.shape
        text = self.config.get("text_config") or self.config
        vocabulary = int(text.get("vocab_size") or 0)
        return int(samples * (length - 1)) * vocabulary * 4 + 2**20

    def _writer(
        self, shard: Shard, write: Callable[..., None], shares: Mapping[str, Shares]
    ) -> Callable[[Path], None]:
        from mpq.export.modelopt import laid_out

        how = {"laid_out": laid_out} if self.to == "modelopt" else {}
        return lambda to: write(shard, self.source, self.plan.base, to, shares, **how)

    def _config(self) -> dict[str, Any]:
        """The source's config.json in the plan's base dtype, a lowered head untied, with what is quantized."""
        from mpq.export import modelopt
        from mpq.export.scheme import quantization_config

        config = {k: v for k, v in self.config.items() if k not in _OF_SOURCE}
        if "quantization_config" in (config.get("text_config") or {}):
            text = config["text_config"]
            config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        config["dtype"] = get_format(self.plan.base).dtype
        head = f"{self.model.head}.weight"
        if self.model.head in self.lowered and len(self.model.sharing(head)) > 1:
            config["tie_word_embeddings"] = False
            if "tie_word_embeddings" in (config.get("text_config") or {}):
                config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        if self.lowered and self.to == "modelopt":
            told = modelopt.quantization(self.lowered, self.model)
            config["quantization_config"] = modelopt.quantization_config(told)
        elif self.lowered:
            config["quantization_config"] = quantization_config(self.lowered, self.model)
        return config

    def _checked(self, folder: Path, blocks: Blocks, device: str) -> dict[str, Any]:
        from mpq.export.check import check_export
        from mpq.export.expressible import unread_experts

        linears = {*self.model.linears, *self.model.transposed}
        names = {
            op: (piece.file, piece.tensor)
            for shard in self.shards
            for piece in shard.pieces
            if (op := piece.name.removesuffix(".weight")) in linears
        }
        decode = bool(unread_experts(self.lowered, self.plan.base, self.model))
        of = (folder, self.source, names, self.lowered, self.plan.base, blocks)
        found = check_export(*of, device, self.trusted, decode, self.to == "modelopt")
        return found.as_json()

    def _exported(self, found: Mapping[str, Any], files: Mapping[str, str]) -> Exported:
        from mpq.export.shards import in_base

        notes: tuple[str, ...] = (
            (
                f"{self.model.head} is lowered: vLLM reads that since its pull request 37291 (March 2026) only; see docs/engines.md",
            )
            if self.engine == "vllm" and self.model.head in self.lowered
            else ()
        )
        if self._experts():
            notes += (
                "experts are lowered: transformers alone leaves their activations as they are, and no engine was seen to answer such an export; see docs/engines.md",
            )
        for note in notes:
            log.warning("%s.", note)
        return Exported(
            folder=str(self.out),
            to=self.to,
            engine=self.engine,
            base=self.plan.base,
            formats=dict(Counter(self.lowered.values())),
            linears=len(self.model.linears) + len(self.model.transposed),
            weight_bytes=sum(shard.bytes for shard in self.shards),
            base_weight_bytes=in_base(self.shards, self.plan.base),
            plan=self.plan.name,
            fingerprint=self.fingerprint,
            check=found,
            files=files,
            notes=notes,
            key=self.key,
        )

    def _describe(self, made: Exported, folder: Path) -> None:
        from mpq.export.card import model_card

        card = model_card(self.plan, self.lowered, made.linears, self.engine, asdict(made))
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        write_record(made, folder)


def write_record(made: Exported, folder: Path) -> None:
    """export.json, beside what was exported."""
    from mpq import __version__

    record = {"mpq": __version__, **{k: v for k, v in asdict(made).items() if k != "folder"}}
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _wrong(found: Mapping[str, Any], folder: Path) -> MpqError:
    """What the check found, with the folder in which the export is left to be looked at."""
    if found["differing"]:
        why = f"{len(found['differing'])} linears differ, first: {found['differing'][0]}"
    else:
        why = f"loss {found['loss_reloaded']:.5f} against {found['loss_plan']:.5f} of mpq's own run, ± {found['loss_tolerance']:.2g} allowed; KL {found['kl_plan_reloaded']:.2g}, {found['kl_tolerance']:.2g} allowed"
    return MpqError(
        f"The export is not the plan once it is reloaded ({why}): it is left in {folder}; please report it."
    )


def _export_json(plan: Plan, out: Path, engine: str, key: str) -> Exported:
    """The plan for other tools: `plan.json` as mpq reads it, `formats.json` with the format of each op."""
    with alone(out), told(out):
        aside = Aside(out, "json")
        aside.begin()
        formats = {
            "base": plan.base,
            "fingerprint": plan.fingerprint,
            "formats": dict(plan.formats),
        }
        files = {"formats.json": json.dumps(formats, indent=1), "plan.json": plan.to_json()}
        for name, text in files.items():
            (aside.folder / name).write_text(text, encoding="utf-8")
        made = Exported(
            folder=str(out),
            to="json",
            engine=engine,
            base=plan.base,
            formats=dict(Counter(plan.lowered.values())),
            linears=len(plan.formats),
            weight_bytes=0,
            base_weight_bytes=0,
            plan=plan.name,
            fingerprint=plan.fingerprint,
            check={"done": False, "why": "there is nothing to load in JSON"},
            files={n: hashlib.sha256(t.encode()).hexdigest() for n, t in files.items()},
            key=key,
        )
        write_record(made, aside.folder)
        aside.finish()
        return made
