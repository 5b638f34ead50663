"""Datasets made of datasets: new splits, a choice of recordings, several joined. The sound is linked, not copied."""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from common.errors import UserError, did_you_mean
from common.hashing import hash_share
from common.text import label_text
from data.format.dataset import Dataset, Recording, open_dataset
from data.format.index import LABELS
from data.shards.derive import Entry, derive

Add = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
Item = TypeVar("Item")
_CHARACTERS_SHOWN = 60


def add_split(add: Add) -> None:
    """Adds the command `split`; `add` makes a parser."""
    command = add(
        "split", "make a dataset with new splits: train, dev and test by a hash, alike on every machine", _split
    )
    _add_common(command)
    command.add_argument("--dev-share", type=_share, default=0.05, help="share of 'dev', about (default: %(default)s)")
    command.add_argument(
        "--test-share", type=_share, default=0.05, help="share of 'test', about (default: %(default)s)"
    )
    command.add_argument(
        "--by",
        choices=("text", "speaker", "recording"),
        default="text",
        help="recordings with one text (whatever its case and punctuation), or of one speaker, come into one split "
        "(default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="another number draws other splits (default: %(default)s)")


def add_filter(add: Add) -> None:
    """Adds the command `filter`; `add` makes a parser."""
    command = add("filter", "make a dataset of the recordings that meet all conditions", _filter)
    _add_common(command)
    for name in LABELS:
        command.add_argument(f"--{name}", action="append", metavar="NAME", help=f"this {name}; repeat it for several")
    command.add_argument("--min-seconds", type=_number, metavar="S", help="at least as long")
    command.add_argument("--max-seconds", type=_number, metavar="S", help="at most as long")
    flag = argparse.BooleanOptionalAction
    command.add_argument("--has-text", action=flag, help="with a transcript, or without")
    command.add_argument("--has-words", action=flag, help="with word times, or without")
    listed = (
        "listed in FILE: an id a line, or JSON lines with a field id, as `verify --list` and tools/align.py write them"
    )
    command.add_argument("--ids", type=Path, metavar="FILE", help=f"those {listed}")
    command.add_argument("--exclude-ids", type=Path, metavar="FILE", help=f"all but those {listed}")
    command.add_argument(
        "--min-confidence",
        type=_number,
        metavar="C",
        help="mean confidence of the word times at least this, from 0 to 1; those that tell none are left out",
    )


def add_merge(add: Add) -> None:
    """Adds the command `merge`; `add` makes a parser."""
    command = add("merge", "join datasets of the same features into one", _merge)
    command.add_argument("dirs", nargs="+", metavar="DIR", help="the datasets' folders")
    _add_out(command)
    command.add_argument("--prefix", action="store_true", help="put the name of its folder and '/' before every id")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", metavar="DIR", help="the dataset's folder; it stays as it is")
    _add_out(command)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the new dataset, which must not exist")
    command.add_argument("--name", default="", help="what reports call it (default: the folder's name)")


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
        raise UserError(f"--dev-share {dev} and --test-share {test} are together more than 1: lower one of them")
    dataset = _open(options.dir)
    if options.by == "speaker" and "" in dataset.totals("speaker"):
        unknown = dataset.totals("speaker")[""][0]
        raise UserError(f"{options.dir}: {unknown} recordings have no speaker; use --by text or --by recording")

    def entries() -> Iterator[Entry]:
        for number in _shown(range(len(dataset)), "split"):
            recording = dataset.recording(number)
            yield dataset, number, replace(recording, split=split_of(recording, options.by, options.seed, dev, test))

    made = derive(options.out, entries(), options.name)
    _report(made)
    for name, share in (("train", 1 - dev - test), ("dev", dev), ("test", test)):
        if share > 0 and name not in made.totals("split"):
            print(f"note: no recording came into {name!r}; with so few, try a greater share or another --seed")
    return 0


def split_of(recording: Recording, by: str, seed: int, dev: float, test: float) -> str:
    """'train', 'dev' or 'test', from the text, the speaker or the id alone. Without text it is from the id."""
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
            there = [batch[column].is_valid().to_numpy(zero_copy_only=False) for batch in dataset.index.batches]
            keep &= np.concatenate(there) == wanted
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
    numbers = _confident(dataset, np.flatnonzero(keep), options.min_confidence)
    first = next(numbers, None)
    if first is None:
        raise UserError(f"{options.dir}: none of {len(dataset)} recordings meets all conditions; leave some out")

    def entries(first: int) -> Iterator[Entry]:
        for number in (n for some in ([first], numbers) for n in some):
            yield dataset, number, dataset.recording(number)

    _report(derive(options.out, entries(first), options.name), len(dataset))
    return 0


def _codes(dataset: Dataset, name: str, wanted: Collection[str]) -> list[int]:
    """Codes of the wanted values of a label. UserError for one that no recording has."""
    values = dataset.index.labels[name][0]
    for value in wanted:
        if value not in values:
            known = ", ".join(map(repr, sorted(values)))
            known = known if len(known) <= _CHARACTERS_SHOWN else known[:_CHARACTERS_SHOWN] + "..."
            near = did_you_mean(value, values)
            raise UserError(
                f"--{name} is {value!r}: no recording of {dataset.location} has it, they have {known}.{near}"
            )
    return [values.index(value) for value in wanted]


def _confident(dataset: Dataset, numbers: np.ndarray, least: float | None) -> Iterator[int]:
    """Those of the recordings whose words are sure enough."""
    for number in _shown(numbers.tolist(), "filter"):
        if least is not None:
            told = [word.confidence for word in dataset.words(number) or [] if word.confidence is not None]
            if not told or sum(told) / len(told) < least:
                continue
        yield number


def _listed(dataset: Dataset, path: Path) -> tuple[list[int], list[str]]:
    """Numbers of the recordings listed in a file, and the ids that the dataset does not have."""
    numbers, unknown = [], []
    for id in read_ids(path):
        number = dataset.index.find(id)
        if number is None:
            unknown.append(id)
        else:
            numbers.append(number)
    return numbers, unknown


def read_ids(path: Path) -> list[str]:
    """Ids in a UTF-8 file: one a line, or JSON lines with a field `id` (null where it is about no recording).

    Raises UserError naming file and line.
    """
    ids = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                line = line.strip(" \t\r\n")  # other spaces may be part of an id
                id = json.loads(line).get("id", ...) if line.startswith("{") else line
                if id is not None and not isinstance(id, str):
                    raise UserError(f"{path}, line {number}: a JSON line must have a field id, which is a text")
                ids += [id] if id else []
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error}); write one id a line, in UTF-8") from error
    if not ids:
        raise UserError(f"{path}: lists no ids")
    return ids


