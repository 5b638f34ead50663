"""Rank correlation between figures of the gauge and final error rates: which figure predicts a good target?

    python -m tools.gauge_correlation --gauge results/targets/gauge.json --cer cer.json
    python -m tools.gauge_correlation --gauge a/gauge.json b/gauge.json --cer cer.json --figures pnmi_adjusted
    python -m tools.gauge_correlation --gauge gauge.json --results random=runs/a,runs/b pca=runs/c,runs/d

cer.json is an object {target: CER}, with the names of the targets in gauge.json; --results takes the mean CER of
evaluations, such as one per seed. Targets without an error rate are left out; at least eight are needed. Prints
Spearman's rho of every figure with a 95 % bootstrap interval over targets; a good figure of information has a rho near
-1. An interval that does not contain 0 shows a relation, but many figures are tried: choose the figure before the
experiment.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestrq.report.result_files import folders_by_name, read_results
from bestrq.scoring.rank_correlation import spearman, spearman_interval
from common.config import parse, run_main
from common.errors import UserError
from common.files import read_json_object, write_json
from common.json_checks import LARGEST, number
from tools.compare import join_lists

MIN_TARGETS = 8
NO_FIGURES = ("seconds",)
"""numbers in gauge.json that describe the machine, not the target"""


@dataclass
class Config:
    """Rank correlation of figures and error rates."""

    gauge: list[str] = field(default_factory=list)
    """gauge.json files; a target in several files is taken from the last one"""
    cer: str = ""
    """JSON object {target: CER}"""
    results: list[str] = field(default_factory=list)
    """in place of cer: TARGET=FOLDER[,FOLDER...], folders of evaluate.py"""
    figures: list[str] = field(default_factory=list)
    """figures of gauge.json; empty takes all numbers that all targets have"""
    out: str = ""
    """JSON file for the numbers"""
    resamples: int = 2000
    """bootstrap resamples, at least 100"""

    def __post_init__(self) -> None:
        if not self.gauge:
            raise UserError("gauge is missing: give --gauge FOLDER/gauge.json")
        if bool(self.cer) == bool(self.results):
            raise UserError("error rates: give one of --cer FILE.json and --results TARGET=FOLDER ...")
        if self.resamples < 100:
            raise UserError(f"resamples = {self.resamples}: give at least 100, or the intervals are meaningless")


def read_inputs(config: Config) -> tuple[dict[str, Mapping[str, Any]], dict[str, float]]:
    """Figures and error rates of the targets that have both. Raises UserError for fewer than eight targets."""
    targets: dict[str, Mapping[str, Any]] = {}
    for path in config.gauge:
        found = read_json_object(Path(path)).get("targets")
        if not isinstance(found, dict) or not all(isinstance(figures, dict) for figures in found.values()):
            raise UserError(f"{path}: has no targets with figures: give a gauge.json of tools/gauge.py")
        targets |= found
    rates = read_rates(Path(config.cer)) if config.cer else read_cers(config.results)
    names = [name for name in targets if name in rates]
    if len(names) < MIN_TARGETS:
        unknown = sorted(set(rates) - set(targets))
        raise UserError(
            f"{config.cer or 'results'}: {len(names)} targets have figures and an error rate, at least {MIN_TARGETS} "
            "are needed" + (f"; not in the gauge: {', '.join(unknown)}" if unknown else "")
        )
    return {name: targets[name] for name in names}, {name: rates[name] for name in names}


def read_rates(path: Path) -> dict[str, float]:
    """Error rates by target. Raises UserError for anything but finite numbers."""
    rates = read_json_object(path)
    for name, rate in rates.items():
        number(rate, f"{path}: {name}")
    return {name: float(rate) for name, rate in rates.items()}


def read_cers(pairs: Sequence[str]) -> dict[str, float]:
    """Mean CER by target, from `TARGET=FOLDER[,FOLDER...]`. Raises UserError for a folder without results."""
    return {
        name: statistics.fmean(cer_of(folder) for folder in folders)
        for name, folders in folders_by_name("results", pairs).items()
    }


def cer_of(folder: str) -> float:
    """CER over all recordings of an evaluation. Raises UserError if its references are empty."""
    rate = read_results(folder)["scores"]["all"]["cer"]
    number(rate, f"{folder}: scores.all.cer")
    return float(rate)


def is_figure(value: Any) -> bool:
    """Whether a value is a finite number of a size that floating point can represent."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def correlations(
    targets: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float], figures: Sequence[str], resamples: int
) -> dict[str, dict[str, float]]:
    """Spearman's rho and interval by figure; constant figures are left out. Raises UserError for an unknown figure."""
    common = [
        name
        for name, value in next(iter(targets.values())).items()
        if name not in NO_FIGURES and is_figure(value) and all(is_figure(row.get(name)) for row in targets.values())
    ]
    unknown = [name for name in figures if name not in common]
    if unknown:
        raise UserError(f"figures: not all targets have {', '.join(unknown)}; all have {', '.join(common)}")
    cer = [rates[name] for name in targets]
    rows = {}
    for figure in figures or common:
        values = [float(row[figure]) for row in targets.values()]
        rho = spearman(values, cer)
        if math.isfinite(rho):
            low, high = spearman_interval(values, cer, resamples)
            rows[figure] = {"rho": rho, "low": low, "high": high}
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    words = join_lists(sys.argv[1:] if argv is None else argv, ("--gauge", "--figures", "--results"))
    config = parse(Config, words, description=__doc__)
    targets, rates = read_inputs(config)
    rows = correlations(targets, rates, config.figures, config.resamples)
    print(f"{len(targets)} targets: {', '.join(targets)}")
    for figure, row in sorted(rows.items(), key=lambda item: -abs(item[1]["rho"])):
        print(f"{figure:<32}{row['rho']:>7.2f}  95 % {row['low']:.2f} to {row['high']:.2f}")
    if config.out:
        write_json(Path(config.out), {"targets": list(targets), "cer": rates, "spearman": rows})


if __name__ == "__main__":
    run_main(main)
