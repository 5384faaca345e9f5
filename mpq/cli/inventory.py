"""What a store holds and why: its entries, the way from a plan back to its inputs, what is damaged, what nothing needs.

Only files of the store's own layout (mpq/store/entries.py) are looked at; strangers beside them are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mpq.errors import MpqError
from mpq.program.plan import Plan
from mpq.redaction import printable
from mpq.report.runs import read_record
from mpq.store.entries import Damaged, Store, StoredFile, TableRef

T = TypeVar("T")
U = TypeVar("U")
State = Literal["whole", "damaged", "unfinished"]

_DATA = re.compile(r"[0-9a-f]{64}\.\w+")
_ASIDE = re.compile(r"(?:[0-9a-f]{64}\.\w+|meta\.json)\.[0-9a-f]{32}\.part")
_KEY = re.compile(r"[0-9a-f]{64}")
_PARALLEL = 16  # reads of small objects in flight: they wait for the network, not for this machine


@dataclass(frozen=True)
class Entry:
    """One entry of a store and its files. Without `meta.json` it is unfinished: no reader sees it.

    `ref` and `made` are its metadata's reference and provenance, once read; `damage` says what is wrong with it, empty where
    nothing is known to be.
    """

    kind: str
    key: str
    files: dict[str, StoredFile]
    ref: TableRef | None = None
    made: dict[str, Any] = field(default_factory=dict)
    damage: str = ""

    @property
    def state(self) -> State:
        """whole, damaged or unfinished."""
        if self.damage:
            return "damaged"
        return "whole" if "meta.json" in self.files else "unfinished"

    @property
    def bytes(self) -> int:
        """Bytes of all of its files."""
        return sum(f.bytes for f in self.files.values())

    @property
    def upstream(self) -> tuple[str, ...]:
        """The keys that it was computed from; () where its metadata is not known."""
        return self.ref.upstream if self.ref else ()

    def row(self) -> dict[str, Any]:
        """The entry as a row of a listing."""
        written = self.made.get("written_unix_s")
        return {
            "kind": self.kind,
            "key": self.key,
            "state": self.state,
            "rows": self.ref.rows if self.ref else None,
            "bytes": self.bytes,
            "stage": _text(self.made.get("stage")),
            "host": _text(self.made.get("host")),
            "written_unix_s": written if _is_time(written) else None,
            "upstream": list(self.upstream),
            "damage": self.damage or None,
        }


def _text(value: Any) -> str | None:
    return None if value is None else printable(str(value))


def _is_time(value: Any) -> bool:
    """Whether it is a time that a calendar has, in Unix seconds."""
    return type(value) in (int, float) and 0 <= value < 1e11


def entries(store: Store) -> list[Entry]:
    """All entries of a store with their metadata, by kind and key. Raises MpqError where there is nothing under its URL."""
    found: dict[tuple[str, str], dict[str, StoredFile]] = {}
    for path, file in store.files().items():
        parts = path.split("/")
        if len(parts) == 3 and (
            parts[2] == "meta.json" or _DATA.fullmatch(parts[2]) or _ASIDE.fullmatch(parts[2])
        ):
            found.setdefault((parts[0], parts[1]), {})[parts[2]] = file
    if not found:
        raise MpqError(
            f"There is no table under {store.url}: expected the URL of a store, as the `store` of a spec gives it."
        )
    return _all(lambda item: _with_meta(store, Entry(*item[0], item[1])), sorted(found.items()))


def _all(what: Callable[[T], U], of: Iterable[T]) -> list[U]:
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(what, of))


def _with_meta(store: Store, entry: Entry) -> Entry:
    if "meta.json" not in entry.files:
        return entry
    try:
        meta = store.meta(entry.kind, entry.key)
        ref = store.reference(entry.kind, entry.key, meta)
    except Damaged as damage:
        return replace(entry, damage=str(damage))
    made = meta.get("provenance")
    return replace(entry, ref=ref, made=made if isinstance(made, dict) else {})


def verify(store: Store) -> list[Entry]:
    """All entries, each read whole and checked against its hash."""
    return _all(lambda entry: _verified(store, entry), entries(store))


def _verified(store: Store, entry: Entry) -> Entry:
    if entry.state != "whole" or entry.ref is None:
        return entry
    try:
        data = store.read_bytes(entry.ref)
    except Damaged as damage:
        return replace(entry, damage=str(damage))
    if len(data) != entry.ref.bytes:
        return replace(entry, damage="meta.json tells another size")
    return entry


@dataclass(frozen=True)
class Run:
    """The record of a run: where it lies, the references of its tables, the plans beside it."""

    folder: Path
    name: str
    model: str
    tables: tuple[TableRef, ...]
    plans: tuple[Path, ...]

    @property
    def keys(self) -> frozenset[str]:
        """The keys that the run's record and its plans name."""
        named = {key for ref in self.tables for key in (ref.key, *ref.upstream)}
        return frozenset(named.union(*(plan_keys(path) for path in self.plans)))


def runs(folder: Path) -> list[Run]:
    """The runs under a folder, by path. Raises MpqError for a folder that is not there or a record that cannot be read."""
    if not folder.is_dir():
        raise MpqError(
            f"No folder {folder}: expected the folder of runs, as the `out` of a spec gives it."
        )
    return [_run(path) for path in sorted(folder.rglob("run.json"))]


