"""Word and character error rates of exported recognisers on whole recordings.

    python evaluate.py --export runs/ctc/export --data.dataset datasets/synthetic --out results/ctc
    torchrun --nproc-per-node 8 evaluate.py --export runs/ctc/export --data.dataset datasets/calls --out results/ctc
    python evaluate.py --export runs/ctc/export --data.dataset datasets/calls --out results/sweep \\
        --grid.contexts '[5, 20, 80, 0]' --grid.modes '[buffered, averaged]'

Recordings longer than the context are decoded in overlapping windows (`--inference.context_seconds 0`: in one pass).
A grid is every combination of contexts, overlaps, modes, decoders and models that are listed. The processes share the
recordings out. What is decoded is kept: after Ctrl-C the same command goes on where it was, and what is finished is
only reported again. Rates are over the corpus, with 95 % intervals from resampling whole recordings; English is
normalised as Whisper does, other languages by a plain Unicode rule and their own.

Writes into --out, or for a grid into a folder of it for each evaluation: results.json (every number), results.csv (one
line a recording), transcripts.jsonl (every word with its time, and the alignment), report.html. For a grid also
report.html, report.json and curve.svg of all of them. A row of each evaluation goes into rows.jsonl beside --out.
"""

import csv
import fcntl
import functools
import hashlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm

from bestrq.long_form.decoders import Decoder, decode_recordings
from bestrq.long_form.inference import Source
from bestrq.report.reports import write_comparison, write_evaluation_report
from bestrq.report.result_files import REPORT, RESULTS, TABLE, TRANSCRIPTS, read_results, read_transcripts
from bestrq.report.text import comparison_table, rates_table
from bestrq.scoring.stm import ReferenceSegment
from bestrq.training.export import read_export
from bestrq.training.memory import PeakMemory
from bestrq.training.precision import warn_of_emulation
from bestrq.training.process import DistributedSettings, World, start_world
from bestrq.transcripts.formats import WRITERS, TimedTranscript
from bestrq.transcripts.subtitles import SubtitleSettings
from common.config import parse, run_main
from common.errors import UserError
from common.files import write_file
from data.audio.files import find_audio
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset, open_dataset
from pipelines.evaluation import (
    Cell,
    Config,
    DataSettings,
    cells_of,
    in_earlier_folders,
    in_folders,
    try_cell,
    with_keys,
)
from pipelines.evaluation_results import (
    Evaluated,
    describe,
    evaluate_recording,
    line_of,
    read_segments,
    row_of,
    transcript_of,
    window_edges,
)
from pipelines.recogniser import (
    EncoderChanges,
    Recogniser,
    hash_of_export,
    load_recogniser,
    make_decoder,
    mel_reader,
    share_out,
    timed_transcript,
)

Segments = Mapping[str, Sequence[ReferenceSegment]]
"""by recording; empty without an STM"""


def evaluate(config: Config, world: World) -> None:
    """The whole evaluation, as every process runs it."""
    # Everything that a user can get wrong comes before any work.
    dataset = open_dataset(config.data.dataset)
    recordings = select_recordings(dataset, config.data, bool(config.stm))
    ids = [dataset.id(i) for i in recordings]
    segments = read_segments(config.stm, ids)
    audio = {id: path.resolve().as_uri() for id, path in find_audio(config.audio, ids).items()}
    cells = [cell for export in config.exports for cell in prepare(export, config, dataset, world)]
    if config.grid.is_given:
        cells = in_folders(cells)
        folders = world.broadcast([cell.folder for cell in in_earlier_folders(cells, Path(config.out))])
        cells = [replace(cell, folder=folder) for cell, folder in zip(cells, folders, strict=True)]
    out = Path(config.out)
    mine = config.grid.mine(cells)
    for number, cell in enumerate(mine, 1):
        if config.grid.is_given and world.is_main:
            print(f"\n== {number} of {len(mine)}: {cell.name}, {cell.label}", flush=True)
        evaluate_cell(cell, dataset, recordings, segments, audio, config, world)
    if config.grid.is_given and world.is_main:
        report_grid(cells, out, audio, config)
    world.barrier()


