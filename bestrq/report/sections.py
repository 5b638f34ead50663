"""Sections of a report, from the `results.json` of one or several systems.

Each function computes the values of its template (`templates/`). `reports` combines the sections for an evaluation or a
comparison, `launch/quickstart_report.py` for the quickstart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestrq.report import charts
from bestrq.report.charts import Bin
from bestrq.report.comparison import (
    Results,
    check_same_references,
    context_curves,
    has_several_contexts,
    mode_of,
    setting_of,
    word_rate_differences,
)
from bestrq.report.page import Cell, Column, Section, figure, interval_bar, render
from bestrq.report.text import (
    difference_sentence,
    few_recordings_warning,
    interval,
    language_text,
    number,
    p_text,
    points,
    rate_text,
)
from bestrq.scoring.word_errors import Mark, edit_alignment

Transcripts = Mapping[str, Sequence[Mapping[str, Any]]]
"""lines of `transcripts.jsonl` by system"""

MAX_STRETCH_WORDS = 12
"""correct words per stretch; the script interpolates times within a stretch, which is inaccurate in long ones"""
_BREAKDOWNS: tuple[tuple[str, str, str], ...] = (
    ("durations", "By length of the recording", "length of the recording"),
    ("positions", "By position in the recording", "share of the recording, %"),
    ("edge_distances", "By distance from a window edge", "distance from the nearest window edge, seconds"),
)


def results_section(systems: Results) -> Section:
    """Error rates by language, of whole recordings and by segments; types of errors; distribution over recordings.

    Raises UserError if the systems were evaluated on different recordings.
    """
    check_same_references(systems)
    rates: dict[str, Mapping[str, Any]] = {}
    for name, results in systems.items():
        rates[name] = results["scores"]
        if results.get("segments"):
            rates[f"{name}, by segments"] = results["segments"]
    first = next(iter(rates.values()))
    recording_rates = {
        name: [row["wer"] for row in results["recordings"] if row["wer"] is not None]
        for name, results in systems.items()
    }
    has_distribution = any(len(values) > 1 for values in recording_rates.values())
    totals = {name: results["scores"]["all"] for name, results in systems.items()}
    shares = {name: error_shares(total["words"]) for name, total in totals.items()}
    body = render(
        "results.html",
        rates=rates,
        languages=[language for language in first if not (language == "all" and len(first) == 2)],
        highest=_highest_end(score for scores in rates.values() for score in scores.values()),
        by_segments=len(rates) > len(systems),
        warning=few_recordings_warning(next(iter(systems.values()))),
        distribution=charts.rates_chart("WER per recording", recording_rates, "WER, %") if has_distribution else None,
        kinds=charts.kinds_chart(shares, "words"),
        totals=totals,
    )
    return Section("Results", body)


def cost_section(systems: Results, title: str = "Context and cost") -> Section:
    """Curve of WER over context, and a table of rates and costs with one row per evaluation."""
    curves = context_curves(systems)
    # The names of a sweep's evaluations are their settings, which a column of settings would repeat.
    named_by_setting = all(_slug(setting_of(results)) in _slug(name) for name, results in systems.items())
    columns = [Column("System", "wrap"), *([] if named_by_setting else [Column("Setting", "wrap")]),
               Column("Context, s"), Column("WER, %", "rate"), Column("95 % interval", "range"), Column("", "bar"),
               Column("CER, %", "rate"), Column("RTF"), Column("RTFx"), Column("Peak MB")]  # fmt: skip
    highest = _highest_end(results["scores"]["all"] for results in systems.values())
    rows: list[list[Cell | str]] = []
    for name, results in systems.items():
        total, cost, context = results["scores"]["all"], results["decoding"], results["context_seconds"]
        bounds = total["wer_interval"]
        rows.append([
            name, *([] if named_by_setting else [setting_of(results)]),
            Cell(f"{context:g}" if context else mode_of(results), context or 1e9), _rate_cell(total["wer"]),
            _interval_cell(bounds), interval_bar(total["wer"], bounds, highest), _rate_cell(total["cer"]),
            _number_cell(cost["real_time_factor"], 4), _number_cell(cost["audio_seconds_per_second"]),
            _number_cell(cost["peak_mb"], 0),
        ])  # fmt: skip
    curve = charts.context_chart(curves, "WER") if has_several_contexts(curves) else None
    return Section(title, render("cost.html", curve=curve, columns=columns, rows=rows))


def comparison_section(systems: Results, comparisons: Sequence[Mapping[str, Any]]) -> Section:
    """Differences of the other systems from the first; `comparisons` is the result of `compare_systems`."""
    baseline = next(iter(systems))
    columns = [Column("System", "wrap"), *(column for rate in ("WER", "CER") for column in (
                   Column(f"{rate}, points", "rate"), Column("95 % interval", "range"), Column("P(better)"),
                   Column(f"{rate} reduction, %", "rate"), Column("95 % interval", "range"))),
               Column("MAPSSWE"), Column("Segments"), Column("p")]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for comparison in comparisons:
        wer, cer, matched = comparison["wer"] or {}, comparison["cer"] or {}, comparison["matched_pairs"]
        rows.append([
            comparison["system"], *_difference_cells(wer), *_difference_cells(cer),
            _number_cell(matched["mean_difference"], 3),
            _number_cell(matched["num_segments"], 0), Cell(p_text(matched["p_value"]), matched["p_value"]),
        ])  # fmt: skip
    figures = []
    for comparison in comparisons[:6]:
        differences = word_rate_differences(systems, comparison["system"], baseline)
        if any(differences):
            heading = f"{comparison['system']} minus {baseline}"
            picture = charts.differences_chart(f"WER of {heading}", differences, "WER, points")
            figures.append(figure(heading, picture))
    sentences = [difference_sentence(comparison, rate) for comparison in comparisons[:3] for rate in ("wer", "cer")]
    body = render(
        "differences.html", baseline=baseline, sentences=sentences, columns=columns, rows=rows, figures=figures
    )
    return Section(f"Differences from {baseline}", body)


def breakdowns_section(systems: Results, max_confusions: int = 20) -> Section:
    """Errors by length, position, distance from a window edge and speaker, and the most frequent confusions."""
    charted = []
    for key, title, label in _BREAKDOWNS:
        rates = {name: bin_rates(results[key]) for name, results in systems.items() if results[key]}
        parts = list(
            dict.fromkeys(part for bins in rates.values() for part, bin in bins.items() if bin.rate is not None)
        )
        if len(parts) < 2:
            continue
        bins = {name: [by_part.get(part, Bin(None, None)) for part in parts] for name, by_part in rates.items()}
        rows = [
            [part, *(cell for name in bins for cell in _bin_cells(bins[name][place]))]
            for place, part in enumerate(parts)
        ]
        columns = [Column(label, "left"), *_rate_columns(bins)]
        charted.append((figure(title, charts.bins_chart(title, parts, bins, label)), columns, rows))
    has_speakers = any(len(results["speakers"]) > 1 for results in systems.values())
    confusions = {
        name: {kind: rows[:max_confusions] for kind, rows in results["confusions"].items()}
        for name, results in systems.items()
        if any(results["confusions"].values())
    }
    body = render(
        "breakdowns.html",
        charted=charted,
        speaker_columns=[Column("Speaker", "left"), Column("Minutes"), *_rate_columns(systems)],
        speaker_rows=_speaker_rows(systems) if has_speakers else [],
        confusions=confusions,
        max_confusions=max_confusions,
        several=len(systems) > 1,
    )
    return Section("Error breakdowns", body)


def recordings_section(systems: Results, transcripts: Transcripts, audio: Mapping[str, str]) -> Section:
    """Table of all recordings with their aligned transcripts, for the page's script to sort, search, open and play.

    Args:
        systems: few, since each adds a column, and a line to every transcript.
        audio: relative or file URL by recording, for those with audio.
    """
    several = len(systems) > 1
    first, *others = ({row["id"]: row for row in results["recordings"]} for results in systems.values())
    aligned = {name: {line["id"]: line["alignment"] for line in transcripts[name]} for name in systems}
    has_languages = len({row["language"] for row in first.values()}) > 1
    has_speakers = len({row["speaker"] for row in first.values()}) > 1
    columns = [Column("Recording", "left")]
    columns += [Column("Language", "left")] if has_languages else []
    columns += [Column("Speaker", "left")] if has_speakers else []
    columns += [Column("Minutes"), Column("Words")]
    columns += [Column(f"WER of {name}, %" if several else "WER, %", "rate") for name in systems]
    if not several:
        columns += [Column(title) for title in ("CER, %", "Substitutions", "Deletions", "Insertions")]
    rows, blocks = [], []
    for id, row in first.items():
        cells: list[Cell | str] = [id]
        cells += [language_text(row["language"])] if has_languages else []
        cells += [row["speaker"]] if has_speakers else []
        num_words = row["word_hits"] + row["word_substitutions"] + row["word_deletions"]
        cells += [_number_cell(row["seconds"] / 60, 2), _number_cell(num_words, 0)]
        cells += [_rate_cell(by_id[id]["wer"]) for by_id in (first, *others)]
        if not several:
            cells.append(_rate_cell(row["cer"]))
            kinds = ("word_substitutions", "word_deletions", "word_insertions")
            cells += [_number_cell(row[kind], 0) for kind in kinds]
        rows.append(cells)
        block = {"audio": audio.get(id), "seconds": row["seconds"],
                 "systems": [list(stretches(aligned[name].get(id, []))) for name in systems]}  # fmt: skip
        blocks.append(block)
    body = render(
        "recordings.html", columns=columns, rows=rows, names=list(systems), blocks=blocks, has_audio=bool(audio)
    )
    return Section("Recordings", body)


def stretches(alignment: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """Compact form of an alignment: `[time, text]` for up to MAX_STRETCH_WORDS correct words in a row, and
    `[time, reference, hypothesis]` for an error; the reference of an insertion and the hypothesis of a deletion are "".

    Args:
        alignment: steps `[kind, reference, hypothesis, time]`, kind "=" for a correct word, time in seconds.
    """
    start = 0.0
    words: list[str] = []
    for kind, reference, hypothesis, time in alignment:
        if words and (kind != "=" or len(words) == MAX_STRETCH_WORDS):
            yield [start, " ".join(words)]
            words = []
        if kind == "=":
            start = start if words else round(time, 1)
            words.append(hypothesis)
        else:
            yield [round(time, 1), reference, hypothesis]
    if words:
        yield [start, " ".join(words)]


def examples_section(systems: Results, count: int = 6, max_words: int = 90) -> Section:
    """Example recordings from low to high CER of the first system, with errors marked by colour and text style.

    Args:
        max_words: longer texts are cut after this number of words.
    """
    by_system = {name: {row["id"]: row for row in results["recordings"]} for name, results in systems.items()}
    first = next(iter(systems))
    rows = sorted(
        (row for row in by_system[first].values() if row["reference"]), key=lambda row: (row["cer"], row["id"])
    )
    places = np.linspace(0.1, 0.9, min(count, len(rows))) * (len(rows) - 1)
    examples = []
    for row in {rows[round(place)]["id"]: rows[round(place)] for place in places}.values():
        marked = []
        for name, by_id in by_system.items():
            marks = edit_alignment(row["reference"], by_id[row["id"]]["hypothesis"])
            marked.append((name, by_id[row["id"]]["cer"], cut_marks(marks, max_words)))
        examples.append((row, _shorten(row["reference"], max_words), marked))
    return Section("Examples", render("examples.html", examples=examples, ordered_by=first))


def provenance_section(systems: Results, pretrain: Path | None = None) -> Section:
    """Data, exports, normalisers, versions and command lines."""
    first = next(iter(systems.values()))
    facts = {
        "dataset": f"{first['dataset']['path']}, split {first['dataset']['split']}",
        "dataset fingerprint": first["dataset"]["fingerprint"],
        "feature hash": first["dataset"]["feature_hash"],
    }
    if pretrain is not None:
        facts["pretraining run"] = str(pretrain)
    for name, results in systems.items():
        facts[f"{name}: export"] = f"{results['export']} ({results['export_hash'][:16]})"
        if results["dataset"]["fingerprint"] != first["dataset"]["fingerprint"]:
            facts[f"{name}: dataset"] = f"{results['dataset']['path']} ({results['dataset']['fingerprint']})"
    for name, rules in first["normalisers"].items():
        lines = [
            rules["description"],
            *(f"{rule['pattern']} becomes {rule['replacement']!r}: {rule['reason']}" for rule in rules["rules"]),
        ]
        lines += [rules["note"]] if "note" in rules else []
        facts[f"normaliser {name}"] = "; ".join(lines)
    facts["interval"] = first["scores"]["all"]["interval_method"]
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commands = [results["command"] for results in systems.values()]
    return Section("Provenance", render("provenance.html", facts=facts, commands=commands))


def bin_rates(parts: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Bin]:
    """Rates by part, from `CorpusScore.summary()` by name or a list of `BinScore.summary()`."""
    if isinstance(parts, Mapping):
        return {name: Bin(score["wer"], score["wer_interval"]) for name, score in parts.items()}
    shares = parts[-1]["high"] is not None  # shares of a recording end at 1, distances are unbounded
    return {_bin_name(bin["low"], bin["high"], 100 if shares else 1): Bin(bin["wer"], bin["interval"]) for bin in parts}


def error_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Types of errors as shares of the reference length."""
    length = max(counts["hits"] + counts["substitutions"] + counts["deletions"], 1)
    return {kind: counts[kind] / length for kind in ("substitutions", "deletions", "insertions")}


