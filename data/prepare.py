"""Turn a corpus into a dataset of log-mel shards: `python -m data.prepare CORPUS --out DIR [--field value ...]`.

An interrupted preparation continues with the same command, and ends with the same dataset as an undisturbed one. A
finished one is left alone. Unusable recordings are skipped, counted and listed in DIR/skipped.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from data.corpora import CORPORA, find_corpus
from data.corpora.base import Corpus, Source, did_you_mean
from data.errors import DataError
from data.extraction import Skipped, extract_all
from data.features import FeatureSettings
from data.index import read_json, replace_file, write_json
from data.progress import Interrupts, Progress
from data.shards import DatasetWriter, open_dataset

CORPUS_FILE = "corpus.json"
SKIPPED_FILE = "skipped.jsonl"
_REASONS_SHOWN = 10


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare, whatever the corpus."""

    out: str
    """Folder of the dataset, made where it is missing."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that read or speak, and compute features; by default one for every core that this process may use."""
    shard_mb: int = 500
    """Size of a shard in MB (10**6 bytes; 500 hold 8.7 hours). What is in finished shards survives even SIGKILL."""
    max_skipped_share: float = 0.05
    """More than this share of unusable recordings is an error: from 0 (none may be unusable) to 1."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise DataError(f"workers is {self.workers}: at least 1 is needed")
        if self.shard_mb < 1:
            raise DataError(f"shard_mb is {self.shard_mb}: must be at least 1")
        if not 0 <= self.max_skipped_share <= 1:
            raise DataError(f"max_skipped_share is {self.max_skipped_share}: must be from 0 to 1")


def prepare(name: str, corpus_settings: Any, features: FeatureSettings, settings: PrepareSettings) -> bool:
    """Prepare the corpus `name`, or continue, and tell about it on stdout. Returns whether there was anything to do.

    Raises DataError: unusable settings or corpus, a folder that holds another dataset, too many unusable recordings,
    a full disk. What finished shards hold is kept.
    """
    sources = list(find_corpus(name).sources(corpus_settings))
    identity = _identity(name, corpus_settings, sources)
    folder = Path(settings.out)
    with Interrupts() as interrupts, DatasetWriter(folder, features, settings.shard_mb * 10**6) as writer:
        _check_identity(folder / CORPUS_FILE, identity, begun=bool(writer.done_ids))
        if writer.finished:
            print(f"prepare: {folder} is already prepared: {_totals(folder)}", flush=True)
            return False
        write_json(folder / CORPUS_FILE, identity)
        remaining = [source for source in sources if source.id not in writer.done_ids]
        if writer.done_ids:
            print(f"prepare: continuing: {len(writer.done_ids)} of {len(sources)} recordings are done", flush=True)
        skipped: list[Skipped] = []
        allowed = settings.max_skipped_share * len(sources)
        results = extract_all(remaining, features, min(settings.workers, max(1, len(remaining))))
        try:
            with closing(results), Progress(len(remaining)) as progress:
                for result in results:
                    if isinstance(result, Skipped):
                        skipped.append(result)
                        if len(skipped) > allowed:
                            break
                        progress.update(0.0)
                    else:
                        with interrupts.held():
                            writer.add(result.recording, result.log_mel)
                        progress.update(len(result.log_mel) / features.frames_per_second)
        finally:
            _list_skipped(folder / SKIPPED_FILE, skipped)
        if skipped:
            print(_skipped_summary(skipped, folder), flush=True)
        if len(skipped) > allowed:
            raise DataError(
                f"at least {len(skipped)} of {len(sources)} recordings are unusable, more than max_skipped_share = "
                f"{settings.max_skipped_share}. Repair them, or allow more with --max_skipped_share, and run again"
            )
        with interrupts.held():
            writer.finish()
    print(f"prepare: finished {folder}: {_totals(folder)}", flush=True)
    return True


def _identity(name: str, corpus_settings: Any, sources: Sequence[Source]) -> dict[str, Any]:
    """What a dataset is made from, as it is written beside it."""
    ids = [source.id for source in sources]
    if not ids:
        raise DataError(f"the corpus {name!r} has no recordings with these settings: nothing to prepare")
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} recordings share their id with another, first {twice[0]!r}: rename them")
    fields = json.loads(json.dumps(dataclasses.asdict(corpus_settings), default=str))
    listed = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return {"corpus": name, "settings": fields, "recordings": len(ids), "ids_sha256": listed}


def _check_identity(path: Path, identity: dict[str, Any], begun: bool) -> None:
    """Raise DataError when the folder was begun with something else, saying what differs."""
    if not path.is_file():
        if begun:
            raise DataError(f"{path.parent} holds a dataset that data.prepare did not begin: choose another --out")
        return
    there = read_json(path)
    differences = [
        f"{field}: {there.get(field)!r} != {identity[field]!r}"
        for field in ("corpus", "recordings")
        if there.get(field) != identity[field]
    ]
    old, new = there.get("settings") or {}, identity["settings"]
    differences += [f"{k}: {old.get(k)!r} != {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
    if not differences and there.get("ids_sha256") != identity["ids_sha256"]:
        differences = ["the corpus has other recordings than it had then"]
    if differences:
        raise DataError(
            f"{path.parent} was begun with another corpus or other settings (there != now): {'; '.join(differences)}. "
            "Choose another --out, or delete that folder"
        )


def _totals(folder: Path) -> str:
    dataset = open_dataset(folder)
    hours = dataset.total_frames / dataset.features.frames_per_second / 3600
    splits = {split: count for split, (count, _) in dataset.totals("split").items()}
    return f"{hours:.2f} hours, " + ", ".join(f"{splits[split]} {split}" for split in sorted(splits))


def _list_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """One JSON object a line: {"id": ..., "reason": ...}. No file when nothing was skipped."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as file:
        for item in skipped:
            file.write(json.dumps(dataclasses.asdict(item), ensure_ascii=False).encode() + b"\n")


