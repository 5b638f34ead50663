"""Greedy search of a transducer compared with its definition; chunks, batches, times, streaming."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny_transducer import MELS, TableTransducer, make_any, make_transducer, random_frames
from torch import Tensor

from bestrq.decoding import transducer_search
from bestrq.decoding.tokens import TimedTokens
from bestrq.decoding.transducer_search import GreedyState, Transducer, greedy_search
from bestrq.model.streaming import encode_chunk, start_stream
from common.errors import UserError
from common.segments import Segments

LENGTHS = torch.tensor([24, 0, 1, 13, 24, 7])


def search_by_definition(model: Transducer, encoded: Tensor, max_symbols: int) -> TimedTokens:
    """Tokens of one sequence `[T, J]`, frame by frame and label by label."""
    ids, frames, confidence = [], [], []
    predicted, state = model.predict(torch.tensor([0]), model.start(1))
    for position, frame in enumerate(encoded):
        for _ in range(max_symbols):
            log_prob, label = model.joint(frame, predicted[0]).max(dim=0)
            if label == 0:
                break
            ids.append(int(label))
            frames.append(position)
            confidence.append(float(log_prob.exp()))
            predicted, state = model.predict(label[None], state)
    return TimedTokens(ids, frames, frames, confidence)


def search_in_chunks(model: Transducer, encoded: Tensor, chunks: Tensor, max_symbols: int) -> GreedyState:
    """Search chunk by chunk. chunks: lengths, int64 `[C, N]`."""
    state, start = None, torch.zeros_like(chunks[0])
    for lengths in chunks:
        index = (start[:, None] + torch.arange(int(lengths.max()))).clamp(max=encoded.shape[1] - 1)
        chunk = encoded[torch.arange(len(encoded))[:, None], index]
        state = greedy_search(model, chunk, lengths, max_symbols, state)
        start = start + lengths
    assert state is not None
    return state


KINDS = pytest.mark.parametrize("kind", ["table", "stateless", "lstm"])


@pytest.mark.parametrize("block", [1, 3, 4, 40])
@pytest.mark.parametrize("max_symbols", [1, 2, 5])
@KINDS
@torch.no_grad()
def test_search_equals_its_definition(kind: str, max_symbols: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transducer_search, "BLOCK", block)
    for blank_bias in (-2.0, 0.0, 3.0) if kind == "table" else (0.0,):
        model, encoded = make_any(kind, blank_bias=blank_bias, seed=1), random_frames(len(LENGTHS), 24)
        state = greedy_search(model, encoded, LENGTHS, max_symbols)
        expected = [
            search_by_definition(model, row[:length], max_symbols)
            for row, length in zip(encoded, LENGTHS.tolist(), strict=True)
        ]
        assert state.emitted == expected
        for tokens, reference in zip(state.emitted, expected, strict=True):
            assert tokens.confidence == pytest.approx(reference.confidence, abs=1e-9)
        assert state.num_frames.tolist() == LENGTHS.tolist()
        # Frames with no label, one label and the maximum; a low blank probability reaches the maximum often.
        counts = [tokens.first_frame.count(position) for tokens in expected for position in range(24)]
        assert set(counts) >= {0, 1, max_symbols} and len({label for tokens in expected for label in tokens.ids}) > 2
        assert blank_bias >= 0 or counts.count(max_symbols) > int(LENGTHS.sum()) // 2


@KINDS
def test_chunks_of_any_lengths_equal_one_pass(kind: str) -> None:
    model, encoded = make_any(kind), random_frames(len(LENGTHS), 24)
    whole = greedy_search(model, encoded, LENGTHS, 2)
    for seed in range(5):
        # Cuts differ between sequences; some chunks are empty.
        cuts = torch.rand(4, len(LENGTHS), generator=torch.Generator().manual_seed(seed)).sort(dim=0).values
        edges = torch.cat((0 * cuts[:1], cuts, 0 * cuts[:1] + 1)) * LENGTHS
        chunked = search_in_chunks(model, encoded, edges.long().diff(dim=0), 2)
        assert chunked.emitted == whole.emitted
        for tokens, reference in zip(chunked.emitted, whole.emitted, strict=True):
            assert tokens.confidence == pytest.approx(reference.confidence, abs=1e-9)
        assert chunked.num_frames.tolist() == LENGTHS.tolist()


@KINDS
def test_a_state_is_not_modified_when_the_search_continues(kind: str) -> None:
    model, encoded = make_any(kind), random_frames(2, 20)
    state = greedy_search(model, encoded[:, :10], torch.tensor([10, 10]), 2)
    before = copy.deepcopy(state)
    twice = [greedy_search(model, encoded[:, 10:], torch.tensor([10, 10]), 2, state) for _ in range(2)]
    assert twice[0].emitted == twice[1].emitted and len(twice[0].tokens(0).ids) > len(state.tokens(0).ids)
    assert state.emitted == before.emitted
    tensors, kept = ((s.predicted, s.num_frames, *s.prediction) for s in (state, before))
    assert all(torch.equal(*pair) for pair in zip(tensors, kept, strict=True))


def test_padding_is_ignored() -> None:
    model, encoded = TableTransducer(), random_frames(len(LENGTHS), 24)
    used = torch.arange(24)[:, None] < LENGTHS[:, None, None]
    other = torch.where(used, encoded, random_frames(len(LENGTHS), 24, seed=1))
    result = [greedy_search(model, frames, LENGTHS, 3).emitted for frames in (encoded, other)]
    assert result[0] == result[1] and result[0][1].ids == []


def test_times_are_within_the_recording_and_never_decrease() -> None:
    model, encoded = TableTransducer(), random_frames(len(LENGTHS), 24)
    for tokens, length in zip(greedy_search(model, encoded, LENGTHS, 3).emitted, LENGTHS.tolist(), strict=True):
        assert all(first <= second for first, second in pairwise(tokens.first_frame))
        assert all(0 <= frame < length for frame in tokens.first_frame)
        assert tokens.last_frame == tokens.first_frame and len(tokens.ids) == len(tokens.first_frame)


@pytest.mark.parametrize("vocab_size", [1, 5])
def test_a_model_that_always_predicts_the_blank_emits_nothing(vocab_size: int) -> None:
    model = TableTransducer(vocab_size, blank_bias=1e3)
    assert all(
        tokens.ids == [] for tokens in greedy_search(model, random_frames(6, 24, vocab_size), LENGTHS, 3).emitted
    )


@pytest.mark.parametrize("prediction", ["stateless", "lstm"])
@torch.no_grad()
def test_a_stream_equals_one_pass_over_the_recording(prediction: str) -> None:
    model = make_transducer(prediction, mask="chunk", chunk_size=4, left_chunks=1, causal_convolution=True)
    log_mel = torch.randn(5 * 16 + 6, MELS, dtype=torch.float64) * 2
    frames = torch.tensor([[len(log_mel)]])
    encoded = model.encode(log_mel[None], Segments(0 * frames, frames, len(log_mel)))
    whole = greedy_search(model, encoded, torch.tensor([22]), 2)
    stream, state = start_stream(model.encoder), None
    for chunk in log_mel.split(16):
        hidden, stream = encode_chunk(model.encoder, chunk, stream)
        projected = model.joint.encoder_projection(hidden)[None]
        state = greedy_search(model, projected, torch.tensor([len(hidden)]), 2, state)
    assert state is not None and state.emitted == whole.emitted and len(set(whole.tokens(0).first_frame)) > 5


def test_invalid_arguments_are_refused() -> None:
    model, encoded = TableTransducer(), random_frames(2, 5)
    lengths = torch.tensor([5, 5])
    with pytest.raises(UserError, match="decoder.max_symbols is 0"):
        greedy_search(model, encoded, lengths, 0)
    for wrong in ([5, 6], [-1, 5], [5]):
        with pytest.raises(ValueError, match="lengths"):
            greedy_search(model, encoded, torch.tensor(wrong), 1)
    with pytest.raises(ValueError, match="the state has 2 sequences"):
        greedy_search(model, encoded[:1], lengths[:1], 1, greedy_search(model, encoded, lengths, 1))
