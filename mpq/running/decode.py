"""Answers of several tokens, made ready to be timed: the prefill, and single tokens after it.

A cache of keys and values is filled with the prompt once, in whatever the model runs in: its values do not decide the time. A
decoding step is one forward of one token for each row on that cache, as it was after the prompt: of a longer answer it is the
time of its first tokens. Transformers' cache grows by copying, in base and in every configuration alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from mpq.errors import MpqError
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill, Timed

STEPS = 8  # single tokens in one run: several, since they are short
Parts: TypeAlias = Callable[[], float | tuple[float, float]]


class Decode(Prefill):
    """Some decoding steps of a model after a prompt of `batch` x `length` tokens; how it runs: see Prefill.

    Raises MpqError for a model that keeps no cache of keys and values.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, *, steps: int, **how: Any):
        super().__init__(model, batch, length, **how)
        self._steps = steps
        self._options["use_cache"] = True
        self._layers = _filled(model, self._tokens, self._options)
        self._token = self._tokens[:, -1:].contiguous()

    def _launch(self) -> None:
        for _ in range(self._steps):
            cache, layers = self._layers
            after = copy.copy(cache)  # steps replace what layers hold, and change nothing of it
            after.layers = [copy.copy(layer) for layer in layers]
            self._model(self._token, past_key_values=after, **self._options)


class Answers:
    """A model's answers of `output` tokens to `batch` x `length` random tokens: a run gives the seconds to the first token, and
    those of all that follow; with one token the former alone. `how`: see Prefill."""

    def __init__(self, model: nn.Module, batch: int, length: int, output: int = 1, **how: Any):
        self._prefill, self._further = Prefill(model, batch, length, **how), output - 1
        self._steps = min(STEPS, self._further)
        self._decode = (
            Decode(model, batch, length, steps=self._steps, **how) if self._further else None
        )
        self.mode = self._prefill.mode

    def ready(self, mixed: Mixed, formats: Mapping[str, str]) -> Parts:
        """As Prefill.ready, for whole answers."""
        prefill = self._prefill.ready(mixed, formats)
        if self._decode is None:
            return prefill
        decode: Timed = self._decode.ready(mixed, formats)
        return lambda: (prefill(), decode() * self._further / self._steps)


@torch.inference_mode()
def _filled(
    model: nn.Module, tokens: torch.Tensor, options: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """The model's cache after these tokens, and its layers."""
    if {"past_key_values", "use_cache"} <= set(inspect.signature(model.forward).parameters):
        cache = getattr(model(tokens, **options), "past_key_values", None)
        if layers := getattr(cache, "layers", None):
            return cache, list(layers)
    raise MpqError(
        f"{type(model).__name__} keeps no cache of keys and values that single tokens could be timed with: set workload.output to 1."
    )
