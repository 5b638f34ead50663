"""Pseudo-labels for recordings without transcripts, from an exported recogniser, as a dataset for fine-tuning.

    python -m tools.pseudo_label --export runs/seed/export --data.dataset datasets/talks --filter.keep 0.5 \\
        --out datasets/talks-pseudo
    python -m tools.pseudo_label --export runs/seed/export --data.dataset datasets/calls --data.language cs \\
        --labels.minutes 30 --decoder.beam 8 --decoder.language_model lm.arpa --out datasets/calls-pseudo
    torchrun --nproc-per-node 8 -m tools.pseudo_label --export runs/seed/export --data.dataset datasets/mls --out pseudo

Writes a new dataset (shards are linked, not copied) with the recordings that the filter keeps, with hypotheses and word
times in place of transcripts. Recordings whose labels a fine-tuning run used are left out with the settings `labels` of
that run. References, where the dataset has any, do not influence the choice: they only show its precision. To train on
both: `data.mixture`, with `pseudo_labels: true` for this dataset (docs/self_training.md).

The recordings are distributed over the processes. After Ctrl-C the same command continues. With --hypotheses FOLDER,
the hypotheses are kept there, and other filters reuse them.

Writes into --out: the dataset, pseudo_labels.json (provenance, settings, counts, precision by confidence),
hypotheses.jsonl (every hypothesis with its confidence), and, with references, precision.svg.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt
from tqdm import tqdm

from bestrq.long_form.decoders import Decoder, DecoderSettings, decode_recordings
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.report.filter_chart import precision_svg
from bestrq.scoring.word_errors import score_recording
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.files import hash_of_file, read_json_object, replace_file, write_file, write_json
from data.format.dataset import Dataset, open_dataset
from data.shards.derive import Entry, derive, stored_recording
from pipelines.curriculum import choose_labelled
from pipelines.pseudo_labels import (
    FilterSettings,
    Hypothesis,
    Scored,
    check_hypothesis,
    cut_words,
    hypothesis_of,
    is_kept,
    precision_row,
    precision_table,
    precision_text,
    threshold_of,
)
from pipelines.recogniser import (
    DataSettings,
    EncoderChanges,
    Recogniser,
    check_features,
    hash_of_export,
    load_recogniser,
    make_decoder,
    mel_reader,
    resolve_inference,
    share_out,
    start_inference,
    timed_transcript,
    try_decoding,
)
from pipelines.recording_log import RecordingLog, open_log

FORMAT_VERSION = 1
SUMMARY, HYPOTHESES, PICTURE = "pseudo_labels.json", "hypotheses.jsonl", "precision.svg"


@dataclass
class LabelSettings:
    """Recordings to leave out because a fine-tuning run used their labels: settings of that run, on this dataset."""

    minutes: NonNegativeFloat = 0.0
    """finetune.label_minutes of that run; 0 leaves out no recordings"""
    seed: int = 0
    """data.seed of that run"""
    language: str | None = None
    """finetune.language of that run, empty for all; null takes data.language"""
    split: str = "train"
    """data.split of that run"""


@dataclass
class Config:
    """Pseudo-labels from an exported recogniser."""

    export: str = ""
    """folder of the recogniser, RUN_FOLDER/export of finetune_ctc.py or finetune_rnnt.py"""
    out: str = ""
    """folder of the new dataset; must not exist"""
    hypotheses: str = ""
    """folder that keeps the hypotheses, for other filters of the same ones; empty deletes them at the end"""
    data: DataSettings = field(default_factory=partial(DataSettings, split="train"))
    """recordings to decode"""
    labels: LabelSettings = field(default_factory=LabelSettings)
    """labelled recordings, which are left out"""
    filter: FilterSettings = field(default_factory=FilterSettings)
    """choice of recordings by confidence"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    encoder: EncoderChanges = field(default_factory=EncoderChanges)
    """changes to the encoder's settings in the export; null keeps the trained value"""
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    """greedy or beam, CTC or transducer, language model"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if a GPU is available"""
    threads: NonNegativeInt = 0
    """CPU threads per process; 0 divides the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, value in (("export", self.export), ("data.dataset", self.data.dataset), ("out", self.out)):
            if not value:
                raise UserError(f"{name} is missing: give it as --{name} FOLDER")


def pseudo_label(config: Config, world: World) -> None:
    """Decode the recordings and write the dataset. All processes call it."""
    # Errors in the settings are raised here, before any work.
    config = replace(config, inference=resolve_inference(config.inference, world))
    export = read_export(config.export)
    recogniser = load_recogniser(export, config.encoder)
    dataset = open_dataset(config.data.dataset)
    check_features(recogniser.features, dataset)
    _ = dataset.path  # raises if the dataset is not a local folder, whose shards can be linked
    decoder = make_decoder(recogniser, config.decoder, config.export)
    try_decoding(recogniser, decoder, config.inference)
    recordings = unlabelled_recordings(dataset, config)
    export_hash = world.broadcast(hash_of_export(export) if world.is_main else None)
    key = key_of(config, export_hash, dataset)
    if is_finished(config, key):
        if world.is_main:
            print(f"{config.out} already holds these pseudo-labels; remove it to make them again")
        return
    work = Path(config.hypotheses or f"{config.out}.hypotheses")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot make this folder ({error}); choose another one") from error

    log = RecordingLog(work, key[:16], len(dataset), check_hypothesis)
    world.barrier()  # all ranks read the same logs before any of them appends to its own
    remaining = [i for i in recordings if not log.has(i)]
    if world.is_main and len(remaining) < len(recordings):
        print(f"continuing: {len(recordings) - len(remaining)} of {len(recordings)} recordings are already decoded")
    rank_recordings = share_out(remaining, dataset.frames, world)
    with open_log(work / f"{key[:16]}-{world.rank:05d}.jsonl") as file:
        for i, hypothesis in decode(recogniser, decoder, dataset, rank_recordings, config.inference, world):
            file.write(json.dumps({"number": i, **hypothesis.to_dict()}).encode() + b"\n")
    world.barrier()
    if world.is_main:
        facts = {
            "key": key, "export_hash": export_hash, "decoder": decoder.description, "world_size": world.size,
        }  # fmt: skip
        finish(config, dataset, recordings, RecordingLog(work, key[:16], len(dataset), check_hypothesis), facts)
        if not config.hypotheses:
            shutil.rmtree(work)
    world.barrier()


def unlabelled_recordings(dataset: Dataset, config: Config) -> list[int]:
    """Numbers of the selected recordings, without those whose labels were used. Raises UserError if none is left."""
    selected = dataset.select(config.data.split or None, config.data.language or None)
    labels = config.labels
    if not labels.minutes:
        return [int(i) for i in selected]
    language = config.data.language if labels.language is None else labels.language
    with_text = [i for i in dataset.select(labels.split, language or None) if dataset.text(int(i)) is not None]
    if not with_text:
        raise UserError(
            f"labels.minutes is {labels.minutes}, but split {labels.split!r} of {dataset.location} has no transcripts: "
            "give 0, or labels.split and labels.language of the training run"
        )
    left = np.setdiff1d(selected, choose_labelled(dataset, np.array(with_text), labels.minutes, labels.seed))
    if not len(left):
        raise UserError(f"labels.minutes is {labels.minutes}: all selected recordings are labelled, none is left")
    return [int(i) for i in left]


def key_of(config: Config, export_hash: str, dataset: Dataset) -> str:
    """Hash of everything that determines a hypothesis; the batch size has no effect."""
    settings = {name: to_dict(getattr(config, name)) for name in ("inference", "encoder", "decoder")}
    del settings["inference"]["batch_seconds"]
    for name, value in settings["decoder"].items():  # a language model or list of words counts by content, not path
        if isinstance(value, str) and Path(value).is_file():
            settings["decoder"][name] = hash_of_file(value)
    content = [FORMAT_VERSION, export_hash, dataset.fingerprint, settings]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def choice_of(config: Config) -> dict[str, Any]:
    """Settings that select recordings and parts of them."""
    data = {name: value for name, value in to_dict(config.data).items() if name != "dataset"}
    return {"data": data, "labels": to_dict(config.labels), "filter": to_dict(config.filter)}


def is_finished(config: Config, key: str) -> bool:
    """Return whether --out is the finished output of these settings. Raises UserError if it is anything else."""
    out = Path(config.out)
    if not out.exists():
        return False
    with suppress(UserError):
        summary = read_json_object(out / SUMMARY)
        if summary.get("key") == key and summary.get("choice") == choice_of(config):
            return True
    raise UserError(f"out = {config.out}: already exists and has other content; choose another folder")


def decode(
    recogniser: Recogniser, decoder: Decoder, dataset: Dataset, recordings: list[int], settings: InferenceSettings,
    world: World,
) -> Iterator[tuple[int, Hypothesis]]:  # fmt: skip
    """Number and hypothesis of this rank's recordings, each as soon as it is decoded."""
    rate, stride = dataset.features.frames_per_second, recogniser.model.encoder.settings.stride
    recogniser.model.to(world.device)
    sources = [
        RecordingSource(
            int(dataset.frames[i]), mel_reader(recogniser, dataset, i), dataset.excluded(i) or (), dataset.id(i)
        )
        for i in recordings
    ]
    total = round(sum(source.num_frames for source in sources) / rate)
    label = "decoding" if world.size == 1 else f"decoding (process 1 of {world.size})"
    with tqdm(total=total, unit="audio-s", desc=label, disable=not world.is_main or not sys.stderr.isatty()) as bar:
        for index, tokens in decode_recordings(decoder, sources, settings, stride, rate, world.device):
            i, source = recordings[index], sources[index]
            transcript = timed_transcript(recogniser, source.name, source.num_frames, tokens)
            yield i, hypothesis_of(transcript, tokens, dataset.language(i))
            bar.update(round(source.num_frames / rate))


