"""What evaluate.py evaluates: its settings, and the cells of a grid.

A cell is one way to decode all recordings: a model, a context, an overlap, a mode, a decoder.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from bestrq.long_form.decoders import Decoder, DecoderSettings, decode_recordings
from bestrq.long_form.inference import InferenceSettings, Mode, Source
from bestrq.model.conformer import EncoderSettings
from bestrq.report.result_files import FORMAT_VERSION
from bestrq.scoring.normalisers import RULES_VERSION
from bestrq.training.export import Export
from bestrq.transcripts.formats import WRITERS
from common.config import from_dict, to_dict
from common.errors import UserError
from common.files import hash_of_file
from pipelines.recogniser import EncoderChanges, Recogniser

GridMode = Literal[Mode, "windowed"]


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
            raise UserError(f"data.max_recordings = {self.max_recordings}: give 0 (all) or more")


@dataclass
class GridSettings:
    """Several evaluations in one command: every combination of what is listed, an empty list being the one setting."""

    exports: list[str] = field(default_factory=list)
    """further models, such as those trained with other contexts"""
    contexts: list[float] = field(default_factory=list)
    """seconds, in place of inference.context_seconds; 0 for whole recordings"""
    overlaps: list[float] = field(default_factory=list)
    """shares, in place of inference.overlap"""
    modes: list[GridMode] = field(default_factory=list)
    """in place of inference.mode; 'windowed' is one pass with attention as wide as the context (encoder.mask window)"""
    decoders: list[DecoderSettings] = field(default_factory=list)
    """in place of decoder, such as '[{beam: 1}, {beam: 8, language_model: lm.arpa}]'"""
    part: str = ""
    """'i/n', i from 0: every n-th of these evaluations from the i-th on, for job arrays; the last one to be done writes
    the report of them all"""

    def __post_init__(self) -> None:
        if self.part and not self.is_given:
            raise UserError(f"grid.part = {self.part!r}, but there is no grid: give grid.contexts or another list")
        if self.part and not (re.fullmatch(r"\d+/\d+", self.part) and self._number() < self._count()):
            raise UserError(f"grid.part = {self.part!r}: give i/n, i from 0 to n - 1, such as 0/4")

    def _number(self) -> int:
        return int(self.part.split("/")[0])

    def _count(self) -> int:
        return int(self.part.split("/")[1])

    @property
    def is_given(self) -> bool:
        return any((self.exports, self.contexts, self.overlaps, self.modes, self.decoders))

    def mine(self, cells: Sequence["Cell"]) -> Sequence["Cell"]:
        """The cells of this part."""
        return cells[self._number() :: self._count()] if self.part else cells


@dataclass
class Config:
    """Evaluation of an exported recogniser on whole recordings."""

    export: str = ""
    """folder of the model, RUN_FOLDER/export of finetune_ctc.py or finetune_rnnt.py"""
    out: str = "results"
    """folder for the results; decoded recordings are kept there while the evaluation lasts. A row of each evaluation is
    kept in rows.jsonl beside it"""
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
    grid: GridSettings = field(default_factory=GridSettings)
    """several contexts, overlaps, modes, decoders, models in one command, with curves"""
    stm: str = ""
    """STM file, or folder with an STM for every recording: references by segments (TED-LIUM). Scores are then given by
    segments, too, and what is ignored counts nowhere"""
    audio: str = ""
    """folder with the recordings' audio files, named as their ids: the report then plays them"""
    formats: str = ""
    """transcripts of every recording in these formats, separated by commas: txt, json, ctm, srt, vtt, TextGrid; into
    OUT/transcripts"""
    resamples: int = 10_000
    """bootstrap resamples of the intervals"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU"""
    threads: int = 0
    """CPU threads of every process; 0 shares the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, value in (("export", self.export), ("data.dataset", self.data.dataset)):
            if not value:
                raise UserError(f"{name} is missing: give it as --{name} FOLDER")
        if self.resamples < 100:
            raise UserError(f"resamples = {self.resamples}: give at least 100, or an interval means nothing")
        if any(name not in WRITERS for name in self.format_names):
            raise UserError(f"formats = {self.formats!r}: give some of {','.join(WRITERS)}, separated by commas")

    @property
    def format_names(self) -> list[str]:
        return [name.strip() for name in self.formats.split(",") if name.strip()]

    @property
    def exports(self) -> list[str]:
        """Folders of all models, each once."""
        return list({Path(one).resolve(): one for one in [self.export, *self.grid.exports]}.values())


@dataclass(frozen=True)
class Cell:
    """One evaluation."""

    name: str
    """of the system"""
    export: str
    context_seconds: float
    """what a frame can see: the length of a window, or of windowed attention; 0 for the whole recording"""
    inference: InferenceSettings
    encoder: EncoderChanges
    decoder: DecoderSettings
    export_hash: str = ""
    decode_key: str = ""
    """what was decoded under one key may be used under the same one only"""
    key: str = ""
    """the same of the results, which depend on the references, too"""
    folder: str = ""
    """of the results, within --out; empty where there is but one"""

    @property
    def mode(self) -> str:
        return "windowed" if self.context_seconds and self.inference.mode == "whole" else self.inference.mode

    @property
    def label(self) -> str:
        """Such as "buffered 20 s, overlap 0.25, greedy", and what of the encoder was changed."""
        context = f" {self.context_seconds:g} s" if self.context_seconds else ""
        overlap = f", overlap {self.inference.overlap:g}" if self.inference.overlap else ""
        told = ("mask", "window") if self.mode == "windowed" else ()  # by the context
        changes = {name: value for name, value in to_dict(self.encoder).items() if name not in told}
        changed = "".join(f", {name} {value}" for name, value in changes.items() if value is not None)
        return f"{self.mode}{context}{overlap}, {decoder_label(self.decoder)}{changed}"


def decoder_label(decoder: DecoderSettings) -> str:
    """Such as "greedy", or "beam 8, language_model lm.arpa, label_bonus 0.5": all that is not the default."""
    beam = "greedy" if decoder.beam == 1 else f"beam {decoder.beam}"
    parts = [beam if decoder.head == "auto" else f"{decoder.head} {beam}"]
    for one in fields(decoder):
        value = getattr(decoder, one.name)
        if one.name not in ("beam", "head") and value != one.default:
            parts.append(f"{one.name} {Path(value).name if isinstance(value, str) else value}")
    return ", ".join(parts)


def cells_of(config: Config, export: Export, frames_per_second: float) -> list[Cell]:
    """The evaluations of a model, each once; no keys and folders yet.

    Raises UserError for a change that the encoder does not allow, or a context shorter than one of its frames.
    """
    grid = config.grid
    trained = from_dict(EncoderSettings, export.config["encoder"])
    rate = frames_per_second / trained.subsampling_factor  # frames of the first stage, in which a window is told
    run = export.path.resolve().parent.name
    name = run if not config.name else config.name if len(config.exports) == 1 else f"{config.name} {run}"
    cells: dict[Cell, None] = {}
    for mode, context, overlap, decoder in product(
        grid.modes or [config.inference.mode],
        grid.contexts or [config.inference.context_seconds],
        grid.overlaps or [config.inference.overlap],
        grid.decoders or [config.decoder],
    ):
        windows = context > 0 and mode in ("buffered", "averaged", "stitched")
        one_pass: Mode = "streaming" if mode == "streaming" else "whole"
        inference = replace(
            config.inference,
            mode=mode if windows and mode != "windowed" else one_pass,
            context_seconds=float(context) if windows else 0.0,
            overlap=float(overlap) if windows else 0.0,
        )
        inference.context(trained.stride, frames_per_second)
        encoder = config.encoder
        if mode == "windowed" and context > 0:
            encoder = replace(encoder, mask="window", window=max(1, round(context * rate / 2)))
        encoder.apply(trained)
        seen = float(context) if windows or (mode == "windowed" and context > 0) else 0.0
        cells[Cell(name, str(export.path), seen, inference, encoder, decoder)] = None
    return list(cells)


def in_folders(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a grid, each with a folder of its own: named for what it is, the same in every grid."""
    names = distinct_names(dict.fromkeys((cell.name, cell.export) for cell in cells))
    placed = []
    for cell in cells:
        run = Path(cell.export).resolve().parent.name
        folder = re.sub(r"[^\w.-]+", "-", f"{run}-{cell.label}").strip("-.")[:150]
        name = names[cell.name, cell.export]
        placed.append(replace(cell, name=name, folder=f"{folder}-{cell.key[:8]}"))
    return placed


