"""Harness tasks under a plan: the harness's own numbers, on the generated datasets with the demo checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from small import DEMO, ROOT

from mpq.errors import MpqError
from mpq.evaluation.harness import Scores, evaluate_tasks, paired_stderr, score
from mpq.evaluation.sampling import draw_documents
from mpq.evaluation.task_data import open_tasks
from mpq.models.loading import load_model
from mpq.models.text import load_tokenizer
from mpq.running.apply import apply_plan
from mpq.spec import EvaluationSpec

pytest.importorskip("lm_eval")
DATA = ROOT / "examples" / "tasks"
TASKS = ("hellaswag", "lambada_openai", "winogrande", "piqa")
FEW = 4


@pytest.fixture(autouse=True)
def no_report_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own report on packages and hardware runs pip, at each evaluation."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model(DEMO, "fp32")


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def lowered(model: torch.nn.Module) -> dict[str, str]:
    """A plan that is felt: every linear in E5M2."""
    return {
        name: "fp8_e5m2"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.fixture(scope="module")
def evaluated(model: torch.nn.Module, tokenizer: object, lowered: dict[str, str]) -> pl.DataFrame:
    return evaluate_tasks(
        model, tokenizer, lowered, TASKS, base="fp32", seeds=[0, 1], data_dir=DATA, limit=FEW
    )


def by_hand(model: torch.nn.Module, tokenizer: object, *names: str) -> dict[str, dict[str, float]]:
    """The harness alone: its HFLM, its simple_evaluate, on the tasks as its own YAML extension loads them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with open_tasks(names, DATA) as tasks:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        # the tasks are loaded: indexing all 14,000 of the harness's own would take ten seconds
        none = TaskManager(include_defaults=False)
        loaded = [tasks.loaded[name] for name in names]
        found = simple_evaluate(
            model=lm, tasks=loaded, limit=FEW, bootstrap_iters=0, task_manager=none
        )
    return {
        name: {
            key.partition(",")[0]: value
            for key, value in found["results"][name].items()
            if key.endswith(",none")
        }
        for name in names
    }


def test_base_is_the_harness_alone(
    model: torch.nn.Module, tokenizer: object, evaluated: pl.DataFrame
) -> None:
    """Without a plan the numbers are those that the harness gives by itself."""
    for name, alone in by_hand(model, tokenizer, *TASKS).items():
        rows = evaluated.filter(
            pl.col("task") == name, pl.col("seed") == 0, ~pl.col("metric").str.contains("_diff")
        )
        assert set(rows["metric"]) == {m for m in alone if not m.endswith("_stderr")}
        assert len(rows) >= 1
        for row in rows.iter_rows(named=True):
            assert row["base_value"] == pytest.approx(alone[row["metric"]], rel=1e-5), name


def test_an_empty_plan_changes_nothing(model: torch.nn.Module, tokenizer: object) -> None:
    table = evaluate_tasks(
        model, tokenizer, {}, ["piqa"], base="fp32", seeds=[3], data_dir=DATA, limit=FEW
    )
    plain = table.filter(~pl.col("metric").str.contains("_diff"))
    assert plain["value"].to_list() == plain["base_value"].to_list()
    assert set(table.filter(pl.col("metric").str.contains("_diff"))["value"]) == {0.0}


def test_a_plan_is_felt_and_leaves_the_model_alone(
    model: torch.nn.Module, tokenizer: object, lowered: dict[str, str], evaluated: pl.DataFrame
) -> None:
    """Values under the plan are those of the applied model, seeds differ, and the differences add up."""
    perplexity = evaluated.filter(
        pl.col("task") == "lambada_openai", pl.col("metric") == "perplexity"
    ).sort("seed")
    first, second = perplexity["value"]
    assert first != second != perplexity["base_value"][0]
    difference = evaluated.filter(pl.col("metric") == "perplexity_diff").sort("seed")["value"]
    np.testing.assert_allclose(difference, perplexity["value"] - perplexity["base_value"])
    assert (evaluated.filter(pl.col("metric") == "perplexity_diff_stderr")["value"] > 0).all()
    with apply_plan(model, lowered, base="fp32", seed=1):
        under = by_hand(model, tokenizer, "lambada_openai")["lambada_openai"]
    after = by_hand(model, tokenizer, "lambada_openai")["lambada_openai"]
    assert under["perplexity"] == pytest.approx(second, rel=1e-5)
    assert after["perplexity"] == pytest.approx(perplexity["base_value"][0], rel=1e-5)


