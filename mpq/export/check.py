"""Whether an exported checkpoint is the plan: loaded by a fresh process in transformers, beside
mpq's own run of the plan.

Asked of the loaded model:

- every linear has the plan's format and holds the codes that mpq rounds to, bit for bit, with
  their scales (in a 16-bit base within half a unit of its last place: transformers casts them to
  the base, engines do not);
- KL(plan ‖ loaded), per token, is at most that between two runs of mpq whose scales are drawn anew,
  which is what another rounding of the same formats does, and three standard errors of it (a token
  that goes to another expert weighs much); or a floor for the base's own arithmetic.
  (compressed-tensors divides INT8 activations by amax / 127.5, engines and mpq by amax / 127: other
  rounding points, of the same noise);
- the mean loss moves by no more than chance lets such a KL move it: 4 √(2 KL / n) for n tokens, and
  the floor.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.export.cache import Caches
from mpq.export.layout import Reading
from mpq.export.reload import log_probabilities
from mpq.formats.scheme import of_cache
from mpq.models.blocks import Blocks
from mpq.models.placement import device_of
from mpq.running.apply import Mixed

BATCH = 2
DRAWS = (0, 1)  # seeds of the runs that tell what rounding noise is
FLOOR = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 1e-5}  # nats: the same sums in another order


@dataclass(frozen=True)
class Check:
    """What a reloaded checkpoint does to held-out text (nats per token), and what it may do at
    most.

    `caches_unread` are attentions whose cache transformers leaves in base: what is compared has it
    so. KL is from the first model's distribution to the second's: base → plan, base → reloaded,
    plan → reloaded; `kl_noise` is that between runs of the plan with other scales.
    """

    tokens: int
    loss_base: float
    loss_plan: float
    loss_reloaded: float
    kl_base_plan: float
    kl_base_reloaded: float
    kl_plan_reloaded: float
    kl_noise: float
    kl_tolerance: float
    loss_tolerance: float
    differing: tuple[str, ...] = ()
    caches_unread: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the reloaded checkpoint is the plan, within rounding noise."""
        moved = abs(self.loss_reloaded - self.loss_plan)
        return (
            not self.differing
            and self.kl_plan_reloaded <= self.kl_tolerance
            and moved <= self.loss_tolerance
        )

    def as_json(self) -> dict[str, Any]:
        """The numbers, and whether they are within the tolerances."""
        return {"done": True, "passed": self.passed, **asdict(self)}


def reloaded(request: Mapping[str, Any], work: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Have a fresh process load the folder: its log-probabilities, where it differs from the plan,
    and the attentions whose cache transformers does not round.

    Raises MpqError where it cannot be loaded or run.
    """
    out, answer, asked = work / "found.npy", work / "answer.json", work / "request.json"
    asked.write_text(
        json.dumps({**request, "out": str(out), "answer": str(answer)}), encoding="utf-8"
    )
    command = [sys.executable, "-m", "mpq.export.reload", str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not answer.is_file():
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MpqError(
            f"The process that was to reload the export ended without an answer ({said}): give it more memory, or --no-check."
        )
    found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise MpqError(f"transformers cannot load the export ({found['error']}).")
    return np.load(out, mmap_mode="r"), found["differing"], found["caches_unread"]


def compare(
    model: nn.Module,
    formats: Mapping[str, str],
    base: str,
    blocks: Blocks,
    found: np.ndarray,
    differing: Iterable[str] = (),
    caches_unread: Iterable[str] = (),
) -> Check:
    """mpq's own run of the plan on `model`, in its base format, beside the log-probabilities
    `found`, (N, T − 1, V).

    Caches of attentions that are named `caches_unread` are compared in base."""
    unread = tuple(caches_unread)
    formats = {
        op: name
        for op, name in formats.items()
        if not (of_cache([name]) and op.rpartition(".")[0] in unread)
    }
    sums: dict[str, float] = {}
    device = str(device_of(model))
    runs = {"plan": Mixed(model, base=base)} | {
        f"draw {seed}": Mixed(model, base=base, seed=seed) for seed in DRAWS
    }

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(value.double().sum())

    count = 0
    with torch.inference_mode():
        for number, tokens in enumerate(blocks.batches(BATCH, device)):
            target = tokens[:, 1:].cpu()
            count += target.numel()
            at = number * BATCH
            of_base = log_probabilities(model, tokens)
            others = {"reloaded": torch.from_numpy(found[at : at + len(tokens)].copy())}
            for name, mixed in runs.items():
                mixed.set(formats)
                try:
                    others[name] = log_probabilities(model, tokens)
                finally:
                    mixed.clear()
            for name, of in (("base", of_base), *others.items()):
                add(f"loss {name}", -of.gather(-1, target[..., None]))
            for name in ("plan", "reloaded"):
                add(f"base {name}", _kl(of_base, others[name]))
            for name in ("reloaded", *(f"draw {seed}" for seed in DRAWS)):
                kl = _kl(others["plan"], others[name])
                add(f"plan {name}", kl)
                add(f"plan {name}, squared", kl.square())
    mean = {name: value / count for name, value in sums.items()}
    noise = sum(mean[f"plan draw {seed}"] for seed in DRAWS) / len(DRAWS)
    squares = sum(mean[f"plan draw {seed}, squared"] for seed in DRAWS) / len(DRAWS)
    error = math.sqrt(max(0.0, squares - noise**2) / count)
    tolerance = max(noise + 3 * error, FLOOR[base])
    return Check(
        tokens=count,
        loss_base=mean["loss base"],
        loss_plan=mean["loss plan"],
        loss_reloaded=mean["loss reloaded"],
        kl_base_plan=mean["base plan"],
        kl_base_reloaded=mean["base reloaded"],
        kl_plan_reloaded=mean["plan reloaded"],
        kl_noise=noise,
        kl_tolerance=tolerance,
        loss_tolerance=4 * math.sqrt(2 * tolerance / count) + FLOOR[base],
        differing=tuple(differing),
        caches_unread=unread,
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, in nats, of each token."""
    return (p.exp() * (p - q)).sum(-1)


def check_export(
    folder: Path,
    source: Path,
    names: Mapping[str, tuple[str, str]],
    lowered: Mapping[str, str],
    base: str,
    blocks: Blocks,
    device: str = "cpu",
    trust_remote_code: bool = False,
    decode_experts: bool = False,
    reading: Reading = "codes",
    caches: Caches = Caches(),
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Check:
    """Reload the export in a fresh process, then run the plan here, and compare.

    One after the other: two models are never in memory at once. With `decode_experts` transformers
    gets experts as values, for it does not read what engines do (reload.py); `reading` says as what
    all weights are read. `scales` are those of `caches`. Raises MpqError where the export cannot be
    loaded.
    """
    from mpq.models.loading import load_model

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.check") as name:
        work = Path(name)
        np.save(work / "tokens.npy", np.ascontiguousarray(blocks.tokens, np.int64))
        request = {
            "folder": str(folder),
            "source": str(source.resolve()),
            "tokens": str(work / "tokens.npy"),
            "names": dict(names),
            "formats": dict(lowered),
            "base": base,
            "batch": BATCH,
            "trust_remote_code": trust_remote_code,
            "decode_experts": decode_experts,
            "reading": reading,
            "caches": list(caches.lowered),
            "scales": dict(scales),
        }
        found, *told = reloaded(request, work)
        model = load_model(source, base, device, trust_remote_code)
        return compare(model, {**lowered, **caches.formats}, base, blocks, found, *told)
