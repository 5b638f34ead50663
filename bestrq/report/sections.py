"""The sections of a report that show results: from `results.json` of one or several systems.

`pages` puts them together for an evaluation or a comparison, `launch/quickstart_report.py` for the quickstart.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestrq.report import charts, curves, report, tables
from bestrq.report.comparison import (
    Results,
    check_same_references,
    context_curves,
    difference_sentence,
    is_curve,
    mode_of,
    p_text,
    setting_of,
    word_rate_differences,
    words_in_few_recordings,
)
from bestrq.report.curves import Bin
from bestrq.report.tables import Cell, Column

INTERVALS = "Intervals: 95 %, from resampling whole recordings."
HOLLOW = "Hollow marks: too few recordings for an interval."
_PARTS: tuple[tuple[str, str, str], ...] = (
    ("durations", "By length of the recording", "length of the recording"),
    ("positions", "By position in the recording", "share of the recording, %"),
    ("edge_distances", "By distance from a window's edge", "distance from the nearest edge, seconds"),
)


def results_section(systems: Results) -> report.Section:
    """Rates by language, as whole recordings and by segments, kinds of errors, and where the errors sit.

    Raises UserError where the systems were evaluated on different recordings.
    """
    check_same_references(systems)
    rates: dict[str, Mapping[str, Any]] = {}
    for name, results in systems.items():
        rates[name] = results["scores"]
        if results.get("segments"):
            rates[f"{name}, by segments"] = results["segments"]
    body = tables.headline_table(rates)
    note = f"Errors of the whole corpus over its reference words (WER) and characters (CER). {INTERVALS}"
    if len(rates) > len(systems):
        note += (
            " By segments: words are aligned within the segments of the STM file; otherwise a recording is one text, "
            "from which the words in ignored segments are left out."
        )
    body += report.paragraph(f"{note} The bar shows the WER and its interval.", "note")
    if few := words_in_few_recordings(next(iter(systems.values()))):
        body += report.paragraph(few, "note")
    of_recordings = {
        name: [row["wer"] for row in results["recordings"] if row["wer"] is not None]
        for name, results in systems.items()
    }
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    figures = [
        report.figure(
            "Kinds of errors",
            charts.kinds_chart({name: error_shares(total["words"]) for name, total in totals.items()}, "words"),
            "A model that has learnt little mostly deletes.",
        )
    ]
    if any(len(values) > 1 for values in of_recordings.values()):
        picture = charts.rates_chart("WER of the recordings", of_recordings, "WER, %")
        caption = "Each recording by itself; further to the left is better."
        figures.insert(0, report.figure("WER of the recordings", picture, caption))
    return report.Section("Results", body + report.chart_grid(figures) + tables.error_table(totals))


def cells_section(systems: Results, title: str = "Context and cost") -> report.Section:
    """The curve of WER over context, and a row of rates and costs for every evaluation."""
    lines, body = context_curves(systems), ""
    if is_curve(lines):
        caption = f"{INTERVALS} Bars show them; lines are a little apart so that none hides another."
        picture = report.figure("WER against context", curves.context_chart(lines, "WER"), caption)
        body += f'<div class="curve">{picture}</div>'
    # The evaluations of one grid are called by their settings already.
    named = all(_slug(setting_of(results)) in _slug(name) for name, results in systems.items())
    settings = [] if named else [Column("Setting", "wrap")]
    columns = [Column("System", "wrap"), *settings, Column("Context, s"), Column("WER, %", "rate"),
               Column("95 % interval", "range"), Column("", "bar"), Column("CER, %", "rate"),
               Column("RTF"), Column("Audio-s/s"), Column("Peak MB")]  # fmt: skip
    highest = tables.highest_end(results["scores"]["all"] for results in systems.values())
    rows: list[list[Cell | str]] = []
    for name, results in systems.items():
        total, cost, context = results["scores"]["all"], results["decoding"], results["context_seconds"]
        bounds, bar = total["wer_interval"], tables.interval_bar(total["wer"], total["wer_interval"], highest)
        rows.append([
            name, *([] if named else [setting_of(results)]), Cell(short_context(results), context or 1e9),
            tables.rate_cell(total["wer"]), Cell(tables.interval(bounds), bounds and bounds[0]), Cell("", None, bar),
            tables.rate_cell(total["cer"]), tables.number_cell(cost["real_time_factor"], 4),
            tables.number_cell(cost["audio_seconds_per_second"]), tables.number_cell(cost["peak_mb"], 0),
        ])  # fmt: skip
    body += tables.table(columns, rows, sortable=True)
    note = (
        "RTF: real-time factor, seconds of decoding for a second of audio; audio-s/s: its inverse. Peak MB: memory of "
        "decoding, above that before it (the model's weights). "
        "Times compare only where the evaluations ran on the same machine with nothing beside them."
    )
    return report.Section(title, body + report.paragraph(note, "note"))


def comparison_section(systems: Results, comparisons: Sequence[Mapping[str, Any]]) -> report.Section:
    """How the others differ from the first system; `comparisons` are of `comparison.compare_systems`."""
    first = next(iter(systems))
    columns = [Column("System", "wrap"), Column("WER, points", "rate"), Column("95 % interval", "range"),
               Column("P(better)"), Column("CER, points", "rate"), Column("95 % interval", "range"),
               Column("MAPSSWE"), Column("Segments"), Column("p")]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for one in comparisons:
        wer, cer, matched = one["wer"] or {}, one["cer"] or {}, one["matched_pairs"]
        rows.append([
            one["system"], *_difference_cells(wer), tables.number_cell(wer.get("probability_first_better"), 3),
            *_difference_cells(cer), tables.number_cell(matched["mean_difference"], 3),
            tables.number_cell(matched["num_segments"], 0), Cell(p_text(matched["p_value"]), matched["p_value"]),
        ])  # fmt: skip
    note = (
        f"Each system less {first}, on the same recordings: negative is better than {first}. Intervals: 95 %, from "
        "resampling whole recordings for both systems together (studentised); P(better) is the share of plain "
        "resamples in which the system has fewer word errors. MAPSSWE: matched pairs sentence-segment word error test, "
        "the mean difference of errors in a segment, the number of segments and the two-sided p; it takes segments as "
        "independent, which those of one recording are not quite. With many systems, some p is small by chance."
    )
    figures = []
    for one in comparisons[:6]:
        if any(values := word_rate_differences(systems, one["system"], first)):
            heading = f"{one['system']} less {first}"
            picture = curves.differences_chart(f"WER of {heading}", values, "WER, points")
            figures.append(report.figure(heading, picture))
    sentences = [report.paragraph(difference_sentence(one)) for one in comparisons[:3]]
    body = "".join(sentences) + tables.table(columns, rows, sortable=len(rows) > 1) + report.paragraph(note, "note")
    return report.Section(f"Differences to {first}", body + report.chart_grid(figures))


def breakdowns_section(systems: Results) -> report.Section:
    """Where the errors sit: length, position, distance from an edge, speaker, confusions."""
    figures = []
    for key, title, label in _PARTS:
        parts = {name: parts_of(results[key]) for name, results in systems.items() if results[key]}
        names = list(
            dict.fromkeys(name for bins in parts.values() for name, part in bins.items() if part.rate is not None)
        )
        if len(names) < 2:
            continue
        bins = {name: [mine.get(part, Bin(None, None)) for part in names] for name, mine in parts.items()}
        rows = [
            [part, *(cell for name in bins for cell in _bin_cells(bins[name][place]))]
            for place, part in enumerate(names)
        ]
        columns = [Column(label, "left")]
        for name in bins:
            columns += [Column(f"WER of {name}, %", "rate"), Column("95 % interval", "range")]
        numbers = report.details("As a table", tables.table(columns, rows))
        figures.append(report.figure(title, curves.bins_chart(title, names, bins, label)) + numbers)
    body = report.chart_grid([f"<div>{one}</div>" for one in figures]) if figures else ""
    if figures:
        body = report.paragraph(f"WER of parts of the recordings. {INTERVALS} {HOLLOW}", "note") + body
    if any(len(results["speakers"]) > 1 for results in systems.values()):
        body += "<h3>By speaker</h3>" + _speakers_table(systems)
    return report.Section("Where the errors sit", body + _confusions(systems))


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
    return report.Section("Examples", intro + report.transcripts(samples))


def facts_section(systems: Results, pretrain: Path | None = None) -> report.Section:
    """Data, exports, normalisers, versions and command lines."""
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
        if results["dataset"]["fingerprint"] != first["dataset"]["fingerprint"]:
            values[f"{name}: dataset"] = f"{results['dataset']['path']} ({results['dataset']['fingerprint']})"
    for name, rules in first["normalisers"].items():
        lines = [
            rules["description"],
            *(f"{rule['pattern']} becomes {rule['replacement']!r}: {rule['reason']}" for rule in rules["rules"]),
        ]
        lines += [rules["note"]] if "note" in rules else []
        values[f"normaliser {name}"] = "; ".join(lines)
    values["interval"] = first["scores"]["all"]["interval_method"]
    values["versions"] = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    body = report.facts(values) + report.commands([results["command"] for results in systems.values()])
    return report.Section("How it was made", body)


def _slug(text: str) -> str:
    """As in a folder's name."""
    return re.sub(r"[^\w.]+", "-", text)


