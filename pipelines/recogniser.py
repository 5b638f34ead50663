"""Exported recognisers, ready to decode: shared by evaluate.py, transcribe.py, tools/sweep.py and tools/align.py.

An export of finetune_ctc.py has a CTC model, one of finetune_rnnt.py a transducer, with or without a CTC head.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.tokens import TimedTokens
from bestrq.long_form.decoders import (
    BeamCTC,
    Decoder,
    DecoderSettings,
    GreedyCTC,
    TransducerDecoder,
    decode_recordings,
    read_fusion,
)
from bestrq.long_form.inference import InferenceSettings, OutputFunction, RecordingSource, StreamedOutputs
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel, frame_log_probs
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.training.export_reading import Export
from bestrq.training.inference_precision import inference_precision
from bestrq.training.precision import warn_of_emulation
from bestrq.training.process import DistributedSettings, World, start_world
from bestrq.training.tensor_slots import misfits
from bestrq.transcripts.formats import TimedTranscript
from bestrq.transcripts.words import timed_words
from common.config import from_dict
from common.errors import UserError
from common.files import hash_of_file
from data.features import FeatureSettings, difference
from data.format.dataset import STD_FLOOR, Dataset, normalise_into
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from pipelines.kernels import check_kernels


@dataclass
class DataSettings:
    """Recordings of a dataset to process."""

    dataset: str = ""
    """dataset folder, made by `python -m data.prepare`"""
    split: str = ""
    """only this split; empty takes all"""
    language: str = ""
    """only recordings of this language; empty takes all"""


@dataclass(frozen=True)
class Recogniser:
    """Model in evaluation mode, with its tokenizer, features and their normalisation."""

    model: CTCModel | TransducerModel
    tokenizer: Tokenizer
    features: FeatureSettings
    normalisation: Literal["recording", "dataset"]
    statistics: tuple[Tensor, Tensor] | None = None
    """normalisation 'dataset': mean and 1 / standard deviation of the training data, float32 [M] each; None if the
    export has none, because it is older or was trained on a mixture, in which each dataset has its own"""
    std_floor: float = STD_FLOOR
    """lowest standard deviation in training, as a share of its mean over the bins; 0 if the export does not state it"""


@dataclass(frozen=True)
class EncoderChanges:
    """Encoder settings that replace those of an export; null keeps the trained value."""

    mask: Literal["segment", "window", "causal", "chunk"] | None = None
    """attention mask; 'window' with inference.mode whole is windowed attention in one pass"""
    window: PositiveInt | None = None
    """mask 'window': frames of the first stage attended to on each side"""
    chunk_size: PositiveInt | None = None
    """mask 'chunk': frames of the first stage per chunk"""
    left_chunks: int | None = None
    """mask 'chunk': previous chunks attended to; -1 for all"""
    rotary_interpolation: PositiveFloat | None = None
    """factor by which rotary positions are divided"""

    def apply(self, encoder: EncoderSettings) -> EncoderSettings:
        """Changed settings. Raises UserError for a value that is invalid or has no effect with the mask."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        # Chunks of random length are for training, and only mask 'chunk' allows them.
        changed = replace(encoder, **given, dynamic_chunks=False) if given else encoder
        for name, mask in (("window", "window"), ("chunk_size", "chunk"), ("left_chunks", "chunk")):
            if name in given and changed.mask != mask:
                raise UserError(
                    f"encoder.{name} = {given[name]} has no effect with mask {changed.mask!r}: "
                    f"also give encoder.mask {mask!r}"
                )
        return changed


def start_inference(device: Literal["auto", "cpu", "cuda"], threads: int, inference: InferenceSettings) -> World:
    """Start the process group of a script that decodes, and warn if the device only emulates the precision.

    device: value of the script's setting of this name.
    """
    # Ranks that finish early wait for the others, perhaps for hours.
    settings = DistributedSettings(device=device, threads=threads, precision="float32", timeout_minutes=24 * 60)
    world = start_world(settings, field="device")
    warn_of_emulation("inference.precision", inference.precision, world)
    return world


def resolve_inference(inference: InferenceSettings, world: World) -> InferenceSettings:
    """Settings with their precision resolved, before they enter a key or a result. All ranks must call it."""
    return replace(inference, precision=inference_precision(inference.precision, world))


