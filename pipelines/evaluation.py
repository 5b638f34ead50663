"""Steps of one evaluation: decode the recordings of a dataset, score the transcripts, write results and report.

evaluate.py runs one evaluation, tools/sweep.py one for each configuration of a sweep.
"""

import functools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from bestrq.long_form.decoders import Decoder, decode_recordings
from bestrq.long_form.inference import RecordingSource
from bestrq.report.reports import write_evaluation_report
from bestrq.report.result_files import REPORT, RESULTS, TABLE, check_transcript, read_results, read_transcripts
from bestrq.report.text import rates_table
from bestrq.scoring.stm import ReferenceSegment
from bestrq.training.export_reading import Export, read_export
from bestrq.training.memory import PeakMemory
from bestrq.training.process import World
from common.errors import UserError
from common.files import write_file
from common.json_lines import read_json_lines
from data.audio.files import find_audio
from data.format.dataset import Dataset, open_dataset
from pipelines.evaluation_results import (
    append_row,
    describe,
    evaluate_recording,
    line_of,
    read_segments,
    row_of,
    transcript_of,
    window_edges,
    write_formats,
    write_results,
    write_summary,
)
from pipelines.evaluation_settings import Config, DataSettings, Evaluation, with_keys
from pipelines.recogniser import (
    EncoderChanges,
    Recogniser,
    check_features,
    hash_of_export,
    load_recogniser,
    make_decoder,
    mel_reader,
    resolve_inference,
    share_out,
    timed_transcript,
    try_decoding,
)


@dataclass(frozen=True)
class References:
    """Recordings to evaluate, with their references."""

    dataset: Dataset
    recordings: list[int]
    """numbers in the dataset, in the order of ids"""
    segments: Mapping[str, Sequence[ReferenceSegment]]
    """by recording id; empty without an STM, where the dataset's transcripts are the references"""
    audio: Mapping[str, str]
    """file URIs by recording id, for the report"""


def read_references(config: Config) -> References:
    """Open the dataset, and read the STM and the list of audio files. Raises UserError."""
    dataset = open_dataset(config.data.dataset)
    recordings = select_recordings(dataset, config.data, bool(config.stm))
    ids = [dataset.id(i) for i in recordings]
    segments = read_segments(config.stm, ids)
    audio = {id: path.resolve().as_uri() for id, path in find_audio(config.audio, ids).items()}
    return References(dataset, recordings, segments, audio)


def select_recordings(dataset: Dataset, settings: DataSettings, has_stm: bool = False) -> list[int]:
    """Numbers of the selected recordings, in the order of ids.

    Raises UserError if none is selected, or if a transcript is missing and no STM is given.
    """
    selected = [int(i) for i in dataset.select(settings.split, settings.language or None)]
    selected = selected[: settings.max_recordings or None]
    without_text = [dataset.id(i) for i in selected if dataset.text(i) is None]
    if without_text and not has_stm:
        raise UserError(
            f"{dataset.location}: {len(without_text)} of {len(selected)} recordings have no transcript, such as "
            f"{without_text[0]!r}: give a split whose recordings all have one"
        )
    return selected


def open_export(path: str, dataset: Dataset) -> tuple[Export, Recogniser]:
    """Read an export and its model. Raises UserError if it is not a recogniser or was trained on other features."""
    export = read_export(path)
    recogniser = load_recogniser(export)
    check_features(recogniser.features, dataset)
    return export, recogniser


def check_evaluations(
    evaluations: Iterable[Evaluation], export: Export, recogniser: Recogniser, config: Config, dataset: Dataset,
    world: World,
) -> list[Evaluation]:  # fmt: skip
    """Evaluations of one export, with their keys. All processes call it.

    Raises UserError if mode, decoder and attention mask are incompatible: each combination is tried on noise.
    """
    evaluations = [replace(e, inference=resolve_inference(e.inference, world)) for e in evaluations]
    combinations = {(e.inference.mode, e.decoder, e.encoder.mask): e for e in evaluations}
    for evaluation in combinations.values():
        changed = recogniser if evaluation.encoder == EncoderChanges() else load_recogniser(export, evaluation.encoder)
        try_decoding(changed, make_decoder(changed, evaluation.decoder, evaluation.export), evaluation.inference)
    export_hash = world.broadcast(hash_of_export(export) if world.is_main else None)
    return [with_keys(evaluation, config, export_hash, dataset.fingerprint) for evaluation in evaluations]


