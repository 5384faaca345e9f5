"""How often a plan that was delivered keeps its bound: `python bench/delivered.py CHECKPOINT… [--bounds 17] [--samples 32]`.

For each checkpoint two runs as users make them (`mpq run`), with `bound: {kl: […]}` alone and with `robust: 0.95`: MAC time over
INT8 and FP8, attention's products among the ops, and memory over FP8 and NVFP4, as many bounds on KL from 2e-5 to 2e-3 nats for
each. A plan is checked on held-out text before it is delivered; it is counted here by what it does on other blocks of that text,
with other rounding (perturbed scales). Measured over bound: how many are inside, and quantiles. All plans: delivered.parquet
beside the result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from record import folder_of, record

ROOT = Path(__file__).parent.parent
MENUS = {"tt": ["int8", "fp8_e4m3"], "m": ["fp8_e4m3", "nvfp4"]}
LENGTH = 256


def spec_of(
    checkpoint: Path, home: Path, options: argparse.Namespace, robust: float | None
) -> dict[str, Any]:
    """A run of the two objectives under all bounds, its programs' plans alone."""

    def text(name: str) -> dict[str, Any]:
        source = str((checkpoint / name).resolve())
        return {"source": source, "samples": options.samples, "length": LENGTH}

    bounds = np.geomspace(2e-5, 2e-3, options.bounds).tolist()
    return {
        "name": f"{checkpoint.name}-{robust or 'plain'}",
        "model": {"path": str(checkpoint.resolve()), "base": "fp32"},
        "calibration": {**text("calibration.txt"), "batch": 8},
        "evaluation": {**text("heldout.txt"), "batch": 16, "seeds": 1},
        "objectives": {o: {"formats": f, "strategies": ["ip"]} for o, f in MENUS.items()},
        "bound": {"kl": bounds, "robust": robust},
        "store": str(home / "store"),
        "out": str(home / "runs"),
    }


def plans_of(spec: dict[str, Any], home: Path) -> pl.DataFrame:
    """What a run says of its plans."""
    file, results = home / "spec.yaml", home / "results.parquet"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = [sys.executable, "-m", "mpq", "run", str(file), "--out", str(results)]
    subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)
    columns = ["objective", "kl_bound", "predicted_kl", "checked_kl", "measured_kl", "kl_scale"]
    return pl.read_parquet(results, columns=[*columns, "share_lowered"])


def told(plans: pl.DataFrame) -> dict[str, Any]:
    """How many plans are inside their bound, where they were checked and on other text, and by how much."""
    over = (plans["measured_kl"] / plans["kl_bound"]).to_numpy()
    outside = over[over > 1]
    return {
        "plans": len(over),
        "inside_where_checked": int((plans["checked_kl"] <= plans["kl_bound"]).sum()),
        "inside_on_other_text": int((over <= 1).sum()),
        "measured_over_bound": dict(
            zip(
                ("5_%", "median", "95_%"),
                np.quantile(over, [0.05, 0.5, 0.95]).tolist(),
                strict=True,
            )
        ),
        "largest": float(over.max()),
        "median_of_those_outside": float(np.median(outside)) if len(outside) else None,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[ROOT / "examples" / "demo"])
    parser.add_argument("--bounds", type=int, default=17)
    parser.add_argument("--samples", type=int, default=32, help=f"blocks of {LENGTH} tokens")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as home:
        for checkpoint in options.checkpoints:
            for robust in (None, 0.95):
                plans = plans_of(spec_of(checkpoint, Path(home), options, robust), Path(home))
                where = {"checkpoint": checkpoint.name, "robust": robust or 0.0}
                found.append(plans.with_columns(**{k: pl.lit(v) for k, v in where.items()}))
                print(checkpoint.name, robust, told(plans), flush=True)
    every = pl.concat(found)
    every.write_parquet(folder_of() / "delivered.parquet")
    by = ["robust", "checkpoint", "objective"]
    cells = {
        ", ".join(str(part) for part in key): told(of)
        for key, of in every.group_by(by, maintain_order=True)
    }
    of_all = {str(key): told(of) for (key,), of in every.group_by("robust", maintain_order=True)}
    facts = {"samples": options.samples, "length": LENGTH, "menus": MENUS}
    record("delivered", {**facts, "by_robust": of_all, "by_robust_checkpoint_objective": cells})


if __name__ == "__main__":
    main()
