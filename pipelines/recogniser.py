"""An export made ready to decode: what evaluate.py, transcribe.py, tools/align.py and tools/train_ngram.py share.

Exports of finetune_ctc.py hold a CTC model, those of finetune_rnnt.py a transducer, perhaps with a CTC head beside.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.tokens import TimedTokens
from bestrq.long_form.decoders import BeamCTC, Decoder, DecoderSettings, GreedyCTC, TransducerDecoder, read_fusion
from bestrq.long_form.inference import Outputs, StreamedOutputs
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel, frame_log_probs
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.training.export import Export
from bestrq.training.process import World
from bestrq.transcripts.transcripts import TimedTranscript
from bestrq.transcripts.words import timed_words
from common.config import from_dict
from common.errors import UserError
from common.files import hash_of_file
from data.features import FeatureSettings
from data.format.dataset import Dataset
from data.format.normalisation import normalise_into
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files


@dataclass(frozen=True)
class Recogniser:
    """A model in evaluation mode, with what it must be fed."""

    model: CTCModel | TransducerModel
    tokenizer: Tokenizer
    features: FeatureSettings
    normalisation: Literal["recording", "dataset"]
    statistics: tuple[Tensor, Tensor] | None = None
    """normalisation 'dataset': mean and 1 / standard deviation of the training data, float32 [M] each; None where the
    export has none, since it is older or was trained on a mixture, whose datasets each have their own"""


@dataclass(frozen=True)
class EncoderChanges:
    """What the encoder of an export sees, in place of what it was trained with; null keeps that."""

    mask: Literal["segment", "window", "causal", "chunk"] | None = None
    """frames that a frame attends to; 'window' with inference.mode whole is windowed attention in one pass"""
    window: PositiveInt | None = None
    """mask 'window': frames of the first stage seen to either side"""
    chunk_size: PositiveInt | None = None
    """mask 'chunk': frames of the first stage in a chunk"""
    left_chunks: int | None = None
    """mask 'chunk': chunks seen before a frame's own; -1 for all"""
    rotary_interpolation: PositiveFloat | None = None
    """rotary positions are divided by this"""

    def apply(self, encoder: EncoderSettings) -> EncoderSettings:
        """The changed settings. Raises UserError for a value that is not possible, or that the mask ignores."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}
        # Chunks of changing length are for training, and no other mask allows them.
        changed = replace(encoder, **given, dynamic_chunks=False) if given else encoder
        for name, mask in (("window", "window"), ("chunk_size", "chunk"), ("left_chunks", "chunk")):
            if name in given and changed.mask != mask:
                raise UserError(
                    f"encoder.{name} = {given[name]} changes nothing with mask {changed.mask!r}: "
                    f"give encoder.mask {mask!r} too"
                )
        return changed


def load_recogniser(export: Export, changes: EncoderChanges = EncoderChanges()) -> Recogniser:
    """The model of an export, on the CPU, its encoder with the changes.

    Raises UserError when it is no recogniser, or is damaged, or a change is not possible.
    """
    config = export.config
    kind = config.get("kind")
    if kind not in ("ctc", "rnnt"):
        raise UserError(
            f"{export.path} holds a model of kind {kind!r}, not a recogniser: "
            "give the export of finetune_ctc.py or finetune_rnnt.py"
        )
    wanted = ("encoder", "vocab_size", "features", "normalisation", *(["transducer"] if kind == "rnnt" else []))
    missing = [name for name in wanted if config.get(name) is None]
    if missing:
        raise UserError(f"{export.path / 'config.json'} lacks {', '.join(missing)}: export the model again")
    tokenizer = load_tokenizer(export.path)
    if tokenizer.vocab_size != config["vocab_size"]:
        raise UserError(
            f"{export.path}: the tokenizer has {tokenizer.vocab_size} labels, the model {config['vocab_size']}: "
            "one of them is another model's"
        )
    encoder = changes.apply(from_dict(EncoderSettings, config["encoder"]))
    model: CTCModel | TransducerModel
    if kind == "rnnt":
        model = TransducerModel(encoder, from_dict(TransducerSettings, config["transducer"]), config["vocab_size"])
    else:
        model = CTCModel(encoder, config["vocab_size"])
    try:
        model.load_state_dict(export.tensors)
    except RuntimeError as error:
        raise UserError(f"{export.path / 'model.safetensors'} does not fit its config.json: {error}") from error
    features, normalisation = FeatureSettings.from_dict(config["features"]), config["normalisation"]
    return Recogniser(model.eval(), tokenizer, features, normalisation, _statistics(export, normalisation, features))


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


def mel_reader(recogniser: Recogniser, dataset: Dataset, recording: int) -> Callable[[int, int], Tensor]:
    """A recording's log-mel from a start to a stop, float32 `[stop - start, M]`, as the model was trained to see it."""
    if recogniser.statistics is None:
        normalisation = recogniser.normalisation
        return lambda start, stop: torch.from_numpy(dataset.read_normalised(recording, start, stop, normalisation))
    mean, inverse_std = recogniser.statistics

    def read_mel(start: int, stop: int) -> Tensor:
        values = dataset.read(recording, start, stop)
        out = torch.empty(values.shape)
        try:
            normalise_into(out, values, mean, inverse_std)
        except UserError as error:
            raise UserError(f"{dataset.where(recording)}: damaged ({error})") from error
        return out

    return read_mel


