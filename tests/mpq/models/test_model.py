"""Checkpoints and text: what is read, when two are the same, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small import DEMO, small_model

from mpq.errors import MpqError
from mpq.loss.cross_entropy import sample_losses
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import fetch, fingerprint, load_config
from mpq.models.loading import load_model
from mpq.models.text import read_blocks
from mpq.spec import TextSpec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    small_model("llama", num_key_value_heads=2).save_pretrained(folder)
    return folder


def _copy(checkpoint: Path, to: Path) -> Path:
    return Path(shutil.copytree(checkpoint, to))


def test_fingerprint_is_of_the_content(checkpoint: Path, tmp_path: Path) -> None:
    """A copy under another name is the same model; other weights under the same name are another."""
    copy = _copy(checkpoint, tmp_path / "other")
    assert fingerprint(copy) == fingerprint(checkpoint)
    namesake = tmp_path / "elsewhere" / checkpoint.name
    small_model("llama", seed=1, num_key_value_heads=2).save_pretrained(namesake)
    assert fingerprint(namesake) != fingerprint(checkpoint)


def test_loads_from_a_url(checkpoint: Path) -> None:
    """A file:// URL and a memory:// folder give the same model as the path."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in checkpoint.iterdir():
        memory.pipe_file(f"/models/m/{file.name}", file.read_bytes())
    assert (
        fingerprint(fetch("memory://models/m"))
        == fingerprint(fetch(checkpoint.as_uri()))
        == fingerprint(checkpoint)
    )


def test_loading_keeps_the_weights(checkpoint: Path) -> None:
    """The loaded model computes what the saved one did."""
    ids = torch.arange(12)[None]
    expected = small_model("llama", num_key_value_heads=2)(ids).logits
    assert torch.equal(load_model(checkpoint, "fp32")(ids).logits, expected)


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "missing tensor",
        "no weights",
        "no config",
        "config is not JSON",
        "unknown architecture",
    ],
)
def test_damaged_checkpoints_are_told(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    """Each kind of damage is one sentence, and random weights are never filled in."""
    folder = _copy(checkpoint, tmp_path / "m")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif damage == "missing tensor":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "config is not JSON":
        config.write_text("{")
    else:
        config.write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(MpqError) as told:
        load_model(fetch(str(folder)), "fp32")
    assert "\n" not in str(told.value)
    assert str(told.value).endswith(".")


@pytest.mark.parametrize(
    "path", ["./nope", "/nope/model", "a/b/c", "file:///nope/model", "s4://bucket/model"]
)
def test_missing_checkpoints_are_told(path: str) -> None:
    """A path that leads nowhere is one sentence that repeats it."""
    with pytest.raises(MpqError, match=path):
        fetch(path)


def test_blocks_from_arrays(checkpoint: Path, tmp_path: Path) -> None:
    """Streams are cut into blocks and drawn without overlap, rows are used as they are; the draw is reproducible."""
    np.save(tmp_path / "stream.npy", np.arange(50) % 97)
    text = TextSpec(source=str(tmp_path / "stream.npy"), samples=4, length=10)
    blocks = read_blocks(text, checkpoint, 97)
    assert sorted(blocks.tokens[:, 0].tolist())[0] % 10 == 0
    assert len({tuple(b) for b in blocks.tokens}) == 4
    assert read_blocks(text, checkpoint, 97).key == blocks.key
    assert read_blocks(text.model_copy(update={"seed": 1}), checkpoint, 97).key != blocks.key
    np.save(tmp_path / "rows.npy", np.arange(36).reshape(3, 12))
    rows = read_blocks(
        TextSpec(source=str(tmp_path / "rows.npy"), samples=3, length=10), checkpoint, 97
    )
    assert {tuple(r) for r in rows.tokens} == {tuple(range(a, a + 10)) for a in (0, 12, 24)}


def test_text_and_jsonl_agree(tmp_path: Path) -> None:
    """The same texts as a file and as JSONL give tokens of the same tokenizer."""
    words = "def main():\n    return 1\n" * 60
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": words}) for _ in range(2)))
    one = read_blocks(TextSpec(source=str(tmp_path / "a.txt"), samples=2, length=32), DEMO, 2048)
    two = read_blocks(TextSpec(source=str(tmp_path / "a.jsonl"), samples=4, length=32), DEMO, 2048)
    assert {tuple(b) for b in one.tokens} & {tuple(b) for b in two.tokens}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty or shorter than one block"),
        ("short.txt", b"def f(): pass\n" * 40, "blocks of 32 tokens, 64 were asked for"),
        ("binary.txt", b"\xff\xfe\xff", "cannot be read as UTF-8"),
        ("bad.jsonl", b'{"txet": "a"}\n', "not JSONL with the key 'text'"),
        ("bad.npy", b"not an array", "cannot be read as a .npy"),
        (None, b"", "No text at"),
    ],
)
def test_bad_calibration_text_is_told(
    name: str | None, content: bytes, message: str, tmp_path: Path
) -> None:
    """Empty, short, binary, mislabelled and missing sources are one sentence each."""
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(MpqError, match=message):
        read_blocks(TextSpec(source=str(path), samples=64, length=32), DEMO, 2048)


def test_ids_outside_the_vocabulary_are_told(checkpoint: Path, tmp_path: Path) -> None:
    """Tokens of another tokenizer are noticed before they crash the embedding."""
    np.save(tmp_path / "t.npy", np.full(64, 500))
    with pytest.raises(MpqError, match="token id 500, the model's vocabulary ends at 96"):
        read_blocks(TextSpec(source=str(tmp_path / "t.npy"), samples=1, length=16), checkpoint, 97)


def test_loss_leaves_padding_out() -> None:
    """A padded sample has the loss of its own tokens alone."""
    model = small_model("llama", num_key_value_heads=2)
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, 12:] = 0
    assert sample_losses(model, ids, mask).item() == pytest.approx(
        sample_losses(model, ids[:, :12]).item(), rel=1e-5
    )


def test_shards_cover_the_blocks() -> None:
    """Shards are the blocks in order, none lost, none twice."""
    blocks = Blocks(np.arange(70).reshape(7, 10))
    assert np.array_equal(np.concatenate([s.tokens for s in blocks.shards(3)]), blocks.tokens)
    assert len(blocks.shards(20)) == 7


def test_config_is_read_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Partitioning needs config.json alone."""
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert load_config(fetch(str(tmp_path))).hidden_size == 32
