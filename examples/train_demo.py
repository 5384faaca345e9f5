"""Train the demo checkpoint: a small Llama on the Python standard library's own source; or another architecture on it.

    python examples/train_demo.py --out examples/demo --steps 3000
    python examples/train_demo.py --arch qwen3 --out .work/qwen3 --steps 400 --batch 2 --length 2048

Three things come out, all from the interpreter's own `Lib` folder, nothing downloaded:

- a byte-level BPE tokenizer trained on the training files;
- a Llama with grouped-query attention and a tied lm_head, in Hugging Face layout (BF16 safetensors); or, with `--arch`, a
  Qwen3 (the same, its queries and keys normalized) or a GPT-NeoX (attention and MLP side by side, one product for q, k and v);
- `calibration.txt` and `heldout.txt`: whole files that neither the tokenizer nor the model has seen,
  the first to calibrate with, the second to evaluate on. A file's part is decided by the hash of its
  path, so it does not move when other files do.

The shape is the widest that fits in 10 MB with four layers. The MLP is narrower than a Llama's usual
8/3 so that the hidden size, which every product shares, can be 384: at 288 and below INT8 loses to BF16
on every CPU seen, and the demo would have nothing to choose between.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

END = "<|endoftext|>"
VOCABULARY = 2048
BLOCK = 256


@dataclass(frozen=True)
class Size:
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int


HEAD = 64
SIZES = {
    "tiny": Size(192, 256, 3, 3, 1),
    "demo": Size(384, 512, 4, 6, 2),
    "wide": Size(768, 2048, 6, 12, 4),
}
ARCHITECTURES = {"llama": "Llama", "qwen3": "Qwen3", "neox": "GPT-NeoX"}


def part_of(path: str) -> str:
    """`train`, `calibration` or `heldout`, from the file's path alone (about 96, 2 and 2 %)."""
    bucket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100
    return {0: "calibration", 1: "calibration", 2: "heldout", 3: "heldout"}.get(bucket, "train")


def read_corpus() -> dict[str, list[str]]:
    """The standard library's Python files by part, in path order; files that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if relative.startswith(("site-packages/", "config-")) or "lib2to3/tests/data" in relative:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            parts[part_of(relative)].append(text)
    return parts


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `END` as its only special token, saved under `out`."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of token ids, each text closed by `END`. (tokens,) uint16."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer._tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*e.ids, end], dtype=np.uint16) for e in encoded])


def configuration(arch: str, size: Size, length: int) -> PreTrainedConfig:
    """Of an untrained model of one of the ARCHITECTURES that is trained on blocks of `length` tokens."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": max(1024, length),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if arch == "neox":
        return GPTNeoXConfig(**common, use_parallel_residual=True)
    grouped = {"num_key_value_heads": size.kv_heads, "head_dim": HEAD, "tie_word_embeddings": True}
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[arch](**common, **grouped)


def new_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, tokens: np.ndarray, blocks: int = 128, length: int = BLOCK
) -> float:
    """Mean cross entropy (nats per token) over the first `blocks` × BLOCK tokens of a stream, in blocks of `length`."""
    usable = max(1, min(blocks * BLOCK, len(tokens)) // length)
    x = torch.from_numpy(tokens[: usable * length].astype(np.int64)).view(usable, length)
    at_once = max(1, 16 * BLOCK // length)
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in x.split(at_once)]
    return sum(losses) / usable


def unigram_entropy(train: np.ndarray, heldout: np.ndarray) -> float:
    """Cross entropy (nats per token) of the held-out stream under the training stream's unigram counts."""
    counts = Counter(train.tolist())
    total = len(train) + VOCABULARY
    return float(np.mean([-math.log((counts[t] + 1) / total) for t in heldout.tolist()]))


def train(
    model: PreTrainedModel,
    tokens: np.ndarray,
    heldout: np.ndarray,
    steps: int,
    batch: int,
    seed: int,
    length: int = BLOCK,
) -> None:
    """AdamW with warm-up and cosine decay, BF16 autocast, random blocks of the stream."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        rate = 2e-3 * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = rng.integers(0, len(tokens) - length, batch)
        x = torch.from_numpy(np.stack([tokens[i : i + length] for i in at]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == steps - 1:
            rate_s = (step + 1) * batch * length / (time.perf_counter() - start)
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  heldout {heldout_loss(model, heldout, 32, length):.3f}"
                f"  {rate_s:,.0f} tokens/s",
                flush=True,
            )


def model_card(arch: str, numbers: dict[str, float | int | str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in numbers.items())
    kind = {
        "llama": "grouped-query attention, tied lm_head",
        "qwen3": "grouped-query attention, normalized queries and keys, tied lm_head",
        "neox": "attention and MLP side by side",
    }[arch]
    return f"""---
license: psf-2.0
language: [en]
pipeline_tag: text-generation
---
# mpq demo checkpoint

A {numbers["parameters"]:,}-parameter {ARCHITECTURES[arch]} ({kind}) trained on the Python standard
library's source by `examples/train_demo.py`. It exists so that mpq's demo and tests have a *trained* model to work on.
Held-out files were seen by neither the tokenizer nor the model.

| | |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/demo"))
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=BLOCK, help="tokens of a block")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus["train"], args.out)
    streams = {part: tokens_of(tokenizer, texts) for part, texts in corpus.items()}
    for part in ("calibration", "heldout"):
        (args.out / f"{part}.txt").write_text("\n".join(corpus[part]), encoding="utf-8")
    print({part: f"{len(stream):,} tokens" for part, stream in streams.items()}, flush=True)

    model = new_model(configuration(args.arch, SIZES[args.size], args.length), args.seed)
    train(
        model, streams["train"], streams["heldout"], args.steps, args.batch, args.seed, args.length
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training tokens seen": args.steps * args.batch * args.length,
        "training stream, tokens": len(streams["train"]),
        "held-out loss, nats per token": round(
            heldout_loss(model.float(), streams["heldout"], length=args.length), 4
        ),
        "unigram cross entropy, nats per token": round(
            unigram_entropy(streams["train"], streams["heldout"]), 4
        ),
        "made with": f"torch {torch.__version__}, seed {args.seed}, {args.steps} steps of {args.batch} x {args.length} tokens",
    }
    (args.out / "README.md").write_text(model_card(args.arch, numbers), encoding="utf-8")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