def load_recogniser(export: Export, changes: EncoderChanges = EncoderChanges()) -> Recogniser:
    """Model of an export, on the CPU, with changes to its encoder.

    Raises UserError if the export is damaged or not a recogniser, or a change is invalid.
    """
    config = export.config
    kind = config.get("kind")
    if kind not in ("ctc", "rnnt"):
        raise UserError(
            f"{export.path} has a model of kind {kind!r}, not a recogniser: "
            "give the export of finetune_ctc.py or finetune_rnnt.py"
        )
    required = ("encoder", "vocab_size", "features", "normalisation", *(["transducer"] if kind == "rnnt" else []))
    missing = [name for name in required if config.get(name) is None]
    if missing:
        raise UserError(f"{export.path / 'config.json'} lacks {', '.join(missing)}: export the model again")
    tokenizer = load_tokenizer(export.path)
    if type(config["vocab_size"]) is not int or tokenizer.vocab_size != config["vocab_size"]:
        raise UserError(
            f"{export.path}: the tokenizer has {tokenizer.vocab_size} labels, the model {config['vocab_size']}: "
            "one of them belongs to another model"
        )
    encoder = changes.apply(from_dict(EncoderSettings, config["encoder"]))
    transducer = from_dict(TransducerSettings, config["transducer"]) if kind == "rnnt" else None
    build = partial(build_recogniser, encoder, transducer, config["vocab_size"])
    check_shapes(export, encoder, build)
    model = build()
    model.load_state_dict(export.tensors)
    features, normalisation = FeatureSettings.from_dict(config["features"]), config["normalisation"]
    std_floor = config.get("std_floor", 0.0)
    if not isinstance(std_floor, int | float) or not 0 <= std_floor < math.inf:
        raise UserError(f"{export.path / 'config.json'}: std_floor is {std_floor!r}, not a number: export again")
    statistics = _statistics(export, normalisation, features)
    return Recogniser(model.eval(), tokenizer, features, normalisation, statistics, std_floor)


def build_recogniser(
    encoder: EncoderSettings, transducer: TransducerSettings | None, vocab_size: int
) -> CTCModel | TransducerModel:
    """Transducer with these settings, or CTC model without them, with initial weights."""
    return CTCModel(encoder, vocab_size) if transducer is None else TransducerModel(encoder, transducer, vocab_size)


def check_shapes(
    export: Export, encoder: EncoderSettings, build: Callable[[], nn.Module], settings: str = "its config.json"
) -> None:
    """Raise UserError unless the tensors are those of the settings, before a model of any size is built.

    Args:
        build: makes the model; called on the device "meta".
        settings: file with the settings, for messages.
    """
    weights = export.path / "model.safetensors"
    blocks = {name.split(".")[2] for name in export.tensors if name.startswith("encoder.blocks.")}
    if len(blocks) != (num_blocks := sum(stage.num_layers for stage in encoder.stages)):
        raise UserError(f"{weights} does not fit {settings}: it has {len(blocks)} blocks instead of {num_blocks}")
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (RuntimeError, ValueError, OverflowError) as error:  # sizes that no tensor has
        raise UserError(f"{weights}: {settings} describes no possible model: {error}") from error
    if wrong := misfits(expected, export.tensors):
        raise UserError(f"{weights} does not fit {settings}: {wrong[0]} ({len(wrong)} such tensors)")


def _statistics(export: Export, normalisation: str, features: FeatureSettings) -> tuple[Tensor, Tensor] | None:
    stored = export.config.get("statistics")
    if normalisation == "recording" or stored is None:
        return None
    names = ("mean", "inverse_std")
    try:
        mean, inverse_std = (torch.tensor(stored[name], dtype=torch.float32) for name in names)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{export.path / 'config.json'}: statistics are damaged ({error}): export again") from error
    if mean.shape != (features.num_mels,) or inverse_std.shape != mean.shape:
        raise UserError(f"{export.path / 'config.json'}: statistics do not have {features.num_mels} mel bins")
    return mean, inverse_std


def check_features(features: FeatureSettings, dataset: Dataset) -> None:
    """Raise UserError, which lists the differing fields, if a dataset has other features than the model."""
    if different := difference(features, dataset.features):
        raise UserError(
            f"{dataset.location} has other features than the model (model != dataset): "
            f"{'; '.join(different)}. Prepare the dataset again with the model's features"
        )


def mel_reader(recogniser: Recogniser, dataset: Dataset, recording: int) -> Callable[[int, int], Tensor]:
    """Function (start, stop) -> normalised log-mel of a recording, float32 `[stop - start, M]`."""
    if recogniser.statistics is None:
        normalisation, std_floor = recogniser.normalisation, recogniser.std_floor
        return lambda start, stop: torch.from_numpy(
            dataset.read_normalised(recording, start, stop, normalisation, std_floor=std_floor)
        )
    mean, inverse_std = recogniser.statistics

    def read_mel(start: int, stop: int) -> Tensor:
        values = dataset.read(recording, start, stop)
        out = torch.empty(values.shape)
        try:
            normalise_into(out, values, mean, inverse_std)
        except UserError as error:
            raise UserError(f"{dataset.place(recording)}: damaged ({error})") from error
        return out

    return read_mel


