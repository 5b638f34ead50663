"""Decoders: from whole recordings to timed tokens, whatever the model.

A decoder has two halves. The first works on windows of recordings, batched, and gives what is needed of every encoder
frame; `inference` puts these together to whole recordings. The second searches these, several recordings at once.

N recordings, T encoder frames, V vocabulary, J joint width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bestrq.decoding.ctc_beam import ctc_beam_search, likeliest_labels
from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hot_words import read_hot_words
from bestrq.decoding.ngram import read_arpa
from bestrq.decoding.sequences import Rescorer, choose
from bestrq.decoding.tokens import BLANK, TimedTokens, greedy_ctc
from bestrq.decoding.transducer_beam import beam_search
from bestrq.long_form.inference import (
    InferenceSettings,
    Outputs,
    Source,
    StreamedOutputs,
    excluded_frames,
    transcribe,
)
from bestrq.long_form.stitching import stitch_recordings
from bestrq.recognition.transducer import TransducerModel
from common.errors import UserError
from common.segments import Segments


@dataclass(frozen=True)
class DecoderSettings:
    """How tokens are found in what the model gives."""

    head: Literal["auto", "ctc", "rnnt"] = "auto"
    """decoder of a hybrid model; auto takes the transducer where there is one"""
    beam: int = 1
    """hypotheses kept; 1 is greedy"""
    max_symbols: int = 10
    """labels that a transducer may emit at one encoder frame"""
    language_model: str = ""
    """token n-gram (ARPA, made by tools/train_ngram.py) for shallow fusion; needs a beam of 2 or more"""
    language_model_weight: float = 0.3
    """factor of its log-probabilities"""
    label_bonus: float = 0.0
    """added for every label, in nats: makes up for what the language model takes from long hypotheses"""
    hot_words: str = ""
    """text file of phrases that are likely to be said, one a line, perhaps with a tab and a weight of its own; needs a
    beam of 2 or more"""
    hot_word_weight: float = 1.5
    """added for every label of a hot word, in nats, where its line has no weight; taken back if it breaks off"""
    ctc_labels: int = 32
    """outputs that a CTC beam looks at in a frame, the likeliest"""
    ctc_min_log_prob: float = -10.0
    """outputs of a frame below this log-probability are left out by a CTC beam; lower is slower"""

    def __post_init__(self) -> None:
        for name in ("beam", "max_symbols", "ctc_labels"):
            if getattr(self, name) < 1:
                raise UserError(f"decoder.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("language_model", "label_bonus", "hot_words"):
            if getattr(self, name) and self.beam == 1:
                raise UserError(f"decoder.{name} is given, but decoder.beam is 1 (greedy): give a beam such as 8")
        if not 0 < self.hot_word_weight < math.inf:
            raise UserError(f"decoder.hot_word_weight is {self.hot_word_weight}: give a positive number, such as 1.5")
        if not self.ctc_min_log_prob <= 0:
            raise UserError(f"decoder.ctc_min_log_prob is {self.ctc_min_log_prob}: give 0 or less, such as -10")


def read_fusion(
    settings: DecoderSettings, pieces: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> Fusion | None:
    """What a beam adds to the model's scores, of the files that the settings name; None where that is nothing.

    Args:
        pieces: how the tokenizer writes every id, `[V]`.
        encode: the tokenizer's, text to ids.

    Raises:
        UserError: a file cannot be read, or does not fit the tokenizer.
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
    """The two halves; see above."""

    @property
    def description(self) -> str:
        """For a report, such as "greedy CTC, no language model"."""

    @property
    def stream(self) -> StreamedOutputs | None:
        """`outputs` of a stream, where it is known."""

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """What the model gives of every frame, `[R, T, ...]`."""

    def reduce(self, outputs: Tensor) -> Tensor:
        """What of it is kept, `[n, ...]`."""

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        """Tokens of N recordings from what was kept, `[T, ...]` each; none at the excluded frames, bool `[T]`."""


@dataclass(frozen=True)
class GreedyCTC:
    """The best path of a CTC head. log_probs: of `CTCModel`, or `ctc_log_probs` of a hybrid."""

    log_probs: Outputs
    stream: StreamedOutputs | None = None

    @property
    def description(self) -> str:
        return "greedy CTC, no language model"

    def outputs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        return self.log_probs(log_mel, segments)

    def reduce(self, outputs: Tensor) -> Tensor:
        """The best output of every frame and its log-probability, `[n, 2]`."""
        return likeliest_labels(outputs, 1).squeeze(-2)

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        found = []
        for one, out in zip(outputs, excluded, strict=True):
            ids = one[:, 0].long().masked_fill(out, BLANK)
            found += greedy_ctc(ids[None], torch.tensor([len(one)]), one[None, :, 1])
        return found


