"""Commands `split`, `filter` and `merge`, which derive a dataset from others without copying shards."""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from common.errors import UserError, did_you_mean
from common.hashing import hash_share
from common.json_lines import bounded_lines
from common.text import label_text
from data.format.dataset import Dataset, open_dataset
from data.format.schema import LABELS
from data.recording import Recording
from data.shards.derive import Entry, derive, stored_recording

AddCommand = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""(name, description, function) -> parser of the command."""
Item = TypeVar("Item")
_MAX_CHARACTERS = 60


def add_split(add: AddCommand) -> None:
    """Add the command `split`."""
    command = add(
        "split", "make a dataset with new splits: train, dev and test by a hash, the same on every machine", _split
    )
    _add_common(command)
    command.add_argument(
        "--dev-share", type=_share, default=0.05, help="approximate share of 'dev' (default: %(default)s)"
    )
    command.add_argument(
        "--test-share", type=_share, default=0.05, help="approximate share of 'test' (default: %(default)s)"
    )
    command.add_argument(
        "--by",
        choices=("text", "speaker", "recording"),
        default="text",
        help="keep recordings of the same text (ignoring case and punctuation) or of the same speaker in one split "
        "(default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the hash (default: %(default)s)")


def add_filter(add: AddCommand) -> None:
    """Add the command `filter`."""
    command = add("filter", "make a dataset of the recordings that meet all conditions", _filter)
    _add_common(command)
    for name in LABELS:
        command.add_argument(
            f"--{name}", action="append", metavar="NAME", help=f"only this {name}; repeat the option for several"
        )
    command.add_argument("--min-seconds", type=_number, metavar="S", help="minimum duration in seconds")
    command.add_argument("--max-seconds", type=_number, metavar="S", help="maximum duration in seconds")
    flag = argparse.BooleanOptionalAction
    command.add_argument("--has-text", action=flag, help="only recordings with a transcript, or without")
    command.add_argument("--has-words", action=flag, help="only recordings with word times, or without")
    listed = "listed in FILE: one id per line, or JSON lines with a field id (`verify --list`, tools/align.py)"
    command.add_argument("--ids", type=Path, metavar="FILE", help=f"only those {listed}")
    command.add_argument("--exclude-ids", type=Path, metavar="FILE", help=f"none of those {listed}")
    command.add_argument(
        "--min-confidence",
        type=_number,
        metavar="C",
        help="minimum mean confidence of the word times, from 0 to 1; recordings without confidences are excluded",
    )


def add_merge(add: AddCommand) -> None:
    """Add the command `merge`."""
    command = add("merge", "merge datasets of the same features", _merge)
    command.add_argument("dirs", nargs="+", metavar="DIR", help="folders of the datasets")
    _add_out(command)
    command.add_argument("--prefix", action="store_true", help="prefix every id with the name of its folder and '/'")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", metavar="DIR", help="folder of the dataset, which is not changed")
    _add_out(command)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the new dataset, which must not exist")
    command.add_argument("--name", default="", help="name in reports (default: name of the folder)")


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e12:
        raise argparse.ArgumentTypeError(f"is {value!r}, must be a number, 0 or more")
    return number


def _share(value: str) -> float:
    number = _number(value)
    if number > 1:
        raise argparse.ArgumentTypeError(f"is {value!r}, must be a share, from 0 to 1")
    return number


def _split(options: argparse.Namespace) -> int:
    dev, test = options.dev_share, options.test_share
    if dev + test > 1:
        raise UserError(f"--dev-share {dev} and --test-share {test}: their sum is more than 1; lower one of them")
    dataset = _open(options.dir)
    if options.by == "speaker" and "" in dataset.totals("speaker"):
        unknown = dataset.totals("speaker")[""][0]
        raise UserError(f"{options.dir}: {unknown} recordings have no speaker; use --by text or --by recording")

    def entries() -> Iterator[Entry]:
        for number in _with_progress(range(len(dataset)), "split"):
            recording = stored_recording(dataset, number)
            yield dataset, number, replace(recording, split=hash_split(recording, options.by, options.seed, dev, test))

    derived = derive(options.out, entries(), options.name)
    _report(derived)
    for name, share in (("train", 1 - dev - test), ("dev", dev), ("test", test)):
        if share > 0 and name not in derived.totals("split"):
            print(f"note: no recording is in {name!r}; for few recordings, try a larger share or another --seed")
    return 0


def hash_split(recording: Recording, by: str, seed: int, dev: float, test: float) -> str:
    """'train', 'dev' or 'test', by a hash of the text (the id if there is none), the speaker or the id."""
    key = f"id {recording.id}"
    if by == "speaker":
        key = f"speaker {recording.speaker}"
    elif by == "text" and recording.text is not None:
        text = label_text(recording.text, recording.language)
        key = f"text {text}" if text else key
    share = hash_share(f"{seed} {key}")
    return "dev" if share < dev else "test" if share < dev + test else "train"


def _filter(options: argparse.Namespace) -> int:
    dataset = _open(options.dir)
    seconds = dataset.frames / dataset.features.frames_per_second
    keep = np.ones(len(dataset), bool)
    for name in LABELS:
        if getattr(options, name) is not None:
            keep &= np.isin(dataset.index.labels[name][1], _codes(dataset, name, getattr(options, name)))
    if options.min_seconds is not None:
        keep &= seconds >= options.min_seconds
    if options.max_seconds is not None:
        keep &= seconds <= options.max_seconds
    for column, wanted in (("text", options.has_text), ("words", options.has_words)):
        if wanted is not None:
            valid = [batch[column].is_valid().to_numpy(zero_copy_only=False) for batch in dataset.index.batches]
            keep &= np.concatenate(valid) == wanted
    if options.ids is not None:
        ids, unknown = _listed(dataset, options.ids)
        if unknown:
            raise UserError(f"{options.ids}: no recording {unknown[0]!r} in {options.dir} ({len(unknown)} are unknown)")
        keep &= np.isin(np.arange(len(dataset)), ids)
    if options.exclude_ids is not None:
        ids, unknown = _listed(dataset, options.exclude_ids)
        keep[ids] = False
        if unknown:
            print(f"note: {len(unknown)} ids of {options.exclude_ids} are not in {options.dir}, first {unknown[0]!r}")
    numbers = _filter_confidence(dataset, np.flatnonzero(keep), options.min_confidence)
    first = next(numbers, None)
    if first is None:
        raise UserError(f"{options.dir}: none of {len(dataset)} recordings meets all conditions; leave some out")

    def entries(first: int) -> Iterator[Entry]:
        for number in chain([first], numbers):
            yield dataset, number, stored_recording(dataset, number)

    _report(derive(options.out, entries(first), options.name), len(dataset))
    return 0


def _codes(dataset: Dataset, name: str, wanted: Collection[str]) -> list[int]:
    """Codes of the wanted values of a label. Raises UserError for a value that no recording has."""
    values = dataset.index.labels[name][0]
    for value in wanted:
        if value not in values:
            known = ", ".join(map(repr, sorted(values)))
            known = known if len(known) <= _MAX_CHARACTERS else known[:_MAX_CHARACTERS] + "..."
            near = did_you_mean(value, values)
            raise UserError(
                f"--{name} is {value!r}: no recording of {dataset.location} has this value, only {known}.{near}"
            )
    return [values.index(value) for value in wanted]


def _filter_confidence(dataset: Dataset, numbers: np.ndarray, minimum: float | None) -> Iterator[int]:
    """Numbers of the recordings with a mean confidence of their words of at least `minimum`."""
    for number in _with_progress(numbers.tolist(), "filter"):
        if minimum is not None:
            known = [word.confidence for word in dataset.words(number) or [] if word.confidence is not None]
            if not known or sum(known) / len(known) < minimum:
                continue
        yield number


def _listed(dataset: Dataset, path: Path) -> tuple[list[int], list[str]]:
    """Numbers of the recordings listed in a file, and the unknown ids."""
    numbers, unknown = [], []
    for id in read_ids(path):
        number = dataset.index.find(id)
        if number is None:
            unknown.append(id)
        else:
            numbers.append(number)
    return numbers, unknown


def read_ids(path: Path) -> list[str]:
    """Ids in a UTF-8 file: one per line, or JSON lines with a field `id` (null is skipped).

    Raises UserError naming file and line.
    """
    ids = []
    try:
        with open(path, "rb") as file:
            for number, row in enumerate(bounded_lines(file, path), 1):
                line = row.decode().strip(" \t\r\n")  # other white space may be part of an id
                id = json.loads(line).get("id", ...) if line.startswith("{") else line
                if id is not None and not isinstance(id, str):
                    raise UserError(f"{path}, line {number}: a JSON line must have a field id with a string")
                ids += [id] if id else []
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error}); write one id per line, in UTF-8") from error
    if not ids:
        raise UserError(f"{path}: lists no ids")
    return ids


def _merge(options: argparse.Namespace) -> int:
    datasets = [_open(place) for place in options.dirs]
    names = [dataset.path.resolve().name for dataset in datasets]
    prefixes = [f"{name}/" if options.prefix else "" for name in names]
    if options.prefix and len(set(names)) < len(names):
        repeated = Counter(names).most_common(1)[0][0]
        raise UserError(f"--prefix: two of the folders are called {repeated!r}; rename one of them")
    _check_distinct_ids(datasets, prefixes)

    def entries() -> Iterator[Entry]:
        total = sum(map(len, datasets))
        sources = ((d, prefix, n) for d, prefix in zip(datasets, prefixes, strict=True) for n in range(len(d)))
        for dataset, prefix, number in _with_progress(sources, "merge", total):
            recording = stored_recording(dataset, number)
            yield dataset, number, replace(recording, id=prefix + recording.id)

    _report(derive(options.out, entries(), options.name))
    return 0


def _check_distinct_ids(datasets: Sequence[Dataset], prefixes: Sequence[str]) -> None:
    """Raise UserError if two datasets have an id in common. Indexes are sorted, so memory is constant."""

    def ids(number: int) -> Iterator[tuple[str, int]]:
        return ((prefixes[number] + datasets[number].id(i), number) for i in range(len(datasets[number])))

    last, owner = "", 0
    for id, number in heapq.merge(*map(ids, range(len(datasets)))):
        if id == last:
            a, b = datasets[owner].location, datasets[number].location
            raise UserError(
                f"recording {id!r} is in {a} and in {b}: --prefix makes ids distinct, by the names of the folders"
            )
        last, owner = id, number


def _open(place: str) -> Dataset:
    """Open a complete dataset in a folder. Raises UserError for a URL."""
    dataset = open_dataset(place)
    _ = dataset.path
    return dataset


def _with_progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, with a progress bar on a terminal."""
    yield from tqdm(items, description, total, unit=" recordings", disable=not sys.stderr.isatty(), leave=False)


def _report(dataset: Dataset, available: int | None = None) -> None:
    hours = dataset.total_frames / dataset.features.frames_per_second / 3600
    splits = ", ".join(f"{count} {name or '-'}" for name, (count, _) in dataset.totals("split").items())
    count = f"{len(dataset)} of {available}" if available else f"{len(dataset)}"
    print(f"{dataset.path}: {count} recordings, {hours:.2f} hours ({splits})")
