"""Coverage of confidence intervals, and significance tests compared with NIST's."""

import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import jiwer
import numpy as np
import pytest

from bestrq.scoring.significance import (
    MIN_BOOTSTRAP,
    bootstrap_interval,
    mapsswe,
    paired_bootstrap,
    rate_intervals,
    ratio_intervals,
)

SCLITE = shutil.which("sclite")
needs_sclite = pytest.mark.skipif(SCLITE is None, reason="sclite (NIST's SCTK) is not on PATH")
EXPERIMENTS = 1000
# Words of a recording (median, spread of the logarithm), its error rate (mean, deviation), number of recordings.
SITUATIONS = {
    "three calls": (8000, 0.5, 0.15, 0.07, 3),
    "six calls": (8000, 0.5, 0.15, 0.07, 6),
    "eleven talks": (2500, 0.4, 0.06, 0.03, 11),
    "twenty calls": (8000, 0.5, 0.15, 0.07, 20),
    "125 calls": (8000, 0.5, 0.15, 0.07, 125),
    "sixty utterances": (20, 0.6, 0.1, 0.08, 60),
}


def simulate(situation: str, seed: int, count: int = EXPERIMENTS) -> tuple[np.ndarray, np.ndarray]:
    """Errors `[2, recordings, experiments]` of two equally good systems, and lengths `[recordings, experiments]`."""
    words, spread, mean, deviation, n = SITUATIONS[situation]
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(math.log(words), spread, (n, count)).astype(np.int64) + 1
    size = mean * (1 - mean) / deviation**2 - 1
    rates = generator.beta(mean * size, (1 - mean) * size, (n, count))
    return generator.binomial(lengths, rates, (2, n, count)), lengths


@pytest.mark.parametrize("situation", SITUATIONS)
def test_rate_intervals_cover_the_true_rate_in_93_to_97_percent_of_1000_experiments(situation: str) -> None:
    (errors, _), lengths = simulate(situation, seed=1)
    ends = np.array(rate_intervals(errors, lengths, num_resamples=1000)).T
    truth = SITUATIONS[situation][2]  # lengths and rates are independent, so the rate of all words is the mean rate
    covered = np.mean((ends[0] <= truth) & (truth <= ends[1]))
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("situation", ["eleven talks", "125 calls", "sixty utterances"])
def test_intervals_of_differences_cover_the_truth_in_93_to_97_percent_of_1000_experiments(situation: str) -> None:
    (first, second), lengths = simulate(situation, seed=2)
    low, high = ratio_intervals(first - second, lengths, num_resamples=1000, seed=0)
    assert 0.93 <= np.mean((low <= 0) & (high >= 0)) <= 0.97


@pytest.mark.parametrize("situation", ["six calls", "eleven talks", "125 calls", "sixty utterances"])
def test_intervals_of_relative_reductions_cover_the_truth_in_92_to_98_percent_of_600_experiments(
    situation: str,
) -> None:
    """The first system makes 80 % of the errors of the second one, on average."""
    (first, second), lengths = simulate(situation, seed=3, count=600)
    first = np.random.default_rng(4).binomial(first, 0.8)
    ends = [
        paired_bootstrap(*columns, num_resamples=500).reduction_interval
        for columns in zip(first.T, second.T, lengths.T, strict=True)
    ]
    covered = np.mean([low <= 0.2 <= high for low, high in ends])
    assert 0.92 <= covered <= 0.98


def test_a_reduction_is_of_the_rates_and_is_none_if_the_second_system_has_no_errors() -> None:
    first, second, lengths = np.array([3, 1, 0, 5]), np.array([4, 2, 4, 8]), np.array([10, 20, 30, 40])
    compared = paired_bootstrap(first, second, lengths)
    assert compared.reduction == pytest.approx(0.5) and compared.difference == pytest.approx(-0.09)
    low, high = compared.reduction_interval
    assert low < 0.5 < high < 1
    without = paired_bootstrap(first, np.zeros(4, np.int64), lengths)
    assert without.reduction is None and without.reduction_interval is None and without.difference == 0.09
    assert paired_bootstrap(first[:2], second[:2], lengths[:2]).reduction_interval is None, "too few recordings"


def test_studentised_interval_equals_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    lengths = generator.integers(5, 50, size=40)
    errors = generator.binomial(lengths, 0.3)

    def rate_and_deviation(picked: np.ndarray) -> tuple[float, float]:
        e, n = errors[picked], lengths[picked]
        rate = e.sum() / n.sum()
        return rate, math.sqrt(((e - rate * n) ** 2).sum()) / n.sum()

    rate, deviation = rate_and_deviation(np.arange(40))
    resamples = [rate_and_deviation(generator.integers(0, 40, size=40)) for _ in range(8000)]
    low, high = np.quantile([(resampled - rate) / spread for resampled, spread in resamples], [0.025, 0.975])
    expected = (rate - high * deviation, rate - low * deviation)
    assert np.allclose(bootstrap_interval(errors, lengths), expected, atol=0.004)


