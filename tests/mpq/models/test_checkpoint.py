"""Checkpoints that people hand in: quantized, exchanged, damaged, not language models, or with code of their own."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import small_config, small_model
from transformers import AutoModelForSequenceClassification

from mpq.errors import MpqError
from mpq.models.checkpoint import (
    check_unchanged,
    fetch,
    fingerprint,
    load_config,
    marks,
)
from mpq.models.dense import dense_tensors
from mpq.models.graph import trace
from mpq.models.layout import INDEX, weight_files
from mpq.models.loading import load_model
from mpq.models.text import load_tokenizer, read_blocks
from mpq.spec import TextSpec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    small_model("llama", num_key_value_heads=2).save_pretrained(folder)
    np.save(folder / "t.npy", np.arange(8))
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "m"))


def _configure(folder: Path, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def _change(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Write the weights again, each as what `change` makes of its name and tensor."""
    file = folder / "model.safetensors"
    tensors = {k: v for name, t in load_file(file).items() for k, v in change(name, t).items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"quantization_config": {"quant_method": "torchao"}}, "by torchao"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "by bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "by bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "in a way that is not named"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "by MLX"),
    ],
)
def test_quantized_checkpoints_are_called_by_name(
    more: dict[str, Any], said: str, checkpoint: Path
) -> None:
    """What quantized the weights is said before anything is traced or loaded; it is no damage."""
    _configure(checkpoint, **more)
    with pytest.raises(MpqError, match=f"quantized already, {said}") as told:
        load_config(checkpoint)
    assert "damaged" not in str(told.value)


def _fp8(name: str, weight: torch.Tensor, scale_name: str = "_scale") -> dict[str, torch.Tensor]:
    if "_proj" not in name:
        return {name: weight}
    scale = (weight.abs().max() / 448).float()
    return {
        name: (weight / scale).to(torch.float8_e4m3fn),
        name + scale_name: scale.reshape(1, 1),
    }


