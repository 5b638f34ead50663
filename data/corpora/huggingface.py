"""Audio datasets of the Hugging Face hub, or local copies of them, by name and columns.

The `datasets` library finds the files of a configuration and its splits. The files must be Parquet: recordings are
listed without reading their audio, even over the network, and the workers read the audio row by row. A folder written
by `save_to_disk` can be read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from jsonargparse.typing import NonNegativeFloat

from common.errors import UserError, did_you_mean
from data.corpora.base import SPLITS, Unreadable, check_unusable
from data.corpora.lazy import LazySources, check_unique, repeat, with_faults
from data.corpora.parquet_rows import Place, RowSource, read_columns, read_schema
from data.corpora.remote import FileCache
from data.corpora.text_files import listed_names
from data.recording import Recording

REQUIREMENTS = "requirements.txt"
# Common column names; the first one that exists is used.
GUESSES = {
    "audio": ("audio", "speech", "sound"),
    "text": ("transcript", "transcription", "text", "sentence", "normalized_text", "transcribed_text", "raw_text"),
    "language": ("language", "lang", "locale", "lang_id"),
    "speaker": ("speaker_id", "speaker", "client_id", "spk_id", "speaker_name"),
    "id": ("id", "segment_id", "utterance_id", "utt_id", "audio_id", "file_id"),
}
_SPLIT_PREFIXES = {"train": "train", "dev": "dev", "val": "dev", "test": "test", "9_hours": "train", "1_hours": "train"}
_LISTING_THREADS = 16


@dataclass(frozen=True)
class HuggingFaceSettings:
    """Dataset of the hub or a folder: --dataset, and its columns unless they are guessed."""

    dataset: str = ""
    """OWNER/NAME on the hub, or a local folder: Parquet files laid out as on the hub, or written by save_to_disk."""
    subset: str = ""
    """Configuration, such as german; required if the dataset has several."""
    splits: list[str] = field(default_factory=list)
    """Splits to read; empty: all. NAME=train (dev, test) maps a split with an unusual name."""
    audio_column: str = ""
    """Audio column; empty: guessed."""
    text_column: str = ""
    """Column of the transcript; empty: guessed; -: none (for pretraining)."""
    language_column: str = ""
    """Column of the language; empty: guessed; -: none."""
    speaker_column: str = ""
    """Column of the speaker; empty: guessed; -: none."""
    id_column: str = ""
    """Column of a unique id; empty: guessed, else the name of the audio file, else SPLIT/NUMBER; -: SPLIT/NUMBER."""
    language: str = ""
    """Language of all recordings, such as de, if no column holds it."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: main."""
    cache: str = "~/.cache/bestrq/huggingface"
    """Cache folder for files of the hub; parts of a preparation may share it."""
    cache_gb: NonNegativeFloat = 0.0
    """Size limit of the cache in GB (10**9 bytes); the least recently used files are removed. 0: keep all files."""


def sources(settings: HuggingFaceSettings) -> LazySources:
    """List all recordings by split, in the order of the rows, so that each row group is read once.

    Raises UserError: the library is missing; no such dataset, configuration, split or column; ids that are not unique.
    """
    if not settings.dataset:
        raise UserError("dataset is empty: give --dataset OWNER/NAME as on the hub, or a folder")
    return checked(listing(settings), settings.dataset, FileCache(settings.cache, round(settings.cache_gb * 1e9)))


def listing(settings: HuggingFaceSettings) -> pa.Table:
    """Table with one row per recording: id, text, language, speaker, split, part, address, group, row, audio."""
    files = data_files(settings)
    selected = _selected_splits(settings, list(files))
    return pa.concat_tables([_listing(settings, name, split, files[name]) for name, split in selected.items()])


