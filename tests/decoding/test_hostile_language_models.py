"""ARPA files and hot words that are damaged, endless or of absurd counts: one error at once, in bounded memory."""

import gzip
import os
import random
from pathlib import Path

import pytest

from bestrq.decoding.hot_words import read_hot_words
from bestrq.decoding.ngram import MAX_LEFT_OUT, MAX_LINE, read_arpa, train_ngram, write_arpa
from common.errors import UserError
from tests.wrong_json import refused

PIECES = ["<blank>", "a", "b", "c"]
SPECIAL = [
    b"\0", b"\xff\xfe", b"\n", b"\n\n", b"\t", b"nan", b"-inf", b"inf", b"1e999", b"-1e308", b"9" * 5000, b"<unk>",
    b"<s>", b"\\end\\", b"\\data\\", b"\\2-grams:", b"ngram 1=999999999999999999", b"ngram 999=1", b"a",
    b"<blank>", b"_",
]  # fmt: skip


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    write_arpa(tmp_path / "lm.arpa", train_ngram([[1, 2, 3], [1, 1, 2], [3]], 3, len(PIECES)), PIECES)
    return tmp_path / "lm.arpa"


def damaged(valid: bytes, generator: random.Random) -> bytes:
    content = bytearray(valid)
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(content) + 1)
        kind = generator.randrange(4)
        if kind == 0:
            content[start : start + generator.randint(1, 40)] = b""
        elif kind == 1:
            content[start:start] = generator.choice(SPECIAL)
        elif kind == 2:
            content[start:start] = content[start : start + 60]
        else:
            content[start : start + 1] = bytes([generator.randrange(256)])
    return bytes(content)


@pytest.mark.parametrize("suffix", [".arpa", ".gz"])
def test_damaged_language_models_are_refused_by_name_or_give_log_probabilities(
    suffix: str, arpa: Path, tmp_path: Path
) -> None:
    generator, path = random.Random(3), tmp_path / f"damaged{suffix}"
    valid = arpa.read_bytes()
    count = 0
    for number in range(1500):
        if suffix == ".gz":
            content = (
                gzip.compress(damaged(valid, generator)) if number % 2 else damaged(gzip.compress(valid), generator)
            )
        else:
            content = damaged(valid, generator)
        path.write_bytes(content)

        def read() -> None:
            model = read_arpa(path, PIECES)
            for context in ([], [1], [2, 1], [3, 3, 3]):
                assert not model.log_probs(context).isnan().any() and float(model.log_probs(context).max()) <= 231

        count += refused(read, repr(content[:200]), str(path))
    assert 500 < count < 1500


def test_endless_lines_pipes_devices_and_lines_without_content_are_refused_in_bounded_memory(
    arpa: Path, tmp_path: Path
) -> None:
    header = arpa.read_bytes().partition(b"\\2-grams:\n")[0]
    (tmp_path / "line.arpa").write_bytes(header + b"\\2-grams:\n-1 " + b"a" * (MAX_LINE + 1))
    (tmp_path / "first.arpa").write_bytes(b"x" * (MAX_LINE + 1))
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\n" * (1 << 26)))
    (tmp_path / "comments.gz").write_bytes(gzip.compress(b"comment\n" * (1 << 22)))
    (tmp_path / "expands.gz").write_bytes(gzip.compress(b"\\data\\" + b" " * (1 << 26)))
    (tmp_path / "many.gz").write_bytes(gzip.compress(b"\\data\\\nngram 1=2\n\\1-grams:\n" + b"-1 a\n" * (1 << 22)))
    os.mkfifo(tmp_path / "pipe.arpa")
    (tmp_path / "zero.gz").symlink_to("/dev/zero")
    problems = {
        "line.arpa": "more than 64 KiB", "first.arpa": "line 1: more than 64 KiB",
        "bomb.gz": f"more than {MAX_LEFT_OUT:,} blank lines", "comments.gz": f"more than {MAX_LEFT_OUT:,} blank lines",
        "expands.gz": "more than 64 KiB", "many.gz": "at least 3 1-grams, but the counts .* say 2",
        "pipe.arpa": "not a regular file", "zero.gz": "not a regular file",
    }  # fmt: skip
    for name, problem in problems.items():
        with pytest.raises(UserError, match=rf"{name}.*{problem}"):
            read_arpa(tmp_path / name, PIECES)


def encode(text: str) -> list[int]:
    unknown = set(text) - set("abc")
    if unknown:
        raise UserError(f"unknown {sorted(unknown)}")
    return ["abc".index(c) + 1 for c in text]


def test_damaged_hot_words_are_refused_by_name_or_read(tmp_path: Path) -> None:
    generator, path = random.Random(4), tmp_path / "words.txt"
    count = 0
    for _ in range(1500):
        path.write_bytes(damaged(b"abc\t2.5\nab\nca\t1\n", generator))
        count += refused(lambda: read_hot_words(path, encode, 1.0), repr(path.read_bytes()), str(path))
    assert 500 < count < 1500
    path.write_text("a" * 1001)
    with pytest.raises(UserError, match="line 1: a phrase of 1,001 characters; give at most 1,000"):
        read_hot_words(path, encode, 1.0)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"words.txt: not a regular file"):
        read_hot_words(path, encode, 1.0)
