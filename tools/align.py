"""Word times for recordings that have only a transcript, from an exported CTC recogniser.

    python -m tools.align --data.dataset datasets/talks --model runs/ctc/export --out datasets/talks-timed
    torchrun --nproc-per-node 8 -m tools.align --data.dataset datasets/mls --model runs/ctc/export --out datasets/timed

Writes a new dataset with the same recordings (shards are linked, not copied) and the start, end and confidence of each
word. Recordings may last hours and have a single long transcript, since memory is bounded. Existing word times are
kept, unless --realign true. Recordings whose transcript does not match the audio are kept without word times
and listed.

The recordings are distributed over the processes. After Ctrl-C the same command continues.

Writes into --out: the dataset, unaligned.jsonl (id and reason for each recording that could not be aligned),
alignment.json (counts and settings). --words FILE.jsonl also writes the words, one line per recording.
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
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt
from tqdm import tqdm

from bestrq.alignment.alignment import (
    AlignmentSettings,
    LogProbSpool,
    exclude_frames,
    forced_alignment,
    refusal,
    word_times,
)
from bestrq.alignment.pieces import STAR, Transcript
from bestrq.decoding.tokens import BLANK
from bestrq.long_form.inference import InferenceSettings, RecordingSource, excluded_frames, model_outputs
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common import json_checks
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.files import read_json_object, replace_file, write_file, write_json
from common.json_checks import fields, list_of, number, positive_or_zero, row_of
from common.text import label_words
from data.format.dataset import Dataset, open_dataset
from data.shards.derive import Entry, derive, stored_recording
from data.tokenizer import Tokenizer
from data.transcripts import Word
from pipelines.recogniser import (
    DataSettings,
    Recogniser,
    check_features,
    ctc_outputs,
    hash_of_export,
    load_recogniser,
    mel_reader,
    resolve_inference,
    share_out,
    start_inference,
)
from pipelines.recording_log import RecordingLog, open_log

FORMAT_VERSION = 1
SUMMARY, UNALIGNED = "alignment.json", "unaligned.jsonl"


@dataclass
class Config:
    """Word times from an exported CTC recogniser."""

    model: str = ""
    """folder of the recogniser, RUN_FOLDER/export of finetune_ctc.py, or of finetune_rnnt.py with a CTC head"""
    out: str = ""
    """folder of the new dataset; must not exist"""
    words: str = ""
    """JSON-lines file for the words; may be given without --out"""
    realign: bool = False
    """also align recordings that already have word times"""
    data: DataSettings = field(default_factory=DataSettings)
    """recordings to align; the others stay unchanged"""
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    """placement of words, and limits for refusing a transcript"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if a GPU is available"""
    threads: NonNegativeInt = 0
    """CPU threads per process; 0 divides the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, value in (("model", self.model), ("data.dataset", self.data.dataset)):
            if not value:
                raise UserError(f"{name} is missing: give it as --{name} FOLDER")
        if not self.out and not self.words:
            raise UserError("out is missing: give the new dataset's folder as --out FOLDER, or --words FILE.jsonl")


def align(config: Config, world: World) -> None:
    """Align all recordings and write the outputs. All processes call it."""
    # Errors in the settings are raised here, before any work.
    config = replace(config, inference=resolve_inference(config.inference, world))
    export = read_export(config.model)
    recogniser = load_recogniser(export)
    ctc_outputs(recogniser, config.model)  # raises if there is no CTC head
    dataset = open_dataset(config.data.dataset)
    check_features(recogniser.features, dataset)
    if config.out:
        _ = dataset.path  # raises if the dataset is not a local folder, whose shards can be linked
    selected = dataset.select(config.data.split or None, config.data.language or None)
    export_hash = world.broadcast(hash_of_export(export) if world.is_main else None)
    key = key_of(config, export_hash, dataset)
    if is_finished(config, key):
        if world.is_main:
            print(f"{config.out} already holds this alignment; remove it to align again")
        return
    without_times = [int(i) for i in selected if config.realign or not dataset.words(i)]
    with_text = [i for i in without_times if dataset.text(i) is not None]
    if not with_text:
        num_timed = len(selected) - len(without_times)
        raise UserError(
            f"{dataset.location}: nothing to align: {num_timed} of {len(selected)} recordings already have word times, "
            "the others have no transcript; --realign true replaces the word times"
        )
    work = work_folder(config)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot make this folder ({error}); choose another --out") from error

    results = Results(work, key, len(dataset))
    world.barrier()  # all ranks read the same logs before any of them appends to its own
    remaining = [i for i in with_text if not results.has(i)]
    if world.is_main and len(remaining) < len(with_text):
        print(f"continuing: {len(with_text) - len(remaining)} of {len(with_text)} recordings are already aligned")
    rank_recordings = share_out(remaining, dataset.frames, world)
    with open_log(work / f"{key[:16]}-{world.rank:05d}.jsonl") as log:
        for i, result in align_recordings(recogniser, dataset, rank_recordings, config, world):
            log.write(json.dumps({"number": i, **result}).encode() + b"\n")
    world.barrier()
    if world.is_main:
        finish(config, dataset, Results(work, key, len(dataset)), without_times, key, export_hash, world.size)
        shutil.rmtree(work)
    world.barrier()


def key_of(config: Config, export_hash: str, dataset: Dataset) -> str:
    """Hash of everything that determines the words of a recording; the batch size has no effect."""
    inference = {name: value for name, value in to_dict(config.inference).items() if name != "batch_seconds"}
    if inference["mode"] == "buffered":
        del inference["mode"]  # keeps the keys of earlier versions, which had only this mode
    content = [FORMAT_VERSION, export_hash, dataset.fingerprint, inference, to_dict(config.alignment)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def choice_of(config: Config) -> dict[str, Any]:
    """Settings that select recordings."""
    return {"split": config.data.split, "language": config.data.language, "realign": config.realign}


def is_finished(config: Config, key: str) -> bool:
    """Return whether --out is the finished output of these settings. Raises UserError if it is anything else."""
    out = Path(config.out)
    if not config.out or not out.exists():
        return False
    with suppress(UserError):
        summary = read_json_object(out / SUMMARY)
        if summary.get("key") == key and summary.get("choice") == choice_of(config):
            return True
    raise UserError(f"out = {config.out}: already exists and is another dataset; choose another folder")


def work_folder(config: Config) -> Path:
    """Folder for results until the alignment is finished, next to --out, so that a rename into place is atomic."""
    target = Path(config.out or config.words)
    return target.with_name(f"{target.name}.align")


_WORDS = fields({"words": list_of(row_of(json_checks.text, positive_or_zero, positive_or_zero, number))})
_REASON = fields({"reason": json_checks.text})


def _check_result(value: Any, place: str) -> None:
    """Check of a result: words with times and confidence, or a reason."""
    (_REASON if isinstance(value, dict) and "reason" in value else _WORDS)(value, place)


class Results:
    """Words of recordings, or the reason for their absence, from the logs of all ranks."""

    def __init__(self, work: Path, key: str, num_recordings: int) -> None:
        self._log = RecordingLog(work, key[:16], num_recordings, _check_result)

    def has(self, recording: int) -> bool:
        return self._log.has(recording)

    def __getitem__(self, recording: int) -> dict[str, Any]:
        """`words` (lists of the fields of `Word`) and `cost`, or `reason`."""
        if not self.has(recording):  # recordings without a transcript are not aligned
            return {"reason": "there is no transcript"}
        return self._log[recording]


def align_recordings(
    recogniser: Recogniser, dataset: Dataset, recordings: list[int], config: Config, world: World
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each recording as soon as it is aligned, with `words` and `cost` or with a `reason`."""
    frames_per_second = dataset.features.frames_per_second
    model = recogniser.model.to(world.device)
    log_probs = ctc_outputs(recogniser, config.model)
    stride = model.encoder.settings.stride
    vocab_size = recogniser.tokenizer.vocab_size

    # Excluded intervals are not in the transcript; their frames become blanks.
    sources = [
        RecordingSource(int(dataset.frames[i]), mel_reader(recogniser, dataset, i), dataset.excluded(i) or ())
        for i in recordings
    ]
    spool = LogProbSpool(vocab_size)
    outputs = model_outputs(
        log_probs, sources, config.inference, stride, frames_per_second, world.device, reduce=spool.keep
    )  # fmt: skip
    total = round(sum(source.num_frames for source in sources) / frames_per_second)
    label = "aligning" if world.size == 1 else f"aligning (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    with tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar:
        for index, best in outputs:
            i = recordings[index]
            words = (dataset.text(i) or "").split()
            transcript = labels_of(words, recogniser.tokenizer, dataset.language(i))
            duration = sources[index].num_frames / frames_per_second
            if len(transcript.ids):
                excluded = excluded_frames(sources[index], len(best), frames_per_second / stride)
                read = exclude_frames(spool.read, excluded.numpy())
                best = best.masked_fill(excluded, BLANK)
                placed = forced_alignment(read, best.numpy(), transcript, vocab_size, config.alignment)
                reason = refusal(placed, transcript, len(best), config.alignment)
                times = word_times(placed, stride / frames_per_second, duration, config.alignment)
                columns = (column.round(3).tolist() for column in (*times, placed.confidence))
                timed = [Word(*fields) for fields in zip(words, *columns, strict=True)]
                yield i, {"reason": reason} if reason else {"words": timed, "cost": round(placed.cost, 3)}
            else:
                yield i, {"reason": "the transcript is empty"}
            spool.clear()
            bar.update(round(duration))


