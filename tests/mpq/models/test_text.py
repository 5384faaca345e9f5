"""Text: what counts as a document, how blocks begin, and when two sources are the same."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import DEMO, small_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpq.errors import MpqError
from mpq.evaluation.sampling import draw, in_words
from mpq.loss.cross_entropy import sample_losses
from mpq.models.documents import read_documents, source_key
from mpq.models.text import draw_blocks, load_tokenizer, read_blocks, tokenized
from mpq.spec import CalibrationSpec, EvaluationSpec, TextSpec

WORDS = [f"w{i}" for i in range(90)]
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer, as Gemma's and Llama 3's, begins every text with <bos>."""
    folder = tmp_path_factory.mktemp("bos")
    words = {w: i for i, w in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    small_model("llama", num_key_value_heads=2).save_pretrained(folder)
    return folder


def _words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def _jsonl(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_a_blocks_loss_is_the_prompts_log_likelihood(with_bos: Path, tmp_path: Path) -> None:
    """A block's loss is what an engine, given the text as its prompt, adds up token by token."""
    text = _words(11)
    (tmp_path / "a.txt").write_text(text)
    spec = TextSpec(source=str(tmp_path / "a.txt"), samples=1, length=12)
    blocks = read_blocks(spec, with_bos, 97)
    model = small_model("llama", num_key_value_heads=2)
    prompt = load_tokenizer(with_bos)(text)["input_ids"]  # an engine's own call
    expected = 0.0
    for at in range(1, len(prompt)):
        logits = model(torch.tensor([prompt[:at]])).logits[0, -1]
        expected += float(torch.log_softmax(logits.double(), -1)[prompt[at]])
    loss = sample_losses(model, torch.from_numpy(blocks.tokens))
    assert -11 * float(loss) == pytest.approx(expected, rel=1e-5)


def test_every_block_begins_as_the_model_was_trained(with_bos: Path, tmp_path: Path) -> None:
    """Each block begins with <bos>, once; behind it the documents go on, each behind its end and a <bos> of its own."""
    texts = [_words(n, n) for n in (30, 7, 40)]
    source = _jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    drawn = draw_blocks(TextSpec(source=source, samples=None, length=10), with_bos, 97)
    rows = drawn.blocks.tokens[np.argsort(drawn.indices)].tolist()
    assert all(row[0] == 1 and row[1] != 1 for row in rows)
    assert drawn.begins == "<bos>"
    whole = [3 + int(w[1:]) if w != "|" else 2 for w in " | ".join(texts).split()]
    seen = [i for row in rows for i in row if i != 1]
    assert seen == whole[: len(seen)]
    assert len(whole) - len(seen) < 10


def test_what_blocks_begin_with_is_told(with_bos: Path, tmp_path: Path) -> None:
    """The facts of a run say what each block begins with, and how many rows held no text."""
    source = _jsonl(tmp_path / "a.jsonl", {"text": None}, {"text": _words(60)}, {"text": None})
    part = {"source": source, "samples": 2, "length": 10}
    drawn = draw(with_bos, 97, CalibrationSpec(**part), EvaluationSpec(**part))
    told = in_words(drawn.table)["calibration"]
    assert "each block begins with <bos>" in told
    assert "2 rows without text left out" in told


def test_plans_are_checked_on_text_of_their_own(with_bos: Path, tmp_path: Path) -> None:
    """As many blocks as evaluate, none of which calibrates or evaluates; where too few are left, those that evaluate, and said so."""
    source = _jsonl(tmp_path / "a.jsonl", {"text": _words(200)})

    def drawn(samples: int, **evaluation: object) -> tuple[dict[str, set[int]], str]:
        part = {"source": source, "length": 10}
        of = draw(
            with_bos,
            97,
            CalibrationSpec(**part, samples=6),
            EvaluationSpec(**part | {"samples": samples, **evaluation}),
        )
        names = ("calibration", "evaluation", "check")
        assert len(of.check.tokens) == len(of.evaluation.tokens)
        numbers = {name: set(of.table.filter(part=name)["index"]) for name in names}
        return numbers, in_words(of.table)["bounds checked on"]

    for seed in (0, 1, 2):
        of, told = drawn(5, seed=seed)
        assert len(of["check"]) == 5
        assert not of["check"] & (of["calibration"] | of["evaluation"])
        assert "the evaluation's own" not in told
    of, told = drawn(15, seed=1)
    assert of["check"] == of["evaluation"]
    assert "the evaluation's own" in told
    other = _jsonl(tmp_path / "b.jsonl", {"text": _words(200)})
    of, _ = drawn(5, source=other)
    assert len(of["check"]) == 5
    assert not of["check"] & of["evaluation"]


def test_chats_go_through_the_template(with_bos: Path, tmp_path: Path) -> None:
    """Messages become what the tokenizer's chat template makes of them, never Python's way of printing a list."""
    chat = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    source = _jsonl(tmp_path / "a.jsonl", *[{"messages": chat}] * 4)
    spec = TextSpec(source=source, samples=1, length=8, field="messages")
    expected = [1] + [3 + i for i in (1, 7, 8, 2, 1, 9, 2)]
    assert read_blocks(spec, with_bos, 97).tokens.tolist() == [expected]
    with pytest.raises(MpqError, match="chat template cannot be used"):
        read_blocks(spec, DEMO, 2048)


def test_what_a_template_would_print_is_a_text(with_bos: Path, tmp_path: Path) -> None:
    """Parts of a text are joined and no content is an empty one; anything else is told, not printed as Python would."""

    def read(length: int, *messages: object) -> list[list[int]]:
        source = _jsonl(tmp_path / "a.jsonl", *[{"messages": messages}] * 4)
        spec = TextSpec(source=source, samples=1, length=length, field="messages")
        return read_blocks(spec, with_bos, 97).tokens.tolist()

    parts = [{"type": "text", "text": "w7 "}, {"type": "text", "text": "w8"}]
    whole = read(5, {"role": "user", "content": "w7 w8"})
    assert read(5, {"role": "user", "content": parts}) == whole
    (silent,) = read(6, {"role": "assistant", "content": None}, {"role": "user", "content": "w9"})
    assert silent == [1] + [3 + i for i in (1, 2, 1, 9, 2)]
    for content in (7, {"a": 1}, [{"type": "image"}], [[1]], True):
        with pytest.raises(MpqError, match="expected text, chat messages"):
            read(5, {"role": "user", "content": content})


def test_a_template_for_parts_is_given_parts(with_bos: Path) -> None:
    """A template that takes lists of parts leaves a plain text out without a word: it is given parts; one that leaves out both is told."""
    tokenizer = load_tokenizer(with_bos)
    chat = [{"role": "user", "content": "w7 w8"}]
    tokenizer.chat_template = "{% for m in messages %}w1 {% for p in m['content'] %}{{ p['text'] }}{% endfor %} w2{% endfor %}"
    assert tokenized(tokenizer, [chat]).tokens.tolist() == [3 + i for i in (1, 7, 8, 2)]
    tokenizer.chat_template = "{% for m in messages %}w1 w2{% endfor %}"
    with pytest.raises(MpqError, match="leaves out what users say"):
        tokenized(tokenizer, [chat])


def test_token_ids_are_taken_as_ids(with_bos: Path, tmp_path: Path) -> None:
    """Lists of ids are the tokens themselves, with nothing added."""
    source = _jsonl(tmp_path / "a.jsonl", {"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]})
    spec = TextSpec(source=source, samples=1, length=6, field="input_ids")
    assert read_blocks(spec, with_bos, 97).tokens.tolist() == [[5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("value", [3, True, {"a": 1}, [[1]], ["a"], [1.5]])
def test_what_is_no_text_is_told(value: object, tmp_path: Path) -> None:
    """Numbers, mappings and nested lists are no documents."""
    source = _jsonl(tmp_path / "a.jsonl", {"text": "w1"}, {"text": value})
    with pytest.raises(MpqError, match=r"Row 2 of .* expected text, chat messages"):
        read_documents(TextSpec(source=source))


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """Other separators within a string do not split a line of JSONL, and a byte order mark is no text."""
    text = "a\u2028b\u0085c\x0cd"
    row = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\n".encode())
    assert read_documents(TextSpec(source=str(tmp_path / "a.jsonl"))).documents == (text, text)


def test_other_kinds_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet, compressed text and a path from the home folder hold the same documents as plain JSONL."""
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    plain = read_documents(TextSpec(source=_jsonl(tmp_path / "a.jsonl", *rows)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(tmp_path / "a.parquet"), str(tmp_path / "a.jsonl.gz"), "~/a.jsonl"):
        assert read_documents(TextSpec(source=source)) == plain
    assert plain.documents == ("one", "two")
    assert plain.skipped == 1
    with pytest.raises(MpqError, match="has no column 'body': set field to one of text"):
        read_documents(TextSpec(source=str(tmp_path / "a.parquet"), field="body"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b'{"text": "one"}\n{"text": "two"}', "holds JSON"),
        ("a", b'\n["one", "two"]', "holds JSON"),
        ("a.txt", "one two".encode("utf-16-le"), "NUL characters"),
    ],
)
def test_what_only_looks_like_text(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    """What would be calibrated on with its own syntax is refused; prose that begins with a bracket is not."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MpqError, match=told):
        read_documents(TextSpec(source=str(tmp_path / name)))
    (tmp_path / "b.txt").write_text("[1] one\n{two}\n")
    assert read_documents(TextSpec(source=str(tmp_path / "b.txt"))).documents == (
        "[1] one\n{two}\n",
    )


def test_kinds_of_files_are_told_by_their_names(tmp_path: Path) -> None:
    """Rows of JSON are rows under each of their endings; tables, archives and fields of plain text are refused, where they would
    calibrate on commas, headers and braces."""
    rows = [{"text": "one"}, {"text": "two"}]
    content = Path(_jsonl(tmp_path / "a.jsonl", *rows)).read_bytes()
    (tmp_path / "a.ndjson").write_bytes(content)
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.lzma").write_bytes(lzma.compress(content, lzma.FORMAT_ALONE))
    for name in ("a.ndjson", "A.JSONL.GZ", "a.jsonl.lzma"):
        assert read_documents(TextSpec(source=str(tmp_path / name))).documents == ("one", "two")
    for name in ("a.csv", "a.tsv.gz", "a.jsonl.zip", "a.tar.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MpqError, match="is a table or an archive"):
            read_documents(TextSpec(source=str(tmp_path / name)))
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MpqError, match="is read as plain text, which has no 'messages'"):
        read_documents(TextSpec(source=str(tmp_path / "a.txt"), field="messages"))


def test_the_same_bytes_read_otherwise_have_another_key(tmp_path: Path) -> None:
    """JSON that was read as plain text, and then called .jsonl, is another text; where it lies and what else it is called is not."""
    content = Path(_jsonl(tmp_path / "a.jsonl", {"text": "one"})).read_bytes()
    keys = {}
    for name in ("a.txt", "b.txt", "a.jsonl", "b.ndjson", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        keys[name] = source_key(TextSpec(source=str(tmp_path / name)))
    assert keys["a.txt"] == keys["b.txt"] != keys["a.jsonl"]
    assert keys["a.jsonl"] == keys["b.ndjson"] != keys["a.jsonl.gz"]


def test_a_folder_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute folder is read, one of its configurations too, keyed by its files' content wherever it lies and by which is meant."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).mkdir()
        _jsonl(tmp_path / name / "train.jsonl", {"text": text})
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    a, b, c = (TextSpec(source=str(tmp_path / name)) for name in "abc")
    assert read_documents(b).documents == ("two",)
    assert source_key(a) == source_key(c) != source_key(b)
    (tmp_path / "a" / "README.md").write_text(
        "---\nconfigs:\n- {config_name: other, data_files: other.jsonl}\n---\n"
    )
    _jsonl(tmp_path / "a" / "other.jsonl", {"text": "three"})
    other = TextSpec(source=f"{tmp_path / 'a'}:other")
    assert read_documents(other).documents == ("three",)
    assert source_key(other) != source_key(TextSpec(source=str(tmp_path / "a")))


def test_a_datasets_key_says_which_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another id, configuration, split, revision or content behind the same id is another key; the same is the same."""
    asked: list[tuple[Any, ...]] = []
    content = {"ds/a": "one", "ds/b": "one", "gpt": "one"}

    def load(name: str, configuration: str | None, split: str, revision: str | None) -> Dataset:
        asked.append((name, configuration, split, revision))
        return Dataset.from_dict({"text": [content[name]]})

    monkeypatch.setattr("datasets.load_dataset", load)
    specs = [
        TextSpec(source="ds/a"),
        TextSpec(source="ds/b"),
        TextSpec(source="gpt"),
        TextSpec(source="ds/a:raw-v1"),
        TextSpec(source="ds/a", split="test"),
        TextSpec(source="ds/a", revision="v2"),
    ]
    keys = [source_key(spec) for spec in specs]
    assert len(set(keys)) == len(keys)
    assert ("ds/a", "raw-v1", "train", None) in asked
    assert ("ds/a", None, "train", "v2") in asked
    assert source_key(specs[0]) == keys[0]
    content["ds/a"] = "another"
    assert source_key(specs[0]) != keys[0]


def test_more_tokens_than_positions(
    with_bos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond learned positions is one sentence, beyond the length that a rotary model was made for a warning."""
    np.save(tmp_path / "t.npy", np.arange(300) % 97)
    spec = TextSpec(source=str(tmp_path / "t.npy"), samples=1, length=100)
    with caplog.at_level(logging.WARNING):
        read_blocks(spec, with_bos, 97)
    assert "100 tokens are longer than the 64 positions" in caplog.text
    learned = small_model("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    learned.config.save_pretrained(tmp_path)
    with pytest.raises(MpqError, match="has 64 positions, 100 tokens were asked for"):
        read_blocks(spec, tmp_path, 97)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ending=st.sampled_from([".txt", ".jsonl", ".npy", ".parquet", ".txt.gz", ".json", ".jsonl.xz"]),
    content=st.one_of(
        st.binary(max_size=60),
        st.sampled_from(
            [b"[" * 20000, b"\x93NUMPY\x01\x00", b"\x93NUMPY", b"PAR1", b"\x1f\x8b\x08"]
        ),
        st.builds(
            lambda shape: (
                b"\x93NUMPY\x01\x00v\x00"
                + f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape!r}, }}".ljust(
                    117
                ).encode()
                + b"\n"
            ),
            st.lists(st.integers(-(2**70), 2**70), max_size=4).map(tuple),
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["text", "role", "content", "a"]), inner, max_size=3
                )
            ),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_any_text_file_is_read_or_told(
    ending: str, content: bytes, with_bos: Path, tmp_path: Path
) -> None:
    """Whatever a text file holds, it gives blocks or one sentence."""
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    told = "It is read."
    try:
        read_blocks(TextSpec(source=str(path), samples=1, length=4), with_bos, 97)
    except MpqError as error:
        told = str(error)
    assert "\n" not in told
    assert told.endswith(".")
