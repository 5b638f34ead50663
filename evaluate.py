"""Word and character error rates of an exported recogniser on whole recordings.

    python evaluate.py --export runs/ctc/export --data.dataset datasets/synthetic --out results/ctc
    torchrun --nproc-per-node 8 evaluate.py --export runs/ctc/export --data.dataset datasets/calls --out results/ctc

Recordings longer than the context are decoded in overlapping windows (`--inference.context_seconds 0`: in one pass).
The processes share the recordings out. What is decoded is kept: after Ctrl-C the same command goes on where it was,
and once everything is there it only prints the table again. Rates are over the corpus, with 95 % intervals from
resampling whole recordings; English is normalised as Whisper does, other languages by a plain Unicode rule.

Writes into --out: results.json (all of it), results.csv (one line a recording), report.html.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from bestrq.config import ConfigError, parse, run_main, to_dict
from bestrq.files import write_file
from bestrq.recognition import report
from bestrq.recognition.breakdowns import by_duration, by_speaker, confusions
from bestrq.recognition.decoders import Decoder, DecoderSettings, decode_recordings
from bestrq.recognition.inference import InferenceSettings, Source
from bestrq.recognition.normalisers import normalisers_used
from bestrq.recognition.scoring import RecordingScore, score_by_language, score_recording
from bestrq.recognition.sections import facts_section, results_section, transcripts_section
from bestrq.training.export import read_export
from bestrq.training.process import DistributedSettings, World, start_world
from data.errors import DataError
from data.features import FeatureSettings, difference
from data.shards import Dataset, open_dataset
from recogniser import (
    EncoderChanges,
    Recogniser,
    hash_of_export,
    hash_of_file,
    load_recogniser,
    make_decoder,
    share_out,
)

FORMAT_VERSION = 2
RESULTS, TABLE, REPORT = "results.json", "results.csv", "report.html"


@dataclass
class DataSettings:
    """Which recordings are evaluated."""

    dataset: str = ""
    """dataset folder, made by `python -m data.prepare`"""
    split: str = "test"
    """split of the dataset"""
    language: str = ""
    """only recordings of this language; empty takes all"""
    max_recordings: int = 0
    """only the first so many recordings, in the order of their ids; 0 takes all"""

    def __post_init__(self) -> None:
        if self.max_recordings < 0:
            raise ConfigError(f"data.max_recordings = {self.max_recordings}: give 0 (all) or more")


@dataclass
class Config:
    """Evaluation of an exported recogniser on whole recordings."""

    export: str = ""
    """folder of the model, RUN_FOLDER/export of finetune_ctc.py or finetune_rnnt.py"""
    out: str = "results"
    """folder for the results; decoded recordings are kept there while the evaluation lasts"""
    name: str = ""
    """what the system is called in the report; empty takes the name of the run folder"""
    data: DataSettings = field(default_factory=DataSettings)
    """recordings"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    encoder: EncoderChanges = field(default_factory=EncoderChanges)
    """what the encoder sees, in place of what it was trained with"""
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    """greedy or beam, CTC or transducer, language model"""
    resamples: int = 10_000
    """bootstrap resamples of the intervals"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU"""
    threads: int = 0
    """CPU threads of every process; 0 shares the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, value in (("export", self.export), ("data.dataset", self.data.dataset)):
            if not value:
                raise ConfigError(f"{name} is missing: give it as --{name} FOLDER")
        if self.resamples < 100:
            raise ConfigError(f"resamples = {self.resamples}: give at least 100, or an interval means nothing")


def evaluate(config: Config, world: World) -> None:
    """The whole evaluation, as every process runs it."""
    # Everything that a user can get wrong comes before any work.
    export = read_export(config.export)
    recogniser = load_recogniser(export, config.encoder)
    decoder = make_decoder(recogniser, config.decoder, config.export)
    dataset = open_dataset(config.data.dataset)
    check_features(recogniser.features, dataset, config)
    recordings = select_recordings(dataset, config.data)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out = {config.out}: cannot make this folder ({error}); choose another one") from error

    export_hash = world.broadcast(hash_of_export(export) if world.is_main else None)
    key = key_of(config, export_hash, dataset)
    results = world.broadcast(finished_results(out, key) if world.is_main else None)
    if results is None:
        begin = time.perf_counter()
        done = world.broadcast(collect_partial(out, key) if world.is_main else None)
        left = [i for i in recordings if dataset.id(i) not in done]
        if done and world.is_main:
            print(f"going on: {len(done)} of {len(recordings)} recordings are decoded already")
        decoded = decode(recogniser, decoder, dataset, share_out(left, dataset.frames, world), config, world, out, key)
        hypotheses = done | {id: text for part in gather_json(world, decoded) for id, text in part.items()}
        seconds = world.max(time.perf_counter() - begin)
        if world.is_main:
            scores = score(dataset, recordings, hypotheses)
            audio = sum(int(dataset.frames[i]) for i in left) / dataset.features.frames_per_second
            results = describe(config, export_hash, key, decoder, dataset, scores, audio, seconds, world)
            write_results(out, results, config)
    elif world.is_main:
        print(f"{out / RESULTS} holds this evaluation already; remove it to evaluate again")
    if world.is_main:
        print_table(results)
        print(f"results: {out / RESULTS}, {out / TABLE}; report: {out / REPORT}")
    world.barrier()


def check_features(features: FeatureSettings, dataset: Dataset, config: Config) -> None:
    """The model must see the numbers that it was trained on."""
    if different := difference(features, dataset.features):
        raise ConfigError(
            f"the features of {config.data.dataset} are not those of the model (model != dataset): "
            f"{'; '.join(different)}. Prepare the dataset again with the model's features"
        )


def select_recordings(dataset: Dataset, settings: DataSettings) -> list[int]:
    """Numbers of the recordings, in the order of their ids. Each must have a transcript to be scored against."""
    chosen = [int(i) for i in dataset.select(settings.split, settings.language or None)]
    chosen = chosen[: settings.max_recordings or None]
    silent = [dataset.id(i) for i in chosen if dataset.text(i) is None]
    if silent:
        raise DataError(
            f"{dataset.location}: {len(silent)} of {len(chosen)} recordings have no transcript, such as {silent[0]!r}: "
            "give a split whose recordings have one"
        )
    return chosen


def key_of(config: Config, export_hash: str, dataset: Dataset) -> str:
    """Names an evaluation: what was decoded under one key may be used under the same one only.

    The batch size is not part of it, for outputs do not depend on it; nor where the dataset lies.
    """
    inference = {name: value for name, value in to_dict(config.inference).items() if name != "batch_seconds"}
    selection = {name: value for name, value in to_dict(config.data).items() if name != "dataset"}
    decoder = to_dict(config.decoder)
    for name in ("language_model", "hot_words"):
        if decoder[name]:
            decoder[name] = hash_of_file(decoder[name])
    content = [FORMAT_VERSION, export_hash, dataset.fingerprint, inference, decoder, selection, config.resamples]
    content += [config.name, to_dict(config.encoder)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finished_results(out: Path, key: str) -> dict[str, Any] | None:
    """Results of an earlier start, where they are those of this very evaluation."""
    try:
        results = json.loads((out / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    complete = isinstance(results, dict) and results.get("key") == key and (out / REPORT).exists()
    return results if complete else None


def collect_partial(out: Path, key: str) -> dict[str, str]:
    """What earlier starts have decoded, by recording; rank 0 puts it into one file and drops what is of no use."""
    done: dict[str, str] = {}
    files = sorted(out.glob("partial-*.jsonl"))
    for path in files:
        for line in path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the process was stopped
                continue
            if isinstance(entry, dict) and entry.get("key") == key:
                done[entry["id"]] = entry["hypothesis"]
    lines = (json.dumps({"key": key, "id": id, "hypothesis": text}) + "\n" for id, text in done.items())
    write_file(out / "partial-00000.jsonl", "".join(lines))
    for path in files:
        if path.name != "partial-00000.jsonl":
            path.unlink()
    return done


def decode(
    recogniser: Recogniser, decoder: Decoder, dataset: Dataset, mine: list[int], config: Config, world: World,
    out: Path, key: str,
) -> dict[str, str]:  # fmt: skip
    """Transcripts of this rank's recordings by id, each appended to a file as soon as it is there."""
    frames_per_second = dataset.features.frames_per_second
    model = recogniser.model.to(world.device)

    def read_mel(recording: int, start: int, stop: int) -> Tensor:
        return torch.from_numpy(dataset.read_normalised(recording, start, stop, recogniser.normalisation))

    sources = [
        Source(int(dataset.frames[i]), partial(read_mel, i), dataset.excluded(i) or (), dataset.id(i)) for i in mine
    ]
    found = decode_recordings(
        decoder, sources, config.inference, model.encoder.settings.stride, frames_per_second, world.device
    )
    total = round(sum(source.num_frames for source in sources) / frames_per_second)
    label = "decoding" if world.size == 1 else f"decoding (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    decoded: dict[str, str] = {}
    # Line by line, so that a stop at any moment costs at most the recordings in hand.
    with (
        open(out / f"partial-{world.rank:05d}.jsonl", "a", buffering=1) as file,
        tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar,
    ):
        for index, tokens in found:
            id = dataset.id(mine[index])
            decoded[id] = recogniser.tokenizer.decode(tokens.ids)
            file.write(json.dumps({"key": key, "id": id, "hypothesis": decoded[id]}) + "\n")
            bar.update(round(sources[index].num_frames / frames_per_second))
    return decoded


