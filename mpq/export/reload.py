"""A fresh process that loads an exported checkpoint in transformers, as any user would, and says what it found.

`python -m mpq.export.reload REQUEST.json`: log-probabilities of the tokens asked for go to a .npy file, and what the
loaded model is made of to the answer: formats by module, and weights compared with mpq's own rounding of the source.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.errors import first_line
from mpq.export import torchao
from mpq.export.cache import differing_scales, excepting, is_scale
from mpq.export.codes import tensors_of
from mpq.export.scheme import without_experts
from mpq.export.skeleton import parts_of, skeleton
from mpq.formats.format import Format, get_format
from mpq.formats.quantize import fake_quantize, share_of
from mpq.formats.scheme import get_scheme
from mpq.models.architecture import auto_class
from mpq.models.dense import dense_tensors, tensors_by_file
from mpq.models.experts import ExpertProduct, dispatched, intercept_experts, products_of
from mpq.models.graph import build_on_meta
from mpq.models.loading import load_model
from mpq.running.experts import RoundedInput
from mpq.serving.schemes import stored_as

# transformers keeps scales in the base dtype: half a unit in the last place of it, relative
PRECISION = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}


_EXPERT = re.compile(r"[.]experts[.]\d+[.]")  # in the name of one expert's weight


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T − 1, V) FP32: log-probabilities of what follows each token but the last."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).cpu()


def loaded_model(
    folder: Path, base: str, trust_remote_code: bool = False, decode_experts: bool = False
) -> nn.Module:
    """The exported model as transformers loads it; with `decode_experts` those are handed to it as values, decoded by
    compressed-tensors. Raises ValueError where a tensor is missing or has no place."""
    from transformers import AutoConfig

    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    dtype = getattr(torch, get_format(base).dtype)
    config: Any = AutoConfig.from_pretrained(folder, **how)
    build: Any = auto_class(config)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    section = getattr(config, "quantization_config", None) or {}
    if section.get("quant_method") == "mxfp4":  # as values, also where its kernels are installed
        source["config"] = config
        config.quantization_config = {**section, "dequantize": True}
    if decode_experts:
        source = {"pretrained_model_name_or_path": None}
        model: Any = build_on_meta(config)
        build, tensors = type(model), dense_tensors(folder, dtype, _EXPERT.search)
        source["state_dict"] = (
            _stacked(tensors, model) if skeleton(config).in_vllm_alone else tensors
        )
        config.quantization_config = without_experts(config.quantization_config)
        if not config.quantization_config:
            del config.quantization_config
        source["config"] = config
    loaded: Any = build.from_pretrained(**source, **how, dtype=dtype, output_loading_info=True)
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # a cache's scale has no place, or is missing, where transformers knows no cache, or the file has none
        if keys := [str(key) for key in report.get(kind) or () if not is_scale(str(key))]:
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(keys)[:300]}")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _stacked(tensors: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Experts one by one, as the model has them: of some models transformers knows no names for single ones."""
    for owner, module in model.named_modules():
        for product in products_of(module) if dispatched(module) else ():
            every = range(getattr(module, product).shape[0])
            each = [[f"{owner}.{e}.{part}.weight" for part in parts_of(product)] for e in every]
            if each[0][0] in tensors:
                whole = [torch.cat([tensors.pop(name)[...] for name in of]) for of in each]
                tensors[f"{owner}.{product}"] = torch.stack(whole)
    return tensors


@contextmanager
def rounding_experts(model: nn.Module, formats: Mapping[str, str]) -> Iterator[None]:
    """Within, the activations of lowered experts are rounded as engines round them: transformers leaves them as they are."""
    products: dict[str, dict[str, ExpertProduct]] = defaultdict(dict)
    for op, name in formats.items():
        owner, _, product = op.rpartition(".")
        module = model.get_submodule(owner)
        if dispatched(module) and product in products_of(module):
            products[owner][product] = RoundedInput(module, product, get_scheme(name))
    with intercept_experts(model, products):
        yield


def differing(
    model: nn.Module,
    source: Path,
    names: Mapping[str, tuple[str, str]],
    formats: Mapping[str, str],
    base: str,
) -> list[str]:
    """What of a loaded model, before its first pass, is not as the plan has it, a line each.

    Every linear must have the plan's scheme, or none in base, and hold the codes and scales that the source's weight
    rounds to, or that weight itself; `names` says where it lies in the source: (file, tensor).
    """
    dtype, wrong = getattr(torch, get_format(base).dtype), []
    files = dict(tensors_by_file(source))
    for op, module in model.named_modules():
        wrong += _of_scheme(op, module, formats.get(op), base)
        if op not in names or wrong:
            continue
        file, tensor = names[op]
        weight = files[file][tensor][...].to(dtype)
        if op not in formats:
            wrong += _other({"weight": weight}, module, op, base)
            continue
        share = getattr(module, "weight_global_scale", None)
        scheme = get_scheme(formats[op])
        share = None if share is None else float(share)
        if share is not None and share > share_of(weight, scheme.weights) * (1 + 1e-6):
            wrong.append(f"the weight of {op} overflows its blocks' scales")
        want = tensors_of(weight, scheme, dtype, op, share)
        wrong += _other(want, module, op, base)
    return wrong