def select_recordings(dataset: Dataset, settings: DataSettings, has_stm: bool = False) -> list[int]:
    """Numbers of the recordings, in the order of their ids. Each must have a transcript to be scored against."""
    chosen = [int(i) for i in dataset.select(settings.split, settings.language or None)]
    chosen = chosen[: settings.max_recordings or None]
    silent = [dataset.id(i) for i in chosen if dataset.text(i) is None]
    if silent and not has_stm:
        raise UserError(
            f"{dataset.location}: {len(silent)} of {len(chosen)} recordings have no transcript, such as {silent[0]!r}: "
            "give a split whose recordings have one"
        )
    return chosen


def prepare(path: str, config: Config, dataset: Dataset, world: World) -> list[Cell]:
    """The cells of a model with their keys, each tried for what does not go together. Raises UserError."""
    export = read_export(path)
    recogniser = load_recogniser(export)
    check_features(recogniser.features, dataset, config)
    cells = cells_of(config, export, dataset.features.frames_per_second)
    kinds = {(cell.inference.mode, cell.decoder, cell.encoder.mask): cell for cell in cells}
    for cell in kinds.values():
        tried = recogniser if cell.encoder == EncoderChanges() else load_recogniser(export, cell.encoder)
        try_cell(cell, tried, make_decoder(tried, cell.decoder, path))
    export_hash = world.broadcast(hash_of_export(export) if world.is_main else None)
    return [with_keys(cell, config, export_hash, dataset.fingerprint) for cell in cells]


def check_features(features: FeatureSettings, dataset: Dataset, config: Config) -> None:
    """The model must see the numbers that it was trained on."""
    if different := difference(features, dataset.features):
        raise UserError(
            f"the features of {config.data.dataset} are not those of the model (model != dataset): "
            f"{'; '.join(different)}. Prepare the dataset again with the model's features"
        )


@functools.lru_cache(maxsize=1)  # the next cell is mostly of the same model
def load(export: str, export_hash: str, changes: EncoderChanges) -> Recogniser:
    """A model, ready to decode. Raises UserError where it is not the one that was there at the start."""
    read = read_export(export)
    if hash_of_export(read) != export_hash:  # a training that goes on writes a better one
        raise UserError(f"{export} has changed since this evaluation began: start it again, or evaluate a copy")
    return load_recogniser(read, changes)


