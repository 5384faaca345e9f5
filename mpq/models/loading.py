"""The model in a checkpoint: its weights in the base format, on one device or spread over what there is."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.devices import check_device
from mpq.errors import MpqError, first_line, is_out_of_memory
from mpq.formats.format import get_format
from mpq.models.architecture import auto_class
from mpq.models.checkpoint import load_config
from mpq.models.dense import dense_tensors
from mpq.models.graph import build_on_meta
from mpq.models.layout import read_config, weight_files
from mpq.models.placement import bytes_of, cast_weights, check_accelerate, offload_folder, spread_of
from mpq.models.quantized import method_of, refuse_left_over, refuse_narrow

log = logging.getLogger("mpq")


def load_model(
    folder: Path,
    base: str,
    device: str = "cpu",
    trust_remote_code: bool = False,
    memory: int | None = None,
) -> nn.Module:
    """The model in its base format, in evaluation mode, without gradients on its parameters.

    Where the weights do not fit the device they are spread over what else there is (placement.py), which the log says;
    `memory` bytes may be taken beside GPUs, by default what is free. Quantized weights are read as the values that they
    stand for (dense.py). Raises MpqError for a device that is not there, weights that are quantized in a way that cannot be
    read, and weights that are damaged, missing or of the wrong shape: transformers would fill those with random numbers.
    """
    from transformers.utils import logging as hf_logging

    check_device(device)
    files = weight_files(folder)
    config = copy.deepcopy(load_config(folder, trust_remote_code))
    dtype = getattr(torch, get_format(base).dtype)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    build: Any = auto_class(config)
    if method_of(read_config(folder), folder):
        empty: Any = build_on_meta(config)
        tensors = dense_tensors(folder)
        for tied, of in empty.all_tied_weights_keys.items():  # those on disk are found by name
            tensors |= {tied: tensors[of]} if of in tensors else {}
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        build = type(empty)  # an automatic class asks for a folder
        needed = sum(p.numel() for p in empty.parameters()) * dtype.itemsize
        config = config if isinstance(config, build.config_class) else config.get_text_config()
    else:
        refuse_narrow(files, folder)
        needed = bytes_of(files, dtype)
    spread = spread_of(needed, device, memory)
    if spread:
        check_accelerate(spread.why)
        log.warning("%s does not fit %s: %s.", folder.name, device, spread.why)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "local_files_only": True,
        "output_loading_info": True,
        "trust_remote_code": trust_remote_code,
    }
    shown = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # what is spread has been told
    try:
        with offload_folder() if spread else nullcontext() as offloading:
            if spread and offloading:
                options |= {**spread.options, "offload_folder": offloading[0]}
            loaded: Any = build.from_pretrained(**source, **options)
            if offloading:
                offloading[1](loaded[0])
    except Exception as error:  # safetensors, json and torch each raise their own
        raise _unloadable(folder, base, config, error) from None
    finally:
        hf_logging.set_verbosity(shown)
    model: nn.Module = loaded[0]
    _check_loaded(folder, config, model, loaded[1])
    model.eval().requires_grad_(False)
    try:
        cast_weights(model, dtype)
        return model if spread else model.to(device)
    except (RuntimeError, MemoryError) as error:
        raise _unloadable(folder, base, config, error) from None


def _unloadable(folder: Path, base: str, config: Any, error: Exception) -> MpqError:
    """What kept the weights from being loaded: too little memory, an architecture without a head, or damage."""
    if is_out_of_memory(error):
        return MpqError(
            f"There is not enough memory for the weights in {folder} in {base}: use a machine or a GPU with more, or a narrower base format."
        )
    if "Unrecognized configuration class" in str(error):
        return MpqError(
            f"{folder} is a {config.model_type}, for which transformers has no causal language model: mpq measures the loss of the next token."
        )
    if isinstance(error, ImportError):
        return MpqError(f"The weights in {folder} cannot be loaded: {first_line(error)}.")
    return MpqError(
        f"The weights in {folder} cannot be loaded ({first_line(error)}): the checkpoint is damaged, fetch it again."
    )


def _check_loaded(folder: Path, config: Any, model: nn.Module, report: dict[str, Any]) -> None:
    left_over = sorted(report.get("unexpected_keys", ()))
    refuse_left_over(left_over, folder)
    wrong = sorted(
        [
            *report.get("missing_keys", ()),
            *(k[0] if isinstance(k, tuple) else k for k in report.get("mismatched_keys", ())),
        ]
    )
    built, made_as = type(model).__name__, list(config.architectures or ())
    if wrong and made_as and built not in made_as:
        raise MpqError(
            f"{folder} is a {made_as[0]}, which lacks {wrong[0]} of a {built}: mpq needs a causal language model with its head."
        )
    if wrong:
        raise MpqError(
            f"The weights in {folder} lack {wrong[0]} (or have it in another shape) that config.json asks for: fetch it again."
        )
    if left_over:
        log.warning(
            "%d tensors in %s have no place in %s and are left out, %s among them.",
            len(left_over),
            folder,
            built,
            left_over[0],
        )
