"""Character and BPE tokenizers. Id 0 is the blank of CTC and RNN-T: `encode` never returns it, `decode` skips it.

A saved tokenizer is a folder with `tokenizer.json` and, for BPE, the SentencePiece model; nothing is unpickled.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from common.errors import UserError
from common.files import read_bounded, read_json_object, replace_file, write_json

BLANK = 0
TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
SPACE_MARK = "\u2581"  # SentencePiece's symbol for a space
UNKNOWN_MARK = "\u2047"  # decoded text of a replaced character: a double question mark


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the blank (0)."""

    @property
    def pieces(self) -> list[str]:
        """Printable form of every id for text files with tokens separated by spaces: distinct, without white space.

        The blank is "<blank>", the id of unknown characters "<unk>", a space U+2581 (SentencePiece's mark); other
        unprintable characters are written like "<U+00A0>".
        """

    def encode(self, text: str) -> list[int]:
        """Convert text to ids in 1 .. vocab_size - 1. Raises UserError for unknown characters."""

    def decode(self, ids: Sequence[int]) -> str:
        """Convert ids to text; blanks are skipped."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of the tokenizer to a folder."""


class CharTokenizer:
    """Tokenizer with one id per character. `decode(encode(text)) == text`.

    Args:
        characters: known characters; id i + 1 stands for characters[i].
        replace_unknown: encode an unknown character as id vocab_size - 1 instead of raising.
    """

    def __init__(self, characters: Sequence[str], replace_unknown: bool = False) -> None:
        single = all(isinstance(c, str) and len(c) == 1 for c in characters)
        if not characters or not single or len(set(characters)) != len(characters):
            raise UserError(f"tokenizer characters {list(characters)[:8]}: must be distinct single characters")
        self.characters = list(characters)
        self.replace_unknown = replace_unknown
        self._ids = {c: i + 1 for i, c in enumerate(self.characters)}

    @classmethod
    def train(cls, texts: Iterable[str], replace_unknown: bool = False) -> CharTokenizer:
        """Tokenizer of the characters in `texts` and the space."""
        characters = {" "}.union(*texts)
        if characters == {" "}:
            raise UserError("the training texts of the tokenizer have no characters")
        return cls(sorted(characters), replace_unknown)

    @property
    def vocab_size(self) -> int:
        return 1 + len(self.characters) + self.replace_unknown

    @property
    def pieces(self) -> list[str]:
        # Only the space is written as the mark, because the mark may itself be a character of the texts.
        printed = [
            f"<U+{ord(c):04X}>" if c == SPACE_MARK else _printable(c.replace(" ", SPACE_MARK)) for c in self.characters
        ]
        return ["<blank>", *printed, *["<unk>"] * self.replace_unknown]

    def encode(self, text: str) -> list[int]:
        unknown = self.vocab_size - 1 if self.replace_unknown else BLANK
        ids = [self._ids.get(c, unknown) for c in text]
        if BLANK in ids:
            _raise_unknown(text, self._ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        table = ["", *self.characters, UNKNOWN_MARK]
        return "".join(table[i] for i in ids)

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save(Path(folder), {"kind": "char", "characters": self.characters, "replace_unknown": self.replace_unknown})


class BPETokenizer:
    """SentencePiece byte-pair encoding; its ids are shifted by one so that 0 stays the blank.

    `decode(encode(text)) == text` for text with single spaces, such as that of `common.text.label_text`.

    Args:
        model: serialised SentencePiece model.
        replace_unknown: encode unknown characters as SentencePiece's unknown id instead of raising.
    """

    def __init__(self, model: bytes, replace_unknown: bool = False) -> None:
        self.model = model
        self.replace_unknown = replace_unknown
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"the SentencePiece model is invalid ({error}); train the tokenizer again") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, replace_unknown: bool = False) -> BPETokenizer:
        """Train on `texts`. Raises UserError if they do not support `vocab_size` ids (including the blank)."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size - 1,
                character_coverage=1.0,
                normalization_rule_name="identity",
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,  # the same texts give the same model
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"vocab_size {vocab_size} is not possible for a BPE tokenizer of these texts: {error}"
            ) from error
        return cls(model.getvalue(), replace_unknown)

    @property
    def vocab_size(self) -> int:
        return 1 + self._processor.get_piece_size()

    @property
    def pieces(self) -> list[str]:
        pieces = (self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size()))
        return ["<blank>", *map(_printable, pieces)]

    def encode(self, text: str) -> list[int]:
        ids = self._processor.encode(text)
        unknown = self._processor.unk_id()
        if unknown in ids and not self.replace_unknown:
            pieces = (self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size()) if i != unknown)
            _raise_unknown(text, {" "}.union(*pieces))
        return [i + 1 for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) - 1 for i in ids if i != BLANK])

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save(Path(folder), {"kind": "bpe", "replace_unknown": self.replace_unknown}, self.model)


def load_tokenizer(folder: str | os.PathLike[str]) -> CharTokenizer | BPETokenizer:
    """Load a tokenizer written by `save`. Raises UserError if it is missing or damaged."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {TOKENIZER_FILE}: give a folder with a saved tokenizer")
    fields = read_json_object(path)
    kind, replace_unknown = fields.get("kind"), bool(fields.get("replace_unknown", False))
    if kind == "char" and isinstance(fields.get("characters"), list):
        return CharTokenizer(fields["characters"], replace_unknown)
    if kind == "bpe":
        try:
            return BPETokenizer(read_bounded(path.parent / MODEL_FILE), replace_unknown)
        except UserError as error:
            raise UserError(f"{path.parent / MODEL_FILE}: {error}; save the tokenizer again") from error
    raise UserError(f"{path}: kind is {kind!r}, expected 'char' or 'bpe'")


def tokenizer_files(folder: str | os.PathLike[str]) -> list[str]:
    """Sorted names of the files that `load_tokenizer` reads. Raises UserError as it does."""
    model = [MODEL_FILE] if isinstance(load_tokenizer(folder), BPETokenizer) else []
    return sorted([TOKENIZER_FILE, *model])


def _save(folder: Path, fields: dict[str, object], model: bytes | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        with replace_file(folder / MODEL_FILE) as file:
            file.write(model)
    write_json(folder / TOKENIZER_FILE, fields)


def _printable(piece: str) -> str:
    return "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" for c in piece)


def _raise_unknown(text: str, known: Iterable[str]) -> None:
    unknown = sorted(set(text) - set(known))
    listed = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:12])
    raise UserError(
        f"characters unknown to the tokenizer: {listed} in {text[:80]!r}. Normalise the text "
        "(common.text.label_text), train the tokenizer on texts with these characters, or set replace_unknown"
    )
