"""vLLM in a process of its own, asked by lines of JSON: run by the Python that vLLM is installed for.

Nothing of mpq is imported here. A request is one line on standard input, `{"do": …, …}`; its answer one line on what was
standard output, `{"done": …}` or `{"error": …}`. What vLLM itself prints goes to standard error.

Several engines live in this one process, by name: importing vLLM takes half a minute, an engine seconds. Linears of one eager
engine run in the place of another's, so that a mixed model is a matter of setting attributes: of models that differ in formats
alone the exchanged one computes, bit for bit, what an engine of that mixture does (docs/engines.md).
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose thread is timed
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def _garbage_left() -> Iterator[None]:
    """While an engine begins or ends vLLM looks for garbage several times, a second or more: once, after its end, is enough."""
    collect, gc.collect = gc.collect, lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = collect


class Engines:
    """vLLM's engines by name, and what is set into them."""

    def __init__(self) -> None:
        self._engines: dict[str, Any] = {}
        self._own: dict[str, dict[str, Any]] = {}  # of each engine, its linears by name
        self._changed: dict[str, set[str]] = {}
        self._runs = 0  # requests are told apart by it

    def about(self) -> dict[str, str]:
        """Versions of vLLM and torch."""
        import torch
        import vllm

        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def open(
        self,
        name: str,
        folder: str,
        dtype: str,
        tokens: int,
        rows: int,
        dummy: bool,
        skipped: list[str] | None = None,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """An engine of the checkpoint in `folder`, or with made-up weights of its config.json alone.

        It takes `rows` requests of `tokens` tokens at once, each prompt in one pass. `skipped` are numbers of layers whose cache
        is in base, whatever the checkpoint says. `compiled`: as vLLM serves by default, its linears not to be exchanged; else eager.
        Of the answer, `linears` are the model's, `packed` says which of the checkpoint's each is made of, and `lowered` which are
        in no base format.
        """
        from vllm import LLM
        from vllm.model_executor.models import registry

        # vLLM looks at a model's class in a process that imports everything once more, half a minute for each architecture
        registry._run_in_subprocess = lambda look: look()
        with _garbage_left():
            self._engines[name] = llm = LLM(
                model=folder,
                dtype=dtype,
                load_format="dummy" if dummy else "auto",
                skip_tokenizer_init=True,
                enforce_eager=not compiled,
                enable_prefix_caching=False,
                enable_chunked_prefill=False,
                async_scheduling=False,  # or the first token waits for the second one's step
                max_model_len=tokens,
                max_num_seqs=rows,
                max_num_batched_tokens=max(rows * tokens, tokens),
                kv_cache_memory_bytes=_cache_bytes(folder, tokens, rows),
                # a share of a GPU that is to be free at first: another engine is there, and the cache's bytes are given
                gpu_memory_utilization=0.01,
                kv_cache_dtype_skip_layers=skipped or [],
                disable_log_stats=True,
            )
        if compiled and not _compiles(llm):
            raise RuntimeError("vLLM compiles nothing here: is TORCH_COMPILE_DISABLE set?")
        self._own[name] = llm.apply_model(_linears)[0]
        self._changed[name] = set()
        return {
            "linears": list(self._own[name]),
            "packed": llm.apply_model(_packed)[0],
            "lowered": [linear for linear, module in self._own[name].items() if _lowered(module)],
        }

    def close(self, name: str) -> None:
        """Let an engine go."""
        with _garbage_left():
            for kept in (self._engines, self._own, self._changed):
                kept.pop(name, None)
        gc.unfreeze()  # each engine freezes all there is as it begins: what refers to itself would stay
        gc.collect()

    def exchange(self, name: str, linears: dict[str, str]) -> None:
        """Let each of these linears (name → engine) run as that engine has it, and all others as the engine's own."""
        wanted = dict(linears)
        for linear in self._changed[name] - set(wanted):
            self._set(name, linear, name)
        for linear, of in wanted.items():
            self._set(name, linear, of)
        self._changed[name] = {linear for linear, of in wanted.items() if of != name}

    def _set(self, name: str, linear: str, of: str) -> None:
        module = self._own[of][linear]

        def put(model: Any) -> None:
            parent, _, child = linear.rpartition(".")
            setattr(model.get_submodule(parent), child, module)

        self._engines[name].apply_model(put)

    def time(
        self,
        name: str,
        linears: dict[str, str],
        rows: int,
        prompt: int,
        output: int,
        seed: int,
        clock: str,
    ) -> list[float]:
        """Seconds until `rows` prompts of `prompt` random tokens have their first token, until they have the second, and so on to
        `output` tokens, with these linears exchanged."""
        self.exchange(name, linears)
        llm = self._engines[name]
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        draw = random.Random(seed)
        prompts = [
            {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(prompt)]}
            for _ in range(rows)
        ]
        now = time.thread_time if clock == "cpu" else time.perf_counter
        how = self._sampling(max_tokens=output, ignore_eos=True, temperature=0.0)
        engine, came = llm.llm_engine, list[float]()
        start = now()
        for row, asked in enumerate(prompts):
            engine.add_request(f"{self._runs}-{row}", asked, how)
        while engine.has_unfinished_requests():
            if engine.step():  # with a token for each
                came.append(now() - start)
        self._runs += 1
        if len(came) != output:
            raise RuntimeError(
                f"{len(came)} steps gave {output} tokens: rows were not answered together"
            )
        return came

    def log_probabilities(
        self, name: str, tokens: list[list[int]], linears: dict[str, str] | None = None
    ) -> list[list[float]]:
        """Of each row, the log-probability (nats) of each token but the first, given those before it."""
        self.exchange(name, linears or {})
        how = self._sampling(max_tokens=1, prompt_logprobs=0, temperature=0.0)
        prompts = [{"prompt_token_ids": row} for row in tokens]
        found = self._engines[name].generate(prompts, how, use_tqdm=False)
        return [
            [
                at[token].logprob
                for token, at in zip(row[1:], answer.prompt_logprobs[1:], strict=True)
            ]
            for row, answer in zip(tokens, found, strict=True)
        ]

    @staticmethod
    def _sampling(**how: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(detokenize=False, **how)


def _cache_bytes(folder: str, tokens: int, rows: int) -> int:
    """Room for the keys and values of so many requests, in FP32 and whole blocks: what vLLM would take is most of the memory."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = (
        2
        * 4
        * config.num_hidden_layers
        * (getattr(config, "num_key_value_heads", None) or heads)
        * width
    )
    return int(kept * 2 * (rows + 1) * (tokens + 256))


def _linears(model: Any) -> dict[str, Any]:
    from vllm.model_executor.layers.linear import LinearBase

    return {
        name: module for name, module in model.named_modules() if isinstance(module, LinearBase)
    }


def _lowered(linear: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    return not isinstance(linear.quant_method, UnquantizedLinearMethod)


def _compiles(llm: Any) -> bool:
    how = llm.llm_engine.vllm_config.compilation_config
    return any(mode.name != "NONE" for mode in (how.mode, how.cudagraph_mode))


def _packed(model: Any) -> dict[str, list[str]]:
    return dict(getattr(model, "packed_modules_mapping", {}))


def main() -> None:
    """Answer requests until standard input ends."""
    gc.set_threshold(50_000, 20, 50)  # as mpq.cli.main has it: what is imported stays
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ.update(_ENVIRONMENT)
    engines = Engines()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"done": getattr(engines, asked.pop("do"))(**asked)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            said = (str(error).strip().splitlines() or [""])[-1]
            answer = {"error": f"{type(error).__name__}: {said}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
