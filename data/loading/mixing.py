"""Other speech or noise added to segments in the mel domain: the input of a model whose targets stay clean.

Source: WavLM (Chen et al., arXiv 2110.13900, section III): a random region of at most half of a segment receives speech
of another speaker, or noise, at a random ratio of energies. Mel energies are added, as those of uncorrelated signals,
between the normalisation of the recording and its inverse. All draws are functions of the seed of the segment: they
depend neither on its row nor on the other segments of a batch. Imported only if used.
"""

from __future__ import annotations

import numpy as np

from common.errors import UserError
from common.hashing import mix
from data.format.dataset import Dataset, Normalisation
from data.loading.order import CropTable

_MIXING = 7  # domain of the hash; order.py, rows.py and mixture.py have the others
ATTEMPTS = 8
"""crops tried for another speaker"""
SPEECH_DB = (-5.0, 5.0)
NOISE_DB = (-5.0, 20.0)
"""ranges of the ratio of energies, segment over addition"""
TILT = 0.05
"""largest slope of the noise, in nats per mel bin at 80 bins: 17 dB from the first bin to the last"""
FLUCTUATION = 0.5
"""standard deviation of the noise around its spectrum, in nats: that of a mel energy over a few bins of a spectrum"""


class Mixer:
    """Mixes segments; picklable.

    Args:
        crops: the order of training, as the source of other speech.
        probability: that a segment is mixed.
        noise_share: share of noise among the additions.

    Raises:
        UserError: features whose energies cannot be recovered.
    """

    def __init__(
        self, dataset: Dataset, crops: CropTable, normalisation: Normalisation, probability: float, noise_share: float
    ) -> None:
        if dataset.features.standardized:
            raise UserError(
                "masking.mix_probability needs mel energies, but this dataset has standardized features: give 0, or "
                "prepare the dataset with features.standardized false"
            )
        self.dataset, self.crops, self.normalisation = dataset, crops, normalisation
        self.probability, self.noise_share = probability, noise_share

    def __call__(self, clean: np.ndarray, recording: int, seed: int) -> np.ndarray | None:
        """Mixed copy of a segment of a recording, normalised float32 `[n, M]`; None if it is not mixed."""
        generator = np.random.Generator(np.random.PCG64(int(mix(_MIXING, seed))))
        if generator.random() >= self.probability:
            return None
        frames, num_mels = clean.shape
        region = int(generator.integers(1, max(1, frames // 2) + 1))
        start = int(generator.integers(0, frames - region + 1))
        if generator.random() < self.noise_share:
            added, ratio = noise(generator, region, num_mels), generator.uniform(*NOISE_DB)
        else:
            speech = self.other_speech(recording, region, seed)
            if speech is None:
                return None
            added, ratio = speech, generator.uniform(*SPEECH_DB)
        stop = start + len(added)
        mean, inverse_std = (x.numpy() for x in self.dataset.statistics(recording, self.normalisation))
        mixed = clean.copy()
        mixed[start:stop] = (add(clean[start:stop] / inverse_std + mean, added, ratio) - mean) * inverse_std
        return mixed

    def other_speech(self, recording: int, frames: int, seed: int) -> np.ndarray | None:
        """Log-mel of at most `frames` frames of another speaker's crop, float32 `[n, M]`; None if none is found.

        Without labels of speakers, another recording counts as another speaker. An unreadable crop is skipped.
        """
        speaker = self.dataset.speaker(recording)
        for attempt in range(ATTEMPTS):
            crop = self.crops.substitute(int(mix(_MIXING, seed, attempt)), frames, attempt)
            if crop is None:
                continue
            other, start, stop, _ = crop
            same = self.dataset.speaker(other) == speaker if speaker else other == recording
            if same or other == recording:
                continue
            try:
                return self.dataset.read(other, start, stop).astype(np.float32)
            except UserError:  # reported when it is read as a segment of its own
                continue
        return None


def add(log_mel: np.ndarray, added: np.ndarray, ratio_db: float) -> np.ndarray:
    """Logarithm of the sum of energies, float32 `[n, M]`, with the second scaled to a ratio of total energies in dB."""
    first, second = (np.exp(x.astype(np.float64)) for x in (log_mel, added))
    scale = first.sum() / second.sum() / 10 ** (ratio_db / 10)
    return np.log(first + scale * second).astype(np.float32)


def noise(generator: np.random.Generator, frames: int, num_mels: int) -> np.ndarray:
    """Log-mel of stationary noise with a random slope over mel bins, float32 `[n, M]`."""
    slope = generator.uniform(-TILT, TILT) * 80 / num_mels
    spectrum = slope * (np.arange(num_mels) - num_mels / 2)
    return (spectrum + FLUCTUATION * generator.standard_normal((frames, num_mels))).astype(np.float32)
