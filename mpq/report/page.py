"""One HTML file on a run that needs nothing else: what to run, pictures, what the numbers say,
tables.

Everything is read off the tables, so a report can be written again from any finished run. Needs no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from mpq.report import sheets
from mpq.report.best import in_words, percent, saved
from mpq.report.calibration import calibration_of, in_sentences
from mpq.report.calibration import sheet as sheet_of_calibration
from mpq.report.findings import find
from mpq.report.prices import prices
from mpq.report.results import Tables, base_of, milliseconds, table_of
from mpq.report.sheets import Sheet
from mpq.report.summary import summarize

if TYPE_CHECKING:
    from mpq.report.beside import Beside

REPORTED = ("groups", "timing", "solutions", "plans", "evaluation", "sensitivity", "loss")


@dataclass(frozen=True)
class Appendix:
    """What another room adds at the end of the page: pictures as (caption, SVG), and tables.

    `left_out` is one line on what the run has no data for, or empty.
    """

    title: str
    figures: Sequence[tuple[str, str]]
    sheets: Sequence[Sheet]
    left_out: str = ""


def write_report(
    tables: Tables,
    title: str,
    facts: Mapping[str, str],
    appendix: Appendix | None = None,
    others: Beside | None = None,
) -> str:
    """One self-contained HTML page on a run: it fetches nothing and works from a file, offline.

    `tables` are the run's tables by name (REPORTED), `facts` what is told of the run (model,
    device, versions). A section without data is left out, and one line says which tables have no
    rows. `appendix` stands at the end: the paper's figures, where a run reproduces them
    (paper.appendix). `others` are plans of other tools, drawn beside the run's. Raises MpqError for
    a table that lacks columns.
    """
    from mpq.report.figures import report_figures  # matplotlib is slow to load

    pages = Environment(
        loader=PackageLoader("mpq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals |= {
        "write": sheets.write,
        "milliseconds": milliseconds,
        "percent": percent,
        "expm1": math.expm1,
        "saved": saved,
    }
    summary, found, base = summarize(tables), find(tables), base_of(tables, facts)
    calibration = calibration_of(tables, base)
    enough, too_few = in_sentences(calibration)
    return pages.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        missing=[name for name in REPORTED if table_of(tables, name).is_empty()],
        best=summary.best,
        answer=in_words(summary.best),
        sentences=[*summary.sentences, *found.sentences, *enough],
        warnings=[*summary.warnings, *found.warnings, *too_few],
        figures=report_figures(tables, base, calibration, others),
        others=others,
        choice=sheets.choice(tables, summary),
        numbers=[
            sheets.standings(summary),
            prices(tables),
            sheets.additivity(found),
            sheets.comparisons(found),
            sheet_of_calibration(calibration),
        ],
        accuracy=sheets.accuracy(tables),
        results=sheets.results(tables),
        groups=sheets.groups(tables),
        timing=sheets.timing(tables),
        sensitivity=sheets.sensitivity(tables, facts.get("noise model", "")),
        appendix=appendix,
    )