def differing_values(
    model: nn.Module,
    source: Path,
    names: Mapping[str, tuple[str, str]],
    formats: Mapping[str, str],
    base: str,
) -> list[str]:
    """What of a model whose weights were read as values is not as the plan has it: each linear's must be the source's, after its
    round trip through the op's format, bit for bit."""
    dtype, files = getattr(torch, get_format(base).dtype), dict(tensors_by_file(source))
    linears = {op for op, _ in model.named_modules()} & set(formats)
    wrong = [f"the file holds no {op}" for op in sorted(linears) if op not in names]
    for op, (file, tensor) in names.items():
        want = files[file][tensor][...].to(dtype)
        if op in formats:
            want = fake_quantize(want, get_scheme(formats[op]).weights, "row")
        if not torch.equal(model.get_submodule(op).get_parameter("weight").cpu(), want):
            wrong.append(f"the weight of {op} is another")
    return wrong


@contextmanager
def rounding_inputs(model: nn.Module, formats: Mapping[str, str]) -> Iterator[None]:
    """Within, what goes into each lowered linear, and into experts, is rounded as its scheme rounds activations."""
    modules = dict(model.named_modules())

    def rounds(fmt: Format) -> Callable[..., Tensor]:
        return lambda module, inputs: fake_quantize(inputs[0], fmt, "row")

    handles = [
        modules[op].register_forward_pre_hook(rounds(fmt))
        for op, name in formats.items()
        if op in modules and (fmt := get_scheme(name).activations) is not None
    ]
    try:
        with rounding_experts(model, formats):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _of_scheme(op: str, module: nn.Module, name: str | None, base: str) -> list[str]:
    """What is wrong about how a module is quantized, which should be `name`, or nothing in base."""
    scheme = getattr(module, "quantization_scheme", None)
    found = getattr(scheme, "weights", None)
    stored = getattr(getattr(scheme, "format", None), "value", getattr(scheme, "format", None))
    if name is None:
        return [f"{op} is in {stored}, not in {base}"] if found else []
    want = get_scheme(name)
    bits, rounds = getattr(found, "num_bits", 0), getattr(scheme, "input_activations", None)
    same = stored == stored_as(want) and bits == want.weights.bits
    if same and (rounds is not None) == (want.activations is not None):
        return []
    return [f"{op} is in {stored or 'base'} of {bits} bits, not in {name}"]


def _other(want: Mapping[str, Tensor], module: nn.Module, op: str, base: str) -> list[str]:
    """Which of a module's tensors are not the wanted ones."""
    wrong = []
    for name, tensor in want.items():
        have = getattr(module, name, None)
        if have is None or have.shape != tensor.shape:
            wrong.append(f"{op} has no {name} of {tuple(tensor.shape)}")
        elif name == "weight_scale" and tensor.dtype != torch.uint8:
            off = (have.float() - tensor.float()).abs() > PRECISION[base] * tensor.float().abs()
            wrong += [f"the scales of {op} are others"] if bool(off.any()) else []
        elif not bool((have.float() == tensor.float()).all()):
            wrong.append(f"the {name.replace('_', ' ')} of {op} is another")
    return wrong


def main(request: Path) -> None:
    """Answer a request; what goes wrong is an answer, too."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    asked = json.loads(request.read_text(encoding="utf-8"))
    answer: dict[str, Any] = {}
    try:
        how = {name: asked[name] for name in ("trust_remote_code", "decode_experts")}
        folder, compared, rounding = Path(asked["folder"]), differing, rounding_experts
        if asked["reading"] == "values":
            trusted = asked["trust_remote_code"]
            model = load_model(folder, asked["base"], trust_remote_code=trusted)
            compared, rounding = differing_values, rounding_inputs
        else:
            model = loaded_model(folder, asked["base"], **how)
        if asked["reading"] == "torchao":
            compared = torchao.differing
        tokens = torch.from_numpy(np.load(asked["tokens"]))
        answer["differing"] = compared(
            model, Path(asked["source"]), asked["names"], asked["formats"], asked["base"]
        )
        answer["differing"] += differing_scales(model, asked["scales"])
        answer["caches_unread"] = excepting(model, asked["caches"])
        held = None
        with torch.inference_mode(), rounding(model, asked["formats"]):
            for at in range(0, len(tokens), asked["batch"]):
                found = log_probabilities(model, tokens[at : at + asked["batch"]]).numpy()
                if held is None:
                    shape = (len(tokens), *found.shape[1:])
                    held = np.lib.format.open_memmap(
                        asked["out"], mode="w+", dtype=np.float32, shape=shape
                    )
                held[at : at + len(found)] = found
        del held
    except Exception as error:  # whatever transformers or compressed-tensors raise over the folder
        answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
    Path(asked["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
