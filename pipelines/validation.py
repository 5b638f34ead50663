"""Validation during fine-tuning: error rates on held-out recordings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from bestrq.long_form.decoders import Decoder, decode_recordings
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.recognition.ctc import CTCModel
from bestrq.recognition.transducer import TransducerModel
from bestrq.scoring.word_errors import score_recording
from bestrq.training.process import World


@dataclass
class ValidationSettings:
    """Word and character error rates on held-out recordings during training."""

    split: str = "dev"
    """split of the dataset to decode"""
    every_steps: PositiveInt = 500
    """steps between validations; the last step is always validated"""
    max_recordings: NonNegativeInt = 0
    """decode only the first N recordings of the split; 0 takes all"""
    best_by: Literal["wer", "cer"] = "wer"
    """error rate that selects the best checkpoint"""


@dataclass(frozen=True)
class Heldout:
    """Held-out recording and its reference."""

    id: str
    source: RecordingSource
    reference: str
    language: str


@dataclass(frozen=True)
class Validation:
    """Corpus error rates over all ranks, and the last recording of this rank as an example."""

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
    """Decode held-out recordings, distributed over the ranks, and leave the model in training mode.

    With DDP, each rank decodes its share with the unwrapped model. With FSDP2, whose forward is a collective, the ranks
    need equal numbers of batches, so each rank decodes all recordings.

    Args:
        decoder: decoder of `model`.
        recordings: the same on all ranks, sorted by length.
        text_of: converts token ids to text.
    """
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    recordings = list(recordings) if sharded else list(recordings[world.rank :: world.size])
    counts = torch.zeros(4, dtype=torch.float64, device=world.device)
    reference = hypothesis = ""
    model.eval()
    sources = [recording.source for recording in recordings]
    stride = model.encoder.settings.stride
    for index, tokens in decode_recordings(decoder, sources, settings, stride, frames_per_second, world.device):
        recording = recordings[index]
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
