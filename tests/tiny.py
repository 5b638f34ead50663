"""Dataset and settings for training runs that take seconds."""

from pathlib import Path
from typing import Any

import numpy as np

from data.features import FeatureSettings
from data.format.writer import DatasetWriter
from data.recording import Recording, Word

WORDS = "ana bela cid dora eva fabio gil hugo ida jan".split()

ENCODER = [
    "--encoder.dim=16",
    "--encoder.num_layers=2",
    "--encoder.num_heads=2",
    "--encoder.feedforward_dim=24",
    "--encoder.kernel_size=5",
    "--encoder.subsampling_channels=4",
]
DATA = ["--data.rows=4", "--data.row_frames=400", "--data.min_seconds=0.5", "--data.max_seconds=4", "--data.seed=3"]
RUN = ["--run.log_every=1", "--distributed.device=cpu", "--distributed.precision=float32"]


def make_dataset(
    path: Path, recordings: int = 40, seed: int = 0, long_seconds: float = 9.0, **features_changed: Any
) -> Path:
    """Write recordings of 1 to 3 s whose frames can be predicted from their words; return the folder.

    Every tenth recording lasts `long_seconds`. The last two tenths are the dev and the test split.
    """
    generator = np.random.default_rng(seed)
    features = FeatureSettings(**features_changed)
    word_spectra = generator.normal(size=(len(WORDS), features.num_mels)) * 2
    with DatasetWriter(path, features) as writer:
        for number in range(recordings):
            seconds = long_seconds if number % 10 == 5 else generator.uniform(1, 3)
            spoken = generator.integers(0, len(WORDS), size=max(1, int(seconds / 0.4)))
            edges = np.linspace(0, seconds, len(spoken) + 1)
            frames = int(seconds * features.frames_per_second)
            word_of_frame = np.minimum((np.arange(frames) / frames * len(spoken)).astype(int), len(spoken) - 1)
            log_mel = word_spectra[spoken[word_of_frame]] + generator.normal(size=(frames, features.num_mels))
            split = ("train", "dev", "test")[max(0, number * 10 // recordings - 7)]
            writer.add(
                Recording(
                    f"rec-{number:03d}",
                    " ".join(WORDS[w] for w in spoken),
                    [Word(WORDS[w], float(edges[i]), float(edges[i + 1])) for i, w in enumerate(spoken)],
                    language="en",
                    split=split,
                ),
                log_mel.astype(np.float32),
            )
        writer.finish()
    return path
