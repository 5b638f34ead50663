"""What is said of an evaluation: scores, breakdowns, files. Pure functions of the dataset and of what was heard."""

import importlib.metadata
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from bestrq.long_form.windows import plan_windows
from bestrq.report.result_files import FORMAT_VERSION, SCORING
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
from bestrq.transcripts.formats import TimedTranscript
from bestrq.transcripts.words import TimedWord
from common.config import to_dict
from common.errors import UserError
from data.format.dataset import Dataset
from data.word_times.stm import StmSegment, plain_text, read_stm
from pipelines.evaluation import Cell, Config, stm_files

KINDS = {"hit": "=", "substitution": "S", "deletion": "D", "insertion": "I"}


def read_segments(stm: str, ids: Sequence[str]) -> dict[str, list[ReferenceSegment]]:
    """Segments of every recording, in the order of time; empty without an STM.

    A recording's are those of the file of its name where that holds one recording (in TED-LIUM, names within differ
    from some files'), or else those with its name in any file. Raises UserError where a recording has none,
    UserError for bad files.
    """
    by_file: dict[str, list[StmSegment]] = {}
    found: dict[str, list[StmSegment]] = {}
    for path in stm_files(stm):
        segments = read_stm(path)
        for segment in segments:
            found.setdefault(segment.recording, []).append(segment)
        if len({segment.recording for segment in segments}) == 1:
            by_file[path.stem] = segments
    found |= by_file
    missing = [id for id in ids if id not in found]
    if stm and missing:
        raise UserError(
            f"stm = {stm}: no segments of {len(missing)} of {len(ids)} recordings, such as {missing[0]!r}: "
            "give the STM of this split"
        )
    return {
        id: [
            ReferenceSegment(one.start, one.end, plain_text(one.text), one.speaker, one.ignored, one.channel)
            for one in sorted(found[id], key=lambda one: (one.start, one.end))
        ]
        for id in (ids if stm else ())
    }


@dataclass(frozen=True)
class Evaluated:
    """A recording: what was said, what was heard, and how the two are aligned."""

    transcript: TimedTranscript
    score: RecordingScore
    by_segments: RecordingScore | None
    """the same with words aligned within the segments of an STM alone"""
    alignment: list[AlignedWord]
    edges: list[float]
    """seconds at which one window ends and another begins"""

    def line(self) -> str:
        """Of transcripts.jsonl."""
        aligned = [[KINDS[one.kind], one.reference, one.hypothesis, round(one.time, 3)] for one in self.alignment]
        return json.dumps({**line_of(self.transcript), "alignment": aligned}, ensure_ascii=False) + "\n"


def line_of(transcript: TimedTranscript) -> dict[str, Any]:
    """A transcript for JSON; `transcript_of` reads it."""
    words = [
        [one.word, round(one.start, 3), round(one.end, 3), None if one.confidence is None else round(one.confidence, 4)]
        for one in transcript.words
    ]
    return {"id": transcript.id, "seconds": round(transcript.seconds, 3), "text": transcript.text, "words": words}


def transcript_of(line: Mapping[str, Any]) -> TimedTranscript:
    """The inverse of `line_of`."""
    return TimedTranscript(line["id"], line["seconds"], line["text"], [TimedWord(*word) for word in line["words"]])


def evaluate_recording(
    dataset: Dataset, recording: int, heard: TimedTranscript, segments: Sequence[ReferenceSegment] | None,
    edges: list[float],
) -> Evaluated:  # fmt: skip
    """Count the errors, of the whole recording and by segments where there are any."""
    id, language, speaker = dataset.id(recording), dataset.language(recording), dataset.speaker(recording)
    seconds = int(dataset.frames[recording]) / dataset.features.frames_per_second
    if segments is None:
        text = dataset.text(recording) or ""
        score = score_recording(id, text, heard.text, language, seconds, speaker)
        parts = None
    else:
        text = " ".join(one.text for one in segments if not one.ignored)
        score = score_as_whole(id, segments, heard.words, language, seconds)
        parts = score_by_segments(id, segments, heard.words, language, seconds)
    # When was an error? Words with times tell best, then segments; without either a word is placed by what was heard
    # beside it.
    said = [TimedWord(one.word, one.start, one.end) for one in dataset.words(recording) or ()]
    if " ".join(one.word for one in said) != text:
        said = [word for one in segments or () if not one.ignored for word in spread_words(one)]
    words = words_outside_ignored(segments or (), heard.words)
    return Evaluated(heard, score, parts, align_timed(said or text, words, language, seconds), edges)


def spread_words(segment: ReferenceSegment) -> list[TimedWord]:
    """The words of a segment, evenly over its time."""
    words = segment.text.split()
    width = (segment.end - segment.start) / max(len(words), 1)
    return [TimedWord(w, segment.start + k * width, segment.start + (k + 1) * width) for k, w in enumerate(words)]


def window_edges(num_frames: int, cell: Cell, stride: int, frames_per_second: float) -> list[float]:
    """Seconds at which the output goes over from one window to the next; of averaged windows, their ends."""
    context = cell.inference.context(stride, frames_per_second)
    windows = plan_windows(num_frames, context, cell.inference.overlap, stride)
    if cell.inference.mode == "averaged":
        ends = {one.start for one in windows[1:]} | {one.stop for one in windows[:-1]}
        return [end / frames_per_second for end in sorted(ends)]
    return [one.keep_stop * stride / frames_per_second for one in windows[:-1]]


def describe(
    config: Config, cell: Cell, description: str, dataset: Dataset, found: Sequence[Evaluated],
    cost: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """results.json."""
    scores = [one.score for one in found]
    by_segments = [one.by_segments for one in found if one.by_segments is not None]
    aligned = [one.alignment for one in found]
    positions = by_position(
        list(zip(aligned, (one.transcript.seconds for one in found), strict=True)), num_resamples=config.resamples
    )
    edges = list(zip(aligned, (one.edges for one in found), strict=True))
    distances = by_edge_distance(edges, num_resamples=config.resamples) if any(one for _, one in edges) else []
    return {
        "format_version": FORMAT_VERSION,
        "key": cell.key,
        "decode_key": cell.decode_key,
        "name": cell.name,
        "label": cell.label,
        "context_seconds": cell.context_seconds,
        "export": cell.export,
        "export_hash": cell.export_hash,
        "dataset": {
            "name": dataset.name,
            "path": config.data.dataset,
            "split": config.data.split,
            "fingerprint": dataset.fingerprint,
            "feature_hash": dataset.features.hash(),
        },
        "inference": to_dict(cell.inference),
        "encoder": to_dict(cell.encoder),
        "decoder": {**to_dict(cell.decoder), "description": description},
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
        "positions": [one.summary() for one in positions],
        "edge_distances": [one.summary() for one in distances],
        "confusions": asdict(confusions(scores)),
        "normalisers": normalisers_used((one.normaliser, one.language) for one in scores),
        "recordings": [one.row() for one in scores],
    }


def summaries(scores: Mapping[str, CorpusScore]) -> dict[str, Any]:
    """For JSON, by name."""
    return {name: score.summary() for name, score in scores.items()}


def row_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The line of rows.jsonl: what was evaluated, how, and what came out; no texts."""
    kept = (
        "key", "name", "label", "context_seconds", "export", "export_hash", "dataset", "inference", "encoder",
        "decoder", "command", "versions", "decoding",
    )  # fmt: skip
    return {"time": datetime.now(UTC).isoformat(timespec="seconds")} | {
        **{name: results[name] for name in kept},
        "scores": results["scores"]["all"],
        "segments": results["segments"] and results["segments"]["all"],
    }
