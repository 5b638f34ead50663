"""Speech for a pretraining elsewhere: a compressed dataset of limited size, for a machine without network.

    python -m experiments.learning.pack --dataset DATASET --languages cs,nl --megabytes 60 --out pack

Takes recordings of the train split, without their texts, in the layout `uint8` (docs/compression.md): first those of
the languages, then others in a random order, until the size is reached.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.config import run_main
from common.errors import UserError
from data.format.dataset import Dataset, open_dataset
from data.format.encoding import encode_recording
from data.format.writer import DatasetWriter
from data.recording import Recording

INDEX_BYTES = 1000
"""of a recording in the index, above all its statistics; an upper bound, apart from long ids"""
SHARD_BYTES = 20_000_000
"""the space for a shard's header grows with it, and is not compressed"""


def pack(dataset: Dataset, languages: Sequence[str], megabytes: float, out: Path, seed: int = 0) -> float:
    """Write the dataset; returns its hours. Raises UserError if `out` exists or no recording fits."""
    if out.exists():
        raise UserError(f"--out {out} exists already: delete it, or choose another folder")
    limit, used, frames = megabytes * 1e6 - 200_000, 0, 0  # less the headers of shards and index
    features = dataset.features
    with DatasetWriter(out, features, SHARD_BYTES, name=f"{dataset.name}, packed", encoding="uint8") as writer:
        for i in packing_order(dataset, languages, seed):
            values = dataset.read(i, 0, int(dataset.frames[i]))
            size = len(encode_recording(values, "uint8")[1]) + INDEX_BYTES
            if used + size > limit:
                break
            label = Recording(dataset.id(i), language=dataset.language(i), speaker=dataset.speaker(i), split="train")
            writer.add(label, values)
            used, frames = used + size, frames + len(values)
        if not frames:
            raise UserError(f"--megabytes {megabytes:g}: not even one recording fits; give more")
        writer.finish()
    return frames / features.frames_per_second / 3600


def packing_order(dataset: Dataset, languages: Sequence[str], seed: int) -> list[int]:
    """Recordings of train: those of the languages first, each group in a random order."""
    shuffled = np.random.default_rng(seed).permutation(dataset.select("train")).tolist()
    return sorted(shuffled, key=lambda i: dataset.language(i) not in languages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="prepared dataset")
    parser.add_argument("--languages", default="", help="languages that come first, separated by commas")
    parser.add_argument("--megabytes", type=float, default=60.0, help="largest size of the new dataset (default: 60)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
    options = parser.parse_args()
    dataset = open_dataset(options.dataset)
    hours = pack(dataset, options.languages.split(","), options.megabytes, options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir()) / 1e6
    print(f"{hours:.2f} h of {dataset.total_frames / dataset.features.frames_per_second / 3600:.2f} h, {size:.1f} MB")


if __name__ == "__main__":
    run_main(main)
