"""`mpq init`: a spec to begin with, fitted to the model and this machine, each choice with its reason."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpq.cli.console import log, plain
from mpq.cli.options import AsJson, Model, Revision
from mpq.errors import MpqError, first_line

if TYPE_CHECKING:
    from mpq.cli.fit import Fit, Machine, Shape

# text of many kinds, and halves of it that share no document
_TEXTS = ("NeelNanda/pile-10k", "train[:50%]", "NeelNanda/pile-10k", "train[50%:]")


def init(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a file, URL or dataset id. If left out: calibration.txt beside the model, else a public dataset."
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text to evaluate plans on; the calibration's if left out.")
    ] = None,
    revision: Revision = None,
    json_: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; NAME.yaml of the model if left out.", metavar="FILE"),
    ] = None,
) -> None:
    """Write a spec for `mpq run`, with comments: formats that this machine runs, batches that fit it. Reads no weights."""
    name = re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2]).strip(".-") or "model"
    path = out or Path(f"{name}.yaml")
    _check_new(path)
    with log.status(plain(f"looking at {model}")):
        from mpq.cli.fit import fit, machine_here, shape_of
        from mpq.devices import resolve
        from mpq.models.checkpoint import load_config

        with config_of(model, revision) as folder:
            shape = shape_of(load_config(folder))
        machine = machine_here(resolve("auto"))
        chosen = fit(shape, machine)
    content = written(name, model, revision, _texts(model, text, held_out), shape, machine, chosen)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except OSError as error:
        raise MpqError(f"--out {path} cannot be written ({error.strerror}).") from None
    following = f"mpq run {shlex.quote(str(path))}"
    if json_:
        print(json.dumps({"spec": str(path), "next": following, "note": chosen.note}, indent=1))
        return
    if chosen.note:
        log.print("[yellow]note:[/]", plain(chosen.note), highlight=False)
    log.print(plain(f"wrote {path}; read it through, then:"), highlight=False, soft_wrap=True)
    print(following)


def _check_new(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise MpqError(f"--out {path}: expected a name that ends in .yaml.")
    if path.exists() or path.is_symlink():
        raise MpqError(f"{path} is there already: remove it, or give --out another name.")
    if not path.parent.is_dir():
        raise MpqError(f"--out {path} cannot be written: {path.parent} is no folder.")


@contextmanager
def config_of(model: str, revision: str | None) -> Iterator[Path]:
    """A folder with the checkpoint's config.json, fetched alone where it lies elsewhere.

    Raises MpqError where there is none.
    """
    local = Path(model).expanduser()
    if local.is_dir() or model.startswith((".", "/", "~")):
        if not (local / "config.json").is_file():
            what = "has no config.json" if local.is_dir() else "is no folder"
            raise MpqError(f"{model} {what}: expected a checkpoint in Hugging Face layout.")
        yield local
        return
    with tempfile.TemporaryDirectory() as aside:
        try:
            if "://" in model:
                import fsspec

                with fsspec.open(f"{model.rstrip('/')}/config.json", "rb") as stream:
                    (Path(aside) / "config.json").write_bytes(stream.read())
                folder = Path(aside)
            else:
                from huggingface_hub import hf_hub_download

                folder = Path(hf_hub_download(model, "config.json", revision=revision)).parent
        except Exception as error:  # each storage and the hub raise their own: it cannot be had
            raise MpqError(
                f"{model} is no local folder, and its config.json could not be fetched ({first_line(error)}): "
                "check the name, the network and the credentials."
            ) from None
        yield folder


def _texts(model: str, text: str | None, held_out: str | None) -> tuple[str, str, str, str]:
    """Sources and splits of the calibration and the held-out text; the latter empty where there is none of its own."""
    if text:
        return text, "", held_out or "", ""
    beside = Path(model).expanduser() / "calibration.txt"
    if beside.is_file():
        other = beside.with_name("heldout.txt")
        return str(beside), "", held_out or (str(other) if other.is_file() else ""), ""
    return (_TEXTS[0], _TEXTS[1], held_out, "") if held_out else _TEXTS


def written(
    name: str,
    model: str,
    revision: str | None,
    texts: tuple[str, str, str, str],
    shape: Shape,
    machine: Machine,
    chosen: Fit,
) -> str:
    """The spec's text, checked. Raises MpqError where a name in it is none that a spec may hold."""
    import yaml

    from mpq.spec import parse_spec

    def value(text: object) -> str:
        """A scalar as YAML writes it in one line, quoted where it must be."""
        listed = yaml.safe_dump([text], default_flow_style=True, width=10**6, allow_unicode=True)
        return listed[1:-2]

    source, split, other, other_split = texts
    batch, length = chosen.prefill
    timed = f"  # et, measured time, is left out: {machine.device} runs nothing narrower than {chosen.base} natively\n"
    if chosen.timed:
        timed = f"""\
  et: # measured time, in what {machine.device} runs natively
    formats: [{", ".join(chosen.timed)}]
"""
    theoretical = ("fp8_e4m3",) if chosen.base in ("bf16", "fp16") else ("bf16", "fp8_e4m3")
    held_out = "# evaluation: {source: other-text.jsonl} # held-out text; without it plans are measured on the calibration's\n"
    if other:
        held_out = f"""\
evaluation: # plans are measured on text that they were not made on
  source: {value(other)}
{f"  split: {value(other_split)}" + chr(10) if other_split else ""}  samples: {max(8, chosen.samples // 2)}
  length: {chosen.length}
  batch: {chosen.batch}
  seeds: 3 # plans are measured under this many perturbations of the scales
"""
    content = f"""\
# A run of mpq, fitted to {ascii(model)[1:-1]} and this machine by `mpq init`. Every key: docs/spec.md
name: {value(name)} # plans and report go to .work/runs/ under this name
model:
  path: {value(model)} # {shape.parameters / 1e6:,.4g} M parameters
{f"  revision: {value(revision)}" + chr(10) if revision else ""}  base: {chosen.base} # what the model runs in where nothing is lowered; its weights take {_gigabytes(shape.parameters, chosen.base)}
  device: auto # here: {machine.device}, {machine.memory / 1e9:.3g} GB
calibration:
  source: {value(source)} # better: text like what you serve, as .txt, .jsonl, .npy tokens or a dataset id
{f"  split: {value(split)}" + chr(10) if split else ""}  samples: {chosen.samples} # blocks of text; more make the predicted error surer
  length: {chosen.length} # tokens per block
  batch: {chosen.batch} # blocks per pass; lower it where memory runs out
  checkpoint_activations: {str(chosen.checkpoint_activations).lower()} # recompute activations: slower, in less memory
{held_out}timing:
  batch: {batch} # rows and tokens of the prompt whose time to first token counts: make them your own
  length: {length}
objectives: # a plan is made for each of these and for each bound below; remove what you do not need
{timed}  tt: # multiply-accumulates, by the formats' theoretical speed: any format
    formats: [{", ".join(theoretical)}]
  m: # memory of the weights: any format
    formats: [fp8_e4m3, int8]
bound: # how much worse than base a plan may be: predicted, measured on held-out text before it is delivered, and solved again
  perplexity: [{", ".join(f"{100 * x:g} %" for x in chosen.perplexity)}] # or kl: 0.005, nats per token; a plan is made for each
store: .work/store # what is measured is kept here and re-used: a folder, or a URL such as s3://bucket/mpq
out: .work/runs
"""
    parse_spec(yaml.safe_load(content), "mpq init")
    return content


def _gigabytes(parameters: int, base: str) -> str:
    from mpq.formats.format import get_format

    return f"{parameters * get_format(base).bytes / 1e9:.3g} GB"
