"""CTC prefix beam search: all alignments at a large width, fusion, chunks, times, pruning, memory."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from tiny_fusion import Bigrams, hot_word_score
from torch import Tensor

from bestrq.decoding.ctc_beam import CTCBeamState, ctc_beam_search, top_labels
from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hot_words import HotWords
from bestrq.decoding.hypotheses import Hypothesis, best_hypothesis
from bestrq.decoding.tokens import greedy_ctc
from common.errors import UserError

Path = tuple[int, ...]
PHRASES = [((1, 2), 0.8), ((2, 2, 1), 0.5)]
FUSIONS = ("none", "language model", "hot words", "all")


def random_log_probs(frames: int, vocab_size: int = 3, seed: int = 0, scale: float = 1.5) -> Tensor:
    """float64 `[T, V]`"""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(frames, vocab_size, dtype=torch.float64, generator=generator)).log_softmax(dim=-1)


def collapse(path: Path) -> Path:
    return tuple(label for label, _ in itertools.groupby(path) if label)


def make_fusion(kind: str, vocab_size: int = 3) -> Fusion | None:
    if kind == "none":
        return None
    model = Bigrams(vocab_size) if kind in ("language model", "all") else None
    hot_words = HotWords(PHRASES) if kind in ("hot words", "all") else None
    return Fusion(vocab_size, model, 0.7, 0.4 if kind == "all" else 0.0, hot_words)


def fusion_score(kind: str, labels: Path, vocab_size: int = 3) -> float:
    """Score of a whole sequence with `make_fusion`, by definition."""
    total = hot_word_score(PHRASES, labels) if kind in ("hot words", "all") else 0.0
    if kind in ("language model", "all"):
        table = Bigrams(vocab_size).table
        total += 0.7 * sum(float(table[before, label]) for before, label in zip((0, *labels), labels, strict=False))
    return total + (0.4 * len(labels) if kind == "all" else 0.0)


def sums_over_alignments(log_probs: Tensor, kind: str = "none") -> dict[Path, float]:
    """Score of every label sequence that frames `[T, V]` can produce."""
    totals: dict[Path, list[float]] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        score = sum(float(log_probs[frame, label]) for frame, label in enumerate(path))
        totals.setdefault(collapse(path), []).append(score)
    return {
        labels: math.log(sum(map(math.exp, scores))) + fusion_score(kind, labels, log_probs.shape[1])
        for labels, scores in totals.items()
    }


def search(log_probs: Tensor, width: int, fusion: Fusion | None = None, count: int = 99) -> list[Hypothesis]:
    return ctc_beam_search(top_labels(log_probs, count), width, fusion).hypotheses()


def scores_by_labels(beam: list[Hypothesis]) -> dict[Path, float]:
    assert len(beam) == len({tuple(h.tokens.ids) for h in beam}), "duplicate sequence in a beam"
    assert [h.score for h in beam] == sorted((h.score for h in beam), reverse=True)
    return {tuple(h.tokens.ids): h.score for h in beam}


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_a_beam_of_all_has_the_sum_over_all_alignments(frames: int, kind: str) -> None:
    for seed in range(3):
        log_probs = random_log_probs(frames, seed=seed)
        expected = sums_over_alignments(log_probs, kind)
        beam = search(log_probs, 10_000, make_fusion(kind))
        assert scores_by_labels(beam) == pytest.approx(expected, abs=1e-6)
        assert tuple(beam[0].tokens.ids) == max(expected, key=expected.__getitem__)


def test_a_wider_beam_finds_better_hypotheses_than_greedy_search() -> None:
    better = 0
    for seed in range(20):
        log_probs = random_log_probs(6, seed=seed, scale=1.0)
        expected = sums_over_alignments(log_probs)
        [greedy] = greedy_ctc(log_probs[None], torch.tensor([6]))
        assert search(log_probs, 30)[0].score == pytest.approx(max(expected.values()), abs=1e-9)
        better += expected[tuple(greedy.ids)] < max(expected.values())
    assert better >= 3


@pytest.mark.parametrize("kind", ["none", "all"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_sequences_of_a_narrow_beam_are_distinct_and_scores_at_most_the_sum(width: int, kind: str) -> None:
    for seed in range(5):
        log_probs = random_log_probs(7, seed=seed, scale=0.5)
        expected = sums_over_alignments(log_probs, kind)
        result = scores_by_labels(search(log_probs, width, make_fusion(kind)))
        assert 1 <= len(result) <= width and all(score <= expected[labels] + 1e-9 for labels, score in result.items())


class OneThenTwo:
    """Language model that predicts 1 and then 2."""

    order = 2

    def log_probs(self, context: Path) -> Tensor:
        return torch.tensor({(): [0.0, 0.0, -30.0], (1,): [0.0, -30.0, 0.0]}.get(context, [0.0, -30.0, -30.0]))


def test_a_pruned_sequence_that_reappears_is_merged_with_its_extensions() -> None:
    """(1) is pruned at frame 2 and (1, 2) is kept; frame 3 extends () to (1) again, frame 4 extends (1) to (1, 2)."""
    probabilities = torch.tensor([[0.55, 0.45, 0], [0.4, 0, 0.6], [0.1, 0.9, 0], [0.5, 0, 0.5]], dtype=torch.float64)
    best = search(probabilities.log(), 2, Fusion(3, OneThenTwo(), 1.0))[0]
    assert best.tokens.ids == [1, 2]
    assert math.exp(best.score) == pytest.approx(0.45 * 0.6 * 0.1 * 0.5 + 0.55 * 0.4 * 0.9 * 0.5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_chunks_of_any_lengths_equal_one_pass(kind: str) -> None:
    log_probs, fusion = random_log_probs(40, 5, scale=1.0), make_fusion(kind, 5)
    top = top_labels(log_probs, 4)
    whole = ctc_beam_search(top, 6, fusion)
    for cuts in ([1] * 40, [13, 0, 20, 7], [39, 1]):
        state: CTCBeamState | None = None
        for chunk in top.split(cuts):
            before = state.hypotheses() if state else []
            after = ctc_beam_search(chunk, 6, fusion, state=state)
            assert state is None or state.hypotheses() == before, "the state has changed"
            state = after
        assert state is not None and state.num_frames == 40
        assert state.hypotheses() == whole.hypotheses()
        assert [h.tokens.confidence for h in state.hypotheses()] == [h.tokens.confidence for h in whole.hypotheses()]


def best_alignment(log_probs: Tensor, labels: Path) -> Path:
    paths = (path for path in itertools.product(range(3), repeat=len(log_probs)) if collapse(path) == labels)
    return max(paths, key=lambda path: sum(float(log_probs[frame, label]) for frame, label in enumerate(path)))


@pytest.mark.parametrize("kind", ["none", "all"])
def test_times_and_confidences_are_those_of_the_best_alignment(kind: str) -> None:
    for seed in range(3):
        log_probs = random_log_probs(5, seed=seed)
        for h in search(log_probs, 1000, make_fusion(kind)):
            path = torch.tensor(best_alignment(log_probs, tuple(h.tokens.ids)))
            best = log_probs.gather(1, path[:, None]).squeeze(1)
            [expected] = greedy_ctc(path[None], torch.tensor([5]), best[None])
            assert h.tokens == expected
            assert h.tokens.confidence == pytest.approx(expected.confidence, abs=1e-12)


def test_beam_and_greedy_search_agree_on_confident_frames() -> None:
    log_probs = random_log_probs(300, 6, scale=60.0)
    [greedy] = greedy_ctc(log_probs[None], torch.tensor([300]))
    for width, least in ((1, -math.inf), (8, -10.0)):
        best = ctc_beam_search(top_labels(log_probs, 6), width, min_log_prob=least).hypotheses()[0].tokens
        assert best == greedy and best.confidence == pytest.approx(greedy.confidence)
    assert len(greedy.ids) > 100 and min(greedy.confidence) < 0.9


def test_outputs_below_the_threshold_or_beyond_the_count_are_left_out() -> None:
    """Equal to a full search in which they are impossible; the most probable output is never left out."""
    log_probs = random_log_probs(6, 4, scale=2.0)
    least = -1.2
    low = (log_probs < least) & (log_probs < log_probs.max(dim=1, keepdim=True).values)
    assert low.any(dim=1).all()
    pruned = ctc_beam_search(top_labels(log_probs, 4), 1000, min_log_prob=least).hypotheses()
    expected = search(log_probs.masked_fill(low, -math.inf), 1000)
    assert scores_by_labels(pruned) == pytest.approx(scores_by_labels(expected))
    beyond = log_probs < log_probs.topk(2, dim=1).values[:, -1:]
    expected = search(log_probs.masked_fill(beyond, -math.inf), 1000)
    assert scores_by_labels(search(log_probs, 1000, count=2)) == pytest.approx(scores_by_labels(expected))
    assert [h.tokens.ids for h in ctc_beam_search(top_labels(log_probs, 4), 9, min_log_prob=0).hypotheses()] == [
        greedy_ctc(log_probs[None], torch.tensor([6]))[0].ids
    ]


def test_hot_words_change_the_result_and_incomplete_ones_are_taken_back() -> None:
    log_probs = torch.tensor([[-9, -0.1, -9, -9], [-9, -9, -0.5, -1.5], [-0.1, -9, -9, -9]], dtype=torch.float64)

    def best(*phrases: tuple[Path, float]) -> Hypothesis:
        return search(log_probs, 100, Fusion(4, hot_words=HotWords(phrases)))[0]

    plain = search(log_probs, 100)[0]
    assert plain.tokens.ids == best(((1, 3), 0.4)).tokens.ids == [1, 2]
    assert best(((1, 3), 0.6)).tokens.ids == [1, 3]
    assert best(((1, 2, 1), 2.0)).tokens.ids == [1, 2] and best(((1, 2, 1), 2.0)).score == pytest.approx(plain.score)


def test_a_rescorer_selects_a_hypothesis() -> None:
    beam = search(random_log_probs(5), 4)
    assert best_hypothesis(beam) is beam[0]
    assert best_hypothesis(beam, lambda hypotheses: [-h.score for h in hypotheses]) is beam[3]
    assert best_hypothesis(beam, lambda hypotheses: [1.0 for _ in hypotheses]) is beam[0]
    with pytest.raises(ValueError, match="the rescorer returned 1 scores for 4 hypotheses"):
        best_hypothesis(beam, lambda hypotheses: [1.0])


def test_silence_is_one_hypothesis_without_labels() -> None:
    for log_probs in (torch.zeros(0, 3), torch.tensor([[0.0, -math.inf, -math.inf]]).expand(9, 3)):
        [silence] = search(log_probs, 4)
        assert (silence.tokens.ids, silence.score) == ([], 0.0)


def test_scores_stay_exact_over_an_hour() -> None:
    """90,000 frames of 40 ms with a known sum: one label or none in the first, equally probable; then the blank."""
    log_probs = torch.full((90_000, 2), -math.inf, dtype=torch.float64)
    log_probs[0] = math.log(0.5)
    log_probs[1:, 0] = -0.25
    beam = search(log_probs, 4)
    assert [h.score for h in beam] == pytest.approx([math.log(0.5) - 0.25 * 89_999] * 2, rel=1e-12)


def test_sequences_without_a_hypothesis_are_freed_and_times_never_decrease() -> None:
    state = ctc_beam_search(top_labels(random_log_probs(600, 5), 5), 4)
    tokens = state.hypotheses()[0].tokens
    assert len(tokens.ids) > 100 and len(state.sequences) <= 2 * len(tokens.ids)
    assert all(first <= last for first, last in zip(tokens.first_frame, tokens.last_frame, strict=True))
    assert all(last < first for last, first in zip(tokens.last_frame, tokens.first_frame[1:], strict=False))
    assert all(first < second for first, second in pairwise(tokens.first_frame)) and tokens.last_frame[-1] < 600


def test_invalid_arguments_are_refused() -> None:
    top = top_labels(random_log_probs(3), 3)
    with pytest.raises(UserError, match="decoder.beam is 0"):
        ctc_beam_search(top, 0)
    with pytest.raises(ValueError, match="NaN"):
        ctc_beam_search(top * torch.nan, 2)
    with pytest.raises(ValueError, match="another fusion"):
        ctc_beam_search(top, 2, Fusion(3), state=ctc_beam_search(top, 2))
