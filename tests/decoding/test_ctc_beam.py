"""CTC prefix beam search: all alignments at a large width, fusion, chunks, times, pruning, memory."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from tiny_fusion import Bigrams, hot_word_score
from torch import Tensor

from bestrq.decoding.ctc_beam import CTCBeamState, ctc_beam_search, likeliest_labels
from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hot_words import HotWords
from bestrq.decoding.sequences import Hypothesis, choose
from bestrq.decoding.tokens import greedy_ctc
from common.errors import UserError

Path = tuple[int, ...]
PHRASES = [((1, 2), 0.8), ((2, 2, 1), 0.5)]
FUSIONS = ("nothing", "language model", "hot words", "all")


def random_log_probs(frames: int, vocab_size: int = 3, seed: int = 0, scale: float = 1.5) -> Tensor:
    """float64 `[T, V]`"""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(frames, vocab_size, dtype=torch.float64, generator=generator)).log_softmax(dim=-1)


def collapsed(path: Path) -> Path:
    return tuple(label for label, _ in itertools.groupby(path) if label)


def make_fusion(kind: str, vocab_size: int = 3) -> Fusion | None:
    if kind == "nothing":
        return None
    model = Bigrams(vocab_size) if kind in ("language model", "all") else None
    hot_words = HotWords(PHRASES) if kind in ("hot words", "all") else None
    return Fusion(vocab_size, model, 0.7, 0.4 if kind == "all" else 0.0, hot_words)


def added(kind: str, labels: Path, vocab_size: int = 3) -> float:
    """What `make_fusion` gives a whole sequence, by definition."""
    total = hot_word_score(PHRASES, labels) if kind in ("hot words", "all") else 0.0
    if kind in ("language model", "all"):
        table = Bigrams(vocab_size).table
        total += 0.7 * sum(float(table[before, label]) for before, label in zip((0, *labels), labels, strict=False))
    return total + (0.4 * len(labels) if kind == "all" else 0.0)


def sums_over_alignments(log_probs: Tensor, kind: str = "nothing") -> dict[Path, float]:
    """Score of every label sequence that frames `[T, V]` can be."""
    totals: dict[Path, list[float]] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        score = sum(float(log_probs[frame, label]) for frame, label in enumerate(path))
        totals.setdefault(collapsed(path), []).append(score)
    return {
        labels: math.log(sum(map(math.exp, scores))) + added(kind, labels, log_probs.shape[1])
        for labels, scores in totals.items()
    }


def search(log_probs: Tensor, width: int, fusion: Fusion | None = None, count: int = 99) -> list[Hypothesis]:
    return ctc_beam_search(likeliest_labels(log_probs, count), width, fusion).hypotheses()


def scores_of(beam: list[Hypothesis]) -> dict[Path, float]:
    assert len(beam) == len({tuple(one.tokens.ids) for one in beam}), "a sequence stands twice in a beam"
    assert [one.score for one in beam] == sorted((one.score for one in beam), reverse=True)
    return {tuple(one.tokens.ids): one.score for one in beam}


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_a_beam_of_all_has_the_sum_over_all_alignments(frames: int, kind: str) -> None:
    for seed in range(3):
        log_probs = random_log_probs(frames, seed=seed)
        wanted = sums_over_alignments(log_probs, kind)
        beam = search(log_probs, 10_000, make_fusion(kind))
        assert scores_of(beam) == pytest.approx(wanted, abs=1e-6)
        assert tuple(beam[0].tokens.ids) == max(wanted, key=wanted.__getitem__)


def test_a_wider_beam_finds_what_greedy_search_has_missed() -> None:
    better = 0
    for seed in range(20):
        log_probs = random_log_probs(6, seed=seed, scale=1.0)
        wanted = sums_over_alignments(log_probs)
        [greedy] = greedy_ctc(log_probs[None], torch.tensor([6]))
        assert search(log_probs, 30)[0].score == pytest.approx(max(wanted.values()), abs=1e-9)
        better += wanted[tuple(greedy.ids)] < max(wanted.values())
    assert better >= 3


@pytest.mark.parametrize("kind", ["nothing", "all"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_no_sequence_stands_twice_in_a_narrow_beam_and_no_score_is_above_its_sum(width: int, kind: str) -> None:
    for seed in range(5):
        log_probs = random_log_probs(7, seed=seed, scale=0.5)
        wanted = sums_over_alignments(log_probs, kind)
        found = scores_of(search(log_probs, width, make_fusion(kind)))
        assert 1 <= len(found) <= width and all(score <= wanted[labels] + 1e-9 for labels, score in found.items())


class OneThenTwo:
    """A language model that expects 1 and then 2."""

    order = 2

    def log_probs(self, context: Path) -> Tensor:
        return torch.tensor({(): [0.0, 0.0, -30.0], (1,): [0.0, -30.0, 0.0]}.get(context, [0.0, -30.0, -30.0]))


def test_a_sequence_that_was_pruned_and_comes_back_is_one_with_those_that_grew_from_it() -> None:
    """(1) is pruned at the second frame, (1, 2) stays; the third makes (1) out of () again, the fourth (1, 2)."""
    probabilities = torch.tensor([[0.55, 0.45, 0], [0.4, 0, 0.6], [0.1, 0.9, 0], [0.5, 0, 0.5]], dtype=torch.float64)
    best = search(probabilities.log(), 2, Fusion(3, OneThenTwo(), 1.0))[0]
    assert best.tokens.ids == [1, 2]
    assert math.exp(best.score) == pytest.approx(0.45 * 0.6 * 0.1 * 0.5 + 0.55 * 0.4 * 0.9 * 0.5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_chunks_of_any_lengths_give_what_one_pass_gives(kind: str) -> None:
    log_probs, fusion = random_log_probs(40, 5, scale=1.0), make_fusion(kind, 5)
    likeliest = likeliest_labels(log_probs, 4)
    whole = ctc_beam_search(likeliest, 6, fusion)
    for cuts in ([1] * 40, [13, 0, 20, 7], [39, 1]):
        state: CTCBeamState | None = None
        for chunk in likeliest.split(cuts):
            before = state.hypotheses() if state else []
            after = ctc_beam_search(chunk, 6, fusion, state=state)
            assert state is None or state.hypotheses() == before, "the state has changed"
            state = after
        assert state is not None and state.num_frames == 40
        assert state.hypotheses() == whole.hypotheses()
        assert [one.tokens.confidence for one in state.hypotheses()] == [
            one.tokens.confidence for one in whole.hypotheses()
        ]


def likeliest_alignment(log_probs: Tensor, labels: Path) -> Path:
    paths = (path for path in itertools.product(range(3), repeat=len(log_probs)) if collapsed(path) == labels)
    return max(paths, key=lambda path: sum(float(log_probs[frame, label]) for frame, label in enumerate(path)))


@pytest.mark.parametrize("kind", ["nothing", "all"])
def test_times_and_confidences_are_those_of_the_likeliest_alignment(kind: str) -> None:
    for seed in range(3):
        log_probs = random_log_probs(5, seed=seed)
        for one in search(log_probs, 1000, make_fusion(kind)):
            path = torch.tensor(likeliest_alignment(log_probs, tuple(one.tokens.ids)))
            best = log_probs.gather(1, path[:, None]).squeeze(1)
            [wanted] = greedy_ctc(path[None], torch.tensor([5]), best[None])
            assert one.tokens == wanted
            assert one.tokens.confidence == pytest.approx(wanted.confidence, abs=1e-12)


def test_where_the_model_is_sure_the_beam_says_what_greedy_search_says() -> None:
    log_probs = random_log_probs(300, 6, scale=60.0)
    [greedy] = greedy_ctc(log_probs[None], torch.tensor([300]))
    for width, least in ((1, -math.inf), (8, -10.0)):
        best = ctc_beam_search(likeliest_labels(log_probs, 6), width, min_log_prob=least).hypotheses()[0].tokens
        assert best == greedy and best.confidence == pytest.approx(greedy.confidence)
    assert len(greedy.ids) > 100 and min(greedy.confidence) < 0.9


def test_labels_left_out_are_those_below_the_threshold_and_beyond_the_count() -> None:
    """The search is the full one over frames where they are impossible; the likeliest is never left out."""
    log_probs = random_log_probs(6, 4, scale=2.0)
    least = -1.2
    low = (log_probs < least) & (log_probs < log_probs.max(dim=1, keepdim=True).values)
    assert low.any(dim=1).all()
    pruned = ctc_beam_search(likeliest_labels(log_probs, 4), 1000, min_log_prob=least).hypotheses()
    wanted = search(log_probs.masked_fill(low, -math.inf), 1000)
    assert scores_of(pruned) == pytest.approx(scores_of(wanted))
    beyond = log_probs < log_probs.topk(2, dim=1).values[:, -1:]
    wanted = search(log_probs.masked_fill(beyond, -math.inf), 1000)
    assert scores_of(search(log_probs, 1000, count=2)) == pytest.approx(scores_of(wanted))
    assert [
        one.tokens.ids for one in ctc_beam_search(likeliest_labels(log_probs, 4), 9, min_log_prob=0).hypotheses()
    ] == [greedy_ctc(log_probs[None], torch.tensor([6]))[0].ids]


def test_hot_words_are_found_that_are_a_little_too_unlikely_and_given_back_when_they_break_off() -> None:
    log_probs = torch.tensor([[-9, -0.1, -9, -9], [-9, -9, -0.5, -1.5], [-0.1, -9, -9, -9]], dtype=torch.float64)

    def best(*phrases: tuple[Path, float]) -> Hypothesis:
        return search(log_probs, 100, Fusion(4, hot_words=HotWords(phrases)))[0]

    plain = search(log_probs, 100)[0]
    assert plain.tokens.ids == best(((1, 3), 0.4)).tokens.ids == [1, 2]
    assert best(((1, 3), 0.6)).tokens.ids == [1, 3]
    assert best(((1, 2, 1), 2.0)).tokens.ids == [1, 2] and best(((1, 2, 1), 2.0)).score == pytest.approx(plain.score)


def test_a_rescorer_chooses_among_the_hypotheses() -> None:
    beam = search(random_log_probs(5), 4)
    assert choose(beam) is beam[0]
    assert choose(beam, lambda hypotheses: [-one.score for one in hypotheses]) is beam[3]
    assert choose(beam, lambda hypotheses: [1.0 for _ in hypotheses]) is beam[0]
    with pytest.raises(ValueError, match="the rescorer gave 1 scores for 4 hypotheses"):
        choose(beam, lambda hypotheses: [1.0])


def test_nothing_heard_is_one_hypothesis_without_labels() -> None:
    for log_probs in (torch.zeros(0, 3), torch.tensor([[0.0, -math.inf, -math.inf]]).expand(9, 3)):
        [nothing] = search(log_probs, 4)
        assert (nothing.tokens.ids, nothing.score) == ([], 0.0)


def test_scores_stay_exact_over_an_hour() -> None:
    """90,000 frames of 40 ms whose sum is known: one label or none, as likely, in the first; then the blank."""
    log_probs = torch.full((90_000, 2), -math.inf, dtype=torch.float64)
    log_probs[0] = math.log(0.5)
    log_probs[1:, 0] = -0.25
    beam = search(log_probs, 4)
    assert [one.score for one in beam] == pytest.approx([math.log(0.5) - 0.25 * 89_999] * 2, rel=1e-12)


def test_sequences_that_no_hypothesis_begins_with_are_forgotten_and_times_never_fall() -> None:
    state = ctc_beam_search(likeliest_labels(random_log_probs(600, 5), 5), 4)
    tokens = state.hypotheses()[0].tokens
    assert len(tokens.ids) > 100 and len(state.interned) <= 2 * len(tokens.ids)
    assert all(first <= last for first, last in zip(tokens.first_frame, tokens.last_frame, strict=True))
    assert all(last < first for last, first in zip(tokens.last_frame, tokens.first_frame[1:], strict=False))
    assert all(first < second for first, second in pairwise(tokens.first_frame)) and tokens.last_frame[-1] < 600


def test_what_cannot_be_searched_is_refused() -> None:
    likeliest = likeliest_labels(random_log_probs(3), 3)
    with pytest.raises(UserError, match="decoder.beam is 0"):
        ctc_beam_search(likeliest, 0)
    with pytest.raises(ValueError, match="NaN"):
        ctc_beam_search(likeliest * torch.nan, 2)
    with pytest.raises(ValueError, match="another fusion"):
        ctc_beam_search(likeliest, 2, Fusion(3), state=ctc_beam_search(likeliest, 2))
