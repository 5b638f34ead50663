"""The sections of a report that show results: from `results.json` of one or several systems.

`evaluate.py` uses them for the system it evaluated, `launch/quickstart_report.py` to put systems side by side.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bestrq.config import ConfigError
from bestrq.recognition import charts, report
from bestrq.recognition.significance import bootstrap_interval

Results = Mapping[str, Mapping[str, Any]]
"""results.json by system: all of them on the same recordings"""


def read_results(folder: Path) -> dict[str, Any]:
    """What evaluate.py wrote."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Run evaluate.py with --out {folder} first") from error
    if not isinstance(results, dict) or "scores" not in results or "recordings" not in results:
        raise ConfigError(f"{path} is not what evaluate.py writes: it lacks scores or recordings")
    return results


def results_section(systems: Results) -> report.Section:
    """Rates, differences between the first system and the others, and where the errors sit.

    Raises ConfigError where the systems were evaluated on different recordings.
    """
    check_same_recordings(systems)
    body = report.headline_table({name: results["scores"] for name, results in systems.items()})
    body += report.paragraph(
        "Errors of the whole corpus over its reference characters (CER) and words (WER). Intervals: 95 %, from "
        "resampling whole recordings. The bar shows the CER and its interval.",
        "note",
    )
    names = list(systems)
    for other in names[1:]:
        body += report.paragraph(difference(systems, names[0], other))
    rates = {
        name: [row["cer"] for row in results["recordings"] if row["cer"] is not None]
        for name, results in systems.items()
    }
    picture = charts.rates_chart("CER of the recordings", rates, "CER")
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    kinds = charts.kinds_chart({name: error_shares(total["characters"]) for name, total in totals.items()})
    figures = [
        report.figure("CER of the recordings", picture, "Each recording by itself; further to the left is better."),
        report.figure("Kinds of errors", kinds, "A model that has learnt little mostly deletes."),
    ]
    return report.Section("Results", body + report.chart_grid(figures) + report.error_table(totals))


def transcripts_section(systems: Results, count: int = 6) -> report.Section:
    """Recordings spread over the range of difficulty, by the CER of the first system, with their errors marked."""
    by_system = {name: {row["id"]: row for row in results["recordings"]} for name, results in systems.items()}
    rows = [row for row in next(iter(by_system.values())).values() if row["reference"]]
    rows.sort(key=lambda row: (row["cer"], row["id"]))
    picked = [rows[round(i)] for i in np.linspace(0.1, 0.9, min(count, len(rows))) * (len(rows) - 1)] if rows else []
    samples = [
        report.Sample(
            id=row["id"],
            language=row["language"],
            reference=row["reference"],
            hypotheses={name: one[row["id"]]["hypothesis"] for name, one in by_system.items()},
            rates={name: one[row["id"]]["cer"] for name, one in by_system.items()},
        )
        for row in {row["id"]: row for row in picked}.values()
    ]
    intro = report.paragraph(f"From the easier to the harder ones, by the CER of {next(iter(systems))}.")
    return report.Section("Transcripts", intro + report.transcripts(samples))


def facts_section(systems: Results, pretrain: Path | None = None) -> report.Section:
    """Data, exports, versions and command lines."""
    first = next(iter(systems.values()))
    values = {
        "dataset": f"{first['dataset']['path']}, split {first['dataset']['split']}",
        "dataset fingerprint": first["dataset"]["fingerprint"],
        "feature hash": first["dataset"]["feature_hash"],
    }
    if pretrain is not None:
        values["pretraining run"] = str(pretrain)
    for name, results in systems.items():
        values[f"{name}: export"] = f"{results['export']} ({results['export_hash'][:16]})"
    values["versions"] = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    body = report.facts(values) + report.commands([results["command"] for results in systems.values()])
    return report.Section("How it was made", body)


def check_same_recordings(systems: Results) -> None:
    """Rates on different recordings say nothing about the systems."""
    (first, results), *others = systems.items()
    for name, other in others:
        same_data = other["dataset"]["fingerprint"] == results["dataset"]["fingerprint"]
        if not same_data or {row["id"] for row in other["recordings"]} != {row["id"] for row in results["recordings"]}:
            raise ConfigError(f"{first} and {name} were evaluated on different recordings: evaluate both on the same")


def difference(systems: Results, first: str, second: str) -> str:
    """A sentence on the paired difference of two systems' CER."""
    rows, others = ({row["id"]: row for row in systems[name]["recordings"]} for name in (first, second))
    lengths = np.array([char_errors(row)[1] for row in rows.values()])
    errors = np.array([char_errors(rows[id])[0] - char_errors(others[id])[0] for id in rows])
    gain = errors.sum() / max(lengths.sum(), 1)
    bounds = bootstrap_interval(errors, lengths)
    sentence = f"CER of {first} less that of {second}: {100 * gain:+.1f} points"
    if bounds is None:
        return sentence + "."
    clear = "" if bounds[0] > 0 or bounds[1] < 0 else ", so the two cannot be told apart here"
    return f"{sentence} (95 % interval {100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}{clear})."


def error_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Kinds of errors over the length of the references."""
    length = max(counts["hits"] + counts["substitutions"] + counts["deletions"], 1)
    return {kind: counts[kind] / length for kind in ("substitutions", "deletions", "insertions")}


def char_errors(row: Mapping[str, Any]) -> tuple[int, int]:
    """Errors and reference length, in characters."""
    wrong = row["char_substitutions"] + row["char_deletions"]
    return wrong + row["char_insertions"], wrong + row["char_hits"]
