"""N-gram language model of transcripts for beam search with a recogniser: an ARPA file over its tokenizer's pieces.

    python -m tools.train_ngram --export runs/ctc/export --data.dataset datasets/synthetic --order 4 --out lm.arpa
    python -m tools.train_ngram --export runs/ctc/export --data.dataset datasets/calls --texts news.txt --out lm.arpa.gz

Texts are normalised as in the recogniser's training and split with its tokenizer, the only file read from the export.
Smoothing is interpolated Witten-Bell. Prints the number of n-grams per order and the perplexity on a held-out split.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bestrq.decoding.ngram import perplexity, read_arpa, train_ngram, write_arpa
from common.config import parse, run_main
from common.errors import UserError
from common.json_lines import bounded_lines
from common.text import label_text
from data.format.dataset import Dataset, open_dataset
from data.tokenizer import Tokenizer, load_tokenizer


@dataclass
class DataSettings:
    """Transcripts to train on."""

    dataset: str = ""
    """dataset folder, made by `python -m data.prepare`; optional with --texts"""
    split: str = "train"
    """split of the dataset"""
    language: str = ""
    """only recordings of this language; empty takes all. Also the language by which --texts are normalised"""


@dataclass
class Config:
    """N-gram language model over a recogniser's tokens."""

    export: str = ""
    """folder of the recogniser, RUN_FOLDER/export of a fine-tuning script; only its tokenizer is read"""
    out: str = "lm.arpa"
    """ARPA file to write; gzipped if the name ends in .gz"""
    order: int = 4
    """maximum length of n-grams in tokens, 1 to 10"""
    texts: str = ""
    """further text to train on, UTF-8, one sentence per line"""
    heldout_split: str = "dev"
    """split of the dataset for the perplexity; empty skips it"""
    data: DataSettings = field(default_factory=DataSettings)
    """transcripts"""

    def __post_init__(self) -> None:
        if not self.export:
            raise UserError("export is missing: give it as --export FOLDER")
        if not self.data.dataset and not self.texts:
            raise UserError("data.dataset is missing: give it as --data.dataset FOLDER, or --texts FILE.txt")
        if not 1 <= self.order <= 10:
            raise UserError(f"order = {self.order}: give 1 to 10")
        if self.data.dataset and self.heldout_split == self.data.split:
            raise UserError(
                f"heldout_split = {self.heldout_split} is the training split: give another one, or '' for no perplexity"
            )


def build(config: Config) -> None:
    """Train the model, write it, read it back and compute the perplexity."""
    # Errors in the settings are raised here, before any work.
    tokenizer = load_tokenizer(config.export)
    train: list[list[int]] = []
    heldout: list[list[int]] = []
    if config.data.dataset:
        dataset = open_dataset(config.data.dataset)
        train += encode(transcripts(dataset, config.data.split, config.data.language), tokenizer, config.data.split)
        if config.heldout_split:
            try:
                texts = transcripts(dataset, config.heldout_split, config.data.language)
                heldout += encode(texts, tokenizer, config.heldout_split)
            except UserError as error:
                raise UserError(f"heldout_split = {config.heldout_split}: {error}; '' skips the perplexity") from error
    if config.texts:
        train += encode(lines(config.texts, config.data.language), tokenizer, config.texts)
    out = Path(config.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise UserError(f"out = {out}: cannot write this file ({error}); choose another one") from error

    estimate = train_ngram(train, config.order, tokenizer.vocab_size)
    try:
        write_arpa(out, estimate, tokenizer.pieces)
    except OSError as error:
        raise UserError(f"out = {out}: cannot write this file ({error}); choose another one") from error
    print(f"trained on {size(train)}")
    orders = ", ".join(f"{count:,} of order {n}" for n, count in enumerate(estimate.num_ngrams, 1))
    print(f"n-grams: {orders}")
    model = read_arpa(out, tokenizer.pieces)  # from the file, so that the perplexity also checks the file
    if heldout:
        print(f"perplexity per token on {config.heldout_split}: {perplexity(model, heldout):.2f}, {size(heldout)}")
    print(f"language model: {out}")


def transcripts(dataset: Dataset, split: str, language: str) -> Iterator[tuple[str, str]]:
    """(name, label text) of a split's recordings; the text is empty for a recording without a transcript."""
    for recording in dataset.select(split, language or None).tolist():
        text = dataset.text(recording) or ""
        yield f"recording {dataset.id(recording)!r}", label_text(text, dataset.language(recording))


def lines(path: str, language: str) -> Iterator[tuple[str, str]]:
    """(name, label text) of each line of a file."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, path), 1):
                yield f"line {number}", label_text(line.decode(), language)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"texts = {path}: cannot be read as UTF-8 text ({error}); give another file") from error


def encode(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, source: str) -> list[list[int]]:
    """Token ids of texts.

    Empty texts and texts that the tokenizer cannot encode are left out; the number of the latter is printed. Raises
    UserError if no text remains.
    """
    encoded, refused, empty = [], [], 0
    for name, text in texts:
        try:
            ids = tokenizer.encode(text)
        except UserError as error:
            refused.append(f"{name}: {error}")
            continue
        if ids:
            encoded.append(ids)
        else:
            empty += 1
    if refused:
        total = len(encoded) + len(refused) + empty
        print(f"{source}: left out {len(refused):,} of {total:,} texts, the first is {refused[0]}")
    if not encoded:
        raise UserError(
            f"{source}: no text is left ({empty} empty, {len(refused)} with characters that the tokenizer does not "
            "have): give other texts, or an export whose tokenizer has these characters"
        )
    return encoded


def size(sequences: list[list[int]]) -> str:
    """Number of texts and tokens, for printing; the end of a text counts as a token."""
    return f"{len(sequences):,} texts, {sum(map(len, sequences)) + len(sequences):,} tokens"


if __name__ == "__main__":
    run_main(lambda: build(parse(Config, description=__doc__)))
