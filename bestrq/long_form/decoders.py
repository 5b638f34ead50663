"""Decoders: from whole recordings to timed tokens, with CTC or transducer models, greedy or beam search.

A decoder has two stages. The first runs on batches of windows and reduces the model's outputs to the part that the
search needs; `inference` assembles these to whole recordings. The second searches several recordings at a time.

N recordings, R rows, T encoder frames, K labels per frame.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from bestrq.decoding.ctc_beam import ctc_beam_search, top_labels
from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hot_words import read_hot_words
from bestrq.decoding.hypotheses import Rescorer, best_hypothesis
from bestrq.decoding.ngram import read_arpa
from bestrq.decoding.tokens import BLANK, TimedTokens, greedy_ctc
from bestrq.decoding.transducer_beam import beam_search
from bestrq.long_form.inference import (
    InferenceSettings,
    OutputFunction,
    RecordingSource,
    StreamedOutputs,
    excluded_frames,
    model_outputs,
)
from bestrq.long_form.stitching import stitch_recordings
from bestrq.recognition.transducer import TransducerModel
from common.errors import UserError
from common.segments import Segments


@dataclass(frozen=True)
class DecoderSettings:
    """Search for the tokens, from the outputs of the model."""

    head: Literal["auto", "ctc", "rnnt"] = "auto"
    """decoder of a hybrid model; auto uses the transducer if the model has one"""
    beam: PositiveInt = 1
    """number of hypotheses; 1 is greedy search"""
    max_symbols: PositiveInt = 10
    """maximum number of labels that a transducer emits per encoder frame"""
    language_model: str = ""
    """token n-gram (ARPA file of tools/train_ngram.py) for shallow fusion; needs a beam of 2 or more"""
    language_model_weight: float = 0.3
    """factor of the language model's log-probabilities"""
    label_bonus: float = 0.0
    """length bonus per label, in nats; compensates for the language model's preference for short hypotheses"""
    hot_words: str = ""
    """text file with phrases to prefer, one per line, optionally followed by a tab and a weight; needs a beam of 2 or
    more"""
    hot_word_weight: PositiveFloat = 1.5
    """score in nats per label of a hot word whose line has no weight; subtracted if the phrase is not completed"""
    ctc_labels: PositiveInt = 32
    """number of most probable outputs per frame that a CTC beam search considers"""
    ctc_min_log_prob: float = -10.0
    """a CTC beam search ignores outputs of a frame below this log-probability; lower is slower"""

    def __post_init__(self) -> None:
        for name in ("language_model", "label_bonus", "hot_words"):
            if getattr(self, name) and self.beam == 1:
                raise UserError(f"decoder.{name} is given, but decoder.beam is 1 (greedy): give a beam such as 8")
        if self.hot_word_weight == math.inf:  # which PositiveFloat accepts
            raise UserError("decoder.hot_word_weight is inf: give a positive number, such as 1.5")
        if not self.ctc_min_log_prob <= 0:
            raise UserError(f"decoder.ctc_min_log_prob is {self.ctc_min_log_prob}: give 0 or less, such as -10")


