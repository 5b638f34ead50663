"""Results and transcripts of evaluate.py, made from texts without a model or audio."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bestrq.report.result_files import FORMAT_VERSION, RESULTS, TRANSCRIPTS
from bestrq.scoring.breakdowns import (
    align_timed,
    by_duration,
    by_edge_distance,
    by_position,
    by_speaker,
    confusions,
)
from bestrq.scoring.normalisers import normalisers_used
from bestrq.scoring.word_errors import RecordingScore, score_by_language, score_recording
from bestrq.transcripts.words import TimedWord

WORD_SECONDS = 0.5


def score_all(
    texts: Mapping[str, tuple[str, str]], language: str = "cs", speakers: Mapping[str, str] | None = None
) -> list[RecordingScore]:
    """Scores of (reference, hypothesis) by id; a word lasts WORD_SECONDS."""
    return [
        score_recording(
            id,
            reference,
            hypothesis,
            language,
            max(len(reference.split()), 1) * WORD_SECONDS,
            (speakers or {}).get(id, ""),
        )
        for id, (reference, hypothesis) in texts.items()
    ]


def timed(text: str) -> list[TimedWord]:
    return [TimedWord(word, k * WORD_SECONDS, (k + 1) * WORD_SECONDS) for k, word in enumerate(text.split())]


def make_transcripts(scores: Sequence[RecordingScore]) -> list[dict[str, Any]]:
    kinds = {"hit": "=", "substitution": "S", "deletion": "D", "insertion": "I"}
    return [
        {
            "id": score.id,
            "seconds": score.seconds,
            "text": score.hypothesis,
            "words": [[word.word, word.start, word.end, None] for word in timed(score.hypothesis)],
            "alignment": [
                [kinds[step.kind], step.reference, step.hypothesis, step.time]
                for step in align_timed(timed(score.reference), timed(score.hypothesis), score.language)
            ],
        }
        for score in scores
    ]


def make_results(
    name: str, scores: Sequence[RecordingScore], context: float = 20.0, mode: str = "buffered", **changes: Any
) -> dict[str, Any]:
    """Content of `results.json`. Mode "windowed" is windowed attention, context 0 the whole recording."""
    alignments = [align_timed(timed(score.reference), timed(score.hypothesis), score.language) for score in scores]
    aligned = [(alignment, score.seconds) for alignment, score in zip(alignments, scores, strict=True)]
    windowed = mode == "windowed"
    edges = (
        []
        if windowed or not context
        else by_edge_distance([(words, [1.0, 2.0]) for words, _ in aligned], num_resamples=100)
    )
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "label": f"{mode} {context:g} s",
        "export": f"runs/{name}/export",
        "export_hash": f"{len(name):02x}" * 32,
        "command": f"python evaluate.py --name {name}",
        "dataset": {
            "name": "x", "path": "datasets/x", "split": "test", "fingerprint": "cd" * 32, "feature_hash": "ef" * 32,
        },
        "device": "cpu",
        "inference": {
            "mode": "whole" if windowed else mode, "context_seconds": 0.0 if windowed else context, "overlap": 0.25,
            "batch_seconds": 120.0, "precision": "float32",
        },
        "encoder": {"mask": "window" if windowed else None, "window": 100 if windowed else None, "chunk_size": None},
        "decoder": {"beam": 1, "language_model": "", "description": "greedy"},
        "context_seconds": context,
        "versions": {"torch": "2"},
        "decoding": {
            "audio_seconds": 60.0, "seconds": 1.5, "audio_seconds_per_second": 40.0, "real_time_factor": 0.025,
            "peak_mb": 123.0,
        },
        "scores": {language: total.summary() for language, total in score_by_language(scores, 200).items()},
        "segments": None,
        "positions": [part.summary() for part in by_position(aligned, num_resamples=100)],
        "edge_distances": [part.summary() for part in edges],
        "speakers": {speaker: total.summary() for speaker, total in by_speaker(scores, 100).items()},
        "durations": {length: total.summary() for length, total in by_duration(scores, num_resamples=100).items()},
        "confusions": asdict(confusions(scores)),
        "normalisers": normalisers_used((score.normaliser, score.language) for score in scores),
        "recordings": [score.row() for score in scores],
        **changes,
    }  # fmt: skip


def completed(partial: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `results.json` with these fields; all others are those of one recording without errors."""
    whole = make_results("x", score_all({"x": ("a b", "a b")}))
    total = whole["scores"]["all"]
    scores = {
        name: {language: {**total, **score} for language, score in {"all": {}, **(partial.get(name) or {})}.items()}
        for name in ("scores", "segments")
        if name == "scores" or partial.get(name)
    }
    parts = {name: {**whole[name], **partial[name]} for name in ("inference", "decoder", "decoding") if name in partial}
    recordings = {"recordings": partial.get("recordings") or whole["recordings"]}
    return {**whole, **partial, **parts, **scores, **recordings}


def write_evaluation(
    folder: Path, name: str, scores: Sequence[RecordingScore], context: float = 20.0, mode: str = "buffered",
    **changes: Any,
) -> Path:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    results = make_results(name, scores, context, mode, **changes)
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    lines = [json.dumps(line, ensure_ascii=False) for line in make_transcripts(scores)]
    (folder / TRANSCRIPTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