def finish(
    config: Config, dataset: Dataset, recordings: list[int], log: RecordingLog, facts: Mapping[str, Any]
) -> None:
    """Filter the hypotheses, write the dataset with its summary atomically, and print the precision."""
    rate = dataset.features.frames_per_second
    measure = config.filter.confidence
    confidence = np.array([log[i][measure] for i in recordings])
    frames = dataset.frames[recordings]
    threshold = threshold_of(confidence, frames, config.filter)
    mask = is_kept(confidence, threshold)
    kept = np.array(recordings)[mask].tolist()

    minimum = config.filter.min_word_confidence
    if not any(cut_words(Hypothesis.from_dict(log[i]).words, minimum, 0.0)[0] for i in kept):
        raise UserError(f"filter.min_word_confidence is {minimum}, which leaves no word: give a lower one")
    folder = Path(f"{config.out}.unfinished")  # beside --out, so that the rename is atomic
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was interrupted here
    derived = derive(folder, entries(dataset, kept, log, minimum), Path(config.out).name)
    counts = {
        "decoded": {"recordings": len(recordings), "seconds": int(frames.sum()) / rate},
        "without_words": int((confidence == 0).sum()),
        "kept": {"recordings": len(derived), "seconds": derived.total_frames / rate},
        "mean_confidence": {"decoded": float(confidence.mean()), "kept": float(confidence[mask].mean())},
    }
    summary = {
        "format_version": FORMAT_VERSION, **facts, "choice": choice_of(config), "threshold": threshold,
        "dataset": config.data.dataset, "fingerprint": dataset.fingerprint, "export": config.export,
        "inference": to_dict(config.inference), "encoder": to_dict(config.encoder),
        "decoder_settings": to_dict(config.decoder), "command": shlex.join(["python", *sys.argv]), **counts,
        "precision": None,
    }  # fmt: skip
    print(
        f"kept {len(derived):,} of {len(recordings):,} recordings, {derived.total_frames / rate / 3600:.2f} of "
        f"{frames.sum() / rate / 3600:.2f} h, with a {measure} confidence of at least {threshold:.4f}"
    )
    if scored := score_all(dataset, recordings, log, measure):
        rows, chosen = precision_table(scored), precision_row(scored, threshold)
        summary["precision"] = {"rows": [asdict(row) for row in rows], "filter": asdict(chosen)}
        write_file(folder / PICTURE, precision_svg(summary["precision"]["rows"], summary["precision"]["filter"]))
        print(f"precision on the {len(scored):,} recordings with a reference, which the filter does not use:")
        print(precision_text(rows, chosen))
    ids = {derived.id(number) for number in range(len(derived))}  # of the kept ones, those with a word left
    write_hypotheses(folder / HYPOTHESES, dataset, recordings, log, ids)
    write_json(folder / SUMMARY, summary)
    os.replace(folder, config.out)
    print(f"dataset: {config.out}; numbers: {Path(config.out) / SUMMARY}")