def cut_marks(marks: Iterable[Mark], max_words: int) -> list[Mark]:
    """First `max_words` words of an alignment, with substitutions split into words; "..." stands for the rest."""
    shown: list[Mark] = []
    room = max_words
    for mark in marks:
        reference, hypothesis = mark.reference.split(), mark.hypothesis.split()
        if mark.kind == "substitute":
            pairs = list(zip(reference, hypothesis, strict=True))
            shown += [Mark(mark.kind, old, new) for old, new in pairs[:room]]
        else:
            shown.append(Mark(mark.kind, " ".join(reference[:room]), " ".join(hypothesis[:room])))
        room -= max(len(reference), len(hypothesis))
        if room <= 0:
            break
    if room < 0:
        shown.append(Mark("equal", "...", "..."))
    return shown


def _shorten(text: str, max_words: int) -> str:
    words = text.split()
    num_left = len(words) - max_words
    return text if num_left <= 0 else f"{' '.join(words[:max_words])} ... ({num_left:,} more words)"


def _slug(text: str) -> str:
    """Text as it appears in the name of a folder."""
    return re.sub(r"[^\w.]+", "-", text)


def _rate_cell(rate: float | None) -> Cell:
    return Cell(rate_text(rate), rate)


def _number_cell(value: float | None, digits: int = 1) -> Cell:
    return Cell(number(value, digits), value)