def test_weights_without_their_scales_are_refused(checkpoint: Path) -> None:
    """E4M3 weights whose scales nobody would apply are refused; they are read once hf_quant_config.json says what they are."""
    wanted = load_model(checkpoint, "fp32").get_parameter("model.layers.0.mlp.up_proj.weight")
    _change(checkpoint, _fp8)
    with pytest.raises(MpqError, match=r"quantized already, .* is stored as F8_E4M3"):
        load_model(checkpoint, "fp32")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (checkpoint / "hf_quant_config.json").write_text(json.dumps(said))
    found = load_model(checkpoint, "fp32").get_parameter("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(found, wanted, rtol=2**-4, atol=1e-2)


def test_scales_without_a_place_are_noticed(checkpoint: Path) -> None:
    """A scale that the loader leaves over is no detail, whatever dtype its weight is stored in."""
    _change(checkpoint, lambda name, t: {n: v.float() for n, v in _fp8(name, t).items()})
    with pytest.raises(MpqError, match=r"quantized already, as .*weight_scale"):
        load_model(checkpoint, "fp32")


def test_other_tensors_without_a_place_are_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Anything else that is left over is told, and the model is loaded."""
    _change(checkpoint, lambda name, t: {name: t, f"tower.{name}": t.clone()})
    load_model(checkpoint, "fp32")
    assert "have no place in LlamaForCausalLM" in caplog.text


def test_classifiers_are_called_so(tmp_path: Path) -> None:
    """A classifier has no language model's head: fetching it again would not give it one."""
    config = small_config("llama", num_key_value_heads=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(MpqError, match="is a LlamaForSequenceClassification, which lacks lm_head"):
        load_model(tmp_path, "fp32")


def test_other_names_of_weights_are_told(checkpoint: Path) -> None:
    """A variant's file and an adapter are called what they are; weights in another layout beside are not the model's."""
    weights = checkpoint / "model.safetensors"
    shutil.copy(weights, checkpoint / "consolidated.safetensors")
    assert weight_files(checkpoint) == [weights]
    (checkpoint / "consolidated.safetensors").unlink()
    weights.rename(checkpoint / "model.fp16.safetensors")
    with pytest.raises(MpqError, match=r"model\.fp16\.safetensors but neither"):
        load_model(checkpoint, "fp32")
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(MpqError, match="an adapter, not a model"):
        load_model(checkpoint, "fp32")


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    """A file in the folder's place is told so: the hub does not know it, and the network is not to blame."""
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(MpqError, match="is a file: expected the folder"):
            fetch(str(checkpoint / name))


def test_a_full_disk_is_no_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what the hub sends does not fit, neither name nor network nor token is to be looked at."""

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(MpqError, match="the disk is full; make room") as told:
        fetch("org/name")
    assert "HF_TOKEN" not in str(told.value)


def test_too_little_memory_is_no_damage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ran out, fetching the checkpoint again is no advice."""

    def full(*args: object, **more: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(MpqError, match="not enough memory") as told:
        load_model(checkpoint, "fp32")
    assert "damaged" not in str(told.value)


@pytest.mark.parametrize("known", [True, False])
def test_a_checkpoints_own_code_does_not_run(
    known: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No code of a checkpoint runs and nobody is asked; where transformers knows the architecture its own code does."""
    ran = checkpoint / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig\nclass Own(LlamaConfig): pass\n"
    (checkpoint / "own.py").write_text(code)
    mapped = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
        "AutoTokenizer": "own.Own",
    }
    _configure(checkpoint, auto_map=mapped, **({} if known else {"model_type": "own"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    if known:
        trace(load_config(checkpoint))
        load_model(checkpoint, "fp32")
    else:
        with pytest.raises(MpqError, match="trust_remote_code"):
            load_config(checkpoint)
    with pytest.raises(MpqError, match="no tokenizer"):
        load_tokenizer(checkpoint)
    assert not ran.exists()


def test_code_is_part_of_the_fingerprint(checkpoint: Path) -> None:
    """Code that a configuration names is content: changed, the checkpoint is another."""
    (checkpoint / "own.py").write_text("one")
    before = fingerprint(checkpoint)
    _configure(checkpoint, auto_map={"AutoConfig": "own.Own"})
    named = fingerprint(checkpoint)
    (checkpoint / "own.py").write_text("two")
    assert len({before, named, fingerprint(checkpoint)}) == 3


def test_an_exchange_is_noticed(checkpoint: Path) -> None:
    """Marks stay while the files do, and change with another content of the same size."""
    before = marks(checkpoint)
    (checkpoint / "README.md").write_text("a page beside it")
    check_unchanged(checkpoint, before)
    new = checkpoint / "new"
    new.write_bytes((checkpoint / "model.safetensors").read_bytes()[::-1])
    new.rename(checkpoint / "model.safetensors")
    with pytest.raises(MpqError, match="changed while they were read"):
        check_unchanged(checkpoint, before)


def test_a_damaged_copy_is_fetched_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that was cut, or changed at the same size, is not taken for the checkpoint; other layouts are not fetched."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for file in made.iterdir():
        memory.pipe_file(f"/kept/m/{file.name}", file.read_bytes())
    memory.pipe_file("/kept/m/consolidated.safetensors", b"other")
    folder = fetch("memory://kept/m")
    assert not (folder / "consolidated.safetensors").exists()
    whole = (made / "model.safetensors").read_bytes()
    for damaged in (whole[:-9], whole[:-9] + bytes(9)):
        (folder / "model.safetensors").write_bytes(damaged)
        assert fingerprint(fetch("memory://kept/m")) == fingerprint(made)


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
@pytest.mark.parametrize("indexed", [True, False])
def test_the_hub_gives_what_the_index_lists(
    name: str, indexed: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository that keeps its weights three times over, once is fetched; ids of one part are ids."""
    weights = ["a.safetensors", "b.safetensors"]
    files = ["config.json", "original/a.safetensors", "consolidated.00.safetensors", *weights]
    fetched: set[str] = set()

    def snapshot_download(repository: str, **asked: Any) -> str:
        assert repository == name
        patterns = {k: asked[k] for k in ("allow_patterns", "ignore_patterns")}
        every = [*files, *([INDEX] if indexed else [])]
        fetched.update(taken := list(filter_repo_objects(every, **patterns)))
        if "config.json" in taken:
            shutil.copy(made / "config.json", tmp_path)
        if INDEX in taken:
            listed = {"weight_map": {"x": "b.safetensors"}}
            (tmp_path / INDEX).write_text(json.dumps(listed))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetch(name)
    assert {f for f in fetched if f.endswith(".safetensors")} == set(
        weights[1:] if indexed else weights
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"weight_map": {"a": "mod',
        "{}",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "../m/model.safetensors"}}',
        '{"weight_map": {"a": "sub/model.safetensors"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
    ],
)
def test_a_wrong_index_is_told(content: str, checkpoint: Path) -> None:
    """An index that is cut off, has no weight_map, or points elsewhere is one sentence, and nothing is followed."""
    (checkpoint / INDEX).write_text(content)
    for use in (fingerprint, lambda folder: load_model(folder, "fp32")):
        with pytest.raises(MpqError, match=r"^[^\n]*index[^\n]*\.$"):
            use(checkpoint)


def test_weights_that_cannot_be_opened_are_told(checkpoint: Path) -> None:
    """A folder, or a link to nothing, in place of the weights is one sentence."""
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()
    for use in (fingerprint, lambda folder: load_model(folder, "fp32")):
        with pytest.raises(MpqError, match="is no file"):
            use(checkpoint)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
BESIDE = (
    "quantization_config",
    "auto_map",
    "text_config",
    "sliding_window",
    "layer_types",
    "rope_scaling",
    "vision_config",
)
SMALL_NUMBERS = st.integers(-3, 64)


def _told(use: Callable[[Path], Any], folder: Path) -> str:
    """The sentence that using a checkpoint ends in, if it does."""
    try:
        use(folder)
    except MpqError as told:
        return str(told)
    return "It is read."


def _load(folder: Path) -> None:
    fingerprint(folder)
    load_model(folder, "fp32")


def _begin(folder: Path) -> None:
    config = load_config(folder)
    read_blocks(TextSpec(source=str(folder / "t.npy"), samples=1, length=4), folder, 97)
    trace(config, length=4)


def _is_sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draw=st.data(), value=JSON | SMALL_NUMBERS)
def test_any_value_in_a_config_is_read_or_told(
    draw: st.DataObject, value: Any, made: Path, tmp_path: Path
) -> None:
    """A value of any type under any key of config.json is read, or one sentence, by whatever reads a checkpoint first."""
    folder = Path(shutil.copytree(made, tmp_path / "m", dirs_exist_ok=True))
    keys = (*json.loads((folder / "config.json").read_text()), *BESIDE)
    _configure(folder, **{draw.draw(st.sampled_from(keys)): value})
    assert _is_sentence(_told(_load, folder))
    assert _is_sentence(_told(_begin, folder))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in FP8, a scale a tensor, that each method of READABLE may be said of."""
    folder = tmp_path_factory.mktemp("quantized")
    small_model("llama", num_key_value_heads=2).save_pretrained(folder)
    _change(folder, lambda name, t: _fp8(name, t, "_scale_inv"))
    return folder


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
SAID: dict[str, dict[str, Any]] = {
    "fp8": {"weight_block_size": [128, 128]},
    "gptq": {"bits": 4, "group_size": 128, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "version": "gemm"},
    "modelopt": {"quant_algo": "FP8", "weight_block_size": None},
    "compressed-tensors": {
        "format": "float-quantized",
        "config_groups": {"group_0": GROUP},
        "sparsity_config": {},
        "transform_config": {},
    },
}


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draw=st.data(), value=JSON | SMALL_NUMBERS | st.lists(SMALL_NUMBERS, max_size=3))
def test_any_word_of_a_quantization_is_read_or_told(
    draw: st.DataObject, value: Any, quantized: Path, tmp_path: Path
) -> None:
    """What a checkpoint says of how it is quantized, one value of it of any type: values, or one sentence."""
    folder = Path(shutil.copytree(quantized, tmp_path / "m", dirs_exist_ok=True))
    method = draw.draw(st.sampled_from(list(SAID)))
    said = {"quant_method": method, **SAID[method]}
    key = draw.draw(st.sampled_from(list(said)))
    _configure(folder, quantization_config={**said, key: value})
    assert _is_sentence(_told(lambda of: (load_config(of), list(dense_tensors(of))), folder))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["config.json", INDEX, "model.safetensors", "tokenizer.json"]),
    content=st.one_of(
        st.binary(max_size=40),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.sampled_from([b"", b"[" * 20000, b"\xff" * 8 + b"{}", b"{" * 8]),
        st.integers(0, 600).map(lambda kept: kept),
    ),
)
def test_any_file_of_a_checkpoint_is_read_or_told(
    name: str, content: bytes | int, made: Path, tmp_path: Path
) -> None:
    """Files of other content, or cut off anywhere, are one sentence at worst."""
    folder = Path(shutil.copytree(made, tmp_path / "m", dirs_exist_ok=True))
    (folder / INDEX).unlink(missing_ok=True)
    file = folder / name
    if isinstance(content, int):
        content = file.read_bytes()[:content] if file.exists() else b"{"
    file.write_bytes(content)
    assert _is_sentence(_told(_load, folder))
    assert _is_sentence(_told(load_tokenizer, folder))
    file.unlink()


def test_what_a_checkpoint_is_needs_no_torch() -> None:
    """Fetching, fingerprint and marks load neither torch nor transformers: a run whose stages are all there waits for less."""
    code = (
        "import sys, mpq.models.checkpoint\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
