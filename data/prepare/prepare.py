"""Turn a corpus into a dataset of log-mel shards: `python -m data.prepare CORPUS --out DIR [--field value ...]`.

An interrupted preparation continues with the same command, and ends with the same dataset as an undisturbed one. A
finished one is left alone. Unusable recordings are skipped, counted and listed in DIR/skipped.jsonl; problems of
recordings that are kept (unusable word times, say) in DIR/warnings.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import canonical_path, read_json_object, write_json
from data.corpora.base import Source
from data.corpora.registry import find_corpus
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.schema import DATASET_FILE, PREPARING_FILE, Encoding
from data.format.writer import DatasetWriter, locked
from data.prepare.extraction import extract_all
from data.prepare.progress import Interrupts, Progress
from data.skipped import Skipped, Warnings, list_path, merge_lists, summary, write_list

CORPUS_FILE = "corpus.json"
_PARTS_SHOWN = 16


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare, whatever the corpus."""

    out: str
    """Folder of the dataset, made where it is missing."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that read or speak, and compute features; by default one for every core that this process may use."""
    part: str = "0/1"
    """i/n prepares the i-th of n shares (i from 0 to n - 1) into the same folder, so that n machines can do it at once;
    the last part to finish makes it a dataset, the same as one machine would."""
    merge: bool = False
    """Prepare nothing, but make a dataset of finished parts (where the last two did not see each other finish)."""
    layout: Encoding = "plain"
    """plain: float16, quickest. Compressed: shuffle-zstd, exact, 70 % of the bytes; uint8, rounded to 256 steps of
    every bin, 36 to 43 % (docs/compression.md has the figures)."""
    shard_mb: int = 500
    """Size of a shard in MB (10**6 bytes; 500 hold 8.7 hours). What is in finished shards survives even SIGKILL."""
    shard_minutes: float = 10.0
    """A shard is also closed after this many minutes of work, which bounds what SIGKILL or a power cut can lose."""
    max_skipped_share: float = 0.05
    """More than this share of unusable recordings (of a part) is an error: from 0 (none may be unusable) to 1.
    Unreadable rows of tables and files that give no recording only count at 0; half of a table unreadable is always an
    error.
    """

    @property
    def share(self) -> tuple[int, int]:
        """(i, n) of `part`."""
        part, _, parts = self.part.partition("/")
        return int(part), int(parts)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]{1,5}/[0-9]{1,5}", self.part) or not self.share[0] < self.share[1]:
            raise UserError(f"part is {self.part!r}: must be i/n with i from 0 to n - 1, as in 0/8 to 7/8")
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}: at least 1 is needed")
        if self.shard_mb < 1:
            raise UserError(f"shard_mb is {self.shard_mb}: must be at least 1")
        if not self.shard_minutes > 0:
            raise UserError(f"shard_minutes is {self.shard_minutes}: must be positive")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"max_skipped_share is {self.max_skipped_share}: must be from 0 to 1")


