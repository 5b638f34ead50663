"""Turn a corpus into a dataset of log-mel shards: `python -m data.prepare CORPUS --out DIR [--field value ...]`.

The same command continues an interrupted preparation; the dataset is the same as without an interruption. A finished
dataset is not changed. Unusable recordings are skipped, counted and listed in DIR/skipped.jsonl; problems with other
recordings, such as unusable word times, are listed in DIR/warnings.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt

from common.config import parse_sections
from common.cores import available_cores
from common.errors import UserError
from common.files import canonical_path, read_json_object, write_json
from data.corpora.base import Corpus, Source
from data.corpora.registry import CORPORA, find_corpus
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
    """Settings of a preparation that do not depend on the corpus."""

    out: str
    """Folder of the dataset; created if it is missing."""
    workers: PositiveInt = available_cores()
    """Processes that read or synthesise audio and compute features; by default one per core available to the
    process."""
    part: str = "0/1"
    """i/n prepares the i-th of n shares (i from 0 to n - 1) into the same folder, so that n machines can work at the
    same time; the last part to finish completes the dataset, which is the same as that of a single machine."""
    merge: bool = False
    """Only merge finished parts into a dataset (needed if the last two finished at the same moment)."""
    layout: Encoding = "plain"
    """plain: float16, fastest. Compressed: shuffle-zstd, lossless, 70 % of the bytes; uint8, rounded to 256 steps per
    bin, 36 to 43 % (figures in docs/compression.md)."""
    shard_mb: PositiveInt = 500
    """Size of a shard in MB (10**6 bytes; 500 hold 8.7 hours). Finished shards survive SIGKILL."""
    shard_minutes: PositiveFloat = 10.0
    """A shard is also closed after this many minutes of work, which bounds the loss from SIGKILL or a power failure."""
    max_skipped_share: ClosedUnitInterval = 0.05
    """Maximum share of unusable recordings in a part; more are an error. Unreadable table rows and files that give no
    recording are counted only if it is 0; a table with half or more of its rows unreadable is always an error."""

    @property
    def share(self) -> tuple[int, int]:
        """Numbers (i, n) of `part`."""
        part, _, parts = self.part.partition("/")
        return int(part), int(parts)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]{1,5}/[0-9]{1,5}", self.part) or not self.share[0] < self.share[1]:
            raise UserError(f"part is {self.part!r}: must be i/n with i from 0 to n - 1, such as 0/8 to 7/8")


# --- Command line ---


def usage() -> str:
    """Help of the command without a corpus."""
    width = max(map(len, CORPORA))
    listed = "\n".join(f"  {name:{width}}  {corpus.summary}" for name, corpus in CORPORA.items())
    return (
        f"usage: python -m data.prepare CORPUS --out DIR [--field value ...]\n\n{__doc__}\n"
        f"corpora:\n{listed}\n\n`python -m data.prepare CORPUS --help` lists the settings of a corpus."
    )


def parse(name: str, corpus: Corpus, arguments: Sequence[str]) -> tuple[Any, FeatureSettings, PrepareSettings]:
    """Settings of the corpus, the features and the preparation from the command line.

    Features are set by --features.field, other settings by --field. Dashes in names count as underscores, lists may be
    written `a,b`, and flags need no value. Raises UserError for a wrong value or an unknown name.
    """
    top = [PrepareSettings, corpus.settings]
    types = {field.name: str(field.type) for kind in top for field in dataclasses.fields(kind)}
    preparation, settings, features = parse_sections(
        {None: top, "features": [FeatureSettings]},
        _normalised(arguments, types),
        description=corpus.summary,
        program=f"python -m data.prepare {name}",
    )
    if corpus.features is not None and features == FeatureSettings():
        features = corpus.features(settings)
    return settings, features, preparation


def _normalised(arguments: Sequence[str], types: Mapping[str, str]) -> list[str]:
    """Arguments in the parser's form: `--a-b x` as `--a_b=x`, `x,y` for a list as `[x,y]`, a bare flag as true."""
    joined: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            joined.append("--" + name[2:].replace("-", "_") + equals + value)
        elif joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    lists = "|".join(name for name, kind in types.items() if kind.startswith("list")) or "(?!)"
    list_argument = re.compile(rf"(--(?:{lists})\+?=)(?!\[)(.*)", re.DOTALL)
    flags = {f"--{name}": f"--{name}=true" for name, kind in types.items() if kind == "bool"}
    return [list_argument.sub(r"\1[\2]", flags.get(argument, argument)) for argument in joined]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        prepare(name, *parse(name, find_corpus(name), rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: finished work is kept, the same command continues", file=sys.stderr)
        return 130
    return 0


# --- Preparation ---


def prepare(name: str, corpus_settings: Any, features: FeatureSettings, settings: PrepareSettings) -> bool:
    """Prepare (or continue) the corpus `name` or a part, and print a summary. Returns False if it was finished before.

    Raises UserError: unusable settings or corpus, a folder with another dataset, too many unusable recordings, a full
    disk, or parts that are missing for a merge. Finished shards are kept.
    """
    listed = find_corpus(name).sources(corpus_settings)
    sources = listed if isinstance(listed, Sequence) else list(listed)
    folder = Path(settings.out)
    identity = _identity(name, corpus_settings, sources)
    with Interrupts() as interrupts, _open_writer(folder, identity, features, settings) as writer:
        if writer.finished:
            merge_lists(folder)
            print(f"prepare: {folder} is already prepared: {_totals(folder)}", flush=True)
            return False
        part, parts = writer.part, writer.parts
        missing = writer.missing_parts()
        if settings.merge and missing:
            raise UserError(f"{folder}: cannot be merged: {_unfinished(missing, parts)}")
        if part in missing:
            share = sources[len(sources) * part // parts : len(sources) * (part + 1) // parts]
            _prepare_part(share, writer, settings, interrupts)
        with interrupts.held():
            complete = writer.finish()
            if complete:
                merge_lists(folder)
        if not complete:
            unfinished = _unfinished(writer.missing_parts(), parts)
            print(f"prepare: part {part}/{parts} of {folder} is finished, {unfinished}")
            return part in missing
    print(f"prepare: finished {folder}: {_totals(folder)}", flush=True)
    return True


def _prepare_part(
    sources: Sequence[Source], writer: DatasetWriter, settings: PrepareSettings, interrupts: Interrupts
) -> None:
    """Write the recordings that are not in finished shards yet, and the lists of skipped ones and of warnings."""
    remaining = sources
    if writer.done_ids:
        remaining = [source for source in sources if source.id not in writer.done_ids]
        print(f"prepare: continuing: {len(writer.done_ids)} of {len(sources)} recordings are done", flush=True)
    skipped: list[Skipped] = []
    unusable = 0  # without Unreadable rows and files, whose share was checked when the corpus was listed
    allowed = settings.max_skipped_share * len(sources)
    skipped_path, warnings_path = (
        list_path(writer.path, name, writer.part, writer.parts) for name in ("skipped", "warnings")
    )
    warnings = Warnings(warnings_path, writer.done_ids)
    results = extract_all(remaining, writer.features, min(settings.workers, max(1, len(remaining))))
    shard, shard_start = writer.shard, time.monotonic()
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
                    warnings.add(result.recording.id, result.warnings)
                    writer.add(result.recording, result.log_mel)
                    if writer.shard == shard and time.monotonic() - shard_start > 60 * settings.shard_minutes:
                        writer.close()
                progress.warnings += len(result.warnings)
                if writer.shard != shard:
                    shard, shard_start = writer.shard, time.monotonic()
                progress.update(len(result.log_mel) / writer.features.frames_per_second)
    finally:
        # Skipped recordings are tried again when a run continues, so this list is complete.
        write_list(skipped_path, skipped)
    if warnings.items:
        print(summary(f"{len(warnings.items)} warnings", warnings.items, warnings_path), flush=True)
    if skipped:
        print(summary(f"skipped {len(skipped)} recordings", skipped, skipped_path), flush=True)
    if unusable > allowed:
        raise UserError(
            f"at least {unusable} of {len(sources)} recordings are unusable, more than max_skipped_share = "
            f"{settings.max_skipped_share}. Repair them, or allow more with --max_skipped_share, and run again"
        )


def _open_writer(
    folder: Path, identity: dict[str, Any], features: FeatureSettings, settings: PrepareSettings
) -> DatasetWriter:
    """Writer of the part. Raises UserError unless the folder is new or has the same corpus and number of parts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):  # parts may start at the same time
            path = folder / CORPUS_FILE
            started = any((folder / name).exists() for name in (DATASET_FILE, PREPARING_FILE))
            # Read after the check above: another machine, which may not share the lock, writes this file first.
            existing = read_json_object(path) if path.is_file() else None
            if existing is None and started:
                raise UserError(f"{folder} holds a dataset not made by data.prepare: choose another --out")
            part, parts = settings.share
            if settings.merge:
                if existing is None:
                    raise UserError(f"{folder} has no prepared parts to merge: prepare them first")
                part, parts = 0, existing.get("parts", 1)
            identity = {**identity, "parts": parts}
            if existing is None:
                write_json(path, identity)  # first: a folder with any other file was then made by data.prepare
            else:
                _check_identity(folder, existing, identity)
            return DatasetWriter(
                folder, features, settings.shard_mb * 10**6, part, parts, identity["corpus"], settings.layout
            )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); correct this, or choose another --out") from error


def _identity(name: str, corpus_settings: Any, sources: Sequence[Source]) -> dict[str, Any]:
    """Content of CORPUS_FILE: corpus, settings and recordings of a dataset. Raises UserError for repeated ids."""
    digest, hashes = hashlib.sha256(), array("q")  # hashes instead of ids: a corpus may have ten million
    for source in sources:
        digest.update(source.id.encode(errors="backslashreplace") + b"\n")
        hashes.append(hash(source.id))
    if not sources:
        raise UserError(f"the corpus {name!r} has no recordings with these settings: change them")
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    if len(values) < len(hashes):
        suspects = set(values[counts > 1].tolist())
        ids = Counter(source.id for source in sources if hash(source.id) in suspects)
        repeated = [id for id, count in ids.items() if count > 1]
        if repeated:
            raise UserError(
                f"{len(repeated)} recordings share their id with another, first {repeated[0]!r}: rename them"
            )
    fields = json.loads(json.dumps(dataclasses.asdict(corpus_settings), default=str))
    for field in find_corpus(name).free:
        del fields[field]
    return {"corpus": name, "settings": fields, "recordings": len(sources), "ids_sha256": digest.hexdigest()}


def _check_identity(folder: Path, existing: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError, with the differences, if the folder has another corpus or other settings."""
    differences = [
        f"{field}: {existing.get(field)!r} != {identity[field]!r}"
        for field in ("corpus", "recordings", "parts")
        if existing.get(field) != identity[field]
    ]
    old, new = existing.get("settings") or {}, identity["settings"]
    differences += [
        f"{name}: {old.get(name)!r} != {new.get(name)!r}"
        for name in {**old, **new}
        if _canonical(old.get(name)) != _canonical(new.get(name))
    ]
    if not differences and existing.get("ids_sha256") != identity["ids_sha256"]:
        differences = ["the recordings of the corpus have changed"]
    if differences:
        raise UserError(
            f"{folder} was prepared from another corpus or with other settings (stored != requested): "
            f"{'; '.join(differences)}. Choose another --out, or delete that folder"
        )


def _canonical(value: Any) -> Any:
    """Setting with its paths in canonical form."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return canonical_path(value) if isinstance(value, str) else value


def _unfinished(missing: Sequence[int], parts: int) -> str:
    """Description of the parts that are not finished, for messages."""
    named = [f"{part}/{parts}" for part in missing[:_PARTS_SHOWN]] + ["..."] * (len(missing) > _PARTS_SHOWN)
    return f"{len(missing)} of {parts} parts are not finished: --part {', '.join(named)}"


def _totals(folder: Path) -> str:
    dataset = open_dataset(folder)
    hours = dataset.total_frames / dataset.features.frames_per_second / 3600
    splits = dataset.totals("split")
    return f"{hours:.2f} hours, " + ", ".join(f"{splits[split][0]} {split}" for split in sorted(splits))
