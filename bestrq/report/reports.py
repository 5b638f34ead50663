"""Reports: page of one evaluation; page, numbers and curve of a comparison."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bestrq.report.charts import context_svg
from bestrq.report.comparison import (
    Results,
    check_same_references,
    compare_systems,
    context_curves,
    describe_systems,
    has_several_contexts,
    recording_rates,
    setting_of,
)
from bestrq.report.page import Section, paragraph, write_page
from bestrq.report.result_files import REPORT, read_results, read_transcripts
from bestrq.report.sections import (
    breakdowns_section,
    comparison_section,
    cost_section,
    examples_section,
    provenance_section,
    recordings_section,
    results_section,
)
from bestrq.report.text import percent
from common.errors import UserError
from common.files import write_file

MAX_DETAILED = 6
"""systems of a comparison that are shown in detail, with their recordings"""
NUMBERS, CURVE = "report.json", "curve.svg"


def write_evaluation_report(
    folder: Path, results: dict[str, Any], transcripts: list[dict[str, Any]], audio: Mapping[str, str]
) -> None:
    """Write `report.html` of one evaluation.

    Args:
        results, transcripts: content of `results.json` and `transcripts.jsonl`.
        audio: relative or file URL by recording, for those with audio.
    """
    name = results["name"]
    systems = {name: results}
    total, cost = results["scores"]["all"], results["decoding"]
    setting = setting_of(results)
    lead = (
        f"{name} on {total['num_recordings']:,} recordings of {results['dataset']['name']} "
        f"({results['dataset']['path']}), split {results['dataset']['split']}. "
        f"{setting[:1].upper()}{setting[1:]}. Decoding: {results['decoder']['description']}."
    )
    cards = {"WER": percent(total["wer"])}
    if results["segments"]:
        cards["WER, by segments"] = percent(results["segments"]["all"]["wer"])
    cards |= {"CER": percent(total["cer"]), "Audio": f"{total['seconds'] / 60:,.1f} min"}
    if cost["real_time_factor"] is not None:
        cards["Real-time factor"] = f"{cost['real_time_factor']:.4f}"
    if cost["peak_mb"] is not None:
        cards["Peak memory"] = f"{cost['peak_mb']:,.0f} MB"
    sections = [
        results_section(systems),
        breakdowns_section(systems),
        recordings_section(systems, {name: transcripts}, audio),
        examples_section(systems),
        cost_section(systems, "Speed and memory"),
        provenance_section(systems),
    ]
    write_page(folder / REPORT, f"Evaluation of {name}", lead, cards, sections)


def write_comparison(
    out: Path,
    systems: Mapping[str, Path],
    audio: Mapping[str, str],
    num_resamples: int,
    title: str = "Comparison of recognisers",
) -> dict[str, Any]:
    """Write `report.html` and `report.json` of several evaluations, and `curve.svg` if they have several contexts.

    Args:
        systems: folders that evaluate.py wrote, by the name in the report; the first is the baseline of the others.
        audio: relative or file URL by recording, for those with audio.
        num_resamples: bootstrap resamples.

    Returns:
        Content of `report.json`: "systems", "curves", "comparisons" and "recordings".

    Raises:
        UserError: there are no systems, results are invalid, or recordings or references differ.
    """
    if not systems:
        raise UserError("no evaluation to report on: give folders that evaluate.py wrote")
    results: Results = {name: read_results(folder) for name, folder in systems.items()}
    check_same_references(results)
    detailed = dict(list(results.items())[:MAX_DETAILED])
    comparisons = compare_systems(results, num_resamples)
    curves = context_curves(results)
    numbers = {
        "systems": describe_systems(results),
        "curves": [{"name": name, "points": [point.summary() for point in points]} for name, points in curves.items()],
        "comparisons": comparisons,
        "recordings": recording_rates(results),
    }
    sections = [cost_section(results)]
    if comparisons:
        sections.append(comparison_section(results, comparisons))
    rates = results_section(detailed)
    if len(detailed) < len(results):
        note = paragraph(
            f"This and the following sections show the first {len(detailed)} of {len(results)} evaluations: "
            f"{', '.join(detailed)}. The tables above and {NUMBERS} have all of them.",
            "note",
        )
        rates = Section(rates.title, note + rates.body)
    transcripts = {name: read_transcripts(systems[name]) for name in detailed}
    sections += [
        rates,
        breakdowns_section(detailed),
        recordings_section(detailed, transcripts, audio),
        examples_section(detailed),
        provenance_section(results),
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_page(out / REPORT, title, _lead(results), _cards(results), sections)
    write_file(out / NUMBERS, json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False))
    if has_several_contexts(curves):
        write_file(out / CURVE, context_svg(curves, "WER"))
    else:
        (out / CURVE).unlink(missing_ok=True)  # left by an earlier comparison
    return numbers


def _lead(systems: Results) -> str:
    first = next(iter(systems.values()))
    total = first["scores"]["all"]
    return (
        f"{len(systems)} {'evaluations' if len(systems) > 1 else 'evaluation'} on {total['num_recordings']:,} "
        f"recordings ({total['seconds'] / 60:,.1f} minutes) of {first['dataset']['name']}, split "
        f"{first['dataset']['split']}."
    )


def _cards(systems: Results) -> dict[str, str]:
    """WER of each system if there are at most four, else of the three best."""
    rates = {name: results["scores"]["all"]["wer"] for name, results in systems.items()}
    if len(rates) <= 4:
        return {f"WER, {name}": percent(rate) for name, rate in rates.items()}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    best = sorted(known, key=lambda name: known[name])[:3]
    return {
        f"Lowest WER: {name}" if known[name] == known[best[0]] else f"WER, {name}": percent(known[name])
        for name in best
    }
