"""Write small datasets in the schemas of HellaSwag, LAMBADA, Winogrande and PIQA, on which the demo checkpoint can be scored.

    python examples/make_tasks.py --out examples/tasks

Everything is cut from `examples/demo/heldout.txt`, standard library files that neither the demo's tokenizer nor its model
has seen, by a fixed seed: the same text gives the same files.

- hellaswag: half a statement after the lines before it; the three wrong endings are ends of statements elsewhere;
- lambada_openai: a passage whose last word has occurred in it before;
- winogrande: a blank to fill with one of two names of the passage, told by what follows it;
- piqa: the signature of a function; the beginning of its body, or that of another function.
"""

from __future__ import annotations

import argparse
import json
import keyword
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAME = re.compile(r"[A-Za-z][A-Za-z]{2,}")
FAR = 400  # lines: a wrong answer comes from at least this far away, so from another part or module
QUOTES = '"""'
WORDS = frozenset(keyword.kwlist) | {"self", "the", "this", "that", "its", "has", "are", "was"}


def windows(lines: list[str], rng: random.Random, before: int) -> list[int]:
    """Line numbers with `before` lines before them, in random order, half as many apart."""
    starts = list(range(before, len(lines) - 8, before // 2))
    rng.shuffle(starts)
    return starts


def elsewhere(
    candidates: list[tuple[int, str]], at: int, like: str, count: int, rng: random.Random
) -> list[str]:
    """`count` different texts from at least FAR lines away, of about the length of `like`."""
    near = [
        t
        for line, t in candidates
        if abs(line - at) > FAR and abs(len(t) - len(like)) <= max(6, len(like) // 3) and t != like
    ]
    near = list(dict.fromkeys(near))
    return rng.sample(near, count) if len(near) >= count else []


def hellaswag(lines: list[str], rng: random.Random) -> list[Row]:
    """Context ends within a statement; four ends of statements, one of them its own."""
    halves = [(i, *cut) for i, line in enumerate(lines) if (cut := _halves(line))]
    ends = [(i, end) for i, _, end in halves]
    own = {i: (head, end) for i, head, end in halves}
    rows: list[Row] = []
    for at in windows(lines, rng, 8):
        if at not in own:
            continue
        head, end = own[at]
        wrong = elsewhere(ends, at, end, 3, rng)
        if not wrong:
            continue
        label = rng.randrange(4)
        context = "\n".join([*lines[at - 4 : at], head]).strip("\n")
        endings = [*wrong[:label], end, *wrong[label:]]
        rows.append(
            {
                "ind": at,
                "activity_label": "Python",
                "ctx_a": context,
                "ctx_b": "",
                "ctx": context,
                "endings": endings,
                "source_id": f"heldout~{at}",
                "split": "",
                "split_type": "indomain",
                "label": str(label),
            }
        )
    return rows


def _halves(line: str) -> tuple[str, str] | None:
    """A line cut at the space nearest to its middle, both halves with something in them; brackets (the task's own code drops them) and tables are not cut."""
    text = line.rstrip()
    spaces = [m.start() for m in re.finditer(r"(?<=\S) (?=\S)", text)]
    if not 30 <= len(text) <= 90 or not spaces or re.search(r"\[|\\x", text):
        return None
    middle = min(spaces, key=lambda s: abs(s - (len(text) + len(text) - len(text.lstrip())) / 2))
    head, end = text[:middle], text[middle + 1 :]
    return (head, end) if len(end) >= 10 and NAME.search(end) else None


def lambada_openai(lines: list[str], rng: random.Random) -> list[Row]:
    """A passage cut after a word that occurs in it before; the word follows a space."""
    rows: list[Row] = []
    for at in windows(lines, rng, 8):
        passage = "\n".join(lines[at - 8 : at + 1])
        start = len(passage) - len(lines[at])
        for match in re.finditer(r"(?<=\S )[A-Za-z]{4,}\b(?![\w.(])", passage):
            word = match.group()
            if (
                match.start() >= start
                and word not in WORDS
                and len(re.findall(rf"\b{word}\b", passage[: match.start()])) >= 1
            ):
                rows.append({"text": passage[: match.end()].lstrip("\n")})
                break
    return rows


def winogrande(lines: list[str], rng: random.Random) -> list[Row]:
    """The first mention of a name is blanked; it comes back in what follows, the other option does not."""
    rows: list[Row] = []
    for at in windows(lines, rng, 6):
        passage = "\n".join(lines[at - 6 : at + 4]).strip("\n")
        names = [m for m in NAME.finditer(passage) if m.group() not in WORDS]
        for match in names[3:]:
            word, before = match.group(), passage[: match.start()]
            after = passage[match.end() : match.end() + 120].rpartition("\n")[0]
            again = re.search(rf"\b{word}\b", after)
            if "_" in before or re.search(rf"\b{word}\b", before) or not again:
                continue
            others = sorted({m.group() for m in names if m.end() <= match.start()} - {word})
            others = [
                o
                for o in others
                if not re.search(rf"\b{o}\b", after) and abs(len(o) - len(word)) <= 4
            ]
            if not others or not after.strip():
                continue
            pair = [word, rng.choice(others)]
            rng.shuffle(pair)
            answer = str(pair.index(word) + 1)
            rows.append(
                {
                    "sentence": f"{before}_{after}",
                    "option1": pair[0],
                    "option2": pair[1],
                    "answer": answer,
                }
            )
            break
    return rows


def piqa(lines: list[str], rng: random.Random) -> list[Row]:
    """The signature of a function with arguments and what its docstring begins with, and the beginnings of two bodies."""
    functions = [(i, *found) for i in range(len(lines)) if (found := _function(lines, i))]
    bodies = [(i, body) for i, _, body in functions]
    rows: list[Row] = []
    for at, goal, body in functions:
        wrong = elsewhere(bodies, at, body, 1, rng)
        if not wrong:
            continue
        label = rng.randrange(2)
        solutions = [*wrong[:label], body, *wrong[label:]]
        rows.append({"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label})
    rng.shuffle(rows)
    return rows


def _function(lines: list[str], at: int) -> tuple[str, str] | None:
    """Signature (with the docstring's first line) and the body's first three lines, of a function opened on line `at`.

    None for functions over several lines or without an argument beside self.
    """
    opened = re.fullmatch(r"( *)def \w+\((?:self, )?[a-z]\w*.*\):", lines[at])
    if not opened or lines[at].endswith("(self):"):
        return None
    indent, goal, first = " " * (len(opened.group(1)) + 4), lines[at].strip(), at + 1
    if lines[first].strip().startswith(QUOTES):
        goal += "\n    " + lines[first].strip()
        if lines[first].count(QUOTES) == 1:
            closing = (
                i for i in range(first + 1, min(first + 30, len(lines))) if QUOTES in lines[i]
            )
            first = next(closing, len(lines))
        first += 1
    body: list[str] = []
    for line in lines[first : first + 3]:
        if not line.startswith(indent):
            break
        body.append(line[len(indent) :])
    text = "\n".join(body)
    return (goal, text) if len(text) >= 12 else None


MAKERS: dict[str, Callable[[list[str], random.Random], list[Row]]] = {
    "hellaswag": hellaswag,
    "lambada_openai": lambada_openai,
    "winogrande": winogrande,
    "piqa": piqa,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("examples/demo/heldout.txt"))
    parser.add_argument("--out", type=Path, default=Path("examples/tasks"))
    parser.add_argument("--documents", type=int, default=100, help="of the evaluated split")
    parser.add_argument(
        "--train", type=int, default=30, help="of the training split, where the task has one"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lines = args.source.read_text(encoding="utf-8").splitlines()
    for task, make in MAKERS.items():
        rows = make(lines, random.Random(f"{args.seed}/{task}"))[: args.documents + args.train]
        splits = {"test": rows[: args.documents]}
        if task != "lambada_openai":
            splits = {"train": rows[: args.train], "validation": rows[args.train :]}
        for split, documents in splits.items():
            path = args.out / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
            print(f"{path}: {len(documents)} documents, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
