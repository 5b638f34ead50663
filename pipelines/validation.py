"""Error rates on held-out recordings during training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bestrq.long_form.decoders import Decoder, decode_recordings
from bestrq.long_form.inference import InferenceSettings, Source
from bestrq.recognition.ctc import CTCModel
from bestrq.recognition.transducer import TransducerModel
from bestrq.scoring.word_errors import score_recording
from bestrq.training.process import World
from common.errors import UserError


@dataclass
class ValidationSettings:
    """Word and character error rates on held-out recordings during training."""

    split: str = "dev"
    """split of the dataset that is decoded"""
    every_steps: int = 500
    """optimizer steps between two validations; the last step is always validated"""
    max_recordings: int = 0
    """decode only the first N recordings; 0 takes all"""
    best_by: Literal["wer", "cer"] = "wer"
    """error rate by which the best checkpoint is chosen"""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise UserError(f"validation.every_steps is {self.every_steps}: give 1 or more")
        if self.max_recordings < 0:
            raise UserError(f"validation.max_recordings is {self.max_recordings}: give 0 (all) or more")


@dataclass(frozen=True)
class Heldout:
    """Held-out recording with its reference."""

    id: str
    source: Source
    reference: str
    language: str


@dataclass(frozen=True)
class Validation:
    """Error rates over the recordings of all ranks, and one example."""

    wer: float
    cer: float
    reference: str
    hypothesis: str


def validate(
    model: CTCModel | TransducerModel,
    decoder: Decoder,
    recordings: Sequence[Heldout],
    text_of: Callable[[list[int]], str],
    settings: InferenceSettings,
    frames_per_second: float,
    world: World,
) -> Validation:
    """Decode held-out recordings, divided among the ranks, and leave the model in training mode.

    Under FSDP2, whose forward is a collective, all ranks must run the same batches: each decodes all recordings.

    Args:
        model: the plain or the FSDP2 module.
        recordings: equal on all ranks; similar lengths next to each other.
        decoder: of the model.
        text_of: converts token ids to text.
    """
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    rank_recordings = list(recordings) if sharded else list(recordings[world.rank :: world.size])
    counts = torch.zeros(4, dtype=torch.float64, device=world.device)
    reference = hypothesis = ""
    model.eval()
    sources = [recording.source for recording in rank_recordings]
    stride = model.encoder.settings.stride
    for index, tokens in decode_recordings(decoder, sources, settings, stride, frames_per_second, world.device):
        recording = rank_recordings[index]
        score = score_recording(recording.id, recording.reference, text_of(tokens.ids), recording.language)
        words, characters = score.words, score.characters
        totals = [words.errors, words.reference_length, characters.errors, characters.reference_length]
        counts += torch.tensor(totals, dtype=torch.float64, device=world.device)
        reference, hypothesis = score.reference, score.hypothesis
    model.train()
    if not sharded:
        counts = world.sum(counts)
    word_errors, num_words, character_errors, num_characters = counts.tolist()
    return Validation(word_errors / max(num_words, 1), character_errors / max(num_characters, 1), reference, hypothesis)