@dataclass(frozen=True)
class BeamCTC:
    """Prefix beam search of a CTC head over whole recordings; an excluded frame is a blank."""

    log_probs: Outputs
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
        """The likeliest outputs of every frame, `[n, K, 2]`: of an hour and a large vocabulary, all are too many."""
        return likeliest_labels(outputs, self.settings.ctc_labels)

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        how = self.settings
        found = []
        for one, out in zip(outputs, excluded, strict=True):
            blank = torch.full_like(one[0], -torch.inf)
            blank[:, 0] = BLANK
            blank[0, 1] = 0.0
            heard = torch.where(out[:, None, None], blank, one)
            beam = ctc_beam_search(heard, how.beam, self.fusion, how.ctc_min_log_prob)
            found.append(choose(beam.hypotheses(), self.rescorer).tokens)
        return found


@dataclass(frozen=True)
class TransducerDecoder:
    """Greedy or beam search of a transducer over whole recordings; excluded frames are not there for it."""

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
        heard = [(~one).nonzero().squeeze(1) for one in excluded]
        device = next(self.model.parameters()).device
        frames = [one[frame].to(device) for one, frame in zip(outputs, heard, strict=True)]
        encoded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
        lengths = torch.tensor([len(one) for one in frames], device=device)
        how = self.settings
        if how.beam == 1:
            greedy = self.model.greedy(encoded, lengths, how.max_symbols)
            found = [greedy.tokens(n) for n in range(len(frames))]
        else:
            beam = beam_search(self.model, encoded, lengths, how.beam, how.max_symbols, self.fusion)
            found = [choose(beam.hypotheses(n), self.rescorer).tokens for n in range(len(frames))]
        return [
            TimedTokens(one.ids, frame[one.first_frame].tolist(), frame[one.last_frame].tolist(), one.confidence)
            for one, frame in zip(found, heard, strict=True)
        ]


def _describe_beam(settings: DecoderSettings, fusion: Fusion | None, rescorer: Rescorer | None) -> str:
    model = f"language model of weight {fusion.weight:g}" if fusion and fusion.language_model else "no language model"
    hot_words = ", hot words" if fusion and fusion.hot_words else ""
    return f"beam of {settings.beam}, {model}{hot_words}{', rescored' if rescorer else ''}"


def decode_recordings(
    decoder: Decoder,
    sources: Sequence[Source],
    settings: InferenceSettings,
    stride: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, TimedTokens]]:
    """Tokens of whole recordings, and the encoder frames that they came from; each with the index of its source.

    Recordings are searched together as long as they are within `settings.batch_seconds`, padding included: put those
    of similar length side by side. In mode 'stitched' every window is searched by itself.

    Args:
        stride: mel frames of an encoder frame (`encoder.settings.stride`).
        frames_per_second: mel frames of a second.
    """
    if settings.mode == "stitched":
        search, reduce = decoder.search, decoder.reduce
        yield from stitch_recordings(
            decoder.outputs, reduce, search, sources, settings, stride, frames_per_second, device
        )  # fmt: skip
        return
    rate = frames_per_second / stride
    waiting: list[tuple[int, Tensor]] = []
    for index, kept in transcribe(
        decoder.outputs, sources, settings, stride, frames_per_second, device, decoder.reduce, decoder.stream
    ):  # fmt: skip
        longest = max(len(one) for _, one in [*waiting, (index, kept)])
        if waiting and longest * (len(waiting) + 1) > settings.batch_seconds * rate:
            yield from _search(decoder, sources, waiting, rate)
            waiting = []
        waiting.append((index, kept))
    if waiting:
        yield from _search(decoder, sources, waiting, rate)


def _search(
    decoder: Decoder, sources: Sequence[Source], waiting: list[tuple[int, Tensor]], rate: float
) -> Iterator[tuple[int, TimedTokens]]:
    excluded = [excluded_frames(sources[index], len(kept), rate) for index, kept in waiting]
    found = decoder.search([kept for _, kept in waiting], excluded)
    yield from zip((index for index, _ in waiting), found, strict=True)