def _run(path: Path) -> Run:
    record, references = read_record(path)
    tables = tuple(ref for refs in references.values() for ref in refs)
    plans = tuple(sorted((path.parent / "plans").glob("*.json")))
    return Run(path.parent, record["name"], record["facts"].get("model", ""), tables, plans)


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises MpqError where it is none."""
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MpqError(
            f"The plan {path} cannot be read ({error}): expected the JSON that `mpq run` writes."
        ) from None


def plan_keys(path: Path) -> dict[str, str]:
    """The keys of the tables that a plan came from, each with the name that the plan gives it."""
    said = read_plan(path).provenance.items()
    return {v: name for name, v in said if isinstance(v, str) and _KEY.fullmatch(v)}


@dataclass(frozen=True)
class Step:
    """One key on the way back: its entries (none: missing), and the steps that it came from.

    `shown_above` marks a key whose own way back stands further up.
    """

    key: str
    entries: tuple[Entry, ...]
    came_from: tuple[Step, ...] = ()
    shown_above: bool = False

    def as_json(self) -> dict[str, Any]:
        """The step and all behind it as plain data."""
        rows = [
            {k: v for k, v in e.row().items() if k not in ("key", "upstream")} for e in self.entries
        ]
        return {
            "key": self.key,
            "entries": rows,
            "shown_above": self.shown_above,
            "came_from": [s.as_json() for s in self.came_from],
        }


def by_key(held: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each key: one stage writes several kinds under its key."""
    found: dict[str, list[Entry]] = {}
    for entry in held:
        found.setdefault(entry.key, []).append(entry)
    return found


def trace_back(key: str, held: dict[str, list[Entry]], shown: set[str] | None = None) -> Step:
    """The way from a key back to its inputs."""
    shown = set() if shown is None else shown
    here = tuple(held.get(key, ()))
    if key in shown:
        return Step(key, here, shown_above=True)
    shown.add(key)
    behind = dict.fromkeys(k for e in here for k in e.upstream)
    return Step(key, here, tuple(trace_back(k, held, shown) for k in behind))


def find_key(text: str, held: dict[str, list[Entry]]) -> str:
    """The key that `text` names: whole or its beginning, with or without `kind/` before it. Raises MpqError for none or many."""
    kind, _, start = text.rpartition("/")
    of_kind = [k for k, of in held.items() if not kind or any(e.kind == kind for e in of)]
    found = [k for k in of_kind if start and k.startswith(start)]
    if len(found) != 1:
        told = f"{len(found)} keys begin with it" if found else "no key begins with it"
        raise MpqError(
            f"{text} names no table ({told}): give a plan's JSON file or a key as `mpq store ls` shows it."
        )
    return found[0]


@dataclass(frozen=True)
class Waste:
    """A file that nothing needs, and why."""

    path: str
    bytes: int
    why: Literal["no kept run or plan needs it", "unfinished", "superseded", "left over"]


def unneeded(
    store: Store, held: Sequence[Entry], kept: Iterable[str], before_unix_s: float
) -> tuple[list[Waste], list[str]]:
    """What may go, `meta.json` before its data so that no reader sees an entry without; and the kept keys that are missing.

    Kept are the entries of the keys `kept` and of all that they came from, whatever was written after `before_unix_s` (a run
    that is under way has no record yet), and what watch remembers, or it would calibrate everything again. Raises MpqError
    where a kept entry's metadata is damaged, since what it came from cannot be told.
    """
    index, needed, missing = by_key(held), set[str](), list[str]()

    def stays(entry: Entry) -> bool:
        young = any(file.modified_unix_s >= before_unix_s for file in entry.files.values())
        return young or entry.kind == "watched"

    open_keys = list(dict.fromkeys([*kept, *(entry.key for entry in held if stays(entry))]))
    while open_keys:
        key = open_keys.pop()
        if key in needed:
            continue
        needed.add(key)
        if key not in index:
            missing.append(key)
        for entry in index.get(key, ()):
            if entry.damage:
                raise MpqError(
                    f"{entry.kind}/{key} in {store.url} is kept but damaged ({entry.damage}), so what it came from cannot be told: "
                    "run its spec again first, which writes it anew."
                )
            open_keys += entry.upstream
    waste = [w for entry in held for w in _waste(entry, entry.key in needed, before_unix_s)]
    return waste, missing


def remove(store: Store, waste: Sequence[Waste], before_unix_s: float) -> list[Waste]:
    """Delete what may go, and return it: without the entries of which a run has written or used something meanwhile."""
    young = {
        path.rpartition("/")[0]
        for path, file in store.files().items()
        if file.modified_unix_s >= before_unix_s
    }
    gone = [item for item in waste if item.path.rpartition("/")[0] not in young]
    for item in gone:
        store.remove(item.path)
    return gone


def _waste(entry: Entry, needed: bool, before_unix_s: float) -> list[Waste]:
    current = f"{entry.ref.sha256}.{entry.ref.suffix}" if entry.ref else ""
    found = []
    for name, file in sorted(entry.files.items(), key=lambda item: item[0] != "meta.json"):
        if file.modified_unix_s >= before_unix_s:
            continue
        path = f"{entry.kind}/{entry.key}/{name}"
        if _ASIDE.fullmatch(name):
            found.append(Waste(path, file.bytes, "left over"))
        elif entry.state == "unfinished":
            found.append(Waste(path, file.bytes, "unfinished"))
        elif not needed:
            found.append(Waste(path, file.bytes, "no kept run or plan needs it"))
        elif name not in ("meta.json", current):
            found.append(Waste(path, file.bytes, "superseded"))
    return found