def evaluate_cell(
    cell: Cell, dataset: Dataset, recordings: list[int], segments: Segments, audio: Mapping[str, str], config: Config,
    world: World,
) -> None:  # fmt: skip
    """One evaluation, or its report alone where it is finished."""
    folder = Path(config.out) / cell.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out = {config.out}: cannot make this folder ({error}); choose another one") from error
    if not world.broadcast(is_finished(folder, cell.key) if world.is_main else None):
        recogniser = load(cell.export, cell.export_hash, cell.encoder)
        decoder = make_decoder(recogniser, cell.decoder, cell.export)
        recogniser.model.to(world.device)
        try_cell(cell, recogniser, decoder, world.device)  # once, so that what comes with a first time is not measured
        # References or the bootstrap may have changed since: then it is scored anew, and not decoded.
        earlier = earlier_results(folder, cell.decode_key) if world.is_main else None
        done = collect_done(folder, cell.decode_key, earlier is not None) if world.is_main else {}
        there = set(world.broadcast(list(done)))
        left = [i for i in recordings if dataset.id(i) not in there]
        if there and world.is_main:
            print(f"going on: {len(recordings) - len(left)} of {len(recordings)} recordings are decoded already")
        peak, begin = PeakMemory(world.device), time.perf_counter()
        mine = share_out(left, dataset.frames, world)
        decoded = decode(recogniser, decoder, dataset, mine, cell, world, folder)
        seconds = world.max(time.perf_counter() - begin)
        megabytes = world.max(peak.megabytes())
        parts = gather_json(world, decoded)
        if world.is_main:
            heard = {id: transcript_of(line) for part in (done, *parts) for id, line in part.items()}
            stride, rate = recogniser.model.encoder.settings.stride, dataset.features.frames_per_second
            found = [
                evaluate_recording(
                    dataset, i, heard[dataset.id(i)], segments.get(dataset.id(i)),
                    window_edges(int(dataset.frames[i]), cell, stride, rate),
                )
                for i in recordings
            ]  # fmt: skip
            # Of this start alone, so that the speed is right after a stop, too.
            audio_seconds = sum(int(dataset.frames[i]) for i in left) / rate
            cost = cost_of(audio_seconds, seconds, megabytes, world)
            if earlier and not left:
                cost = earlier["decoding"]
            write_results(folder, describe(config, cell, decoder.description, dataset, found, cost), found)
    elif world.is_main:
        print(f"{folder / RESULTS} holds this evaluation already; remove it to evaluate again")
    if world.is_main:
        results, transcripts = read_results(folder), read_transcripts(folder)
        if results["name"] != cell.name:  # a name decides nothing, so what is finished may have had another one
            results["name"] = cell.name
            write_file(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
        keep_row(Path(config.out).resolve().parent / "rows.jsonl", row_of(results))
        write_formats(folder, transcripts, config)
        write_evaluation_report(folder, results, transcripts, audio)
        print(rates_table(results))
        print(f"results: {folder / RESULTS}, {folder / TABLE}; report: {folder / REPORT}", flush=True)
    world.barrier()


def is_finished(folder: Path, key: str) -> bool:
    """Whether the folder holds this very evaluation."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("key") == key and (folder / TRANSCRIPTS).exists()


def earlier_results(folder: Path, decode_key: str) -> dict[str, Any] | None:
    """Those in the folder, where the same was heard; None where there are none."""
    with suppress(UserError):
        results = read_results(folder)
        if results.get("decode_key") == decode_key and (folder / TRANSCRIPTS).exists():
            return results
    return None


def collect_done(folder: Path, decode_key: str, with_results: bool) -> dict[str, Any]:
    """What earlier starts have decoded, by recording; rank 0 puts it into one file and drops what is of no use."""
    done: dict[str, Any] = {}
    if with_results:
        kept = ("id", "seconds", "text", "words")
        done = {line["id"]: {name: line[name] for name in kept} for line in read_transcripts(folder)}
    files = sorted(folder.glob("partial-*.jsonl"))
    for path in files:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the process was stopped
                continue
            if isinstance(entry, dict) and entry.get("key") == decode_key:
                done[entry["id"]] = entry
    lines = (json.dumps({**entry, "key": decode_key}) + "\n" for entry in done.values())
    write_file(folder / "partial-00000.jsonl", "".join(lines))
    for path in files:
        if path.name != "partial-00000.jsonl":
            path.unlink()
    return done


def decode(
    recogniser: Recogniser, decoder: Decoder, dataset: Dataset, mine: list[int], cell: Cell, world: World, folder: Path
) -> dict[str, Any]:
    """Transcripts of this rank's recordings by id, each appended to a file as soon as it is there."""
    rate, stride = dataset.features.frames_per_second, recogniser.model.encoder.settings.stride
    sources = [
        Source(int(dataset.frames[i]), mel_reader(recogniser, dataset, i), dataset.excluded(i) or (), dataset.id(i))
        for i in mine
    ]
    found = decode_recordings(decoder, sources, cell.inference, stride, rate, world.device)
    total = round(sum(source.num_frames for source in sources) / rate)
    label = "decoding" if world.size == 1 else f"decoding (process 1 of {world.size})"
    hidden = not world.is_main or not sys.stderr.isatty()
    decoded: dict[str, Any] = {}
    # Line by line, so that a stop at any moment costs at most the recordings in hand.
    with (
        open(folder / f"partial-{world.rank:05d}.jsonl", "a", buffering=1, encoding="utf-8") as file,
        tqdm(total=total, unit="audio-s", desc=label, disable=hidden) as bar,
    ):
        for index, tokens in found:
            source = sources[index]
            line = line_of(timed_transcript(recogniser, source.name, source.num_frames, tokens))
            file.write(json.dumps({"key": cell.decode_key, **line}) + "\n")
            decoded[source.name] = line
            bar.update(round(source.num_frames / rate))
    return decoded


def gather_json(world: World, value: Any) -> list[Any]:
    """Every rank's JSON-able value, in the order of ranks, on rank 0; nothing on the others."""
    if world.size == 1:
        return [value]
    content = json.dumps(value).encode()
    longest = int(world.max(len(content)))
    # Each rank fills its own row of zeros, so the sum over ranks is all rows: bytes of JSON, no pickle.
    rows = torch.zeros(world.size, longest, dtype=torch.uint8, device=world.device)
    rows[world.rank, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    rows = world.sum(rows)
    return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in rows.cpu()] if world.is_main else []


def cost_of(audio: float, seconds: float, megabytes: float, world: World) -> dict[str, Any]:
    """What decoding took: seconds of audio and of time, MB above what was there before (negative: not known)."""
    return {
        "audio_seconds": audio,
        "seconds": seconds,
        "audio_seconds_per_second": audio / seconds if audio else None,
        "real_time_factor": seconds / audio if audio else None,
        "peak_mb": megabytes if megabytes >= 0 else None,
        "device": world.device.type,
        "world_size": world.size,
    }


def write_results(folder: Path, results: dict[str, Any], found: Sequence[Evaluated]) -> None:
    """The files of an evaluation, the one that makes it finished last; then what was kept for a restart goes."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(results["recordings"][0]))
    writer.writeheader()
    writer.writerows(results["recordings"])
    write_file(folder / TABLE, table.getvalue())
    write_file(folder / TRANSCRIPTS, "".join(one.line() for one in found))
    write_file(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    for path in folder.glob("partial-*.jsonl"):
        path.unlink()


def keep_row(path: Path, row: Mapping[str, Any]) -> None:
    """One line more, unless it is there; the tasks of a job array take turns. Results do not depend on it."""
    try:
        with open(path, "a+", encoding="utf-8") as file:
            with suppress(OSError):  # some shared file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if not any(f'"key": "{row["key"]}"' in line for line in file):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        print(f"note: no row is kept in {path}: {error}", file=sys.stderr)


def write_formats(folder: Path, transcripts: Sequence[Mapping[str, Any]], config: Config) -> None:
    """The transcripts of every recording in the formats asked for."""
    heard: list[TimedTranscript] = [transcript_of(line) for line in transcripts if config.format_names]
    for one in heard:
        for form in config.format_names:
            path = folder / "transcripts" / f"{file_name(one.id)}.{form}"
            path.parent.mkdir(exist_ok=True)
            write_file(path, WRITERS[form](one, SubtitleSettings()))


def file_name(id: str) -> str:
    """What a recording's files are called: its id, but for what a name cannot hold; a long one ends in its hash."""
    name = "".join(c if c.isprintable() and c not in "/\\%" else quote(c, safe="") for c in id)
    if len(name.encode()) <= 200 and name not in (".", ".."):
        return name
    return name.encode()[:150].decode(errors="ignore") + "-" + hashlib.sha256(id.encode()).hexdigest()[:16]


def report_grid(cells: Sequence[Cell], out: Path, audio: Mapping[str, str], config: Config) -> None:
    """The page of all cells, once all are there."""
    there = [cell for cell in cells if is_finished(out / cell.folder, cell.key)]
    if len(there) < len(cells):
        print(f"\n{len(there)} of {len(cells)} evaluations are there; the last part to be done writes their report")
        return
    names = Counter(cell.name for cell in cells)
    labels = [cell.label if len(names) == 1 else f"{cell.name}, {cell.label}" for cell in cells]
    # Two language models of one file name, say.
    systems = {
        label if labels.count(label) == 1 else f"{label} ({cell.key[:6]})": out / cell.folder
        for label, cell in zip(labels, cells, strict=True)
    }
    numbers = write_comparison(out, systems, audio, config.resamples)
    print(f"\n{comparison_table(numbers)}\nall {len(cells)} evaluations: {out / REPORT}")


def main() -> None:
    config = parse(Config, description=__doc__)
    # Who has done his share waits for the others.
    distributed = DistributedSettings(
        device=config.device, threads=config.threads, precision="float32", timeout_minutes=24 * 60
    )
    world = start_world(distributed)
    warn_of_emulation("inference.precision", config.inference.precision, world)
    evaluate(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