def entries(dataset: Dataset, recordings: list[int], log: RecordingLog, min_word_confidence: float) -> Iterator[Entry]:
    """Entries of the kept recordings, with hypotheses in place of transcripts."""
    for i in recordings:
        recording, hypothesis = stored_recording(dataset, i), Hypothesis.from_dict(log[i])
        seconds = int(dataset.frames[i]) / dataset.features.frames_per_second
        words, passages = cut_words(hypothesis.words, min_word_confidence, seconds)
        if not words:
            continue
        excluded = sorted([*(recording.excluded or []), *passages]) or None
        text = " ".join(word.word for word in words)
        yield dataset, i, replace(recording, text=text, words=words, excluded=excluded)


def score_all(
    dataset: Dataset, recordings: list[int], log: RecordingLog, measure: Literal["label", "word"]
) -> list[Scored]:
    """Scores of the recordings with a reference."""
    rate = dataset.features.frames_per_second
    scored = []
    for i in recordings:
        if reference := dataset.text(i):
            result, seconds = log[i], int(dataset.frames[i]) / rate
            score = score_recording(dataset.id(i), reference, result["text"], dataset.language(i), seconds)
            scored.append(Scored(result[measure], seconds, score))
    return scored if any(item.score.words.reference_length for item in scored) else []


def write_hypotheses(path: Path, dataset: Dataset, recordings: list[int], log: RecordingLog, kept: set[str]) -> None:
    """Write one JSON line per decoded recording: id, text, both confidences, and whether its id was kept."""
    with replace_file(path) as file:
        for i in recordings:
            result = log[i]
            line = {
                "id": dataset.id(i),
                **{name: result[name] for name in ("text", "label", "word")},
                "kept": dataset.id(i) in kept,
            }
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    config = parse(Config, description=__doc__)
    world = start_inference(config.device, config.threads, config.inference)
    pseudo_label(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
