"""N-gram language models: back-off by definition and as in KenLM, files, estimates that sum to 1."""

from __future__ import annotations

import gzip
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq.decoding.ngram import FLOOR, Estimate, NGram, perplexity, read_arpa, train_ngram, write_arpa
from common.errors import UserError
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from tests.fuzzed import damaged
from tests.paths import REPOSITORY
from tests.tiny import WORDS, make_dataset
from tools import train_ngram as script

PIECES = ["<blank>", "a", "b", "\u2581", "d", "e"]
# Without a unigram: e. Unusual cases: n-grams whose history has no weight, a weight above 1 (positive logarithm), <unk>
# within longer n-grams, an n-gram ("b a \u2581") whose suffix is not in the file.
ARPA = """made by hand

\\data\\
ngram 1=7
ngram 2=6
ngram 3=4

\\1-grams:
-1.5 <unk> -0.11
-99 <s> -0.25
-0.9 </s>
-0.7\ta\t-0.5
-0.6 b 0.2
-0.8 \u2581 -0.3
-1.1 d

\\2-grams:
-0.4 <s> a -0.15
-0.3 a b -0.35
-0.2 b </s>
-0.5 \u2581 a 0.05
-0.9 a <unk> -0.4
-0.6 b a -0.45

\\3-grams:
-0.1 <s> a b
-0.25 a b </s>
-0.35 b a \u2581
-0.3 b a <unk>

\\end\\
"""


def write(path: Path, text: str | bytes = ARPA) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read_table(path: Path) -> tuple[int, dict[tuple[str, ...], tuple[float, float]]]:
    """Order, and log10 probability and back-off weight of every n-gram of a good ARPA file."""
    table, n = {}, 0
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.endswith("-grams:"):
            n = int(line[1])
        elif n and line and not line.startswith("\\"):
            fields = line.split()
            table[tuple(fields[1 : n + 1])] = float(fields[0]), float(fields[n + 1]) if len(fields) > n + 1 else 0.0
    return n, table


def backed_off(table: dict[tuple[str, ...], tuple[float, float]], history: tuple[str, ...], word: str) -> float:
    """log10 of p(word | history) by the definition of back-off."""
    if (*history, word) in table:
        return table[*history, word][0]
    if not history:
        return FLOOR / math.log(10)
    return table.get(history, (0, 0.0))[1] + backed_off(table, history[1:], word)


def expected(path: Path, pieces: Sequence[str], context: Sequence[int]) -> list[float]:
    """Log-probability of every label but the blank, then of </s>, by definition."""
    order, table = read_table(path)
    known = [piece if (piece,) in table else "<unk>" for piece in [*pieces, "</s>"]]
    history = tuple(["<s>", *(known[label] for label in context)][-(order - 1) :]) if order > 1 else ()
    return [backed_off(table, history, word) * math.log(10) for word in known[1:]]


def computed(model: NGram, context: Sequence[int]) -> list[float]:
    return [*model.log_probs(tuple(context))[1:].tolist(), model.end_log_prob(tuple(context))]


def sentences(vocab_size: int, count: int, seed: int = 0) -> list[list[int]]:
    """Labels that repeat themselves, so that long n-grams occur more than once; the last two labels never occur."""
    generator = np.random.default_rng(seed)
    walk = [[(start * start + 3 * i) % (vocab_size - 3) + 1 for i in range(length)]
            for start, length in generator.integers(0, 9, (count, 2))]  # fmt: skip
    return [[label if generator.random() > 0.1 else 1 for label in labels] for labels in walk]


def trained(path: Path, order: int, vocab_size: int = 12, count: int = 60) -> tuple[Estimate, list[str], Path]:
    estimate = train_ngram(sentences(vocab_size, count), order, vocab_size)
    pieces = ["<blank>", *(f"p{i}" for i in range(1, vocab_size))]
    write_arpa(path, estimate, pieces)
    return estimate, pieces, path