def short_context(results: Mapping[str, Any]) -> str:
    """Seconds of context for a table."""
    return f"{results['context_seconds']:g}" if results["context_seconds"] else mode_of(results)


def parts_of(parts: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Bin]:
    """Rates by the name of the part: from `CorpusScore.summary()` by name, or a list of `BinScore.summary()`."""
    if isinstance(parts, Mapping):
        return {name: Bin(one["wer"], one["wer_interval"]) for name, one in parts.items()}
    shares = parts[-1]["high"] is not None  # of the recording; distances have no end
    return {_bin_name(one["low"], one["high"], 100 if shares else 1): Bin(one["wer"], one["interval"]) for one in parts}


def error_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Kinds of errors over the length of the references."""
    length = max(counts["hits"] + counts["substitutions"] + counts["deletions"], 1)
    return {kind: counts[kind] / length for kind in ("substitutions", "deletions", "insertions")}


def _difference_cells(compared: Mapping[str, Any]) -> list[Cell | str]:
    bounds = compared.get("interval")
    return [Cell(tables.points(compared.get("difference")), compared.get("difference")),
            Cell(tables.interval(bounds, signed=True), bounds and bounds[0])]  # fmt: skip


def _bin_cells(part: Bin) -> list[Cell | str]:
    return [tables.rate_cell(part.rate), tables.interval(part.interval)]


def _bin_name(low: float, high: float | None, scale: float) -> str:
    return f"{scale * low:g} and more" if high is None else f"{scale * low:.3g} to {scale * high:.3g}"


def _speakers_table(systems: Results) -> str:
    """A row a speaker, the widest table only as far as speakers are known."""
    names = sorted({speaker for results in systems.values() for speaker in results["speakers"]})
    columns = [Column("Speaker", "left"), Column("Minutes")]
    for name in systems:
        columns += [Column(f"WER of {name}, %", "rate"), Column("95 % interval", "range")]
    rows: list[list[Cell | str]] = []
    for speaker in names:
        there = [results["speakers"].get(speaker, {}) for results in systems.values()]
        row: list[Cell | str] = [speaker or "not known", tables.number_cell(there[0].get("seconds", 0.0) / 60)]
        for one in there:
            row += [tables.rate_cell(one.get("wer")), tables.interval(one.get("wer_interval"))]
        rows.append(row)
    return tables.table(columns, rows, sortable=True, tall=len(rows) > 15)


def _confusions(systems: Results, most: int = 20) -> str:
    """The most frequent errors, kinds side by side, systems under each other."""
    blocks = []
    for name, results in systems.items():
        lists = []
        for kind, heads in (("substitutions", ("Said", "Heard")), ("deletions", ("Deleted",)),
                            ("insertions", ("Inserted",))):  # fmt: skip
            rows = results["confusions"][kind][:most]
            columns = [*(Column(head, "left") for head in heads), Column("Times")]
            if rows:
                lists.append(tables.table(columns, [[*row[:-1], tables.number_cell(row[-1], 0)] for row in rows]))
        if lists:
            blocks.append((name, f'<div class="lists">{"".join(f"<div>{one}</div>" for one in lists)}</div>'))
    if not blocks:
        return ""
    shown = "".join(
        report.details(f"{name}: the {most} most frequent of each kind", body) if place else body
        for place, (name, body) in enumerate(blocks)
    )
    title = "Most frequent confusions" + (f" of {blocks[0][0]}" if len(systems) > 1 else "")
    return f"<h3>{html.escape(title)}</h3>{shown}"