def timed_transcript(recogniser: Recogniser, id: str, num_frames: int, tokens: TimedTokens) -> TimedTranscript:
    """Text and timed words of a recording of `num_frames` mel frames."""
    rate, stride = recogniser.features.frames_per_second, recogniser.model.encoder.settings.stride
    seconds = num_frames / rate
    words = timed_words(tokens, recogniser.tokenizer.pieces, stride / rate)
    words = [replace(word, end=min(word.end, seconds)) for word in words]  # the last encoder frame may be padded
    return TimedTranscript(id, seconds, recogniser.tokenizer.decode(tokens.ids), words)


def make_decoder(recogniser: Recogniser, settings: DecoderSettings, export: str) -> Decoder:
    """Decoder of a model. Raises UserError, which names the export, if the model does not support the settings."""
    model = recogniser.model
    if isinstance(model, TransducerModel) and settings.head != "ctc":
        if model.settings.durations and settings.beam > 1:
            raise UserError(
                f"decoder.beam is {settings.beam}, but the transducer of {export} has durations (TDT), "
                "which are decoded greedily: give 1"
            )
        return TransducerDecoder(model, settings, _fusion(recogniser, settings))
    if settings.head == "rnnt":
        raise UserError(
            f"decoder.head is 'rnnt', but {export} has only a CTC model: give an export of finetune_rnnt.py"
        )
    log_probs = ctc_outputs(recogniser, export)
    head = model.ctc_head if isinstance(model, TransducerModel) else model.head
    assert head is not None  # otherwise ctc_outputs has raised
    stream = StreamedOutputs(model.encoder, partial(frame_log_probs, head))
    if settings.beam == 1:
        return GreedyCTC(log_probs, stream)
    return BeamCTC(log_probs, settings, _fusion(recogniser, settings), stream=stream)


def try_decoding(
    recogniser: Recogniser, decoder: Decoder, settings: InferenceSettings, device: torch.device | str = "cpu"
) -> None:
    """Decode two encoder frames of noise. Raises UserError if model, decoder and settings are incompatible, or kernels
    cannot be compiled."""
    check_kernels(recogniser.model.encoder.settings, device, training=False)
    stride, rate = recogniser.model.encoder.settings.stride, recogniser.features.frames_per_second
    noise = torch.randn(2 * stride, recogniser.features.num_mels, generator=torch.Generator().manual_seed(0))
    source = RecordingSource(len(noise), lambda start, stop: noise[start:stop], name="noise")
    list(decode_recordings(decoder, [source], settings, stride, rate, device))


def _fusion(recogniser: Recogniser, settings: DecoderSettings) -> Fusion | None:
    path, tokenizer = settings.language_model, recogniser.tokenizer
    if path and not Path(path).is_file():
        raise UserError(f"decoder.language_model is {path}: no such file; tools/train_ngram.py trains a language model")
    return read_fusion(settings, tokenizer.pieces, tokenizer.encode)


def ctc_outputs(recogniser: Recogniser, export: str) -> OutputFunction:
    """Function that computes CTC log-probabilities `[R, T, V]`. Raises UserError if the model has no CTC head."""
    if not isinstance(recogniser.model, TransducerModel):
        return recogniser.model.log_probs
    if recogniser.model.ctc_head is None:
        raise UserError(
            f"{export} has a transducer without a CTC head: train it with transducer.ctc_weight above 0, "
            "or give an export of finetune_ctc.py"
        )
    return recogniser.model.ctc_log_probs


def hash_of_export(export: Export) -> str:
    """SHA-256 (hex) of the files that determine the outputs: weights, settings, tokenizer.

    Other files in the folder are ignored: the model card, leftovers of downloads and editors.
    """
    digest = hashlib.sha256()
    for name in sorted(["config.json", "model.safetensors", *tokenizer_files(export.path)]):
        digest.update(name.encode() + b"\0" + bytes.fromhex(hash_of_file(export.path / name)))
    return digest.hexdigest()


def share_out(recordings: Sequence[int], frames: np.ndarray, world: World) -> list[int]:
    """This rank's recordings. Longest first, each goes to the rank with the fewest frames so far; deterministic."""
    loads = np.zeros(world.size, np.int64)
    rank_recordings = []
    for i in sorted(recordings, key=lambda i: (-int(frames[i]), i)):
        rank = int(loads.argmin())
        loads[rank] += frames[i]
        if rank == world.rank:
            rank_recordings.append(i)
    return rank_recordings