def read_fusion(
    settings: DecoderSettings, pieces: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> Fusion | None:
    """Read the language model and hot words of a beam search; None if the settings have no fusion.

    Args:
        pieces: piece of each id of the tokenizer, `[V]`.
        encode: the tokenizer's function from text to ids.

    Raises:
        UserError: a file cannot be read, or does not match the tokenizer.
    """
    if settings.beam == 1 or not (settings.language_model or settings.hot_words or settings.label_bonus):
        return None
    return Fusion(
        len(pieces),
        read_arpa(settings.language_model, pieces) if settings.language_model else None,
        settings.language_model_weight,
        settings.label_bonus,
        read_hot_words(settings.hot_words, encode, settings.hot_word_weight) if settings.hot_words else None,
    )


class Decoder(Protocol):
    """Model outputs, their reduction, and the search."""

    @property
    def description(self) -> str:
        """Description for a report, such as "greedy CTC, no language model"."""

    @property
    def stream(self) -> StreamedOutputs | None:
        """Streaming version of `outputs`, if the decoder has one."""

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Model outputs at every frame, `[R, T, ...]`."""

    def reduce(self, outputs: Tensor) -> Tensor:
        """Reduce outputs to the part that the search needs, `[n, ...]`."""

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        """Tokens of N recordings, none of them at excluded frames.

        Args:
            outputs: reduced outputs of each recording, `[T, ...]`.
            excluded: mask of excluded frames of each recording, bool `[T]`.
        """


@dataclass(frozen=True)
class GreedyCTC:
    """Best path of a CTC head."""

    log_probs: OutputFunction
    """`CTCModel.log_probs`, or `ctc_log_probs` of a hybrid model"""
    stream: StreamedOutputs | None = None

    @property
    def description(self) -> str:
        return "greedy CTC, no language model"

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        return self.log_probs(log_mel, segments)

    def reduce(self, outputs: Tensor) -> Tensor:
        """Best output of each frame and its log-probability, `[n, 2]`."""
        return top_labels(outputs, 1).squeeze(-2)

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        tokens = []
        for frames, mask in zip(outputs, excluded, strict=True):
            ids = frames[:, 0].long().masked_fill(mask, BLANK)
            tokens += greedy_ctc(ids[None], torch.tensor([len(frames)]), frames[None, :, 1])
        return tokens


@dataclass(frozen=True)
class BeamCTC:
    """Prefix beam search of a CTC head over whole recordings. An excluded frame is a blank."""

    log_probs: OutputFunction
    settings: DecoderSettings
    fusion: Fusion | None = None
    rescorer: Rescorer | None = None
    stream: StreamedOutputs | None = None

    @property
    def description(self) -> str:
        return f"CTC, {_describe_beam(self.settings, self.fusion, self.rescorer)}"

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        return self.log_probs(log_mel, segments)

    def reduce(self, outputs: Tensor) -> Tensor:
        """Top outputs of each frame, `[n, K, 2]`; all outputs of a long recording would need too much memory."""
        return top_labels(outputs, self.settings.ctc_labels)

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        settings = self.settings
        tokens = []
        for frames, mask in zip(outputs, excluded, strict=True):
            blank = torch.full_like(frames[0], -torch.inf)
            blank[:, 0] = BLANK
            blank[0, 1] = 0.0
            frames = torch.where(mask[:, None, None], blank, frames)
            beam = ctc_beam_search(frames, settings.beam, self.fusion, settings.ctc_min_log_prob)
            tokens.append(best_hypothesis(beam.hypotheses(), self.rescorer).tokens)
        return tokens


@dataclass(frozen=True)
class TransducerDecoder:
    """Greedy or beam search of a transducer over whole recordings. Excluded frames are removed before the search."""

    model: TransducerModel
    settings: DecoderSettings
    fusion: Fusion | None = None
    rescorer: Rescorer | None = None

    @property
    def description(self) -> str:
        if self.settings.beam == 1:
            return f"greedy {'TDT' if self.model.settings.durations else 'transducer'}, no language model"
        return f"transducer, {_describe_beam(self.settings, self.fusion, self.rescorer)}"

    @property
    def stream(self) -> StreamedOutputs:
        return StreamedOutputs(self.model.encoder, lambda frames: self.model.joint.encoder_projection(frames).float())

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        return self.model.encode(log_mel, segments).float()

    def reduce(self, outputs: Tensor) -> Tensor:
        return outputs

    @torch.no_grad()
    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        kept = [(~mask).nonzero().squeeze(1) for mask in excluded]
        device = next(self.model.parameters()).device
        sequences = [frames[indices] for frames, indices in zip(outputs, kept, strict=True)]
        encoded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        settings = self.settings
        if settings.beam == 1:
            greedy = self.model.greedy(encoded, lengths, settings.max_symbols)
            decoded = [greedy.tokens(n) for n in range(len(sequences))]
        else:
            beam = beam_search(self.model, encoded, lengths, settings.beam, settings.max_symbols, self.fusion)
            decoded = [best_hypothesis(beam.hypotheses(n), self.rescorer).tokens for n in range(len(sequences))]
        return [
            TimedTokens(
                tokens.ids,
                indices[tokens.first_frame].tolist(),
                indices[tokens.last_frame].tolist(),
                tokens.confidence,
            )
            for tokens, indices in zip(decoded, kept, strict=True)
        ]


def _describe_beam(settings: DecoderSettings, fusion: Fusion | None, rescorer: Rescorer | None) -> str:
    model = f"language model of weight {fusion.weight:g}" if fusion and fusion.language_model else "no language model"
    hot_words = ", hot words" if fusion and fusion.hot_words else ""
    return f"beam of {settings.beam}, {model}{hot_words}{', rescored' if rescorer else ''}"


def decode_recordings(
    decoder: Decoder,
    sources: Sequence[RecordingSource],
    settings: InferenceSettings,
    stride: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, TimedTokens]]:
    """Tokens of whole recordings with their encoder frames, each with the index of its source.

    Recordings are searched together up to `settings.batch_seconds`, including padding: sort them by length. In mode
    'stitched', each window is searched separately.

    Args:
        stride: mel frames per encoder frame (`encoder.settings.stride`).
        frames_per_second: mel frames per second.
    """
    if settings.mode == "stitched":
        search, reduce = decoder.search, decoder.reduce
        yield from stitch_recordings(
            decoder.outputs, reduce, search, sources, settings, stride, frames_per_second, device
        )  # fmt: skip
        return
    rate = frames_per_second / stride
    pending: list[tuple[int, Tensor]] = []
    for index, outputs in model_outputs(
        decoder.outputs, sources, settings, stride, frames_per_second, device, decoder.reduce, decoder.stream
    ):  # fmt: skip
        longest = max(len(frames) for _, frames in [*pending, (index, outputs)])
        if pending and longest * (len(pending) + 1) > settings.batch_seconds * rate:
            yield from _search(decoder, sources, pending, rate)
            pending = []
        pending.append((index, outputs))
    if pending:
        yield from _search(decoder, sources, pending, rate)


def _search(
    decoder: Decoder, sources: Sequence[RecordingSource], pending: list[tuple[int, Tensor]], rate: float
) -> Iterator[tuple[int, TimedTokens]]:
    excluded = [excluded_frames(sources[index], len(frames), rate) for index, frames in pending]
    tokens = decoder.search([frames for _, frames in pending], excluded)
    yield from zip((index for index, _ in pending), tokens, strict=True)