def run_evaluation(evaluation: Evaluation, references: References, config: Config, world: World) -> None:
    """Decode and score all recordings and write the report; for a finished evaluation, only write the report.

    All processes call it. Recordings decoded by an interrupted run are reused.
    """
    folder = Path(config.out) / evaluation.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out = {config.out}: cannot make this folder ({error}); choose another one") from error
    if not world.broadcast(is_finished(folder, evaluation.key) if world.is_main else None):
        decode_and_score(evaluation, folder, references, config, world)
    elif world.is_main:
        print(f"{folder / RESULTS} already holds this evaluation; remove it to evaluate again")
    if world.is_main:
        results, transcripts = read_results(folder), read_transcripts(folder)
        if results["name"] != evaluation.name:  # not part of the key
            results["name"] = evaluation.name
            write_summary(folder, results)
        append_row(Path(config.out).resolve().parent / "rows.jsonl", row_of(results))
        write_formats(folder, transcripts, config.format_names)
        write_evaluation_report(folder, results, transcripts, references.audio)
        print(rates_table(results))
        print(f"results: {folder / RESULTS}, {folder / TABLE}; report: {folder / REPORT}", flush=True)
    world.barrier()


def decode_and_score(
    evaluation: Evaluation, folder: Path, references: References, config: Config, world: World
) -> None:
    """Decode the recordings that have no transcript yet; rank 0 scores all recordings and writes the results."""
    dataset, recordings = references.dataset, references.recordings
    recogniser = load(evaluation.export, evaluation.export_hash, evaluation.encoder)
    decoder = make_decoder(recogniser, evaluation.decoder, evaluation.export)
    recogniser.model.to(world.device)
    # Before the clock starts, so that the set-up of the first call is not measured.
    try_decoding(recogniser, decoder, evaluation.inference, world.device)

    # Results for other references or resamples have the same transcripts, which are scored again but not decoded.
    earlier = stored_results(folder, "decode_key", evaluation.decode_key) if world.is_main else None
    decoded = collect_decoded(folder, evaluation.decode_key, earlier is not None) if world.is_main else {}
    decoded_ids = set(world.broadcast(list(decoded)))
    remaining = [i for i in recordings if dataset.id(i) not in decoded_ids]
    if decoded_ids and world.is_main:
        print(f"continuing: {len(recordings) - len(remaining)} of {len(recordings)} recordings are already decoded")

    peak, start = PeakMemory(world.device), time.perf_counter()
    rank_recordings = share_out(remaining, dataset.frames, world)
    lines = decode(recogniser, decoder, dataset, rank_recordings, evaluation, world, folder)
    seconds = world.max(time.perf_counter() - start)
    megabytes = world.max(peak.megabytes())
    for rank_lines in world.gather(lines):
        decoded |= rank_lines
    if not world.is_main:
        return

    stride, rate = recogniser.model.encoder.settings.stride, dataset.features.frames_per_second
    scored = [
        evaluate_recording(
            dataset, i, transcript_of(decoded[dataset.id(i)]), references.segments.get(dataset.id(i)),
            window_edges(int(dataset.frames[i]), evaluation, stride, rate),
        )
        for i in recordings
    ]  # fmt: skip
    # Of the recordings that this run decoded; from the earlier results if it decoded none.
    cost = cost_of(sum(int(dataset.frames[i]) for i in remaining) / rate, seconds, megabytes, world)
    if earlier and not remaining:
        cost = earlier["decoding"]
    write_results(folder, describe(config, evaluation, decoder.description, dataset, scored, cost), scored)
    for path in folder.glob("partial-*.jsonl"):
        path.unlink()


