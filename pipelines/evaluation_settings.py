"""Settings of an evaluation, and the keys under which its results are stored and reused."""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt

from bestrq.long_form.decoders import DecoderSettings
from bestrq.long_form.inference import InferenceSettings, Mode
from bestrq.model.conformer import EncoderSettings
from bestrq.report.result_files import FORMAT_VERSION
from bestrq.scoring.normalisers import RULES_VERSION
from bestrq.training.export_reading import Export
from bestrq.transcripts.formats import WRITERS
from common.config import from_dict, to_dict
from common.errors import UserError
from common.files import hash_of_file
from pipelines.recogniser import EncoderChanges


@dataclass
class DataSettings:
    """Recordings to evaluate."""

    dataset: str = ""
    """dataset folder, made by `python -m data.prepare`"""
    split: str = "test"
    """split of the dataset"""
    language: str = ""
    """only recordings of this language; empty takes all"""
    max_recordings: NonNegativeInt = 0
    """only the first N recordings in the order of their ids; 0 takes all"""


@dataclass
class Config:
    """Evaluation of an exported recogniser on whole recordings."""

    export: str = ""
    """folder of the model, RUN_FOLDER/export of finetune_ctc.py or finetune_rnnt.py"""
    out: str = "results"
    """folder for the results and, until the evaluation is finished, for the recordings decoded so far. Each evaluation
    adds a row to rows.jsonl in the parent folder"""
    name: str = ""
    """name of the system in the report; empty takes the name of the run folder"""
    data: DataSettings = field(default_factory=DataSettings)
    """recordings"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """context, overlap, batches, precision"""
    encoder: EncoderChanges = field(default_factory=EncoderChanges)
    """changes to the encoder's settings in the export; null keeps the trained value"""
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    """greedy or beam, CTC or transducer, language model"""
    stm: str = ""
    """STM file, or folder with an STM file per recording: references by segment (TED-LIUM). Error rates by segment are
    then reported too, and ignored segments are not scored"""
    audio: str = ""
    """folder with an audio file per recording, named by its id, which the report plays"""
    formats: str = ""
    """also write transcripts in these formats into OUT/transcripts, separated by commas: txt, json, ctm, srt, vtt,
    TextGrid"""
    resamples: int = 10_000
    """bootstrap resamples for the confidence intervals"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if a GPU is available"""
    threads: NonNegativeInt = 0
    """CPU threads per process; 0 divides the cores among the processes of a machine"""

    def __post_init__(self) -> None:
        for name, value in (("export", self.export), ("data.dataset", self.data.dataset)):
            if not value:
                raise UserError(f"{name} is missing: give it as --{name} FOLDER")
        if self.resamples < 100:
            raise UserError(f"resamples = {self.resamples}: give at least 100, or the intervals are meaningless")
        if any(name not in WRITERS for name in self.format_names):
            raise UserError(f"formats = {self.formats!r}: give one or more of {','.join(WRITERS)}, separated by commas")

    @property
    def format_names(self) -> list[str]:
        return [name.strip() for name in self.formats.split(",") if name.strip()]


@dataclass(frozen=True)
class Evaluation:
    """Export, and all settings that determine its transcripts of the recordings."""

    name: str
    """name of the system"""
    export: str
    """folder of the export"""
    context_seconds: float
    """window length, or width of windowed attention; 0 for the whole recording"""
    inference: InferenceSettings
    encoder: EncoderChanges
    decoder: DecoderSettings
    export_hash: str = ""
    decode_key: str = ""
    """hash of everything that determines the transcripts; decoded recordings are reused only if it is equal"""
    key: str = ""
    """hash of everything that determines the results: `decode_key`, the recordings, references and scoring rules"""
    folder: str = ""
    """folder of the results within --out; empty if the results go directly into --out"""

    @property
    def mode(self) -> str:
        return "windowed" if self.context_seconds and self.inference.mode == "whole" else self.inference.mode

    @property
    def label(self) -> str:
        """Short description, such as "buffered 20 s, overlap 0.25, greedy", with any changes to the encoder."""
        context = f" {self.context_seconds:g} s" if self.context_seconds else ""
        overlap = f", overlap {self.inference.overlap:g}" if self.inference.overlap else ""
        implied = ("mask", "window") if self.mode == "windowed" else ()  # given by the context
        changes = {name: value for name, value in to_dict(self.encoder).items() if name not in implied}
        changed = "".join(f", {name} {value}" for name, value in changes.items() if value is not None)
        return f"{self.mode}{context}{overlap}, {decoder_label(self.decoder)}{changed}"


