"""Report of the gauge: table for the terminal, pictures, gauge.json and one offline page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from bestrq.report.chart_style import image
from bestrq.report.gauge_charts import (
    Example,
    Ints,
    example_chart,
    information_chart,
    joint_chart,
    png_bytes,
    usage_chart,
)
from bestrq.report.page import ELEMENTS, Cell, Column, Section, figure, paragraph, write_page
from common.files import write_file, write_json

NUMBERS, PAGE = "gauge.json", "gauge.html"
FORMAT_VERSION = 1
# Figure, heading on the page, short heading in the terminal, and decimals; percentages have a factor of 100.
_COLUMNS = (
    ("perplexity", "perplexity", "perpl.", 0),
    ("usage", "codes used, %", "used%", 1),
    ("run_ms", "run, ms", "run ms", 0),
    ("repeats", "repeats, %", "rep.%", 1),
    ("silence_entropy_share", "entropy in silence, %", "sil.H%", 1),
    ("pnmi", "PNMI", "PNMI", 3),
    ("pnmi_shuffled", "PNMI, shuffled", "shuffl.", 3),
    ("pnmi_adjusted", "PNMI, adjusted", "adj.", 3),
    ("speech_pnmi_adjusted", "PNMI without pauses, adjusted", "speech", 3),
    ("phone_purity", "phone purity, %", "pur.%", 1),
    ("cluster_purity", "cluster purity, %", "clus.%", 1),
    ("phone_accuracy", "phone accuracy, held out, %", "phone%", 1),
    ("speaker_nmi_adjusted", "speaker NMI, adjusted", "spk NMI", 3),
    ("speaker_accuracy", "speaker identified, %", "spk%", 1),
    ("recording_accuracy", "recording identified, %", "rec.%", 1),
    ("language_nmi_adjusted", "language NMI, adjusted", "lang", 3),
)
_PERCENT = {"usage", "repeats", "silence_entropy_share", "phone_purity", "cluster_purity", "phone_accuracy",
            "speaker_accuracy", "recording_accuracy"}  # fmt: skip
_INTERVALS = {"pnmi_adjusted", "speech_pnmi_adjusted", "speaker_nmi_adjusted", "language_nmi_adjusted"}


@dataclass(frozen=True)
class JudgedCodes:
    """Codes of a target for the pictures, with the labels at its frame rate."""

    codes: Ints
    """[N], first codebook"""
    num_codes: int
    phones: Ints | None
    """[N], or None"""
    symbols: Sequence[str]


def gauge_table(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """Terminal table of the figures, one line per target, with the warnings below."""
    columns = [column for column in _COLUMNS if any(column[0] in row for row in targets.values())]
    width = max(6, *(len(name) for name in targets))
    lines = [f"{'target':<{width}}" + "".join(f"{short:>9}" for _, _, short, _ in columns)]
    for name, row in targets.items():
        lines.append(f"{name:<{width}}" + "".join(f"{_value(row, key, digits):>9}" for key, _, _, digits in columns))
    for name, row in targets.items():
        lines += [f"{name}: {warning}" for warning in row["warnings"]]
    return "\n".join(lines)


def _value(row: Mapping[str, Any], key: str, digits: int) -> str:
    if row.get(key) is None:
        return "-"
    return f"{row[key] * (100 if key in _PERCENT else 1):,.{digits}f}"


def write_gauge(
    folder: str | Path,
    results: Mapping[str, Any],
    judged: Mapping[str, JudgedCodes],
    example: Example,
    title: str = "Pretraining targets",
) -> list[str]:
    """Write gauge.json, the pictures and gauge.html; return the names of the files.

    Args:
        results: "targets" (figures by name), "dataset", "phones" and further settings, as JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    targets = results["targets"]
    pictures = {
        "information.png": png_bytes(information_chart(targets)),
        "usage.png": png_bytes(usage_chart({name: np.bincount(t.codes) for name, t in judged.items()})),
        "example.png": png_bytes(example_chart(example)),
    }
    joint = []
    for number, (name, target) in enumerate(judged.items()):
        if target.phones is not None:
            file = f"phones-{number + 1}.png"
            pictures[file] = png_bytes(joint_chart(target.codes, target.phones, target.symbols))
            alt = f"Share of phones given the code, for the codes of {name}"
            joint.append(figure(name, image("image/png", pictures[file], alt)))
    for file, content in pictures.items():
        write_file(folder / file, content)
    write_json(folder / NUMBERS, {"format_version": FORMAT_VERSION, **results})
    example_body = figure(
        "One recording", image("image/png", pictures["example.png"], "Spectrogram and codes over time", True),
        "Lines and symbols: phones. Strips: codes of the first codebook; equal colours are equal codes.",
    )  # fmt: skip
    information_body = figure(
        "Phones, speakers, languages",
        image("image/png", pictures["information.png"], "Adjusted information by target, in the table", True),
        "Bars: adjusted for chance; 0 is chance, 1 determines the label. Lines: 95 % intervals.",
    )
    usage_body = figure("Codes by frequency", image("image/png", pictures["usage.png"], "Share of each code, sorted"))
    sections = [
        Section("Figures", table(targets) + paragraph("docs/targets.md defines every figure.", "note")),
        Section("Predicted trouble", _warnings(targets)),
        Section("Information", information_body),
        Section("Codes over time", example_body),
        Section("Usage", usage_body),
    ]
    if joint:
        sections.append(Section("Phones of the codes", Markup("").join(joint)))
    cards = {"frames": f"{max(row['frames'] for row in targets.values()):,}", "targets": str(len(targets))}
    if best := [name for name, row in targets.items() if row.get("pnmi_adjusted") is not None]:
        first = max(best, key=lambda name: targets[name]["pnmi_adjusted"])
        cards["most phone information"] = first
    lead = f"Dataset {results['dataset']['name']}. Phones: {results['phones']['origin']}."
    write_page(folder / PAGE, title, lead, cards, sections)
    return [PAGE, NUMBERS, *pictures]


def table(targets: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Sortable table of the figures."""
    shown = [column for column in _COLUMNS if any(column[0] in row for row in targets.values())]
    rows: list[list[Any]] = []
    for name, row in targets.items():
        cells: list[Any] = [name]
        for key, _, _, digits in shown:
            text = _value(row, key, digits)
            if key in _INTERVALS and key in row:
                text += f" ({row[f'{key}_low']:.{digits}f} to {row[f'{key}_high']:.{digits}f})"
            cells.append(Cell(text, row.get(key)))
        rows.append(cells)
    columns = [Column("target", "left"), *(Column(heading) for _, heading, _, _ in shown)]
    return ELEMENTS.table(columns, rows, sortable=True)


def _warnings(targets: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows = [[name, warning] for name, row in targets.items() for warning in row["warnings"]]
    if not rows:
        return paragraph("None.")
    return ELEMENTS.table([Column("target", "left"), Column("warning", "wrap")], rows)