@functools.lru_cache(maxsize=1)  # consecutive evaluations of a sweep mostly share the model
def load(path: str, export_hash: str, changes: EncoderChanges) -> Recogniser:
    """Model of an export, ready to decode. Raises UserError if the export no longer has this hash."""
    export = read_export(path)
    if hash_of_export(export) != export_hash:  # a running training replaces its export with a better one
        raise UserError(f"{path} has changed since this evaluation started: run it again, or evaluate a copy")
    return load_recogniser(export, changes)


def decode(
    recogniser: Recogniser, decoder: Decoder, dataset: Dataset, recordings: Sequence[int], evaluation: Evaluation,
    world: World, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Decode this rank's recordings and append each to partial-RANK.jsonl at once. Returns the JSON lines by id."""
    rate, stride = dataset.features.frames_per_second, recogniser.model.encoder.settings.stride
    sources = [
        RecordingSource(
            int(dataset.frames[i]), mel_reader(recogniser, dataset, i), dataset.excluded(i) or (), dataset.id(i)
        )
        for i in recordings
    ]
    outputs = decode_recordings(decoder, sources, evaluation.inference, stride, rate, world.device)
    total = round(sum(source.num_frames for source in sources) / rate)
    label = "decoding" if world.size == 1 else f"decoding (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    lines: dict[str, Any] = {}
    # Line buffering: an interruption loses only the recordings of the current batch.
    with (
        open(folder / f"partial-{world.rank:05d}.jsonl", "a", buffering=1, encoding="utf-8") as file,
        tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar,
    ):
        for index, tokens in outputs:
            source = sources[index]
            line = line_of(timed_transcript(recogniser, source.name, source.num_frames, tokens))
            file.write(json.dumps({"key": evaluation.decode_key, **line}) + "\n")
            lines[source.name] = line
            bar.update(round(source.num_frames / rate))
    return lines


def cost_of(audio_seconds: float, seconds: float, megabytes: float, world: World) -> dict[str, Any]:
    """Cost of decoding. `megabytes` is the peak above the memory in use before, negative if unknown."""
    return {
        "audio_seconds": audio_seconds,
        "seconds": seconds,
        "audio_seconds_per_second": audio_seconds / seconds if audio_seconds else None,
        "real_time_factor": seconds / audio_seconds if audio_seconds else None,
        "peak_mb": megabytes if megabytes >= 0 else None,
        "device": world.device.type,
        "world_size": world.size,
    }


# --- results and transcripts of earlier runs


def is_finished(folder: Path, key: str) -> bool:
    """Return whether the folder has the results of exactly this evaluation."""
    return stored_results(folder, "key", key) is not None


def stored_results(folder: Path, field: Literal["key", "decode_key"], key: str) -> dict[str, Any] | None:
    """Results in the folder, if they and their transcripts can be read and the field has this value."""
    with suppress(UserError):
        results = read_results(folder)
        if results.get(field) == key:
            read_transcripts(folder)
            return results
    return None


def collect_decoded(folder: Path, decode_key: str, has_results: bool) -> dict[str, Any]:
    """Transcripts of earlier runs by recording id, merged into partial-00000.jsonl; those of other keys are dropped."""
    decoded: dict[str, Any] = {}
    if has_results:
        kept = ("id", "seconds", "text", "words")
        decoded = {line["id"]: {name: line[name] for name in kept} for line in read_transcripts(folder)}
    files = sorted(folder.glob("partial-*.jsonl"))
    for path in files:
        for entry in read_json_lines(path):
            with suppress(UserError):  # a changed line: the recording is decoded again
                check_transcript(entry, str(path))
                if entry.get("key") == decode_key:
                    decoded[entry["id"]] = entry
    lines = (json.dumps({**entry, "key": decode_key}) + "\n" for entry in decoded.values())
    write_file(folder / "partial-00000.jsonl", "".join(lines))
    for path in files:
        if path.name != "partial-00000.jsonl":
            path.unlink()
    return decoded