def _interval_cell(bounds: Sequence[float] | None, signed: bool = False) -> Cell:
    return Cell(interval(bounds, signed), bounds[0] if bounds else None)


def _difference_cells(compared: Mapping[str, Any]) -> list[Cell]:
    """Difference, probability and relative reduction of a `PairedBootstrap`, or dashes."""
    difference = compared.get("difference")
    return [
        Cell(points(difference), difference), _interval_cell(compared.get("interval"), signed=True),
        _number_cell(compared.get("probability_first_better"), 3),
        _rate_cell(compared.get("reduction")), _interval_cell(compared.get("reduction_interval")),
    ]  # fmt: skip


def _bin_cells(bin: Bin) -> list[Cell | str]:
    return [_rate_cell(bin.rate), interval(bin.interval)]


def _bin_name(low: float, high: float | None, scale: float) -> str:
    return f"{scale * low:g} and more" if high is None else f"{scale * low:.3g} to {scale * high:.3g}"


def _rate_columns(systems: Iterable[str]) -> list[Column]:
    return [
        column for name in systems for column in (Column(f"WER of {name}, %", "rate"), Column("95 % interval", "range"))
    ]


def _speaker_rows(systems: Results) -> list[list[Cell | str]]:
    """One row per speaker that any of the systems has."""
    rows: list[list[Cell | str]] = []
    for speaker in sorted({speaker for results in systems.values() for speaker in results["speakers"]}):
        scores = [results["speakers"].get(speaker, {}) for results in systems.values()]
        row: list[Cell | str] = [speaker or "unknown", _number_cell(scores[0].get("seconds", 0.0) / 60)]
        for score in scores:
            row += [_rate_cell(score.get("wer")), interval(score.get("wer_interval"))]
        rows.append(row)
    return rows


def _highest_end(scores: Iterable[Mapping[str, Any]]) -> float:
    """Largest WER or upper end of its interval: the scale of `interval_bar`."""
    ends = [end for score in scores for end in (score["wer"], *(score["wer_interval"] or ())) if end is not None]
    return max(ends, default=1.0)
