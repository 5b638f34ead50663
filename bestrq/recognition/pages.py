"""The pages that evaluations end with: of one system, and of several side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bestrq.files import write_file
from bestrq.recognition import report
from bestrq.recognition.results import REPORT, read_results
from bestrq.recognition.sections import facts_section, results_section, transcripts_section


def write_cell_page(
    folder: Path, results: dict[str, Any], transcripts: list[dict[str, Any]], audio: Mapping[str, str]
) -> None:
    """`report.html` of one evaluation."""
    total = results["scores"]["all"]
    systems = {results["name"]: results}
    cards = {"WER": report.percent(total["wer"]), "CER": report.percent(total["cer"])}
    sections = [results_section(systems), transcripts_section(systems), facts_section(systems)]
    lead = f"{results['name']}: {results['label']}."
    report.write_report(folder / REPORT, f"Evaluation of {results['name']}", lead, cards, sections)


def write_comparison(
    out: Path, systems: Mapping[str, Path], audio: Mapping[str, str], num_resamples: int = 10_000
) -> dict[str, Any]:
    """`report.html` and `report.json` of several evaluations of the same recordings."""
    results = {name: read_results(folder) for name, folder in systems.items()}
    found = {"cells": {name: one["scores"]["all"] for name, one in results.items()}}
    report.write_report(out / REPORT, "Evaluations", "", {}, [results_section(results), facts_section(results)])
    write_file(out / "report.json", json.dumps(found, indent=1))
    return found
