"""What is kept of a stage's result is in the store: Prefect's result files, which it would unpickle, are neither written nor read."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import cloudpickle
import polars as pl
from prefect import flow
from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings

from mpq.store.entries import content_key
from mpq.tasks.stage import stage


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def test_a_planted_result_is_not_unpickled(tmp_path: Path) -> None:
    """A pickle under the key that a stage's result would have had does nothing; the second run is cached all the same."""

    @stage("gains")
    def number(n: int) -> dict[str, pl.DataFrame]:
        return {"gains": pl.DataFrame({"n": [n]})}

    store, results, mark = (tmp_path / "store").as_uri(), tmp_path / "results", tmp_path / "mark"

    @flow
    def once() -> tuple[Any, Any]:
        state = number.task("k1", store, "a number", {"n": 1}, return_state=True)
        return state.name, state.result()

    with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: results}):
        name, found = once()
        assert name == "Completed"
        assert not results.exists() or not list(results.rglob("*"))
        results.mkdir(exist_ok=True)
        planted = {
            "metadata": {"serializer": {"type": "pickle"}},
            "result": base64.encodebytes(cloudpickle.dumps(Planted(mark))).decode(),
        }
        (results / content_key("k1", store)).write_text(json.dumps(planted))
        assert once() == ("Cached", found)
    assert not mark.exists()