def test_base_scores_are_reused_and_progress_told(
    model: torch.nn.Module, tokenizer: object
) -> None:
    steps: list[tuple[int, int]] = []
    known = Scores(
        {("piqa", "acc"): 0.5, ("piqa", "acc_norm"): 0.25},
        {("piqa", m): [0.0, 1.0] for m in ("acc", "acc_norm")},
    )
    table = evaluate_tasks(
        model,
        tokenizer,
        {},
        ["piqa"],
        base="fp32",
        seeds=[0],
        data_dir=DATA,
        limit=2,
        base_scores=known,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert table.filter(metric="acc")["base_value"][0] == 0.5
    assert steps == [(1, 1)]
    with pytest.raises(MpqError, match="same documents"):
        evaluate_tasks(
            model,
            tokenizer,
            {},
            ["piqa"],
            base="fp32",
            seeds=[0],
            data_dir=DATA,
            limit=3,
            base_scores=known,
        )


def test_paired_stderr_is_the_textbooks_for_a_mean() -> None:
    rng = np.random.default_rng(0)
    base, lowered = rng.random(60), rng.random(60)
    expected = np.std(lowered - base, ddof=1) / math.sqrt(60)
    assert paired_stderr(list(lowered), list(base), np.mean) == pytest.approx(expected)
    many, plus = rng.random(5000), rng.random(5000)
    assert paired_stderr(list(plus), list(many), np.mean) == pytest.approx(
        np.std(plus - many, ddof=1) / math.sqrt(5000), rel=0.3
    )
    assert math.isnan(paired_stderr([1.0], [0.0], np.mean))


def test_calibration_is_drawn_reproducibly(tokenizer: object) -> None:
    """20 % of each dataset, by seed; a task's draw does not move with the other tasks; texts hold the right answer."""
    with open_tasks(TASKS, DATA) as tasks:
        drawn = draw_documents(tokenizer, tasks, length=64, seed=0)
        again = draw_documents(tokenizer, tasks, length=64, seed=0)
        other = draw_documents(tokenizer, tasks, length=64, seed=1, samples=3)
        for name in TASKS:
            assert (
                len(drawn.indices[name])
                == math.ceil(0.2 * tasks.documents(name))
                == len(drawn.texts[name])
            )
    assert drawn.blocks.key == again.blocks.key != other.blocks.key
    assert drawn.indices == again.indices
    assert drawn.indices["piqa"] != other.indices["piqa"]
    assert other.blocks.tokens.shape == (3, 64)
    with open_tasks(["piqa"], DATA) as alone:
        assert (
            draw_documents(tokenizer, alone, length=64, seed=0).indices["piqa"]
            == drawn.indices["piqa"]
        )
        with pytest.raises(MpqError, match="lower samples or length"):
            draw_documents(tokenizer, alone, length=64, seed=0, samples=10_000)
    index, text = drawn.indices["piqa"][0], drawn.texts["piqa"][0]
    row = json.loads((DATA / "piqa" / "validation.jsonl").read_text().splitlines()[index])
    assert text == f"Question: {row['goal']}\nAnswer: {row['sol2' if row['label'] else 'sol1']}"
    index, text = drawn.indices["winogrande"][0], drawn.texts["winogrande"][0]
    row = json.loads((DATA / "winogrande" / "validation.jsonl").read_text().splitlines()[index])
    before, _, after = row["sentence"].partition("_")
    assert text == f"{before}{row['option' + row['answer']]} {after.strip()}"
    index, text = drawn.indices["lambada_openai"][0], drawn.texts["lambada_openai"][0]
    assert (
        text
        == json.loads((DATA / "lambada_openai" / "test.jsonl").read_text().splitlines()[index])[
            "text"
        ]
    )


def test_unknown_task() -> None:
    with (
        pytest.raises(MpqError, match=r"no task helaswag: did you mean hellaswag"),
        open_tasks(["helaswag"], DATA),
    ):
        pass
    with pytest.raises(MpqError, match="No task"), open_tasks([], DATA):
        pass


def copied(task: str, folder: Path) -> Path:
    """A copy of one generated dataset; its evaluated file."""
    shutil.copytree(DATA / task, folder / task)
    return folder / task / ("test.jsonl" if task == "lambada_openai" else "validation.jsonl")


@pytest.mark.parametrize(
    ("task", "column"),
    [
        ("hellaswag", "endings"),
        ("hellaswag", "label"),
        ("lambada_openai", "text"),
        ("winogrande", "option2"),
        ("piqa", "sol2"),
    ],
)
def test_missing_column(tmp_path: Path, task: str, column: str) -> None:
    """One sentence names the file and the column."""
    file = copied(task, tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(
            json.dumps({("renamed" if k == column else k): v for k, v in row.items()}) + "\n"
            for row in rows
        )
    )
    with pytest.raises(MpqError) as told, open_tasks([task], tmp_path):
        pass
    assert str(told.value).startswith(f"{file} lacks the column {column} ")


def test_unusable_files(tmp_path: Path) -> None:
    """Missing, empty, torn and uneven files, and labels that are none."""
    with (
        pytest.raises(MpqError, match=r"piqa/validation\.jsonl is missing"),
        open_tasks(["piqa"], tmp_path),
    ):
        pass
    file = copied("piqa", tmp_path)
    lines = file.read_text().splitlines()[:3]
    for content, message in (
        ("", "holds no documents"),
        (lines[0][:20], "is not JSONL"),
        ("\n".join([*lines, '{"goal": "x"}']), "line 4, lacks the column label"),
    ):
        file.write_text(content)
        with pytest.raises(MpqError, match=message), open_tasks(["piqa"], tmp_path):
            pass
    file = copied("hellaswag", tmp_path)
    row = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps({**row, "label": "none"}) + "\n")
    with (
        pytest.raises(MpqError, match=r"cannot use .*hellaswag/validation\.jsonl"),
        open_tasks(["hellaswag"], tmp_path),
    ):
        pass


