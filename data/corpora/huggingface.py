"""Any audio dataset of the Hugging Face hub, or a local copy of one, by its name and its columns.

Which files make up a configuration and its splits is found out by the `datasets` library. The files are Parquet: what
is needed to list the recordings is read from them without the sound, over the network too; the sound is read by the
workers, a row at a time. A folder written by `save_to_disk` is read as well.
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

from common.errors import UserError, did_you_mean
from data.corpora.base import SPLITS, Unreadable, check_unusable
from data.corpora.lazy import LazySources, check_unique, repeat, with_faults
from data.corpora.parquet_rows import Place, RowSource, read_columns, read_schema
from data.corpora.remote import FileCache
from data.corpora.text_files import listed_names
from data.format.index import Recording

REQUIREMENTS = "requirements.txt"
# Names under which datasets keep these; the first one that is there is taken.
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
    """A dataset of the hub, or a folder: --dataset, and where they are not guessed its columns."""

    dataset: str = ""
    """OWNER/NAME on the hub, or a local folder: Parquet files laid out as on the hub, or written by save_to_disk."""
    subset: str = ""
    """Configuration, such as german; needed where the dataset has several."""
    splits: list[str] = field(default_factory=list)
    """Splits to read; empty: all. NAME=train (dev, test) says what a split with an unusual name is taken for."""
    audio_column: str = ""
    """Column of the sound; empty: guessed."""
    text_column: str = ""
    """Column of the transcript; empty: guessed; - : there is none (for pretraining)."""
    language_column: str = ""
    """Column of the language; empty: guessed; - : there is none."""
    speaker_column: str = ""
    """Column of the speaker; empty: guessed; - : there is none."""
    id_column: str = ""
    """Column of a unique id; empty: guessed, else the name of the audio file, else SPLIT/NUMBER; - : SPLIT/NUMBER."""
    language: str = ""
    """Language of all recordings, such as de, where no column tells it."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: main."""
    cache: str = "~/.cache/bestrq/huggingface"
    """Folder for files of the hub while they are read; it may be shared by the parts of a preparation."""
    cache_gb: float = 0.0
    """Streaming: at most this many GB (10**9 bytes) of files are kept, those used last. 0: all (downloaded)."""

    def __post_init__(self) -> None:
        if self.cache_gb < 0:
            raise UserError(f"cache_gb is {self.cache_gb}: must be 0 (keep all) or more")


def sources(settings: HuggingFaceSettings) -> LazySources:
    """All recordings, split by split in the order of the rows (so that a row group is read once), without the sound.

    Raises UserError: the library is missing; no such dataset, configuration, split or column; ids that are not unique.
    """
    if not settings.dataset:
        raise UserError("dataset is empty: say --dataset OWNER/NAME as on the hub, or a folder")
    return checked(listing(settings), settings.dataset, FileCache(settings.cache, round(settings.cache_gb * 1e9)))


def listing(settings: HuggingFaceSettings) -> pa.Table:
    """Columns id, text, language, speaker, split, part, address, group, row, audio: one row for every recording."""
    files = data_files(settings)
    wanted = _wanted_splits(settings, list(files))
    return pa.concat_tables([_listing(settings, name, split, files[name]) for name, split in wanted.items()])


def checked(table: pa.Table, dataset: str, cache: FileCache) -> LazySources:
    """Sources over a listing. A row without a usable id gives an Unreadable, with its location as id.

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
    """The files of every split, by the split's name. Raises UserError with what to do where they cannot be found."""
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
    found = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    other = [file for files in found.values() for file in files if not file.endswith(".parquet")]
    if other or not found:
        what = f"{PurePosixPath(other[0]).name} and the like" if other else "no data files"
        raise UserError(
            f"dataset {settings.dataset} holds {what}, this reader takes Parquet. For most datasets the hub keeps a "
            f"Parquet copy: hf download {settings.dataset} --repo-type dataset --revision refs/convert/parquet "
            "--local-dir DIR, then --dataset DIR/CONFIG. Audio files of your own: the corpus `folder`"
        )
    return {split: [_already_there(file) for file in files] for split, files in found.items()}


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"the library `datasets` is needed ({error}): pip install -r {REQUIREMENTS}") from error
    return datasets


def _explain(settings: HuggingFaceSettings, error: Exception) -> str:
    message = " ".join(str(error).split())[:500]
    if isinstance(error, ValueError) and "onfig" in message:
        return f"subset is {settings.subset!r} for {settings.dataset}: {message}"
    cannot = f"dataset {settings.dataset}: cannot be opened ({type(error).__name__}: {message})."
    if Path(settings.dataset).expanduser().is_dir() or Path(settings.dataset).is_absolute():
        return f"{cannot} Give a folder of Parquet files or of save_to_disk; loose audio is for the corpus folder"
    return (
        f"{cannot} Check the name; if it is "
        "gated, accept its terms on its page and log in with `hf auth login` or set HF_TOKEN; where the hub is out "
        f"of reach, fetch it elsewhere with `hf download {settings.dataset} --repo-type dataset --local-dir DIR`, say "
        "--dataset DIR"
    )


