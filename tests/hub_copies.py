"""Small copies of datasets of the Hugging Face hub: README.md with the configurations, and Parquet files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpora_speech import encoded, put

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# Columns of facebook/multilingual_librispeech, and those that parler-tts/mls_eng has instead of the last three.
MLS = {
    "audio": AUDIO,
    "original_path": pa.string(),
    "begin_time": pa.float64(),
    "end_time": pa.float64(),
    "transcript": pa.string(),
    "audio_duration": pa.float64(),
    "speaker_id": pa.string(),
    "chapter_id": pa.string(),
    "file": pa.string(),
    "id": pa.string(),
}
MLS_ENGLISH = {name: MLS[name] for name in list(MLS)[:7]} | {"book_id": pa.string()}


def feature(kind: pa.DataType) -> dict[str, str]:
    """Description of a column in the metadata that `datasets` writes into a file."""
    if kind == AUDIO:
        return {"_type": "Audio"}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


def schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    features = {name: feature(kind) for name, kind in columns.items()}
    return pa.schema(list(columns.items()), {"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, rows: list[dict], columns: dict[str, pa.DataType], group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema(columns)), path, row_group_size=group)


def readme(configs: dict[str, dict[str, str]]) -> str:
    """Dataset card with the files by configuration and split."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join([*lines, "---", "# A dataset", ""])


def mls_row(speaker: int, book: int, number: int, text: str, language: str = "de", kind: str = "opus") -> dict:
    id = f"{speaker}_{book}_{number:06d}"
    url = f"http://www.archive.org/download/book_{book}_librivox/book_{number}_64kb.mp3"
    return {
        "audio": {"bytes": encoded(text, kind, language), "path": f"{id}.{kind}"},
        "original_path": url,
        "begin_time": 401.76,
        "end_time": 417.57,
        "transcript": text,
        "audio_duration": 15.81,
        "speaker_id": str(speaker),
        "chapter_id": str(book),
        "book_id": str(book),
        "file": f"{id}.{kind}",
        "id": id,
    }


def write_mls(folder: Path) -> Path:
    """Write a copy of facebook/multilingual_librispeech with two of its configurations; return the folder."""
    splits = ("dev", "test", "train", "9_hours", "1_hours")
    put(folder / "README.md", readme({c: {s: f"{c}/{s}-*" for s in splits} for c in ("german", "french")}))
    texts = {
        "german": ["das alte haus", "wir lesen", "ein gutes buch"],
        "french": ["la maison", "nous lisons", "un livre"],
    }
    for (config, spoken), language, speaker in zip(texts.items(), ("de", "fr"), (100, 200), strict=True):
        rows = [mls_row(speaker + n // 2, 7, n, text, language) for n, text in enumerate(spoken)]
        write_parquet(folder / config / "train-00000-of-00002.parquet", rows, MLS)
        more = [mls_row(speaker, 8, 3, spoken[0], language)]
        write_parquet(folder / config / "train-00001-of-00002.parquet", more, MLS)
        write_parquet(folder / config / "9_hours-00000-of-00001.parquet", rows[:2], MLS)
        write_parquet(folder / config / "1_hours-00000-of-00001.parquet", rows[2:], MLS)
        for number, split in enumerate(("dev", "test"), 4):
            row = mls_row(speaker + number, 9, number, spoken[1], language)
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", [row], MLS)
    return folder


def write_mls_english(folder: Path) -> Path:
    """Write a copy of parler-tts/mls_eng, which has one configuration and no column of ids; return the folder."""
    splits = ("dev", "test", "train")
    put(folder / "README.md", readme({"default": {split: f"data/{split}-*" for split in splits}}))
    for number, split in enumerate(splits):
        rows = [mls_row(300 + number, 5, n, "a good book", "en", "flac") for n in range(3)]
        kept = [{name: row[name] for name in MLS_ENGLISH} for row in rows]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", kept, MLS_ENGLISH)
    return folder