def prepare(name: str, corpus_settings: Any, features: FeatureSettings, settings: PrepareSettings) -> bool:
    """Prepare the corpus `name` or a part of it, or continue, and tell about it. Returns whether anything was done.

    Raises UserError: unusable settings or corpus, a folder that holds another dataset, too many unusable recordings,
    a full disk, parts that are missing when merging. What finished shards hold is kept.
    """
    listed = find_corpus(name).sources(corpus_settings)
    sources = listed if isinstance(listed, Sequence) else list(listed)
    folder = Path(settings.out)
    with Interrupts() as interrupts, _begin(folder, _identity(name, corpus_settings, sources), features, settings) as w:
        if w.finished:
            merge_lists(folder)
            print(f"prepare: {folder} is already prepared: {_totals(folder)}", flush=True)
            return False
        missing = w.missing_parts()
        if settings.merge and missing:
            raise UserError(f"{folder}: cannot be merged: {_missing(missing, w.parts)}")
        if w.part in missing:
            mine = sources[len(sources) * w.part // w.parts : len(sources) * (w.part + 1) // w.parts]
            _prepare_part(mine, w, settings, interrupts)
        with interrupts.held():
            complete = w.finish()
            if complete:
                merge_lists(folder)
        if not complete:
            print(f"prepare: part {w.part}/{w.parts} of {folder} is finished, {_missing(w.missing_parts(), w.parts)}")
            return w.part in missing
    print(f"prepare: finished {folder}: {_totals(folder)}", flush=True)
    return True


def _prepare_part(
    sources: Sequence[Source], writer: DatasetWriter, settings: PrepareSettings, interrupts: Interrupts
) -> None:
    """Write all sources that are not in finished shards, the list of the unusable ones, and that of warnings."""
    remaining = sources
    if writer.done_ids:
        remaining = [source for source in sources if source.id not in writer.done_ids]
        print(f"prepare: continuing: {len(writer.done_ids)} of {len(sources)} recordings are done", flush=True)
    skipped: list[Skipped] = []
    unusable = 0  # without Unreadable rows and files, whose share was checked when they were listed
    allowed = settings.max_skipped_share * len(sources)
    path, warned_path = (list_path(writer.path, name, writer.part, writer.parts) for name in ("skipped", "warnings"))
    warned = Warnings(warned_path, writer.done_ids)
    results = extract_all(remaining, writer.features, min(settings.workers, max(1, len(remaining))))
    shard, begun = writer.shard, time.monotonic()
    try:
        with closing(results), Progress(len(remaining)) as progress:
            for result in results:
                if isinstance(result, Skipped):
                    skipped.append(result)
                    progress.skip(result.kind)
                    unusable += not (result.listed and settings.max_skipped_share > 0)
                    if unusable > allowed:
                        break
                    continue
                with interrupts.held():
                    warned.add(result.recording.id, result.warnings)
                    writer.add(result.recording, result.log_mel)
                    if writer.shard == shard and time.monotonic() - begun > 60 * settings.shard_minutes:
                        writer.close()
                progress.warnings += len(result.warnings)
                if writer.shard != shard:
                    shard, begun = writer.shard, time.monotonic()
                progress.update(len(result.log_mel) / writer.features.frames_per_second)
    finally:
        # All that is not done was tried again, so the list of a continued run is whole.
        write_list(path, skipped)
    if warned.items:
        print(summary(f"{len(warned.items)} warnings", warned.items, warned_path), flush=True)
    if skipped:
        print(summary(f"skipped {len(skipped)} recordings", skipped, path), flush=True)
    if unusable > allowed:
        raise UserError(
            f"at least {unusable} of {len(sources)} recordings are unusable, more than max_skipped_share = "
            f"{settings.max_skipped_share}. Repair them, or allow more with --max_skipped_share, and run again"
        )


def _begin(
    folder: Path, identity: dict[str, Any], features: FeatureSettings, settings: PrepareSettings
) -> DatasetWriter:
    """The writer of this part; UserError unless the folder is new or was begun with the same corpus and parts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):  # parts may begin at the same time
            path = folder / CORPUS_FILE
            begun = any((folder / name).exists() for name in (DATASET_FILE, PREPARING_FILE))
            # Looked at last: another machine, whom the lock may not reach, writes it first.
            there = read_json_object(path) if path.is_file() else None
            if there is None and begun:
                raise UserError(f"{folder} holds a dataset that data.prepare did not begin: choose another --out")
            part, parts = settings.share
            if settings.merge:
                if there is None:
                    raise UserError(f"{folder}: nothing was prepared here, so there is nothing to merge")
                part, parts = 0, there.get("parts", 1)
            identity = {**identity, "parts": parts}
            if there is None:
                write_json(path, identity)  # before anything else: a folder with more than this was begun by us
            else:
                _check_identity(folder, there, identity)
            return DatasetWriter(
                folder, features, settings.shard_mb * 10**6, part, parts, identity["corpus"], settings.layout
            )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another --out, or repair this") from error


def _identity(name: str, corpus_settings: Any, sources: Sequence[Source]) -> dict[str, Any]:
    """What a dataset is made from, as it is written beside it."""
    digest, hashes = hashlib.sha256(), array("q")  # not the ids themselves: there may be ten million
    for source in sources:
        digest.update(source.id.encode(errors="backslashreplace") + b"\n")
        hashes.append(hash(source.id))
    if not sources:
        raise UserError(f"the corpus {name!r} has no recordings with these settings: nothing to prepare")
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    if len(values) < len(hashes):
        suspects = set(values[counts > 1].tolist())
        ids = Counter(source.id for source in sources if hash(source.id) in suspects)
        twice = [id for id, count in ids.items() if count > 1]
        if twice:
            raise UserError(f"{len(twice)} recordings share their id with another, first {twice[0]!r}: rename them")
    fields = json.loads(json.dumps(dataclasses.asdict(corpus_settings), default=str))
    for field in find_corpus(name).free:
        del fields[field]
    return {"corpus": name, "settings": fields, "recordings": len(sources), "ids_sha256": digest.hexdigest()}


def _check_identity(folder: Path, there: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError when the folder was begun with something else, saying what differs."""
    differences = [
        f"{field}: {there.get(field)!r} != {identity[field]!r}"
        for field in ("corpus", "recordings", "parts")
        if there.get(field) != identity[field]
    ]
    old, new = there.get("settings") or {}, identity["settings"]
    differences += [
        f"{k}: {old.get(k)!r} != {new.get(k)!r}" for k in {**old, **new} if _place(old.get(k)) != _place(new.get(k))
    ]
    if not differences and there.get("ids_sha256") != identity["ids_sha256"]:
        differences = ["the corpus has other recordings than it had then"]
    if differences:
        raise UserError(
            f"{folder} was begun with another corpus or other settings (there != now): {'; '.join(differences)}. "
            "Choose another --out, or delete that folder"
        )


def _place(value: Any) -> Any:
    """A setting with its paths in canonical form."""
    if isinstance(value, list):
        return [_place(one) for one in value]
    return canonical_path(value) if isinstance(value, str) else value


def _missing(missing: Sequence[int], parts: int) -> str:
    """What is still to be done, for a message."""
    named = [f"{part}/{parts}" for part in missing[:_PARTS_SHOWN]] + ["..."] * (len(missing) > _PARTS_SHOWN)
    return f"{len(missing)} of {parts} parts are not finished: --part {', '.join(named)}"


def _totals(folder: Path) -> str:
    dataset = open_dataset(folder)
    hours = dataset.total_frames / dataset.features.frames_per_second / 3600
    splits = dataset.totals("split")
    return f"{hours:.2f} hours, " + ", ".join(f"{splits[split][0]} {split}" for split in sorted(splits))