@settings(max_examples=60, deadline=None)
@given(context=st.lists(st.integers(1, 5), max_size=5))
def test_log_probs_equal_the_definition_of_back_off(context: list[int], tmp_path_factory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "by-hand.arpa")
    assert computed(read_arpa(path, PIECES), context) == pytest.approx(expected(path, PIECES, context), abs=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_a_trained_model_backs_off_by_definition(order: int, tmp_path: Path) -> None:
    _, pieces, path = trained(tmp_path / "lm.arpa", order)
    model = read_arpa(path, pieces)
    assert model.order == order
    for context in [c[:stop] for c in sentences(12, 8, seed=1) for stop in range(len(c) + 1)]:
        assert computed(model, context) == pytest.approx(expected(path, pieces, context), abs=1e-5)


def test_a_context_shorter_than_the_history_is_the_start_of_a_text(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path / "lm.arpa"), PIECES)
    assert torch.equal(model.log_probs((3, 4, 1, 2)), model.log_probs((1, 2)))
    assert not torch.equal(model.log_probs((1,)), model.log_probs((3, 1)))
    assert model.log_probs((1,))[2] == pytest.approx(-0.1 * math.log(10))
    # Some tools also write a weight for the longest n-grams; it is unused.
    weighted = read_arpa(write(tmp_path / "weighted.arpa", ARPA.replace("<s> a b\n", "<s> a b 0.7\n")), PIECES)
    assert torch.equal(weighted.log_probs((1, 2)), model.log_probs((1, 2)))


def test_the_blank_is_never_predicted_and_unlisted_words_have_the_probability_of_unk(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path / "lm.arpa"), PIECES)
    scores = model.log_probs((3, 4))
    assert scores.shape == (6,) and scores.dtype == torch.float32
    assert scores[0] == -torch.inf
    assert scores[5] == pytest.approx(-1.5 * math.log(10))
    without = ARPA.replace("ngram 1=7", "ngram 1=6").replace("-1.5 <unk> -0.11\n", "")
    assert read_arpa(write(tmp_path / "without.arpa", without), PIECES).log_probs((3, 4))[5] == pytest.approx(FLOOR)


def test_an_unknown_piece_of_the_tokenizer_is_the_files_unk(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path / "lm.arpa"), ["<blank>", "<unk>", "a", "b", "\u2581", "d", "e"])
    assert model.log_probs((3, 2))[1] == model.log_probs((3, 2))[6] == pytest.approx(-0.3 * math.log(10))


