"""A checkpoint written, checked and described: what is between a plan and the folder that appears."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.export import modelopt, mxfp4, scheme, shards, torchao
from mpq.export.cache import caches_of, scales_of
from mpq.export.card import model_card
from mpq.export.expressible import lowered_linears, unread_experts
from mpq.export.folder import Aside, check_room, copy_beside
from mpq.export.layout import Layout
from mpq.export.ranges import largest_in, measured_inputs, shares_of
from mpq.export.record import Exported, write_record
from mpq.export.shards import SHARD_BYTES, Shard, Shares, in_base, shards_of, write_index
from mpq.export.skeleton import Skeleton, skeleton
from mpq.formats.format import get_format
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import check_unchanged, fingerprint, load_config, marks
from mpq.models.dense import tensors_by_file
from mpq.models.layout import read_config, weight_files
from mpq.models.quantized import method_of, refuse_narrow
from mpq.program.plan import Plan

log = logging.getLogger("mpq")

LAYOUTS: dict[str, Layout] = {
    "compressed-tensors": scheme.LAYOUT,
    "modelopt": modelopt.LAYOUT,
    "torchao": torchao.LAYOUT,
    "mxfp4": mxfp4.LAYOUT,
}
_OF_SOURCE = ("dtype", "torch_dtype", "quantization_config")  # in config.json: said anew
_VERSION = 1  # of what is written: shards of another are not taken over
_NO_CHECK: dict[str, Any] = {"done": False, "why": "it was not asked for (--no-check)"}


def digest(content: Any) -> str:
    """SHA-256 of what JSON says of it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_source(
    source: Path, trust_remote_code: bool, as_is: bool = False
) -> tuple[dict[str, Any], Skeleton]:
    """The config.json of a checkpoint that can be exported, and its names, `as_is` or transformers' alone. Raises MpqError where it
    cannot be read."""
    config = read_config(source)
    if not method_of(config, source):
        refuse_narrow(weight_files(source), source)
    tensors = [name for _, parts in tensors_by_file(source) for name in parts] if as_is else ()
    return config, skeleton(load_config(source, trust_remote_code), tensors)