def decoder_label(decoder: DecoderSettings) -> str:
    """All settings that differ from the defaults: "greedy", or "beam 8, language_model lm.arpa, label_bonus 0.5"."""
    beam = "greedy" if decoder.beam == 1 else f"beam {decoder.beam}"
    parts = [beam if decoder.head == "auto" else f"{decoder.head} {beam}"]
    for setting in fields(decoder):
        value = getattr(decoder, setting.name)
        if setting.name not in ("beam", "head") and value != setting.default:
            parts.append(f"{setting.name} {Path(value).name if isinstance(value, str) else value}")
    return ", ".join(parts)


def run_name(export: str | Path) -> str:
    """Name of the run folder of an export."""
    return Path(export).resolve().parent.name


def evaluation_of(config: Config, export: Export, frames_per_second: float) -> Evaluation:
    """Evaluation of an export with these settings, without keys.

    Raises UserError for a change that the encoder does not allow, or a context shorter than one encoder frame.
    """
    trained = from_dict(EncoderSettings, export.config["encoder"])
    config.encoder.apply(trained)
    inference = config.inference
    if inference.mode in ("whole", "streaming") or not inference.context_seconds:
        mode: Mode = "streaming" if inference.mode == "streaming" else "whole"
        inference = replace(inference, mode=mode, context_seconds=0.0, overlap=0.0)
    inference.context(trained.stride, frames_per_second)
    name = config.name or run_name(export.path)
    return Evaluation(name, str(export.path), inference.context_seconds, inference, config.encoder, config.decoder)


def with_keys(evaluation: Evaluation, config: Config, export_hash: str, fingerprint: str) -> Evaluation:
    """Evaluation with its keys.

    A transcript depends on weights, data, inference, encoder and decoder, but not on the batch size, the path of the
    dataset or the other recordings. Results also depend on the selection of recordings, their references, the scoring
    rules and the bootstrap.

    Args:
        export_hash: `hash_of_export`.
        fingerprint: of the dataset.
    """
    inference = {name: value for name, value in to_dict(evaluation.inference).items() if name != "batch_seconds"}
    decoder = to_dict(evaluation.decoder)
    for name in ("language_model", "hot_words"):
        if decoder[name]:
            decoder[name] = hash_of_file(decoder[name])
    decoding = [FORMAT_VERSION, export_hash, fingerprint, inference, decoder, to_dict(evaluation.encoder)]
    selection = {name: value for name, value in to_dict(config.data).items() if name != "dataset"}
    stm = [[path.name, hash_of_file(path)] for path in stm_files(config.stm)]
    decode_key = _hash(decoding)
    return replace(
        evaluation,
        export_hash=export_hash,
        decode_key=decode_key,
        key=_hash([decode_key, RULES_VERSION, selection, config.resamples, stm]),
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stm_files(stm: str) -> list[Path]:
    """STM file, or all STM files of a folder, sorted; empty for "". Raises UserError if there are none."""
    path = Path(stm)
    files = [] if not stm else [path] if path.is_file() else sorted(path.glob("[!.]*.stm"))
    if stm and not files:
        raise UserError(f"stm = {stm}: neither a file nor a folder with .stm files; give one of the two")
    return files