def checked(table: pa.Table, dataset: str, cache: FileCache) -> LazySources:
    """Sources of a listing. A row without a valid id becomes an Unreadable, with its location as id.

    Raises UserError if there are no rows, half or more of the ids are unusable, or ids are not unique.
    """
    if not len(table):
        raise UserError(f"{dataset}: the files hold no rows")
    places: dict[int, str] = {}  # row number -> location
    faults: list[str] = []
    number = 0
    for batch in table.select(["id", "address", "group", "row"]).to_batches(max_chunksize=1 << 16):
        for id, *place in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            try:
                Recording(id or "")
            except UserError as error:
                address, group, row = place
                places[number] = str(Place(address, group, row, ""))
                faults.append(f"{places[number]}: {error}; choose another --id_column")
            number += 1
    if faults:
        check_unusable(faults[0], len(faults), number)
    table = with_faults(table, places, faults)
    check_unique(table, dataset)
    return LazySources(table.unify_dictionaries(), partial(_source, cache))


def _source(cache: FileCache, row: Mapping[str, Any]) -> RowSource | Unreadable:
    if row["fault"] is not None:
        return Unreadable(row["id"], row["fault"])
    text = row["text"]
    recording = Recording(
        id=row["id"],
        text=None if text is None else " ".join(text.split()),
        language=row["language"] or "",
        speaker=row["speaker"] or "",
        split=row["split"],
    )
    return RowSource(recording, Place(row["address"], row["group"], row["row"], row["audio"]), cache)


def data_files(settings: HuggingFaceSettings) -> dict[str, list[str]]:
    """Files of every split by its name. Raises UserError, with the fix, if they are not found."""
    local = Path(settings.dataset).expanduser()
    if local.is_dir():
        saved = _saved_to_disk(local)
        if saved:
            return saved
    library = _library()
    try:
        builder = library.load_dataset_builder(
            str(local) if local.is_dir() else settings.dataset,
            settings.subset or None,
            revision=settings.revision or None,
        )
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise UserError(_explain(settings, error)) from error
    listed = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    other = [file for files in listed.values() for file in files if not file.endswith(".parquet")]
    if other or not listed:
        content = f"files such as {PurePosixPath(other[0]).name}" if other else "no data files"
        raise UserError(
            f"dataset {settings.dataset} holds {content}, but Parquet is required. For most datasets the hub has a "
            f"Parquet copy: hf download {settings.dataset} --repo-type dataset --revision refs/convert/parquet "
            "--local-dir DIR, then --dataset DIR/CONFIG. For your own audio files use the corpus `folder`"
        )
    return {split: [_from_hub_cache(file) for file in files] for split, files in listed.items()}


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"the library `datasets` is required ({error}): pip install -r {REQUIREMENTS}") from error
    return datasets


def _explain(settings: HuggingFaceSettings, error: Exception) -> str:
    message = " ".join(str(error).split())[:500]
    if isinstance(error, ValueError) and "onfig" in message:
        return f"subset is {settings.subset!r} for {settings.dataset}: {message}"
    problem = f"dataset {settings.dataset}: cannot be opened ({type(error).__name__}: {message})."
    if Path(settings.dataset).expanduser().is_dir() or Path(settings.dataset).is_absolute():
        return f"{problem} Give a folder of Parquet files or of save_to_disk; for audio files use the corpus folder"
    return (
        f"{problem} Check the name; if the dataset is gated, accept its terms on its page and log in with "
        "`hf auth login` or set HF_TOKEN; without access to the hub, download it on another machine with "
        f"`hf download {settings.dataset} --repo-type dataset --local-dir DIR` and use --dataset DIR"
    )


def _saved_to_disk(folder: Path) -> dict[str, list[str]]:
    """Arrow files of a folder written by `save_to_disk`, by split; empty for another folder."""
    single = (folder / "state.json").is_file()
    splits = (
        {"train": folder}
        if single
        else {p: folder / p for p in sorted(listed_names(folder)) if (folder / p / "state.json").is_file()}
    )
    return {name: [str(file) for file in sorted(part.glob("data-*.arrow"))] for name, part in splits.items()}