def _skipped_summary(skipped: Sequence[Skipped], folder: Path) -> str:
    """The reasons, commonest first, each with a count and an example."""
    groups: dict[str, list[Skipped]] = {}
    for item in skipped:
        # Without its numbers and the file's name (before the last colon), a reason is the same for many recordings.
        kind = re.sub(r"\d+", "N", re.sub(r"^\S.*?: (?=\S)", "", item.reason))
        groups.setdefault(kind, []).append(item)
    commonest = sorted(groups.values(), key=len, reverse=True)
    lines = [f"prepare: skipped {len(skipped)} recordings, listed in {folder / SKIPPED_FILE}"]
    lines += [f"  {len(group)} like {group[0].id}: {group[0].reason}" for group in commonest[:_REASONS_SHOWN]]
    return "\n".join(lines)


def usage() -> str:
    """The help of the command without a corpus."""
    width = max(map(len, CORPORA))
    listed = "\n".join(f"  {name:{width}}  {corpus.summary}" for name, corpus in CORPORA.items())
    return (
        f"usage: python -m data.prepare CORPUS --out DIR [--field value ...]\n\n{__doc__}\n"
        f"corpora:\n{listed}\n\n`python -m data.prepare CORPUS --help` lists the settings of a corpus."
    )


def parse(name: str, corpus: Corpus, arguments: Sequence[str]) -> tuple[Any, FeatureSettings, PrepareSettings]:
    """Settings from the command line: of the corpus and of the preparation as --field, of the features as
    --features.field. Dashes in names count as underscores, and lists may be written `a,b`.

    Raises DataError for a wrong value, and for an unknown name with the nearest known one.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python -m data.prepare {name}", description=corpus.summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    groups: dict[str | None, list[type]] = {None: [PrepareSettings, corpus.settings], "features": [FeatureSettings]}
    for key, classes in groups.items():
        for kind in classes:
            parser.add_class_arguments(kind, key)
    lists = [f.name for f in dataclasses.fields(corpus.settings) if str(f.type).startswith("list")]
    try:
        values = parser.parse_args(_tidy(arguments, lists)).as_dict()
    except ArgumentError as error:
        known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        raise DataError(_explain(str(error), known)) from None
    fields = {kind: {f.name: values[f.name] for f in dataclasses.fields(kind)} for kind in groups[None]}
    features = FeatureSettings(**values["features"])
    return corpus.settings(**fields[corpus.settings]), features, PrepareSettings(**fields[PrepareSettings])


def _tidy(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Arguments as the parser wants them: `--a-b x` is `--a_b=x`, and of a list `x,y` is `[x,y]`."""
    tidy: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            tidy.append("--" + name[2:].replace("-", "_") + equals + value)
        elif tidy and tidy[-1].startswith("--") and "=" not in tidy[-1]:
            tidy[-1] += f"={argument}"
        else:
            tidy.append(argument)
    listed = re.compile(rf"(--(?:{'|'.join(lists) or '(?!)'})\+?=)(?!\[)(.*)", re.DOTALL)
    return [listed.sub(r"\1[\2]", argument) for argument in tidy]


def _explain(message: str, known: Sequence[str]) -> str:
    unknown = re.findall(r"--([\w.]+)", message) if message.startswith("unrecognized arguments") else []
    unknown += re.findall(r"Option '([^']*)' is not accepted", message)
    if unknown:
        return "; ".join(f"there is no setting {n!r}.{did_you_mean(n, known)} --help lists them" for n in unknown)
    return re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        prepare(name, *parse(name, find_corpus(name), rest))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what is done is kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
