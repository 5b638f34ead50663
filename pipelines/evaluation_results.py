"""Scores, breakdowns and result files of an evaluation."""

import csv
import fcntl
import hashlib
import importlib.metadata
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bestrq.long_form.windows import plan_windows
from bestrq.report.result_files import FORMAT_VERSION, RESULTS, SCORING, TABLE, TRANSCRIPTS
from bestrq.scoring.breakdowns import (
    AlignedWord,
    align_timed,
    by_duration,
    by_edge_distance,
    by_position,
    by_speaker,
    confusions,
)
from bestrq.scoring.normalisers import RULES_VERSION, normalisers_used
from bestrq.scoring.stm import (
    ReferenceSegment,
    score_as_whole,
    score_by_segments,
    words_outside_ignored,
)
from bestrq.scoring.word_errors import CorpusScore, RecordingScore, score_by_language, score_recording
from bestrq.transcripts.formats import WRITERS, TimedTranscript
from bestrq.transcripts.subtitles import SubtitleSettings
from bestrq.transcripts.words import TimedWord
from common.config import to_dict
from common.errors import UserError
from common.files import write_file
from data.format.dataset import Dataset
from data.word_times.stm import StmSegment, plain_text, read_stm
from pipelines.evaluation_settings import Config, Evaluation, stm_files

KINDS = {"hit": "=", "substitution": "S", "deletion": "D", "insertion": "I"}


def read_segments(stm: str, ids: Sequence[str]) -> dict[str, list[ReferenceSegment]]:
    """Segments of each recording, sorted by time; empty without an STM.

    A file with a single recording is matched by its file name, because names within some files of TED-LIUM differ from
    it; otherwise segments are matched by the recording's name within any file. Raises UserError for a recording without
    segments or an invalid file.
    """
    by_file: dict[str, list[StmSegment]] = {}
    by_recording: dict[str, list[StmSegment]] = {}
    for path in stm_files(stm):
        segments = read_stm(path)
        for segment in segments:
            by_recording.setdefault(segment.recording, []).append(segment)
        if len({segment.recording for segment in segments}) == 1:
            by_file[path.stem] = segments
    by_recording |= by_file
    missing = [id for id in ids if id not in by_recording]
    if stm and missing:
        raise UserError(
            f"stm = {stm}: no segments of {len(missing)} of {len(ids)} recordings, such as {missing[0]!r}: "
            "give the STM of this split"
        )
    return {
        id: [
            ReferenceSegment(s.start, s.end, plain_text(s.text), s.speaker, s.ignored, s.channel)
            for s in sorted(by_recording[id], key=lambda s: (s.start, s.end))
        ]
        for id in (ids if stm else ())
    }


@dataclass(frozen=True)
class ScoredRecording:
    """Hypothesis of a recording, its scores, and its alignment with the reference."""

    transcript: TimedTranscript
    score: RecordingScore
    by_segments: RecordingScore | None
    """score with words aligned only within the segments of an STM; None without an STM"""
    alignment: list[AlignedWord]
    edges: list[float]
    """boundaries between windows, in seconds"""

    def line(self) -> str:
        """Line of transcripts.jsonl."""
        aligned = [[KINDS[w.kind], w.reference, w.hypothesis, round(w.time, 3)] for w in self.alignment]
        return json.dumps({**line_of(self.transcript), "alignment": aligned}, ensure_ascii=False) + "\n"


def line_of(transcript: TimedTranscript) -> dict[str, Any]:
    """JSON object of a transcript; inverse of `transcript_of`."""
    words = [
        [w.word, round(w.start, 3), round(w.end, 3), None if w.confidence is None else round(w.confidence, 4)]
        for w in transcript.words
    ]
    return {"id": transcript.id, "seconds": round(transcript.seconds, 3), "text": transcript.text, "words": words}


def transcript_of(line: Mapping[str, Any]) -> TimedTranscript:
    """Transcript of a JSON object; inverse of `line_of`."""
    return TimedTranscript(line["id"], line["seconds"], line["text"], [TimedWord(*word) for word in line["words"]])


def evaluate_recording(
    dataset: Dataset, recording: int, hypothesis: TimedTranscript, segments: Sequence[ReferenceSegment] | None,
    edges: list[float],
) -> ScoredRecording:  # fmt: skip
    """Score and align the transcript of a recording; with segments, score it by segment too."""
    id, language, speaker = dataset.id(recording), dataset.language(recording), dataset.speaker(recording)
    seconds = int(dataset.frames[recording]) / dataset.features.frames_per_second
    if segments is None:
        text = dataset.text(recording) or ""
        score = score_recording(id, text, hypothesis.text, language, seconds, speaker)
        by_segments = None
    else:
        text = " ".join(segment.text for segment in segments if not segment.ignored)
        score = score_as_whole(id, segments, hypothesis.words, language, seconds)
        by_segments = score_by_segments(id, segments, hypothesis.words, language, seconds)
    # Times of errors come from the reference words if they have times, else from the segments, else from the hypothesis
    # words aligned next to an error.
    timed = dataset.words(recording) or ()  # an entry may be a whole utterance: see data/shards/join.py
    reference = [word for entry in timed for word in spread_words(entry.word, entry.start, entry.end)]
    if " ".join(word.word for word in reference) != text:
        kept = [segment for segment in segments or () if not segment.ignored]
        reference = [word for segment in kept for word in spread_words(segment.text, segment.start, segment.end)]
    words = words_outside_ignored(segments or (), hypothesis.words)
    return ScoredRecording(
        hypothesis, score, by_segments, align_timed(reference or text, words, language, seconds), edges
    )