def test_quantities_resampled_together_have_the_same_intervals_as_alone() -> None:
    (errors, others), lengths = simulate("twenty calls", seed=4, count=1)
    both = np.concatenate([errors, others], axis=1)
    together = rate_intervals(both, np.repeat(lengths, 2, axis=1), 500, seed=7)
    alone = [rate_intervals(system, lengths, 500, seed=7)[0] for system in (errors, others)]
    assert np.allclose(together, alone, rtol=1e-12)
    assert alone[0] != rate_intervals(errors, lengths, 500, seed=8)[0]


@pytest.mark.filterwarnings("error")
def test_undefined_intervals_are_none_and_a_corpus_without_errors_has_an_interval() -> None:
    errors, lengths = np.arange(20) ** 2 % 7, np.arange(20) + 7
    for n in (0, 1, 2):
        assert bootstrap_interval(errors[:n], lengths[:n]) is None
    for n in (3, MIN_BOOTSTRAP - 1, MIN_BOOTSTRAP, 20):
        none = np.zeros(n, dtype=np.int64)
        assert bootstrap_interval(none, lengths[:n], 100) == (0.0, 0.0)
        assert rate_intervals(none[:, None], lengths[:n, None], 100) == [(0.0, 0.0)]
        assert bootstrap_interval(errors[:n], none, 100) is None
        low, high = rate_intervals(np.eye(n, 1, dtype=np.int64), lengths[:n, None], 100)[0]  # one error in all
        assert 0 <= low < 1 / lengths[:n].sum() < high < 10


def test_paired_bootstrap_finds_a_difference_that_separate_intervals_do_not_show() -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(500, 1500, size=20)
    hard = generator.beta(2, 8, size=20)  # recordings differ far more than systems do
    second = generator.binomial(lengths, hard)
    first = generator.binomial(second, 0.9)
    result = paired_bootstrap(first, second, lengths)
    assert result is not None and result.interval is not None
    assert result.interval[0] < result.difference < result.interval[1] < 0 and result.probability_first_better > 0.99
    a, b = (bootstrap_interval(errors, lengths) for errors in (first, second))
    assert a is not None and b is not None and a[1] > b[0]
    equal = paired_bootstrap(second, second, lengths)
    assert equal is not None and (equal.difference, equal.probability_first_better) == (0.0, 0.5)
    assert paired_bootstrap(first * 0, first * 0, first * 0) is None


REFERENCES = [
    "the cat sat on the mat and then it went away home again now",
    "one two three four five six seven eight nine ten",
]
FIRST = [
    "the cat sit on the mat and then it went a way home again now",
    "one two tree four five six seven eight nine ten",
]
SECOND = [
    "the cat sat on a mat and then it went away home again now",
    "one two three for five six seven ate nine ten",
]


def test_mapsswe_equals_nists_on_a_worked_example() -> None:
    # sc_stats 1.3 (SCTK): 4 segments, mean 0.250, standard deviation 1.258, Z 0.397. Its p, 0.697, is that of a Z cut
    # to two digits. By hand: "sat on the" 1 - 1, "away" 2 - 0, "three four" 1 - 1, "eight" 0 - 1.
    result = mapsswe(REFERENCES, FIRST, SECOND)
    assert (result.num_segments, result.mean_difference) == (4, 0.25)
    assert result.standard_deviation == pytest.approx(1.258, abs=5e-4)
    assert result.statistic == pytest.approx(0.397, abs=5e-4)
    assert result.p_value == pytest.approx(0.691, abs=5e-4)
    reverse = mapsswe(REFERENCES, SECOND, FIRST)
    assert (reverse.statistic, reverse.p_value) == (-result.statistic, result.p_value)


@pytest.mark.parametrize("first, second, segments", [
    ("x b c d e", "a b c d x", 2),  # three words between
    ("a x c x e", "a b c d e", 1),  # one word between is no boundary
    ("a x c d x", "a b c d e", 2),  # two words are a boundary
    ("a x c q d x", "a b c d e", 1),  # unless there is an insertion between them
    ("q a b c d e", "a b c d e q", 2),
    ("", "a b c d e", 1),
    ("a b c d e", "a b c d e", 0),
])  # fmt: skip
def test_segments_end_at_two_words_that_are_correct_in_both_systems(first: str, second: str, segments: int) -> None:
    assert mapsswe(["a b c d e"], [first], [second]).num_segments == segments


def test_mapsswe_of_equal_systems_is_not_significant() -> None:
    for references, hypotheses in (([], []), ([""], [""]), (REFERENCES, FIRST)):
        result = mapsswe(references, hypotheses, hypotheses)
        assert (result.statistic, result.p_value) == (None, 1.0)


