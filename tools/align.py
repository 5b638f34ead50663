"""Word times for recordings that have only a transcript, from an exported CTC recogniser.

    python -m tools.align --data.dataset datasets/talks --model runs/ctc/export --out datasets/talks-timed
    torchrun --nproc-per-node 8 -m tools.align --data.dataset datasets/mls --model runs/ctc/export --out datasets/timed

Makes a new dataset: the same recordings (the sound is linked, not copied), their words with start, end and confidence.
A recording may last hours and have one long transcript: memory stays bounded. Words that are there already are kept,
unless --realign true. Recordings whose transcript is not what was said are kept without words, and listed.

The processes share the recordings out. After Ctrl-C the same command goes on where it was.

Writes into --out: the dataset, unaligned.jsonl (id and reason of every recording that could not be aligned),
alignment.json (counts and settings); with --words FILE.jsonl also the words, one line a recording.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from tqdm import tqdm

from bestrq.alignment.alignment import (
    AlignmentSettings,
    LogProbSpool,
    blank_excluded,
    forced_alignment,
    refusal,
    word_times,
)
from bestrq.alignment.pieces import STAR, Transcript
from bestrq.decoding.tokens import BLANK
from bestrq.long_form.inference import InferenceSettings, Source, excluded_frames, transcribe
from bestrq.training.export import read_export
from bestrq.training.precision import warn_of_emulation
from bestrq.training.process import DistributedSettings, World, start_world
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.files import replace_file
from common.text import label_words
from data.features import difference
from data.format.dataset import Dataset, open_dataset
from data.shards.derive import Entry, derive
from data.tokenizer import Tokenizer
from data.transcripts import Word
from pipelines.recogniser import Recogniser, ctc_outputs, hash_of_export, load_recogniser, mel_reader, share_out

FORMAT_VERSION = 1
SUMMARY, UNALIGNED = "alignment.json", "unaligned.jsonl"


@dataclass
class DataSettings:
    """Which recordings get word times; the others stay as they are."""

    dataset: str = ""
    """dataset folder, made by `python -m data.prepare`"""
    split: str = ""
    """only this split; empty takes all"""
    language: str = ""
    """only recordings of this language; empty takes all"""


@dataclass
class Config:
    """Word times from an exported CTC recogniser."""

    model: str = ""
    """folder of the recogniser, RUN_FOLDER/export of finetune_ctc.py, or of finetune_rnnt.py with a CTC head"""
    out: str = ""
    """folder of the new dataset, which must not exist"""
    words: str = ""
    """file for the words, JSON lines; with it, --out may be missing"""
    realign: bool = False
    """also replace the words of recordings that have word times already"""
    data: DataSettings = field(default_factory=DataSettings)
    """recordings"""
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    """how words are placed, and when a transcript is refused"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU"""
    threads: int = 0
    """CPU threads of every process; 0 shares the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, value in (("model", self.model), ("data.dataset", self.data.dataset)):
            if not value:
                raise UserError(f"{name} is missing: give it as --{name} FOLDER")
        if not self.out and not self.words:
            raise UserError("out is missing: give the new dataset's folder as --out FOLDER, or --words FILE.jsonl")


def align(config: Config, world: World) -> None:
    """The whole alignment, as every process runs it."""
    # Everything that a user can get wrong comes before any work.
    export = read_export(config.model)
    recogniser = load_recogniser(export)
    ctc_outputs(recogniser, config.model)  # an error now, where there are none
    dataset = open_dataset(config.data.dataset)
    if different := difference(recogniser.features, dataset.features):
        raise UserError(
            f"the features of {config.data.dataset} are not those of the model (model != dataset): "
            f"{'; '.join(different)}. Prepare the dataset again with the model's features"
        )
    if config.out:
        _ = dataset.path  # the sound is linked from there: a UserError now where that cannot be
    chosen = dataset.select(config.data.split or None, config.data.language or None)
    export_hash = world.broadcast(hash_of_export(export) if world.is_main else None)
    key = key_of(config, export_hash, dataset)
    if is_finished(config, key):
        if world.is_main:
            print(f"{config.out} holds this alignment already; remove it to align again")
        return
    wanted = [int(i) for i in chosen if config.realign or not dataset.words(i)]
    spoken = [i for i in wanted if dataset.text(i) is not None]
    if not spoken:
        kept = f"{len(chosen) - len(wanted)} of {len(chosen)} have words already, the others no transcript"
        raise UserError(f"{dataset.location}: nothing to align: {kept}; --realign true makes those words anew")
    work = work_folder(config)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot make this folder ({error}); choose another --out") from error

    results = Results(work, key, len(dataset))
    world.barrier()  # nobody writes before all have read the same
    left = [i for i in spoken if not results.has(i)]
    if world.is_main and len(left) < len(spoken):
        print(f"going on: {len(spoken) - len(left)} of {len(spoken)} recordings are done already")
    with open_log(work / f"{key[:16]}-{world.rank:05d}.jsonl") as log:
        for i, result in align_recordings(recogniser, dataset, share_out(left, dataset.frames, world), config, world):
            log.write(json.dumps({"number": i, **result}).encode() + b"\n")
    world.barrier()
    if world.is_main:
        finish(config, dataset, Results(work, key, len(dataset)), wanted, key, export_hash, world.size)
        shutil.rmtree(work)
    world.barrier()


def key_of(config: Config, export_hash: str, dataset: Dataset) -> str:
    """Names what was computed: under one key a recording's words are the same. Batches are no part of it."""
    inference = {name: value for name, value in to_dict(config.inference).items() if name != "batch_seconds"}
    if inference["mode"] == "buffered":
        del inference["mode"]  # as it was before there were others: what was aligned then counts
    content = [FORMAT_VERSION, export_hash, dataset.fingerprint, inference, to_dict(config.alignment)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def choice_of(config: Config) -> dict[str, Any]:
    """The settings that choose recordings."""
    return {"split": config.data.split, "language": config.data.language, "realign": config.realign}


def is_finished(config: Config, key: str) -> bool:
    """Whether --out is the outcome of this very command. Raises UserError where it is anything else."""
    out = Path(config.out)
    if not config.out or not out.exists():
        return False
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    if isinstance(summary, dict) and summary.get("key") == key and summary.get("choice") == choice_of(config):
        return True
    raise UserError(f"out = {config.out}: exists already and is another dataset; choose another folder")


def work_folder(config: Config) -> Path:
    """Where results are kept while the work lasts: beside --out, so that renaming it into place is atomic."""
    target = Path(config.out or config.words)
    return target.with_name(f"{target.name}.align")


class Results:
    """What the processes of all starts have written, by the recording's number; words stay on disk."""

    def __init__(self, work: Path, key: str, num_recordings: int) -> None:
        self._paths = sorted(work.glob(f"{key[:16]}-*.jsonl"))
        self._place = np.full((num_recordings, 2), -1, np.int64)  # file, byte
        for number, path in enumerate(self._paths):
            offset = 0
            with open(path, "rb") as file:
                for line in file:
                    # A process may have been stopped in the middle of a line.
                    with suppress(ValueError, TypeError, LookupError):
                        self._place[json.loads(line)["number"]] = number, offset
                    offset += len(line)

    def has(self, recording: int) -> bool:
        return bool(self._place[recording, 0] >= 0)

    def __getitem__(self, recording: int) -> dict[str, Any]:
        """`words` (lists as `Word`) and `cost`, or `reason`; only recordings with a transcript are ever worked on."""
        if not self.has(recording):
            return {"reason": "there is no transcript"}
        number, offset = self._place[recording]
        with open(self._paths[number], "rb") as file:
            file.seek(offset)
            result: dict[str, Any] = json.loads(file.readline())
        return result


def open_log(path: Path) -> BinaryIO:
    """A file to append lines to, each written at once; a half line of a stopped process is ended first."""
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - the caller closes it
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def align_recordings(
    recogniser: Recogniser, dataset: Dataset, mine: list[int], config: Config, world: World
) -> Iterator[tuple[int, dict[str, Any]]]:
    """This rank's recordings, each as soon as it is aligned: its number, and `words` or a `reason`."""
    frames_per_second = dataset.features.frames_per_second
    model = recogniser.model.to(world.device)
    log_probs = ctc_outputs(recogniser, config.model)
    factor = model.encoder.settings.stride
    vocab_size = recogniser.tokenizer.vocab_size

    # What is excluded is not in the transcript: it becomes silence.
    sources = [
        Source(int(dataset.frames[i]), mel_reader(recogniser, dataset, i), dataset.excluded(i) or ()) for i in mine
    ]
    spool = LogProbSpool(vocab_size)
    outputs = transcribe(
        log_probs, sources, config.inference, factor, frames_per_second, world.device, reduce=spool.keep
    )  # fmt: skip
    total = round(sum(source.num_frames for source in sources) / frames_per_second)
    label = "aligning" if world.size == 1 else f"aligning (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    with tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar:
        for index, best in outputs:
            i = mine[index]
            words = (dataset.text(i) or "").split()
            transcript = labels_of(words, recogniser.tokenizer, dataset.language(i))
            duration = sources[index].num_frames / frames_per_second
            if len(transcript.ids):
                excluded = excluded_frames(sources[index], len(best), frames_per_second / factor)
                read = blank_excluded(spool.read, excluded.numpy())
                best = best.masked_fill(excluded, BLANK)
                placed = forced_alignment(read, best.numpy(), transcript, vocab_size, config.alignment)
                reason = refusal(placed, transcript, len(best), config.alignment)
                times = word_times(placed, factor / frames_per_second, duration, config.alignment)
                columns = (column.round(3).tolist() for column in (*times, placed.confidence))
                timed = [Word(*one) for one in zip(words, *columns, strict=True)]
                yield i, {"reason": reason} if reason else {"words": timed, "cost": round(placed.cost, 3)}
            else:
                yield i, {"reason": "the transcript is empty"}
            spool.clear()
            bar.update(round(duration))


def labels_of(words: list[str], tokenizer: Tokenizer, language: str) -> Transcript:
    """Labels of words as they are written; a word that the tokenizer cannot write is a star, punctuation has none."""
    known: dict[str, list[int]] = {}
    labels = label_words(words, language)
    for label in labels:
        if label not in known:
            known[label] = labels_of_word(label, tokenizer)
    return Transcript.from_words([known[label] for label in labels], encode(" ", tokenizer) or [])


def labels_of_word(text: str, tokenizer: Tokenizer) -> list[int]:
    labels = encode(text, tokenizer)
    return [STAR] if labels is None else labels


def encode(text: str, tokenizer: Tokenizer) -> list[int] | None:
    """Labels of a text, or None where they do not spell it."""
    try:
        labels = tokenizer.encode(text)
    except UserError:
        return None
    return labels if tokenizer.decode(labels).strip() == text.strip() else None


def finish(
    config: Config, dataset: Dataset, results: Results, wanted: list[int], key: str, export_hash: str, world_size: int
) -> None:
    """The new dataset, its two lists, and the file of words; all of them complete or not there."""
    reasons: Counter[str] = Counter()
    unaligned: list[dict[str, str]] = []
    totals: dict[str, float] = {"recordings": 0, "seconds": 0.0, "words": 0, "confidence": 0.0, "guessed_words": 0}
    for i in wanted:
        result = results[i]
        if "reason" in result:
            unaligned.append({"id": dataset.id(i), "reason": result["reason"]})
            reasons[result["reason"].split(":")[0]] += 1
            continue
        totals["recordings"] += 1
        totals["seconds"] += int(dataset.frames[i]) / dataset.features.frames_per_second
        totals["words"] += len(result["words"])
        totals["confidence"] += sum(word[3] for word in result["words"])
        totals["guessed_words"] += len([word for word in result["words"] if word[3] == 0])
    summary = {
        "format_version": FORMAT_VERSION, "key": key, "choice": choice_of(config), "dataset": config.data.dataset,
        "fingerprint": dataset.fingerprint, "model": config.model, "export_hash": export_hash,
        "alignment": to_dict(config.alignment), "inference": to_dict(config.inference),
        "command": shlex.join(["python", *sys.argv]), "world_size": world_size,
        "aligned": {name: value for name, value in totals.items() if name != "confidence"},
        "mean_confidence": round(totals["confidence"] / max(1, totals["words"]), 4),
        "unaligned": dict(reasons), "left_as_they_were": len(dataset) - len(wanted),
    }  # fmt: skip
    if config.words:
        write_words(Path(config.words), dataset, results, wanted)
    if config.out:
        folder = work_folder(config) / "dataset"
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was stopped here
        derive(folder, entries(dataset, results, wanted), name=Path(config.out).name)
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in unaligned)
        for name, content in ((UNALIGNED, lines), (SUMMARY, json.dumps(summary, indent=1) + "\n")):
            with replace_file(folder / name) as file:
                file.write(content.encode())
        os.replace(folder, config.out)
    print(
        f"aligned: {totals['recordings']:,} recordings, {totals['seconds'] / 3600:,.1f} h, {totals['words']:,} words "
        f"({totals['guessed_words']:,} guessed), mean confidence {summary['mean_confidence']:.2f}"
    )
    for reason, count in reasons.most_common():
        print(f"not aligned, kept without words: {count:,} recordings: {reason}")
    if config.out:
        print(f"dataset: {config.out}; what was not aligned: {Path(config.out) / UNALIGNED}")


def entries(dataset: Dataset, results: Results, wanted: list[int]) -> Iterator[Entry]:
    """Every recording of the dataset, with its new words where there are any."""
    anew = set(wanted)
    for i in range(len(dataset)):
        recording = dataset.recording(i)
        if i in anew:
            result = results[i]
            recording = replace(recording, words=None if "reason" in result else [Word(*w) for w in result["words"]])
        yield dataset, i, recording


def write_words(path: Path, dataset: Dataset, results: Results, wanted: list[int]) -> None:
    """One JSON line a recording: its id and its words, or the reason why there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        for i in wanted:
            result = results[i]
            words = None if "reason" in result else [Word(*word)._asdict() for word in result["words"]]
            line = {"id": dataset.id(i), "words": words, "cost": result.get("cost"), "reason": result.get("reason")}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    config = parse(Config, description=__doc__)
    # Who has done his share waits for the others, and all for the writing of the dataset: hours rather than minutes.
    distributed = DistributedSettings(
        device=config.device, threads=config.threads, precision="float32", timeout_minutes=24 * 60
    )
    world = start_world(distributed)
    warn_of_emulation("inference.precision", config.inference.precision, world)
    align(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
