"""Accuracy of the word times by tools/align.py: `python -m benchmarks.alignment --model EXPORT`.

EXPORT is a recogniser of the synthetic corpus, such as runs/quickstart-synthetic/pretrained/export of the quickstart.
Recordings of the test voices are synthesised with espeak-ng, whose word times are exact, in the language of the model,
and aligned by the script in a separate process. Three datasets:

- right: utterances of 2 to 15 s and recordings of 1, 10 and 60 minutes, with their transcripts;
- wrong: the same audio with shuffled words, or with the transcript of another recording of the same kind;
- edited: the recordings with a tenth of the sentences removed from the transcript, or with as many sentences of another
  recording inserted; only spoken words are measured.

A boundary is the start or end of a word; its error is the distance from that of espeak. Memory is the largest resident
set of the script; `base_memory_mb` is that of a run on the utterances alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import print_figures
from data.corpora.synthetic import SyntheticSource
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.log_mel import LogMel
from data.recording import Recording
from data.transcripts import Word

SCRIPT = Path(__file__).resolve().parent.parent / "tools/align.py"
# By kind of recording: minutes (0 for an utterance of 2 to 15 s) and number of recordings.
KINDS = {"utterances": (0.0, 200), "1_min": (1.0, 30), "10_min": (10.0, 6), "60_min": (60.0, 2)}
SENTENCE = 8  # number of words that are removed or inserted together


def synthesise(language: str, seed: int, share: float) -> Iterator[tuple[Recording, np.ndarray]]:
    """Yield recordings of every kind with their log-mel; ids start with the kind."""
    features = FeatureSettings()
    log_mel = LogMel(features)
    for kind, (minutes, count) in KINDS.items():
        for number in range(max(2, round(count * share))):
            spoken = SyntheticSource(f"{kind}-{number:03d}", "test", language, minutes * 60, seed).load(features)
            yield spoken.recording, log_mel(spoken.waveform).numpy()


def write(folder: Path, spoken: Sequence[tuple[Recording, np.ndarray]], texts: dict[str, dict[str, str]]) -> Dataset:
    """Write a dataset without word times that holds the recordings with the texts of every variant, as VARIANT/ID."""
    with DatasetWriter(folder, FeatureSettings()) as writer:
        for variant, by_id in texts.items():
            for recording, log_mel in spoken:
                if recording.id in by_id:
                    id, text = f"{variant}/{recording.id}", by_id[recording.id]
                    writer.add(dataclasses.replace(recording, id=id, text=text, words=None), log_mel)
        writer.finish()
    return open_dataset(folder)


def wrong_texts(spoken: list[Recording], seed: int) -> dict[str, dict[str, str]]:
    """Texts by variant and id: shuffled words, and the transcript of the next recording of the same kind."""
    rng = random.Random(seed)
    shuffled, other = {}, {}
    for number, recording in enumerate(spoken):
        words = (recording.text or "").split()
        rng.shuffle(words)
        shuffled[recording.id] = " ".join(words)
        following = spoken[number + 1 :] + spoken[:number]
        other[recording.id] = next(r.text or "" for r in following if kind_of(r.id) == kind_of(recording.id))
    return {"shuffled": shuffled, "other": other}


def edited_texts(
    spoken: Sequence[Recording], seed: int
) -> tuple[dict[str, dict[str, str]], dict[str, list[Word | None]]]:
    """Transcripts with sentences removed or inserted; and for each of their words the spoken word, or None."""
    rng = random.Random(seed)
    texts: dict[str, dict[str, str]] = {"left_out": {}, "put_in": {}}
    truth: dict[str, list[Word | None]] = {}
    for number, recording in enumerate(spoken):
        if kind_of(recording.id) == "utterances":
            continue
        words, foreign = recording.words or [], spoken[number - 1].words or []
        parts = [words[start : start + SENTENCE] for start in range(0, len(words), SENTENCE)]
        edits = {edit: set(rng.sample(range(len(parts)), max(1, len(parts) // 10))) for edit in texts}
        left = [word for part, content in enumerate(parts) if part not in edits["left_out"] for word in content]
        more: list[tuple[str, Word | None]] = []
        for part, content in enumerate(parts):
            if part in edits["put_in"]:
                start = rng.randrange(max(1, len(foreign) - SENTENCE))
                more += [(word.word, None) for word in foreign[start : start + SENTENCE]]
            more += [(word.word, word) for word in content]
        texts["left_out"][recording.id] = " ".join(word.word for word in left)
        truth[f"left_out/{recording.id}"] = list(left)
        texts["put_in"][recording.id] = " ".join(text for text, _ in more)
        truth[f"put_in/{recording.id}"] = [word for _, word in more]
    return texts, truth


def kind_of(id: str) -> str:
    return id.split("/")[-1].rsplit("-", 1)[0]


@dataclass(frozen=True)
class Outcome:
    """Result of one run of the script."""

    dataset: Dataset
    refused: list[str]
    """ids of unaligned recordings"""
    seconds: float
    memory_mb: int
    """largest resident set of the script"""


def run_script(dataset: Dataset, model: str, out: Path, more: Sequence[str]) -> Outcome:
    start = time.perf_counter()
    command = [sys.executable, str(SCRIPT), "--data.dataset", str(dataset.path), "--model", model, "--out", str(out)]
    memory = 0
    with subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL) as process:
        # Not getrusage, which would include the memory of this process, of which a child starts as a copy.
        while process.poll() is None:
            with suppress(OSError, IndexError):  # the process has ended
                memory = int(
                    Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]
                )
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"tools/align.py ended with {process.returncode}: see above")
    lines = (out / "unaligned.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = time.perf_counter() - start
    return Outcome(open_dataset(out), [json.loads(line)["id"] for line in lines], seconds, round(memory / 1000))


def errors(aligned: Dataset, truth: dict[str, list[Word | None]]) -> dict[str, np.ndarray]:
    """Errors of starts and ends in seconds, and the confidence, float64 `[words, 3]`, by variant/kind."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for number in range(len(aligned)):
        id = aligned.id(number)
        group = rows.setdefault(f"{id.split('/')[0]}/{kind_of(id)}", [])
        for word, spoken in zip(aligned.words(number) or [], truth[id], strict=False):
            if spoken is not None:
                group.append((word.start - spoken.start, word.end - spoken.end, word.confidence or 0.0))
    return {name: np.array(content).reshape(-1, 3) for name, content in rows.items()}