def gather_json(world: World, value: Any) -> list[Any]:
    """Every rank's JSON-able value, in the order of ranks, on all ranks."""
    content = json.dumps(value).encode()
    longest = int(world.max(len(content)))
    # Each rank fills its own row of zeros, so the sum over ranks is all rows: bytes of JSON, no pickle.
    rows = torch.zeros(world.size, longest, dtype=torch.uint8, device=world.device)
    rows[world.rank, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in world.sum(rows).cpu()]


def score(dataset: Dataset, recordings: Sequence[int], hypotheses: Mapping[str, str]) -> list[RecordingScore]:
    """Errors of every recording, in the order of their ids."""
    return [
        score_recording(
            dataset.id(i),
            dataset.text(i) or "",
            hypotheses[dataset.id(i)],
            dataset.language(i),
            int(dataset.frames[i]) / dataset.features.frames_per_second,
            speaker=dataset.speaker(i),
        )
        for i in recordings
    ]


def describe(
    config: Config, export_hash: str, key: str, decoder: Decoder, dataset: Dataset, scores: list[RecordingScore],
    audio: float, seconds: float, world: World,
) -> dict[str, Any]:  # fmt: skip
    """results.json. `audio` and `seconds` are of this start alone, so that the speed is right after a stop too."""
    totals = score_by_language(scores, config.resamples)
    return {
        "format_version": FORMAT_VERSION,
        "key": key,
        "name": config.name or Path(config.export).resolve().parent.name,
        "export": config.export,
        "export_hash": export_hash,
        "dataset": {
            "name": dataset.name,
            "path": config.data.dataset,
            "split": config.data.split,
            "fingerprint": dataset.fingerprint,
            "feature_hash": dataset.features.hash(),
        },
        "inference": to_dict(config.inference),
        "encoder": to_dict(config.encoder),
        "decoder": {**to_dict(config.decoder), "description": decoder.description},
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "jiwer", "whisper-normalizer")},
        "world_size": world.size,
        "device": world.device.type,
        "decoding": {"audio_seconds": audio, "seconds": seconds, "audio_seconds_per_second": audio / seconds},
        "scores": {language: total.summary() for language, total in totals.items()},
        "speakers": {name: total.summary() for name, total in by_speaker(scores, config.resamples).items()},
        "durations": {
            name: total.summary() for name, total in by_duration(scores, num_resamples=config.resamples).items()
        },
        "confusions": asdict(confusions(scores)),
        "normalisers": normalisers_used((one.normaliser, one.language) for one in scores),
        "recordings": [one.row() for one in scores],
    }