def _saved_to_disk(folder: Path) -> dict[str, list[str]]:
    """The Arrow files of a folder that `save_to_disk` wrote, by split; empty where it is none."""
    single = (folder / "state.json").is_file()
    splits = (
        {"train": folder}
        if single
        else {p: folder / p for p in sorted(listed_names(folder)) if (folder / p / "state.json").is_file()}
    )
    return {name: [str(file) for file in sorted(part.glob("data-*.arrow"))] for name, part in splits.items()}


def _already_there(address: str) -> str:
    """A file of the hub that its own library has downloaded before is read from there."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/(.+)", address)
    if not match:
        return address
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(match[1], match[3], revision=match[2], repo_type="dataset")
    return path if isinstance(path, str) else address


def _wanted_splits(settings: HuggingFaceSettings, known: Sequence[str]) -> dict[str, str]:
    """The dataset's splits that are read, with what each is taken for."""
    wanted = {}
    for entry in settings.splits or known:
        name, _, split = entry.partition("=")
        if name not in known:
            raise UserError(
                f"splits names {name!r}, {settings.dataset} {settings.subset} has {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
        split = split or next((s for prefix, s in _SPLIT_PREFIXES.items() if name.lower().startswith(prefix)), "")
        if split not in SPLITS:
            raise UserError(f"splits: is {name!r} for train, dev or test? Say --splits {name}=train (with the others)")
        wanted[name] = split
    return wanted


def _listing(settings: HuggingFaceSettings, part: str, split: str, files: Sequence[str]) -> pa.Table:
    if not files:
        raise UserError(f"split {part!r} of {settings.dataset} has no files")
    columns = find_columns(settings, read_schema(files[0]), files[0])
    needed = sorted({name for kind, name in columns.items() if kind != "audio" and name})
    with ThreadPoolExecutor(min(_LISTING_THREADS, len(files))) as pool:
        tables = list(pool.map(lambda file: read_columns(file, needed), files))
    listed, first = [], 0
    for address, table in zip(files, tables, strict=True):
        size = len(table)
        nothing = pa.nulls(size, pa.large_string())
        texts = {kind: table[name] if name else nothing for kind, name in columns.items() if kind != "audio"}
        texts["id"] = _ids(texts["id"], columns["id"], part, first)
        texts["speaker"] = texts["speaker"].dictionary_encode()
        texts["language"] = texts["language"].dictionary_encode()
        same = {"split": split, "part": part, "address": address, "audio": columns["audio"]}
        if not columns["language"]:
            same["language"] = settings.language
        listed.append(pa.table(texts | {name: repeat(value, size) for name, value in same.items()} | _where(table)))
        first += size
    return pa.concat_tables(listed)


def _where(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {name: table[name] for name in ("group", "row")}


def _ids(given: Any, column: str, part: str, first: int) -> Any:
    """The ids that a column holds; of names of audio files their stems; numbers of rows where there is no column."""
    if not column:
        return pa.array([f"{part}/{first + row:08d}" for row in range(len(given))], pa.large_string())
    if column.endswith(".path"):
        return pa.array([PurePosixPath(name or "").stem for name in given.to_pylist()], pa.large_string())
    return given


def find_columns(settings: HuggingFaceSettings, schema: pa.Schema, address: str) -> dict[str, str]:
    """The columns of audio, text, language, speaker and id, as the settings say or as guessed; '' where there is none.

    Raises UserError listing the columns where a named one is missing, or audio or text cannot be guessed.
    """
    names = list(schema.names)
    found = {}
    for kind, guesses in GUESSES.items():
        said = getattr(settings, f"{kind}_column")
        if said and said != "-" and said not in names:
            raise UserError(f"{kind}_column is {said!r}, {address} has {', '.join(names)}.{did_you_mean(said, names)}")
        fitting = [name for name in names if kind != "audio" or _holds_sound(schema.field(name).type)]
        guess = next((name for name in guesses if name in fitting), "")
        if kind == "audio" and not guess and len(fitting) == 1:
            guess = fitting[0]
        found[kind] = {"": guess, "-": ""}.get(said, said)
    described = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)
    if not found["audio"] or not _holds_sound(schema.field(found["audio"]).type):
        raise UserError(
            f"{address}: no column holds sound as struct<bytes, path> or binary: say --audio_column NAME. "
            f"Columns: {described}"
        )
    if not found["text"] and settings.text_column != "-":
        raise UserError(
            f"{address}: which column is the transcript? Say --text_column NAME, or - where there is none. "
            f"Columns: {described}"
        )
    if not found["id"] and not settings.id_column:
        kind_of_sound = schema.field(found["audio"]).type
        if pa.types.is_struct(kind_of_sound) and kind_of_sound.get_field_index("path") >= 0:
            found["id"] = f"{found['audio']}.path"
    return found


def _holds_sound(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_sound(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
