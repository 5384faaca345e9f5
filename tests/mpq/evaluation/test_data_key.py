"""When two evaluations on harness tasks are of the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from mpq.evaluation.task_data import Tasks, data_key


def test_a_task_of_the_hub_is_keyed_by_its_datasets_content(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another content behind the same task's name is another key, whether datasets or the task's code made its rows."""
    hub: dict[str, Any] = {"test": Dataset.from_dict({"q": ["one"]})}

    @contextmanager
    def open_tasks(names: Sequence[str], data_dir: object = None) -> Iterator[Tasks]:
        yield Tasks({name: SimpleNamespace(dataset=hub) for name in names})

    monkeypatch.setattr("mpq.evaluation.task_data.open_tasks", open_tasks)
    before = data_key(["piqa"], None)
    assert data_key(["piqa"], None) == before
    assert data_key(["arc_easy"], None) != before
    hub["test"] = Dataset.from_dict({"q": ["two"]})
    changed = data_key(["piqa"], None)
    hub["test"] = [{"q": "one"}]
    made = data_key(["piqa"], None)
    hub["test"] = [{"q": "two"}]
    assert len({before, changed, made, data_key(["piqa"], None)}) == 4