def with_errors(words: list[str], rate: float, generator: random.Random) -> str:
    """Words with errors, some of them in bursts."""
    out: list[str] = []
    burst = 0
    for word in words:
        burst = generator.randrange(1, 4) if not burst and generator.random() < rate else max(burst - 1, 0)
        kind = generator.random() if burst else 1.0
        if kind < 0.6:
            out.append(f"x{generator.randrange(50)}")
        elif kind < 0.8:
            out += [word, f"y{generator.randrange(50)}"]
        elif not burst:
            out.append(word)
    return " ".join(out)


def test_p_values_are_uniform_for_equal_systems_and_small_for_a_better_one() -> None:
    generator = random.Random(6)
    p_values, better = [], []
    for trial in range(400):
        words = [f"w{generator.randrange(300)}" for _ in range(900)]
        first, second = (with_errors(words, 0.08, generator) for _ in range(2))
        p_values.append(mapsswe([" ".join(words)], [first], [second]).p_value)
        if trial < 40:
            better.append(mapsswe([" ".join(words)], [with_errors(words, 0.03, generator)], [second]).p_value)
    ordered = np.sort(p_values)
    distance = np.abs(ordered - (np.arange(400) + 0.5) / 400).max() + 0.5 / 400
    assert distance < 1.36 / math.sqrt(400)  # Kolmogorov and Smirnov, 5 %
    assert 0.02 <= np.mean(ordered < 0.05) <= 0.08
    assert np.median(better) < 0.001


def trn(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text} (s-{i:05d})\n" for i, text in enumerate(texts)))
    return path


def sclite(folder: Path, references: list[str], hypotheses: list[str], name: str, *more: str) -> str:
    """Alignment report of sclite."""
    files = trn(folder / "reference.trn", references), trn(folder / f"{name}.trn", hypotheses)
    command = [str(SCLITE), "-i", "spu_id", "-s", "-r", str(files[0]), "trn", "-h", str(files[1]), "trn", "-f", "0"]
    return subprocess.run([*command, *more], check=True, capture_output=True, text=True, cwd=folder).stdout


@needs_sclite
@pytest.mark.parametrize("vocabulary, may_differ", [(2000, False), (3, True)])
def test_error_counts_compared_with_sclite_on_200_pairs(tmp_path: Path, vocabulary: int, may_differ: bool) -> None:
    generator = random.Random(7)
    names = [f"w{i}" for i in range(vocabulary)]
    weights = [1 / (i + 1) for i in range(vocabulary)]
    references = [generator.choices(names, weights, k=generator.randrange(1, 30)) for _ in range(200)]
    if may_differ:
        hypotheses = [" ".join(generator.choices(names, k=generator.randrange(1, 30))) for _ in range(200)]
    else:
        hypotheses = [with_errors(words, 0.2, generator) for words in references]
    texts = [" ".join(words) for words in references]
    report = sclite(tmp_path, texts, hypotheses, "system", "-o", "pralign", "stdout")
    sclite_counts = [tuple(map(int, counts)) for counts in re.findall(r"#I\) (\d+) (\d+) (\d+) (\d+)", report)]
    outputs = [jiwer.process_words(*pair) for pair in zip(texts, hypotheses, strict=True)]
    jiwer_counts = [(output.hits, output.substitutions, output.deletions, output.insertions) for output in outputs]
    assert len(sclite_counts) == 200
    if not may_differ:
        assert [sum(counts[1:]) for counts in sclite_counts] == [sum(counts[1:]) for counts in jiwer_counts]
    # sclite minimises the cost with weights 4, 3 and 3; jiwer the number of errors.
    for (_, s, d, i), (_, sub, deleted, inserted) in zip(sclite_counts, jiwer_counts, strict=True):
        assert 4 * s + 3 * (d + i) <= 4 * sub + 3 * (deleted + inserted) and s + d + i >= sub + deleted + inserted


@needs_sclite
def test_mapsswe_equals_sc_stats(tmp_path: Path) -> None:
    generator = random.Random(8)
    references = [[f"w{generator.randrange(500)}" for _ in range(20)] for _ in range(100)]
    texts = [" ".join(words) for words in references]
    systems = {name: [with_errors(words, 0.1, generator) for words in references] for name in ("a", "b")}
    for name, hypotheses in systems.items():
        sclite(tmp_path, texts, hypotheses, name, "-o", "sgml")
    piped = "".join((tmp_path / f"{name}.trn.sgml").read_text() for name in systems)
    command = [str(Path(str(SCLITE)).with_name("sc_stats")), "-p", "-t", "mapsswe", "-v", "-n", "-"]
    report = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, input=piped).stdout
    match = re.search(r"# segs: (\d+)\).*\(mean: (\S+)\) \(std dev: (\S+)\) \(Z Stat: (\S+)\)", report)
    assert match is not None
    result = mapsswe(texts, *systems.values())
    figures = [result.num_segments, result.mean_difference, result.standard_deviation, result.statistic]
    assert figures == pytest.approx([float(text) for text in match.groups()], abs=6e-4)