def _from_hub_cache(address: str) -> str:
    """Path of a file in the cache of huggingface_hub if it is there, else its address."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/(.+)", address)
    if not match:
        return address
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(match[1], match[3], revision=match[2], repo_type="dataset")
    return path if isinstance(path, str) else address


def _selected_splits(settings: HuggingFaceSettings, known: Sequence[str]) -> dict[str, str]:
    """Splits to read: name in the dataset -> train, dev or test. Raises UserError."""
    selected = {}
    for entry in settings.splits or known:
        name, _, split = entry.partition("=")
        if name not in known:
            raise UserError(
                f"splits has {name!r}, but {settings.dataset} {settings.subset} has {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
        split = split or next((s for prefix, s in _SPLIT_PREFIXES.items() if name.lower().startswith(prefix)), "")
        if split not in SPLITS:
            raise UserError(
                f"splits: {name!r} is not mapped to train, dev or test: use --splits {name}=train (with other splits)"
            )
        selected[name] = split
    return selected


def _listing(settings: HuggingFaceSettings, part: str, split: str, files: Sequence[str]) -> pa.Table:
    if not files:
        raise UserError(f"split {part!r} of {settings.dataset} has no files")
    columns = find_columns(settings, read_schema(files[0]), files[0])
    names = sorted({name for kind, name in columns.items() if kind != "audio" and name})
    with ThreadPoolExecutor(min(_LISTING_THREADS, len(files))) as pool:
        tables = list(pool.map(lambda file: read_columns(file, names), files))
    listed, first = [], 0
    for address, table in zip(files, tables, strict=True):
        size = len(table)
        nulls = pa.nulls(size, pa.large_string())
        texts = {kind: table[name] if name else nulls for kind, name in columns.items() if kind != "audio"}
        texts["id"] = _ids(texts["id"], columns["id"], part, first)
        texts["speaker"] = texts["speaker"].dictionary_encode()
        texts["language"] = texts["language"].dictionary_encode()
        constants = {"split": split, "part": part, "address": address, "audio": columns["audio"]}
        if not columns["language"]:
            constants["language"] = settings.language
        repeated = {name: repeat(value, size) for name, value in constants.items()}
        listed.append(pa.table(texts | repeated | {name: table[name] for name in ("group", "row")}))
        first += size
    return pa.concat_tables(listed)


def _ids(values: Any, column: str, part: str, first: int) -> Any:
    """Ids of a column; stems of file names; row numbers without a column."""
    if not column:
        return pa.array([f"{part}/{first + row:08d}" for row in range(len(values))], pa.large_string())
    if column.endswith(".path"):
        return pa.array([PurePosixPath(name or "").stem for name in values.to_pylist()], pa.large_string())
    return values


def find_columns(settings: HuggingFaceSettings, schema: pa.Schema, address: str) -> dict[str, str]:
    """Names of the columns of audio, text, language, speaker and id, set or guessed; '' if there is none.

    Raises UserError listing the columns if a named one is missing, or audio or text cannot be guessed.
    """
    names = list(schema.names)
    columns = {}
    for kind, guesses in GUESSES.items():
        setting = getattr(settings, f"{kind}_column")
        if setting and setting != "-" and setting not in names:
            suggestion = did_you_mean(setting, names)
            raise UserError(f"{kind}_column is {setting!r}, {address} has {', '.join(names)}.{suggestion}")
        candidates = [name for name in names if kind != "audio" or _holds_audio(schema.field(name).type)]
        guess = next((name for name in guesses if name in candidates), "")
        if kind == "audio" and not guess and len(candidates) == 1:
            guess = candidates[0]
        columns[kind] = {"": guess, "-": ""}.get(setting, setting)
    described = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)
    if not columns["audio"] or not _holds_audio(schema.field(columns["audio"]).type):
        raise UserError(
            f"{address}: no column holds audio as struct<bytes, path> or binary: give --audio_column NAME. "
            f"Columns: {described}"
        )
    if not columns["text"] and settings.text_column != "-":
        raise UserError(
            f"{address}: no column of transcripts was found: give --text_column NAME, or - if there is none. "
            f"Columns: {described}"
        )
    if not columns["id"] and not settings.id_column:
        audio_type = schema.field(columns["audio"]).type
        if pa.types.is_struct(audio_type) and audio_type.get_field_index("path") >= 0:
            columns["id"] = f"{columns['audio']}.path"
    return columns


def _holds_audio(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_audio(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
