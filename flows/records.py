"""What has been calibrated, kept in the store itself: it survives servers, restarts and overlapping runs."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq.models.hashes import content_hash
from mpq.spec import RunSpec
from mpq.store.entries import Damaged, Store, TableRef, content_key

SETTLE_S = 1.0  # of two runs that claim at once, the last writer holds: both have written by then
# a record is of content: how the run is called, where it runs, in which pieces and where its results go make no other plan
_NOT_CONTENT: Any = {
    "name": True,
    "model": {"path", "revision", "check_weights", "memory_gb"},
    "store": True,
    "out": True,
    "runner": True,
    "workload": True,  # another way to write what `timing` holds
    "timing": {"slice"},
}


class Records:
    """The calibrations done under one spec, whatever it calls its checkpoint and wherever it runs."""

    def __init__(self, spec: RunSpec):
        self._store = Store(spec.store)
        texts = [part.source for part in (spec.calibration, spec.evaluation) if part]
        # another text under the same name is another calibration
        content = [content_hash(Path(t)) for t in texts if Path(t).is_file()]
        self._spec = content_key(spec.model_dump(mode="json", exclude=_NOT_CONTENT), content)

    def key(self, fingerprint: str) -> str:
        """The key of one checkpoint's record."""
        return content_key("watched", fingerprint, self._spec)

    def done(self, fingerprint: str) -> dict[str, Any] | None:
        """The record of a checkpoint with this content, if it has been calibrated and its plans are still there."""
        return self._read(self.key(fingerprint))

    def latest(self, architecture: str) -> dict[str, Any] | None:
        """The record of the checkpoint of this architecture that was calibrated last."""
        return self._read(self._latest(architecture))

    def write(
        self, fingerprint: str, architecture: str, name: str, path: str, plans: list[TableRef]
    ) -> None:
        """Record a calibration. The checkpoint's own record goes last: only then it counts as done."""
        record = {
            "name": name,
            "checkpoint": path,
            "fingerprint": fingerprint,
            "plans": [asdict(r) for r in plans],
        }
        data, upstream = json.dumps(record).encode(), tuple(r.key for r in plans)
        for key in (self._latest(architecture), self.key(fingerprint)):
            self._store.write_bytes(
                "watched", key, data, "json", upstream=upstream, provenance={"stage": "watch"}
            )

    def _latest(self, architecture: str) -> str:
        return content_key("latest", architecture, self._spec)

    def _read(self, key: str) -> dict[str, Any] | None:
        ref = self._store.find("watched", key)
        if ref is None:
            return None
        record: dict[str, Any] = json.loads(self._store.read_bytes(ref))
        record["plans"] = [TableRef.of(plan) for plan in record["plans"]]
        try:
            for plan in record["plans"]:
                Store(plan.store).read_bytes(plan)
        except Damaged:
            return None
        return record


@dataclass
class Claim:
    """A lease on one piece of work, as an entry of the store that is renewed while the work goes on.

    Used with `with`; `held` says whether this owner has it. Another owner's claim counts until it has not been renewed
    for `lease_s`. Should two owners believe that they hold it, they compute the same thing twice and nothing breaks.
    """

    store: str
    key: str
    owner: str
    lease_s: float
    held: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Claim:
        if self._other_is_alive():
            return self
        self._write()
        time.sleep(SETTLE_S)
        self.held = self._read().get("owner") == self.owner
        if self.held:
            self._thread = threading.Thread(target=self._renew, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
            self._write(released=True)

    def _other_is_alive(self) -> bool:
        claim = self._read()
        if not claim or claim["released"] or claim["owner"] == self.owner:
            return False
        # by the store's own clock: those of two machines may differ by more than a lease
        age_s = Store(self.store).age_s("claims", self.key)
        return age_s is not None and age_s < self.lease_s

    def _renew(self) -> None:
        while not self._ended.wait(self.lease_s / 4):
            self._write()

    def _write(self, released: bool = False) -> None:
        claim = {"owner": self.owner, "unix_s": time.time(), "released": released}
        Store(self.store).write_bytes("claims", self.key, json.dumps(claim).encode(), "json")

    def _read(self) -> dict[str, Any]:
        where = Store(self.store)
        try:
            ref = where.find("claims", self.key)
            return dict(json.loads(where.read_bytes(ref))) if ref else {}
        except Damaged:  # renewed in between
            return {}