def _merge(options: argparse.Namespace) -> int:
    datasets = [_open(place) for place in options.dirs]
    names = [dataset.path.resolve().name for dataset in datasets]
    prefixes = [f"{name}/" if options.prefix else "" for name in names]
    if options.prefix and len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"--prefix: two of the folders are called {twice!r}; rename one of them")
    _check_apart(datasets, prefixes)

    def entries() -> Iterator[Entry]:
        total = sum(map(len, datasets))
        everything = ((d, prefix, n) for d, prefix in zip(datasets, prefixes, strict=True) for n in range(len(d)))
        for dataset, prefix, number in _shown(everything, "merge", total):
            recording = dataset.recording(number)
            yield dataset, number, replace(recording, id=prefix + recording.id)

    _report(derive(options.out, entries(), options.name))
    return 0


def _check_apart(datasets: Sequence[Dataset], prefixes: Sequence[str]) -> None:
    """Raise UserError where two datasets have an id in common. Indexes are sorted, so nothing has to be held."""

    def ids(number: int) -> Iterator[tuple[str, int]]:
        return ((prefixes[number] + datasets[number].id(i), number) for i in range(len(datasets[number])))

    last, owner = "", 0
    for id, number in heapq.merge(*map(ids, range(len(datasets)))):
        if id == last:
            a, b = datasets[owner].location, datasets[number].location
            raise UserError(f"recording {id!r} is in {a} and in {b}: --prefix keeps ids apart, by the folders' names")
        last, owner = id, number


def _open(place: str) -> Dataset:
    """A dataset in a folder, whole. UserError for a URL."""
    dataset = open_dataset(place)
    _ = dataset.path
    return dataset


def _shown(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """With a progress bar on a terminal."""
    yield from tqdm(items, what, total, unit=" recordings", disable=not sys.stderr.isatty(), leave=False)


def _report(made: Dataset, of: int | None = None) -> None:
    hours = made.total_frames / made.features.frames_per_second / 3600
    splits = ", ".join(f"{count} {name or '-'}" for name, (count, _) in made.totals("split").items())
    print(f"{made.path}: {len(made)}{f' of {of}' if of else ''} recordings, {hours:.2f} hours ({splits})")