def write_results(out: Path, results: dict[str, Any], config: Config) -> None:
    """The three files; then what was kept for a restart is not needed any more."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(results["recordings"][0]))
    writer.writeheader()
    writer.writerows(results["recordings"])
    write_file(out / TABLE, table.getvalue())
    total, speed = results["scores"]["all"], results["decoding"]["audio_seconds_per_second"]
    how = config.inference
    windows = f"{how.context_seconds:g} s, {how.mode}" if how.context_seconds else "the whole recording"
    context = {"whole": "the whole recording", "streaming": "a stream"}.get(how.mode, windows)
    lead = (
        f"{results['name']} on {total['num_recordings']:,} recordings of {results['dataset']['name']} "
        f"({config.data.dataset}), split {config.data.split}. "
        f"Decoding: {results['decoder']['description']}; context {context}."
    )
    cards = {
        "WER": report.percent(total["wer"]),
        "CER": report.percent(total["cer"]),
        "Audio": f"{total['seconds'] / 60:,.1f} min",
        "Audio a second": f"{speed:,.0f} s",
    }
    systems = {results["name"]: results}
    sections = [results_section(systems), transcripts_section(systems), facts_section(systems)]
    report.write_report(out / REPORT, f"Evaluation of {results['name']}", lead, cards, sections)
    write_file(out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    for path in out.glob("partial-*.jsonl"):
        path.unlink()


def print_table(results: dict[str, Any]) -> None:
    """Rates in percent, with 95 % intervals."""
    print(f"{'language':<12}{'recordings':>11}{'minutes':>9}{'WER':>9}{'95 %':>16}{'CER':>9}{'95 %':>16}")
    for language, one in results["scores"].items():
        rates = "".join(
            f"{report.percent(one[rate]):>9}{report.interval(one[f'{rate}_interval']):>16}" for rate in ("wer", "cer")
        )
        print(f"{language or '-':<12}{one['num_recordings']:>11,}{one['seconds'] / 60:>9.1f}{rates}")


def main() -> None:
    config = parse(Config, description=__doc__)
    world = start_world(DistributedSettings(device=config.device, threads=config.threads, precision="float32"))
    evaluate(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, user_errors=(DataError,))
