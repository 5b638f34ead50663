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
    """updates between two validations; there is also one at the end"""
    max_recordings: int = 0
    """decode the first so many recordings only; 0 takes all"""
    best_by: Literal["wer", "cer"] = "wer"
    """error rate by which the best checkpoint is chosen"""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise UserError(f"validation.every_steps is {self.every_steps}: give 1 or more")
        if self.max_recordings < 0:
            raise UserError(f"validation.max_recordings is {self.max_recordings}: give 0 (all) or more")


@dataclass(frozen=True)
class Heldout:
    """A recording to decode, and what was said in it."""

    id: str
    source: Source
    reference: str
    language: str


@dataclass(frozen=True)
class Validation:
    """Corpus rates over all ranks, and one recording to look at."""

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
    """Decode held-out recordings, split over the ranks, and leave the model in training mode.

    The model is the plain one or FSDP's: every rank decodes its own recordings, so under FSDP2, whose forward is a
    collective, all ranks go through the same number of batches: each decodes everything.

    Args:
        recordings: the same on all ranks, of similar length side by side.
        decoder: of the model.
        text_of: token ids to text.
    """
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    mine = list(recordings) if sharded else list(recordings[world.rank :: world.size])
    counts = torch.zeros(4, dtype=torch.float64, device=world.device)
    reference = hypothesis = ""
    model.eval()
    sources = [recording.source for recording in mine]
    stride = model.encoder.settings.stride
    for index, tokens in decode_recordings(decoder, sources, settings, stride, frames_per_second, world.device):
        score = score_recording(mine[index].id, mine[index].reference, text_of(tokens.ids), mine[index].language)
        words, characters = score.words, score.characters
        totals = [words.errors, words.reference_length, characters.errors, characters.reference_length]
        counts += torch.tensor(totals, dtype=torch.float64, device=world.device)
        reference, hypothesis = score.reference, score.hypothesis
    model.train()
    if not sharded:
        counts = world.sum(counts)
    word_errors, num_words, character_errors, num_characters = counts.tolist()
    return Validation(word_errors / max(num_words, 1), character_errors / max(num_characters, 1), reference, hypothesis)
