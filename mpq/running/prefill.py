"""One prefill forward, made ready to be timed: as eager operations, compiled per block, or as a captured CUDA graph.

TTFT is one forward of the whole model over (batch, length) random tokens, without a cache, and with logits for the last
position of each row alone where the model can be asked for that, as engines do: the head works on `batch` tokens.

- eager: the program between two readings of the clock, ended by a synchronisation on CUDA.
- compiled: each of the model's repeated blocks through torch.compile. Blocks of one class share their code: one is
  compiled for each configuration of a signature, however many there are. What lies around the blocks stays eager.
- graph (CUDA): the launches are captured once and replayed between two events, so that the time of a short kernel is its
  own and not that of the Python which launches it. Graphs share one memory pool: they never run beside each other.

While a graph is captured transformers does not look whether it can do without a mask (whether sequences are packed into a row is
in the positions' values), and makes one. With a mask SDPA leaves FlashAttention, and base would not be what users run: so
it is told that no row is packed, and that it may look, for without padding there is nothing else to look at.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import masking_utils

from mpq.caches import private_folder
from mpq.errors import MpqError
from mpq.running.apply import Mixed

Timed: TypeAlias = Callable[[], float]  # one forward; returns its seconds
_COMPILED_IN = "TORCHINDUCTOR_CACHE_DIR"
CONFIGURATIONS = (
    4096  # torch.compile gives up on a function after this many versions; its own default is 8
)


class Prefill:
    """A model's prefill over `batch` x `length` tokens drawn from `seed`.

    `graph` counts on CUDA alone. `now` is the clock (s) of forwards that are no graph: wall time, unless told otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        length: int,
        *,
        seed: int = 0,
        compiled: bool = False,
        graph: bool = True,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._now = now
        self._model, self._tokens = model, _tokens(model, batch, length, seed)
        self._compiled, self._cuda = compiled, self._tokens.device.type == "cuda"
        self._graph = graph and self._cuda
        self._pool = torch.cuda.graph_pool_handle() if self._graph else None
        accepted = inspect.signature(model.forward).parameters
        self._options = {
            k: v for k, v in (("use_cache", False), ("logits_to_keep", 1)) if k in accepted
        }

    @property
    def mode(self) -> str:
        """How forwards run: `eager`, `compiled`, `graph` or `compiled graph`."""
        return (
            " ".join(n for n, on in (("compiled", self._compiled), ("graph", self._graph)) if on)
            or "eager"
        )

    def ready(self, mixed: Mixed, formats: Mapping[str, str]) -> Timed:
        """The forward in `formats` (op → format), prepared and run once, so that a call times nothing else.

        The graph of a plan stays valid while its kernels live, which `mixed` keeps. Raises what Mixed.set raises.
        """
        mixed.set(formats)
        self._forward()
        if self._graph:
            return self._captured()

        def timed() -> float:
            mixed.set(formats)
            start = self._now()
            self._forward()
            return self._now() - start

        return timed

    @torch.inference_mode()
    def _forward(self) -> None:
        """One forward that has ended when this returns."""
        self._launch()
        if self._cuda:  # kernels run behind the program
            torch.cuda.synchronize(self._tokens.device)

    def _launch(self) -> None:
        with _masks_as_uncaptured():
            self._model(self._tokens, **self._options)

    @torch.inference_mode()
    def _captured(self) -> Timed:
        aside, device = torch.cuda.Stream(self._tokens.device), self._tokens.device
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(
            aside
        ):  # what is allocated or tuned at first use happens before the capture, not in it
            for _ in range(2):
                self._launch()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._launch()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise MpqError(
                f"The forward cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): time it with graph off."
            ) from error
        graph.replay()  # the first one also uploads the graph
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return timed


@contextmanager
def _masks_as_uncaptured() -> Iterator[None]:
    module: Any = masking_utils
    found = module.find_packed_sequence_indices, module.is_tracing
    module.find_packed_sequence_indices, module.is_tracing = (lambda *_: None), (lambda *_: False)
    try:
        yield
    finally:
        module.find_packed_sequence_indices, module.is_tracing = found


@contextmanager
def compiled_blocks(model: nn.Module, compiled: bool = True) -> Iterator[None]:
    """The model's repeated blocks compiled inside the context (nothing happens unless `compiled`), as before outside.

    Raises MpqError for a model without repeated blocks.
    """
    if not compiled:
        yield
        return
    found = blocks(model)
    if not found:
        raise MpqError(
            f"{type(model).__name__} has no list of repeated blocks to compile: time it without compile."
        )
    if os.environ.get(_COMPILED_IN) in (None, default_cache_dir()):
        # torch's own choice is a folder in the temporary one, called after the user: whoever makes it first has code run
        os.environ[_COMPILED_IN] = str(private_folder("inductor"))
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(
            recompile_limit=CONFIGURATIONS, accumulated_recompile_limit=CONFIGURATIONS
        ):
            for block in found:
                block.compile(dynamic=False)
            yield
    finally:
        for block in found:
            block._compiled_call_impl = None
        torch.compiler.reset()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the entries of the model's lists of modules that lie in no other such list."""
    lists = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    ]
    outer = [m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return [block for m in outer for block in m]


def _tokens(model: nn.Module, batch: int, length: int, seed: int) -> Tensor:
    config = getattr(model, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 2
    tokens = torch.randint(
        vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
    return tokens.to(next(model.parameters()).device)