def test_evaluated_split_is_enough_and_parquet_too(tmp_path: Path) -> None:
    file = copied("piqa", tmp_path)
    pl.read_ndjson(file).write_parquet(file.with_suffix(".parquet"))
    shutil.rmtree(tmp_path / "winogrande", ignore_errors=True)
    for other in (tmp_path / "piqa").glob("*.jsonl"):
        other.unlink()
    with open_tasks(["piqa"], tmp_path) as tasks:
        assert tasks.documents("piqa") == len(pl.read_parquet(file.with_suffix(".parquet")))


def test_groups_need_single_tasks() -> None:
    with pytest.raises(MpqError, match="name the single tasks"), open_tasks(["lambada"], DATA):
        pass


def test_a_broken_model_is_told(tokenizer: object) -> None:
    """Accuracy alone would hide that every log-likelihood is NaN."""
    broken = load_model(DEMO, "fp32")
    broken.model.norm.weight.fill_(float("nan"))
    with (
        open_tasks(["piqa"], DATA) as tasks,
        pytest.raises(MpqError, match=r"Document 0 of task piqa .* nan"),
    ):
        score(broken, tokenizer, tasks, limit=2)


def test_a_plan_for_another_model(model: torch.nn.Module, tokenizer: object) -> None:
    with pytest.raises(MpqError, match="make the plan for this architecture"):
        evaluate_tasks(
            model,
            tokenizer,
            {"h.0.mlp": "fp8_e4m3"},
            ["piqa"],
            base="fp32",
            seeds=[0],
            data_dir=DATA,
            limit=1,
        )


def test_local_files_touch_no_network_and_the_console_stays_clean(
    model: torch.nn.Module,
    tokenizer: object,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No socket is connected, and the harness says nothing."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    evaluate_tasks(
        model, tokenizer, {}, ["winogrande"], base="fp32", seeds=[0], data_dir=DATA, limit=2
    )
    told = capfd.readouterr()
    assert told.out + told.err == ""


def test_generated_datasets_are_reproducible(tmp_path: Path) -> None:
    """The committed files are what the script writes."""
    subprocess.run(
        [sys.executable, "examples/make_tasks.py", "--out", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    files = sorted(p.relative_to(DATA) for p in DATA.rglob("*.jsonl"))
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.jsonl"))
    assert all((DATA / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    assert sum((DATA / f).stat().st_size for f in files) < 1_000_000


def test_spec_names_tasks() -> None:
    spec = EvaluationSpec(source="a.txt", tasks=("piqa",), data_dir="examples/tasks", task_limit=5)
    assert spec.tasks == ("piqa",)
    assert EvaluationSpec(source="a.txt").tasks == ()


def test_the_demo_checkpoint_is_above_chance(model: torch.nn.Module, tokenizer: object) -> None:
    """On HellaSwag's four endings and Winogrande's two options the base model is right far more often than a guess."""
    with open_tasks(["hellaswag", "winogrande"], DATA) as tasks:
        n = 60
        value = score(model, tokenizer, tasks, limit=n, batch=16).value
    for task, chance in (("hellaswag", 0.25), ("winogrande", 0.5)):
        assert value[task, "acc"] > chance + 4 * math.sqrt(chance * (1 - chance) / n)


def test_any_other_task_by_name(
    model: torch.nn.Module, tokenizer: object, lowered: dict[str, str], tmp_path: Path
) -> None:
    """A task of the harness that mpq knows nothing of, from local files of its schema: its own metrics, beside base."""
    (tmp_path / "copa").mkdir()
    rows = [
        {
            "premise": f"The list of {n} names was empty.",
            "choice1": "The loop ended.",
            "choice2": "The file grew.",
            "question": q,
            "idx": n,
            "label": n % 2,
        }
        for n, q in enumerate(["effect", "cause", "effect", "cause"])
    ]
    for split in ("train", "validation"):
        (tmp_path / "copa" / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    frame = evaluate_tasks(
        model, tokenizer, lowered, ["copa"], base="fp32", seeds=[0], data_dir=tmp_path
    )
    assert set(frame["task"]) == {"copa"}
    assert {"acc", "acc_diff"} <= set(frame["metric"])
    acc = frame.row(by_predicate=pl.col("metric") == "acc", named=True)
    assert 0 <= acc["value"] <= 1
    assert 0 <= acc["base_value"] <= 1