def spread_words(text: str, start: float, end: float) -> list[TimedWord]:
    """Words of a text, spread evenly from `start` to `end` (s); one word has exactly these times."""
    words = text.split()
    if len(words) == 1:
        return [TimedWord(words[0], start, end)]
    width = (end - start) / max(len(words), 1)
    return [TimedWord(w, start + k * width, start + (k + 1) * width) for k, w in enumerate(words)]


def window_edges(num_frames: int, evaluation: Evaluation, stride: int, frames_per_second: float) -> list[float]:
    """Times in seconds at which the output switches to the next window; for averaged windows, their starts and ends."""
    context = evaluation.inference.context(stride, frames_per_second)
    windows = plan_windows(num_frames, context, evaluation.inference.overlap, stride)
    if evaluation.inference.mode == "averaged":
        ends = {window.start for window in windows[1:]} | {window.stop for window in windows[:-1]}
        return [end / frames_per_second for end in sorted(ends)]
    return [window.keep_stop * stride / frames_per_second for window in windows[:-1]]


def describe(
    config: Config, evaluation: Evaluation, description: str, dataset: Dataset, scored: Sequence[ScoredRecording],
    cost: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Content of results.json.

    Args:
        description: of the decoder.
        cost: time and memory of decoding.
    """
    scores = [recording.score for recording in scored]
    by_segments = [recording.by_segments for recording in scored if recording.by_segments is not None]
    with_lengths = [(recording.alignment, recording.transcript.seconds) for recording in scored]
    with_edges = [(recording.alignment, recording.edges) for recording in scored]
    has_edges = any(edges for _, edges in with_edges)
    distances = by_edge_distance(with_edges, num_resamples=config.resamples) if has_edges else []
    return {
        "format_version": FORMAT_VERSION,
        "key": evaluation.key,
        "decode_key": evaluation.decode_key,
        "name": evaluation.name,
        "label": evaluation.label,
        "context_seconds": evaluation.context_seconds,
        "export": evaluation.export,
        "export_hash": evaluation.export_hash,
        "dataset": {
            "name": dataset.name,
            "path": config.data.dataset,
            "split": config.data.split,
            "fingerprint": dataset.fingerprint,
            "feature_hash": dataset.features.hash(),
        },
        "inference": to_dict(evaluation.inference),
        "encoder": to_dict(evaluation.encoder),
        "decoder": {**to_dict(evaluation.decoder), "description": description},
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("torch", "jiwer", "whisper-normalizer")},
            SCORING: RULES_VERSION,
        },
        "decoding": dict(cost),
        "scores": summaries(score_by_language(scores, config.resamples)),
        "segments": summaries(score_by_language(by_segments, config.resamples)) if by_segments else None,
        "speakers": summaries(by_speaker(scores, config.resamples)),
        "durations": summaries(by_duration(scores, num_resamples=config.resamples)),
        "positions": [part.summary() for part in by_position(with_lengths, num_resamples=config.resamples)],
        "edge_distances": [part.summary() for part in distances],
        "confusions": asdict(confusions(scores)),
        "normalisers": normalisers_used((score.normaliser, score.language) for score in scores),
        "recordings": [score.row() for score in scores],
    }


def summaries(scores: Mapping[str, CorpusScore]) -> dict[str, Any]:
    """JSON objects of scores, by name."""
    return {name: score.summary() for name, score in scores.items()}


def write_results(folder: Path, results: dict[str, Any], scored: Sequence[ScoredRecording]) -> None:
    """Write results.csv, transcripts.jsonl and, last, results.json, which marks the evaluation as finished."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(results["recordings"][0]))
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in results["recordings"])
    write_file(folder / TABLE, table.getvalue())
    write_file(folder / TRANSCRIPTS, "".join(recording.line() for recording in scored))
    write_summary(folder, results)


def _cell(value: Any) -> Any:
    """Cell of a CSV file; a text that a spreadsheet would compute as a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_summary(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    write_file(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))


def row_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Row of rows.jsonl: settings, versions, cost and corpus scores, without texts."""
    kept = (
        "key", "name", "label", "context_seconds", "export", "export_hash", "dataset", "inference", "encoder",
        "decoder", "command", "versions", "decoding",
    )  # fmt: skip
    return {"time": datetime.now(UTC).isoformat(timespec="seconds")} | {
        **{name: results[name] for name in kept},
        "scores": results["scores"]["all"],
        "segments": results["segments"] and results["segments"]["all"],
    }


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to rows.jsonl unless it has a row with this key. The file is locked, since array jobs share it.

    If the file cannot be written, a note is printed: results do not depend on it.
    """
    try:
        with open(path, "a+", encoding="utf-8", errors="backslashreplace") as file:
            with suppress(OSError):  # some shared file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if not any(f'"key": "{row["key"]}"' in line for line in file):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        print(f"note: cannot add a row to {path}: {error}", file=sys.stderr)


def write_formats(folder: Path, lines: Sequence[Mapping[str, Any]], formats: Sequence[str]) -> None:
    """Write the transcript of each recording, a line of transcripts.jsonl, in each of the formats."""
    for transcript in [transcript_of(line) for line in lines if formats]:
        for form in formats:
            path = folder / "transcripts" / f"{file_name(transcript.id)}.{form}"
            path.parent.mkdir(exist_ok=True)
            write_file(path, WRITERS[form](transcript, SubtitleSettings()))


def file_name(id: str) -> str:
    """File name for a recording id: invalid characters are percent-encoded; a long name ends in a hash of the id."""
    name = "".join(c if c.isprintable() and c not in "/\\%" else quote(c, safe="") for c in id)
    if len(name.encode()) <= 200 and name not in (".", ".."):
        return name
    return name.encode()[:150].decode(errors="ignore") + "-" + hashlib.sha256(id.encode()).hexdigest()[:16]