def test_log_probs_equal_kenlm_up_to_rounding(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm")
    _, pieces, path = trained(tmp_path / "lm.arpa", 4)
    # KenLM requires tabs around the words, and no comment before the counts.
    by_hand = re.sub(r"(?m)^(-[\d.]+)\s(.*?)(?: (-?[\d.]+))?$", "\\1\t\\2\t\\3", ARPA.removeprefix("made by hand\n"))
    by_hand = by_hand.replace("\t\n", "\n")
    for file, names in ((path, pieces), (write(tmp_path / "by-hand.arpa", by_hand), PIECES)):
        model, reference = read_arpa(file, names), kenlm.Model(str(file))
        for labels in [[label % (len(names) - 1) + 1 for label in sentence] for sentence in sentences(12, 30, seed=2)]:
            state, after = kenlm.State(), kenlm.State()
            reference.BeginSentenceWrite(state)
            for i in range(len(labels) + 1):
                expected_log10 = [reference.BaseScore(state, word, after) for word in [*names[1:], "</s>"]]
                assert computed(model, labels[:i]) == pytest.approx(
                    [log10 * math.log(10) for log10 in expected_log10], abs=2e-5
                )
                if i < len(labels):
                    reference.BaseScore(state, names[labels[i]], after)
                    state, after = after, state


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_after_every_context_sum_to_1_over_labels_and_the_end(order: int, tmp_path: Path) -> None:
    _, pieces, path = trained(tmp_path / "lm.arpa", order)
    model = read_arpa(path, pieces)
    contexts = [c[:stop] for c in sentences(12, 20) for stop in range(len(c) + 1)] + [[11, 11, 11], [10, 1, 4]]
    for context in contexts:
        assert np.exp(computed(model, context)).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_the_file_holds_the_interpolated_probabilities(name: str, tmp_path: Path) -> None:
    """Chen and Goodman 1998, section 2.5, from the counts and without any back-off."""
    texts = sentences(12, 60)
    words = [[13, *labels, 12] for labels in texts]

    def interpolated(history: tuple[int, ...], word: int) -> float:
        n = len(history)
        after = [text[i + n] for text in words for i in range(len(text) - n) if tuple(text[i : i + n]) == history]
        after = [follower for follower in after if follower != 13]
        lower_order = interpolated(history[1:], word) if history else 1 / 12
        return (
            (after.count(word) + len(set(after)) * lower_order) / (len(after) + len(set(after)))
            if after
            else lower_order
        )

    _, pieces, path = trained(tmp_path / name, 3)
    model = read_arpa(path, pieces)
    for context in ([], [1], [1, 4], [4, 7], texts[5][:2], [11, 1], [10, 11]):
        history = tuple([13, *context][-2:])
        expected = [math.log(interpolated(history, word)) for word in range(1, 13)]
        assert computed(model, context) == pytest.approx(expected, abs=1e-5)


def test_training_refuses_invalid_arguments() -> None:
    for labels in ([0], [12], [1, -1]):
        with pytest.raises(ValueError, match=r"need 1 \.\. 11"):
            train_ngram([[1, 2], labels], 2, 12)
    with pytest.raises(UserError, match="order = 0: give 1 or more"):
        train_ngram([[1]], 0, 12)
    with pytest.raises(UserError, match="no text to train"):
        train_ngram([], 2, 12)


def test_perplexity_is_computed_over_the_tokens_and_the_end(tmp_path: Path) -> None:
    _, pieces, path = trained(tmp_path / "lm.arpa", 3)
    model, texts = read_arpa(path, pieces), sentences(12, 10, seed=3)
    single = [computed(model, text[:i])[text[i] - 1] if i < len(text) else computed(model, text)[-1]
              for text in texts for i in range(len(text) + 1)]  # fmt: skip
    assert perplexity(model, texts) == pytest.approx(math.exp(-np.mean(single)), rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ARPA, "", r"line 0: not an ARPA file.*\\data\\.*Give the ARPA file"),
        (ARPA, "mmap lm http://kheafield.com/code\0\0", "line 1: not an ARPA file"),
        ("ngram 1=7", "ngram 1=many", "line 4: expected ngram 1=COUNT, not 'ngram 1=many'"),
        ("ngram 2=6\n", "", "line 5: expected ngram 2=COUNT, not 'ngram 3=4'"),
        ("ngram 2=6", "ngram 2=60", r"line 25: 6 2-grams before this line, but the counts after .* say 60"),
        ("\\2-grams:", "\\3-grams:", r"line 17: expected .2-grams:, not '.{1,2}3-grams:'"),
        ("-0.5 \u2581 a", "-0.5 the a", "line 21: the word 'the' is not a piece of the tok.*tools/train_ngram.py"),
        ("-0.5 \u2581 a", "-0.5 <blank> a", "line 21: the word '<blank>' is not a piece"),
        ("-0.9 </s>", "0.9 </s>", "line 11: expected a logarithm of at most 0, not '0.9'"),
        ("-0.9 </s>", "nan </s>", "line 11: expected a logarithm of at most 0, not 'nan'"),
        ("-0.9 </s>", "x </s>", "line 11: expected a logarithm of at most 0, not 'x'"),
        ("-0.1 <s> a b", "-0.1 <s> a b b b", "line 26: expected a log-probability, 3 words and an optional"),
        (ARPA[ARPA.index("-0.25 a b"):], "", "line 26: 1 3-grams up to the end of the file, .* the file is truncated"),
        ("\\end\\\n", "", r"line 30: expected .end., not the end of the file: the file is truncated"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_with_file_line_and_fix(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in ARPA
    path = write(tmp_path / "lm.arpa", ARPA.replace(old, new))
    with pytest.raises(UserError, match=f"(?s){path}, {message}"):
        read_arpa(path, PIECES)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    cut_off = write(tmp_path / "cut.gz", gzip.compress(ARPA.encode())[:-40])
    for path in (tmp_path / "missing", tmp_path, write(tmp_path / "plain.gz"), cut_off):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            read_arpa(path, PIECES)


@pytest.mark.parametrize("pieces", [["<blank>", "a", "a"], ["<blank>", "<s>"]])
def test_ambiguous_pieces_are_refused(pieces: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has two labels with the same piece"):
        read_arpa(write(tmp_path / "lm.arpa"), pieces)


@pytest.mark.parametrize("content", [ARPA.encode(), gzip.compress(ARPA.encode(), mtime=0)], ids=["plain", "gzip"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_model_or_a_user_error(content: bytes, data: st.DataObject) -> None:
    name = "fuzzed.arpa" if content[:2] != b"\x1f\x8b" else "fuzzed.arpa.gz"
    try:
        model = read_arpa(damaged(data, content, name, most=2), PIECES)
    except UserError:
        return
    for context in ((), (1,), (2, 1), (5, 5, 5)):
        scores = model.log_probs(context)
        assert not scores.isnan().any() and (scores < torch.inf).all()


TOKENIZERS = {
    "char": CharTokenizer.train([" ".join(WORDS)]),
    "bpe": BPETokenizer.train([" ".join(WORDS)] * 4, 30),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny")


def configure(folder: Path, dataset: Path, tokenizer: Tokenizer = TOKENIZERS["char"], **values) -> script.Config:
    tokenizer.save(folder / "export")  # no other file of an export is read
    data = script.DataSettings(dataset=str(dataset))
    return script.Config(**({"export": str(folder / "export"), "out": str(folder / "lm.arpa"), "data": data} | values))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_script_makes_a_model_with_a_low_perplexity_on_heldout_text(
    kind: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = TOKENIZERS[kind]
    script.build(configure(tmp_path, dataset, tokenizer))
    printed = capsys.readouterr().out
    model = read_arpa(tmp_path / "lm.arpa", tokenizer.pieces)
    assert model.order == 4
    for n in range(1, 5):
        count = sum(len(ngram) == n for ngram in read_table(tmp_path / "lm.arpa")[1])
        assert f"{count:,} of order {n}" in printed
    printed_perplexity = float(printed.split("perplexity per token on dev: ")[1].split(",")[0])
    assert 1 < printed_perplexity < 0.3 * tokenizer.vocab_size
    sense, nonsense = (perplexity(model, [tokenizer.encode(text)]) for text in ("hugo fabio", "oguh oibaf"))
    assert sense < 0.2 * nonsense


def test_the_script_runs_from_the_command_line(dataset: Path, tmp_path: Path) -> None:
    configure(tmp_path, dataset)
    command = [sys.executable, "-m", "tools.train_ngram", "--export", tmp_path / "export", "--data.dataset", dataset]
    command += ["--order", "2", "--out", tmp_path / "made" / "lm.arpa.gz"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert read_arpa(tmp_path / "made" / "lm.arpa.gz", TOKENIZERS["char"].pieces).order == 2


def test_texts_are_normalised_and_left_out_if_the_tokenizer_cannot_encode_them(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write(tmp_path / "texts.txt", "Jan, JAN!\n\nana \u03bb\njan jan\n")
    script.build(configure(tmp_path, Path(), data=script.DataSettings(), texts=str(texts), order=3))
    printed = capsys.readouterr().out
    assert f"{texts}: left out 1 of 4 texts, the first is line 3: characters unknown" in printed
    assert "trained on 2 texts, 16 tokens" in printed and "perplexity" not in printed
    script.build(configure(tmp_path, dataset, texts=str(texts)))
    assert "trained on 34 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"export": ""}, "export is missing: give it as --export"),
        ({"data": script.DataSettings()}, "data.dataset is missing: give it as --data.dataset FOLDER, or --texts"),
        ({"order": 0}, "order = 0: give 1 to 10"),
        ({"heldout_split": "train"}, "heldout_split = train is the training split: give another one"),
        ({"heldout_split": "none"}, "heldout_split = none: .*no recording with split 'none'"),
        ({"export": "nowhere"}, "nowhere holds no tokenizer.json"),
        ({"texts": "nowhere.txt"}, "texts = nowhere.txt: cannot be read as UTF-8 text"),
        ({"out": "/proc/nowhere/lm.arpa"}, "out = /proc/nowhere/lm.arpa: cannot write this file"),
        ({"out": "/"}, "out = /: cannot write this file"),
    ],
)
def test_mistakes_are_named_before_any_work(values: dict, message: str, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises((UserError), match=message):
        script.build(configure(tmp_path, dataset, **values))
    assert not (tmp_path / "lm.arpa").exists()


def test_texts_without_anything_to_learn_are_an_error(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.txt", "...\n\u03bb\n")
    with pytest.raises(UserError, match=r"no text is left \(1 empty, 1 with characters"):
        script.build(configure(tmp_path, Path(), data=script.DataSettings(), texts=str(texts)))
    write(texts, b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        script.build(configure(tmp_path, Path(), data=script.DataSettings(), texts=str(texts)))
