"""Beam search of a transducer: greedy search at width 1, all alignments at a large width; fusion, batches, chunks."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from tiny_fusion import Bigrams
from tiny_transducer import MELS, TableTransducer, make_any, make_transducer, random_frames
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hot_words import HotWords
from bestrq.decoding.hypotheses import Hypothesis
from bestrq.decoding.transducer_beam import BeamState, beam_search
from bestrq.decoding.transducer_search import Transducer, greedy_search
from bestrq.model.streaming import encode_chunk, start_stream
from common.errors import UserError
from common.segments import Segments

LENGTHS = torch.tensor([16, 0, 1, 9, 16, 5])
KINDS = pytest.mark.parametrize("kind", ["table", "stateless", "lstm"])


def hypotheses(state: BeamState) -> list[list[Hypothesis]]:
    return [state.hypotheses(n) for n in range(len(state.num_frames))]


def assert_equal(beams: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    """Assert equal tokens, frames and scores."""
    assert [[h.tokens for h in beam] for beam in beams] == [[h.tokens for h in beam] for beam in expected]
    for beam, reference in zip(beams, expected, strict=True):
        assert [h.score for h in beam] == pytest.approx([h.score for h in reference], rel=1e-12, abs=1e-9)
        for hypothesis, other in zip(beam, reference, strict=True):
            assert hypothesis.tokens.confidence == pytest.approx(other.tokens.confidence, rel=1e-9)


@torch.no_grad()
def sum_over_alignments(
    model: Transducer, encoded: Tensor, max_symbols: int, added: list[list[float]]
) -> dict[tuple[int, ...], float]:
    """Log-probability of every label sequence that frames `[T, J]` can emit.

    Args:
        added: score added to a label (second index) after another label or the start (first index).
    """
    labels = range(1, model.vocab_size)
    frame_labels = [emitted for count in range(max_symbols + 1) for emitted in itertools.product(labels, repeat=count)]
    outputs: dict[tuple[int, ...], Tensor] = {}

    def log_probs(emitted: tuple[int, ...]) -> Tensor:
        """Log-probabilities `[T, V]` after labels."""
        if emitted not in outputs:
            state = model.start(1)
            for label in (0, *emitted):
                predicted, state = model.predict(torch.tensor([label]), state)
            outputs[emitted] = model.joint(encoded, predicted)
        return outputs[emitted]

    totals: dict[tuple[int, ...], list[float]] = {}
    for alignment in itertools.product(frame_labels, repeat=len(encoded)):
        score = 0.0
        emitted: tuple[int, ...] = ()
        for frame, here in enumerate(alignment):
            for output in (*here, 0):
                score += float(log_probs(emitted)[frame, output])
                if output:
                    score += added[emitted[-1] if emitted else 0][output]
                    emitted = (*emitted, output)
        totals.setdefault(emitted, []).append(score)
    return {emitted: math.log(sum(map(math.exp, scores))) for emitted, scores in totals.items()}


@pytest.mark.parametrize("max_symbols", [1, 2, 4])
@KINDS
def test_a_beam_of_one_is_greedy_search(kind: str, max_symbols: int) -> None:
    for seed in range(3):
        model, encoded = make_any(kind, seed=seed), random_frames(len(LENGTHS), 16, seed=seed)
        beams = hypotheses(beam_search(model, encoded, LENGTHS, 1, max_symbols))
        assert [beam[0].tokens for beam in beams] == greedy_search(model, encoded, LENGTHS, max_symbols).emitted
        assert all(len(beam) == 1 for beam in beams)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("num_frames", "max_symbols"), [(1, 3), (2, 2), (3, 1), (3, 2)])
@KINDS
def test_a_beam_of_all_has_the_sum_over_all_alignments(
    kind: str, num_frames: int, max_symbols: int, fused: bool
) -> None:
    model, encoded = make_any(kind, vocab_size=3), random_frames(1, num_frames, joint_dim=3)
    language_model, added = None, torch.zeros(3, 3)
    if fused:
        language_model = Bigrams(3)
        added = 0.7 * language_model.table + 0.4
    expected = sum_over_alignments(model, encoded[0], max_symbols, added.tolist())
    state = beam_search(
        model,
        encoded,
        torch.tensor([num_frames]),
        300,
        max_symbols,
        Fusion(3, language_model, 0.7 * fused, 0.4 * fused),
    )
    beam = state.hypotheses(0)
    assert len(beam) == len(expected) == len({tuple(h.tokens.ids) for h in beam})
    assert {tuple(h.tokens.ids): h.score for h in beam} == pytest.approx(expected, abs=1e-6 if fused else 1e-9)
    assert [h.score for h in beam] == sorted((h.score for h in beam), reverse=True)
    assert tuple(beam[0].tokens.ids) == max(expected, key=expected.__getitem__)


def test_a_wider_beam_finds_better_hypotheses_than_greedy_search() -> None:
    better = 0
    for seed in range(10):
        model, encoded = TableTransducer(3, seed=seed), random_frames(1, 3, joint_dim=3, seed=seed)
        expected = sum_over_alignments(model, encoded[0], 2, [[0.0] * 3] * 3)
        greedy, wide = (beam_search(model, encoded, torch.tensor([3]), width, 2).hypotheses(0)[0] for width in (1, 100))
        best = max(expected.values())
        assert wide.score == pytest.approx(best, abs=1e-9) and expected[tuple(greedy.tokens.ids)] <= best
        better += expected[tuple(greedy.tokens.ids)] < best
    assert better >= 3


@pytest.mark.parametrize("width", [2, 3, 5])
@KINDS
def test_sequences_of_a_beam_are_distinct_and_scores_at_most_the_sum(kind: str, width: int) -> None:
    for seed in range(2):
        model, encoded = make_any(kind, vocab_size=3, seed=seed), random_frames(1, 3, joint_dim=3, seed=seed)
        expected = sum_over_alignments(model, encoded[0], 2, [[0.0] * 3] * 3)
        beam = beam_search(model, encoded, torch.tensor([3]), width, 2).hypotheses(0)
        assert 1 < len(beam) <= width and len(beam) == len({tuple(h.tokens.ids) for h in beam})
        assert all(h.score <= expected[tuple(h.tokens.ids)] + 1e-9 for h in beam)


def test_scores_of_merged_alignments_add_up_when_others_are_pruned() -> None:
    """Blank and label 1 are equally probable until a label is emitted, then only the blank is possible: probability
    2^-T of no label, the rest for one label. The three hypotheses of a frame are no label, an earlier label, and a new
    label; the last two are merged."""
    model = TableTransducer(3)
    model.table = torch.full((3, 3, 3), -torch.inf, dtype=torch.float64)
    model.table[..., 0] = 0
    model.table[0, 0, 1] = 0
    beam = beam_search(model, torch.zeros(1, 8, 3, dtype=torch.float64), torch.tensor([8]), 3, 3).hypotheses(0)
    assert [h.tokens.ids for h in beam] == [[1], []]
    assert [math.exp(h.score) for h in beam] == pytest.approx([1 - 2**-8, 2**-8])
    # The most probable alignment emits at the first frame.
    assert beam[0].tokens.first_frame == [0]


@pytest.mark.parametrize("fused", [False, True])
@KINDS
def test_hypotheses_do_not_depend_on_the_batch(kind: str, fused: bool) -> None:
    model, encoded = make_any(kind, seed=1), random_frames(len(LENGTHS), 16)
    fusion = Fusion(5, Bigrams(5), 0.5, 0.3, HotWords([((1, 2, 3), 0.5), ((2, 2), 1.0)])) if fused else None
    together = beam_search(model, encoded, LENGTHS, 4, 2, fusion)
    alone = [
        beam_search(model, encoded[n : n + 1, :length], LENGTHS[n : n + 1], 4, 2, fusion).hypotheses(0)
        for n, length in enumerate(LENGTHS.tolist())
    ]
    assert_equal(hypotheses(together), alone)
    used = torch.arange(16)[:, None] < LENGTHS[:, None, None]
    other = torch.where(used, encoded, random_frames(len(LENGTHS), 16, seed=1))
    assert_equal(hypotheses(beam_search(model, other, LENGTHS, 4, 2, fusion)), alone)


@pytest.mark.parametrize("fused", [False, True])
@KINDS
def test_chunks_of_any_lengths_equal_one_pass(kind: str, fused: bool) -> None:
    model, encoded = make_any(kind, seed=2), random_frames(len(LENGTHS), 16)
    fusion = Fusion(5, Bigrams(5), 0.5, 0.3, HotWords([((1, 2, 3), 0.5), ((2, 2), 1.0)])) if fused else None
    whole = beam_search(model, encoded, LENGTHS, 4, 2, fusion)
    for seed in range(3):
        cuts = torch.rand(3, len(LENGTHS), generator=torch.Generator().manual_seed(seed)).sort(dim=0).values
        edges = (torch.cat((0 * cuts[:1], cuts, 0 * cuts[:1] + 1)) * LENGTHS).long()
        state = None
        for start, lengths in zip(edges, edges.diff(dim=0), strict=False):
            index = (start[:, None] + torch.arange(int(lengths.max()))).clamp(max=15)
            chunk = encoded[torch.arange(len(encoded))[:, None], index]
            state = beam_search(model, chunk, lengths, 4, 2, fusion, state=state)
        assert state is not None and state.num_frames == LENGTHS.tolist()
        assert_equal(hypotheses(state), hypotheses(whole))


@pytest.mark.parametrize("width", [1, 3])
@KINDS
def test_a_state_is_not_modified_when_the_search_continues(kind: str, width: int) -> None:
    model, encoded = make_any(kind), random_frames(2, 12)
    half = torch.tensor([6, 6])
    state = beam_search(model, encoded[:, :6], half, width, 2)
    before, kept = hypotheses(state), [part.clone() for part in (state.predicted, *state.prediction)]
    first, second = (beam_search(model, encoded[:, 6:], half, width, 2, state=state) for _ in range(2))
    assert hypotheses(state) == before and hypotheses(first) == hypotheses(second) != before
    assert all(torch.equal(*pair) for pair in zip((state.predicted, *state.prediction), kept, strict=True))


@KINDS
def test_times_are_within_the_recording_and_never_decrease(kind: str) -> None:
    beams = hypotheses(beam_search(make_any(kind), random_frames(len(LENGTHS), 16), LENGTHS, 4, 3))
    for beam, length in zip(beams, LENGTHS.tolist(), strict=True):
        for tokens in (h.tokens for h in beam):
            assert all(first <= second for first, second in pairwise(tokens.first_frame))
            assert all(0 <= frame < length for frame in tokens.first_frame)
            assert tokens.last_frame == tokens.first_frame and len(tokens.ids) == len(tokens.first_frame)
            assert max((tokens.first_frame.count(frame) for frame in tokens.first_frame), default=0) <= 3


@pytest.mark.parametrize("fused", [False, True])
@KINDS
@torch.no_grad()
def test_a_confidence_is_the_model_probability_of_a_label_at_its_frame(kind: str, fused: bool) -> None:
    """Compared with the model, run along the labels again. Fusion scores are not included."""
    model, encoded = make_any(kind, seed=1), random_frames(len(LENGTHS), 16)
    fusion = Fusion(5, Bigrams(5), 0.5, 0.3) if fused else None
    for n, beam in enumerate(hypotheses(beam_search(model, encoded, LENGTHS, 3, 2, fusion))):
        for tokens in (h.tokens for h in beam):
            predicted, state = model.predict(torch.tensor([0]), model.start(1))
            expected = []
            for label, frame in zip(tokens.ids, tokens.first_frame, strict=True):
                expected.append(float(model.joint(encoded[n, frame], predicted[0])[label].exp()))
                predicted, state = model.predict(torch.tensor([label]), state)
            assert tokens.confidence == pytest.approx(expected, abs=1e-9)
    assert max(map(len, (h.tokens.ids for h in beam))) > 2


def test_hot_words_change_the_result_and_incomplete_ones_are_taken_back() -> None:
    """Labels 1 and 2, one frame each; 3 is 1 nat less probable than 2. Hot words are (1, 3) and (1, 2, 4)."""
    model = TableTransducer(5)
    model.table = torch.zeros_like(model.table)
    frames = torch.full((1, 2, 5), -30.0, dtype=torch.float64)
    frames[0, 0, 1], frames[0, 1, 2], frames[0, 1, 3] = 0, 0, -1
    # The blank ends every frame, so it must not cost anything; the length bonus makes each frame emit a label.
    frames[..., 0] = 0

    def best(*phrases: tuple[tuple[int, ...], float]) -> Hypothesis:
        fusion = Fusion(5, hot_words=HotWords(phrases), bonus=3.0) if phrases else Fusion(5, bonus=3.0)
        return beam_search(model, frames, torch.tensor([2]), 40, 1, fusion).hypotheses(0)[0]

    assert best().tokens.ids == best(((1, 3), 0.4)).tokens.ids == best(((1, 2, 4), 9.0)).tokens.ids == [1, 2]
    assert best(((1, 2, 4), 9.0)).score == pytest.approx(best().score)
    assert best(((1, 3), 0.6)).tokens.ids == [1, 3]
    assert best(((1, 3), 0.6)).score == pytest.approx(best().score + 2 * 0.6 - 1)


def test_silence_is_one_hypothesis_without_labels() -> None:
    model = TableTransducer(1)
    for beam in hypotheses(beam_search(model, random_frames(6, 16, 1), LENGTHS, 4, 2)):
        assert [(h.tokens.ids, h.score) for h in beam] == [([], 0.0)]
    blank_only = TableTransducer(blank_bias=1e3)
    assert all(
        beam[0].tokens.ids == [] for beam in hypotheses(beam_search(blank_only, random_frames(6, 16), LENGTHS, 4, 2))
    )


def test_a_language_model_is_evaluated_once_per_context() -> None:
    language_model = Bigrams(5)
    beam_search(TableTransducer(), random_frames(3, 16), torch.tensor([16] * 3), 4, 2, Fusion(5, language_model, 0.5))
    assert sorted(language_model.contexts) == [(), (1,), (2,), (3,), (4,)]


def test_a_language_model_of_order_one_gets_no_context() -> None:
    language_model = Bigrams(5)
    language_model.order = 1
    beam_search(TableTransducer(), random_frames(1, 9), torch.tensor([9]), 3, 2, Fusion(5, language_model, 0.5))
    assert language_model.contexts == [()]


def test_a_length_bonus_makes_hypotheses_longer() -> None:
    def mean_length(bonus: float) -> float:
        state = beam_search(
            TableTransducer(blank_bias=2), random_frames(4, 16), torch.tensor([16] * 4), 4, 3, Fusion(5, bonus=bonus)
        )
        return sum(len(beam[0].tokens.ids) for beam in hypotheses(state)) / 4

    assert mean_length(-2) < mean_length(0) < mean_length(2)


@pytest.mark.parametrize("prediction", ["stateless", "lstm"])
@torch.no_grad()
def test_a_stream_equals_one_pass_over_the_recording(prediction: str) -> None:
    model = make_transducer(prediction, mask="chunk", chunk_size=4, left_chunks=1, causal_convolution=True)
    log_mel = torch.randn(3 * 16 + 6, MELS, dtype=torch.float64) * 2
    frames = torch.tensor([[len(log_mel)]])
    encoded = model.encode(log_mel[None], Segments(0 * frames, frames, len(log_mel)))
    whole = beam_search(model, encoded, torch.tensor([14]), 3, 2)
    stream, state = start_stream(model.encoder), None
    for chunk in log_mel.split(16):
        hidden, stream = encode_chunk(model.encoder, chunk, stream)
        projected = model.joint.encoder_projection(hidden)[None]
        state = beam_search(model, projected, torch.tensor([len(hidden)]), 3, 2, state=state)
    assert state is not None and len(whole.hypotheses(0)[0].tokens.ids) > 3
    assert_equal(hypotheses(state), hypotheses(whole))


def test_sequences_without_a_hypothesis_are_freed() -> None:
    """Memory of a long search holds the sequences of its hypotheses, not those that were pruned."""
    state = beam_search(TableTransducer(blank_bias=-1), random_frames(1, 200), torch.tensor([200]), 4, 2)
    longest = max(len(h.tokens.ids) for h in state.hypotheses(0))
    assert longest > 100 and len(state.sequences) <= 2 * longest


def test_invalid_arguments_are_refused() -> None:
    model, encoded, lengths = TableTransducer(), random_frames(2, 5), torch.tensor([5, 5])
    with pytest.raises(UserError, match="decoder.beam is 0"):
        beam_search(model, encoded, lengths, 0, 1)
    with pytest.raises(UserError, match="decoder.max_symbols is 0"):
        beam_search(model, encoded, lengths, 2, 0)
    with pytest.raises(ValueError, match="lengths"):
        beam_search(model, encoded, lengths + 1, 2, 1)
    with pytest.raises(ValueError, match="the state has"):
        beam_search(model, encoded, lengths, 3, 1, state=beam_search(model, encoded, lengths, 2, 1))
    with pytest.raises(ValueError, match="another fusion"):
        beam_search(model, encoded, lengths, 2, 1, Fusion(5), beam_search(model, encoded, lengths, 2, 1))
