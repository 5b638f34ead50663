"""Command `join`: a dataset in which neighbouring recordings are joined into longer ones.

A corpus of utterances has no context beyond an utterance. Joined in the order of their ids (a dialogue, a chapter, a
talk), its utterances can be cut into segments of a minute, for pretraining or for labelled training.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import sync
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter, locked
from data.recording import Recording
from data.shards.derive import hidden_sibling, stored_recording
from data.shards.select import AddCommand
from data.transcripts import Word


def add_join(add: AddCommand) -> None:
    """Add the command `join`."""
    command = add("join", "make a dataset in which neighbouring recordings are joined, for training on context", _join)
    command.add_argument("dir", metavar="DIR", help="folder of the dataset, which is not changed")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the new dataset, which must not exist")
    command.add_argument("--name", default="", help="name in reports (default: name of the folder)")
    command.add_argument(
        "--seconds", type=float, default=60.0, help="maximum length of a joined recording (default: %(default)s)"
    )
    command.add_argument("--same-speaker", action="store_true", help="join only recordings of the same speaker")


def neighbours(dataset: Dataset, max_frames: int, same_speaker: bool) -> Iterator[list[int]]:
    """Runs of recordings to join, in the order of the dataset (by id): same split, language and (optionally) speaker.

    A run is as long as possible with at most `max_frames` frames; a longer recording is a run of its own. Every
    recording is in one run.
    """
    open_runs: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(dataset)):
        key = dataset.split(i), dataset.language(i), dataset.speaker(i) if same_speaker else ""
        run = open_runs.setdefault(key, [])
        if run and int(dataset.frames[[*run, i]].sum()) > max_frames:
            yield run
            run = open_runs[key] = []
        run.append(i)
    yield from open_runs.values()


def joined_recording(parts: Sequence[Recording], frames: Sequence[int], frames_per_second: float) -> Recording:
    """Metadata of the concatenation of recordings with the given numbers of frames.

    A part without word times becomes one entry of `words` from its first to its last frame, so that labelled crops are
    cut between parts, never within it. A part without a transcript becomes an excluded stretch.
    """
    words: list[Word] = []
    excluded: list[tuple[float, float]] = []
    start = 0.0
    for first, part, length in zip(np.cumsum([0, *frames]).tolist(), parts, frames, strict=False):
        start, end = first / frames_per_second, (first + length) / frames_per_second
        if part.text is None:
            excluded.append((start, end))
            continue
        excluded += [(start + left, start + right) for left, right in part.excluded or ()]
        if part.words:
            words += [Word(*word)._replace(start=start + word[1], end=start + word[2]) for word in part.words]
        elif part.text.strip():
            words.append(Word(part.text, start, end))
    texts = [part.text for part in parts if part.text is not None]
    speakers = {part.speaker for part in parts}
    return Recording(
        id=parts[0].id if len(parts) == 1 else f"{parts[0].id}+{len(parts) - 1}",
        text=" ".join(filter(None, texts)) if texts else None,
        words=words if texts else None,
        language=parts[0].language,
        speaker=speakers.pop() if len(speakers) == 1 else "",
        split=parts[0].split,
        excluded=excluded if texts and excluded else None,
    )


def join(dataset: Dataset, out: str | os.PathLike[str], seconds: float, same_speaker: bool, name: str = "") -> Dataset:
    """Write a dataset of joined recordings; the folder appears when it is complete. Frames are copied unchanged.

    Raises:
        UserError: `out` exists, `seconds` is not above 0, or the disk is full.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another folder, or delete it")
    if not 0 < seconds < float("inf"):
        raise UserError(f"--seconds is {seconds}: give a number above 0")
    rate = dataset.features.frames_per_second
    temporary, lock = hidden_sibling(out, "tmp"), hidden_sibling(out, "lock")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            with DatasetWriter(temporary, dataset.features, name=name or out.name, encoding=dataset.encoding) as writer:
                # Rounded first, since 4.6 * 100 is slightly less than 460.
                for run in neighbours(dataset, int(round(seconds * rate, 6)), same_speaker):
                    parts = [stored_recording(dataset, i) for i in run]
                    frames = [int(dataset.frames[i]) for i in run]
                    log_mel = np.concatenate([dataset.read(i) for i in run])
                    writer.add(joined_recording(parts, frames, rate), log_mel)
                writer.finish()
            os.replace(temporary, out)
            sync(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.unlink(missing_ok=True)
    return open_dataset(out)


def _join(options: argparse.Namespace) -> int:
    dataset = open_dataset(options.dir)
    joined = join(dataset, options.out, options.seconds, options.same_speaker, options.name)
    mean = joined.total_frames / len(joined) / joined.features.frames_per_second
    print(f"{options.out}: {len(joined)} recordings of {mean:.1f} s on average, joined from {len(dataset)}")
    return 0
