"""Hugging Face's layout of a checkpoint: config.json, safetensors, and the index that says which of them are its weights.

Everything here reads files that somebody handed in, and says in one sentence what is wrong with them.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mpq.errors import MpqError, first_line

INDEX = "model.safetensors.index.json"
OTHER_LAYOUTS = ["consolidated*"]  # the same weights once more, in their authors' own layout
# the files that say how text becomes tokens, chats included
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*.spm",
    "*.codes",
    "*.bpe",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
_MOST_LAYERS = 2048  # the deepest models have some hundred; each is traced


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises MpqError where the file cannot be read or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MpqError(
            f"{file} cannot be read ({error.strerror or first_line(error)}): check that it is a file and its permissions."
        ) from None
    except (ValueError, RecursionError):
        raise MpqError(f"{file} is not JSON: fetch the checkpoint again.") from None
    if not isinstance(found, dict):
        raise MpqError(
            f"{file} holds a JSON {type(found).__name__}, expected an object: fetch the checkpoint again."
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises MpqError where it is none, or asks for layers by the thousand."""
    config = read_json(folder / "config.json")
    made_as = config.get("architectures") or []
    if not (isinstance(made_as, list) and all(isinstance(name, str) for name in made_as)):
        raise MpqError(
            f"{folder / 'config.json'} has architectures = {made_as!r}: expected a list of class names."
        )
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key, value in part.items():
            if key in _LAYERS and isinstance(value, int) and value > _MOST_LAYERS:
                raise MpqError(
                    f"{folder / 'config.json'} has {key} = {value}: expected {_MOST_LAYERS} at most, to trace them in finite time."
                )
    return config


_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


def is_weight_name(name: str) -> bool:
    """Whether `name` is that of a weight file of this layout."""
    return name.endswith(".safetensors") and not any(
        fnmatch.fnmatch(name, pattern) for pattern in OTHER_LAYOUTS
    )


def listed_weights(folder: Path) -> list[str]:
    """The weight files that the index lists, in name order; none where there is no index.

    Raises MpqError for an index that is cut off, or lists what is no safetensors file beside it.
    """
    index = folder / INDEX
    if not index.exists():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MpqError(
            f"{index} has no weight_map of tensors to files: fetch the checkpoint again."
        )
    for name in weight_map.values():
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise MpqError(
                f"{index} lists {name!r}: expected names of .safetensors files in the same folder."
            )
    return sorted(set(weight_map.values()))


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order: those of its index, else model.safetensors.

    Raises MpqError where there are none, or a listed one is missing.
    """
    if listed := listed_weights(folder):
        if missing := [f for f in listed if not (folder / f).is_file()]:
            raise MpqError(
                f"{folder} lacks {missing[0]}, which its index lists: fetch the checkpoint again."
            )
        return [folder / f for f in listed]
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if whole.exists():
        raise MpqError(f"{whole} is no file: fetch the checkpoint again.")
    if (folder / "adapter_config.json").is_file():
        raise MpqError(
            f"{folder} holds an adapter, not a model: merge it into its base model and save that."
        )
    others = sorted(f.name for f in folder.glob("*.safetensors"))
    if others:
        raise MpqError(
            f"{folder} holds {others[0]} but neither model.safetensors nor {INDEX}: rename the variant that is meant, or save the model again with save_pretrained."
        )
    raise MpqError(
        f"{folder} has no *.safetensors: expected a checkpoint in Hugging Face layout (convert .bin weights first)."
    )


def opened(file: Path) -> Any:
    """A safetensors file, open. Raises MpqError where it is none."""
    try:
        return safe_open(file, "pt")
    except Exception as error:  # safetensors' own, and what the system says
        raise MpqError(
            f"{file} cannot be read as safetensors ({first_line(error)}): fetch the checkpoint again."
        ) from None