def in_earlier_folders(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells; those evaluated in `out` before keep their earlier folders.

    A folder's name starts with the export's path, which may have changed since, and ends in the key, which has not.
    """
    placed, taken = [], {cell.folder for cell in cells}
    for cell in cells:
        earlier = [] if (out / cell.folder).is_dir() else sorted(path.name for path in out.glob(f"*-{cell.key[:8]}"))
        free = [name for name in earlier if name not in taken]
        placed.append(replace(cell, folder=free[0]) if free else cell)
        taken.add(placed[-1].folder)
    return placed


def distinct_names(systems: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What systems (name, export) are called so that no two are called the same: with more of their path if need be."""
    systems = list(systems)
    found = {}
    for name, export in systems:
        others = [Path(other).resolve().parent.parts for same, other in systems if same == name and other != export]
        parts = Path(export).resolve().parent.parts
        length = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        found[name, export] = name if not others else "-".join(parts[-max(length, 2) :])
    return found


def with_keys(cell: Cell, config: Config, export_hash: str, fingerprint: str) -> Cell:
    """The cell with the keys that name it.

    What decides what is heard: weights, data, inference, encoder, decoder. Not the batch size, for outputs do not
    depend on it; nor where the dataset lies; nor which other recordings there are. What decides the results: that,
    which recordings there are, their references, the scoring rules, and the bootstrap.
    """
    inference = {name: value for name, value in to_dict(cell.inference).items() if name != "batch_seconds"}
    decoder = to_dict(cell.decoder)
    for name in ("language_model", "hot_words"):
        if decoder[name]:
            decoder[name] = hash_of_file(decoder[name])
    heard = [FORMAT_VERSION, export_hash, fingerprint, inference, decoder, to_dict(cell.encoder)]
    selection = {name: value for name, value in to_dict(config.data).items() if name != "dataset"}
    stm = [[path.name, hash_of_file(path)] for path in stm_files(config.stm)]
    decode_key = _hash(heard)
    return replace(
        cell,
        export_hash=export_hash,
        decode_key=decode_key,
        key=_hash([decode_key, RULES_VERSION, selection, config.resamples, stm]),
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def try_cell(cell: Cell, recogniser: Recogniser, decoder: Decoder, device: torch.device | str = "cpu") -> None:
    """Decode two frames of noise, so that what does not go together is an error before any work."""
    stride, rate = recogniser.model.encoder.settings.stride, recogniser.features.frames_per_second
    noise = torch.randn(2 * stride, recogniser.features.num_mels, generator=torch.Generator().manual_seed(0))
    source = Source(len(noise), lambda start, stop: noise[start:stop], name="noise")
    list(decode_recordings(decoder, [source], cell.inference, stride, rate, device))


def stm_files(stm: str) -> list[Path]:
    """The file, or all those of a folder, sorted. Raises UserError where there is none."""
    path = Path(stm)
    found = [] if not stm else [path] if path.is_file() else sorted(path.glob("[!.]*.stm"))
    if stm and not found:
        raise UserError(f"stm = {stm}: there is no such file, and no folder with .stm files; give one of the two")
    return found
