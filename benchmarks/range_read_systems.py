"""Other systems of benchmarks.range_read: each writes the recordings, and reads 30 s in its usual way."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 3000
Noise = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class System:
    """System under test."""

    read: Callable[[int, int], Any]
    """(recording, start) -> frames [start, start + 3000)"""
    exact: bool
    """True if the values are stored without loss"""
    slow: bool
    """True if a read takes an entire item"""


def write_all(folder: Path, recordings: int, noise: Noise) -> dict[str, System]:
    cuts = lilcom_chunky_cuts(folder / "chunky", recordings, noise)
    table = hugging_face_table(folder / "table", recordings, noise)
    return {
        "lhotse lilcom_chunky": System(lambda r, s: _load(cuts[r], s), exact=False, slow=False),
        "lhotse Shar": System(shar_reader(folder / "shar", cuts), exact=False, slow=True),
        "WebDataset": System(webdataset_reader(folder / "tars", recordings, noise), exact=True, slow=True),
        "Hugging Face": System(lambda r, s: table[r]["log_mel"][s : s + LENGTH], exact=True, slow=True),
        "Hugging Face by Arrow": System(arrow_reader(table), exact=True, slow=False),
    }


def _load(cut: Any, start: int) -> np.ndarray:
    return cut.truncate(offset=start / 100, duration=LENGTH / 100).load_features()


def lilcom_chunky_cuts(folder: Path, recordings: int, noise: Noise) -> list[Any]:
    from lhotse import Features, LilcomChunkyWriter, MonoCut

    folder.mkdir()
    cuts = []
    with LilcomChunkyWriter(folder / "features") as writer:
        for number in range(recordings):
            values = noise(number).astype(np.float32)
            key = writer.write(f"r{number}", values)
            features = Features(
                type="fbank", num_frames=len(values), num_features=80, frame_shift=0.01, sampling_rate=16_000, start=0,
                duration=len(values) / 100, storage_type=writer.name, storage_path=str(writer.storage_path),
                storage_key=key, channels=0,
            )  # fmt: skip
            cuts.append(MonoCut(f"r{number}", 0, len(values) / 100, 0, features=features))
    return cuts


class Streamed:
    """Reads from a stream of items in a fixed order.

    A stream has no random access, so a read takes the next item and ignores `recording`. With `checking`, it skips
    items until the requested recording, so that its values can be compared.
    """

    def __init__(
        self, items: Iterator[Any], name_of: Callable[[Any], str], read: Callable[[Any, int], np.ndarray]
    ) -> None:
        self.items, self.name_of, self.read = items, name_of, read
        self.checking = True

    def __call__(self, recording: int, start: int) -> np.ndarray:
        item = next(self.items)
        while self.checking and self.name_of(item) != f"r{recording}":
            item = next(self.items)
        return self.read(item, start)


def shar_reader(folder: Path, cuts: list[Any]) -> Streamed:
    from lhotse import CutSet
    from lhotse.shar import SharWriter

    folder.mkdir()
    with SharWriter(folder, fields={"features": "lilcom"}, shard_size=2) as writer:
        for cut in cuts:
            writer.write(cut)
    stream = CutSet.from_shar(in_dir=folder, shuffle_shards=True).repeat()
    return Streamed(iter(stream), lambda cut: cut.id.split("_")[0], _load)


def webdataset_reader(folder: Path, recordings: int, noise: Noise) -> Streamed:
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=2, maxsize=2**40, verbose=0) as writer:
        for number in range(recordings):
            content = io.BytesIO()
            np.save(content, noise(number))
            writer.write({"__key__": f"r{number}", "npy": content.getvalue()})
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    stream = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).decode().repeat()
    return Streamed(iter(stream), lambda item: item["__key__"], lambda item, start: item["npy"][start : start + LENGTH])


def hugging_face_table(folder: Path, recordings: int, noise: Noise) -> Any:
    import datasets

    datasets.disable_progress_bars()

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(recordings):
            yield {"id": f"r{number}", "log_mel": noise(number)}

    features = datasets.Features({"id": datasets.Value("string"), "log_mel": datasets.Array2D((None, 80), "float16")})
    table = datasets.Dataset.from_generator(rows, features, cache_dir=str(folder / "cache"), writer_batch_size=1)
    table.save_to_disk(folder / "saved")
    return datasets.load_from_disk(folder / "saved").with_format("numpy")


def arrow_reader(table: Any) -> Callable[[int, int], np.ndarray]:
    """Slice and copy the flat values of the memory-mapped column."""
    chunks = [chunk.storage for chunk in table.data.column("log_mel").chunks]
    rows = [(chunk, row) for chunk in chunks for row in range(len(chunk))]

    def read(recording: int, start: int) -> np.ndarray:
        chunk, row = rows[recording]
        frames = chunk[row].values
        return frames.slice(start, LENGTH).flatten().to_numpy(zero_copy_only=False).reshape(LENGTH, 80).copy()

    return read