class Writing:
    """One checkpoint: all that can be refused is refused while this is made, what concerns the weights' content by `run`."""

    def __init__(
        self,
        formats: Mapping[str, str],
        base: str,
        source: Path,
        to: str,
        engine: str,
        trust_remote_code: bool = False,
        shard_bytes: int | None = None,
    ):
        self.base, self.source, self.to, self.engine = base, source, to, engine
        self.layout, self.trusted = LAYOUTS[to], trust_remote_code
        self.config, self.model = read_source(source, trust_remote_code, self.layout.as_is)
        linears = {o: f for o, f in formats.items() if f != base and not o.endswith("_matmul")}
        self.layout.check_held(linears, base, self.model)
        self.caches = caches_of(formats, self.model, to, engine, bool(self.layout.cache))
        self.lowered = lowered_linears(formats, base, self.model, engine)
        limit, sizes = shard_bytes or SHARD_BYTES, self.layout.sizes
        how = (limit, sizes, self.layout.stacked)
        self.shards = shards_of(source, self.model, self.lowered, base, *how)
        one_by_one: dict[str, tuple[str, ...]] = {}
        for piece in (piece for shard in self.shards for piece in shard.pieces if piece.format):
            if piece.op in self.model.expert_ops:
                one_by_one[piece.op] = (*one_by_one.get(piece.op, ()), piece.module)
        self.model = replace(self.model, one_by_one=one_by_one)

    def run(
        self,
        plan: Plan,
        out: Path,
        check: Blocks | None,
        device: str,
        key: str,
        progress: Callable[[int, int], None] | None,
    ) -> Exported:
        """Write the checkpoint of `plan` to `out`, checked on `check`; see exporting.export."""
        before, of = marks(self.source), fingerprint(self.source)
        plan.check_model(of)
        measured = (measured_inputs(self.shards), self.caches)
        largest = largest_in(check, *measured, self.source, self.base, device, self.trusted)
        shares = shares_of(self.shards, self.source, self.base, self.engine, largest.inputs)
        scales = scales_of(self.caches, largest.caches)
        aside = Aside(out, self._key(of, shares, scales))
        check_room(out, self._missing(aside) + self._room_of(check))
        aside.begin()
        metadata = self.layout.metadata(self.shards, self.base)
        for done, shard in enumerate(self.shards):
            more = scales if done + 1 == len(self.shards) else {}
            aside.shard(shard.file, self._writer(shard, shares, metadata, more))
            if progress:
                progress(done + 1, len(self.shards))
        check_unchanged(self.source, before)
        write_index(self.shards, aside.folder)
        for name, content in self.layout.beside(self.lowered, self.model) if self.lowered else ():
            (aside.folder / name).write_text(content, encoding="utf-8")
        config = json.dumps(self._config(), indent=2)
        (aside.folder / "config.json").write_text(config + "\n", encoding="utf-8")
        copy_beside(self.source, aside.folder, code=bool(self.config.get("auto_map")))
        found = _NO_CHECK if check is None else self._checked(aside.folder, check, device, scales)
        made = Exported(
            folder=str(out),
            to=self.to,
            engine=self.engine,
            base=self.base,
            formats=dict(Counter(self.lowered.values())),
            linears=len(self.model.linears) + len(self.model.transposed),
            weight_bytes=sum(shard.bytes for shard in self.shards),
            base_weight_bytes=in_base(self.shards, self.base),
            plan=plan.name,
            fingerprint=of,
            check=found,
            files=aside.digests,
            notes=self._notes(found.get("caches_unread", ())),
            key=key,
            caches=self.caches.layers,
            serve=self._serve(),
        )
        card = model_card(plan, self.lowered, made.linears, self.engine, asdict(made))
        (aside.folder / "README.md").write_text(card, encoding="utf-8")
        (aside.folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        write_record(made, aside.folder)
        if found.get("done") and not found["passed"]:
            raise _wrong(found, aside.folder)
        aside.finish()
        return made

    def _key(self, of: str, shares: Mapping[str, Shares], scales: Mapping[str, float]) -> str:
        """What decides the shards' content."""
        pieces = [asdict(shard) for shard in self.shards]
        return digest([_VERSION, of, self.base, self.lowered, pieces, shares, scales, self.to])

    def _serve(self) -> str:
        """The command that serves the checkpoint, with what its file cannot say; "" for an engine that mpq knows none of."""
        if self.engine != "vllm":
            return ""
        told = ["vllm serve FOLDER --dtype", get_format(self.base).dtype, *self.caches.switches]
        return " ".join(told)

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
        self,
        shard: Shard,
        shares: Mapping[str, Shares],
        metadata: Mapping[str, str],
        more: Mapping[str, float],
    ) -> Callable[[Path], None]:
        how = (shares, self.layout.laid_out, metadata, more)
        return lambda to: shards.write_shard(shard, self.source, self.base, to, *how)

    def _config(self) -> dict[str, Any]:
        """The source's config.json in the plan's base dtype, a lowered head untied, with what is quantized."""
        config = {k: v for k, v in self.config.items() if k not in _OF_SOURCE}
        if "quantization_config" in (config.get("text_config") or {}):
            text = config["text_config"]
            config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        config["dtype"] = get_format(self.base).dtype
        head = f"{self.model.head}.weight"
        if self.model.head in self.lowered and len(self.model.sharing(head)) > 1:
            config["tie_word_embeddings"] = False
            if "tie_word_embeddings" in (config.get("text_config") or {}):
                config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        if self.lowered or self.caches.lowered:
            of_cache = self.layout.cache if self.caches.lowered else {}
            section = self.layout.section(self.lowered, self.model)
            config["quantization_config"] = {**section, **of_cache}
        return config

    def _checked(
        self, folder: Path, blocks: Blocks, device: str, scales: Mapping[str, float]
    ) -> dict[str, Any]:
        from mpq.export.check import check_export

        linears = {*self.model.linears, *self.model.transposed}
        names = {
            piece.op: (piece.file, piece.tensor)
            for shard in self.shards
            for piece in shard.pieces
            if piece.op in linears
        }
        decode = bool(unread_experts(self.lowered, self.base, self.model))
        of = (folder, self.source, names, self.lowered, self.base, blocks)
        how = (device, self.trusted, decode, self.layout.reading)
        return check_export(*of, *how, caches=self.caches, scales=scales).as_json()

    def _notes(self, unread: Collection[str]) -> tuple[str, ...]:
        """What is to be known of the checkpoint, told as warnings as well; `unread` are attentions
        whose cache the check found in base."""
        notes: tuple[str, ...] = ()
        if self.engine == "vllm" and self.model.head in self.lowered:
            notes += (
                f"{self.model.head} is lowered: vLLM reads that since its pull request 37291 (March 2026) only; see docs/engines.md",
            )
        if any(op in self.model.expert_ops for op in self.lowered):
            notes += (
                "experts are lowered: transformers alone leaves their activations as they are, and of engines vLLM alone was seen to answer such exports, in int8 and w4a16_g32 on a CPU; see docs/engines.md",
            )
        notes += tuple(self.caches.notes(unread))
        for note in notes:
            log.warning("%s.", note)
        return notes


def _wrong(found: Mapping[str, Any], folder: Path) -> MpqError:
    """What the check found, with the folder in which the export is left to be looked at."""
    if found["differing"]:
        why = f"the first of {len(found['differing'])} differences: {found['differing'][0]}"
    else:
        why = f"loss {found['loss_reloaded']:.5f} against {found['loss_plan']:.5f} of mpq's own run, ± {found['loss_tolerance']:.2g} allowed; KL {found['kl_plan_reloaded']:.2g}, {found['kl_tolerance']:.2g} allowed"
    return MpqError(
        f"The export is not the plan once it is reloaded ({why}): it is left in {folder}; please report it."
    )
