"""Whether a calibration was long enough, as the report tells it of a run made up here."""

import re

import pytest
from test_pareto import GAINS

from mpq.report.calibration import calibration_of, in_sentences, sheet
from mpq.report.page import write_report
from mpq.report.results import Tables
from mpq.store.tables import table


def run_of(error: float) -> Tables:
    """A run on 16 samples, bounded by KL, whose costs have a standard error of so much of themselves."""
    solution = {"strategy": "ip_m", "objective": "m", "tau": 1.0, "seed": 0, "kl_bound": 2e-3}
    return {
        "gains": GAINS.with_columns(kl_stderr=error * GAINS["kl"]),
        "loss": table("loss", [{"n_samples": 16, "mean_square_loss": 4.0, "mean_loss": 2.0}]),
        "solutions": table("solutions", [solution]),
    }


def test_enough_is_said() -> None:
    """Costs that are known to 1 % need no more samples: a sentence with the number that there are, and no warning."""
    found = calibration_of(run_of(0.01), "bf16")
    sentences, warnings = in_sentences(found)
    assert not warnings
    assert "16 samples each" in sentences[0]
    assert "long enough" in sentences[0]
    assert [row["samples"] for row in sheet(found).rows] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("error", "told"), [(0.08, "64 samples would be needed"), (3.0, "more than 64")]
)
def test_too_few_is_a_warning(error: float, told: str) -> None:
    """A cost known to ± 16 % is known to half of that on four times the samples; one known to nothing, to nothing there too.
    The page has the warning and the curve, as numbers and as a picture."""
    sentences, warnings = in_sentences(calibration_of(run_of(error), "bf16"))
    assert not sentences
    assert told in warnings[0]
    if error > 1:
        page = write_report(run_of(error), "made up", {"base": "bf16"})
        assert told in page
        assert 'id="calibration"' in page
        assert "<figcaption>How much calibration is enough</figcaption>" in page
        assert "64" in re.findall(r">(\d+)</text>", page)


def test_runs_of_before_say_nothing() -> None:
    """Tables without gains, or without standard errors, have no curve."""
    without = {k: v for k, v in run_of(0.1).items() if k != "gains"}
    assert calibration_of(without, "bf16") is None
    of_one = run_of(0.1) | {"gains": GAINS.drop("kl_stderr", "loss_mse_stderr")}
    assert calibration_of(of_one, "bf16") is None
    assert in_sentences(None) == ([], [])
    assert not sheet(None).rows