def summary(rows: np.ndarray) -> dict[str, float]:
    """Statistics of both boundaries of all words, and the median bias of starts and ends."""
    boundaries = np.abs(rows[:, :2]).ravel()
    confident = np.abs(rows[rows[:, 2] >= 0.5, :2])
    return {
        "words": len(rows),
        "median_boundary_error_ms": round(1000 * float(np.median(boundaries)), 1),
        "share_within_80_ms": round(float((boundaries <= 0.08).mean()), 4),
        "share_within_200_ms": round(float((boundaries <= 0.2).mean()), 4),
        "share_confident": round(len(confident) / len(rows), 4),
        "share_of_confident_within_80_ms": round(float((confident <= 0.08).mean()), 4),
        "largest_ms": round(1000 * float(boundaries.max())),
        "median_start_ms": round(1000 * float(np.median(rows[:, 0])), 1),
        "median_end_ms": round(1000 * float(np.median(rows[:, 1])), 1),
        "mean_confidence": round(float(rows[:, 2].mean()), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=__doc__)
    parser.add_argument("--model", required=True, help="export of finetune_ctc.py, trained on the synthetic corpus")
    parser.add_argument("--language", default="es", help="language of the model and of the recordings")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the recordings; must differ from that of the corpus"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the recordings to synthesise; at least 2 of each kind"
    )
    parser.add_argument("more", nargs="*", help="after --: settings of tools/align.py")
    options = parser.parse_args(arguments)
    more = ["--device", "cpu", "--inference.context_seconds", "10", *options.more]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spoken = list(synthesise(options.language, options.seed, options.share))
        recordings = [recording for recording, _ in spoken]
        exact: dict[str, list[Word | None]] = {f"right/{r.id}": list(r.words or []) for r in recordings}
        texts = {"right": {r.id: r.text or "" for r in recordings}}
        edits, edited_truth = edited_texts(recordings, options.seed)

        short = [pair for pair in spoken if kind_of(pair[0].id) == "utterances"]
        outcomes = {}
        for name, pairs, by_variant in (
            ("short", short, texts), ("right", spoken, texts),
            ("wrong", spoken, wrong_texts(recordings, options.seed)), ("edited", spoken, edits),
        ):  # fmt: skip
            dataset = write(folder / name, pairs, by_variant)
            outcomes[name] = run_script(dataset, options.model, folder / f"{name}-out", more)
        right = outcomes["right"]
        measured = {
            name: summary(rows)
            for kind, truth in (("right", exact), ("edited", edited_truth))
            for name, rows in errors(outcomes[kind].dataset, truth).items()
            if len(rows)
        }
        hours = int(right.dataset.frames.sum()) / right.dataset.features.frames_per_second / 3600
    heads = ("words", "median ms", "in 80 ms", "in 200 ms", "largest ms", "confident", "in 80 ms")
    print(f"{'':<22}" + "".join(f"{head:>12}" for head in heads))
    for name, row in measured.items():
        print(
            f"{name:<22}{row['words']:>12,}{row['median_boundary_error_ms']:>12.1f}{row['share_within_80_ms']:>12.2%}"
            f"{row['share_within_200_ms']:>12.2%}{row['largest_ms']:>12,}{row['share_confident']:>12.2%}"
            f"{row['share_of_confident_within_80_ms']:>12.2%}"
        )
    detected = {
        variant: sum(id.startswith(f"{variant}/") for id in outcomes["wrong"].refused) / len(recordings)
        for variant in ("shuffled", "other")
    }
    result: dict[str, Any] = {
        "median_boundary_error_ms": {k: measured[f"right/{k}"]["median_boundary_error_ms"] for k in KINDS},
        "share_within_80_ms": {k: measured[f"right/{k}"]["share_within_80_ms"] for k in KINDS},
        "share_of_shuffled_detected": round(detected["shuffled"], 4),
        "share_of_others_detected": round(detected["other"], 4),
        "share_of_right_refused": round(len(right.refused) / len(recordings), 4),
        "recordings": len(recordings),
        "hours": round(hours, 2),
        "audio_seconds_per_second": round(hours * 3600 / right.seconds),
        "memory_mb": right.memory_mb,
        "base_memory_mb": outcomes["short"].memory_mb,
        "measured": measured,
    }
    print_figures(result, "float32")


if __name__ == "__main__":
    main()
