"""The pages of evaluations: one for an evaluation by itself, one for several beside each other."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bestrq.report import curves, report
from bestrq.report.comparison import (
    Results,
    check_same_references,
    compare_systems,
    context_curves,
    describe_systems,
    is_curve,
    recording_rates,
    setting_of,
)
from bestrq.report.recording_table import recordings_section
from bestrq.report.results import REPORT, read_results, read_transcripts
from bestrq.report.sections import (
    breakdowns_section,
    cells_section,
    comparison_section,
    facts_section,
    results_section,
    transcripts_section,
)
from bestrq.report.tables import percent
from common.errors import UserError
from common.files import write_file

SHOWN = 6
"""systems whose recordings and transcripts stand beside each other"""
NUMBERS, CURVE = "report.json", "curve.svg"


def write_cell_page(
    folder: Path, results: dict[str, Any], transcripts: list[dict[str, Any]], audio: Mapping[str, str]
) -> None:
    """Write `report.html` of one evaluation.

    Args:
        results, transcripts: what `results.json` and `transcripts.jsonl` hold.
        audio: a relative or file URL by recording; empty where there is none to listen to.
    """
    name = results["name"]
    systems = {name: results}
    total, cost = results["scores"]["all"], results["decoding"]
    lead = (
        f"{name} on {total['num_recordings']:,} recordings of {results['dataset']['name']} "
        f"({results['dataset']['path']}), split {results['dataset']['split']}. "
        f"{_capital(setting_of(results))}. Decoding: {results['decoder']['description']}."
    )
    cards = {"WER": percent(total["wer"])}
    if results["segments"]:
        cards["WER, by segments"] = percent(results["segments"]["all"]["wer"])
    cards |= {
        "CER": percent(total["cer"]),
        "Audio": f"{total['seconds'] / 60:,.1f} min",
    }
    if cost["real_time_factor"] is not None:
        cards["Real-time factor"] = f"{cost['real_time_factor']:.4f}"
    if cost["peak_mb"] is not None:
        cards["Peak memory"] = f"{cost['peak_mb']:,.0f} MB"
    sections = [
        results_section(systems),
        breakdowns_section(systems),
        recordings_section(systems, {name: transcripts}, audio),
        transcripts_section(systems),
        cells_section(systems, "Speed and memory"),
        facts_section(systems),
    ]
    report.write_report(folder / REPORT, f"Evaluation of {name}", lead, cards, sections)


def write_comparison(
    out: Path,
    systems: Mapping[str, Path],
    audio: Mapping[str, str],
    num_resamples: int,
    title: str = "Comparison of recognisers",
) -> dict[str, Any]:
    """Write `report.html`, `report.json` and, where there are two contexts or more, `curve.svg` of several evaluations.

    Args:
        systems: folders that evaluate.py wrote, by the name that each is called; the others are compared to the first.
        audio: a relative or file URL by recording; empty where there is none to listen to.
        num_resamples: of the bootstrap.

    Returns:
        What `report.json` holds: "systems", "curves", "comparisons" and "recordings".

    Raises:
        UserError: nothing to compare, results that cannot be read, other recordings or references.
    """
    if not systems:
        raise UserError("there is no evaluation to report on: give folders that evaluate.py wrote")
    found: Results = {name: read_results(folder) for name, folder in systems.items()}
    check_same_references(found)
    shown = dict(list(found.items())[:SHOWN])
    comparisons = compare_systems(found, num_resamples)
    lines = context_curves(found)
    numbers = {
        "systems": describe_systems(found),
        "curves": [{"name": name, "points": [one.summary() for one in points]} for name, points in lines.items()],
        "comparisons": comparisons,
        "recordings": recording_rates(found),
    }
    sections = [cells_section(found)]
    if comparisons:
        sections.append(comparison_section(found, comparisons))
    sections += _of_few(shown, len(found))
    transcripts = {name: read_transcripts(systems[name]) for name in shown}
    sections += [recordings_section(shown, transcripts, audio), transcripts_section(shown), facts_section(found)]
    out.mkdir(parents=True, exist_ok=True)
    report.write_report(out / REPORT, title, _lead(found), _cards(found), sections)
    write_file(out / NUMBERS, json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False))
    if is_curve(lines):
        write_file(out / CURVE, curves.context_svg(lines, "WER"))
    else:
        (out / CURVE).unlink(missing_ok=True)  # that of an earlier comparison
    return numbers


def _of_few(shown: Results, num_systems: int) -> list[report.Section]:
    """Sections that have room for a few systems, and say so where there are more."""
    sections = [results_section(shown), breakdowns_section(shown)]
    if num_systems == len(shown):
        return sections
    note = report.paragraph(
        f"From here on the first {len(shown)} of {num_systems} evaluations: {', '.join(shown)}. "
        f"All of them are in the tables above and in {NUMBERS}.",
        "note",
    )
    return [report.Section(sections[0].title, note + sections[0].body), *sections[1:]]


def _lead(systems: Results) -> str:
    first = next(iter(systems.values()))
    total = first["scores"]["all"]
    return (
        f"{len(systems)} {'evaluations' if len(systems) > 1 else 'evaluation'} on {total['num_recordings']:,} "
        f"recordings, {total['seconds'] / 60:,.1f} minutes, of {first['dataset']['name']}, split "
        f"{first['dataset']['split']}."
    )


def _cards(systems: Results) -> dict[str, str]:
    """A few systems by name, of many the best."""
    rates = {name: results["scores"]["all"]["wer"] for name, results in systems.items()}
    if len(rates) <= 4:
        return {f"WER, {name}": percent(rate) for name, rate in rates.items()}
    known: Sequence[str] = [name for name, rate in rates.items() if rate is not None]
    best = sorted(known, key=lambda name: rates[name] or 0.0)[:3]
    return {
        f"Lowest WER: {name}" if rates[name] == rates[best[0]] else f"WER, {name}": percent(rates[name])
        for name in best
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
