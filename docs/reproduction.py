"""Write what a run of `mpq reproduce` measured into docs/reproduction.md, its figures beside it.

    python docs/reproduction.py .work/runs/reproduce

`make reproduce` calls it: the numbers between the page's markers are the run's own, never written
by hand.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import polars as pl

from mpq.paper.table_1 import markdown, table_1
from mpq.report.findings import Findings, find
from mpq.report.runs import read_run
from mpq.report.summary import summarize

DOCS = Path(__file__).parent
BEGIN, END = "<!-- run:begin -->", "<!-- run:end -->"
# Table 1's last column, accuracy difference averaged over tasks: Llama-3.2-1B, Llama-3.1-8B-Instruct
PAPER = {
    "et": {"ip_et": (-0.463, -0.073), "random": (-0.889, -0.160), "prefix": (-1.170, -0.204)},
    "tt": {"ip_tt": (-0.533, -0.068), "random": (-0.889, -0.160), "prefix": (-1.170, -0.204)},
    "m": {"ip_m": (-0.445, -0.032), "random": (-0.708, -0.108), "prefix": (-0.794, -0.066)},
}


def beside_the_paper(first: pl.DataFrame) -> list[str]:
    """Our averages of accuracy over tasks beside the paper's, a line a strategy."""
    lines = ["| objective | strategy | ours | paper, 1B | paper, 8B |", "|---|---|---:|---:|---:|"]
    for row in first.iter_rows(named=True):
        ours, spread = row["average_acc"], row["average_acc_std"]
        cell = (
            "–"
            if ours is None
            else f"{round(ours, 2) + 0.0:+.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        )
        paper = PAPER.get(row["objective"], {}).get(row["strategy"])
        theirs = " | ".join(f"{v:+.3f}" for v in paper) if paper else "– | –"
        lines.append(
            f"| {row['objective']} | {row['strategy']} | {cell} | {theirs} |".replace("-", "−")
        )
    return lines


def additivity(found: Findings) -> list[str]:
    """Measured over predicted, a line a quantity."""
    lines = [
        "| quantity | plans of | different plans | 5 % | median | 95 % | median error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for a in found.additivity:
        quantiles = f"{a.low:.2f} | {a.median:.2f} | {a.high:.2f}"
        lines.append(f"| {a.quantity} | {a.objective} | {a.plans} | {quantiles} | {a.error:.0%} |")
    return lines


def page(run: Path, figures: list[str]) -> str:
    """The part of the page between the markers."""
    record, tables = read_run(run)
    found, summary, first = find(tables), summarize(tables), table_1(tables)
    facts = record["facts"]
    shown = "; ".join(
        f"{k} {facts[k]}" for k in ("model", "base", "device", "prefill", "torch") if k in facts
    )
    told = [*summary.sentences, *found.sentences]
    warned = [*summary.warnings, *found.warnings]
    pictures = [f"![Figure {n}](reproduction/figure_{n}.png)" for n in figures]
    return "\n".join(
        [
            BEGIN,
            f"Run `{record['name']}`: {shown}.",
            "",
            "### Accuracy, average of the tasks (points), beside the paper's",
            "",
            *beside_the_paper(first),
            "",
            "### Table 1",
            "",
            markdown(first) if not first.is_empty() else "No task was evaluated.",
            "### Do the assumptions hold? Measured over predicted",
            "",
            *additivity(found),
            "",
            "### What the report says of it",
            "",
            *(f"- {s}" for s in told),
            *(f"- **Warning:** {w}" for w in warned),
            "",
            "### Figures",
            "",
            *pictures,
            END,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder, with run.json and figures/")
    args = parser.parse_args()
    target = DOCS / "reproduction"
    target.mkdir(exist_ok=True)
    drawn = []
    for number in ("1", "2", "3a", "3b", "4", "5", "6", "7", "8", "9"):
        if (picture := args.run / "figures" / f"figure_{number}.png").is_file():
            shutil.copy(picture, target)
            shutil.copy(picture.with_suffix(".svg"), target)
            drawn.append(number)
    path = DOCS / "reproduction.md"
    text = path.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    path.write_text(before + page(args.run, drawn) + after, encoding="utf-8")
    print(f"{path}: {len(drawn)} figures")


if __name__ == "__main__":
    main()
