"""Decoders: from whole recordings to timed tokens, whatever the model.

A decoder has two halves. The first works on windows of recordings, batched, and gives what is needed of every encoder
frame; `inference` puts these together to whole recordings. The second searches these, several recordings at once.

N recordings, T encoder frames, V vocabulary, J joint width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bestrq.config import ConfigError
from bestrq.recognition.decoding import BLANK, TimedTokens, greedy_ctc_timed
from bestrq.recognition.inference import (
    InferenceSettings,
    Outputs,
    Source,
    StreamedOutputs,
    excluded_frames,
    transcribe,
)
from bestrq.recognition.stitching import stitch_recordings
from bestrq.recognition.transducer import TransducerModel
from bestrq.recognition.transducer_beam import LanguageModel, beam_search


@dataclass
class DecoderSettings:
    """How tokens are found in what the model gives."""

    head: Literal["auto", "ctc", "rnnt"] = "auto"
    """decoder of a hybrid model; auto takes the transducer where there is one"""
    beam: int = 1
    """hypotheses kept, of a transducer; 1 is greedy"""
    max_symbols: int = 10
    """labels that a transducer may emit at one encoder frame"""
    language_model: str = ""
    """token n-gram (ARPA, made by language_model.py) for shallow fusion; needs a beam of 2 or more"""
    language_model_weight: float = 0.3
    """factor of its log-probabilities"""
    label_bonus: float = 0.0
    """added for every label, in nats: makes up for what the language model takes from long hypotheses"""

    def __post_init__(self) -> None:
        for name in ("beam", "max_symbols"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoder.{name} is {getattr(self, name)}: give 1 or more")
        for name, unset in (("beam", 1), ("language_model", ""), ("label_bonus", 0.0)):
            if self.head == "ctc" and getattr(self, name) != unset:
                raise ConfigError(
                    f"decoder.{name} is {getattr(self, name)}, but decoder.head is 'ctc', which decodes greedily: "
                    f"give {unset!r}"
                )
        for name in ("language_model", "label_bonus"):
            if getattr(self, name) and self.beam == 1:
                raise ConfigError(f"decoder.{name} is given, but decoder.beam is 1 (greedy): give a beam such as 8")


class Decoder(Protocol):
    """The two halves; see above."""

    @property
    def description(self) -> str:
        """For a report, such as "greedy CTC, no language model"."""

    @property
    def stream(self) -> StreamedOutputs | None:
        """`outputs` of a stream, where it is known."""

    def outputs(self, log_mel: Tensor, segment_start: Tensor, segment_length: Tensor) -> Tensor:
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

    def outputs(self, log_mel: Tensor, segment_start: Tensor, segment_length: Tensor) -> Tensor:
        return self.log_probs(log_mel, segment_start, segment_length)

    def reduce(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=-1)

    def search(self, outputs: Sequence[Tensor], excluded: Sequence[Tensor]) -> list[TimedTokens]:
        ids = [one.masked_fill(out, BLANK) for one, out in zip(outputs, excluded, strict=True)]
        return [greedy_ctc_timed(one[None], torch.tensor([len(one)]))[0] for one in ids]


@dataclass(frozen=True)
class TransducerDecoder:
    """Greedy or beam search of a transducer over whole recordings; excluded frames are not there for it."""

    model: TransducerModel
    settings: DecoderSettings
    language_model: LanguageModel | None = None

    @property
    def description(self) -> str:
        how = self.settings
        if how.beam == 1:
            return "greedy transducer, no language model"
        model = (
            f"language model of weight {how.language_model_weight:g}" if self.language_model else "no language model"
        )
        return f"transducer, beam of {how.beam}, {model}"

    @property
    def stream(self) -> StreamedOutputs:
        return StreamedOutputs(self.model.encoder, lambda frames: self.model.joint.encoder_projection(frames).float())

    def outputs(self, log_mel: Tensor, segment_start: Tensor, segment_length: Tensor) -> Tensor:
        return self.model.encode(log_mel, segment_start, segment_length).float()

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
            beam = beam_search(
                self.model, encoded, lengths, how.beam, how.max_symbols,
                self.language_model, how.language_model_weight, how.label_bonus,
            )  # fmt: skip
            found = [beam.hypotheses(n)[0].tokens for n in range(len(frames))]
        return [
            TimedTokens(one.ids, frame[one.first_frame].tolist(), frame[one.last_frame].tolist())
            for one, frame in zip(found, heard, strict=True)
        ]


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