def timed_transcript(recogniser: Recogniser, id: str, num_frames: int, tokens: TimedTokens) -> TimedTranscript:
    """Text and words with times of a recording of `num_frames` mel frames."""
    rate, stride = recogniser.features.frames_per_second, recogniser.model.encoder.settings.stride
    seconds = num_frames / rate
    words = timed_words(tokens, recogniser.tokenizer.pieces, stride / rate)
    words = [replace(word, end=min(word.end, seconds)) for word in words]  # the last frame may reach beyond
    return TimedTranscript(id, seconds, recogniser.tokenizer.decode(tokens.ids), words)


def make_decoder(recogniser: Recogniser, settings: DecoderSettings, export: str) -> Decoder:
    """The decoder that is asked for. Raises UserError where the model of the folder `export` has none such."""
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
            f"decoder.head is 'rnnt', but {export} holds a CTC model only: give an export of finetune_rnnt.py"
        )
    log_probs = ctc_outputs(recogniser, export)
    head = model.ctc_head if isinstance(model, TransducerModel) else model.head
    assert head is not None  # or ctc_outputs would have refused
    stream = StreamedOutputs(model.encoder, partial(frame_log_probs, head))
    if settings.beam == 1:
        return GreedyCTC(log_probs, stream)
    return BeamCTC(log_probs, settings, _fusion(recogniser, settings), stream=stream)


def _fusion(recogniser: Recogniser, settings: DecoderSettings) -> Fusion | None:
    path, tokenizer = settings.language_model, recogniser.tokenizer
    if path and not Path(path).is_file():
        raise UserError(f"decoder.language_model is {path}: there is no such file; tools/train_ngram.py makes one")
    return read_fusion(settings, tokenizer.pieces, tokenizer.encode)


def ctc_outputs(recogniser: Recogniser, export: str) -> Outputs:
    """The function that gives a model's CTC log-probabilities `[R, T, V]`. Raises UserError where it has none."""
    if not isinstance(recogniser.model, TransducerModel):
        return recogniser.model.log_probs
    if recogniser.model.ctc_head is None:
        raise UserError(
            f"{export} holds a transducer without a CTC head: train it with transducer.ctc_weight above 0, "
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
    """This rank's part: the longest first, each to the rank with the least to do; a pure function of the lengths."""
    loads = np.zeros(world.size, np.int64)
    mine = []
    for i in sorted(recordings, key=lambda i: (-int(frames[i]), i)):
        rank = int(loads.argmin())
        loads[rank] += frames[i]
        if rank == world.rank:
            mine.append(i)
    return mine
