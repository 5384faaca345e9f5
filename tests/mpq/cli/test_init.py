"""`mpq init`: a spec that fits model and machine, and that `mpq run` takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import walk
import yaml
from small import DEMO, small_config
from typer.testing import CliRunner

from mpq.cli.fit import Machine, Shape, fit, shape_of
from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.spec import check_early, load_spec

CPU = ("fp32", "bf16", "int8")
AMPERE = ("fp32", "fp16", "bf16", "int8")
HOPPER = (*AMPERE, "fp8_e4m3", "fp8_e5m2", "fp8_block")
LLAMA_1B = Shape(1_235_814_400, "bf16", 16, 2048, 128256, 131072)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_spec_for_the_demo(here: Path) -> None:
    """The demo's folder has text beside it: the spec is complete, passes the early checks, and is not overwritten."""
    done = CliRunner().invoke(app, ["init", str(DEMO)])
    assert done.exit_code == 0, done.output
    assert done.stdout == "mpq run demo.yaml\n"
    spec = load_spec("demo.yaml")
    check_early(spec)
    assert spec.model.path == str(DEMO)
    assert spec.evaluation is not None
    assert spec.evaluation.source.endswith("heldout.txt")
    assert "int8" in spec.objectives["et"].formats
    assert spec.bound is not None
    assert all(limit.kl and limit.tau is None for limit in spec.limits("m"))
    written = Path("demo.yaml").read_text()
    again = CliRunner().invoke(app, ["init", str(DEMO)])
    assert isinstance(again.exception, MpqError)
    assert "demo.yaml is there already" in str(again.exception)
    assert Path("demo.yaml").read_text() == written


def test_no_weights_are_read(here: Path) -> None:
    """A folder with a configuration alone is enough; text is the user's, whatever its name; --json says what is next."""
    folder = here / "a model: [x]"
    small_config("llama").save_pretrained(folder)
    text = here / "text: #1.txt"
    text.write_text("words " * 10_000)
    done = CliRunner().invoke(
        app, ["init", str(folder), "--text", str(text), "--out", "new.yaml", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["next"] == "mpq run new.yaml"
    spec = load_spec("new.yaml")
    assert (spec.model.path, spec.calibration.source) == (str(folder), str(text))
    assert spec.calibration.length == 64, "no longer than the model's positions"
    assert spec.evaluation is None


def test_a_url(here: Path) -> None:
    """A checkpoint on a URL: its config.json is fetched and nothing else, of which there is nothing."""
    (here / "far").mkdir()
    shutil.copy(DEMO / "config.json", here / "far")
    url = (here / "far").as_uri()
    done = CliRunner().invoke(app, ["init", url, "--out", "far.yaml"])
    assert done.exit_code == 0, done.output
    spec = load_spec("far.yaml")
    assert (spec.model.path, spec.name) == (url, "far")
    assert spec.evaluation is not None, "two halves of a public dataset"
    assert spec.calibration.split != spec.evaluation.split


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nope"], "./nope is no folder"),
        ([".", "--out", "m.yaml"], "has no config.json"),
        ([str(DEMO), "--out", "x.txt"], "expected a name that ends in .yaml"),
        ([str(DEMO), "--out", "no/such/x.yaml"], "no/such is no folder"),
        (["memory://nothing"], "could not be fetched"),
    ],
)
def test_mistakes(arguments: list[str], words: str, here: Path) -> None:
    """One sentence, and nothing is written."""
    done = CliRunner().invoke(app, ["init", *arguments])
    assert isinstance(done.exception, MpqError)
    assert words in str(done.exception)
    assert not list(here.glob("*"))


def test_what_fits() -> None:
    """By hand: an H100 holds Llama-3.2-1B in full batches; 4 GB of GPU do not hold its backward pass without recomputing."""
    large = fit(LLAMA_1B, Machine("cuda:0", 80 * 10**9, HOPPER))
    assert (large.base, large.timed) == ("bf16", ("fp8_e4m3",))
    assert fit(LLAMA_1B, Machine("cuda:0", 80 * 10**9, AMPERE)).timed == ("int8",)
    assert (large.batch, large.checkpoint_activations, large.note) == (8, False, "")
    small = fit(LLAMA_1B, Machine("cuda:0", 4 * 10**9, HOPPER))
    assert (small.batch, small.checkpoint_activations, small.note) == (1, True, "")
    none = fit(LLAMA_1B, Machine("cuda:0", 2 * 10**9, HOPPER))
    assert "2.47 GB in bf16" in none.note


def test_a_gpu_without_bf16_gets_fp16() -> None:
    """A Turing GPU has FP16 alone: that is the base, and nothing native is narrower."""
    chosen = fit(LLAMA_1B, Machine("cuda:0", 16 * 10**9, ("fp32", "fp16")))
    assert (chosen.base, chosen.timed) == ("fp16", ())


def test_a_cpu_gets_what_it_can_do_in_minutes() -> None:
    """A larger model is calibrated on fewer blocks and timed on one row; FP32 weights may go to BF16 and INT8."""
    wide = Shape(5_000_000, "fp32", 4, 256, 4096, 512)
    small = fit(wide, Machine("cpu", 8 * 10**9, CPU))
    large = fit(LLAMA_1B, Machine("cpu", 64 * 10**9, CPU))
    assert small.timed == ("bf16", "int8")
    assert small.samples > large.samples >= 8
    assert (small.prefill, large.prefill) == ((4, 256), (1, 256))


def test_shape_of_a_configuration() -> None:
    """Parameters as counted by hand for a tiny tied Llama: embedding, two layers of attention, MLP and norms, a last norm."""
    config = small_config("llama", num_key_value_heads=2, tie_word_embeddings=True)
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert shape_of(config).parameters == 97 * 32 + 2 * layer + 32


def test_configurations_without_such_a_shape(here: Path) -> None:
    """Sizes that an architecture does not say, or says as none, and several texts in one: a sentence, or a spec all the same."""
    walk.tiny("xlnet").save_pretrained(here / "xlnet")  # -1: as many positions as are asked for
    assert "length: 256" in written(here / "xlnet")
    for name, told in (
        ("blt", "does not say its num_hidden_layers"),
        ("musicgen", "Multiple valid"),
    ):
        walk.tiny(name).save_pretrained(here / name)
        with pytest.raises(MpqError, match=told):
            written(here / name)


def written(folder: Path) -> str:
    """The spec that `mpq init` writes for a checkpoint."""
    done = CliRunner().invoke(app, ["init", str(folder), "--out", f"{folder}.yaml"])
    if isinstance(done.exception, Exception):
        raise done.exception
    return Path(f"{folder}.yaml").read_text()


def test_a_written_spec_is_yaml_of_one_reading(here: Path) -> None:
    """Any YAML reader finds the same keys: names with colons, hashes and brackets are quoted."""
    small_config("llama").save_pretrained(here / "m")
    done = CliRunner().invoke(app, ["init", "./m", "--text", "- a: #b", "--out", "x.yaml"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(Path("x.yaml").read_text())["calibration"]["source"] == "- a: #b"