def labels_of(words: list[str], tokenizer: Tokenizer, language: str) -> Transcript:
    """Labels of each word: a star for a word that the tokenizer cannot encode, no label for punctuation."""
    labels_by_text: dict[str, list[int]] = {}
    texts = label_words(words, language)
    for text in texts:
        if text not in labels_by_text:
            labels = encode(text, tokenizer)
            labels_by_text[text] = [STAR] if labels is None else labels
    return Transcript.from_words([labels_by_text[text] for text in texts], encode(" ", tokenizer) or [])


def encode(text: str, tokenizer: Tokenizer) -> list[int] | None:
    """Labels of a text, or None if the tokenizer cannot encode it without loss."""
    try:
        labels = tokenizer.encode(text)
    except UserError:
        return None
    return labels if tokenizer.decode(labels).strip() == text.strip() else None


def finish(
    config: Config, dataset: Dataset, results: Results, recordings: list[int], key: str, export_hash: str,
    world_size: int,
) -> None:  # fmt: skip
    """Write the new dataset with its two lists, and the file of words, each atomically."""
    reasons: Counter[str] = Counter()
    unaligned: list[dict[str, str]] = []
    totals: dict[str, float] = {"recordings": 0, "seconds": 0.0, "words": 0, "confidence": 0.0, "guessed_words": 0}
    for i in recordings:
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
        "unaligned": dict(reasons), "left_as_they_were": len(dataset) - len(recordings),
    }  # fmt: skip
    if config.words:
        write_words(Path(config.words), dataset, results, recordings)
    if config.out:
        folder = work_folder(config) / "dataset"
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was interrupted here
        derive(folder, entries(dataset, results, recordings), name=Path(config.out).name)
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in unaligned)
        write_file(folder / UNALIGNED, lines)
        write_json(folder / SUMMARY, summary)
        os.replace(folder, config.out)
    print(
        f"aligned: {totals['recordings']:,} recordings, {totals['seconds'] / 3600:,.1f} h, {totals['words']:,} words "
        f"({totals['guessed_words']:,} guessed), mean confidence {summary['mean_confidence']:.2f}"
    )
    for reason, count in reasons.most_common():
        print(f"not aligned, kept without words: {count:,} recordings: {reason}")
    if config.out:
        print(f"dataset: {config.out}; recordings that were not aligned: {Path(config.out) / UNALIGNED}")


def entries(dataset: Dataset, results: Results, recordings: list[int]) -> Iterator[Entry]:
    """Entries of all recordings of the dataset, those of `recordings` with their new words."""
    changed = set(recordings)
    for i in range(len(dataset)):
        recording = stored_recording(dataset, i)
        if i in changed:
            result = results[i]
            recording = replace(recording, words=None if "reason" in result else [Word(*w) for w in result["words"]])
        yield dataset, i, recording


def write_words(path: Path, dataset: Dataset, results: Results, recordings: list[int]) -> None:
    """Write one JSON line per recording: id, and words or the reason for their absence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        for i in recordings:
            result = results[i]
            words = None if "reason" in result else [Word(*word)._asdict() for word in result["words"]]
            line = {"id": dataset.id(i), "words": words, "cost": result.get("cost"), "reason": result.get("reason")}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    config = parse(Config, description=__doc__)
    world = start_inference(config.device, config.threads, config.inference)
    align(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
