"""All recordings in one table, each with its aligned transcript: what a reader sorts, searches, opens and listens to.

A transcript is compact JSON in an element of its own, which `report.js` parses when it is first wanted: a page of a
hundred hours stays quick.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bestrq.report import report, tables
from bestrq.report.comparison import Results
from bestrq.report.tables import Cell, Column, language_text

Transcripts = Mapping[str, Sequence[Mapping[str, Any]]]
"""lines of `transcripts.jsonl` by system"""

LONGEST = 12
"""words of a stretch without an error: a place within one is found by its share of the letters"""


def recordings_section(systems: Results, transcripts: Transcripts, audio: Mapping[str, str]) -> report.Section:
    """A row a recording, and the alignment of every system.

    Args:
        systems: a few; each costs a column, and a line of the transcripts.
        audio: a relative or file URL by recording, where there is one.
    """
    several = len(systems) > 1
    first, *others = ({row["id"]: row for row in results["recordings"]} for results in systems.values())
    aligned = {name: {one["id"]: one["alignment"] for one in transcripts[name]} for name in systems}
    languages = {row["language"] for row in first.values()}
    speakers = {row["speaker"] for row in first.values()}
    columns = [Column("Recording", "left")]
    columns += [Column("Language", "left")] if len(languages) > 1 else []
    columns += [Column("Speaker", "left")] if len(speakers) > 1 else []
    columns += [Column("Minutes"), Column("Words")]
    columns += [Column(f"WER of {name}, %" if several else "WER, %", "rate") for name in systems]
    if not several:
        columns += [Column(head) for head in ("CER, %", "Substituted", "Deleted", "Inserted")]
    rows, blocks = [], []
    for id, row in first.items():
        cells: list[Cell | str] = [id]
        cells += [language_text(row["language"])] if len(languages) > 1 else []
        cells += [row["speaker"]] if len(speakers) > 1 else []
        length = row["word_hits"] + row["word_substitutions"] + row["word_deletions"]
        cells += [tables.number_cell(row["seconds"] / 60, 2), tables.number_cell(length, 0)]
        cells += [tables.rate_cell(one[id]["wer"]) for one in (first, *others)]
        if not several:
            cells.append(tables.rate_cell(row["cer"]))
            kinds = ("word_substitutions", "word_deletions", "word_insertions")
            cells += [tables.number_cell(row[kind], 0) for kind in kinds]
        rows.append(cells)
        block = {"audio": audio.get(id), "seconds": row["seconds"],
                 "systems": [list(stretches(aligned[name].get(id, []))) for name in systems]}  # fmt: skip
        blocks.append(report.json_block(block, "transcript-data"))
    body = tables.table(
        columns, rows, sortable=True, attributes=({"data-place": str(place)} for place in range(len(rows))), tall=True
    )
    hint = "Open a recording to read its transcript with the errors marked"
    hint += " and to listen to them." if audio else "."
    without = "Sorting, searching and opening want JavaScript; without it the table is as it stands here."
    body = (
        report.paragraph(hint, "note")
        + f"<noscript>{report.paragraph(without, 'note')}</noscript>"
        + f'<div class="recordings">{body}\n{report.json_block(list(systems), "system-names")}\n'
        + "\n".join(blocks)
        + "</div>"
    )
    return report.Section("Recordings", body)


def stretches(alignment: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """An alignment in few pieces: `[time, text]` for up to LONGEST right words in a row, `[time, said, heard]` for an
    error, of which an empty side makes an insertion or a deletion.

    Args:
        alignment: steps `[kind, reference, hypothesis, time]`, kind "=" for a word that is right, time in seconds.
    """
    start = 0.0
    words: list[str] = []
    for kind, said, heard, time in alignment:
        if words and (kind != "=" or len(words) == LONGEST):
            yield [start, " ".join(words)]
            words = []
        if kind == "=":
            start = start if words else round(time, 1)
            words.append(heard)
        else:
            yield [round(time, 1), said, heard]
    if words:
        yield [start, " ".join(words)]
